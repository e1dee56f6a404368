"""What the losses on pairs share: the best against the worst completion of each group, ties dropped."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from lit_grpo.errors import UserError
from lit_grpo.losses.advantages import tied
from lit_grpo.losses.base import Loss, LossInputs, LossOutput, at_least, mean_over, share_of

LogRatios = Literal["sum", "mean"]


def sequence_logps(inputs: LossInputs, how: LogRatios, reference: bool = True) -> Tensor:
    """Log-prob of each completion ``[N]``, minus that of the reference: the sum over its tokens or their mean."""
    values = inputs.logps
    if reference:
        assert inputs.ref_logps is not None
        values = values - inputs.ref_logps
    totals = torch.where(inputs.mask, values, 0).sum(-1)
    return totals / inputs.mask.sum(-1).clamp(min=1) if how == "mean" else totals


class Pairwise(Loss):
    """Base of the losses that compare a chosen with a rejected completion of the same prompt.

    A group gives one pair, its best and its worst completion; where both have the same reward there is no preference,
    and the pair is dropped. It stays in the denominator, as every dropped row does.

    Args:
        tie_tolerance: reward difference up to which best and worst are tied.
    """

    unit = 2
    drops_zero_advantages = True

    def __init__(self, tie_tolerance: float = 0.0) -> None:
        super().__init__()
        at_least(0, tie_tolerance=tie_tolerance)
        self.tie_tolerance = tie_tolerance

    @abstractmethod
    def scores(self, inputs: LossInputs) -> Tensor:
        """Implicit reward ``[N]`` of each completion; its gradient is the loss's."""

    @abstractmethod
    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        """Loss ``[N / 2]`` of pairs with the given scores."""

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        group_size = rewards.shape[1]
        if group_size < 2:
            raise UserError(
                f"model.loss: {type(self).__name__} compares two completions of one prompt, got groups of"
                f" {group_size}. Give RolloutData a group_size of 2 or more, or PreferenceData columns of chosen and"
                " rejected completions."
            )
        worst = group_size - 1 - rewards.flip(-1).argmin(-1)  # of equals the last, while the best is the first
        index = torch.stack([rewards.argmax(-1), worst], -1)
        preference = torch.tensor([1.0, -1.0], dtype=rewards.dtype, device=rewards.device)
        return index, torch.where(tied(rewards, self.tie_tolerance), 0, preference)

    def forward(self, inputs: LossInputs) -> LossOutput:
        scores = self.scores(inputs)
        chosen, rejected = scores[0::2], scores[1::2]
        paired = (inputs.advantages[0::2] > 0) & (inputs.advantages[1::2] < 0)
        losses = torch.where(paired, self.pair_loss(chosen, rejected, inputs.step), 0)
        return LossOutput(
            losses.sum() / (inputs.total_rows / 2),
            {
                "reward_chosen": mean_over(chosen, paired),
                "reward_rejected": mean_over(rejected, paired),
                "margin": mean_over(chosen - rejected, paired),
                "reward_accuracy": share_of(chosen > rejected, paired),
            },
        )
