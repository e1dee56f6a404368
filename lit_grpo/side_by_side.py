"""Rows of one prompt laid side by side, so that the prompt is read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_grpo.data.types import SIDE_BY_SIDE


@dataclass
class Layout:
    """R rows of W tokens, each of them a prompt and up to ``SIDE_BY_SIDE`` completions of it."""

    tokens: Tensor
    """[R, W]."""

    positions: Tensor
    """[R, W] of each token, as if its completion followed its prompt at once."""

    attends: Tensor
    """[R, 1, W, W] bool, whether a token (third dimension) sees another (fourth): in its own completion or its prompt,
    and not after it."""

    places: Tensor
    """[N, T] of each token of the rows as they were, in ``tokens`` flattened; 0 for padding."""


def side_by_side(tokens: Tensor, mask: Tensor) -> Layout:
    """Lay out rows that follow each other and have one prompt.

    Args:
        tokens: ``[N, T]``, padded at the right.
        mask: ``[N, T]`` bool, True where the *next* token belongs to the completion.

    >>> layout = side_by_side(torch.tensor([[7, 8, 1], [7, 8, 2]]), torch.tensor([[False, True, True]] * 2))
    >>> layout.tokens.tolist(), layout.positions.tolist(), layout.places.tolist()
    ([[7, 8, 1, 2]], [[0, 1, 2, 2]], [[0, 1, 2], [0, 1, 3]])
    >>> layout.attends.int().tolist()
    [[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]]
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    prompts = mask.int().argmax(-1, keepdim=True) + 1  # their lengths
    in_prompt = columns < prompts
    lengths = torch.maximum(prompts, torch.where(mask, columns, -1).amax(-1, keepdim=True) + 1)
    real = columns < lengths

    alike = (prompts[1:] == prompts[:-1]).squeeze(-1) & ((tokens[1:] == tokens[:-1]) | ~in_prompt[1:]).all(-1)
    new = torch.cat([alike.new_ones(1), ~alike])
    rank = (rows - torch.where(new, rows, 0).cummax(0).values) % SIDE_BY_SIDE  # among those that share a prompt
    own = (lengths - prompts).squeeze(-1)
    before = own.cumsum(0) - own
    before = (before - before[rows - rank])[:, None]  # tokens of the completions to the left
    row = ((rank == 0).cumsum(0) - 1)[:, None]
    width = int((lengths.squeeze(-1) + before.squeeze(-1)).max())
    places = row * width + columns + torch.where(in_prompt, 0, before)

    def laid_out(values: Tensor, padding: int) -> Tensor:
        empty = values.new_full((int(row[-1] + 1) * width,), padding)
        return empty.index_put((places[real],), values[real]).view(-1, width)

    part = laid_out(torch.where(in_prompt, 0, 1 + rank[:, None]), -1)  # 0 is the prompt
    keys, queries = part[:, None, None, :], part[:, None, :, None]
    seen = columns.new_ones(width, width).tril().bool()
    attends = ((keys == 0) | (keys == queries)) & seen
    return Layout(laid_out(tokens, 0), laid_out(columns, 0), attends, torch.where(real, places, 0))
