"""Comparisons of configurations, as numbers and in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from lit_grpo.reports.intervals import Interval, over_seeds
from lit_grpo.reports.results import Run
from lit_grpo.reports.table import label, paired, rounded

LAST = 3
"""Validations at the end of a run whose mean is its score: at a constant rate one alone is uncertain."""

Number = Callable[[Run], float]


def rollouts(run: Run) -> float:
    """Completions drawn."""
    return run.reached("rollouts")[-1]


def seconds(run: Run) -> float:
    """Of training, without validation."""
    return run.reached("seconds")[-1]


def rows_trained(run: Run) -> float:
    """Completions that were forwarded."""
    return run.total("rows_trained") or 0.0


def tokens_trained(run: Run) -> float:
    """Their tokens."""
    return run.reached("tokens_trained")[-1]


COSTS = {"rollouts": rollouts, "rows trained": rows_trained, "tokens trained": tokens_trained, "seconds": seconds}


@dataclass
class Numbers:
    """Comparisons of two configurations, over the seeds that both have."""

    configs: dict[str, list[Run]]
    score: str
    """Name in the log of Mean@k."""

    def after(self, run: Run) -> float:
        """Mean@k in the end, of the last validations but the first of all."""
        return fmean(row[self.score] for row in run.held_out[1:][-LAST:])

    def gain(self, run: Run) -> float:
        """What training added to Mean@k."""
        return self.after(run) - run.held_out[0][self.score]

    def unrest(self, name: str) -> float:
        """By how much Mean@k changes from one of the last validations to the next, mean over seeds."""
        curves = [[row[self.score] for row in run.held_out[-LAST - 1 :]] for run in self.configs[name]]
        return fmean(abs(one - other) for curve in curves for one, other in itertools.pairwise(curve))

    def over(self, ours: str, theirs: str, statistic: Callable[[list[tuple[Run, Run]]], float]) -> Interval | None:
        """A statistic of pairs of runs with its interval."""
        pairs = paired(self.configs[ours], self.configs[theirs])
        return over_seeds(lambda drawn: statistic([pairs[i] for i in drawn]), len(pairs)) if pairs else None

    def share(self, ours: str, theirs: str, number: Number) -> Interval | None:
        """One's mean over that of the other; None if that is not above 0 for all resamples."""

        def of(pairs: list[tuple[Run, Run]]) -> float:
            whole = sum(number(other) for _, other in pairs)
            return sum(number(one) for one, _ in pairs) / whole if whole > 0 else float("nan")

        return self.over(ours, theirs, of)

    def less(self, ours: str, theirs: str) -> Interval | None:
        """Mean@k in the end, one's less that of the other."""
        return self.over(ours, theirs, lambda pairs: fmean(self.after(one) - self.after(other) for one, other in pairs))

    def less_at_equal_rollouts(self, ours: str, theirs: str) -> Interval | None:
        """Mean@k when both had drawn as many rollouts as that which drew fewer, between validations by a line."""

        def difference(one: Run, other: Run) -> float:
            least = min(rollouts(one), rollouts(other))
            found, others = (float(np.interp(least, *run.curve(self.score, "rollouts"))) for run in (one, other))
            return found - others

        return self.over(ours, theirs, lambda pairs: fmean(difference(*pair) for pair in pairs))

    def arrives(self, name: str, bound: float) -> tuple[float, float] | None:
        """Rollouts and seconds at the first validation whose mean over seeds has this Mean@k; None if none has."""
        runs = self.configs[name]
        means = map(fmean, zip(*(run.curve(self.score, "rollouts")[1] for run in runs), strict=True))
        at = next((i for i, mean in enumerate(means) if mean >= bound), None)
        if at is None:
            return None
        drawn, took = (fmean(run.curve(self.score, axis)[0][at] for run in runs) for axis in ("rollouts", "seconds"))
        return drawn, took

    def differs(self, ours: str, theirs: str, found: Interval | None) -> str:
        """A difference of Mean@k in words."""
        if found is None:
            return f"{ours} and {theirs} have no seed in common"
        points = f"{100 * abs(found.value):.1f}"
        place = "above" if found.value > 0 else "below"
        text = f"{ours} is level with {theirs}" if points == "0.0" else f"{ours} is {points} points {place} {theirs}"
        if found.low is None or found.high is None:
            return f"{text}, of one seed, which says nothing of chance"
        included = "includes" if rounded(100 * found.low, 1) <= 0 <= rounded(100 * found.high, 1) else "excludes"
        return f"{text}{ends(found, 100)}: the interval {included} no difference"

    def scores(self, *names: str) -> str:
        """Mean@k in the end of each, in percent."""
        found = [f"{name} {100 * fmean(map(self.after, self.configs[name])):.1f}" for name in names]
        return f"{label(self.score)} in the end, in percent: {', '.join(found)}."

    def costs(self, ours: str, theirs: str) -> str:
        """What one took, as shares of what the other took."""
        found = [of_the(self.share(ours, theirs, number), name) for name, number in COSTS.items()]
        return f"Compared with {theirs}, {ours} takes {', '.join(found)}."


def percent(found: Interval | None) -> str:
    """A share as people read it."""
    return "an undefined share" if found is None else f"{100 * found.value:.1f} %{ends(found, 100)}"


def of_the(found: Interval | None, what: str) -> str:
    """A share of something, or how many times as much where it is more than twice.

    >>> of_the(Interval(0.125, None, None), "rollouts"), of_the(Interval(8.0, 7.9, 8.1), "rollouts")
    ('12.5 % of the rollouts', '8.0 times the rollouts [7.9, 8.1]')
    """
    if found is None or found.value <= 2:
        return f"{percent(found)} of the {what}"
    return f"{found.value:.1f} times the {what}{ends(found)}"


def ends(found: Interval, unit: float = 1.0) -> str:
    """The interval in brackets, nothing for a single seed."""
    if found.low is None or found.high is None:
        return ""
    return f" [{rounded(found.low * unit, 1):.1f}, {rounded(found.high * unit, 1):.1f}]"
