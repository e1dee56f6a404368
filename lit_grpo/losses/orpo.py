"""ORPO (arXiv 2403.07691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_grpo.losses.base import LossInputs, LossOutput, above, share_of
from lit_grpo.losses.preference import Pairwise, sequence_logps
from lit_grpo.losses.schedules import Coefficient, at

CERTAIN = -1e-6
"""Mean log-probs are clamped to this: the odds of a certain completion are infinite."""


class ORPO(Pairwise):
    r"""Imitation of the chosen completion and, in one loss, a preference by the odds ratio; no reference.

    .. math::
        L = -\log P^+ - \beta \log \sigma\left(\log \frac{P^+}{1 - P^+} - \log \frac{P^-}{1 - P^-}\right)

    with P the geometric mean of the probabilities of a completion's tokens.

    Args:
        beta: weight of the odds ratio, the paper's lambda.
        pairs: arguments of :class:`~lit_grpo.losses.preference.Pairwise`.

    Reference:
        "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, Eq. 6 and 7. The first
        term is over the completion only, not over the prompt.

    Example:
        >>> logps = torch.log(torch.tensor([[0.5], [0.5]]))  # log 2 + 0.1 log 2
        >>> inputs = LossInputs(logps, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]))
        >>> round(ORPO()(inputs).loss.item(), 4)
        0.7625
    """

    def __init__(self, beta: Coefficient = 0.1, **pairs: Any) -> None:
        super().__init__(**pairs)
        above(0, beta=beta)
        self.beta = beta

    def scores(self, inputs: LossInputs) -> Tensor:
        return at(self.beta, inputs.step) * sequence_logps(inputs, "mean", reference=False)

    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        beta = at(self.beta, step)
        log_p, log_q = chosen / beta, rejected / beta
        return -log_p - beta * logsigmoid(log_odds(log_p) - log_odds(log_q))

    def forward(self, inputs: LossInputs) -> LossOutput:
        output = super().forward(inputs)
        logps = sequence_logps(inputs, "mean", reference=False)
        output.metrics["clamped_odds"] = share_of(logps > CERTAIN, inputs.advantages != 0)
        return output


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of log-probs, stable for P near 0 and near 1.

    >>> log_odds(torch.log(torch.tensor([0.5, 0.8]))).exp()
    tensor([1., 4.])
    """
    logp = logp.clamp(max=CERTAIN)
    return logp - torch.log(-torch.expm1(logp))
