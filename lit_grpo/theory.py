r"""The theory of GRPO and 2-GRPO as code: exact expectations for binary rewards, no sampling.

Numbers of propositions, equations and tables are those of arXiv 2510.00977 (v3 unless said). Arguments they share:

- ``p``: pass rates, the chance that a completion of a prompt has reward 1. A float or a tensor ``[...]`` of any shape;
  results are float64 ``[...]``.
- ``group_size``: G completions of one prompt, drawn on-policy; ``math.inf`` is the limit.
- ``weights``: makes ``p [K]`` a histogram with that many prompts (or that share of them) in each bin, ``[K]``. The
  result is then one scalar, its expectation over prompts.

What does not fit raises ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from lit_grpo.losses import GRPO
from lit_grpo.losses.advantages import rounding


def _check(p: Tensor | float, group_size: float = 2) -> Tensor:
    if group_size != math.inf and (group_size < 2 or group_size != int(group_size)):
        raise ValueError(f"Expected `group_size` to be a whole number >= 2 or math.inf, got {group_size}.")
    p = torch.as_tensor(p, dtype=torch.float64)
    outside = p[~((p >= 0) & (p <= 1))]
    if outside.numel():
        raise ValueError(f"Expected pass rates within 0 and 1, got {outside[0].item()}.")
    return p


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values
    if weights.shape != values.shape or values.ndim != 1:
        raise ValueError(f"Expected `p` and `weights` of one shape [K], got {[*values.shape]} and {[*weights.shape]}.")
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError(f"Expected `weights` >= 0 with a finite sum > 0, got {weights.tolist()}.")
    return weights.double() @ values / weights.double().sum()


def contrastive_coefficient(rewards: Tensor) -> Tensor:
    r"""Rewards ``[P, G]`` to the weight ``[P]`` of winners against losers in GRPO's gradient (Eq. 7, Prop. 3.2 of v3).

    The gradient of a group with binary rewards is c times (mean score of winners - mean score of losers), where
    :math:`c = \sqrt{\hat p (1 - \hat p)}` and :math:`\hat p` is the share of winners. For any rewards it is
    :math:`c = \sum_i |A_i| / 2G`, with advantages normalised by the population standard deviation; on binary rewards
    the two agree. Ties have c = 0.

    >>> contrastive_coefficient(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.2, 0.7]])).tolist()
    [0.5, 0.0, 0.5]
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"Expected `rewards` of shape [P, G] with G >= 2, got {list(rewards.shape)}.")
    return GRPO().select(rewards.double())[1].abs().mean(-1) / 2


def kappa(
    p: Tensor | float, group_size: float, scale: Literal["population", "sample", "none"] = "population"
) -> Tensor:
    r"""Slope of the expected advantage: :math:`E[A \mid r = x] = \kappa_G(p)\,(x - p)` (Prop. C.1 of v3, for every G).

    Hence the expected GRPO gradient (on-policy, summed log-probs) is :math:`\kappa_G(p) \nabla p`. With the population
    deviation :math:`\kappa_2 = 1`, so G = 2 ascends :math:`E[p]` exactly, while
    :math:`\kappa_\infty = 1 / \sqrt{p (1 - p)}`, so G to infinity ascends :math:`E[2 \arcsin \sqrt p]`. These are
    different objectives, so "unbiased for any group size" is false. Only ``scale="none"`` is, up to 1 - 1/G.

    Args:
        p: ``[...]``.
        group_size: G, or ``math.inf``, where the result at p = 0 and 1 is infinite unless ``scale="none"``.
        scale: what :class:`~lit_grpo.losses.GRPO` divides centred rewards by.

    >>> kappa(torch.tensor([0.2, 0.5]), group_size=4)
    tensor([1.6578, 1.6160], dtype=torch.float64)
    """
    p = _check(p, group_size)
    if scale not in ("population", "sample", "none"):
        raise ValueError(f"Expected `scale` to be 'population', 'sample' or 'none', got {scale!r}.")
    if scale == "none":
        return torch.full_like(p, 1 - 1 / group_size)
    if group_size == math.inf:
        return (p * (1 - p)).rsqrt()
    size = int(group_size)
    k = torch.arange(size, dtype=p.dtype, device=p.device)  # winners among the other G - 1
    ways = k.new_tensor([math.log(math.comb(size - 1, i)) for i in range(size)])
    p = p[..., None]
    chance = (ways + torch.special.xlogy(k, p) + torch.special.xlog1py(size - 1 - k, -p)).exp()
    # With n of G rewards 1, the population advantages are sqrt((G - n) / n) and -sqrt(n / (G - n)), or 0 on ties.
    # Advantages of a group add up to 0, so E[A | 1] = kappa (1 - p), E[A | 0] = -kappa p, and kappa is the difference.
    gap = ((size - k - 1) / (k + 1)).sqrt() + (k / (size - k)).sqrt()
    return (chance * gap).sum(-1) * (math.sqrt(1 - 1 / size) if scale == "sample" else 1)


def expected_coefficient(p: Tensor | float, group_size: float, weights: Tensor | None = None) -> Tensor:
    r"""Expected contrastive coefficient :math:`E[c] = \kappa_G(p)\,p (1 - p)` of a group.

    >>> expected_coefficient(torch.tensor([0.0, 0.5]), group_size=2, weights=torch.tensor([1, 3])).item()
    0.1875
    """
    p = _check(p, group_size)
    variance = p * (1 - p)
    return _mean(variance.sqrt() if group_size == math.inf else kappa(p, group_size) * variance, weights)


def informative_share(p: Tensor | float, group_size: float, weights: Tensor | None = None) -> Tensor:
    """Share of groups whose rewards are not all equal: 1 - p^G - (1 - p)^G. Only these have a gradient.

    >>> informative_share(torch.tensor([0.0, 0.5]), group_size=2, weights=torch.tensor([1, 3])).item()
    0.375
    """
    p = _check(p, group_size)
    return _mean(1 - p**group_size - (1 - p) ** group_size, weights)


def estimated_informative_share(winners: Tensor, completions: Tensor | int, group_size: int) -> Tensor:
    r"""Unbiased estimate of :func:`informative_share` for prompts whose pass rates are known by some completions only.

    It is the share of mixed groups among all groups of G that can be made of a prompt's n completions, k of them
    winners: :math:`1 - \binom{k}{G} / \binom{n}{G} - \binom{n - k}{G} / \binom{n}{G}`. The formula at the estimate
    :math:`\hat p = k / n` would on average be too small, as it is concave: 1 - 1/n of the truth at G = 2, so one half
    where n = 2. For the same reason the formula at a mean pass rate is too large for prompts of different pass rates.

    Args:
        winners: k, ``[...]``.
        completions: n, ``[...]`` or the same for all, at least G.
        group_size: G.

    >>> estimated_informative_share(torch.tensor([0, 1, 2]), 4, group_size=2)
    tensor([0.0000, 0.5000, 0.6667], dtype=torch.float64)
    """
    k, n = winners.double()[..., None], torch.as_tensor(completions, dtype=torch.float64)[..., None]
    if group_size < 2 or not ((k >= 0) & (k <= n) & (n >= group_size)).all():
        raise ValueError(f"Expected 0 <= winners <= completions and 2 <= group_size {group_size} <= completions.")
    drawn = torch.arange(group_size, dtype=torch.float64)
    alike = [((same - drawn).clamp(min=0) / (n - drawn)).prod(-1) for same in (k, n - k)]
    return 1 - alike[0] - alike[1]


def effective_pairs(rewards: Tensor) -> Tensor:
    """Rewards ``[P, G]`` to the informative pairs ``[P]`` that each group would have, were it paired up at random.

    A group of w winners and l losers, cut into G / 2 pairs, has w l / (G - 1) mixed ones on average. So this is what
    2-GRPO would have learned from, had it the same completions; a group of two has 1, or 0 if it is tied. Rewards that
    differ by rounding only are equal.

    >>> effective_pairs(torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([1.3333, 1.0000, 0.0000], dtype=torch.float64)
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"Expected `rewards` of shape [P, G] with G >= 2, got {list(rewards.shape)}.")
    differ = (rewards[:, :, None] - rewards[:, None]).abs() > rounding(rewards)[..., None]
    return differ.double().sum((1, 2)) / 2 / (rewards.shape[1] - 1)


def discard_rate(p: Tensor | float) -> Tensor:
    """Share of pairs without a gradient, p^2 + (1 - p)^2 >= 1/2 (Table 3 of v3; its appendix D.3 prints 1 minus this).

    >>> discard_rate(0.75).item()
    0.625
    """
    p = _check(p)
    return p.square() + (1 - p).square()


def mean_reward_from_discard_rate(rate: Tensor | float) -> Tensor:
    """Inverse of :func:`discard_rate`: the pass rate p >= 1/2 that discards this share of pairs; 1 - p does as well.

    A mean reward so read from Table 3 of v3 takes all prompts to be equally hard. Spread between prompts alone raises
    the discard rate, so it is farther from 1/2 than the true mean.

    >>> mean_reward_from_discard_rate(0.625).item()
    0.75
    """
    rate = torch.as_tensor(rate, dtype=torch.float64)
    outside = rate[~((rate >= 0.5) & (rate <= 1))]
    if outside.numel():
        raise ValueError(f"Expected discard rates of pairs within 0.5 and 1, got {outside[0].item()}.")
    return (1 + (2 * rate - 1).sqrt()) / 2


def snr_per_rollout(p: Tensor | float, group_size: float, weights: Tensor | None = None) -> Tensor:
    r"""Signal to noise (squared mean over variance) of the gradient per *generated* completion: :math:`E[c]^2 / P`.

    P is the :func:`informative_share`. The model: scores (gradients of a completion's log-prob) are independent with
    unit variance, and the mean scores of winners and losers differ by an amount that is small, and the same for every
    prompt; it is the unit of the signal. A group then has signal :math:`E[c]` and noise :math:`E[\sum A_i^2] / G^2 =
    P / G`; of a histogram, the means of :math:`E[c]` and P enter. Other spread between prompts is left out; it favours
    small groups at equal rollouts. 0 where no group is informative.

    >>> snr_per_rollout(torch.tensor([0.05, 0.5]), group_size=2)
    tensor([0.0238, 0.1250], dtype=torch.float64)
    """
    signal, share = expected_coefficient(p, group_size, weights), informative_share(p, group_size, weights)
    return torch.where(share > 0, signal.square() / share, 0)


def snr_per_trained_row(p: Tensor | float, group_size: float, weights: Tensor | None = None) -> Tensor:
    r"""As :func:`snr_per_rollout`, per completion that is *trained* when groups of equal rewards are skipped.

    :math:`E[c]^2 / P^2`, the squared mean coefficient of informative groups: 1/4 at G = 2 whatever p, and never more.
    NaN where no group is informative, so that nothing is trained.

    >>> snr_per_trained_row(torch.tensor([0.05, 0.5]), group_size=16)
    tensor([0.0768, 0.2338], dtype=torch.float64)
    """
    signal, share = expected_coefficient(p, group_size, weights), informative_share(p, group_size, weights)
    return (signal / share).square()


def adaptive_snr(p: Tensor | float, group_size: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""What :func:`snr_per_rollout` and :func:`snr_per_trained_row` are for :class:`~lit_grpo.losses.AdaptiveGRPO`.

    A prompt costs :math:`2 + (G - 2)(1 - 2 p (1 - p))` completions and has signal :math:`p (1 - p)`; noise is
    :math:`E[\sum A_i^2] / G^2`. Per rollout it lies between groups of two and groups of G that are always drawn whole
    without normalisation, whose ratio is :math:`(1 - 1/G)\,p (1 - p)`.

    Args:
        p: ``[...]``.
        group_size: G, three or more, finite.
        weights: of a histogram.

    >>> [round(x.item(), 3) for x in adaptive_snr(0.18, group_size=4)]
    [0.098, 0.209]
    """
    if not 3 <= group_size < math.inf:
        raise ValueError(f"Expected `group_size` to be a whole number >= 3, got {group_size}.")
    p, size = _check(p, group_size), int(group_size)
    m = torch.arange(size + 1, dtype=p.dtype, device=p.device)
    ways = m.new_tensor([math.log(math.comb(size, i)) for i in range(size + 1)])
    chances = (ways + torch.special.xlogy(m, p[..., None]) + torch.special.xlog1py(size - m, -p[..., None])).exp()
    return _adaptive_snr(torch.stack([_mean(chance, weights) for chance in chances.unbind(-1)], -1))


def _adaptive_snr(chances: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`adaptive_snr` from the chances ``[..., G + 1]`` of 0 to G winners in a whole group."""
    size = chances.shape[-1] - 1
    m = torch.arange(size + 1, dtype=chances.dtype, device=chances.device)
    pairs = chances * m * (size - m)  # of a winner and a loser
    differ, whole = 2 * pairs.sum(-1) / (size * (size - 1)), chances[..., 1:-1].sum(-1)
    ties = m * (m - 1) + (size - m) * (size - m - 1)
    squares = 2 * differ + (pairs / ties).sum(-1) * (size - 2) ** 2 / (size - 1)
    ratio = torch.where(whole > 0, (differ / 2).square() * size**2 / squares, 0)
    drawn, trained = 2 + (size - 2) * (1 - differ), 2 * differ + size * (whole - differ)
    return ratio / drawn, ratio / trained


def estimated_snr(
    winners: Tensor, completions: int, group_size: int, weights: Tensor | None = None, adaptive: bool = False
) -> tuple[Tensor, Tensor]:
    r""":func:`snr_per_rollout` and :func:`snr_per_trained_row` of prompts known by some completions only.

    All that enters is linear in the chances of 0 to G winners in a group. Of them the shares among all groups of G that
    can be made of a prompt's n completions, k of them winners, :math:`\binom{k}{m} \binom{n - k}{G - m} /
    \binom{n}{G}`, are unbiased estimates (see :func:`estimated_informative_share`), whatever the pass rates are.

    Args:
        winners: k, ``[K]``.
        completions: n of each prompt, at least G.
        group_size: G.
        weights: how many prompts each k stands for, ``[K]``; one if not given.
        adaptive: of :func:`adaptive_snr` instead.

    >>> snr = estimated_snr(torch.tensor([0, 2, 4]), 4, group_size=2)
    >>> [round(x.item(), 4) for x in snr]  # pairs are mixed with chances 0, 2 / 3 and 0
    [0.0556, 0.25]
    """
    n, size = completions, group_size
    if not (2 + adaptive <= size <= n and ((winners >= 0) & (winners <= n)).all()):
        raise ValueError(
            f"Expected 0 <= winners <= completions and {2 + adaptive} <= group_size {size} <= completions."
        )
    ways = [[math.comb(k, m) * math.comb(n - k, size - m) for m in range(size + 1)] for k in winners.int().tolist()]
    each = torch.tensor(ways, dtype=torch.float64) / math.comb(n, size)
    weights = torch.ones(len(winners)) if weights is None else weights
    chances = torch.stack([_mean(chance, weights) for chance in each.unbind(-1)])
    if adaptive:
        return _adaptive_snr(chances)
    m = torch.arange(size + 1, dtype=torch.float64)
    signal, share = chances @ (m * (size - m)).sqrt() / size, chances[1:-1].sum()
    return torch.where(share > 0, signal.square() / share, 0), (signal / share).square()


def signal_and_noise(halves: Iterable[tuple[Tensor, Tensor]], share: float) -> Tensor:
    r"""Unbiased estimates ``[2]`` of a gradient's squared mean and of its variance, from its two halves.

    The gradient is a sum over independent groups, :math:`g = g_A + g_B`, of which A has the share f. Scaled to the
    whole, :math:`h_A = g_A / f` and :math:`h_B = g_B / (1 - f)` are independent and have the mean of g. So
    :math:`h_A \cdot h_B` estimates :math:`|E g|^2`, and may be negative; :math:`f (1 - f) |h_A - h_B|^2`, which is
    :math:`|g_A - g_B|^2` of equal halves, estimates the trace of :math:`Cov(g)`.

    Args:
        halves: :math:`g_A, g_B` of each parameter, both of one shape.
        share: f, above 0 and below 1.

    >>> signal_and_noise([(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))], share=0.5)
    tensor([4., 4.], dtype=torch.float64)
    """
    if not 0 < share < 1:
        raise ValueError(f"Expected `share` above 0 and below 1, got {share}.")
    both = [(a.flatten(), b.flatten()) for a, b in halves]
    aa, ab, bb = (
        torch.stack([torch.dot(pair[i], pair[j]) for pair in both]).double().sum() for i, j in ((0, 0), (0, 1), (1, 1))
    )
    rest = 1 - share
    return torch.stack([ab / (share * rest), aa * rest / share - 2 * ab + bb * share / rest])


def exploration_probability(p: Tensor | float, group_size: int) -> Tensor:
    r"""Chance of a winner in M groups drawn at pass rates ``p [M]`` (Prop. C.4 of v3, Prop. 4.4 of v1), a scalar.

    One group of 2m at pass rate :math:`p_0` finds one with :math:`1 - (1 - p_0)^{2m}`. m pairs, with updates between
    them, find one with :math:`1 - \prod_i (1 - p_i)^2`, which is no less if no :math:`p_i < p_0`.

    >>> exploration_probability(0.5, 4).item(), exploration_probability(torch.tensor([0.5, 0.75]), 2).item()
    (0.9375, 0.984375)
    """
    return 1 - ((1 - _check(p, group_size)) ** group_size).prod()


def control_variate_variance(
    variance: float, control_variance: float, covariance: float, coefficient: float | None = None
) -> float:
    r"""Variance of :math:`g^+ - c\,g^-` from :math:`Var(g^+), Var(g^-), Cov(g^+, g^-)` and c (Prop. 4.1 of v2 and v3).

    Variances and covariance are traces over the coordinates. Without a coefficient, c is the best one,
    :math:`c^* = Cov(g^+, g^-) / Var(g^-)`, and the result :math:`(1 - \rho^2) Var(g^+)`. Between 0 and :math:`2 c^*` it
    is at most :math:`Var(g^+)`. That the covariance is positive is a premise, not a theorem: within a prompt,
    :math:`p\,E g^+ + (1 - p)\,E g^- = 0` makes the means antiparallel.

    >>> control_variate_variance(4.0, 1.0, 1.0), control_variate_variance(4.0, 1.0, 1.0, coefficient=3.0)
    (3.0, 7.0)
    """
    c = covariance / control_variance if coefficient is None else coefficient
    return variance - 2 * c * covariance + c * c * control_variance
