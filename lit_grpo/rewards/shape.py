"""Rewards for the shape of a completion, whatever it says: format, length, repetition. Summands of a ``RewardSum``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample

KEY = "data.init_args.reward.init_args"


class FormatReward:
    r"""1 where the whole completion matches a regular expression, else 0; ``.`` matches line ends too.

    >>> from lit_grpo.data import Sample
    >>> texts = ["<think>1+1</think> <answer>2</answer>", "<answer>2</answer>"]
    >>> FormatReward()([Sample("1+1=", text, "2", num_tokens=9, truncated=False) for text in texts])
    [1.0, 0.0]

    Args:
        pattern: what completions should look like; by default that of DeepSeek-R1 (arXiv 2501.12948). What a model
            writes is matched against it in this process: keep to patterns that do not backtrack.

    Raises:
        UserError: if the pattern is no regular expression.
    """

    def __init__(self, pattern: str = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*") -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"{KEY}.pattern: {pattern!r} is no regular expression: {error}.") from error

    def __call__(self, samples: list[Sample]) -> list[float]:
        return [float(self.pattern.fullmatch(sample.completion) is not None) for sample in samples]


class LengthPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13).

    With n the tokens of a completion and L = ``max_tokens - buffer``, it is 0 where n <= L, (L - n) / ``buffer`` up to
    ``max_tokens``, and -1 beyond.

    >>> from lit_grpo.data import Sample
    >>> penalty = LengthPenalty(max_tokens=10, buffer=4)
    >>> penalty([Sample("1+1=", "2", "2", num_tokens=n, truncated=False) for n in (7, 8, 10, 12)])
    [-0.25, -0.5, -1.0, -1.0]

    Args:
        max_tokens: length from which the penalty is whole, in tokens; usually the rollout's ``max_tokens``.
        buffer: tokens before that over which the penalty grows from 0 to 1.

    Raises:
        UserError: if a number is below 1, or ``buffer`` above ``max_tokens``.
    """

    def __init__(self, max_tokens: int, buffer: int) -> None:
        for key, value in (("max_tokens", max_tokens), ("buffer", buffer)):
            if value < 1:
                raise UserError(f"{KEY}.{key}: expected a whole number >= 1, got {value}.")
        if buffer > max_tokens:
            raise UserError(
                f"{KEY}.buffer: {buffer} tokens are more than the {max_tokens} of max_tokens, in which they lie."
                " Lower it."
            )
        self.max_tokens, self.buffer = max_tokens, buffer

    def __call__(self, samples: list[Sample]) -> list[float]:
        free = self.max_tokens - self.buffer
        return [min(max(free - sample.num_tokens, -self.buffer), 0) / self.buffer for sample in samples]


class RepetitionPenalty:
    """Minus the share of n-grams of words that occurred before in the completion (as in arXiv 2502.03373).

    >>> from lit_grpo.data import Sample
    >>> penalty = RepetitionPenalty(ngram=2)
    >>> penalty([Sample("", text, "", num_tokens=9, truncated=False) for text in ("a b c d", "a b a b a", "a")])
    [0.0, -0.5, 0.0]

    Args:
        ngram: words of a phrase whose repetition counts.

    Raises:
        UserError: if ``ngram`` is below 1.
    """

    def __init__(self, ngram: int = 20) -> None:
        if ngram < 1:
            raise UserError(f"{KEY}.ngram: expected a whole number >= 1, got {ngram}.")
        self.ngram = ngram

    def __call__(self, samples: list[Sample]) -> list[float]:
        return [self._score(sample.completion.split()) for sample in samples]

    def _score(self, words: list[str]) -> float:
        phrases = [tuple(words[i : i + self.ngram]) for i in range(len(words) - self.ngram + 1)]
        return len(set(phrases)) / len(phrases) - 1 if phrases else 0.0
