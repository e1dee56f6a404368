"""2-GRPO (arXiv 2510.00977)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.errors import UserError
from lit_grpo.losses.advantages import pair_sign
from lit_grpo.losses.base import at_least
from lit_grpo.losses.policy_gradient import Clipped


class TwoGRPO(Clipped):
    """2-GRPO: GRPO on groups of two, where the advantages are exactly +1 and -1, or 0 on a tie.

    At group size two, normalising by the population standard deviation leaves the sign of the reward difference, so
    this is GRPO without its division: no epsilon, no Bessel factor of 0.707.

    Args:
        tie_tolerance: reward difference up to which two completions are tied, so that noise in a continuous reward is
            not blown up to a full +-1.
        clipped: arguments of :class:`~lit_grpo.losses.policy_gradient.Clipped` and ``PolicyGradient``.

    Reference:
        "It Takes Two: Your GRPO Is Secretly DPO", arXiv 2510.00977, Eq. 14 of v2. Its runs have ``clip_high`` 0.28.

    Example:
        >>> import torch
        >>> TwoGRPO().select(torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 1.0]]))[1].tolist()
        [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, tie_tolerance: float = 0.0, **clipped: Any) -> None:
        super().__init__(**clipped)
        at_least(0, tie_tolerance=tie_tolerance)
        self.tie_tolerance = tie_tolerance

    def advantages(self, rewards: Tensor) -> Tensor:
        if rewards.shape[1] != 2:
            raise UserError(
                f"data.init_args.group_size: TwoGRPO compares two completions of one prompt, got groups of"
                f" {rewards.shape[1]}. Set group_size to 2, or model.loss to GRPO."
            )
        return pair_sign(rewards, self.tie_tolerance)
