"""Supervised fine-tuning as a loss like any other."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_grpo.losses.base import Aggregation, Loss, LossInputs, LossOutput, aggregate


class SFT(Loss):
    """Negative log-likelihood of the completions that were scored above ``threshold``.

    On demonstrations (groups of one, scored 1) this is ordinary fine-tuning; on rollouts it is rejection sampling.

    Args:
        threshold: completions with a reward above it are imitated, the others are dropped.
        aggregation: how token losses become one number, see :func:`~lit_grpo.losses.base.aggregate`.

    Example:
        >>> SFT().select(torch.tensor([[1.0, 0.0]]))[1].tolist()
        [[1.0, 0.0]]
    """

    drops_zero_advantages = True

    def __init__(self, threshold: float = 0.5, aggregation: Aggregation = "token_mean") -> None:
        super().__init__()
        self.threshold, self.aggregation = threshold, aggregation

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards)
        return index, (rewards > self.threshold).to(rewards.dtype)

    def forward(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(aggregate(-inputs.logps * inputs.advantages[:, None], inputs, self.aggregation))
