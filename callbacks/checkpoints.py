"""Checkpoints from which a run goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint import FileSystemReader

from lit_grpo.engines import Stopped
from lit_grpo.errors import UserError


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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

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
        path = self.folder / f"phase-{trainer.current_epoch:05d}.ckpt"
        unfinished = path.with_suffix(".unfinished")
        try:
            if trainer.is_global_zero:
                remove(unfinished)
            trainer.save_checkpoint(unfinished, weights_only=False)
        except OSError as error:
            remove(unfinished)
            earlier = checkpoints_in(self.folder)
            raise UserError(
                f"checkpoint: cannot write {str(path)!r}: {error.strerror or error}. Make room, or set"
                " --checkpoint.keep 1 or another --run_dir."
                + (f" {str(earlier[0])!r} holds: go on with --ckpt_path last." if earlier else "")
            ) from error
        if trainer.is_global_zero:
            remove(path)  # a damaged one
            unfinished.rename(path)
            for old in checkpoints_in(self.folder)[self.keep :]:
                remove(old)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    return sorted(folder.glob("phase-*.ckpt"), reverse=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: a file, or the folder of a sharded one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def latest_whole(folder: Path) -> Path | None:
    """The latest checkpoint of a run that can be read; a warning names those that cannot."""
    for path in checkpoints_in(folder):
        if (reason := damage(path)) is None:
            rank_zero_info(f"Going on from {path}")
            return path
        rank_zero_warn(f"ckpt_path: {str(path)!r} is damaged ({reason}); the one before it is used.")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Every byte of a file is read and compared with its checksum; of the shares of a sharded one, the lengths are.
    """
    try:
        with zipfile.ZipFile(path / "meta.pt" if path.is_dir() else path) as archive:
            if (bad := archive.testzip()) is not None:
                return f"the checksum of {bad} is another"
        for share, length in lengths_of_shares(path).items() if path.is_dir() else ():
            if share.stat().st_size < length:
                return f"{share.name} is cut off"
    except (zipfile.BadZipFile, OSError, EOFError, UnpicklingError) as error:
        return str(error)
    return None


def lengths_of_shares(path: Path) -> dict[Path, int]:
    """Files of a sharded checkpoint, and how long each must at least be, in bytes."""
    lengths: dict[Path, int] = {}
    for stored in FileSystemReader(path).read_metadata().storage_data.values():
        share = path / stored.relative_path
        lengths[share] = max(lengths.get(share, 0), stored.offset + stored.length)
    return lengths
