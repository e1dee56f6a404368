"""Which completions the trainer had trouble with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_grpo.data import Batch, RolloutData
from lit_grpo.distributed import gather_objects
from lit_grpo.losses import Clipped


class Outliers(L.Callback):
    """Writes what training saw of each completion to ``samples/outliers-PHASE.jsonl``, for ``lit-grpo inspect``.

    A line has the texts, the advantage, ``mismatch``, the mean absolute difference of the sampler's and the trainer's
    log-probs, and ``outside_clip``, the share of tokens whose ratio to the old policy is outside the clip range: 0 in
    the first update of a phase, None where the loss does not clip tokens. Only rows that were forwarded have one.

    Args:
        every_n_phases: how often, as :class:`~callbacks.SampleTable`. Other phases cost nothing.
    """

    def __init__(self, every_n_phases: int = 10) -> None:
        self.every_n_phases = every_n_phases
        self.seen: list[tuple[Batch, Tensor, Tensor | None]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if isinstance(trainer.datamodule, RolloutData) and (trainer.current_epoch % self.every_n_phases == 0 or last):
            self.seen.append((batch, *measure(pl_module.loss, pl_module.logps, batch)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.seen:
            return
        rows = [row for seen in self.seen for row in described(pl_module.tokenizer, *seen)]
        self.seen = []
        rows = [row for part in gather_objects(rows, trainer) for row in part]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "samples" / f"outliers-{trainer.current_epoch:05d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def measure(loss: Any, logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Mismatch ``[N]``, and share of tokens outside the clip range ``[N]``, of a micro-batch; nothing waits for a GPU.

    Args:
        loss: whose clip range it is.
        logps: ``[N, T - 1]`` of the policy.
        batch: it read.
    """
    assert batch.sampler_logps is not None
    tokens = batch.mask.sum(-1).clamp(min=1)
    mismatch = torch.where(batch.mask, logps - batch.sampler_logps, 0).abs().sum(-1) / tokens
    if not isinstance(loss, Clipped) or type(loss).surrogate is not Clipped.surrogate:
        return mismatch, None
    if batch.on_policy and batch.old_logps is None:
        return mismatch, torch.zeros_like(mismatch)
    old = batch.sampler_logps if batch.old_logps is None else batch.old_logps
    ratio = (logps - old).exp()
    outside = ((ratio < 1 - loss.clip_low) | (ratio > 1 + loss.clip_high)) & batch.mask
    return mismatch, outside.sum(-1) / tokens


def described(tokenizer: Any, batch: Batch, mismatch: Tensor, outside: Tensor | None) -> list[dict[str, Any]]:
    """Rows of a file."""
    tokens, mask = batch.tokens.cpu(), batch.mask.cpu()
    completions = [row[1:][where].tolist() for row, where in zip(tokens, mask, strict=True)]
    prompts = [row[: int(where.int().argmax()) + 1].tolist() for row, where in zip(tokens, mask, strict=True)]
    texts = tokenizer.batch_decode([*prompts, *completions], skip_special_tokens=True)
    shares = [None] * len(tokens) if outside is None else outside.tolist()
    return [
        {"prompt": prompt, "completion": text, "advantage": advantage, "mismatch": gap, "outside_clip": share}
        for prompt, text, advantage, gap, share in zip(
            texts[: len(tokens)],
            texts[len(tokens) :],
            batch.advantages.tolist(),
            mismatch.tolist(),
            shares,
            strict=True,
        )
    ]
