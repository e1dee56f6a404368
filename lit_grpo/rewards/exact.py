"""Rewards that compare text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample


def exact_match(samples: list[Sample]) -> list[float]:
    """1 where the completion is the gold answer, white space around them aside; else 0."""
    return [float(sample.completion.strip() == sample.answer.strip()) for sample in samples]
