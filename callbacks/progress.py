"""What a person watches while a run is going."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_grpo.data import Answers, RolloutData
from lit_grpo.distributed import data_rank


class PhaseProgress(ProgressBar):
    """One bar over all phases, or over the problems of an evaluation: reward, tokens per second, time left.

    Where the output is no terminal it prints about 20 lines over the whole run instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.hidden = False  # Lightning hides all but the first process's
        self.explained = False

    def disable(self) -> None:
        self.hidden = True

    def enable(self) -> None:
        self.hidden = False

    @property
    def is_enabled(self) -> bool:
        """What ``LightningModule.print`` asks."""
        return not self.hidden

    def start(self, unit: str, first: int, total: int | None) -> None:
        """Show a bar."""
        hidden = self.hidden or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=first, unit=unit, dynamic_ncols=True, disable=hidden)
        self.unit, self.first, self.total, self.printed = unit, first, total, 0
        self.started = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.max_epochs if trainer.max_epochs != -1 else None  # max_steps or max_time end the run
        self.start("phase", trainer.current_epoch, total)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phase_started = time.perf_counter()
        self.describe("sampling" if isinstance(trainer.datamodule, RolloutData) else "training")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.phase_seconds = time.perf_counter() - self.phase_started  # validation, which may follow, left out
        self.describe(f"training {batch_idx + 1}/{trainer.num_training_batches}")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.describe("validating")

    def describe(self, what: str) -> None:
        """Say in front of the bar what is going on."""
        if self.bar is not None:
            self.bar.set_description(what)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # All processes ask: the values are reduced over them at the first look.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.bar is None or self.hidden:
            return
        facts = ", ".join(self.facts(metrics, data_rank(trainer)[1]))
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update()
        if self.bar.disable:
            self.print_line(trainer.current_epoch + 1, facts)
        data = trainer.datamodule
        if not self.explained and isinstance(data, RolloutData) and data.updates_per_phase == 1:
            self.explain(metrics)

    def facts(self, metrics: dict[str, float], world_size: int) -> list[str]:
        """What to say of a phase, in words."""
        facts = []
        if "train/reward" in metrics:
            speed = metrics["train/tokens"] * world_size / self.phase_seconds
            facts += [f"reward {metrics['train/reward']:.3f}", f"informative {metrics['train/informative_share']:.0%}"]
            facts += [f"{speed:,.0f} tok/s"]
        facts += [f"loss {metrics['train/loss']:.3f}"]
        return facts + [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("val/mean_at")]

    def print_line(self, done: int, facts: str) -> None:
        """One of the lines that stand for the bar where there is no terminal."""
        if self.total is None:
            print(f"{self.unit} {done}  {facts}", file=sys.stderr, flush=True)
        elif done - self.printed >= max(1, self.total // 20) or done in (self.first + 1, self.total):
            self.printed = done
            left = (time.perf_counter() - self.started) / max(1, done - self.first) * (self.total - done)
            print(f"{self.unit} {done}/{self.total}  {facts}, {left:.0f} s left", file=sys.stderr, flush=True)

    def explain(self, metrics: dict[str, float]) -> None:
        """Say once, after the first phase that had a gradient, why the loss reads 0."""
        if abs(metrics["train/loss"]) < 1e-6 and metrics.get("train/grad_norm", 0) > 0:
            self.explained = True
            tqdm.write(
                "one update per phase: the surrogate is 0 by construction, its gradient is not;"
                f" {metrics['train/informative_share']:.0%} of groups informative, grad norm"
                f" {metrics['train/grad_norm']:.3g}",
                file=sys.stderr,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.start_evaluation(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_evaluation(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_evaluation(trainer)

    def start_evaluation(self, trainer: L.Trainer) -> None:
        """Show a bar over all problems."""
        data: Any = trainer.datamodule
        self.sets = data.held_out(trainer.state.fn)
        self.start("problem", 0, sum(len(data.prompts[key]) for key in self.sets))
        self.done = 0
        if self.bar is not None and self.bar.disable and not self.hidden:
            print(f"answering {self.total} problems", file=sys.stderr, flush=True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Answers, *_: Any
    ) -> None:
        if trainer.state.fn == "validate":
            self.answered(trainer, batch, 0)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Answers,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.answered(trainer, batch, dataloader_idx)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Answers, *_: Any
    ) -> None:
        self.answered(trainer, batch, 0)

    def answered(self, trainer: L.Trainer, batch: Answers, index: int) -> None:
        """Say what this process, and so about every one, has got done."""
        if self.bar is None or self.hidden or self.total is None:
            return
        key = self.sets[index]
        world = data_rank(trainer)[1]
        count = min(len(batch.places) * world, self.total - self.done)
        before = trainer.datamodule.answered.get(key, {})
        restored = sum(place in before for place in batch.places) * world  # which took no time
        self.done, self.first = self.done + count, min(self.done + count, self.first + restored)
        self.bar.initial = self.first
        rewards = [s.reward for samples in batch.samples for s in samples if s.reward is not None]
        facts = key.split("/")[-1]
        facts += f", reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update(count)
        if self.bar.disable:
            self.print_line(self.done, facts)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.close()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
