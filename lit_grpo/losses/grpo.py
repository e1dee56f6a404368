"""GRPO (arXiv 2402.03300)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_grpo.losses.advantages import Scale, group_normalised
from lit_grpo.losses.base import at_least, one_of
from lit_grpo.losses.policy_gradient import Clipped


class GRPO(Clipped):
    r"""Group relative policy optimization: the clipped surrogate on rewards normalised within each group.

    .. math::
        A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon} \qquad
        L = -\mathrm{mean}_i\,\mathrm{mean}_t \min(\rho_{i,t} A_i,\ \mathrm{clip}(\rho_{i,t}) A_i)

    with the ratio :math:`\rho = \pi_\theta / \pi_{old}`. Groups whose rewards are all equal get advantage 0.

    With one update per phase the ratio is 1 and the *value* of the loss is 0 by construction; its gradient is not.

    Args:
        scale: what centred rewards are divided by: the group's ``population`` standard deviation (1/G inside the root,
            as in the theory of arXiv 2510.00977), its ``sample`` one (1/(G-1), as most frameworks do), that of the
            ``batch`` (arXiv 2508.08221), or ``none``.
        epsilon: added to the standard deviation. Not needed here, as ties are found by comparing rewards; other
            frameworks have 1e-4 (TRL) or 1e-6 (verl).
        clipped: arguments of :class:`~lit_grpo.losses.policy_gradient.Clipped` and ``PolicyGradient``.

    Reference:
        DeepSeekMath, arXiv 2402.03300, Eq. 3. It has ``beta`` 0.04 and groups of 64; here no KL term is the default,
        as in arXiv 2510.00977.

    Example:
        >>> import torch
        >>> index, advantages = GRPO().select(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]))
        >>> advantages.tolist()
        [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, scale: Scale = "population", epsilon: float = 0.0, **clipped: Any) -> None:
        super().__init__(**clipped)
        at_least(0, epsilon=epsilon)
        one_of(Scale, scale=scale)
        self.scale, self.epsilon = scale, epsilon

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_normalised(rewards, self.scale, self.epsilon)
