"""From completions to scored samples, while the engine still writes others where the reward allows it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from lit_grpo.data.prompts import Prompt
from lit_grpo.data.types import Completion, Sample
from lit_grpo.errors import UserError
from lit_grpo.rewards import overlaps, resolved

RewardFn = Callable[[list[Sample]], Any]
"""Scores samples: a list of one float each, or a coroutine that returns it. Any importable function, or object with
``__call__``, may stand in YAML."""

SCORED_AT_ONCE = 128
"""Completions that a reward gets while others are being written."""


def score(reward: RewardFn, samples: list[Sample]) -> None:
    """Fill in the samples' rewards.

    Raises:
        UserError: if the reward raises, or returns anything but one finite number per sample.
    """
    if samples:
        with mistakes_named(reward, samples):
            (scores,) = resolved([reward(samples)])
            scores = list(scores)
        fill_in(reward, samples, scores)


async def score_beside(reward: RewardFn, samples: list[Sample]) -> None:
    """As ``score``, in a loop in which others wait too."""
    with mistakes_named(reward, samples):
        scores = reward(samples)
        scores = list(await scores if inspect.isawaitable(scores) else scores)
    fill_in(reward, samples, scores)


def name_of(reward: RewardFn) -> str:
    """Of the function or the class."""
    return str(getattr(reward, "__qualname__", type(reward).__qualname__))


@contextmanager
def mistakes_named(reward: RewardFn, samples: list[Sample]) -> Iterator[None]:
    """Say what a reward raised, where, and on what."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        raise UserError(
            f"data.init_args.reward: {name_of(reward)} raised {type(error).__name__}: {error} (at {where}) on"
            f" {len(samples)} samples; the first is {samples[0]}."
        ) from error


def fill_in(reward: RewardFn, samples: list[Sample], rewards: list[Any]) -> None:
    """Give samples their rewards, once they are seen to be numbers."""
    name = name_of(reward)
    if len(rewards) != len(samples):
        raise UserError(
            f"data.init_args.reward: {name} returned {len(rewards)} values for {len(samples)} samples; expected one"
            " each."
        )
    for sample, value in zip(samples, rewards, strict=True):
        number = value.item() if isinstance(value, Tensor | np.generic) and value.ndim == 0 else value
        if not isinstance(number, int | float) or not abs(number) < 1e30:
            raise UserError(
                f"data.init_args.reward: {name} returned {number!r}; expected a finite number. The sample: {sample}."
            )
        sample.reward = float(number)
        if not isinstance(sample.parsed, str | None) or not all(
            isinstance(part, int | float) for part in sample.parts.values()
        ):
            raise UserError(
                f"data.init_args.reward: {name} left {sample}; expected text or None in `parsed`, and numbers in"
                " `parts`."
            )


@functools.cache
def loop_beside() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, a daemon, so that a reward that hangs keeps no program alive."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


class Scoring:
    """Collects completions as they are finished and has them scored.

    A reward that overlaps gets parts of the samples in a thread, which all such calls of a process share: coroutines
    wait together there, others come one after the other. Which samples make a part depends on the order in which they
    are finished, never on the time that something takes.

    Args:
        prompts: that are answered.
        n: completions of each.
        decode: token ids of completions to their texts.
        reward: None where none is wanted.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        n: int,
        decode: Callable[[list[list[int]]], list[str]],
        reward: RewardFn | None,
    ) -> None:
        self.prompts, self.n, self.decode, self.reward = prompts, n, decode, reward
        self.beside = reward is not None and overlaps(reward)
        self.waiting: dict[int, list[Completion]] = {}
        self.done: dict[int, list[Sample]] = {}
        self.parts: list[concurrent.futures.Future[None]] = []

    def finished(self, prompt: int, completions: list[Completion]) -> None:
        """Take all completions of a prompt, given by its number."""
        self.waiting[prompt] = completions
        if len(self.waiting) * self.n >= SCORED_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Have what waits scored, if it need not wait for the engine."""
        if self.beside and self.waiting:
            samples = self.made()
            assert self.reward is not None
            self.parts.append(asyncio.run_coroutine_threadsafe(score_beside(self.reward, samples), loop_beside()))

    def made(self) -> list[Sample]:
        """Samples of the completions that wait."""
        part, self.waiting = self.waiting, {}
        completions = [(self.prompts[i], one) for i, group in part.items() for one in group]
        texts = self.decode([one.token_ids for _, one in completions]) if completions else []
        samples = [
            Sample(p.text, text, p.answer, len(one.token_ids), one.truncated, p.tolerance, p.messages)
            for (p, one), text in zip(completions, texts, strict=True)
        ]
        self.done |= {i: samples[k * self.n : (k + 1) * self.n] for k, i in enumerate(part)}
        return samples

    def wait(self) -> None:
        """Return when all parts are scored, or one of them could not be."""
        concurrent.futures.wait(self.parts, return_when=concurrent.futures.FIRST_EXCEPTION)

    def give_up(self) -> None:
        """Call the reward no more."""
        for part in self.parts:
            part.cancel()

    def samples(self) -> list[Sample]:
        """All samples in the order of the prompts, once they are scored.

        Raises:
            UserError: what the reward's mistakes lead to.
        """
        self.flush()
        self.waiting = dict(sorted(self.waiting.items()))
        rest = self.made()
        if self.reward is not None:
            score(self.reward, rest)
        try:
            for part in self.parts:
                part.result()
        finally:
            self.give_up()
        return [sample for i in range(len(self.prompts)) for sample in self.done[i]]
