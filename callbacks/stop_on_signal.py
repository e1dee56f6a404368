"""Ending in good order when a scheduler says so."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning as L

from lit_grpo.data import RolloutData

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send some time before they kill; SIGUSR1 by ``sbatch --signal=USR1@120``."""


class StopOnSignal(L.Callback):
    """Saves a checkpoint and ends training on SIGTERM or SIGUSR1.

    Sampling is given up, and the state before the phase saved; updates are made to the end of the phase, and the state
    after it saved. Where several processes train, it is enough that one of them is told.
    """

    def __init__(self) -> None:
        self.told = False
        """Whether this process got a signal."""
        self.stopping = False
        """Whether the run ends for it, which all processes know alike."""
        self.before: dict[int, Any] = {}
        """Handlers that were there before."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.listen(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen(trainer)

    def listen(self, trainer: L.Trainer) -> None:
        """Note signals from now on."""

        # In the place of Lightning's own, which talks to other processes from inside a handler, and saves in a phase.
        def note(number: int, _: Any) -> None:
            if not self.told and (launcher := trainer.strategy.launcher) is not None:
                launcher.kill(number)  # of processes that this one started
            self.told = True

        if threading.current_thread() is threading.main_thread():  # no other may
            for number in SIGNALS:
                handler = signal.signal(number, note)
                self.before.setdefault(number, handler)
        if isinstance(data := trainer.datamodule, RolloutData):
            data.stop_wanted = lambda: self.told

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self.told, all=False):
            self.stopping = trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the handlers of before back, once everything is saved; a signal until then is the one that was noted."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
            trainer._signal_connector._original_handlers[number] = handler  # after an exception, Lightning does it
        self.before = {}


def stopping(trainer: L.Trainer) -> bool:
    """Whether a run ends because a signal said so."""
    return any(isinstance(callback, StopOnSignal) and callback.stopping for callback in trainer.callbacks)
