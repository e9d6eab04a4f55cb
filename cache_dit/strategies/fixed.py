"""One step of every `skip_interval` is skipped."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import Decision, StepView


def decide_by_interval(view: StepView, interval: int, warmup_steps: int, max_consecutive_hits: int) -> Decision:
    """Skips step n where n > warmup_steps and n % interval == 0, at most `max_consecutive_hits` steps in a row."""
    if view.step <= warmup_steps:
        return Decision(False, "warmup")
    if view.step % interval:
        return Decision(False, "interval")
    if view.consecutive_hits >= max_consecutive_hits:
        return Decision(False, "max_consecutive_hits")
    return Decision(True, "interval")


@dataclass(frozen=True, slots=True)
class Fixed:
    """After the warm-up one step of every `skip_interval` is skipped: step n where n % skip_interval == 0."""

    skip_interval: int
    warmup_steps: int
    max_consecutive_hits: int

    def decide(self, view: StepView) -> Decision:
        return decide_by_interval(view, self.skip_interval, self.warmup_steps, self.max_consecutive_hits)

    def never_skips(self) -> bool:
        return False

    def notes(self) -> list[str]:
        return []
