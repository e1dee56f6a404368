"""Completions of some prompts, drawn by the engine and scored: at once, or in a thread until somebody asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from lit_grpo.data.prompts import Prompt
from lit_grpo.data.scoring import Scoring
from lit_grpo.data.types import Group, Sample
from lit_grpo.engines.base import Engine, Sampling, never


class Drawing:
    """The share of one process in answering prompts.

    Args:
        engine: draws the completions.
        sampling: how to draw them.
        prompts: to be answered.
        seeds: one for each.
        scoring: takes the completions.
        stop: whether to give up, asked at every step of the engine.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        seeds: list[int],
        scoring: Scoring,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.engine, self.sampling, self.prompts, self.seeds = engine, sampling, prompts, seeds
        self.scoring, self.stop, self.given_up = scoring, stop, False
        self.seconds = 0.0
        """That somebody waited for the engine."""
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def begin(self, prepare: Callable[[], None]) -> None:
        """Draw in a thread of its own, which calls ``prepare`` first; rewards that overlap are scored there too."""

        def work() -> None:
            try:
                prepare()
                self.generate()
                self.scoring.flush()
            except BaseException as error:  # for the one who asks for the result
                self.error = error

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def generate(self) -> None:
        prompts = [prompt.token_ids for prompt in self.prompts]
        self.engine.stop = lambda: self.given_up or self.stop()
        try:
            self.answers = self.engine.generate(
                prompts, self.scoring.n, self.sampling, self.seeds, self.scoring.finished
            )
        finally:
            self.engine.stop = never

    def wait(self) -> float:
        """Return when the engine, and rewards beside it, have nothing left to do: how many seconds that took."""
        start = time.perf_counter()
        if self.thread is not None:
            self.thread.join()
            self.scoring.wait()
        return time.perf_counter() - start

    def give_up(self) -> None:
        """Stop the engine and the rewards; nobody will ask for the result."""
        self.given_up = True
        if self.thread is not None:
            self.thread.join()
        self.scoring.give_up()

    def result(self) -> tuple[list[Group], list[Sample], dict[str, float]]:
        """The groups, their samples, and ``seconds_generate`` and ``seconds_reward`` that were waited for.

        Raises:
            Stopped: if it was given up.
            UserError: what engine or reward complain of.
        """
        self.seconds += self.wait()
        start = time.perf_counter()
        try:
            if self.thread is None:
                self.generate()
            if self.error is not None:
                raise self.error
        except BaseException:
            self.scoring.give_up()
            raise
        generated, n = time.perf_counter(), self.scoring.n
        samples = self.scoring.samples()
        rewards = [0.0 if sample.reward is None else sample.reward for sample in samples]
        groups = [
            Group(prompt.token_ids, completions, rewards[i * n : (i + 1) * n])
            for i, (prompt, completions) in enumerate(zip(self.prompts, self.answers, strict=True))
        ]
        waited = {
            "seconds_generate": self.seconds + generated - start,
            "seconds_reward": time.perf_counter() - generated,
        }
        return groups, samples, waited
