"""Steps placed for a target speed-up, guarded by what the run measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..options import DEFAULT_SKIP_INTERVAL
from .decision import Decision, StepView
from .front_clock import guard, within_clock
from .placement import PlacementRules, first_steps, place_steps

DRIFT_BOUND = 10.0
"""Under a target speed-up: the clock at which a step computes out of turn, in tolerances."""


@dataclass(frozen=True, slots=True)
class PlacementStrategy:
    """Computes num_steps / target_speedup steps of a run, where `place_steps` puts them; the others are skipped.

    Where the number of steps is not known, and past it, one step of every target_speedup on average computes.
    `tolerance` only guards: a step also computes where the clock, looking ahead, exceeds `DRIFT_BOUND` tolerances.
    """

    rules: PlacementRules
    tolerance: float

    def decide(self, view: StepView) -> Decision:
        if view.step <= self.rules.warmup_steps:
            return Decision(False, "warmup")
        if self._is_placed(view):
            return Decision(False, "placement")
        longest = self.rules.max_consecutive_hits
        guarded = guard(view, self.rules.skip_interval or 1, math.inf if longest is None else longest)
        if guarded is not None:
            return guarded
        if view.last_increment is not None and not within_clock(view, DRIFT_BOUND * self.tolerance):
            return Decision(False, "clock")
        return Decision(True, "placement")

    def _is_placed(self, view: StepView) -> bool:
        if self.never_skips():
            return True
        steps = view.run_length()
        if steps is None:
            first = first_steps(self.rules.warmup_steps, self.rules.skip_interval or DEFAULT_SKIP_INTERVAL)
            return view.step in first or (view.step > first[-1] and self._is_due(view.step - first[-1]))
        if view.step > steps:
            return self._is_due(view.step - steps - 1)
        return view.step in place_steps(self.rules, steps, None if view.sigmas is None else tuple(view.sigmas), view.corrected)

    def _is_due(self, distance: int) -> bool:
        """Whether a multiple of target_speedup lies in (distance − 1, distance]: at 0 and then at the target's rate."""
        target = self.rules.target_speedup
        return math.floor(distance / target) > math.floor((distance - 1) / target)

    def never_skips(self) -> bool:
        return self.rules.target_speedup <= 1.0

    def notes(self) -> list[str]:
        """`'target_speedup_unreachable'` where `max_consecutive_hits` alone rules the target out."""
        longest = self.rules.max_consecutive_hits
        unreachable = longest is not None and longest + 1 < self.rules.target_speedup
        return ["target_speedup_unreachable"] if unreachable else []
