"""First-block cache: the front's change since the last computed step against a threshold."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import StepView
from .front_clock import FrontRule


@dataclass(frozen=True, slots=True)
class FirstBlock(FrontRule):
    """Skips while the front's output is within `tolerance`, relative, of what it was at the last computed step.

    The published rule looks at this step's front; here the distance is carried on from the step before, as if it had
    grown evenly since the computed step, so that nobody waits for it.

    Source: first-block cache of ParaAttention (2024), which the project cache-dit calls DBCache.
    """

    def within(self, view: StepView) -> bool | None:
        distance = self._distance(view)
        return None if distance is None else distance <= self.tolerance

    def _distance(self, view: StepView) -> float | None:
        """How far the front will be from the last computed step's, from how far it was one step earlier."""
        if view.last_increment is None or not view.stored:
            return None
        newest = view.stored[0].step
        # the step before was measured against the computed step before it: itself skipped, or the newest of them
        covered = view.step - 1 - newest if view.consecutive_hits else view.last_gap
        return None if not covered else view.last_increment / covered * (view.step - newest)
