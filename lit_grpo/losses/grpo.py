"""GRPO (arXiv 2402.03300) and 2-GRPO (arXiv 2510.00977)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_grpo.errors import UserError
from lit_grpo.losses.base import Aggregation, Loss, LossInputs, LossOutput, aggregate, rounding

Scale = Literal["population", "sample", "none"]


class GRPO(Loss):
    r"""Group relative policy optimization: the clipped surrogate on rewards normalised within each group.

    .. math::
        A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)} \qquad
        L = -\mathrm{mean}_i\,\mathrm{mean}_t \min(\rho_{i,t} A_i,\ \mathrm{clip}(\rho_{i,t}) A_i) + \beta\,k_3

    with the ratio :math:`\rho = \pi_\theta / \pi_{old}` and :math:`k_3 = e^{-\Delta} - 1 + \Delta`,
    :math:`\Delta = \log \pi_\theta - \log \pi_{ref}`. Groups whose rewards are all equal get advantage 0; they are
    found by comparing rewards, because in floating point the standard deviation of equal rewards need not be 0.
    Rewards that differ by rounding only (0.1 + 0.2 and 0.3) count as equal.

    With one update per phase the ratio is 1 and the *value* of the loss is 0 by construction; its gradient is not.

    Args:
        clip_low: lower clip distance; ratios below ``1 - clip_low`` have no gradient where the advantage is negative.
        clip_high: upper clip distance; ratios above ``1 + clip_high`` have no gradient where it is positive.
        beta: coefficient of the KL term to the frozen reference. 0 loads no reference and skips rows without signal.
        scale: what centred rewards are divided by: the group's ``population`` standard deviation (1/G inside the root,
            as in the theory of arXiv 2510.00977), its ``sample`` one (1/(G-1), as most frameworks do) or ``none``.
        aggregation: how token losses become one number, see :func:`~lit_grpo.losses.base.aggregate`.

    Example:
        >>> index, advantages = GRPO().select(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]))
        >>> advantages.tolist()
        [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        scale: Scale = "population",
        aggregation: Aggregation = "sequence_mean",
    ) -> None:
        super().__init__()
        for key, value in (("clip_low", clip_low), ("clip_high", clip_high), ("beta", beta)):
            if value < 0:
                raise UserError(f"model.loss.init_args.{key}: expected a number >= 0, got {value}.")
        self.clip_low, self.clip_high, self.beta, self.scale, self.aggregation = (
            clip_low,
            clip_high,
            beta,
            scale,
            aggregation,
        )
        self.needs_reference = beta > 0
        self.drops_zero_advantages = beta == 0

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        group_size = rewards.shape[1]
        if group_size < 2:
            raise UserError(
                f"data.init_args.group_size: {type(self).__name__} compares the completions of one prompt with each"
                f" other, got groups of {group_size}. Set group_size to 2 or more."
            )
        index = torch.arange(group_size, device=rewards.device).expand_as(rewards)
        return index, self.advantages(rewards)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards ``[P, G]`` to advantages ``[P, G]``: exactly 0 in every group whose rewards are all equal."""
        centred = rewards - rewards.mean(-1, keepdim=True)
        tied = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) <= rounding(rewards)
        if self.scale != "none":
            centred = centred / centred.abs().amax(-1, keepdim=True)  # tiny rewards must not underflow when squared
            centred = centred / centred.std(-1, correction=int(self.scale == "sample"), keepdim=True)
        return torch.where(tied, 0, centred)

    def forward(self, inputs: LossInputs) -> LossOutput:
        old_logps = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps
        ratio = (inputs.logps - old_logps).exp()
        advantages = inputs.advantages[:, None]
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages)

        metrics = {}
        if inputs.old_logps is not None:
            low = (ratio < 1 - self.clip_low) & (advantages < 0)
            high = (ratio > 1 + self.clip_high) & (advantages > 0)
            metrics["clip_fraction_low"] = aggregate(low.to(ratio.dtype), inputs, "token_mean")
            metrics["clip_fraction_high"] = aggregate(high.to(ratio.dtype), inputs, "token_mean")
        if self.beta > 0:
            assert inputs.ref_logps is not None
            delta = inputs.ref_logps - inputs.logps
            k3 = delta.exp() - 1 - delta
            token_loss = token_loss + self.beta * k3
            metrics["kl"] = aggregate(k3.detach(), inputs, "token_mean")
        return LossOutput(aggregate(token_loss, inputs, self.aggregation), metrics)


class TwoGRPO(GRPO):
    """2-GRPO: GRPO on groups of two, where the advantages are exactly +1 and -1, or 0 on a tie.

    This is Eq. 14 of arXiv 2510.00977 (v2). At group size two, normalising by the population standard deviation leaves
    the sign of the reward difference, so this is GRPO without its division: no epsilon, no Bessel factor of 0.707.
    Rewards that differ by at most ``tie_tolerance`` count as equal, so that noise in a continuous reward is not blown
    up to a full +-1.

    Args:
        clip_low: as in :class:`GRPO`.
        clip_high: as in :class:`GRPO`.
        beta: as in :class:`GRPO`.
        aggregation: as in :class:`GRPO`.
        tie_tolerance: reward difference up to which two completions are tied.

    Example:
        >>> TwoGRPO().select(torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 1.0]]))[1].tolist()
        [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        aggregation: Aggregation = "sequence_mean",
        tie_tolerance: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, beta, aggregation=aggregation)
        if tie_tolerance < 0:
            raise UserError(f"model.loss.init_args.tie_tolerance: expected a number >= 0, got {tie_tolerance}.")
        self.tie_tolerance = tie_tolerance

    def advantages(self, rewards: Tensor) -> Tensor:
        if rewards.shape[1] != 2:
            raise UserError(
                f"data.init_args.group_size: TwoGRPO compares two completions of one prompt, got groups of"
                f" {rewards.shape[1]}. Set group_size to 2, or model.loss to GRPO."
            )
        difference = rewards - rewards.flip(-1)
        return torch.where(difference.abs() <= rounding(rewards).clamp(min=self.tie_tolerance), 0, difference.sign())
