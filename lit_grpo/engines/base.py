"""The engine interface: something that samples completions from the policy's current weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def __post_init__(self) -> None:
        for key, value, ok, expected in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "a whole number >= 1"),
            ("temperature", self.temperature, self.temperature >= 0, "a number >= 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "a whole number >= 0"),
        ):
            if not ok:
                raise UserError(
                    f"rollout.init_args.{key}, or that of its evaluation: expected {expected}, got {value}."
                )


class Engine(ABC):
    """Samples completions. One engine lives in each training process."""

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        """Draw n completions for each prompt.

        Args:
            prompts: token ids of each prompt; a prompt is passed once, whatever n.
            n: completions per prompt.
            sampling: how to draw them.
            seeds: one per prompt; sample j of prompt i is drawn with seed ``seeds[i] + j``, so that what is drawn does
                not depend on which other prompts share the call.

        Returns:
            For each prompt, in order, n completions with the log-probs of their tokens *after* temperature and
            filtering, that is, under the distribution they were drawn from.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights, given as (Hugging Face name, full tensor), tied heads included."""

    def close(self) -> None:  # noqa: B027  most engines have nothing to give back
        """Give back memory and processes."""
