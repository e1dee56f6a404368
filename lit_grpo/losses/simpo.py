"""SimPO (arXiv 2405.14734)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_grpo.losses.base import LossInputs, above, at_least
from lit_grpo.losses.preference import Pairwise, sequence_logps
from lit_grpo.losses.schedules import Coefficient, at


class SimPO(Pairwise):
    r"""DPO without a reference: the reward is the mean log-prob of a completion's tokens.

    .. math::
        L = -\log \sigma\left(\frac{\beta}{|o^+|} \log \pi_\theta(o^+) - \frac{\beta}{|o^-|} \log \pi_\theta(o^-)
        - \gamma\right)

    Nothing holds the policy to where it began, so learning rates are small: 3e-7 to 1e-6 in the paper.

    Args:
        beta: scale of the reward; 2 to 2.5 in the paper.
        gamma: margin by which the chosen completion should win; 0.3 to 0.8 times ``beta`` in the paper.
        pairs: arguments of :class:`~lit_grpo.losses.preference.Pairwise`.

    Reference:
        "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734, Eq. 6.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[-1.0, -1.0], [-1.5, 0.0]])  # means -1 and -1.5: margin 2 x 0.5 - 1 = 0
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> round(SimPO()(LossInputs(logps, mask, torch.tensor([1.0, -1.0]))).loss.item(), 4)
        0.6931
    """

    def __init__(self, beta: Coefficient = 2.0, gamma: float = 1.0, **pairs: Any) -> None:
        super().__init__(**pairs)
        above(0, beta=beta)
        at_least(0, gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def scores(self, inputs: LossInputs) -> Tensor:
        return at(self.beta, inputs.step) * sequence_logps(inputs, "mean", reference=False)

    def pair_loss(self, chosen: Tensor, rejected: Tensor, step: int) -> Tensor:
        return -logsigmoid(chosen - rejected - self.gamma)
