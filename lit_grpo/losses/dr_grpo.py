"""Dr. GRPO (arXiv 2503.20783)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.advantages import group_normalised
from lit_grpo.losses.policy_gradient import Clipped


class DrGRPO(Clipped):
    r"""GRPO done right: without the division by the standard deviation and without that by each answer's length.

    .. math::
        A_i = r_i - \mathrm{mean}(r) \qquad
        L = -\frac{1}{N L_{max}} \sum_{i,t} \min(\rho_{i,t} A_i,\ \mathrm{clip}(\rho_{i,t}) A_i)

    Both divisions bias GRPO: the first towards prompts that are almost always or never solved, the second towards
    long wrong answers.

    Args:
        length: :math:`L_{max}`, the longest completion in tokens, the same as ``rollout.init_args.max_tokens``.
        clipped: arguments of :class:`~lit_grpo.losses.policy_gradient.Clipped` and ``PolicyGradient``.

    Reference:
        "Understanding R1-Zero-Like Training", arXiv 2503.20783.

    Example:
        >>> import torch
        >>> DrGRPO(length=512).select(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[1].tolist()
        [[0.75, -0.25, -0.25, -0.25]]
    """

    def __init__(self, length: int, **clipped: Any) -> None:
        super().__init__(aggregation="constant", length=length, **clipped)

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_normalised(rewards, "none")
