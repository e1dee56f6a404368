"""The loss interface: two pure halves, no Lightning.

``select`` turns the rewards of whole groups into the rows that train and their advantages; ``forward`` turns rows into
a scalar. Nothing else in the project knows which algorithm runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_grpo.errors import UserError
from lit_grpo.losses.schedules import Schedule

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant"]

Metrics = dict[str, Tensor | tuple[Tensor, Tensor]]
"""Name to value, or to (sum, count); see ``LossOutput.metrics``."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated, so that no token makes an infinite loss."""


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

    sampler_logps: Tensor | None = None
    """[N, T] log-probs as the engine computed them; None for data that nobody sampled."""

    entropy: Tensor | None = None
    """[N, T] entropy of the policy's distribution of each token, in nats, with gradient; present if
    ``Loss.needs_entropy``."""

    kl_baseline: Tensor | None = None
    """Scalar: mean log-ratio to the reference of prompts with completions of *other* prompts, over the whole step;
    present if ``Loss.needs_kl_baseline``."""

    step: int = 0
    """Optimizer steps made so far: what schedules read."""

    total_rows: int = 0
    """Rows of the whole optimizer step: all micro-batches, all ranks, dropped rows included. 0: just the rows here."""

    total_tokens: int = 0
    """Completion tokens of the same rows. 0: just the tokens here."""

    def __post_init__(self) -> None:
        self.total_rows = self.total_rows or len(self.mask)
        self.total_tokens = self.total_tokens or int(self.mask.sum())


@dataclass
class LossOutput:
    """What ``Loss.forward`` returns."""

    loss: Tensor
    """Scalar, this micro-batch's *share* of the optimizer step: summed over the step's micro-batches and ranks it is
    the loss of the step."""

    metrics: Metrics = field(default_factory=dict)
    """Detached, logged as ``train/NAME`` per phase. A pair (sum, count), as :func:`mean_over` makes it, is a mean over
    whatever was counted; a scalar is a mean over micro-batches, or the smallest or largest if its name ends with
    ``_min`` or ``_max``, or a share that is summed like ``loss`` if its name begins with ``loss``."""


class Loss(nn.Module, ABC):
    """Base class of every objective. A new one subclasses this in any file and is named in YAML by its import path."""

    unit: int = 1
    """Consecutive rows which must share a micro-batch: 1 for pointwise losses, 2 for pairwise ones."""

    needs_reference: bool = False
    """Whether ``forward`` reads ``ref_logps``; if not, the reference model is never loaded."""

    needs_entropy: bool = False
    """Whether ``forward`` reads ``entropy``."""

    needs_kl_baseline: bool = False
    """Whether ``forward`` reads ``kl_baseline``, which costs one more forward pass of policy and reference."""

    drops_zero_advantages: bool = False
    """Whether a row with advantage 0 has no gradient whatever its log-probs; such rows are not forwarded at all."""

    masks_truncated: bool = False
    """Whether completions cut off at ``max_tokens`` get advantage 0."""

    draws_first: int | None = None
    """Completions of each prompt that are drawn first. ``select`` is given these alone, and where all get advantage 0
    the rest of the group is drawn; it is then given groups of one size, with NaN for rewards of what was not drawn,
    which get advantage 0. None: all are drawn at once."""

    @abstractmethod
    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the rows that train and their signed weight.

        Args:
            rewards: ``[P, G]`` rewards of P whole groups: all that were sampled in a phase, or read for a step, by all
                processes together.

        Returns:
            ``index [P, K]`` int64, which completions of each group train, and ``advantages [P, K]``. K depends on G
            only, never on the rewards, so that every rank runs the same number of backward passes.

        Raises:
            UserError: if groups of G completions make no sense for this loss.
        """

    @abstractmethod
    def forward(self, inputs: LossInputs) -> LossOutput:
        """The micro-batch's share of the step's loss, divided by ``inputs.total_rows`` or ``inputs.total_tokens``."""

    def extra_repr(self) -> str:
        """Settings, as a run prints them when it starts."""
        settings = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str | Schedule)}
        return ", ".join(f"{k}={v}" for k, v in settings.items() if k[0] != "_" and k not in HIDDEN)


HIDDEN = {"training", "needs_reference", "needs_entropy", "drops_zero_advantages"}


def all_rows(rewards: Tensor) -> Tensor:
    """The index ``[P, G]`` that selects every completion of groups ``[P, G]``."""
    return torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards)


def aggregate(values: Tensor, inputs: LossInputs, how: Aggregation, length: int | None = None) -> Tensor:
    """Reduce per-token values ``[N, T]`` to this micro-batch's share of the step's mean.

    - ``sequence_mean``: mean over each completion's tokens, then over completions (the GRPO paper, arXiv 2402.03300).
    - ``token_mean``: mean over all completion tokens of the step (DAPO, arXiv 2503.14476).
    - ``sequence_sum``: sum over each completion's tokens, then mean over completions.
    - ``constant``: the sum divided by completions times ``length``, the same for all (Dr. GRPO, arXiv 2503.20783).

    >>> inputs = LossInputs(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.ones(2))
    >>> values = torch.tensor([[1.0, 3.0, 9.0], [2.0, 2.0, 5.0]])
    >>> [round(aggregate(values, inputs, how).item(), 3) for how in ("sequence_mean", "token_mean", "sequence_sum")]
    [2.5, 2.6, 6.5]
    >>> aggregate(values, inputs, "constant", length=5)
    tensor(1.3000)
    """
    values = torch.where(inputs.mask, values, 0)
    if how == "token_mean":
        return values.sum() / max(inputs.total_tokens, 1)
    sequences = values.sum(-1)
    if how == "sequence_mean":
        sequences = sequences / inputs.mask.sum(-1).clamp(min=1)
    if how == "constant":
        assert length is not None
        sequences = sequences / length
    return sequences.sum() / inputs.total_rows


def mean_over(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: (sum, count) of the values where a boolean mask of the same shape holds, detached.

    >>> mean_over(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    (tensor(5.), tensor(2))
    """
    return torch.where(where, values.detach(), 0).sum(), where.sum()


def share_of(holds: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the share of the places in one boolean mask at which another holds, as :func:`mean_over`."""
    return mean_over(holds.float(), where)


def at_least(minimum: float, **settings: float | Schedule | None) -> None:
    """Refuse settings of a loss which are, or become, less than ``minimum``.

    Raises:
        UserError: naming the key and the value.
    """
    for key, value in settings.items():
        for number in values_of(value):
            if not number >= minimum:
                raise UserError(f"model.loss.init_args.{key}: expected a number >= {minimum:g}, got {value}.")


def above(minimum: float, **settings: float | Schedule | None) -> None:
    """Refuse settings of a loss which are not, or do not stay, above ``minimum``, as :func:`at_least`."""
    for key, value in settings.items():
        for number in values_of(value):
            if not number > minimum:
                raise UserError(f"model.loss.init_args.{key}: expected a number > {minimum:g}, got {value}.")


def values_of(setting: float | Schedule | None) -> list[float]:
    """A number, or what a schedule begins and ends with."""
    if isinstance(setting, Schedule):
        return [setting(0), setting(2**62)]
    return [] if setting is None else [setting]


def one_of(kind: Any, **settings: str) -> None:
    """Refuse settings of a loss that are none of a ``Literal``'s: without a parser, nobody else looks.

    Raises:
        UserError: naming the key, the value and what may stand there.
    """
    for key, value in settings.items():
        if value not in get_args(kind):
            raise UserError(f"model.loss.init_args.{key}: expected one of {', '.join(get_args(kind))}, got {value!r}.")


def check_length(aggregation: Aggregation, length: int | None) -> None:
    """``constant`` needs a length, and nothing else takes one."""
    one_of(Aggregation, aggregation=aggregation)
    if (aggregation == "constant") != (length is not None):
        raise UserError(
            f"model.loss.init_args.length: got {length} with aggregation {aggregation!r}. Give the longest completion"
            " in tokens (rollout.init_args.max_tokens) with aggregation: constant, and leave it out otherwise."
        )
    at_least(1, length=length)
