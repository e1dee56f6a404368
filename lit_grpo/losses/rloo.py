"""RLOO (arXiv 2402.14740)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_grpo.losses.advantages import leave_one_out
from lit_grpo.losses.base import MAX_LOG_RATIO, LossInputs, Metrics, share_of
from lit_grpo.losses.policy_gradient import Clipped


class RLOO(Clipped):
    r"""REINFORCE leave-one-out: each completion's baseline is the mean reward of the *others* of its group.

    .. math::
        A_i = r_i - \frac{1}{G-1} \sum_{j \ne i} r_j \qquad
        L = -\mathrm{mean}_i \min(\rho_i A_i,\ \mathrm{clip}(\rho_i) A_i), \quad
        \rho_i = e^{\sum_t \log \pi_\theta - \log \pi_{old}}

    The ratio is that of the whole completion. For groups of two with rewards 0 and 1 the advantages are those of
    2-GRPO. Where the paper subtracts the KL divergence from the reward, ``beta`` here adds it to the loss.

    Args:
        clipped: arguments of :class:`~lit_grpo.losses.policy_gradient.Clipped` and ``PolicyGradient``, except for the
            aggregation: losses of sequences have one.

    Reference:
        "Back to Basics", arXiv 2402.14740. It has groups of 2 or 4 and ``beta`` 0.03.

    Example:
        >>> RLOO().select(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))[1].tolist()
        [[1.0, -1.0], [0.0, 0.0]]
    """

    def __init__(self, **clipped: Any) -> None:
        super().__init__(aggregation="sequence_sum", length=None, **clipped)

    def advantages(self, rewards: Tensor) -> Tensor:
        return leave_one_out(rewards)

    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        total = torch.where(inputs.mask, log_ratio, 0).sum(-1, keepdim=True)
        far = (total.abs() > MAX_LOG_RATIO).expand_as(inputs.mask)
        loss, metrics = self.clipped(total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), inputs)
        metrics["clamped_sequences"] = share_of(far, inputs.mask)
        return loss / inputs.mask.sum(-1, keepdim=True).clamp(min=1), metrics
