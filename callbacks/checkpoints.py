"""Checkpoints from which a run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import pickle
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

STATES = "The state of a callback may hold numbers, text, tensors, lists and dictionaries."

SIMPLE = (bool, int, float, str, type(None))

CHECKSUMS = "checksums.json"
"""Of the files of a sharded checkpoint."""


class Resume(L.Callback):
    """Goes on from a checkpoint with the settings that this run has."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = PlainCheckpointIO()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let callbacks keep the settings of this run: some of Lightning's take over those of their state."""
        for callback in trainer.callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            for key in inspect.signature(type(callback)).parameters if isinstance(state, dict) else ():
                then, now = state.get(key), getattr(callback, key, None)
                if key in state and isinstance(then, SIMPLE) and isinstance(now, SIMPLE) and then != now:
                    state[key] = now
                    rank_zero_info(f"{type(callback).__name__}: {key} was {then}, and is {now} from here on")


class Checkpoints(Resume):
    """Writes ``checkpoints/phase-00050.ckpt`` after 50 phases, and so on, and one when training ends.

    A checkpoint is of the moment before a phase, where nothing but the number of the phase tells what comes: prompts,
    samples and random numbers are functions of it and the run's seed. Each is there whole or not at all.

    A copy of all callbacks' states, as they were when the phase began, is held in memory.

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
        self.states: dict[str, Any] = {}
        """Of all callbacks, when the phase began."""
        self.given_up = False
        """Whether the phase is."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.done_before = trainer.current_epoch
        if trainer.is_global_zero:
            self.put_aside(trainer.current_epoch, trainer.ckpt_path)

    def put_aside(self, phase: int, begun_from: Any) -> None:
        """Rename checkpoints that are damaged or of a course not gone on with, and remove halves."""
        for half in self.folder.glob("phase-*.unfinished"):
            remove(half)
        for path in checkpoints_in(self.folder):
            if number(path) >= phase and not (begun_from and path.resolve() == Path(begun_from).resolve()):
                names = (path.with_stem(f"{path.stem}-aside-{i}") for i in itertools.count(1))
                path.rename(aside := next(name for name in names if not name.exists()))
                rank_zero_warn(f"Training begins at phase {phase} without {str(path)!r}, which is now {aside.name!r}.")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; this callback stands before others, whose states are those of the moment between two phases."""
        if trainer.current_epoch % self.every_n_phases == 0 and trainer.current_epoch > self.done_before:
            self.save(trainer)
        self.states = {one.state_key: copy.deepcopy(state) for one in trainer.callbacks if (state := one.state_dict())}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, after SavePretrained: a run that has this checkpoint has nothing left to do."""
        if trainer.current_epoch == self.done_before:
            return
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            rank_zero_warn(
                "Training ended inside a phase (trainer.max_steps, or the like), where no checkpoint can be written."
                " pretrained/ has the policy."
            )
            return
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was before a phase that is given up in good order, and say how to go on."""
        self.given_up = isinstance(exception, Stopped)
        if self.given_up and trainer.current_epoch > self.done_before:
            self.save(trainer)
        if trainer.state.fn != "fit":
            return
        saved = checkpoints_in(Path(trainer.default_root_dir) / "checkpoints")  # it may come before setup
        kept = f"{saved[0]} is kept" if saved else f"Nothing is kept (checkpoint.every_n_phases {self.every_n_phases})"
        again = (
            f"To {'go on' if saved else 'begin again'}, repeat the command with --run_dir {trainer.default_root_dir}"
        )
        rank_zero_info(f"{kept}. {again} --ckpt_path last")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say of Lightning's loop, and of callbacks, that they are between two phases, whatever hook saves."""
        if self.given_up:
            checkpoint["callbacks"] = self.states
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
        unfinished = path.with_suffix(".unfinished")
        reason = trainer.strategy.broadcast(make_place(trainer, unfinished))  # what one process cannot do, ends all
        if reason is None:
            parts = all_objects(write(trainer, unfinished), trainer.world_size)
            reason = next((part for part in parts if isinstance(part, str)), None)
            if trainer.is_global_zero and reason is None:
                reason = self.finish(unfinished, path, parts)
            reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            remove(unfinished)
            earlier = checkpoints_in(self.folder)
            raise UserError(
                f"checkpoint: cannot write {str(path)!r}: {reason}"
                + (f" {str(earlier[0])!r} holds: go on with --ckpt_path last." if earlier else "")
            )
        self.saved = trainer.current_epoch

    def finish(self, unfinished: Path, path: Path, sums: list[dict[str, int]]) -> str | None:
        """Move a checkpoint that is whole to its place, and remove what need not be kept; or say why not."""
        try:
            if unfinished.is_dir():
                (unfinished / CHECKSUMS).write_text(json.dumps({key: x for part in sums for key, x in part.items()}))
                sync(unfinished / CHECKSUMS)
                sync(unfinished)
            unfinished.rename(path)
            sync(self.folder)
        except OSError as error:
            return reason_of(error)
        for old in checkpoints_in(self.folder)[self.keep :]:
            remove(old)
        return None


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes where it is told to: Lightning's own writes to the folder of temporary files first, and then moves."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise UserError(
                f"ckpt_path: the processes that wrote {str(path)!r} shared the model out, which this trainer.strategy"
                " does not. Give the one of that run, or use what `lit-grpo export` makes of it as model.model."
            )
        return super().load_checkpoint(path, *arguments, **options)


def make_place(trainer: L.Trainer, path: Path) -> str | None:
    """Make the folder that a checkpoint goes to, or that it becomes, on the first process; or say why not."""
    strategy: Any = trainer.strategy
    shares = getattr(strategy, "_save_distributed_checkpoint", getattr(strategy, "_state_dict_type", "") == "sharded")
    try:
        if trainer.is_global_zero:
            (path if shares else path.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return reason_of(error)
    return None


def write(trainer: L.Trainer, path: Path) -> dict[str, int] | str:
    """Write this process's part of a checkpoint: the checksums of its files, which are on the disk then, or why not."""
    try:  # as Trainer.save_checkpoint, after which a process that failed alone would leave the others waiting
        held = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(held, path)
        if trainer.is_global_zero and (strange := unreadable(path, held["callbacks"])):
            return strange
        rank = trainer.global_rank
        mine = [path] if path.is_file() and rank == 0 else list(path.glob(f"__{rank}_*"))
        if path.is_dir() and rank == 0:
            mine += [path / ".metadata", path / "meta.pt"]
        for file in mine:
            sync(file)
        return {file.name: checksum(file) for file in mine}
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # what cannot be pickled raises one of these
        return f"{type(error).__name__}: {error}. {STATES}"
    except (OSError, RuntimeError, CheckpointException) as error:
        if (reason := reason_of(error)) is None:
            raise
        return reason


def unreadable(path: Path, states: dict[str, Any]) -> str | None:
    """Why a checkpoint cannot be loaded with ``weights_only=True``, if so; the states of callbacks are in it."""
    try:
        torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        return (
            f"it could not be loaded again with weights_only=True: {str(error).splitlines()[0]} {STATES}"
            f" There are states of {', '.join(states)}."
        )
    return None


def reason_of(error: BaseException | None) -> str | None:
    """What the file system said, if it was that; torch wraps it, or complains of a file that is too short."""
    if (reason := words_of(error)) is None:
        return None
    return f"{reason}. Make room, or set --checkpoint.keep 1 or another --run_dir."


def words_of(error: BaseException | None) -> str | None:
    """As ``reason_of``, without advice."""
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
    return sorted((path for path in folder.glob("phase-*.ckpt") if path.stem[6:].isdecimal()), key=number, reverse=True)


def number(path: Path) -> int:
    """How many phases were done when a checkpoint was written."""
    return int(path.stem.removeprefix("phase-"))


def remove(path: Path) -> None:
    """Remove a checkpoint: a file, or the folder of a sharded one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def latest_whole(folder: Path, key: str = "ckpt_path") -> Path | None:
    """The latest checkpoint of a run that can be read, if it has any; a warning names those that cannot.

    Args:
        folder: of the checkpoints.
        key: under which the user gave the run.

    Raises:
        UserError: if none of them can.
    """
    for path in (found := checkpoints_in(folder)):
        if (reason := damage(path)) is None:
            return path
        rank_zero_warn(f"{key}: {str(path)!r} is damaged ({reason}); the one before it is looked at.")
    if found:
        raise UserError(
            f"{key}: no checkpoint in {str(folder)!r} can be read. Take, or begin, a run in another folder."
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every byte of it is read and compared with its checksum."""
    try:
        if path.is_dir():
            for name, expected in json.loads((path / CHECKSUMS).read_text()).items():
                if checksum(path / name) != expected:
                    return f"the checksum of {name} is another"
            torch.load(path / "meta.pt", map_location="cpu", mmap=True, weights_only=True)
        else:
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    return f"the checksum of {bad} is another"
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a changed byte leads to, nobody can list
        return f"{type(error).__name__}: {error}"
    return None
