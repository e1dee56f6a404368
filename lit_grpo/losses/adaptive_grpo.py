"""2-GRPO with groups that grow where two completions say nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_grpo.losses.advantages import pair_sign
from lit_grpo.losses.base import at_least
from lit_grpo.losses.policy_gradient import Clipped


class AdaptiveGRPO(Clipped):
    r"""2-GRPO that draws the rest of a group where the first two completions are tied, without a bias from doing so.

    .. math::
        A_i = \begin{cases}
        \mathrm{sign}(r_i - r_{3-i}) \text{ for } i \le 2,\ 0 \text{ for others} & r_1 \ne r_2 \\
        \frac{G - 2}{n} \sum_j \mathrm{sign}(r_i - r_j), \quad n = |\{j \ne k : r_j = r_k\}| & r_1 = r_2
        \end{cases}

    G is ``data.group_size``, three or more: of each prompt two completions are drawn, and the other G - 2 only in a
    tie. Normalising within whatever was drawn would be biased, as rewards decide which groups become whole: those with
    one success among G do so more often than those with half. So a whole group is weighed with the inverse of the
    chance, n / G(G - 1), that the first two of its completions are tied.

    On-policy, the expected gradient is exactly that of 2-GRPO with the same aggregation, whatever the policy, if
    rewards take fewer than G different values, such as 0 and 1 (``sequence_sum`` then ascends the pass rate itself). Of
    other rewards it leaves out what whole groups without any tie would have said; with continuous ones, 2/G of the
    gradient is left.

    The loss is the mean over G completions of every prompt. One that was not drawn has advantage 0 and is never
    forwarded. ``token_mean``, which alone is not exact, takes it to be as long as the two that were.

    There is no KL term and no entropy bonus: they would have to correct for the choice too.

    Args:
        tie_tolerance: reward difference up to which two completions are tied.
        clipped: arguments of :class:`~lit_grpo.losses.policy_gradient.Clipped` and ``PolicyGradient``.

    Reference:
        Groups of an adaptive size are future work in "It Takes Two: Your GRPO Is Secretly DPO", arXiv 2510.00977.

    Example:
        >>> import torch
        >>> from math import nan
        >>> AdaptiveGRPO().select(torch.tensor([[1, 0, nan, nan], [0, 0, 1, 0], [1, 1, 0, 0]]))[1].mul(3).tolist()
        [[3.0, -3.0, 0.0, 0.0], [-1.0, -1.0, 3.0, -1.0], [3.0, 3.0, -3.0, -3.0]]
    """

    draws_first = 2

    def __init__(self, tie_tolerance: float = 0.0, **clipped: Any) -> None:
        super().__init__(beta=0.0, kl="k3", entropy_bonus=0.0, **clipped)
        at_least(0, tie_tolerance=tie_tolerance)
        self.tie_tolerance = tie_tolerance

    def advantages(self, rewards: Tensor) -> Tensor:
        size = rewards.shape[1]
        mine = rewards[:, :, None].expand(-1, -1, size)
        better = pair_sign(torch.stack([mine, mine.mT], -1), self.tie_tolerance)[..., 0]  # [P, G, G], NaN if not drawn
        ties = (better == 0).sum((1, 2)) - size
        whole = (size - 2) * better.sum(-1) / ties[:, None]
        pair = F.pad(better[:, :2, :2].sum(-1), (0, size - 2))
        return torch.where(better[:, :1, 1] == 0, whole, pair)
