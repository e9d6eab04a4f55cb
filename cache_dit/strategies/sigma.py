"""Computed steps spaced evenly in sigma, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .decision import Decision, StepView
from .placement import computed_count, noise_levels


@dataclass(frozen=True, slots=True)
class SigmaSpaced:
    """Computes num_steps / target_speedup steps, at those nearest to evenly spaced sigmas (even steps where none are known).

    Needs the number of steps; without it every step computes.

    Source: this project's quality bench; every n-th step of FORA (arXiv 2407.01425, 2024) carried from steps to sigma.
    """

    target_speedup: float

    def decide(self, view: StepView) -> Decision:
        steps = view.run_length()
        if steps is None or view.step > steps:
            return Decision(False, "placement")
        sigmas = None if view.sigmas is None else tuple(view.sigmas)
        placed = _placed(steps, sigmas, computed_count(steps, self.target_speedup))
        return Decision(view.step - 1 not in placed, "placement")

    def never_skips(self) -> bool:
        return self.target_speedup <= 1.0

    def notes(self) -> list[str]:
        return []


@lru_cache(maxsize=64)
def _placed(num_steps: int, sigmas: tuple[float, ...] | None, count: int) -> frozenset[int]:
    return frozenset(evenly_spaced(noise_levels(num_steps, sigmas), count))


def evenly_spaced(levels: Sequence[float], count: int) -> list[int]:
    """`count` indices from 0 on, each nearest to its level of `count` that are evenly spaced from the first to the last.

    Each leaves room for those to come, and of equally near ones the first is taken.
    """
    placed = [0]
    for k in range(1, count):
        wanted = levels[0] + (levels[-1] - levels[0]) * k / count
        room = range(placed[-1] + 1, len(levels) - (count - k))
        placed.append(min(room, key=lambda index: abs(levels[index] - wanted)))
    return placed
