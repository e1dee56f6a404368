"""Rewards of groups to advantages: what the policy-gradient losses differ by before any log-prob is seen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["population", "sample", "batch", "none"]


def rounding(rewards: Tensor) -> Tensor:
    """Difference of rewards ``[P, 1]`` that float32 alone may cause in groups ``[P, G]``: 1e-6 of the largest.

    0.1 + 0.2 and 0.3 are the same reward.
    """
    return 1e-6 * rewards.abs().amax(-1, keepdim=True)


def tied(rewards: Tensor, tolerance: float = 0.0) -> Tensor:
    """Whether all rewards of a group are equal, ``[P, 1]``.

    Rewards are compared before anything is computed from them: in floating point the standard deviation of equal
    rewards need not be 0. Differences by rounding, or of at most ``tolerance``, do not count.
    """
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)
    return spread <= rounding(rewards).clamp(min=tolerance)


def group_normalised(rewards: Tensor, scale: Scale, epsilon: float = 0.0) -> Tensor:
    """Rewards ``[P, G]`` minus their group's mean, divided by a standard deviation plus ``epsilon``; 0 in ties.

    ``population`` divides by the group's standard deviation with 1/G inside the root, ``sample`` with 1/(G-1), and
    ``batch`` by the sample standard deviation of all P x G rewards.

    >>> group_normalised(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), "population").tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    if scale == "batch":
        centred = centred / (rewards.std() + epsilon)
    elif scale != "none":
        largest = centred.abs().amax(-1, keepdim=True)  # tiny rewards must not underflow when squared
        centred = centred / largest
        centred = centred / (centred.std(-1, correction=int(scale == "sample"), keepdim=True) + epsilon / largest)
    return torch.where(tied(rewards), 0, centred)


def pair_sign(rewards: Tensor, tie_tolerance: float = 0.0) -> Tensor:
    """Rewards ``[P, 2]`` to +1 for the better completion, -1 for the worse, 0 for both in a tie.

    >>> pair_sign(torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 1.0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]
    """
    return torch.where(tied(rewards, tie_tolerance), 0, (rewards - rewards.flip(-1)).sign())


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards ``[P, G]`` minus the mean of the *other* rewards of their group; 0 in ties.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    group_size = rewards.shape[1]
    return group_normalised(rewards, "none") * group_size / (group_size - 1)
