"""Metrics of a phase, added up over its micro-batches, and over processes in one go when it ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_grpo.losses.base import Metrics


class Tally:
    """Adds up a loss's metrics, each in the way that ``LossOutput.metrics`` states. Nothing waits for the device.

    >>> tally = Tally()
    >>> for total, count in ((3.0, 2), (5.0, 2)):
    ...     tally.add({"kl": (torch.tensor(total), torch.tensor(count)), "loss": torch.tensor(total)})
    >>> {name: value.item() for name, value in tally.summed_up(lambda values, how: values, accumulated=1).items()}
    {'loss': 4.0, 'kl': 2.0}
    """

    def __init__(self) -> None:
        self.micro_batches = 0
        self.sums: dict[str, Tensor] = {}
        """[2] sum and count."""
        self.shares: dict[str, Tensor] = {}
        """Of the loss."""
        self.extremes: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add those of a micro-batch."""
        self.micro_batches += 1
        for name, value in metrics.items():
            if not isinstance(value, tuple) and name.startswith("loss"):
                self.shares[name] = self.shares.get(name, 0) + value.detach()
            elif not isinstance(value, tuple) and name.endswith(("_min", "_max")):
                furthest = torch.minimum if name.endswith("_min") else torch.maximum
                self.extremes[name] = furthest(value.detach(), self.extremes.get(name, value.detach()))
            else:
                total, count = value if isinstance(value, tuple) else (value, torch.ones_like(value))
                kind = torch.promote_types(total.dtype, torch.float32)
                self.sums[name] = self.sums.get(name, 0) + torch.stack([total.detach().to(kind), count.to(kind)])

    def summed_up(self, reduce: Callable[[Tensor, str], Tensor], accumulated: float) -> dict[str, Tensor]:
        """The phase's metrics, over all processes; the next phase begins with none.

        Args:
            reduce: of tensors of all processes makes their ``sum``, ``min`` or ``max``; all must take part.
            accumulated: micro-batches of an update, whose shares of the loss add up.
        """
        found: dict[str, Tensor] = {}
        if self.shares:
            of_update = reduce(torch.stack(list(self.shares.values())), "sum") * accumulated / self.micro_batches
            found |= zip(self.shares, of_update, strict=True)
        if self.sums:
            pairs = reduce(torch.stack(list(self.sums.values())), "sum")
            found |= {name: total / count.clamp(min=1) for name, (total, count) in zip(self.sums, pairs, strict=True)}
        for how in ("min", "max"):
            names = [name for name in self.extremes if name.endswith(how)]
            if names:
                found |= zip(names, reduce(torch.stack([self.extremes[name] for name in names]), how), strict=True)
        self.micro_batches, self.sums, self.shares, self.extremes = 0, {}, {}, {}
        return found
