"""What happened at each step of one run, for those who show it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..runtime.observers import CallRecord


@dataclass(slots=True)
class StepRecord:
    """One step: the calls of the model in it, how many of them were skipped, and what was measured."""

    step: int
    calls: int = 0
    hits: int = 0
    compiled: bool = False
    reason: str = ""
    seconds: float | None = None
    """Time of its calls; None where one of them was not timed."""
    error: float | None = None
    """How far the forecast would have been off, measured at a computed step: relative, root mean square."""
    timed_calls: int = field(default=0, repr=False)

    @property
    def skipped(self) -> bool:
        """Whether every call of the step was answered from the cache."""
        return 0 < self.calls == self.hits


class Timeline:
    """The steps of one run. On devices that queue work the times of the last calls arrive after the run."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.planned: int | None = None
        self._skipped = 0
        self._waiting: deque[StepRecord] = deque()

    def begin(self, planned: int | None) -> None:
        """A run of so many steps begins; what is known of the last one goes."""
        self.steps, self.planned = [], planned
        self._skipped = 0
        self._waiting.clear()

    def called(self, call: CallRecord, step: int) -> None:
        """A call of the model has ended."""
        if not self.steps or self.steps[-1].step != step:
            self.steps.append(StepRecord(step))
        record = self.steps[-1]
        self._skipped -= record.skipped
        record.calls += 1
        record.hits += call.skipped
        self._skipped += record.skipped
        record.compiled |= call.compiled
        record.reason = call.reason
        if call.timed:
            self._waiting.append(record)

    def timed(self, seconds: float) -> None:
        """The time of the oldest call that waits for one."""
        if self._waiting:
            record = self._waiting.popleft()
            record.timed_calls += 1
            record.seconds = (record.seconds or 0.0) + seconds

    def measured(self, step: int, error: float) -> None:
        """How far the forecast of a computed step was off; of several contexts the largest."""
        for record in reversed(self.steps):
            if record.step == step:
                record.error = error if record.error is None else max(record.error, error)
                return

    def steps_done(self) -> int:
        """Steps so far."""
        return len(self.steps)

    def steps_skipped(self) -> int:
        """Steps so far in which no call computed the cached blocks."""
        return self._skipped
