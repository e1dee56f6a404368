"""The keys and values that a generation has computed, with room to write on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """As its base, but a token costs what it writes, not a copy of all before it; nor do rows that leave cost others.

    ``keys`` and ``values``, ``[R, heads, length, D]``, are views of tensors that have room for more tokens.

    Args:
        most: tokens that a row will ever have.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        for name, new in (("keys", key_states), ("values", value_states)):
            rows, length = len(new), before + new.shape[-2]
            if before == 0:  # prompts, which are about to become more rows
                setattr(self, name, new)
                continue
            if name not in self.rooms or self.rooms[name].shape[-2] < length:
                self.rooms[name] = self.room_with(getattr(self, name), length)
            self.rooms[name][:rows, :, before:length] = new
            setattr(self, name, self.rooms[name][:rows, :, :length])
        return self.keys, self.values

    def room_for(self, rows: int, length: int, like: Tensor) -> Tensor:
        """A tensor for half as many tokens again, or all that will come."""
        size = max(length, min(length + length // 2 + 16, self.most))
        return like.new_empty(rows, like.shape[1], size, like.shape[-1])

    def room_with(self, held: Tensor, length: int) -> Tensor:
        """Such a tensor, in which those held stand first."""
        room = self.room_for(len(held), length, held)
        room[:, :, : held.shape[-2]] = held
        return room

    def take(self, parts: Sequence[RoomyLayer], rows: Sequence[Tensor]) -> None:
        """Hold the named rows of each part, moved to the right; no part is longer than this one, the last of them."""
        length = self.get_seq_length()
        for name in ("keys", "values"):
            room = self.room_for(sum(map(len, rows)), length, getattr(self, name))
            for part, chosen, place in zip(parts, rows, room[:, :, :length].split([*map(len, rows)]), strict=True):
                held: Tensor = getattr(part, name)
                padding = length - held.shape[-2]
                place[:, :, :padding] = 0
                torch.index_select(held, 0, chosen, out=place[:, :, padding:])
            self.rooms[name] = room
            setattr(self, name, room[:, :, :length])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was. Of fewer rows, those that stay where they are are not touched."""
        rows = len(beam_idx)
        if rows > len(self.keys):
            self.take([self], [beam_idx])
            return
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero().flatten()
        for name in ("keys", "values"):
            held: Tensor = getattr(self, name)
            held[moved] = held[beam_idx[moved]]
            setattr(self, name, held[:rows])


def roomy_cache(config: Any, most: int) -> DynamicCache:
    """A cache for a model and ``most`` tokens; layers of plain attention have room, others are the model's own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether ``joined`` takes several like this one: a layer that is the model's own may hold more than rows."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def joined(parts: Sequence[DynamicCache], rows: Tensor) -> DynamicCache:
    """The rows ``[R]`` of all parts, counted through, in one cache; narrower parts are moved to the right.

    Args:
        parts: several only where they can be joined. Not to be used again.
        rows: of the parts, ascending.
    """
    if len(parts) == 1:
        parts[0].reorder_cache(rows)
        return parts[0]
    sizes = [len(part.layers[0].keys) for part in parts]
    firsts = accumulate(sizes, initial=0)
    of_part = [rows[(first <= rows) & (rows < first + n)] - first for first, n in zip(firsts, sizes, strict=False)]
    for i, layer in enumerate(parts[-1].layers):  # the last is the widest
        layer.take([part.layers[i] for part in parts], of_part)
    return parts[-1]
