"""What a strategy sees of a step, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ..forecasts import Point

Reason = Literal[
    "warmup",  # computed: a step at the start of the run that always computes
    "interval",  # either: the step's number against the skip interval
    "max_consecutive_hits",  # computed: as many steps were skipped in a row as is allowed
    "schedule",  # either: the explicit mask
    "schedule_end",  # computed: the mask has ended
    "outside_range",  # computed: outside start_percent … end_percent
    "clock",  # either: the front's accumulated change against the tolerance
    "placement",  # either: the steps placed for the target speed-up
    "error_guard",  # computed: the last forecast missed too much of the residual
    "first_call",  # computed, by the runtime: the first step of a run
    "unconfirmed",  # computed, by the runtime: the second step of contexts that nobody names
    "restart",  # computed, by the runtime: the listed noise levels go back to this step
    "no_timestep",  # computed, by the runtime: runs cannot be told apart
]
"""The stable keys behind a decision; statistics and logs count by them."""


@dataclass(slots=True)
class StepView:
    """The state of one run at one step: all that a decision may depend on. The runtime fills it once a step."""

    step: int
    """n, from 1."""
    consecutive_hits: int
    """Steps skipped just before this one."""
    num_steps: int | None
    """The steps of this run; None where they are not known."""
    sigmas: Sequence[float] | None
    """The run's noise levels, one per step and the last; None where they are not known."""
    stored: Sequence[Point]
    """The points of the stored residuals of the deciding context, newest first."""
    clock: float
    """Sum of the front's relative changes, mean|Hᵢ − Hᵢ₋₁| / mean|Hᵢ₋₁|, over the steps since the last computed one."""
    last_increment: float | None
    """The newest of these changes, that of the previous step; None where it was not measured."""
    forecast_error: float | None
    """Relative RMS error of the forecast at the last computed step; None where this run has measured none."""
    last_gap: int | None = None
    """Steps from the computed step before the last one to the last one; None where this run has computed one at most."""
    corrected: bool = False
    """Whether the run's skipped steps are put right at the next computed one."""

    def run_length(self) -> int | None:
        """The number of steps of this run as far as it is known, from `num_steps` or else from `sigmas`."""
        if self.num_steps is None and self.sigmas is not None:
            return len(self.sigmas) - 1
        return self.num_steps


class Decision(NamedTuple):
    """Whether the step is skipped, and why."""

    skip: bool
    reason: Reason


class Strategy(Protocol):
    """step -> decision. A strategy keeps nothing between calls: one serves all runs and contexts of its model."""

    def decide(self, view: StepView) -> Decision:
        """Skip or compute this step. Whether anything valid is stored is the caller's to check."""

    def never_skips(self) -> bool:
        """Whether no step of any run can be skipped, whatever happens."""

    def notes(self) -> list[str]:
        """Keys of what the user should be told once about these settings: where something asked for cannot be had."""
