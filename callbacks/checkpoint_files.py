"""Checkpoints on the disk: written whole, checked, found again."""

from __future__ import annotations

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
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from lit_grpo.errors import UserError

STATES = "The state of a callback may hold numbers, text, tensors, lists and dictionaries."

MARK = "stop_early"
"""What only checkpoints of ``Checkpoints`` have: the settings of callbacks that stop early."""

CHECKSUMS = "checksums.json"
"""Of the files of a sharded checkpoint."""


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


def content(path: Path) -> dict[str, Any]:
    """What a checkpoint says, of a sharded one without what processes share; tensors stay on the disk."""
    file = path / "meta.pt" if path.is_dir() else path
    held: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return held


def unreadable(path: Path, states: dict[str, Any]) -> str | None:
    """Why a checkpoint cannot be loaded with ``weights_only=True``, if so; the states of callbacks are in it."""
    try:
        content(path)
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


def is_between_phases(path: Path) -> bool:
    """Whether ``Checkpoints`` wrote a checkpoint, and no other callback at another moment."""
    return MARK in content(path)


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
        content(path)
    except Exception as error:  # what a changed byte leads to, nobody can list
        return f"{type(error).__name__}: {error}"
    return None
