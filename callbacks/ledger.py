"""Where the time of a run goes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_grpo.data import Batch
from lit_grpo.distributed import data_rank, partners

PARTS = ("generate", "reward", "sync", "scoring", "forward", "backward", "optimizer", "other")


class Ledger(L.Callback):
    """Logs what the parts of each phase took, and sums them up in ``ledger.json`` when training ends.

    ``train/seconds_<part>``: ``generate``, ``reward`` and ``sync`` (weights to the engine) of rollouts; ``scoring``
    (log-probs without gradient, of the reference or the old policy); ``forward``, ``backward``, ``optimizer``;
    ``other``, all else but validation. ``train/rows_trained``, completions that were forwarded, and
    ``train/tokens_trained`` of them; ``train/tokens_forwarded`` and, of what is scored without gradient,
    ``train/tokens_scored``, prompts and padding included. Seconds are the host's: what a GPU has not done yet counts
    where the host waits for it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.validated = 0.0
        """Seconds of validation since the phase began."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phase_began, self.validated = time.perf_counter(), 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seconds = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        self.trained, self.rows = torch.zeros((), device=pl_module.device), 0.0
        pl_module.seconds_scoring, pl_module.tokens_scored, pl_module.tokens_forwarded = 0.0, 0, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.mark, self.updates, self.scored = time.perf_counter(), False, pl_module.seconds_scoring
        self.rows += len(batch.tokens)
        self.trained += batch.mask.sum()

    def passed(self, part: str) -> None:
        """Count the time since the last mark, and set another."""
        now = time.perf_counter()
        self.seconds[part] += now - self.mark
        self.mark = now

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        self.mark += pl_module.seconds_scoring - self.scored
        self.passed("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.passed("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.updates = True

    def on_train_batch_end(self, *_: Any) -> None:
        if self.updates:
            self.passed("optimizer")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated += time.perf_counter() - self.validation_began

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        now, metrics = time.perf_counter(), trainer.callback_metrics
        sampling = {part: float(metrics.get(f"train/seconds_{part}", 0.0)) for part in PARTS[:3]}
        training = {"scoring": pl_module.seconds_scoring, **self.seconds}
        other = now - self.phase_began - self.validated - sum(sampling.values()) - sum(training.values())
        self.phase_began, self.validated, training["other"] = now, 0.0, other
        seconds = {f"train/seconds_{part}": value for part, value in training.items()}
        pl_module.log_dict(seconds, sync_dist=True)
        counted = [self.rows, self.trained.item(), pl_module.tokens_forwarded, pl_module.tokens_scored]
        mine = torch.tensor(counted, device=pl_module.device)
        of_all: Tensor = trainer.strategy.reduce(mine, reduce_op="sum") / partners(trainer)[1]
        names = ("rows_trained", "tokens_trained", "tokens_forwarded", "tokens_scored")
        counts = dict(zip(names, of_all.tolist(), strict=True))
        pl_module.log_dict({f"train/{name}": value for name, value in counts.items()})
        generated = {"tokens_generated": float(metrics.get("train/tokens", 0.0)) * data_rank(trainer)[1]}
        for name, value in {**sampling, **training, **generated, **counts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.sums:
            whole = sum(self.sums[part] for part in PARTS)
            shares = ", ".join(
                f"{part} {self.sums[part] / whole:.0%}" for part in PARTS if self.sums[part] > 0.005 * whole
            )
            rank_zero_info(f"{whole:.1f} s without validation: {shares}")
            (Path(trainer.default_root_dir) / "ledger.json").write_text(json.dumps(self.sums, indent=1) + "\n")

    def state_dict(self) -> dict[str, float]:
        return self.sums

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.sums = dict(state_dict)
