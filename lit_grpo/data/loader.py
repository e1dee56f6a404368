"""The loaders: sized plain iterables. Lightning neither prefetches from them nor splits them between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lit_grpo.errors import UserError

T = TypeVar("T")
U = TypeVar("U")


class FilledLoader(Generic[T]):
    """Yields what was put in since the last pass, once.

    A ``DataLoader`` would not do: Lightning hands one that has no length its batches a step too early, and gives each
    rank only a part of its own rollouts where it has one.

    Args:
        length: items of every pass.
        hint: what to do when a pass starts and nothing was put in.
    """

    def __init__(self, length: int, hint: str) -> None:
        self.length, self.hint = length, hint
        self.items: list[T] | None = None

    def fill(self, items: list[T]) -> None:
        """Put in the items of the next pass."""
        if len(items) != self.length:
            raise ValueError(f"Expected {self.length} items, got {len(items)}.")
        self.items = items

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[T]:
        # A generator: its body starts at the first batch, after the hooks that fill it.
        if self.items is None:
            raise UserError(self.hint)
        items, self.items = self.items, None
        yield from items


class LazyLoader(Generic[T, U]):
    """Yields what a function makes of each part, when it is asked for.

    Args:
        parts: equally many on every rank.
        make: is called once for each part of a pass.
    """

    def __init__(self, parts: list[T], make: Callable[[T], U]) -> None:
        self.parts, self.make = parts, make

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[U]:
        return map(self.make, self.parts)
