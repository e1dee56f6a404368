"""Groups to rows to micro-batches: the same two functions online and offline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_grpo.data.types import SIDE_BY_SIDE, Batch, Completion, Group
from lit_grpo.errors import UserError
from lit_grpo.losses.base import Loss


@dataclass
class Row:
    """One completion that trains, with its prompt and its advantage."""

    prompt_ids: list[int]
    completion: Completion
    advantage: float | list[float]
    """A list for a sum of losses, each of which has its own."""

    @property
    def silent(self) -> bool:
        """Whether it has no advantage."""
        return not any(self.advantage) if isinstance(self.advantage, list) else not self.advantage

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


def checked_select(loss: Loss, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``loss.select`` returns for rewards ``[P, G]``.

    Raises:
        UserError: if that is no selection of rows with finite advantages.
    """
    selected, name, groups = loss.select(rewards), type(loss).__name__, len(rewards)
    if not (isinstance(selected, tuple) and len(selected) == 2 and all(isinstance(x, torch.Tensor) for x in selected)):
        raise UserError(f"model.loss: {name}.select returned {type(selected).__name__}, expected (index, advantages).")
    index, advantages = selected
    if index.shape != advantages.shape[:2] or index.ndim != 2 or len(index) != groups or index.shape[1] == 0:
        raise UserError(
            f"model.loss: {name}.select returned an index of shape {list(index.shape)} and advantages of shape"
            f" {list(advantages.shape)} for {groups} groups; expected [{groups}, K] both, K at least 1."
        )
    if index.dtype != torch.int64 or index.min() < 0 or index.max() >= rewards.shape[1] or index.shape[1] % loss.unit:
        raise UserError(
            f"model.loss: {name}.select must choose whole units of {loss.unit} completions, by int64 numbers from 0 to"
            f" {rewards.shape[1] - 1}; got {index[0].tolist()} ({index.dtype}) for the first group."
        )
    if not advantages.float().isfinite().all():
        worst = rewards[(~advantages.float().isfinite()).flatten(1).any(-1)][0].tolist()
        raise UserError(f"model.loss: {name}.select made advantages that are not finite from the rewards {worst}.")
    return index, advantages


def make_rows(groups: Sequence[Group], index: torch.Tensor, advantages: torch.Tensor, loss: Loss) -> list[Row]:
    """Rows of all groups in order, K per group, from what ``loss.select`` returned for them."""
    rows = [
        Row(group.prompt_ids, group.completions[i], advantage)
        for group, indices, row_advantages in zip(groups, index.tolist(), advantages.tolist(), strict=True)
        for i, advantage in zip(indices, row_advantages, strict=True)
    ]
    if loss.masks_truncated:
        for row in rows:
            if row.completion.truncated:
                row.advantage = [0.0] * advantages.shape[2] if advantages.ndim == 3 else 0.0
    return rows


def selection_stats(rows: Sequence[Row], per_group: int) -> dict[str, float]:
    """Mean and standard deviation of the rows' advantages, and the share of groups in which any is not 0.

    Of a sum of losses, the advantages are those of its first.
    """
    first = [row.advantage[0] if isinstance(row.advantage, list) else row.advantage for row in rows]
    advantages = torch.tensor(first, dtype=torch.float64).view(-1, per_group)
    return {
        "advantage_mean": advantages.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "informative_share": (advantages != 0).any(-1).double().mean().item(),
    }


def mismatched_rows(rows: Sequence[Row], per_group: int) -> list[Row]:
    """Each row's prompt with a completion of the next group that has another prompt, going round at the end.

    The k-th row of a group gets the k-th completion of that group, so that every completion is used.

    Raises:
        UserError: if all rows have the same prompt.
    """
    if all(row.prompt_ids == rows[0].prompt_ids for row in rows):
        raise UserError(
            "model.loss: its KL baseline needs completions of other prompts, but one step has a single prompt on this"
            " process. Raise data.init_args.prompts_per_phase (or batch_size) until every process has two or more."
        )
    mismatched = []
    for i, row in enumerate(rows):
        j = (i + per_group) % len(rows)
        while rows[j].prompt_ids == row.prompt_ids:
            j = (j + per_group) % len(rows)
        mismatched.append(Row(row.prompt_ids, Completion(rows[j].completion.token_ids), 0.0))
    return mismatched


def rows_together(unit: int, sharing: int) -> int:
    """Consecutive rows that stay in one micro-batch: a loss's unit, or what of ``sharing`` rows shares a prompt.

    >>> rows_together(1, 16), rows_together(2, 2), rows_together(1, 5), rows_together(2, 0)
    (4, 2, 3, 2)
    """
    parts = max(1, math.ceil(sharing / SIDE_BY_SIDE))
    return max(1, math.ceil(sharing / (parts * unit))) * unit


def micro_batches(
    rows: Sequence[Row], count: int, unit: int = 1, drop_zeros: bool = False, sharing: int = 0
) -> list[list[Row]]:
    """Cut the rows of one optimizer step into exactly ``count`` micro-batches with about equal numbers of tokens.

    Rows are sorted by length, so that each micro-batch is padded little. With ``drop_zeros`` units of rows whose
    advantages are all 0 are left out; where fewer than ``count`` units remain, the shortest of them fill up, so that
    every rank runs the same number of passes.

    Args:
        rows: consecutive units belong together.
        count: micro-batches per optimizer step.
        unit: rows per unit, see ``Loss.unit``.
        drop_zeros: see ``Loss.drops_zero_advantages``.
        sharing: see :func:`rows_together`, whose sets then are what stays together.

    Raises:
        ValueError: if there are fewer units, or sets, than micro-batches.
    """
    size = rows_together(unit, sharing)
    prompt = sharing or size
    sets = [
        list(rows[i : min(i + size, start + prompt)])
        for start in range(0, len(rows), prompt)
        for i in range(start, start + prompt, size)
    ]
    if len(sets) < count:
        raise ValueError(f"{len(sets)} units of {size} rows cannot fill {count} micro-batches.")

    def length(rows: list[Row]) -> int:
        if sharing:
            return len(rows[0].prompt_ids) + sum(len(row.completion.token_ids) for row in rows)
        return max(len(row) for row in rows)

    def speaking(rows: list[Row]) -> list[Row]:
        units = (rows[i : i + unit] for i in range(0, len(rows), unit))
        return [row for u in units if not all(row.silent for row in u) for row in u]

    if drop_zeros:
        of_each = [speaking(rows) for rows in sets]
        kept = [rows for rows in of_each if rows]
        zeros = sorted((rows[:unit] for rows, speaks in zip(sets, of_each, strict=True) if not speaks), key=length)
        sets = kept + zeros[: max(0, count - len(kept))]
    sets.sort(key=length, reverse=True)
    tokens = torch.tensor([length(rows) for rows in sets]).cumsum(0)
    cuts = [0]
    for i in range(1, count):
        cut = int(torch.searchsorted(tokens, tokens[-1] * i / count, right=True))
        cuts.append(min(max(cut, cuts[-1] + 1), len(sets) - count + i))
    cuts.append(len(sets))
    return [[row for rows in sets[a:b] for row in rows] for a, b in itertools.pairwise(cuts)]


def collate(
    rows: Sequence[Row], total_rows: int, total_tokens: int, on_policy: bool = False, temperature: float = 1.0
) -> Batch:
    """Pad rows to their own longest and stack them; see :class:`~lit_grpo.data.types.Batch` for the layout."""
    begins = torch.tensor([[len(row.prompt_ids)] for row in rows])
    ends = torch.tensor([[len(row)] for row in rows])
    columns = torch.arange(int(ends.max()))
    flat = torch.tensor([token for row in rows for token in row.prompt_ids + row.completion.token_ids])
    tokens = torch.zeros(len(rows), len(columns), dtype=torch.int64).masked_scatter(columns < ends, flat)
    mask = (begins <= columns[1:]) & (columns[1:] < ends)

    def logps(values: list[list[float] | None]) -> torch.Tensor | None:
        if any(v is None for v in values):
            return None
        flat = torch.tensor([x for v in values if v is not None for x in v])
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    return Batch(
        tokens,
        mask,
        torch.tensor([row.advantage for row in rows]),
        logps([row.completion.logps for row in rows]),
        on_policy,
        temperature,
        total_rows,
        total_tokens,
        logps([row.completion.ref_logps for row in rows]),
    )


def step_batches(
    rows: Sequence[Row],
    count: int,
    loss: Loss,
    total_rows: int,
    total_tokens: int,
    mismatched: Sequence[Row] | None,
    on_policy: bool = False,
    temperature: float = 1.0,
    sharing: int = 0,
    first_half: int | None = None,
) -> list[Batch]:
    """The micro-batches of one optimizer step on this process.

    Args:
        rows: of this process.
        count: micro-batches.
        loss: which decides what stays together and what is left out.
        total_rows: of all processes.
        total_tokens: of all processes.
        mismatched: see :func:`mismatched_rows`; None where the loss does not need them.
        on_policy: see :class:`~lit_grpo.data.types.Batch`.
        temperature: the same.
        sharing: consecutive rows with the same prompt, where it is read once for several of them; else 0.
        first_half: this many of the rows make up the first half of the micro-batches, the others the second. If not
            given, any row may be in any micro-batch.
    """

    def collated(parts: list[list[Row]]) -> list[Batch]:
        return [collate(part, total_rows, total_tokens, on_policy, temperature) for part in parts]

    parts = [rows] if first_half is None else [rows[:first_half], rows[first_half:]]
    batches = [
        batch
        for part in parts
        for batch in collated(micro_batches(part, count // len(parts), loss.unit, loss.drops_zero_advantages, sharing))
    ]
    if mismatched is not None:
        batches[0].mismatched = collated(micro_batches(mismatched, count))
    return batches
