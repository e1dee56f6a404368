"""What the policy-gradient losses share: whole groups as rows, KL and entropy terms, mismatch weights, aggregation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from lit_grpo.errors import UserError
from lit_grpo.losses.base import (
    MAX_LOG_RATIO,
    Aggregation,
    Loss,
    LossInputs,
    LossOutput,
    Metrics,
    aggregate,
    all_rows,
    at_least,
    check_length,
    mean_over,
    one_of,
    share_of,
)
from lit_grpo.losses.kl import Estimator, check_estimator, kl_penalty
from lit_grpo.losses.schedules import Coefficient, at

Level = Literal["token", "sequence"]


class PolicyGradient(Loss):
    r"""Base of the losses that weigh log-probs with an advantage.

    A subclass says what the advantages are and what each token costs; this class adds what all of them may have:

    .. math::
        L = \mathrm{aggregate}_{i,t}\; w_{i,t}\,\ell_{i,t} + \beta\,\mathrm{KL}_{i,t} - \eta\,H_{i,t}

    Args:
        aggregation: how token losses become one number, see :func:`~lit_grpo.losses.base.aggregate`.
        length: longest completion in tokens, for ``aggregation: constant``.
        beta: coefficient of the KL term to the frozen reference. 0 loads no reference and skips rows without signal.
        kl: its estimator, ``k2``, ``k3`` or ``k3_ratio``, see :func:`~lit_grpo.losses.kl.kl_penalty`.
        entropy_bonus: coefficient of the entropy H of each token's distribution.
        tis_clip: weigh with the truncated ratio of trainer to sampler, min(pi_old / pi_sampler, ``tis_clip``), which
            corrects an engine whose log-probs are slightly other than the trainer's (truncated importance sampling).
            Updates whose old policy *is* the sampler need no correction and get the weight 1.
        tis_level: one weight for each ``token``, or for each ``sequence`` the product of its tokens'.
        mask_truncated: whether completions cut off at ``max_tokens`` get advantage 0 (DAPO's overlong filtering).
    """

    def __init__(
        self,
        aggregation: Aggregation = "sequence_mean",
        length: int | None = None,
        beta: Coefficient = 0.0,
        kl: Estimator = "k3",
        entropy_bonus: Coefficient = 0.0,
        tis_clip: float | None = None,
        tis_level: Level = "token",
        mask_truncated: bool = False,
    ) -> None:
        super().__init__()
        at_least(0, beta=beta, entropy_bonus=entropy_bonus)
        at_least(1, tis_clip=tis_clip)
        check_estimator("kl", kl)
        one_of(Level, tis_level=tis_level)
        check_length(aggregation, length)
        self.aggregation, self.length = aggregation, length
        self.beta, self.kl, self.entropy_bonus = beta, kl, entropy_bonus
        self.tis_clip, self.tis_level = tis_clip, tis_level
        self.masks_truncated = mask_truncated
        self.needs_reference, self.needs_entropy = beta != 0, entropy_bonus != 0
        self.drops_zero_advantages = not (self.needs_reference or self.needs_entropy)

    @abstractmethod
    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards ``[P, G]`` to advantages ``[P, G]``: exactly 0 in every group whose rewards are all equal."""

    @abstractmethod
    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Loss of each token ``[N, T]`` (broadcastable), and metrics.

        Args:
            log_ratio: ``[N, T]`` log-ratio of policy to old policy, clamped to +-20, with gradient.
            inputs: all there is.
        """

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        if rewards.shape[1] < 2:
            raise UserError(
                f"data.init_args.group_size: {type(self).__name__} compares the completions of one prompt with each"
                f" other, got groups of {rewards.shape[1]}. Set group_size to 2 or more."
            )
        return all_rows(rewards), self.advantages(rewards)

    def forward(self, inputs: LossInputs) -> LossOutput:
        old_logps = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps
        log_ratio = (inputs.logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values, metrics = self.surrogate(log_ratio, inputs)
        if self.tis_clip is not None and inputs.sampler_logps is not None:
            weight = self.mismatch_weight(old_logps, inputs.sampler_logps, inputs.mask)
            values = values * weight.clamp(max=self.tis_clip)
            metrics["tis_weight"] = mean_over(weight.clamp(max=self.tis_clip), inputs.mask)
            metrics["tis_clip_fraction"] = share_of(weight > self.tis_clip, inputs.mask)
        if self.needs_reference:
            assert inputs.ref_logps is not None
            penalty = kl_penalty(inputs.logps, inputs.ref_logps, log_ratio, self.kl)
            values = values + at(self.beta, inputs.step) * penalty
        if self.needs_entropy:
            assert inputs.entropy is not None
            values = values - at(self.entropy_bonus, inputs.step) * inputs.entropy
        return LossOutput(aggregate(values, inputs, self.aggregation, self.length), metrics)

    def mismatch_weight(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        """Ratio ``[N, T]`` of the trainer's to the sampler's probability of each token or, alike, of its sequence."""
        gap = torch.where(mask, old_logps.detach() - sampler_logps, 0)
        if self.tis_level == "sequence":
            gap = gap.sum(-1, keepdim=True).expand_as(gap)
        return gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class Clipped(PolicyGradient):
    r"""Base of the losses with PPO's clipped surrogate, :math:`-\min(\rho A, \mathrm{clip}(\rho) A)`.

    Args:
        clip_low: lower clip distance; ratios below ``1 - clip_low`` have no gradient where the advantage is negative.
        clip_high: upper clip distance; ratios above ``1 + clip_high`` have no gradient where it is positive.
        dual_clip: where the advantage is negative, ratios above this have no gradient either (arXiv 1912.09729, which
            takes 3). Not done if not given.
        shared: arguments of :class:`PolicyGradient`.
    """

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, **shared: Any
    ) -> None:
        super().__init__(**shared)
        at_least(0, clip_low=clip_low, clip_high=clip_high)
        at_least(1, dual_clip=dual_clip)
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return self.clipped(log_ratio.exp(), inputs)

    def clipped(self, ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """The clipped surrogate of ratios ``[N, T]`` or ``[N, 1]``, and how often the clip was active."""
        advantages = inputs.advantages[:, None]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages)
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, loss.minimum(-self.dual_clip * advantages), loss)
        if inputs.old_logps is None:
            return loss, {}
        low = (ratio < 1 - self.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.clip_high) & (advantages > 0)
        clipped = {"clip_fraction_low": low, "clip_fraction_high": high}
        if self.dual_clip is not None:
            clipped["clip_fraction_dual"] = (ratio > self.dual_clip) & (advantages < 0)
        return loss, {name: share_of(where.expand_as(inputs.mask), inputs.mask) for name, where in clipped.items()}
