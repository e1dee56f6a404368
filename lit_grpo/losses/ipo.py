"""IPO (arXiv 2310.12036)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.base import LossInputs, above, one_of
from lit_grpo.losses.preference import LogRatios, Pairwise, sequence_logps
from lit_grpo.losses.schedules import Coefficient, at


class IPO(Pairwise):
    r"""Identity preference optimization: the margin is drawn to a fixed value from both sides.

    .. math::
        L = \left(h - \frac{1}{2\beta}\right)^2

    with h the difference of the log-ratios to the reference, as in :class:`~lit_grpo.losses.DPO`. Beyond
    :math:`1/(2\beta)` the gradient turns round, which keeps the policy from running away on preferences that are
    always the same.

    Args:
        beta: the paper's tau; larger is nearer to the reference.
        log_ratios: ``mean`` over tokens, so that the target does not depend on length (confirmed by the paper's
            authors according to TRL's source), or ``sum``, as the paper's text and the reference code of DPO have it.
            The two need very different ``beta``.
        pairs: arguments of :class:`~lit_grpo.losses.preference.Pairwise`.

    Reference:
        "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036, Eq. 17.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[-1.0], [-1.0]])  # h = 0, target 5
        >>> inputs = LossInputs(logps, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]), ref_logps=logps)
        >>> round(IPO(beta=0.1)(inputs).loss.item(), 4)
        25.0
    """

    needs_reference = True

    def __init__(self, beta: Coefficient = 0.1, log_ratios: LogRatios = "mean", **pairs: Any) -> None:
        super().__init__(**pairs)
        above(0, beta=beta)
        one_of(LogRatios, log_ratios=log_ratios)
        self.beta, self.log_ratios = beta, log_ratios

    def scores(self, inputs: LossInputs) -> Tensor:
        return at(self.beta, inputs.step) * sequence_logps(inputs, self.log_ratios)

    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        return ((chosen - rejected - 0.5) / at(self.beta, step)).square()
