"""All that is said of one set of held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_grpo.metrics.at_k import BestAtN, MajAtK, MeanAtK, OverProblems, PassAtK


class MeanReward(OverProblems):
    """Mean over problems of the mean reward of their completions; ``update`` takes rewards ``[P, n]`` twice."""

    def values_of(self, rewards: Tensor, _: Tensor, k: int) -> Tensor:
        return rewards.mean(-1)


class Scores(nn.Module):
    """Mean reward, Mean@n, Pass@k, Best@n and Maj@n of problems with n completions each.

    Args:
        n: completions of each problem.
        pass_at: the k of Pass@k.
        majority: whether there are votes for Maj@n.
        level: of the confidence intervals.

    Raises:
        ValueError: if a k is not between 1 and n.

    Example:
        >>> scores = Scores(n=4, pass_at=[2, 4])
        >>> scores.update(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([[7, 8, 8, 8], [5, 5, 5, 5]]))
        >>> {name: round(mean, 3) for name, (mean, _) in scores.compute().items()}
        {'reward': 0.625, 'mean_at_4': 0.625, 'pass_at_2': 0.75, 'pass_at_4': 1.0, 'best_at_4': 0.842, 'maj_at_4': 0.5}
    """

    def __init__(self, n: int, pass_at: Sequence[int], majority: bool = True, level: float = 0.95) -> None:
        super().__init__()
        if bad := [k for k in pass_at if not 1 <= k <= n]:
            raise ValueError(f"k = {bad[0]} needs at least 1 and at most as many samples as there are, {n}.")
        self.n = n
        self.reward, self.mean_at = MeanReward(1, level=level), MeanAtK(level=level)
        self.pass_at, self.best_at = PassAtK(pass_at, level=level), BestAtN(n, level=level)
        self.maj_at = MajAtK(n, level=level) if majority else None

    def update(self, rewards: Tensor, votes: Tensor, ids: Tensor | None = None, correct_at: float = 1.0) -> None:
        """Add P problems.

        Args:
            rewards: ``[P, n]``.
            votes: ``[P, n]`` whole numbers, equal where answers are equal; -1 where a completion has none.
            ids: ``[P]``, see :class:`~lit_grpo.metrics.at_k.OverProblems`.
            correct_at: reward from which a completion is correct.
        """
        correct = rewards >= correct_at
        self.reward.update(rewards, rewards, ids)
        for metric in (self.mean_at, self.pass_at, self.best_at):
            metric.update(correct.sum(-1), torch.full(rewards.shape[:1], self.n, device=rewards.device), ids)
        if self.maj_at is not None:
            self.maj_at.update(votes, correct, ids)

    def compute(self) -> dict[str, tuple[float, float]]:
        """Each score over all processes with the half-width of its interval; then start afresh."""
        values = {"reward": self.reward.compute()[1], f"mean_at_{self.n}": self.mean_at.compute()}
        values |= {f"pass_at_{k}": value for k, value in self.pass_at.compute().items()}
        values |= {f"best_at_{self.n}": self.best_at.compute()[self.n]}
        if self.maj_at is not None:
            values |= {f"maj_at_{self.n}": self.maj_at.compute()[self.n]}
        for metric in (self.reward, self.mean_at, self.pass_at, self.best_at, self.maj_at):
            if metric is not None:
                metric.reset()
        return {name: (value[0].item(), value[1].item()) for name, value in values.items()}
