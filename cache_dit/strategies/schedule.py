"""An explicit mask over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import Decision, StepView


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step n computes where mask[n − 1] is true, and after the mask's end."""

    mask: tuple[bool, ...]

    def decide(self, view: StepView) -> Decision:
        if view.step > len(self.mask):
            return Decision(False, "schedule_end")
        return Decision(not self.mask[view.step - 1], "schedule")

    def never_skips(self) -> bool:
        """True where no entry after the first says skip: at the first step of a run nothing is stored yet."""
        return all(self.mask[1:])

    def notes(self) -> list[str]:
        return []
