"""The further the run, the more often a step is skipped."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import Decision, StepView
from .fixed import decide_by_interval

STEPS_PER_LEVEL = 10
"""Steps after the warm-up by which the interval falls by one."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """As `Fixed` with interval = max(1, skip_interval − (n − warmup_steps) // 10) at step n."""

    skip_interval: int
    warmup_steps: int
    max_consecutive_hits: int

    def decide(self, view: StepView) -> Decision:
        interval = max(1, self.skip_interval - (view.step - self.warmup_steps) // STEPS_PER_LEVEL)
        return decide_by_interval(view, interval, self.warmup_steps, self.max_consecutive_hits)

    def never_skips(self) -> bool:
        return False

    def notes(self) -> list[str]:
        return []
