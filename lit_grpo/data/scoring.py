"""From completions to scored samples, while the engine still writes others where the reward allows it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from lit_grpo.data.prompts import Prompt
from lit_grpo.data.types import Completion, Sample

SCORED_AT_ONCE = 128
"""Completions that a reward gets while others are being written."""


class Scoring:
    """Collects completions as they are finished and has them scored.

    Args:
        prompts: that are answered.
        n: completions of each.
        decode: token ids of completions to their texts.
        score: fills in rewards; None where none are wanted.
        beside: whether to score while others are being written. Which samples are scored together depends on the order
            in which they are finished, never on the time that something takes.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        n: int,
        decode: Callable[[list[list[int]]], list[str]],
        score: Callable[[list[Sample]], None] | None,
        beside: bool,
    ) -> None:
        self.prompts, self.n, self.decode, self.score = prompts, n, decode, score
        self.waiting: dict[int, list[Completion]] = {}
        self.done: dict[int, list[Sample]] = {}
        self.error: BaseException | None = None
        self.parts: queue.SimpleQueue[dict[int, list[Completion]] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.beside = beside and score is not None

    def finished(self, prompt: int, completions: list[Completion]) -> None:
        """Take all completions of a prompt, given by its number."""
        self.waiting[prompt] = completions
        if self.beside and len(self.waiting) * self.n >= SCORED_AT_ONCE:
            self.parts.put(self.waiting)
            self.waiting = {}
            if self.thread is None:  # a daemon, so that a reward that hangs keeps no program alive
                self.thread = threading.Thread(target=self.work, daemon=True)
                self.thread.start()

    def work(self) -> None:
        """Score parts as they come; what goes wrong is raised where somebody waits for the samples."""
        while (part := self.parts.get()) is not None:
            try:
                self.add(part)
            except BaseException as error:
                self.error = error
                return

    def add(self, part: dict[int, list[Completion]]) -> None:
        """Make samples of the completions of some prompts, and score them."""
        completions = [(i, one) for i, group in part.items() for one in group]
        texts = self.decode([one.token_ids for _, one in completions])
        samples = [
            Sample(p.text, text, p.answer, len(one.token_ids), one.truncated, p.tolerance, p.messages)
            for (i, one), text in zip(completions, texts, strict=True)
            for p in (self.prompts[i],)
        ]
        if self.score is not None:
            self.score(samples)
        self.done |= {i: samples[k * self.n : (k + 1) * self.n] for k, i in enumerate(part)}

    def samples(self) -> list[Sample]:
        """All samples in the order of the prompts, once they are scored.

        Raises:
            UserError: what the reward's mistakes lead to.
        """
        if self.thread is not None:
            if self.waiting:
                self.parts.put(self.waiting)
            self.parts.put(None)
            self.thread.join()
            if self.error is not None:
                raise self.error
        elif self.waiting:
            self.add(dict(sorted(self.waiting.items())))
        return [sample for i in range(len(self.prompts)) for sample in self.done[i]]
