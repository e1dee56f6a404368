"""CISPO (arXiv 2506.13585)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.advantages import Scale, group_normalised
from lit_grpo.losses.base import Aggregation, LossInputs, Metrics, at_least, one_of, share_of
from lit_grpo.losses.policy_gradient import PolicyGradient


class CISPO(PolicyGradient):
    r"""Clipped importance weights instead of a clipped surrogate: no token ever loses its gradient.

    .. math::
        L = -\mathrm{mean}_{tokens}\ \mathrm{sg}[\min(\rho_{i,t}, \rho_{max})]\, A_i \log \pi_\theta

    where sg stops the gradient.

    Args:
        max_ratio: :math:`\rho_{max}`, an upper bound of the weight itself, not a distance from 1.
        scale: what centred rewards are divided by, as in :class:`~lit_grpo.losses.GRPO`.
        aggregation: how token losses become one number, see :func:`~lit_grpo.losses.base.aggregate`.
        shared: arguments of :class:`~lit_grpo.losses.policy_gradient.PolicyGradient`.

    Reference:
        MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5, without a lower bound. The default of 5 is that of ScaleRL, arXiv
        2510.13786.

    Example:
        >>> CISPO().max_ratio
        5.0
    """

    def __init__(
        self,
        max_ratio: float = 5.0,
        scale: Scale = "population",
        aggregation: Aggregation = "token_mean",
        **shared: Any,
    ) -> None:
        super().__init__(aggregation=aggregation, **shared)
        at_least(1, max_ratio=max_ratio)
        one_of(Scale, scale=scale)
        self.max_ratio, self.scale = max_ratio, scale

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_normalised(rewards, self.scale)

    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        ratio = log_ratio.detach().exp()
        metrics: Metrics = {}
        if inputs.old_logps is not None:
            metrics["weight_clip_fraction"] = share_of(ratio > self.max_ratio, inputs.mask)
        return -ratio.clamp(max=self.max_ratio) * inputs.advantages[:, None] * inputs.logps, metrics
