"""A penalty on completions that come near the longest that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample

KEY = "data.init_args.reward.init_args"


class OverlongPenalty:
    """Another reward, less DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13).

    With n the tokens of a completion and L = ``max_tokens - buffer``, what is added is 0 where n <= L, (L - n) /
    ``buffer`` up to ``max_tokens``, and -1 beyond.

    >>> from lit_grpo.data import Sample
    >>> from lit_grpo.rewards import exact_match
    >>> reward = OverlongPenalty(exact_match, max_tokens=10, buffer=4)
    >>> reward([Sample("1+1=", "2", "2", num_tokens=n, truncated=False) for n in (6, 7, 8, 10, 12)])
    [1.0, 0.75, 0.5, 0.0, 0.0]

    Args:
        reward: to which the penalty is added.
        max_tokens: length from which the penalty is whole, in tokens; usually the rollout's ``max_tokens``.
        buffer: tokens before that over which the penalty grows from 0 to 1.

    Raises:
        UserError: if a number is below 1, or ``buffer`` above ``max_tokens``.
    """

    def __init__(self, reward: Callable[[list[Sample]], list[float]], max_tokens: int, buffer: int) -> None:
        for key, value in (("max_tokens", max_tokens), ("buffer", buffer)):
            if value < 1:
                raise UserError(f"{KEY}.{key}: expected a whole number >= 1, got {value}.")
        if buffer > max_tokens:
            raise UserError(
                f"{KEY}.buffer: {buffer} tokens are more than the {max_tokens} of max_tokens, in which they lie."
                " Lower it."
            )
        self.reward, self.max_tokens, self.buffer = reward, max_tokens, buffer

    def __call__(self, samples: list[Sample]) -> list[float]:
        free = self.max_tokens - self.buffer
        return [
            reward - min(max(sample.num_tokens - free, 0) / self.buffer, 1.0)
            for sample, reward in zip(samples, self.reward(samples), strict=True)
        ]
