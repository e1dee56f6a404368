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
        self.handlers: dict[int, Any] = {}

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

        if not self.handlers and threading.current_thread() is threading.main_thread():  # no other may
            self.handlers = {number: signal.signal(number, note) for number in SIGNALS}
        if isinstance(data := trainer.datamodule, RolloutData):
            data.stop_wanted = lambda: self.told

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self.told, all=False):
            self.stopping = trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Put Lightning's handlers back, which it takes away after this."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
