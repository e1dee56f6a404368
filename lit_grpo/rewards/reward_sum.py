"""Several rewards as one, and rewards that are coroutines."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample


class RewardSum:
    """The weighted sum of rewards. Each one by itself is kept in the samples' ``parts`` and logged under its name.

    Those that are coroutines wait together.

    >>> from lit_grpo.data import Sample
    >>> from lit_grpo.rewards import LengthPenalty, exact_match
    >>> reward = RewardSum({"right": exact_match, "length": LengthPenalty(10, 4)}, weights={"length": 0.5})
    >>> sample = Sample("1+1=", "2", "2", num_tokens=8, truncated=False)
    >>> reward([sample]), sample.parts
    ([0.75], {'right': 1.0, 'length': -0.5})

    Args:
        rewards: by name; functions, or objects with ``__call__``.
        weights: of those that do not weigh 1.

    Raises:
        UserError: if there is no reward, or a weight has the name of none.
    """

    def __init__(
        self, rewards: dict[str, Callable[[list[Sample]], Any]], weights: dict[str, float] | None = None
    ) -> None:
        self.rewards, self.weights = rewards, weights or {}
        if not rewards or (unknown := sorted(self.weights.keys() - rewards.keys())):
            what = f"a weight for {unknown[0]!r}, which is none of them" if rewards else "none"
            raise UserError(f"data.init_args.reward.init_args: expected rewards by name, got {what}.")

    @property
    def overlaps(self) -> bool:
        """Whether all of them say that they may be called while other completions are being written."""
        return all(getattr(reward, "overlaps", False) for reward in self.rewards.values())

    def __call__(self, samples: list[Sample]) -> list[float]:
        totals = [0.0] * len(samples)
        parts = resolved([reward(samples) for reward in self.rewards.values()])
        for name, scores in zip(self.rewards, parts, strict=True):
            for i, (sample, score) in enumerate(zip(samples, scores, strict=True)):
                sample.parts[name] = float(score)
                totals[i] += self.weights.get(name, 1.0) * float(score)
        return totals

    def unreadable(self, golds: list[str]) -> list[int]:
        """Which gold answers one of the rewards cannot read."""
        readers = [reward.unreadable for reward in self.rewards.values() if hasattr(reward, "unreadable")]
        return sorted({i for reader in readers for i in reader(golds)})


def overlaps(reward: Callable[..., Any]) -> bool:
    """Whether a reward may be called in another thread, with parts of a phase, while the engine writes the rest.

    Coroutines may, and what says so by a true attribute ``overlaps``. Others may need the main thread, as everything
    with a deadline by ``signal.alarm`` does.
    """
    return getattr(reward, "overlaps", False) or any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))


def resolved(results: Sequence[Any]) -> list[Any]:
    """The results, those that are awaitable awaited together. A loop of its own runs them, also inside of another."""
    waiting = [result for result in results if inspect.isawaitable(result)]
    if not waiting:
        return list(results)

    async def together(awaitables: list[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*awaitables)

    with ThreadPoolExecutor(1) as thread:
        done = iter(thread.submit(asyncio.run, together(waiting)).result())
    return [next(done) if inspect.isawaitable(result) else result for result in results]
