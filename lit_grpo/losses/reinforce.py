"""REINFORCE with a group baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.advantages import Scale, group_normalised
from lit_grpo.losses.base import Aggregation, LossInputs, Metrics, one_of
from lit_grpo.losses.policy_gradient import PolicyGradient


class Reinforce(PolicyGradient):
    r"""The plain policy gradient, :math:`-A_i \log \pi_\theta(o_i)`: no ratio and no clip.

    This is the form in which short explanations present GRPO. On the first update of a phase its gradient is that of
    the clipped surrogate with the same advantages and aggregation; on later ones it ignores that the policy has moved.

    Args:
        scale: what centred rewards are divided by, as in :class:`~lit_grpo.losses.GRPO`.
        aggregation: ``sequence_sum`` makes it the log-prob of the whole completion.
        shared: arguments of :class:`~lit_grpo.losses.policy_gradient.PolicyGradient`.

    Reference:
        Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.

    Example:
        >>> import torch
        >>> Reinforce(scale="none").select(torch.tensor([[1.0, 0.0]]))[1].tolist()
        [[0.5, -0.5]]
    """

    def __init__(self, scale: Scale = "population", aggregation: Aggregation = "sequence_sum", **shared: Any) -> None:
        super().__init__(aggregation=aggregation, **shared)
        one_of(Scale, scale=scale)
        self.scale = scale

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_normalised(rewards, self.scale)

    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return -inputs.logps * inputs.advantages[:, None], {}
