"""The step clock: which run, which context and which step a call of the model is.

A run is one sampling. A context is one of the model's parts in a step (positive, negative prompt). A step counts the
evaluations of the model in one context, from 1 in each run; a named one that begins late, or was left out for some steps
(guidance within a part of the run), is at the step of the contexts that went on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

# Unnamed calls at the first timestep before they are taken for new runs of a model that samples in one step.
MAX_UNNAMED_CONTEXTS = 16
# A timestep comes as float32, float16 or bfloat16, the run's sigmas as Python floats.
LISTED_TOLERANCE = 2.0**-8

ContextKey = str | int


# Pairs of noise levels that follow each other in a run's list, in the unit of the list and in thousandths of it.
Jumps = tuple[tuple[float, float], ...]


def _close(time: float, listed: float) -> bool:
    return math.isclose(time, listed, rel_tol=LISTED_TOLERANCE)


def _has_no_order(time: float | None) -> bool:
    """Whether nothing lies before or behind a timestep: such a call is a run of its own."""
    return time is not None and not math.isfinite(time)


def listed_jumps(sigmas: Sequence[float]) -> Jumps:
    """The steps up of a list that goes down (or down of one that goes up): samplers that restart list them.

    A level that is merely in the list does not count: the next run begins at the first one.
    """
    if len(sigmas) < 2 or sigmas[0] == sigmas[-1]:
        return ()
    rising = sigmas[-1] > sigmas[0]
    pairs = [(a, b) for a, b in pairwise(sigmas) if a != b and (b > a) != rising]
    return tuple((a * unit, b * unit) for a, b in pairs for unit in (1.0, 1000.0))


class Tick(NamedTuple):
    """One call of the model. ``fresh``: nothing stored in this context may be used; ``broke``: the pattern did not hold."""

    run: int
    context: ContextKey
    step: int
    fresh: bool
    broke: bool


@dataclass(slots=True)
class _Course:
    """The course of one run's timesteps, as one context (or the unnamed calls together) sees it.

    ``made``: of each step the timestep, and the number of the call that began it among all calls of the model.
    """

    run: int
    first: float | None
    last: float | None = None
    direction: int = 0
    made: dict[int, tuple[float, int]] = field(default_factory=dict)

    def returns(self, time: float | None, jumps: Jumps) -> bool:
        """Whether the timestep goes against the direction of the run's first two distinct ones, and was not to do so."""
        if time is None or self.last is None or self.direction == 0 or time == self.last or self.exceeded_by(time):
            return False
        return not any(_close(self.last, before) and _close(time, after) for before, after in jumps)

    def advance(self, time: float | None) -> None:
        if time is None:
            return
        if self.direction == 0 and self.first is not None and time != self.first:
            self.direction = 1 if time > self.first else -1
        if self.first is None:
            self.first = time
        self.last = time

    def note(self, step: int, time: float | None, call: int) -> None:
        """A step was begun."""
        if time is not None:
            self.made[step] = time, call

    def exceeded_by(self, time: float) -> bool:
        """Whether a timestep lies beyond the last one."""
        if self.last is None or self.direction == 0 or time == self.last:
            return False
        return (time > self.last) == (self.direction > 0)


@dataclass(slots=True)
class _Unnamed:
    """Turns of the unnamed contexts: 1 to ``count``, told by the run's first step.

    ``calls`` were made at the timestep of the last call; no timestep has more than ``most``, which the run's second one
    tells: ``count``, or twice as many where the sampler evaluates twice. ``partial``: the count was begun in mid-step, so
    that the first timestep does not tell the contexts.
    """

    course: _Course
    count: int = 0
    settled: bool = False
    turn: int = 0
    step: int = 1
    calls: int = 0
    most: int | None = None
    partial: bool = False

    def exceeds(self, time: float) -> bool:
        """Count a call behind the first step; whether it is one more at its timestep than the pattern has."""
        if time != self.course.last:
            self.most = self.most or self.calls or None
            self.calls = 0
        self.calls += 1
        return self.most is not None and self.calls > self.most


@dataclass(slots=True)
class _Named:
    """``placed``: whether there was anything to tell the step of its first call by, or it is past."""

    course: _Course
    step: int = 0
    placed: bool = False

    def went_along(self, other: _Course) -> bool:
        """Whether its last call shared step and timestep with another context, which has gone on to the next step since."""
        mine, theirs, next_one = self.course.made.get(self.step), other.made.get(self.step), other.made.get(self.step + 1)
        if mine is None or theirs is None or next_one is None:
            return False
        return mine[0] == theirs[0] and next_one[1] > mine[1]

    def went_first(self, other: _Course) -> bool:
        """Whether it was the first of the two to make that step."""
        return self.course.made[self.step][1] < other.made[self.step][1]

    def agreed_before(self, other: _Course) -> bool:
        """Whether they shared an earlier step and its timestep, too."""
        earlier = ((step, time) for step, (time, _) in self.course.made.items() if step < self.step)
        return any(step in other.made and other.made[step][0] == time for step, time in earlier)


@dataclass(slots=True)
class StepClock:
    """Counts calls into runs, contexts and steps. ``manual``: the caller has named a run, so timesteps may be missing."""

    run: int = 0
    manual: bool = False
    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    solver: str | None = None
    prediction: str | None = None
    _jumps: Jumps = ()
    _unnamed: _Unnamed | None = None
    _named: dict[str, _Named] = field(default_factory=dict)
    _calls: int = 0

    def new_run(
        self,
        num_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        solver: str | None = None,
        prediction: str | None = None,
    ) -> None:
        """Begin a new run with the next call; what was given for the last run is forgotten."""
        self.end_run()
        self.manual = True
        self.announce(num_steps, sigmas, solver, prediction)

    def announce(
        self,
        num_steps: int | None,
        sigmas: Sequence[float] | None,
        solver: str | None = None,
        prediction: str | None = None,
    ) -> None:
        """Note the number of steps, noise levels, solver and prediction type of the run that the next call begins."""
        self.solver, self.prediction = solver, prediction
        self.sigmas = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
        # a run does not go back to where it began: that is the next one
        self._jumps = listed_jumps(self.sigmas or ())
        self.num_steps = num_steps if num_steps is not None else (len(self.sigmas) - 1 if self.sigmas else None)

    @property
    def restarts(self) -> bool:
        """Whether the list of noise levels goes back somewhere."""
        return bool(self._jumps)

    def jumps_back(self, step: int) -> bool:
        """Whether the listed noise level of a step, from 1, goes against the direction of the list."""
        levels = self.sigmas
        if not self._jumps or levels is None or not 1 < step < len(levels):
            return False
        before, now = levels[step - 2], levels[step - 1]
        return now != before and (now > before) != (levels[-1] > levels[0])

    def end_run(self) -> None:
        """Forget where the run was: the next call begins a new one."""
        self._unnamed = None
        self._named.clear()
        self._forget_schedule()

    def forget_context(self, name: ContextKey) -> None:
        """Drop a named context: its next call begins a run in it."""
        if isinstance(name, str):
            self._named.pop(name, None)

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._unnamed is not None or bool(self._named)

    def tick(self, time: float | None, name: str | None = None) -> Tick:
        """Count one call at timestep ``time`` (None: unknown) in the context ``name`` (None: told by the pattern)."""
        self._calls += 1
        return self._tick_unnamed(time) if name is None else self._tick_named(time, name)

    def begin_anew(self, time: float | None) -> Tick:
        """The unnamed call just counted is of another generation: count it as the first of a run."""
        return self._begin_unnamed(time, broke=True, partial=True)

    def is_unconfirmed(self, context: ContextKey, step: int) -> bool:
        """Whether the turns of several unnamed contexts are told by the run's first step alone.

        It may have held the first call of a run that was cut off behind it.
        """
        return isinstance(context, int) and self._unnamed is not None and self._unnamed.count > 1 and step <= 2

    def _tick_named(self, time: float | None, name: str) -> Tick:
        state = self._named.get(name)
        moved = state is not None and not state.placed and self._place_first_call(state)
        left = state is None or (time is not None and self._was_left_behind(state, time))
        absent = state is not None and not left and self._catches_up(state, time)
        begins = state is None or left or (not absent and self._begins_anew(state, time))
        if state is None or begins:
            state = _Named(_Course(self._run_for(state.course.run if state is not None else None), time))
            self._named[name] = state
            self._place_newcomer(state, time)
        state.step += 1
        state.course.advance(time)
        state.course.note(state.step, time, self._calls)
        return Tick(state.course.run, name, state.step, begins or absent or moved, False)

    def _begins_anew(self, state: _Named, time: float | None) -> bool:
        """Whether a call begins another run in its context."""
        course = state.course
        if _has_no_order(time) or _has_no_order(course.last):
            return True
        if time is None:
            return False
        if course.last == course.first == time:
            # but not where the sampler evaluates twice at the timestep at which this context begins
            return not any(other.last == time and state.went_along(other) for _, other in self._others(state))
        if course.direction == 0:
            # after a single call the others know it
            course.direction = next((other.direction for _, other in self._others(state) if other.direction), 0)
        return course.returns(time, self._jumps)

    def _was_left_behind(self, state: _Named, time: float) -> bool:
        """Whether a later run, begun since this context's last call, is at this timestep."""
        _, last = state.course.made.get(state.step, (None, 0))
        later = [other.course for other in self._named.values() if other.course.run > state.course.run]
        return any(each.last == time and min(call for _, call in each.made.values()) > last for each in later if each.made)

    def _others(self, state: _Named) -> list[tuple[int, _Course]]:
        """Step and course of the other contexts of its run, the furthest first."""
        found = [(other.step, other.course) for other in self._named.values() if other is not state]
        if self._unnamed is not None:
            found.append((self._unnamed.step, self._unnamed.course))
        return sorted((each for each in found if each[1].run == state.course.run), key=lambda each: -each[0])

    def _place_newcomer(self, state: _Named, time: float | None) -> None:
        """A context that begins at the timestep another one is at, is at its step."""
        for step, course in self._others(state):
            if time is not None and course.last == time:
                state.step, state.placed = step - 1, True
                return

    def _catches_up(self, state: _Named, time: float | None) -> bool:
        """Whether this context was left out while others of its run went on; it is then put behind the steps they have made.

        Other generations may share the run, with timesteps of their own: only contexts count that were at its last call's
        step and timestep, and went on from there.
        """
        if time is None or _has_no_order(time):
            return False
        for step, course in self._others(state):
            if not state.went_along(course):
                continue
            if course.last == time and step > state.step + 1:
                state.step = step - 1
                return True
            # the first to make its step, as before; a single step in common may be chance
            if course.exceeded_by(time) and state.went_first(course) and state.agreed_before(course):
                state.step = step
                return True
        return False

    def _place_first_call(self, state: _Named) -> bool:
        """A context that was the first to make its step learns from who came next which step of the run that was."""
        state.placed = True
        made = state.course.made.get(state.step)
        if made is None:
            return False
        for _, course in self._others(state):
            for step, (time, call) in course.made.items():
                if step > state.step and time == made[0] and call > made[1]:
                    state.step = step
                    state.course.made[step] = made
                    return True
        return False

    def _run_for(self, last: int | None) -> int:
        """The run a context (re)starts in: the session's newest, unless the context was in that one already."""
        if last == self.run or (last is None and not self.running):
            if last is not None:
                self._forget_schedule()
            self.run += 1
        return self.run

    def _tick_unnamed(self, time: float | None) -> Tick:
        state = self._unnamed
        if state is None:
            return self._begin_unnamed(time, broke=False)
        if time is None:
            return self._next_in_turn(state, time)
        last = state.course.last
        if not math.isfinite(time) or (last is not None and not math.isfinite(last)):
            return self._begin_unnamed(time, broke=False)
        if not state.settled:
            if time == state.course.first:
                return self._another_context(state, time)
            if state.partial:
                return self._begin_unnamed(time, broke=False)
            state.settled = True
        elif state.turn > 0 and time != last:
            return self._begin_unnamed(time, broke=not state.course.returns(time, self._jumps))
        elif state.course.returns(time, self._jumps):
            return self._begin_unnamed(time, broke=False)
        if state.exceeds(time):
            return self._begin_unnamed(time, broke=True, partial=True)
        return self._next_in_turn(state, time)

    def _begin_unnamed(self, time: float | None, broke: bool, partial: bool = False) -> Tick:
        if self._unnamed is not None:
            self._forget_schedule()
            self.run += 1
        elif not self._named:
            self.run += 1
        self._unnamed = _Unnamed(_Course(self.run, time, time), count=1, settled=time is None, partial=partial)
        self._unnamed.course.note(1, time, self._calls)
        return Tick(self.run, 1, 1, True, broke)

    def _another_context(self, state: _Unnamed, time: float) -> Tick:
        if state.count >= MAX_UNNAMED_CONTEXTS:
            return self._begin_unnamed(time, broke=False)
        state.count += 1
        return Tick(state.course.run, state.count, 1, True, False)

    def _next_in_turn(self, state: _Unnamed, time: float | None) -> Tick:
        if state.turn == 0:
            state.step += 1
            state.course.note(state.step, time, self._calls)
        state.course.advance(time)
        context = state.turn + 1
        state.turn = (state.turn + 1) % state.count
        return Tick(state.course.run, context, state.step, False, False)

    def _forget_schedule(self) -> None:
        """A run that nobody announced has no known sigmas or number of steps: those of the last one are not its own."""
        self.sigmas, self.num_steps, self._jumps = None, None, ()
        self.solver = self.prediction = None
