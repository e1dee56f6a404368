"""DPO (arXiv 2305.18290), with conservative and robust label smoothing."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_grpo.errors import UserError
from lit_grpo.losses.base import LossInputs, above, one_of
from lit_grpo.losses.preference import LogRatios, Pairwise, sequence_logps
from lit_grpo.losses.schedules import Coefficient, at

Smoothing = Literal["conservative", "robust"]


class DPO(Pairwise):
    r"""Direct preference optimization.

    .. math::
        L = -\log \sigma(\beta h), \qquad
        h = \log\frac{\pi_\theta(o^+)}{\pi_{ref}(o^+)} - \log\frac{\pi_\theta(o^-)}{\pi_{ref}(o^-)}

    At the reference its gradient is beta times that of 2-GRPO with ``aggregation: sequence_sum``; away from it, it
    saturates where the margin h is large.

    Args:
        beta: how near to the reference the optimum lies; larger is nearer.
        label_smoothing: probability e that a preference is wrong, below one half.
        smoothing: ``conservative`` (cDPO) is (1-e) L(h) + e L(-h), which stops at a finite margin; ``robust`` (arXiv
            2403.00409) is ((1-e) L(h) - e L(-h)) / (1-2e), the same as no smoothing in the mean over wrong labels.
        log_ratios: ``sum`` over tokens, as in the paper, or ``mean``, for which beta must be larger.
        pairs: arguments of :class:`~lit_grpo.losses.preference.Pairwise`.

    Reference:
        "Direct Preference Optimization", arXiv 2305.18290, Eq. 7; conservative smoothing: Mitchell, "A note on DPO
        with noisy preferences", 2023.

    Example:
        >>> import torch
        >>> pair = torch.tensor([[-1.0], [-1.0]])  # the policy is the reference: the loss is log 2
        >>> inputs = LossInputs(pair, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]), ref_logps=pair)
        >>> round(DPO()(inputs).loss.item(), 4)
        0.6931
    """

    needs_reference = True

    def __init__(
        self,
        beta: Coefficient = 0.1,
        label_smoothing: float = 0.0,
        smoothing: Smoothing = "conservative",
        log_ratios: LogRatios = "sum",
        **pairs: Any,
    ) -> None:
        super().__init__(**pairs)
        above(0, beta=beta)
        one_of(Smoothing, smoothing=smoothing)
        one_of(LogRatios, log_ratios=log_ratios)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"model.loss.init_args.label_smoothing: expected a probability below 0.5, got {label_smoothing}."
            )
        self.beta, self.label_smoothing, self.smoothing, self.log_ratios = beta, label_smoothing, smoothing, log_ratios

    def scores(self, inputs: LossInputs) -> Tensor:
        return at(self.beta, inputs.step) * sequence_logps(inputs, self.log_ratios)

    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        right, wrong, e = -logsigmoid(chosen - rejected), -logsigmoid(rejected - chosen), self.label_smoothing
        if self.smoothing == "robust":
            return ((1 - e) * right - e * wrong) / (1 - 2 * e)
        return (1 - e) * right + e * wrong
