"""Checkpoints from which a run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.checkpoint_files import (
    CHECKSUMS,
    MARK,
    PlainCheckpointIO,
    checkpoints_in,
    make_place,
    number,
    reason_of,
    remove,
    sync,
    write,
)
from callbacks.stop_on_signal import stopping
from lit_grpo.distributed import all_objects, data_rank
from lit_grpo.engines import Stopped
from lit_grpo.errors import UserError

SIMPLE = (bool, int, float, str, type(None))


class Resume(L.Callback):
    """Goes on from a checkpoint with the settings that this run has, and draws the random numbers it would have drawn.

    Those of ``random``, NumPy and torch follow from the seed, the phase and the process alone: in rewards, losses, and
    callbacks that come after this one.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()
        """Callbacks that stop early, but with other settings than in the checkpoint."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = PlainCheckpointIO()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let callbacks keep the settings of this run: some of Lightning's take over those of their state."""
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint):  # which sees to it itself that files of another run are not its own
                continue
            then = checkpoint.get(MARK, {}).get(callback.state_key)
            if isinstance(callback, EarlyStopping) and then is not None and then != settings_of(callback):
                self.changed.add(callback.state_key)
            state = checkpoint["callbacks"].get(callback.state_key)
            for key in inspect.signature(type(callback)).parameters if isinstance(state, dict) else ():
                then, now = state.get(key), getattr(callback, key, None)
                if key in state and isinstance(then, SIMPLE) and isinstance(now, SIMPLE) and then != now:
                    state[key] = now
                    rank_zero_info(f"{type(callback).__name__}: {key} was {then}, and is {now} from here on")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have a run that had been stopped early, by a callback whose settings are as they were, stop again."""
        for callback in (one for one in trainer.callbacks if isinstance(one, EarlyStopping)):
            if callback.state_key in self.changed:
                callback.stopped_epoch, callback.stopping_reason = 0, EarlyStoppingReason.NOT_STOPPED
            elif callback.stopped_epoch or callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True
                rank_zero_info(f"{type(callback).__name__} has stopped this run; with other settings of it it goes on.")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        origin = getattr(trainer.datamodule, "seed", 0), trainer.current_epoch, data_rank(trainer)[0]
        seed = int(np.random.SeedSequence(origin).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class Checkpoints(Resume):
    """Writes ``checkpoints/phase-00050.ckpt`` after 50 phases, and so on, and with ``LastCheckpoint`` one at the end.

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
        super().__init__()
        for key, value in (("every_n_phases", every_n_phases), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{key}: expected a whole number >= 1, got {value}.")
        self.every_n_phases, self.keep = every_n_phases, keep
        self.folder = Path("checkpoints")
        self.done_before = float("inf")  # until training starts
        self.saved = -1
        """The phase before which the latest was saved."""
        self.states: dict[str, Any] = {}
        """Of all callbacks, when the phase began, or when training was done."""
        self.saving = False
        """Whether a checkpoint that is being made is one of ours."""
        self.behind = False
        """Whether callbacks may be further than that."""
        self.done = False
        """Whether training is, and that is to be saved."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.done_before, self.saved, self.behind, self.done = trainer.current_epoch, -1, False, False
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
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch % self.every_n_phases == 0 and trainer.current_epoch > self.done_before:
            self.save(trainer)
        self.states = states_of(trainer.callbacks)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what ``LastCheckpoint`` will have saved, from what other callbacks do when training ends."""
        if trainer.current_epoch == self.done_before:
            return
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            rank_zero_warn(
                "Training ended inside a phase (trainer.max_steps, or the like), where no checkpoint can be written."
                " pretrained/ has the policy."
            )
            return
        self.states, self.behind, self.done = states_of(trainer.callbacks), True, True
        if stopping(trainer):
            self.save_what_is_done(trainer)  # what comes next may take longer than there is

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was before a phase that is given up in good order, or a training that is done; say how to go on."""
        if isinstance(exception, Stopped) and trainer.current_epoch > self.done_before:
            self.behind = True
            self.save(trainer)
        self.save_what_is_done(trainer)
        if trainer.state.fn != "fit":
            return
        saved = checkpoints_in(Path(trainer.default_root_dir) / "checkpoints")  # it may come before setup
        kept = f"{saved[0]} is kept" if saved else f"Nothing is kept (checkpoint.every_n_phases {self.every_n_phases})"
        again = (
            f"To {'go on' if saved else 'begin again'}, repeat the command with --run_dir {trainer.default_root_dir}"
        )
        rank_zero_info(f"{kept}. {again} --ckpt_path last")

    def save_what_is_done(self, trainer: L.Trainer) -> None:
        """Save, if training has come to its end and this was not tried yet."""
        if self.done:
            self.done = False
            self.save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say of Lightning's loop, and of callbacks, that they are between two phases, whatever hook of ours saves."""
        if not self.saving:
            return
        early = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]
        checkpoint[MARK] = {one.state_key: settings_of(one) for one in early}
        if self.behind:
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
            self.saving = True
            try:
                parts = all_objects(write(trainer, unfinished), trainer.world_size)
            finally:
                self.saving = False
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


class LastCheckpoint(L.Callback):
    """Has ``Checkpoints`` save a training that is done, after all other callbacks: then there is nothing left to do."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.checkpoints.save_what_is_done(trainer)


def settings_of(callback: EarlyStopping) -> dict[str, Any]:
    """What decides when it stops, as far as that is numbers and text."""
    keys = inspect.signature(EarlyStopping).parameters.keys() - {"verbose", "log_rank_zero_only"}
    found = {key: getattr(callback, key, getattr(callback, f"_{key}", None)) for key in sorted(keys)}
    return {key: value for key, value in found.items() if isinstance(value, SIMPLE)}


def states_of(callbacks: list[L.Callback]) -> dict[str, Any]:
    """Copies of their states."""
    return {one.state_key: copy.deepcopy(state) for one in callbacks if (state := one.state_dict())}
