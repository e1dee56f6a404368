"""The reward of mathematics: math-verify in processes that can be killed."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import weakref
from concurrent.futures import TimeoutError as DeadlineError
from typing import TYPE_CHECKING

from pebble import ProcessExpired, ProcessPool

from lit_grpo.errors import UserError
from lit_grpo.rewards.verify import is_correct, start_worker

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample

log = logging.getLogger(__name__)


class MathReward:
    """1 where math-verify finds the completion equal to the gold answer, else 0.

    What a model writes can hang or crash a parser, so it is read in a pool of processes with a hard deadline for each
    completion; one that overruns is killed, scores 0, and is counted in ``timeouts``.

    Args:
        timeout: seconds for one completion.
        workers: processes; they start at the first call.

    Raises:
        UserError: if an argument is not above 0.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 2) -> None:
        for key, value in (("timeout", timeout), ("workers", workers)):
            if value <= 0:
                raise UserError(f"data.init_args.reward.init_args.{key}: expected a number above 0, got {value}.")
        self.timeout, self.workers = timeout, workers
        self.timeouts = 0

    @functools.cached_property
    def pool(self) -> ProcessPool:
        pool = ProcessPool(self.workers, initializer=start_worker, context=multiprocessing.get_context("spawn"))
        weakref.finalize(self, _stop, pool)
        try:
            if not pool.schedule(is_correct, args=("1", "1")).result():
                raise RuntimeError("math-verify does not find 1 equal to 1")
        except (ProcessExpired, RuntimeError) as error:
            raise UserError(
                f"The processes that check answers do not start ({error}). In a script of your own, put what it does"
                " under `if __name__ == '__main__':`, because each of these processes imports it again."
            ) from error
        return pool

    def __call__(self, samples: list[Sample]) -> list[float]:
        pairs = list(dict.fromkeys((sample.answer, sample.completion) for sample in samples))
        verdicts = dict(zip(pairs, self._verify(pairs), strict=True))
        return [verdicts[sample.answer, sample.completion] for sample in samples]

    def _verify(self, pairs: list[tuple[str, str]]) -> list[float]:
        golds, completions = zip(*pairs, strict=True)
        results = self.pool.map(is_correct, golds, completions, timeout=self.timeout).result()
        scores = []
        for gold, completion in pairs:
            try:
                scores.append(float(next(results)))
            except (DeadlineError, ProcessExpired) as error:
                self.timeouts += 1
                log.warning("%s on the answer %.80r to the gold %r: scored 0", type(error).__name__, completion, gold)
                scores.append(0.0)
            except Exception as error:  # math-verify and sympy raise many kinds on strange input
                log.debug("%r on the answer %.80r to the gold %r: scored 0", error, completion, gold)
                scores.append(0.0)
        return scores


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


@functools.cache
def _default() -> MathReward:
    return MathReward()


def math_reward(samples: list[Sample]) -> list[float]:
    """:class:`MathReward` with its default settings, as a plain function."""
    return _default()(samples)
