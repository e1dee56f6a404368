"""The reward of mathematics: math-verify in processes that can be killed."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import weakref
from collections.abc import Callable
from concurrent.futures import TimeoutError as DeadlineError
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from lit_grpo.errors import UserError
from lit_grpo.rewards.verify import Verdict, judge_all, readable, start_worker

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample

log = logging.getLogger(__name__)


CHUNK = 64
"""Completions that a worker gets at once: one at a time, the parent would be busy passing them on."""


class MathReward:
    """1 where math-verify finds the completion equal to the gold answer, else 0.

    What a model writes can hang or crash a parser, so it is read in a pool of processes with a hard deadline for each
    completion; one that overruns is killed and scores 0. Samples get ``parsed``, the answer that was found, and the
    part ``timeout_rate``, which is logged.

    Args:
        timeout: seconds for one completion.
        workers: processes; they start at the first call.

    Raises:
        UserError: if an argument is not above 0.
    """

    overlaps = True
    """It may be called while other completions are being written."""

    def __init__(self, timeout: float = 5.0, workers: int = 2) -> None:
        for key, value in (("timeout", timeout), ("workers", workers)):
            if value <= 0:
                raise UserError(f"data.init_args.reward.init_args.{key}: expected a number above 0, got {value}.")
        self.timeout, self.workers = timeout, workers

    @functools.cached_property
    def pool(self) -> ProcessPool:
        pool = ProcessPool(self.workers, initializer=start_worker, context=multiprocessing.get_context("spawn"))
        weakref.finalize(self, _stop, pool)
        try:
            if not pool.schedule(readable, args=(["1"],)).result()[0]:
                raise RuntimeError("math-verify cannot read 1")
        except (ProcessExpired, RuntimeError) as error:
            raise UserError(
                f"The processes that check answers do not start ({error}). In a script of your own, put what it does"
                " under `if __name__ == '__main__':`, because each of these processes imports it again."
            ) from error
        return pool

    def __call__(self, samples: list[Sample]) -> list[float]:
        items = [(sample.answer, sample.completion, sample.tolerance) for sample in samples]
        distinct = list(dict.fromkeys(items))
        judged = self.killable(functools.partial(judge_all, seconds=self.timeout), distinct)
        verdicts = dict(zip(distinct, judged, strict=True))
        scores = []
        for sample, item in zip(samples, items, strict=True):
            verdict = verdicts[item] or Verdict()
            sample.parsed = verdict.answer
            sample.parts["timeout_rate"] = float(verdicts[item] is None)
            scores.append(float(verdict.correct))
        return scores

    def unreadable(self, golds: list[str]) -> list[int]:
        """Which gold answers math-verify cannot read, so that no completion could be right.

        One that takes too long is not among them: processes that share a run must come to the same rows.
        """
        return [i for i, fine in enumerate(self.killable(readable, golds)) if fine is False]

    def killable(self, work: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
        """What ``work`` makes of the items, in worker processes; None where it took too long or killed its process.

        Items are passed on in chunks. Where ``work`` returns fewer results than a chunk has items it is called again on
        the rest; where it does not return in time it is killed, and each item of the chunk tried by itself.
        """
        results: dict[int, Any] = {}
        chunks = [list(range(i, min(i + CHUNK, len(items)))) for i in range(0, len(items), CHUNK)]
        while chunks:
            jobs = [[items[i] for i in chunk] for chunk in chunks]
            done = self.pool.map(work, jobs, timeout=2 * self.timeout).result()
            rest = []
            for chunk in chunks:
                try:
                    found = next(done)
                except (DeadlineError, ProcessExpired):
                    found = [None] if len(chunk) == 1 else []
                results.update(zip(chunk, found, strict=False))
                left = chunk[len(found) :]
                rest += [left] if found and left else [[i] for i in left]
            chunks = rest
        for i in (i for i, found in results.items() if found is None):
            log.warning("no verdict within %g s, so a score of 0: %.200r", self.timeout, items[i])
        return [results[i] for i in range(len(items))]


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


math_reward = MathReward()
"""The default reward. Its processes start at the first call."""
