"""Checkpoints from which a run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from lit_grpo.distributed import all_objects
from lit_grpo.engines import Stopped
from lit_grpo.errors import UserError

CHECKSUMS = "checksums.json"
"""Of the files of a sharded checkpoint."""


class Checkpoints(L.Callback):
    """Writes ``checkpoints/phase-00050.ckpt`` after 50 phases, and so on, and one when training ends.

    A checkpoint is of the moment before a phase, where nothing but the number of the phase tells what comes: prompts,
    samples and random numbers are functions of it and the run's seed. Each is there whole or not at all.

    Args:
        every_n_phases: how often.
        keep: how many of the latest stay.

    Raises:
        UserError: if an argument is below 1.
    """

    def __init__(self, every_n_phases: int = 50, keep: int = 2) -> None:
        for key, value in (("every_n_phases", every_n_phases), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{key}: expected a whole number >= 1, got {value}.")
        self.every_n_phases, self.keep = every_n_phases, keep
        self.folder = Path("checkpoints")
        self.done_before = float("inf")  # until training starts
        self.saved = -1
        """The phase before which the latest was saved."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.strategy.checkpoint_io = PlainCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.done_before = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch % self.every_n_phases == 0 and trainer.current_epoch > self.done_before:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, after SavePretrained: a run that has this checkpoint has nothing left to do."""
        if trainer.current_epoch > self.done_before:
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was before a phase that is given up in good order, and say how to go on after anything else."""
        if isinstance(exception, Stopped) and trainer.current_epoch > self.done_before:
            self.save(trainer)
        elif trainer.state.fn == "fit" and (saved := checkpoints_in(self.folder)):
            rank_zero_info(
                f"{saved[0]} is kept. To go on, repeat the command with --run_dir {trainer.default_root_dir}"
                " --ckpt_path last"
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say of Lightning's loop that it is between two phases, whatever hook saves."""
        loop = checkpoint["loops"]["fit_loop"]
        for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
            counts.update(dict.fromkeys(counts, trainer.current_epoch))
        batches = loop["epoch_loop.batch_progress"]
        batches["current"].update(dict.fromkeys(batches["current"], 0))
        batches["is_last_batch"] = False

    def save(self, trainer: L.Trainer) -> None:
        """Save the state between two phases, and remove what need not be kept.

        Raises:
            UserError: if there is no room, or the like.
        """
        if trainer.current_epoch == self.saved:
            return
        path = self.folder / f"phase-{trainer.current_epoch:05d}.ckpt"
        unfinished, damaged = path.with_suffix(".unfinished"), path.with_suffix(".damaged")
        try:
            if trainer.is_global_zero:
                remove(unfinished)
            trainer.strategy.barrier()
            trainer.save_checkpoint(unfinished, weights_only=False)
            sums = all_objects(checksums(unfinished, trainer.global_rank), trainer.world_size)
            if trainer.is_global_zero and unfinished.is_dir():
                (unfinished / CHECKSUMS).write_text(json.dumps({k: v for part in sums for k, v in part.items()}))
        except (OSError, RuntimeError, CheckpointException) as error:
            remove(unfinished)
            if (reason := reason_of(error)) is None:
                raise
            earlier = checkpoints_in(self.folder)
            raise UserError(
                f"checkpoint: cannot write {str(path)!r}: {reason}. Make room, or set"
                " --checkpoint.keep 1 or another --run_dir."
                + (f" {str(earlier[0])!r} holds: go on with --ckpt_path last." if earlier else "")
            ) from error
        if trainer.is_global_zero:
            if path.exists():  # a damaged one
                path.rename(damaged)
            unfinished.rename(path)
            remove(damaged)
            for old in checkpoints_in(self.folder)[self.keep :]:
                remove(old)
        trainer.strategy.barrier()  # a process that ended now would take the first one with it
        self.saved = trainer.current_epoch


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes where it is told to: Lightning's own writes to the folder of temporary files first, and then moves."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


def reason_of(error: BaseException | None) -> str | None:
    """What the file system said, if it was that; torch wraps it, or complains of a file that is too short."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    words = str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or words
        error = error.__cause__ or error.__context__
    return "the file could not be written whole" if "inline_container" in words else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted(folder.glob("phase-*.ckpt"), reverse=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: a file, or the folder of a sharded one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
    else:
        path.unlink(missing_ok=True)


def checksums(path: Path, rank: int) -> dict[str, int]:
    """Of the files that a process wrote, which are on the disk when this returns."""
    mine = [path] if path.is_file() and rank == 0 else list(path.glob(f"__{rank}_*"))
    if path.is_dir() and rank == 0:
        mine += [path / ".metadata", path / "meta.pt"]
    return {file.name: checksum(file, sync=True) for file in mine}


def checksum(path: Path, sync: bool = False) -> int:
    """CRC-32 of a file; with ``sync``, once it is on the disk."""
    value = 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def latest_whole(folder: Path) -> Path | None:
    """The latest checkpoint of a run that can be read; a warning names those that cannot."""
    for path in checkpoints_in(folder):
        if (reason := damage(path)) is None:
            rank_zero_info(f"Going on from {path}")
            return path
        rank_zero_warn(f"ckpt_path: {str(path)!r} is damaged ({reason}); the one before it is used.")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every byte of it is read and compared with its checksum."""
    try:
        if path.is_dir():
            for name, expected in json.loads((path / CHECKSUMS).read_text()).items():
                if checksum(path / name) != expected:
                    return f"the checksum of {name} is another"
        else:
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    return f"the checksum of {bad} is another"
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a changed byte leads to, nobody can list
        return f"{type(error).__name__}: {error}"
    return None
