"""GSPO (arXiv 2507.18071)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_grpo.losses.base import LossInputs, Metrics
from lit_grpo.losses.grpo import GRPO


class GSPO(GRPO):
    r"""GRPO with one ratio per completion, the geometric mean of its tokens' ratios.

    .. math::
        L = -\mathrm{mean}_i \min(s_i A_i,\ \mathrm{clip}(s_i) A_i), \quad
        s_i = \left(\frac{\pi_\theta(o_i)}{\pi_{old}(o_i)}\right)^{1/|o_i|}

    The mean of many log-ratios is small, and so is the clip: about a thousandth of that of token ratios.

    Args:
        clip_low: as in :class:`~lit_grpo.losses.GRPO`, of the ratio of completions.
        clip_high: the same.
        grpo: arguments of :class:`~lit_grpo.losses.GRPO`.

    Reference:
        "Group Sequence Policy Optimization", arXiv 2507.18071, Eq. 5 to 7; clips from its section 5.1.

    Example:
        >>> GSPO().clip_high
        0.0004
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4, **grpo: Any) -> None:
        super().__init__(clip_low=clip_low, clip_high=clip_high, **grpo)

    def surrogate(self, log_ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        lengths = inputs.mask.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(inputs.mask, log_ratio, 0).sum(-1, keepdim=True) / lengths
        return self.clipped(mean.exp(), inputs)
