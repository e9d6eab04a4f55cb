"""Computed steps spaced evenly in sigma, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import Decision, StepView
from .part_of_run import PartOfRun
from .placement import PlacementRules, place_steps


@dataclass(frozen=True, slots=True)
class SigmaSpaced:
    """Computes num_steps / target_speedup steps, at those nearest to evenly spaced sigmas (even steps where none are known).

    Needs the number of steps; without it every step computes.

    Source: this project's quality bench; every n-th step of FORA (arXiv 2407.01425, 2024) carried from steps to sigma.
    """

    rules: PlacementRules

    def decide(self, view: StepView) -> Decision:
        steps = view.run_length()
        if steps is None or view.step > steps:
            return Decision(False, "placement")
        placed = place_steps(self.rules, steps, None if view.sigmas is None else tuple(view.sigmas))
        return Decision(view.step not in placed, "placement")

    def never_skips(self) -> bool:
        return self.rules.target_speedup <= 1.0

    def notes(self) -> list[str]:
        return []


def sigma_spaced(target_speedup: float) -> SigmaSpaced:
    """The rule for a number of computed steps: no warm-up, no bound, the whole run."""
    return SigmaSpaced(PlacementRules(target_speedup, 0, 1, None, PartOfRun(0.0, 1.0), sigma_share=1.0))
