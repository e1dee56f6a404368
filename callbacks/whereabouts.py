"""Where each process is when one of them does not come on."""

from __future__ import annotations

import atexit
import faulthandler
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import lightning as L

SHARE = 0.9
"""Of the time that processes wait for each other, after which those that wait say where they are."""

PATIENCE = 10.0
"""Seconds that other processes have to end after the first has failed."""


class Whereabouts(L.Callback):
    """Has every process say where it is, shortly before those that wait for others give up.

    With NCCL the process that gave up is ended by its library, with a message about some operation; which process was
    missing, and what it was doing, nobody says. Nothing happens with one process.
    """

    def __init__(self) -> None:
        self.last, self.over, self.step = 0.0, threading.Event(), ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        patience: timedelta | None = getattr(trainer.strategy, "_timeout", None)
        if trainer.world_size == 1 or patience is None:
            return
        self.over = threading.Event()
        self.passed(f"{stage} begins")
        watch = threading.Thread(target=self.watch, args=(SHARE * patience.total_seconds(), trainer), daemon=True)
        watch.start()

    def watch(self, patience: float, trainer: L.Trainer) -> None:
        """Look now and then how long ago a step was passed, and speak once for each that lasts."""
        said = 0.0
        while not self.over.wait(min(1.0, patience / 10)):
            if self.last != said and time.monotonic() - self.last > patience:
                said = self.last
                print(
                    f"Process {trainer.global_rank} of {trainer.world_size} has not come on for {patience:g} s:"
                    f" {self.step}. If others wait for it, they give up soon (trainer.strategy.init_args.timeout). It"
                    " is at:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()

    def passed(self, step: str) -> None:
        """Note that a step begins."""
        self.last, self.step = time.monotonic(), step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.passed(f"phase {trainer.current_epoch}, sampling")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.passed(f"phase {trainer.current_epoch}, micro-batch {batch_idx}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.passed(f"phase {trainer.current_epoch}, its end")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.passed(f"phase {trainer.current_epoch}, validation")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.passed(f"phase {trainer.current_epoch}, the next prompts of validation")

    def on_test_batch_start(self, *_: Any) -> None:
        self.passed("the next prompts of a benchmark")

    def on_predict_batch_start(self, *_: Any) -> None:
        self.passed("the next prompts")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.over.set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do not leave behind processes that this one started and that hang."""
        self.over.set()
        atexit.register(end, getattr(trainer.strategy.launcher, "procs", []))


def end(processes: list[subprocess.Popen]) -> None:
    """Let processes come to their own end, and then end those that do not."""
    last = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
