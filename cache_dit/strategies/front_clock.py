"""Decisions from how far the output of the front blocks has moved, and the guards that come before any rule of ours."""

from __future__ import annotations

from dataclasses import dataclass

from .decision import Decision, StepView

OWN_WARMUP_STEPS = 2
"""Warm-up of the clock where none is given: the front's first change is measured at step 2."""
OWN_MAX_CONSECUTIVE_HITS = 6
"""Most steps that the clock skips in a row where no bound is given."""
LOOK_AHEAD = 1.5
"""Increments added to the clock: one for the step to decide, whose own is not known yet, and half of one as margin."""
ERROR_BOUND = 0.5
"""Relative RMS error of the last forecast beyond which nothing is skipped: it missed half of the residual."""


def guard(view: StepView, skip_interval: int, max_consecutive_hits: float) -> Decision | None:
    """The decision to compute that comes before either rule, else None.

    - `max_consecutive_hits`: so many were skipped just before.
    - `error_guard`: the last measured forecast error exceeds `ERROR_BOUND`; the step computed now measures it anew.
    - `interval`: no error has been measured in this run, and n % skip_interval is not 0.
    """
    if view.consecutive_hits >= max_consecutive_hits:
        return Decision(False, "max_consecutive_hits")
    if view.forecast_error is None:
        return Decision(False, "interval") if view.step % skip_interval else None
    # written so that NaN computes
    return None if view.forecast_error <= ERROR_BOUND else Decision(False, "error_guard")


def within_clock(view: StepView, bound: float, look_ahead: float = LOOK_AHEAD) -> bool:
    """Whether the front will have changed by no more than `bound` since the last computed step.

    The clock a of the steps since then and the newest increment inc decide one step ahead, so that the host never
    waits for this step's front: a + 1.5 · inc <= bound. TeaCache's accumulated change (arXiv 2411.19108, 2024) with
    half a step of margin. False for NaN.
    """
    return view.last_increment is not None and view.clock + look_ahead * view.last_increment <= bound


@dataclass(frozen=True, slots=True)
class FrontRule:
    """Skips while the front's change, as `within` reads it, says so; where it is not measured, by `skip_interval`."""

    skip_interval: int
    warmup_steps: int
    max_consecutive_hits: int
    tolerance: float

    def decide(self, view: StepView) -> Decision:
        if view.step <= self.warmup_steps:
            return Decision(False, "warmup")
        guarded = guard(view, self.skip_interval, self.max_consecutive_hits)
        if guarded is not None:
            return guarded
        within = self.within(view)
        if within is None:
            return Decision(view.step % self.skip_interval == 0, "interval")
        return Decision(within, "clock")

    def within(self, view: StepView) -> bool | None:
        """Whether the step may be skipped; None: nothing has been measured to say so."""
        raise NotImplementedError

    def never_skips(self) -> bool:
        return False

    def notes(self) -> list[str]:
        return []


@dataclass(frozen=True, slots=True)
class ClockStrategy(FrontRule):
    """Skips until the front's accumulated change since the last computed step would exceed `tolerance`.

    Unit of `tolerance`: relative change of the output of the front blocks, mean|Hᵢ − Hᵢ₋₁| / mean|Hᵢ₋₁| summed over
    steps: at 0.1 the region computes again once its input has moved by about a tenth of its size.
    """

    look_ahead: float = LOOK_AHEAD

    def within(self, view: StepView) -> bool | None:
        return None if view.last_increment is None else within_clock(view, self.tolerance, self.look_ahead)
