"""How far chance in the choice of seeds may have moved a result."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Quantiles 0.975 of Student's t for 1 to 20 degrees of freedom."""

RESAMPLES = 6**6
"""So many at most are enumerated."""


@dataclass
class Spread:
    """Mean over seeds, with half of its 95 % confidence interval."""

    mean: float
    half_width: float | None
    """None for a single seed."""

    values: list[float]
    """Of each seed."""


@dataclass
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float | None
    """None for a single seed."""

    high: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean over seeds and its interval by Student's t; beyond 21 seeds by that of 21, a little too wide.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, half_width=2.48..., values=[1.0, 2.0, 3.0])
    """
    n = len(values)
    half = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Spread(statistics.fmean(values), half, list(values))


def over_seeds(statistic: Callable[[Sequence[int]], float], count: int, draws: int = 10_000) -> Interval | None:
    """A statistic of seeds with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Up to six seeds all resamples are enumerated, so there is no chance in the interval. Of two or three seeds, it goes
    from the smallest to the largest of all resamples.

    Args:
        statistic: of the places of seeds that were drawn, with repetitions.
        count: of seeds.
        draws: resamples where there are more than six seeds.

    Returns:
        None where the statistic, or that of any resample, is not finite.

    >>> over_seeds(lambda seeds: sum([3.0, 5.0][i] for i in seeds) / 2, 2)
    Interval(value=4.0, low=3.0, high=5.0)
    """
    value = statistic(range(count))
    if count == 1:
        return Interval(value, None, None) if math.isfinite(value) else None
    draw = random.Random(0)
    resamples: Sequence[Sequence[int]] = (
        list(itertools.product(range(count), repeat=count))
        if count**count <= RESAMPLES
        else [draw.choices(range(count), k=count) for _ in range(draws)]
    )
    values = sorted(map(statistic, resamples))
    if not all(map(math.isfinite, [value, *values])):
        return None
    cut = math.ceil(0.025 * len(values)) - 1
    return Interval(value, values[cut], values[-1 - cut])
