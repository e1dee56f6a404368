"""The loss interface: two pure halves, no Lightning.

``select`` turns the rewards of whole groups into the rows that train and their advantages; ``forward`` turns rows into
a scalar. Nothing else in the project knows which algorithm runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum"]


@dataclass
class LossInputs:
    """N completions of a micro-batch; T is the width of the padded log-prob tensors."""

    logps: Tensor
    """[N, T] log-probs of the policy, with gradient; 0 outside the mask."""

    mask: Tensor
    """[N, T] bool, True on completion tokens."""

    advantages: Tensor
    """[N] as written by ``Loss.select``."""

    old_logps: Tensor | None = None
    """[N, T] log-probs of the policy that sampled. None: it is the policy itself, and the ratio is exactly 1."""

    ref_logps: Tensor | None = None
    """[N, T] log-probs of the frozen reference; present if ``Loss.needs_reference``."""

    total_rows: int = 0
    """Rows of the whole optimizer step: all micro-batches, all ranks, dropped rows included. 0: just the rows here."""

    total_tokens: int = 0
    """Completion tokens of the same rows. 0: just the tokens here."""

    def __post_init__(self) -> None:
        self.total_rows = self.total_rows or len(self.mask)
        self.total_tokens = self.total_tokens or int(self.mask.sum())


@dataclass
class LossOutput:
    """What ``Loss.forward`` returns. Both parts are this micro-batch's *share* of the optimizer step."""

    loss: Tensor
    """Scalar. Summed over the step's micro-batches and ranks it is the loss of the step."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars that add up over the step in the same way."""


class Loss(nn.Module, ABC):
    """Base class of every objective. A new one subclasses this in any file and is named in YAML by its import path."""

    unit: int = 1
    """Consecutive rows which must share a micro-batch: 1 for pointwise losses, 2 for pairwise ones."""

    needs_reference: bool = False
    """Whether ``forward`` reads ``ref_logps``; if not, the reference model is never loaded."""

    drops_zero_advantages: bool = False
    """Whether a row with advantage 0 has no gradient whatever its log-probs; such rows are not forwarded at all."""

    @abstractmethod
    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the rows that train and their signed weight.

        Args:
            rewards: ``[P, G]`` rewards of P whole groups.

        Returns:
            ``index [P, K]`` int64, which completions of each group train, and ``advantages [P, K]``. K depends on G
            only, never on the rewards, so that every rank runs the same number of backward passes.

        Raises:
            UserError: if groups of G completions make no sense for this loss.
        """

    @abstractmethod
    def forward(self, inputs: LossInputs) -> LossOutput:
        """The micro-batch's share of the step's loss, divided by ``inputs.total_rows`` or ``inputs.total_tokens``."""


def rounding(rewards: Tensor) -> Tensor:
    """Difference of rewards ``[P, 1]`` that float32 alone may cause in groups ``[P, G]``: 1e-6 of the largest.

    0.1 + 0.2 and 0.3 are the same reward.
    """
    return 1e-6 * rewards.abs().amax(-1, keepdim=True)


def aggregate(values: Tensor, inputs: LossInputs, how: Aggregation) -> Tensor:
    """Reduce per-token values ``[N, T]`` to this micro-batch's share of the step's mean.

    - ``sequence_mean``: mean over each completion's tokens, then over completions (the GRPO paper, arXiv 2402.03300).
    - ``token_mean``: mean over all completion tokens of the step (DAPO, arXiv 2503.14476).
    - ``sequence_sum``: sum over each completion's tokens, then mean over completions.

    >>> inputs = LossInputs(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.ones(2))
    >>> values = torch.tensor([[1.0, 3.0, 9.0], [2.0, 2.0, 5.0]])
    >>> [round(aggregate(values, inputs, how).item(), 3) for how in ("sequence_mean", "token_mean", "sequence_sum")]
    [2.5, 2.6, 6.5]
    """
    values = torch.where(inputs.mask, values, 0)
    if how == "token_mean":
        return values.sum() / inputs.total_tokens
    sequences = values.sum(-1)
    if how == "sequence_mean":
        sequences = sequences / inputs.mask.sum(-1).clamp(min=1)
    return sequences.sum() / inputs.total_rows
