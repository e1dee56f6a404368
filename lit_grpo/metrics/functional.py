"""Mean@k, Pass@k and their relatives: values per problem as pure functions of counts or votes, and what to say of them.

Every function gives one value per problem, ``[P]``, so that intervals and paired comparisons can be taken over
problems. Counts give the default float type, or float64 if they are float64 themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _check_counts(num_correct: Tensor, num_samples: Tensor, k: int = 1) -> None:
    if num_correct.shape != num_samples.shape or num_correct.ndim != 1:
        raise ValueError(
            "Expected `num_correct` and `num_samples` of one shape [P], one entry per problem, got"
            f" {list(num_correct.shape)} and {list(num_samples.shape)}."
        )
    if ((num_correct < 0) | (num_correct > num_samples)).any():
        raise ValueError("Expected 0 <= `num_correct` <= `num_samples` for every problem.")
    if (num_samples < 1).any():
        raise ValueError("Expected at least one sample per problem.")
    if k < 1:
        raise ValueError(f"Expected `k` >= 1, got {k}.")
    if (num_samples < k).any():
        raise ValueError(f"k = {k} needs at least {k} samples per problem, got {int(num_samples.min())}.")


def mean_at_k(num_correct: Tensor, num_samples: Tensor) -> Tensor:
    """Share of correct samples of each problem.

    Args:
        num_correct: ``[P]`` correct samples of each problem.
        num_samples: ``[P]`` samples of each problem.

    Returns:
        ``[P]``.

    Raises:
        ValueError: if the counts do not fit together.

    >>> mean_at_k(torch.tensor([1, 4]), torch.tensor([4, 4])).tolist()
    [0.25, 1.0]
    """
    _check_counts(num_correct, num_samples)
    return num_correct / num_samples


def pass_at_k(num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
    r"""Unbiased estimate of the chance that at least one of k samples is correct (Chen et al. 2021, arXiv 2107.03374).

    .. math:: 1 - \binom{n-c}{k} \Big/ \binom{n}{k} = 1 - \prod_{i=0}^{k-1} \frac{n - c - i}{n - i}

    Args:
        num_correct: ``[P]`` correct samples c of each problem.
        num_samples: ``[P]`` samples n of each problem; may differ between problems.
        k: how many samples one attempt has.

    Returns:
        ``[P]``.

    Raises:
        ValueError: if the counts do not fit together, or a problem has fewer than k samples.

    >>> pass_at_k(torch.tensor([0, 1, 4]), torch.tensor([4, 4, 4]), k=2).tolist()
    [0.0, 0.5, 1.0]
    """
    _check_counts(num_correct, num_samples, k)
    return 1 - pass_hat_k(num_samples - num_correct, num_samples, k)


def pass_hat_k(num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
    r"""Unbiased estimate of the chance that all of k samples are correct (Yao et al. 2024, arXiv 2406.12045).

    .. math:: \binom{c}{k} \Big/ \binom{n}{k} = \prod_{i=0}^{k-1} \frac{c - i}{n - i}

    Args and errors are those of :func:`pass_at_k`.

    >>> pass_hat_k(torch.tensor([0, 2, 4]), torch.tensor([4, 4, 4]), k=2).tolist()
    [0.0, 0.1666666716337204, 1.0]
    """
    _check_counts(num_correct, num_samples, k)
    i = torch.arange(k, device=num_samples.device)
    return ((num_correct[:, None] - i).clamp(min=0) / (num_samples[:, None] - i)).prod(-1)


def best_at_n(num_correct: Tensor, num_samples: Tensor, n: int) -> Tensor:
    r"""Chance that at least one of n samples is correct, if they are drawn from the given ones *with* replacement.

    .. math:: 1 - (1 - c / \text{num\_samples})^n

    It is what verl's ``best@N`` estimates with a thousand random draws. It is below Pass@k: with 32 samples of which
    one is correct, Best@32 is 0.638 and Pass@32 is 1. The Pass@32 of arXiv 2510.00977 appears to be this.

    Args and errors are those of :func:`pass_at_k`, except that n may be larger than the number of samples.

    >>> [round(value, 3) for value in best_at_n(torch.tensor([1, 2, 4]), torch.tensor([32] * 3), n=32).tolist()]
    [0.638, 0.873, 0.986]
    """
    _check_counts(num_correct, num_samples)
    if n < 1:
        raise ValueError(f"Expected `n` >= 1, got {n}.")
    return 1 - (1 - num_correct / num_samples) ** n


def maj_at_k(votes: Tensor, correct: Tensor, k: int | None = None) -> Tensor:
    """Whether the answer that most of the first k samples give is correct (Wang et al. 2023, arXiv 2203.11171).

    Of answers with equally many votes the one that was given first wins. A sample without an answer has no vote; a
    problem without any vote is wrong.

    Args:
        votes: ``[P, n]`` whole numbers, equal where answers are equal; -1 where a sample has none.
        correct: ``[P, n]`` bool.
        k: samples that vote; all n if not given.

    Returns:
        ``[P]``, 0 or 1, in the default float type.

    Raises:
        ValueError: if shapes differ, or there are fewer than k samples.

    >>> votes = torch.tensor([[7, 3, 3, -1], [5, 5, 8, 8], [-1, -1, -1, -1]])
    >>> maj_at_k(votes, votes == torch.tensor([[3], [8], [2]])).tolist()
    [1.0, 0.0, 0.0]
    """
    if votes.shape != correct.shape or votes.ndim != 2:
        raise ValueError(
            f"Expected `votes` and `correct` of one shape [P, n], got {list(votes.shape)} and {list(correct.shape)}."
        )
    k = votes.shape[1] if k is None else k
    if not 1 <= k <= votes.shape[1]:
        raise ValueError(f"k = {k} needs at least 1 and at most as many samples as there are, {votes.shape[1]}.")
    votes, correct = votes[:, :k], correct[:, :k]
    count = (votes[:, :, None] == votes[:, None, :]).sum(-1) * (votes >= 0)
    winner = count.argmax(-1, keepdim=True)  # the first of several
    return (correct & (count > 0)).gather(-1, winner).squeeze(-1).to(torch.get_default_dtype())


class Estimate(NamedTuple):
    """A mean over problems with its confidence interval, mean plus and minus ``half_width``."""

    mean: float
    half_width: float


def mean_interval(values: Tensor, level: float = 0.95) -> Estimate:
    """Mean over problems, and how far chance in the choice of problems may have moved it.

    The interval is that of the normal distribution with the standard error of the mean (Miller 2024, arXiv 2411.00640).
    The samples' own chance is in it too: it widens the values' spread.

    Args:
        values: ``[P]``, one per problem.
        level: share of intervals that hold the true mean.

    Returns:
        The mean and the half-width, NaN for a single problem.

    >>> mean_interval(torch.tensor([0.0, 1.0] * 50))
    Estimate(mean=0.5, half_width=0.098...)
    """
    z = torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64))
    exact = values.double()
    spread = exact.std() if len(exact) > 1 else exact.new_tensor(torch.nan)
    return Estimate(exact.mean().item(), (z * spread / len(exact) ** 0.5).item())


class Comparison(NamedTuple):
    """Of two result sets on the same problems."""

    difference: float
    """Mean of the first minus mean of the second."""
    low: float
    high: float
    """Ends of the confidence interval of the difference."""
    p_value: float
    """Chance of a difference at least this large if there were none, two-sided."""


def paired_bootstrap(
    first: Tensor, second: Tensor, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two result sets problem by problem (Efron and Tibshirani 1993, chapters 13 and 16).

    Problems are drawn with replacement, the same for both sides. That both saw the same problems makes the interval far
    narrower than two intervals apart would suggest.

    Args:
        first: ``[P]`` values of one model.
        second: ``[P]`` values of another on the same problems, in the same order.
        level: of the percentile interval.
        draws: bootstrap samples.
        seed: of their random numbers.

    Raises:
        ValueError: if the two have different shapes.

    >>> result = paired_bootstrap(torch.tensor([1.0, 1, 0, 1] * 25), torch.tensor([0.0, 1, 0, 1] * 25))
    >>> result.difference, result.low > 0, result.p_value < 0.01
    (0.25, True, True)
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"Expected two result sets of one shape [P], P >= 1, got {list(first.shape)} and {list(second.shape)}."
        )
    difference = first.double() - second.double()
    generator = torch.Generator().manual_seed(seed)
    count = len(difference)
    means = torch.stack([difference[torch.randint(count, (count,), generator=generator)].mean() for _ in range(draws)])
    observed = difference.mean()
    low, high = means.quantile(torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)).tolist()
    extreme = ((means - observed).abs() >= observed.abs() - 1e-12).sum()  # centred: as if there were no difference
    return Comparison(observed.item(), low, high, ((extreme + 1) / (draws + 1)).item())
