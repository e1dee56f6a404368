"""Mean@k, Pass@k and their relatives as torchmetrics.

The mean is over problems, so problems with more samples do not weigh more. All of them keep one value per problem, so
that results are exact under any split between processes, also where a sampler repeats problems to make shares even:
such rows are told by their ``ids``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_grpo.metrics.functional import best_at_n, maj_at_k, mean_at_k, mean_interval, pass_at_k, pass_hat_k


class OverProblems(Metric, ABC):
    """Means over problems of values that ``values_of`` makes of what ``update`` gets.

    Args:
        k: one or several k.
        level: of a confidence interval over problems; if given, ``compute`` returns ``[2]`` for each k, the mean and
            the half-width of its interval (:func:`~lit_grpo.metrics.functional.mean_interval`).

    Raises:
        ValueError: if a k is below 1, or the level not between 0 and 1.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    values: list[Tensor]
    ids: list[Tensor]

    def __init__(self, k: int | Sequence[int], level: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k or min(self.k) < 1:
            raise ValueError(f"Expected `k` to be one or several numbers >= 1, got {k}.")
        if level is not None and not 0 < level < 1:
            raise ValueError(f"Expected `level` between 0 and 1, got {level}.")
        self.level = level
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")

    @abstractmethod
    def values_of(self, num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
        """Values ``[P]`` of P problems."""

    def update(self, num_correct: Tensor, num_samples: Tensor, ids: Tensor | None = None) -> None:
        """Add P problems.

        Args:
            num_correct: ``[P]`` correct samples of each problem.
            num_samples: ``[P]`` samples of each problem.
            ids: ``[P]`` whole numbers >= 0 that name the problems; of several rows with one id the first counts. If not
                given, every row is a problem of its own.
        """
        self.values.append(torch.stack([self.values_of(num_correct, num_samples, k) for k in self.k], dim=1))
        self.ids.append(torch.full((len(num_correct),), -1, device=num_correct.device) if ids is None else ids)

    def per_problem(self) -> Tensor:
        """Values ``[P, number of k]`` of the problems so far, of this process outside ``compute``."""
        values, ids = dim_zero_cat(self.values), dim_zero_cat(self.ids)
        order = ids.argsort(stable=True)
        sorted_ids = ids[order]
        new = torch.ones_like(ids, dtype=torch.bool)
        new[1:] = (sorted_ids[1:] != sorted_ids[:-1]) | (sorted_ids[1:] < 0)
        return values[order[new]]

    def compute(self) -> Any:
        """Each k and its mean over problems, a scalar, or ``[2]`` with a ``level``; NaN before the first problem."""
        return self.means()

    def means(self) -> dict[int, Tensor]:
        """What ``compute`` returns, where states are synchronised already."""
        if not len(self.values):  # a tensor once it is gathered
            nothing = torch.full(() if self.level is None else (2,), torch.nan, device=self.device)
            return dict.fromkeys(self.k, nothing)
        values = self.per_problem()
        if self.level is None:
            return dict(zip(self.k, values.mean(0), strict=True))
        return {k: values.new_tensor(mean_interval(values[:, i], self.level)) for i, k in enumerate(self.k)}


class MeanAtK(OverProblems):
    """Mean over problems of the share of correct samples. The k of its name is the number of samples drawn.

    ``update`` takes ``num_correct`` and ``num_samples``, both ``[P]``.

    Example:
        >>> metric = MeanAtK()
        >>> metric.update(torch.tensor([1, 4]), torch.tensor([4, 4]))
        >>> metric.compute()
        tensor(0.6250)
    """

    def __init__(self, level: float | None = None, **kwargs: Any) -> None:
        super().__init__(k=1, level=level, **kwargs)

    def values_of(self, num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
        return mean_at_k(num_correct, num_samples)

    def compute(self) -> Tensor:
        """A scalar, or ``[2]`` with a ``level``; NaN before the first problem."""
        return self.means()[1]


class PassAtK(OverProblems):
    """Mean over problems of the unbiased estimate of pass@k, for several k at once.

    ``update`` takes ``num_correct`` and ``num_samples``, both ``[P]``; the number of samples may differ between
    problems but must reach the largest k.

    Example:
        >>> metric = PassAtK(k=(1, 2))
        >>> metric.update(torch.tensor([0, 1, 4]), torch.tensor([4, 4, 4]))
        >>> {k: round(value.item(), 4) for k, value in metric.compute().items()}
        {1: 0.4167, 2: 0.5}
    """

    def values_of(self, num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
        return pass_at_k(num_correct, num_samples, k)


class PassHatK(OverProblems):
    """Mean over problems of the unbiased chance that all of k samples are correct.

    ``update`` takes what that of :class:`PassAtK` does.

    Example:
        >>> metric = PassHatK(k=2)
        >>> metric.update(torch.tensor([0, 3, 4]), torch.tensor([4, 4, 4]))
        >>> metric.compute()
        {2: tensor(0.5000)}
    """

    def values_of(self, num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
        return pass_hat_k(num_correct, num_samples, k)


class BestAtN(OverProblems):
    """Mean over problems of the chance that one of n samples, drawn again with replacement, is correct.

    ``update`` takes ``num_correct`` and ``num_samples``, both ``[P]``.

    Example:
        >>> metric = BestAtN(k=32)
        >>> metric.update(torch.tensor([0, 1, 32]), torch.tensor([32, 32, 32]))
        >>> metric.compute()
        {32: tensor(0.5460)}
    """

    def values_of(self, num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
        return best_at_n(num_correct, num_samples, k)


class MajAtK(OverProblems):
    """Share of problems whose most frequent answer among the first k samples is correct.

    ``update`` takes ``votes`` and ``correct``, both ``[P, n]``: see :func:`~lit_grpo.metrics.functional.maj_at_k`.

    Example:
        >>> metric = MajAtK(k=(1, 3))
        >>> votes = torch.tensor([[1, 2, 2], [4, 4, 5]])
        >>> metric.update(votes, votes == torch.tensor([[2], [5]]))
        >>> metric.compute()
        {1: tensor(0.), 3: tensor(0.5000)}
    """

    def update(self, votes: Tensor, correct: Tensor, ids: Tensor | None = None) -> None:
        """Add P problems, see :func:`~lit_grpo.metrics.functional.maj_at_k`; ``ids`` as elsewhere."""
        super().update(votes, correct, ids)

    def values_of(self, votes: Tensor, correct: Tensor, k: int) -> Tensor:
        return maj_at_k(votes, correct, k)
