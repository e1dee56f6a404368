"""Supervised fine-tuning as a loss like any other."""

from __future__ import annotations

from torch import Tensor

from lit_grpo.losses.base import Aggregation, Loss, LossInputs, LossOutput, aggregate, all_rows, check_length, mean_over


class SFT(Loss):
    """Negative log-likelihood of the completions that were scored above ``threshold``.

    On demonstrations (groups of one, scored 1) this is ordinary fine-tuning; on rollouts it is rejection sampling.
    Completions that are not imitated stay in the denominator: on pairs of equal lengths, ``WeightedSum([DPO(), SFT()],
    [1, 0.2])`` adds 0.1 times the mean over the chosen ones.

    Args:
        threshold: completions with a reward above it are imitated, the others are dropped.
        aggregation: how token losses become one number, see :func:`~lit_grpo.losses.base.aggregate`.
        length: of ``aggregation: constant``.

    Example:
        >>> import torch
        >>> SFT().select(torch.tensor([[1.0, 0.0]]))[1].tolist()
        [[1.0, 0.0]]
    """

    drops_zero_advantages = True

    def __init__(
        self, threshold: float = 0.5, aggregation: Aggregation = "token_mean", length: int | None = None
    ) -> None:
        super().__init__()
        check_length(aggregation, length)
        self.threshold, self.aggregation, self.length = threshold, aggregation, length

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return all_rows(rewards), (rewards > self.threshold).to(rewards.dtype)

    def forward(self, inputs: LossInputs) -> LossOutput:
        imitated = inputs.mask & (inputs.advantages > 0)[:, None]
        nll = -inputs.logps * inputs.advantages[:, None]
        return LossOutput(aggregate(nll, inputs, self.aggregation, self.length), {"nll": mean_over(nll, imitated)})
