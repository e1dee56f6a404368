"""What a person watches while a run is going."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_grpo.data import RolloutData


class PhaseProgress(ProgressBar):
    """One bar over all phases: phase, reward, informative groups, tokens per second, time left.

    Where the output is no terminal it prints about 20 lines over the whole run instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.explained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        hidden = not self.is_enabled or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=trainer.current_epoch, unit="phase", dynamic_ncols=True, disable=hidden)
        self.first, self.started = trainer.current_epoch, time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phase_started = time.perf_counter()
        self.describe("sampling" if isinstance(trainer.datamodule, RolloutData) else "training")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.describe(f"training {batch_idx + 1}/{trainer.num_training_batches}")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.describe("validating")

    def describe(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description(what)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert self.bar is not None
        self.bar.set_postfix_str(", ".join(self.facts(metrics)), refresh=False)
        self.bar.update()
        if not self.is_enabled:
            return
        if self.bar.disable:
            self.print_line(trainer, metrics)
        if (
            not self.explained
            and metrics.get("train/loss") is not None
            and isinstance(data := trainer.datamodule, RolloutData)
        ):
            self.explained = True
            if data.updates_per_phase == 1 and abs(metrics["train/loss"]) < 1e-6:
                self.bar.write(
                    "loss 0.000 is right: with one update per phase the surrogate is 0 by construction, its gradient is"
                    f" not ({metrics['train/informative_share']:.0%} of groups informative, grad norm"
                    f" {metrics['train/grad_norm']:.3g})"
                )

    def facts(self, metrics: dict[str, float]) -> list[str]:
        """What to say of a phase, in words."""
        facts = []
        if "train/reward" in metrics:
            tokens_per_second = metrics["train/tokens"] / (time.perf_counter() - self.phase_started)
            facts += [f"reward {metrics['train/reward']:.3f}", f"informative {metrics['train/informative_share']:.0%}"]
            facts += [f"{tokens_per_second:,.0f} tok/s"]
        facts += [f"loss {metrics['train/loss']:.3f}"] if "train/loss" in metrics else []
        return facts + [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("val/mean_at")]

    def print_line(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        if done % max(1, total // 20) and done not in (self.first + 1, total):
            return
        left = (time.perf_counter() - self.started) / (done - self.first) * (total - done)
        print(f"phase {done}/{total}  {', '.join(self.facts(metrics))}, {left:.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def disable(self) -> None:
        self.hidden = True

    def enable(self) -> None:
        self.hidden = False

    hidden = False

    @property
    def is_enabled(self) -> bool:
        return not self.hidden

    @property
    def is_disabled(self) -> bool:
        return self.hidden
