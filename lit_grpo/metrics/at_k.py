"""Mean@k and Pass@k as torchmetrics. The mean is over problems, so problems with more samples do not weigh more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_grpo.metrics.functional import mean_at_k, pass_at_k


class MeanAtK(Metric):
    """Mean over problems of the share of correct samples. The k of its name is the number of samples drawn.

    As input ``update`` takes ``num_correct`` and ``num_samples``, both ``[P]``. Sums over problems are exact under any
    split between processes.

    Example:
        >>> metric = MeanAtK()
        >>> metric.update(torch.tensor([1, 4]), torch.tensor([4, 4]))
        >>> metric.compute()
        tensor(0.6250)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    num_problems: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, num_correct: Tensor, num_samples: Tensor) -> None:
        """Add P problems."""
        self.total += mean_at_k(num_correct, num_samples).sum()
        self.num_problems += len(num_correct)

    def compute(self) -> Tensor:
        """Scalar; NaN before the first problem."""
        return self.total / self.num_problems


class PassAtK(Metric):
    """Mean over problems of the unbiased estimate of pass@k, for several k at once.

    As input ``update`` takes ``num_correct`` and ``num_samples``, both ``[P]``; the number of samples may differ
    between problems but must reach the largest k.

    Args:
        k: one or several k.

    Raises:
        ValueError: if a k is below 1, or a problem has fewer than k samples.

    Example:
        >>> metric = PassAtK(k=(1, 2))
        >>> metric.update(torch.tensor([0, 1, 4]), torch.tensor([4, 4, 4]))
        >>> {k: round(value.item(), 4) for k, value in metric.compute().items()}
        {1: 0.4167, 2: 0.5}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    totals: Tensor
    num_problems: Tensor

    def __init__(self, k: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k or min(self.k) < 1:
            raise ValueError(f"Expected `k` to be one or several numbers >= 1, got {k}.")
        self.add_state("totals", torch.zeros(len(self.k)), dist_reduce_fx="sum")
        self.add_state("num_problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, num_correct: Tensor, num_samples: Tensor) -> None:
        """Add P problems."""
        self.totals += torch.stack([pass_at_k(num_correct, num_samples, k).sum() for k in self.k])
        self.num_problems += len(num_correct)

    def compute(self) -> dict[int, Tensor]:
        """Each k and its scalar; NaN before the first problem."""
        return dict(zip(self.k, self.totals / self.num_problems, strict=True))
