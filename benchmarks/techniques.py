"""What each technique contributes: the same training with one of them switched off, against all of them.

    python benchmarks/techniques.py [--repeats 5]

2-GRPO on a model of 0.6 M parameters, 256 prompts, completions of up to 128 tokens with a long tail, pass rate 0.5. The
ways take turns in one process, and a ratio is of the seconds of a phase to those with everything in the same turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ours import train
from vs_trl import Coin, Work, make_task

from callbacks import HFRollout, TheoryMonitor
from callbacks.ledger import PARTS
from lit_grpo import GRPO, Sample
from lit_grpo.data.collate import Row
from lit_grpo.data.types import Completion
from lit_grpo.engines import HFEngine

WORK = Work("0.6 M", 2, 0.5, "long-tailed", "HFRollout", max_tokens=128, steps=3)
COIN = Coin(0.5)


def all_rows_forwarded() -> dict[str, Any]:
    loss = GRPO()
    loss.drops_zero_advantages = False
    return {"loss": loss}


def reference_scored() -> dict[str, Any]:
    loss = GRPO()
    loss.needs_reference = True  # at beta 0
    return {"loss": loss}


class PromptsReadAgain(HFEngine):
    """Reads a prompt for each of its completions."""

    def _generate(self, prompts: Any, n: int, sampling: Any, seeds: Any, deadline: Any) -> Any:
        again = [prompt for prompt in prompts for _ in range(n)]
        of_each = [seed + j for seed in seeds for j in range(n)]
        written = dict(super()._generate(again, 1, sampling, of_each, deadline))
        for i in range(len(prompts)):
            yield i, [written[i * n + j][0] for j in range(n)]


class RowsStay(HFEngine):
    """Goes on writing completions that have ended, and cuts them off afterwards."""

    def _generate(self, *arguments: Any) -> Any:
        stops, self.stop_token_ids = self.stop_token_ids, []
        for i, completions in super()._generate(*arguments):
            yield i, [self.cut(completion, stops) for completion in completions]
        self.stop_token_ids = stops

    def cut(self, completion: Completion, stops: list[int]) -> Completion:
        ids = completion.token_ids
        end = next((t + 1 for t, token in enumerate(ids) if token in stops), len(ids))
        return Completion(ids[:end], (completion.logps or [])[:end], truncated=ids[end - 1] not in stops)


def with_engine(engine: type[HFEngine]) -> dict[str, Any]:
    class Rollout(HFRollout):
        def make_engine(self, module: Any, context: int) -> Any:
            return engine(module.policy.lm.config, module.stop_token_ids, context, self.max_batch_size)

    return {"rollout": Rollout(max_tokens=WORK.max_tokens)}


def plain_logps(
    hidden: Any,
    tokens: Any,
    mask: Any,
    head: Any,
    temperature: float,
    softcap: Any,
    entropy: bool = False,
    places: Any = None,
) -> Any:
    """Logits of all positions, and their log_softmax."""
    logps = (head(hidden) / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.where(mask, logps, 0.0), None


def as_they_come(rows: list[Row], count: int, unit: int, drop_zeros: bool, sharing: int) -> list[list[Row]]:
    """Micro-batches with equally many rows each, neither sorted by length nor equal in tokens."""
    kept = [row for row in rows if not (drop_zeros and row.silent)]
    cuts = [i * (len(kept) // sharing) // count * sharing for i in range(count + 1)]
    return [kept[a:b] for a, b in itertools.pairwise(cuts)]


async def judge(samples: list[Sample]) -> list[float]:
    """A reward that is waited for, as a model behind a network is: half a second for any number of completions."""
    await asyncio.sleep(0.5)
    return COIN([sample.completion for sample in samples])


def judge_afterwards(samples: list[Sample]) -> Any:
    """The same, which does not look like a coroutine."""
    return judge(samples)


def nothing() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def patched(where: str, by: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: mock.patch(where, by)


WAYS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "tied pairs are forwarded too": (all_rows_forwarded, nothing),
    "micro-batches in the order of their rows, not by length": (
        dict,
        patched("lit_grpo.data.collate.micro_batches", as_they_come),
    ),
    "logits of all positions at once, through autograd": (
        dict,
        patched("lit_grpo.policy.completion_logps", plain_logps),
    ),
    "a prompt is read for each of its completions": (lambda: with_engine(PromptsReadAgain), nothing),
    "the engine reads all prompts at once": (dict, patched("lit_grpo.engines.hf_engine.TOKENS_AT_ONCE", 2**30)),
    "each row that trains reads its prompt": (lambda: {"share_prompts": False}, nothing),
    "completions that have ended stay in the batch": (lambda: with_engine(RowsStay), nothing),
    "the reference scores, at beta 0": (reference_scored, nothing),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seconds(folder: Path, settings: dict[str, Any]) -> float:
    """Of a phase."""
    with quiet():
        ledger = train(folder, WORK, **settings)
    return sum(ledger[part] for part in PARTS) / (WORK.steps - 1)


def say(name: str, ratios: list[float]) -> None:
    print(f"{name:60}{statistics.median(ratios):6.2f} ({min(ratios):.2f}-{max(ratios):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_task(folder, WORK)
        seconds(folder, {})
        found: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            whole = seconds(folder, {})
            for way, (settings, patch) in WAYS.items():
                with patch():
                    found.setdefault(way, []).append(seconds(folder, settings()) / whole)
            apart, beside = (seconds(folder, {"reward": reward}) for reward in (judge_afterwards, judge))
            found.setdefault("a reward that is waited for is called after the engine", []).append(apart / beside)
            ahead = seconds(folder, {"rollout": HFRollout(max_tokens=WORK.max_tokens, one_phase_ahead=True)})
            found.setdefault("(rollout.one_phase_ahead switched on)", []).append(ahead / whole)
            for option in ("packing", "compile"):  # of which the former cannot share prompts
                other = seconds(folder, {option: True, "share_prompts": option != "packing"})
                found.setdefault(f"(model.{option} switched on)", []).append(other / whole)
            monitored = seconds(folder, {"callbacks": [TheoryMonitor()]})
            found.setdefault("(TheoryMonitor switched on)", []).append(monitored / whole)
    print(f"{'switched off':60}seconds of a phase, of those with it")
    for way, ratios in found.items():
        say(way, ratios)


if __name__ == "__main__":
    main()
