"""Skipping only within a part of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .decision import Decision, StepView, Strategy

_ROUNDING = 1e-9
"""In steps: 0.3 of 10 steps is 3 of them, whatever 0.3 * 10 rounds to."""


@dataclass(frozen=True, slots=True)
class PartOfRun:
    """The steps n of N with (n − 1) / N >= start and n / N <= end: those that lie in the part as a whole.

    start = 0.25, end = 0.75 of 20 steps are the steps 6 … 15.
    """

    start: float
    end: float

    def first(self, num_steps: int) -> int:
        """The first step inside; more than `last` where none is."""
        return math.ceil(self.start * num_steps - _ROUNDING) + 1

    def last(self, num_steps: int) -> int:
        """The last step inside."""
        return math.floor(self.end * num_steps + _ROUNDING)

    def is_whole(self) -> bool:
        return self.start <= 0.0 and self.end >= 1.0


@dataclass(frozen=True, slots=True)
class WithinPart:
    """`inner`, computing every step outside `part`; where the number of steps is not known, `inner` alone."""

    inner: Strategy
    part: PartOfRun

    def decide(self, view: StepView) -> Decision:
        known = view.run_length()
        if known is not None and not self.part.first(known) <= view.step <= self.part.last(known):
            return Decision(False, "outside_range")
        return self.inner.decide(view)

    def never_skips(self) -> bool:
        return self.inner.never_skips()

    def notes(self) -> list[str]:
        return self.inner.notes()
