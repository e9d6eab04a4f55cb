"""Those outside of the runtime that a session talks to: who knows when runs begin, and who shows what happens."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .clock import Tick


class RunSource(Protocol):
    """Someone who knows when runs begin, such as a pipeline's scheduler, and which part of a step a call is."""

    def starts_run(self) -> bool:
        """Whether the call being made is the first one of a run, as far as this source can tell."""

    def schedule(self) -> tuple[int | None, tuple[float, ...] | None]:
        """Number of steps and noise levels of the run that begins."""

    def solver(self) -> tuple[str | None, str | None]:
        """Its solver and prediction type, by their names for `new_run`."""

    def time(self) -> float | None:
        """The noise level of the step under way, where it is known on the host and stands for the model's timestep."""

    def context(self) -> str | None:
        """The name of the call's context where it is known."""


class CallRecord(NamedTuple):
    """One call of the model, as an observer hears of it. ``timed``: its seconds follow."""

    tick: Tick | None
    skipped: bool
    reason: str
    compiled: bool
    timed: bool


class Observer(Protocol):
    """Someone who shows what happens while it happens."""

    def compiling(self, reason: str | None) -> None:
        """A graph is about to be compiled; of a recompilation, what changed."""

    def called(self, call: CallRecord) -> None:
        """A call of the model has ended."""

    def measured(self, step: int, error: float) -> None:
        """How far the forecast of a computed step was off; known before the next decision."""
