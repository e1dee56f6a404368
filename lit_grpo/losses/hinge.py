"""Hinge loss on DPO's margin (RSO, arXiv 2309.06657)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.base import LossInputs, above
from lit_grpo.losses.preference import Pairwise, sequence_logps
from lit_grpo.losses.schedules import Coefficient, at


class Hinge(Pairwise):
    r"""DPO with a hinge for the sigmoid: :math:`L = \max(0, 1 - \beta h)`.

    A pair pulls with the same force until its margin reaches :math:`1/\beta`, then not at all.

    Args:
        beta: as in :class:`~lit_grpo.losses.DPO`.
        pairs: arguments of :class:`~lit_grpo.losses.preference.Pairwise`.

    Reference:
        "Statistical Rejection Sampling Improves Preference Optimization", arXiv 2309.06657, Eq. 8, which normalises
        SLiC's hinge (arXiv 2305.10425) by the reference.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[-1.0], [-1.0]])
        >>> inputs = LossInputs(logps, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]), ref_logps=logps)
        >>> Hinge()(inputs).loss.item()
        1.0
    """

    needs_reference = True

    def __init__(self, beta: Coefficient = 0.1, **pairs: Any) -> None:
        super().__init__(**pairs)
        above(0, beta=beta)
        self.beta = beta

    def scores(self, inputs: LossInputs) -> Tensor:
        return at(self.beta, inputs.step) * sequence_logps(inputs, "sum")

    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        return (1 - (chosen - rejected)).clamp(min=0)
