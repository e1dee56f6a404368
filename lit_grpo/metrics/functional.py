"""Mean@k and Pass@k as pure functions of counts."""

from __future__ import annotations

import torch
from torch import Tensor


def _check_counts(num_correct: Tensor, num_samples: Tensor) -> None:
    if num_correct.shape != num_samples.shape or num_correct.ndim != 1:
        raise ValueError(
            "Expected `num_correct` and `num_samples` of one shape [P], one entry per problem, got"
            f" {list(num_correct.shape)} and {list(num_samples.shape)}."
        )
    if ((num_correct < 0) | (num_correct > num_samples)).any():
        raise ValueError("Expected 0 <= `num_correct` <= `num_samples` for every problem.")
    if (num_samples < 1).any():
        raise ValueError("Expected at least one sample per problem.")


def mean_at_k(num_correct: Tensor, num_samples: Tensor) -> Tensor:
    """Share of correct samples of each problem.

    Args:
        num_correct: ``[P]`` correct samples of each problem.
        num_samples: ``[P]`` samples of each problem.

    Returns:
        ``[P]`` in the default float type, or float64 if the counts are given in float64.

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
        ``[P]`` in the default float type, or float64 if the counts are given in float64.

    Raises:
        ValueError: if the counts do not fit together, or a problem has fewer than k samples.

    >>> pass_at_k(torch.tensor([0, 1, 4]), torch.tensor([4, 4, 4]), k=2).tolist()
    [0.0, 0.5, 1.0]
    """
    _check_counts(num_correct, num_samples)
    if k < 1:
        raise ValueError(f"Expected `k` >= 1, got {k}.")
    if (num_samples < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, got {int(num_samples.min())}.")
    i = torch.arange(k, device=num_samples.device)
    n, c = num_samples[:, None], num_correct[:, None]
    return 1 - ((n - c - i).clamp(min=0) / (n - i)).prod(-1)
