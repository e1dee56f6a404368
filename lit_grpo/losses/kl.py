"""Keeping the policy near its reference: three estimators of the KL divergence as a loss term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_grpo.errors import UserError
from lit_grpo.losses.base import (
    MAX_LOG_RATIO,
    Aggregation,
    Loss,
    LossInputs,
    LossOutput,
    aggregate,
    all_rows,
    check_length,
    one_of,
)

Estimator = Literal["k1", "k2", "k3", "k3_ratio"]


def kl_penalty(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor, estimator: Estimator) -> Tensor:
    r"""Per-token estimate ``[N, T]`` of KL(policy || reference), to be minimised.

    With :math:`\Delta = \log \pi_\theta - \log \pi_{ref}` on tokens that the policy sampled:

    - ``k2``: :math:`\Delta^2 / 2`. Its value is biased, its gradient is exactly that of the KL.
    - ``k3``: :math:`e^{-\Delta} - 1 + \Delta`. Its value is unbiased, its gradient is that of the *forward* KL.
    - ``k3_ratio``: k3 times :math:`\pi_\theta / \pi_{old}`. Value and gradient are both right.

    Args:
        logps: ``[N, T]`` of the policy, with gradient.
        ref_logps: ``[N, T]`` of the reference.
        log_ratio: ``[N, T]`` of policy to old policy, for ``k3_ratio``.
        estimator: which one.
    """
    if estimator == "k2":
        return (logps - ref_logps).square() / 2
    delta = (ref_logps - logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    k3 = delta.exp() - 1 - delta
    return k3 * log_ratio.exp() if estimator == "k3_ratio" else k3


def check_estimator(key: str, estimator: Estimator) -> None:
    """Refuse k1, and say why."""
    one_of(Estimator, **{key: estimator})
    if estimator == "k1":
        raise UserError(
            f"model.loss.init_args.{key}: k1 (log pi - log ref) cannot be a loss term: its gradient, that of log pi, is"
            " 0 in the mean, so it would add noise and no pull. Use k2, whose gradient is that of the KL divergence,"
            " or k3_ratio, whose value is too."
        )


class KL(Loss):
    r"""KL divergence to the frozen reference, as a term of :class:`~lit_grpo.losses.WeightedSum`.

    ``WeightedSum([TwoGRPO(), KL()], [1.0, 0.05])`` is ``TwoGRPO(beta=0.05)``, and any other loss can take it as well.
    ``k2`` and ``k3_ratio`` have the gradient of the KL divergence, the default k3 is what GRPO's paper has.

    Args:
        estimator: ``k2``, ``k3`` or ``k3_ratio``, see :func:`kl_penalty`.
        aggregation: how token values become one number, see :func:`~lit_grpo.losses.base.aggregate`.
        length: of ``aggregation: constant``.

    Reference:
        Schulman, "Approximating KL divergence", 2020, for the estimators' values; their gradients as loss terms are
        worked out by exact enumeration in the tests.

    Example:
        >>> half = torch.log(torch.tensor([[0.5]]))
        >>> inputs = LossInputs(half, torch.ones(1, 1).bool(), torch.ones(1), ref_logps=torch.zeros(1, 1))
        >>> round(KL()(inputs).loss.item(), 4)  # 2 - 1 - log 2
        0.3069
    """

    needs_reference = True
    drops_zero_advantages = True

    def __init__(
        self, estimator: Estimator = "k3", aggregation: Aggregation = "sequence_mean", length: int | None = None
    ) -> None:
        super().__init__()
        check_estimator("estimator", estimator)
        check_length(aggregation, length)
        self.estimator, self.aggregation, self.length = estimator, aggregation, length

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return all_rows(rewards), torch.ones_like(rewards)

    def forward(self, inputs: LossInputs) -> LossOutput:
        assert inputs.ref_logps is not None
        old_logps = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps
        log_ratio = (inputs.logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values = kl_penalty(inputs.logps, inputs.ref_logps, log_ratio, self.estimator)
        return LossOutput(aggregate(values * (inputs.advantages != 0)[:, None], inputs, self.aggregation, self.length))
