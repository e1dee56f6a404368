"""Groups to rows to micro-batches: the same two functions online and offline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_grpo.data.types import Batch, Completion, Group
from lit_grpo.errors import UserError
from lit_grpo.losses.base import Loss


@dataclass
class Row:
    """One completion that trains, with its prompt and its advantage."""

    prompt_ids: list[int]
    completion: Completion
    advantage: float

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
    if index.shape != advantages.shape or index.ndim != 2 or len(index) != groups or index.shape[1] == 0:
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
        worst = rewards[(~advantages.float().isfinite()).any(-1)][0].tolist()
        raise UserError(f"model.loss: {name}.select made advantages that are not finite from the rewards {worst}.")
    return index, advantages


def select_rows(groups: Sequence[Group], loss: Loss) -> list[Row]:
    """Rows of all groups in order, K per group, as ``loss.select`` chose them."""
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    index, advantages = checked_select(loss, rewards)
    return [
        Row(group.prompt_ids, group.completions[i], advantage)
        for group, indices, row_advantages in zip(groups, index.tolist(), advantages.tolist(), strict=True)
        for i, advantage in zip(indices, row_advantages, strict=True)
    ]


def micro_batches(rows: Sequence[Row], count: int, unit: int = 1, drop_zeros: bool = False) -> list[list[Row]]:
    """Cut the rows of one optimizer step into exactly ``count`` micro-batches with about equal numbers of tokens.

    Rows are sorted by length, so that each micro-batch is padded little. With ``drop_zeros`` units of rows whose
    advantages are all 0 are left out; where fewer than ``count`` units remain, the shortest of them fill up, so that
    every rank runs the same number of passes.

    Args:
        rows: consecutive units belong together.
        count: micro-batches per optimizer step.
        unit: rows per unit, see ``Loss.unit``.
        drop_zeros: see ``Loss.drops_zero_advantages``.

    Raises:
        ValueError: if there are fewer units than micro-batches.
    """
    units = [list(rows[i : i + unit]) for i in range(0, len(rows), unit)]
    if len(units) < count:
        raise ValueError(f"{len(units)} units of {unit} rows cannot fill {count} micro-batches.")

    def length(unit: list[Row]) -> int:
        return max(len(row) for row in unit)

    if drop_zeros:
        kept = [u for u in units if any(row.advantage != 0 for row in u)]
        zeros = sorted((u for u in units if all(row.advantage == 0 for row in u)), key=length)
        units = kept + zeros[: max(0, count - len(kept))]
    units.sort(key=length, reverse=True)
    tokens = torch.tensor([length(u) for u in units]).cumsum(0)
    cuts = [0]
    for i in range(1, count):
        cut = int(torch.searchsorted(tokens, tokens[-1] * i / count, right=True))
        cuts.append(min(max(cut, cuts[-1] + 1), len(units) - count + i))
    cuts.append(len(units))
    return [[row for u in units[a:b] for row in u] for a, b in itertools.pairwise(cuts)]


def collate(
    rows: Sequence[Row], total_rows: int, total_tokens: int, on_policy: bool = False, temperature: float = 1.0
) -> Batch:
    """Pad rows to their own longest and stack them; see :class:`~lit_grpo.data.types.Batch` for the layout."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    sampled = rows[0].completion.logps is not None
    sampler_logps = torch.zeros(len(rows), width - 1) if sampled else None
    for i, row in enumerate(rows):
        start = len(row.prompt_ids)
        tokens[i, : len(row)] = torch.tensor(row.prompt_ids + row.completion.token_ids)
        mask[i, start - 1 : len(row) - 1] = True
        if sampler_logps is not None:
            sampler_logps[i, start - 1 : len(row) - 1] = torch.tensor(row.completion.logps)
    advantages = torch.tensor([row.advantage for row in rows])
    return Batch(tokens, mask, advantages, sampler_logps, on_policy, temperature, total_rows, total_tokens)
