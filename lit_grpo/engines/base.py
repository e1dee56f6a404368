"""The engine interface: something that samples completions from the policy's current weights."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.data.types import Completion


@dataclass
class Sampling:
    """How completions are drawn."""

    max_tokens: int = 256
    """Longest completion, in tokens."""

    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token."""

    top_p: float = 1.0
    """Smallest set of tokens with at least this probability; 1 keeps all."""

    top_k: int = 0
    """Number of likeliest tokens kept; 0 keeps all."""

    min_p: float = 0.0
    """Tokens with less than this share of the likeliest one's probability are left out; 0 keeps all."""

    def __post_init__(self) -> None:
        for key, value, ok, expected in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "a whole number >= 1"),
            ("temperature", self.temperature, self.temperature >= 0, "a number >= 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "a whole number >= 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1"),
        ):
            if not ok:
                raise UserError(
                    f"rollout.init_args.{key}, or that of its evaluation: expected {expected}, got {value}."
                )


class Stopped(Exception):
    """Sampling was given up because the run is to end in good order."""


def never() -> bool:
    return False


def ignore(prompt: int, completions: list[Completion]) -> None:
    """Do nothing with the completions of a prompt."""


class Deadline:
    """The time within which a block must be over.

    The block calls ``check`` as often as it can. Where it cannot, because one call into the engine never returns, the
    process is ended: nothing else would interrupt it, and the other processes of the run would wait forever.

    Args:
        seconds: from the start of the block.
        stop: says whether the block is to be given up at once.
    """

    grace = 60.0
    """Seconds that one call may go on after the time is over."""

    def __init__(self, seconds: float, stop: Callable[[], bool] = never) -> None:
        self.seconds, self.stop = seconds, stop
        self.what: Callable[[], str] = lambda: "it did not begin"

    def __enter__(self) -> Deadline:
        self.end = time.monotonic() + self.seconds
        self.watchdog = threading.Timer(self.seconds + self.grace, self.end_process)
        self.watchdog.daemon = True
        self.watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.cancel()

    def check(self, what: Callable[[], str]) -> None:
        """Give up what has not finished.

        Raises:
            Stopped: if the block is to be given up.
            UserError: if the time is over; ``what`` names the prompt and how far it came.
        """
        self.what = what
        if self.stop():
            raise Stopped
        if time.monotonic() > self.end:
            raise UserError(self.message())

    def message(self) -> str:
        return (
            f"The engine did not finish within {self.seconds:g} s (rollout.init_args.timeout): {self.what()}."
            " Checkpoints of earlier phases hold. Raise timeout if generation is that slow, or lower max_tokens or"
            " data.init_args.prompts_per_phase."
        )

    def end_process(self) -> None:
        said = [f"The engine did not finish within {self.seconds:g} s (rollout.init_args.timeout)."]
        asking = threading.Thread(target=lambda: said.append(self.message()), daemon=True)
        asking.start()
        asking.join(10)  # what it asks may hang, or fail, as the engine does
        try:
            print(f"{said[-1]} A call into it does not return, so this process ends. It is at:", file=sys.stderr)
            faulthandler.dump_traceback()
        finally:
            os._exit(1)


class Engine(ABC):
    """Samples completions. One engine lives in each training process.

    Args:
        context: longest prompt and completion together, in tokens.
        timeout: seconds after which a call of ``generate`` that has not come back is given up.
    """

    def __init__(self, context: int, timeout: float = 1500.0) -> None:
        self.context, self.timeout = context, timeout
        self.stop: Callable[[], bool] = never
        """Asked at every step of a generation whether to give it up."""

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int],
        finished: Callable[[int, list[Completion]], None] = ignore,
    ) -> list[list[Completion]]:
        """Draw n completions for each prompt.

        Args:
            prompts: token ids of each prompt; a prompt is passed once, whatever n.
            n: completions per prompt.
            sampling: how to draw them.
            seeds: one per prompt; sample j of prompt i is drawn with seed ``seeds[i] + j``, so that what is drawn does
                not depend on which other prompts share the call. At temperature 0 all samples of a prompt are the
                same one.
            finished: is told the number of each prompt, and its completions, as soon as they are all there.

        Returns:
            For each prompt, in order, n completions with the log-probs of their tokens *after* temperature and
            filtering, that is, under the distribution they were drawn from.

        Raises:
            Stopped: if ``stop`` says so.
            UserError: if a prompt is empty or leaves no room for ``max_tokens``, the engine fails, or time is over.
            ValueError: if there is not one seed for each prompt, or n is below 1.
        """
        if len(seeds) != len(prompts) or n < 1:
            raise ValueError(f"Expected a seed per prompt and n >= 1, got {len(prompts)}, {len(seeds)} and n {n}.")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"The engine got an empty prompt (number {i} of {len(prompts)}). Drop it.")
            if len(prompt) + sampling.max_tokens > self.context:
                raise UserError(
                    f"The engine got a prompt of {len(prompt)} tokens (number {i} of {len(prompts)}), which with"
                    f" rollout.init_args.max_tokens {sampling.max_tokens} is beyond the {self.context} it was made for."
                    " Lower max_tokens, or leave long prompts out with data.init_args.max_prompt_tokens."
                )
        if not prompts:
            return []
        answers: dict[int, list[Completion]] = {}
        with Deadline(self.timeout, self.stop) as deadline:
            deadline.what = lambda: f"reading prompts, the first {prompts[0]}"
            drawn, copies = (n, 1) if sampling.temperature > 0 else (1, n)
            with contextlib.closing(self._generate(prompts, drawn, sampling, seeds, deadline)) as written:
                for i, completions in written:
                    self.check_logps(i, completions)
                    answers[i] = completions * copies
                    finished(i, answers[i])
        return [answers[i] for i in range(len(prompts))]

    def check_logps(self, prompt: int, completions: list[Completion]) -> None:
        """See to it that completions have the log-probs to which later updates take their ratio.

        Raises:
            UserError: if one has none, or not as many as tokens.
        """
        for completion in completions:
            tokens, logps = len(completion.token_ids), completion.logps
            if logps is None or len(logps) != tokens:
                raise UserError(
                    f"rollout: {type(self).__name__} drew a completion of {tokens} tokens (prompt number {prompt}) with"
                    f" {'no' if logps is None else len(logps)} log-probs. Have it set Completion.logps, one for each"
                    " token."
                )

    @abstractmethod
    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> Generator[tuple[int, list[Completion]]]:
        """As ``generate``, for prompts that were checked: the number and the completions of each, once it is done."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights, given as (Hugging Face name, full tensor), tied heads included."""

    def agreeing(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of those weights that the engine holds just as they are given.

        An engine that fuses or packs weights need not know the others again; one that holds none of its own knows none.
        """
        return set()

    def sleep(self) -> None:  # noqa: B027  most engines have no memory of their own
        """Give back memory until ``wake``; the next call must be that."""

    def wake(self, part: Literal["weights", "cache"]) -> None:  # noqa: B027
        """Take memory for the weights, or for the cache, which comes once new weights are loaded: never all at once."""

    def close(self) -> None:  # noqa: B027  most engines have nothing to give back
        """Give back memory and processes."""
