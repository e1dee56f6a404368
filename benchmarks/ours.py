"""One training by us, as the benchmarks have it, with its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from vs_trl import ANSWER, Coin, Work

from callbacks import HFRollout, Ledger, VLLMRollout
from lit_grpo import GRPO, PolicyModule, RolloutData, Sample
from lit_grpo.data import Source
from lit_grpo.losses import Loss

ENGINES = {"HFRollout": HFRollout, "VLLMRollout": VLLMRollout}


class Steady(Ledger):
    """Leaves out the first phase, which warms up."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == 0:
            self.sums = {}


def train(
    folder: Path,
    work: Work,
    loss: Loss | None = None,
    reward: Any = None,
    rollout: Any = None,
    coin: Coin | None = None,
    callbacks: Sequence[L.Callback] = (),
    **model: Any,
) -> dict[str, float]:
    """Train as ``work`` says; the ledger of all phases but the first.

    Args:
        folder: of the task.
        work: what there is to do.
        loss: GRPO if not given.
        reward: scores samples; a coin if not given.
        rollout: made of ``work`` if not given.
        coin: the reward, if none other is given; a new one if not given.
        callbacks: more of them.
        model: further settings of the module.
    """
    coin = coin or Coin(work.pass_rate)

    def tossed(samples: list[Sample]) -> list[float]:
        probe = samples[0].completion == ANSWER  # of the data module, which looks whether the reward works
        return [1.0] * len(samples) if probe else coin([s.completion for s in samples])

    module = PolicyModule(
        str(folder),
        loss or GRPO(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0),
        **{"share_prompts": work.share_prompts} | model,
    )
    data = RolloutData(
        Source(str(folder / "prompts.jsonl")),
        reward=reward or tossed,
        prompts_per_phase=work.rollouts // work.group_size,
        group_size=work.group_size,
    )
    ledger = Steady()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=work.steps,
        accumulate_grad_batches=work.micro_batches,
        gradient_clip_val=1.0,
        callbacks=[ledger, rollout or ENGINES[work.engine](max_tokens=work.max_tokens), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, datamodule=data)
    return ledger.sums
