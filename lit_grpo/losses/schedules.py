"""Coefficients that change with the optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lit_grpo.errors import UserError


class Schedule(ABC):
    """A coefficient as a function of the optimizer step. Your own subclass stands in YAML by its import path."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The coefficient after ``step`` optimizer steps."""


@dataclass
class LinearSchedule(Schedule):
    """From ``start`` to ``end`` in ``steps`` optimizer steps along a line, then ``end``.

    >>> [LinearSchedule(0.0, 1.0, steps=4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"{type(self).__name__}.steps: expected a whole number >= 1, got {self.steps}.")

    def progress(self, step: int) -> float:
        return min(step / self.steps, 1.0)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self.progress(step)


@dataclass
class CosineSchedule(LinearSchedule):
    """From ``start`` to ``end`` in ``steps`` optimizer steps along half a cosine, then ``end``.

    >>> [round(CosineSchedule(1.0, 0.0, steps=4)(step), 4) for step in (0, 1, 2, 4, 9)]
    [1.0, 0.8536, 0.5, 0.0, 0.0]
    """

    def progress(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().progress(step))) / 2


Coefficient = float | Schedule
"""A number, or one that changes with the step."""


def at(coefficient: Coefficient, step: int) -> float:
    """The coefficient's value at an optimizer step."""
    return coefficient(step) if isinstance(coefficient, Schedule) else coefficient
