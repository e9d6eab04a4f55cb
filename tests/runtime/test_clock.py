"""Runs, contexts and steps: what a call of the model is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.runtime.clock import MAX_UNNAMED_CONTEXTS, ContextKey, StepClock, Tick, listed_jumps

Call = float | tuple[float | None, str] | None


def ticked(clock: StepClock, calls: Iterable[Call]) -> list[Tick]:
    """Make calls: a timestep, or a timestep with the name of its context. Each is read anew, so another object."""
    named = [call if isinstance(call, tuple) else (call, None) for call in calls]
    return [clock.tick(None if time is None else float(str(time)), name) for time, name in named]


def shown(ticks: Iterable[Tick]) -> str:
    """Each call as run.context.step, with * where nothing stored may be used and ! where the pattern broke."""
    return " ".join(f"{t.run}.{t.context}.{t.step}{'*' * t.fresh}{'!' * t.broke}" for t in ticks)


def counted(*calls: Call) -> str:
    return shown(ticked(StepClock(), calls))


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param([9, 8, 7, 6], "1.1.1* 1.1.2 1.1.3 1.1.4", id="one context"),
        pytest.param([9, 9, 8, 8, 7, 7], "1.1.1* 1.2.1* 1.1.2 1.2.2 1.1.3 1.2.3", id="two contexts"),
        pytest.param([9, 9, 9, 8, 8, 8], "1.1.1* 1.2.1* 1.3.1* 1.1.2 1.2.2 1.3.2", id="three contexts"),
        pytest.param([9, 8, 8, 7, 7, 6, 6], "1.1.1* 1.1.2 1.1.3 1.1.4 1.1.5 1.1.6 1.1.7", id="Heun"),
        pytest.param([9, 8.5, 8, 7.5, 7], "1.1.1* 1.1.2 1.1.3 1.1.4 1.1.5", id="a midpoint between the steps"),
        pytest.param(
            [9, 9, 8, 8, 8, 8, 7, 7, 7, 7],
            "1.1.1* 1.2.1* 1.1.2 1.2.2 1.1.3 1.2.3 1.1.4 1.2.4 1.1.5 1.2.5",
            id="Heun with two contexts",
        ),
        pytest.param([0, 0.1, 0.2, 0.3], "1.1.1* 1.1.2 1.1.3 1.1.4", id="time flows upward"),
        pytest.param([0, 0, 0.1, 0.1, 0, 0, 0.1], "1.1.1* 1.2.1* 1.1.2 1.2.2 2.1.1* 2.2.1* 2.1.2", id="upward, twice"),
        pytest.param([9, 8, 7, 9, 8, 7], "1.1.1* 1.1.2 1.1.3 2.1.1* 2.1.2 2.1.3", id="a jump begins a run"),
        pytest.param([9, 8, 7, 7.5, 7], "1.1.1* 1.1.2 1.1.3 2.1.1* 2.1.2", id="a small jump too"),
        pytest.param([9, 8, 9, 9, 8, 8], "1.1.1* 1.1.2 2.1.1* 2.2.1* 2.1.2 2.2.2", id="the next run has more contexts"),
        pytest.param([9, 9, 8, 8, 9, 8], "1.1.1* 1.2.1* 1.1.2 1.2.2 2.1.1* 2.1.2", id="the next run has fewer contexts"),
        pytest.param([9, 9, 8, 9, 9, 8, 8], "1.1.1* 1.2.1* 1.1.2 2.1.1* 2.2.1* 2.1.2 2.2.2", id="cut in mid-step"),
        pytest.param([9, 9, 9], "1.1.1* 1.2.1* 1.3.1*", id="models that sample in one step never reuse"),
        pytest.param([9, math.nan, 8, 7], "1.1.1* 2.1.1* 3.1.1* 3.1.2", id="NaN is a run of its own"),
        pytest.param([math.inf, math.inf, 8, 7], "1.1.1* 2.1.1* 3.1.1* 3.1.2", id="so is infinity"),
        pytest.param([(9, "a"), (math.nan, "a"), (8, "a")], "1.a.1* 2.a.1* 3.a.1*", id="with a name too"),
    ],
)
def test_unnamed_calls(calls: Sequence[float], expected: str) -> None:
    assert counted(*calls) == expected


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param(
            [9, 9, 8, 8, 7, 6, 5],
            "1.1.1* 1.2.1* 1.1.2 1.2.2 1.1.3 2.1.1*! 2.1.2",
            id="guidance ends",
        ),
        pytest.param(
            [9, 9, 9, 8, 8, 8, 7, 7, 6, 6, 5, 5],
            "1.1.1* 1.2.1* 1.3.1* 1.1.2 1.2.2 1.3.2 1.1.3 1.2.3 2.1.1*! 2.2.1* 2.1.2 2.2.2",
            id="one of three contexts ends",
        ),
        pytest.param(
            [9, 8, 7, 7, 6, 6, 5, 5],
            "1.1.1* 1.1.2 1.1.3 2.1.1*! 3.1.1* 3.2.1* 3.1.2 3.2.2",
            id="guidance begins: the step in which it does tells no contexts",
        ),
        pytest.param(
            [9, 9, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5],
            "1.1.1* 1.2.1* 1.1.2 1.2.2 1.1.3 1.2.3 2.1.1*! 3.1.1* 3.2.1* 3.3.1* 3.1.2 3.2.2 3.3.2",
            id="a third context begins",
        ),
        pytest.param(
            [9, 8, 7, 7, 6, 6, 5, 4],
            "1.1.1* 1.1.2 1.1.3 2.1.1*! 3.1.1* 3.2.1* 3.1.2 4.1.1*!",
            id="guidance in the middle of the run",
        ),
        pytest.param(
            [9, 9, 8, 8, 7, 7, 6, 9, 9, 8],
            "1.1.1* 1.2.1* 1.1.2 1.2.2 1.1.3 1.2.3 1.1.4 2.1.1* 2.2.1* 2.1.2",
            id="a cut that jumps back is a new run, not a broken pattern",
        ),
    ],
)
def test_a_broken_pattern_starts_the_count_anew(calls: Sequence[float], expected: str) -> None:
    assert counted(*calls) == expected


def test_a_run_cut_after_its_first_call_and_begun_again_is_found_out_at_the_third_step() -> None:
    """The two calls look like two contexts until the timestep changes again."""
    assert counted(9, 9, 8, 7, 6, 5) == "1.1.1* 1.2.1* 1.1.2 2.1.1*! 2.1.2 2.1.3"
    assert counted(9, 9, 9, 8, 8, 7, 7, 6, 6) == "1.1.1* 1.2.1* 1.3.1* 1.1.2 1.2.2 2.1.1*! 2.2.1* 2.1.2 2.2.2"


def test_the_same_timestep_forever_never_reuses_and_does_not_grow() -> None:
    clock = StepClock()
    ticks = ticked(clock, [0.5] * 1000)
    assert all(tick.fresh and tick.step == 1 and not tick.broke for tick in ticks)
    assert {tick.context for tick in ticks} == set(range(1, MAX_UNNAMED_CONTEXTS + 1))
    named = ticked(clock, [(0.5, "cond")] * 1000)
    assert all(tick.fresh and tick.step == 1 for tick in named)
    assert [tick.run for tick in named] == list(range(named[0].run, named[0].run + 1000))


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param(
            [(9, "a"), (9, "b"), (8, "a"), (8, "b")],
            "1.a.1* 1.b.1* 1.a.2 1.b.2",
            id="two contexts",
        ),
        pytest.param(
            [(9, "a"), (8, "a"), (8, "b"), (7, "a"), (7, "b"), (6, "a")],
            "1.a.1* 1.a.2 1.b.2* 1.a.3 1.b.3 1.a.4",
            id="guidance in the middle of the run",
        ),
        pytest.param(
            [(9, "a"), (8, "b"), (8, "a"), (7, "b"), (7, "a"), (6, "b"), (6, "a")],
            "1.a.1* 1.b.1* 1.a.2 1.b.3* 1.a.3 1.b.4 1.a.4",
            id="guidance in the middle of the run, by the first call of a step: its second call tells its place",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (8, "a"), (7, "a"), (7, "b"), (6, "a"), (6, "b"), (5, "a"), (4, "a"), (4, "b")],
            "1.a.1* 1.b.1* 1.a.2 1.a.3 1.b.3* 1.a.4 1.b.4 1.a.5 1.a.6 1.b.6*",
            id="guidance that pauses",
        ),
        pytest.param(
            [(9, "b"), (9, "a"), (8, "b"), (8, "a"), (7, "a"), (6, "b"), (6, "a"), (5, "b")],
            "1.b.1* 1.a.1* 1.b.2 1.a.2 1.a.3 1.b.4* 1.a.4 1.b.5",
            id="guidance that pauses, the first call of a step",
        ),
        pytest.param(
            [(9, "a"), (8, "a"), (8, "b"), (8, "a"), (8, "b"), (7, "a"), (7, "b")],
            "1.a.1* 1.a.2 1.b.2* 1.a.3 1.b.3 1.a.4 1.b.4",
            id="guidance begins in a step of Heun's",
        ),
        pytest.param(
            [(9, "a"), (8, "b"), (8, "a"), (9, "b"), (9, "a"), (8, "b"), (8, "a")],
            "1.a.1* 1.b.1* 1.a.2 2.b.1* 2.a.1* 2.b.2 2.a.2",
            id="cut in the step in which guidance begins, and guided from the first step on",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (8, "a"), (7, "a"), (9, "a"), (8, "a"), (8, "b"), (7, "a"), (7, "b")],
            "1.a.1* 1.b.1* 1.a.2 1.a.3 2.a.1* 2.a.2 2.b.2* 2.a.3 2.b.3",
            id="the next run begins guidance later than the last one ended it",
        ),
        pytest.param(
            [(9, "a"), (8, "a"), (7, "a"), (6, "a"), (9, "b"), (8, "b"), (7, "b"), (6, "b")],
            "1.a.1* 1.a.2 1.a.3 1.a.4 1.b.1* 1.b.2 1.b.3 1.b.4",
            id="one context after the other",
        ),
        pytest.param(
            [(9, "a"), (8, "a"), (9, "b"), (8, "b"), (7, "a"), (6, "a"), (7, "b"), (6, "b")],
            "1.a.1* 1.a.2 1.b.1* 1.b.2 1.a.3 1.a.4 1.b.3 1.b.4",
            id="one context after the other, two steps at a time",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (8.5, "a"), (8, "b"), (8, "a"), (7, "b"), (7.5, "a"), (6, "b")],
            "1.a.1* 1.b.1* 1.a.2 1.b.2 1.a.3 1.b.3 1.a.4 1.b.4",
            id="generations in turns, one of half as many steps",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (8, "a"), (8, "b"), (9, "a"), (9, "b"), (8, "b")],
            "1.a.1* 1.b.1* 1.a.2 1.b.2 2.a.1* 2.b.1* 2.b.2",
            id="both enter the new run",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (9, "a"), (9, "b"), (8, "a"), (8, "b")],
            "1.a.1* 1.b.1* 2.a.1* 2.b.1* 2.a.2 2.b.2",
            id="begun again at the same first timestep",
        ),
        pytest.param(
            [(9, "a"), (9, "a"), (9, "b"), (8, "a"), (8, "b")],
            "1.a.1* 2.a.1* 2.b.1* 2.a.2 2.b.2",
            id="cut after the first call and begun again",
        ),
        pytest.param(
            [(9, "a"), (9, "b"), (8, "a"), (9, "a"), (9, "b"), (8, "a"), (8, "b")],
            "1.a.1* 1.b.1* 1.a.2 2.a.1* 2.b.1* 2.a.2 2.b.2",
            id="cut in mid-step",
        ),
        pytest.param(
            [(9, "a"), (8, "a"), (8, "a"), (7, "a"), (7, "a")],
            "1.a.1* 1.a.2 1.a.3 1.a.4 1.a.5",
            id="Heun",
        ),
        pytest.param(
            [(9, "high"), (8, "high"), (7, "low"), (6, "low"), (9, "high"), (8, "high"), (7, "low")],
            "1.high.1* 1.high.2 1.low.1* 1.low.2 2.high.1* 2.high.2 2.low.1*",
            id="experts in sequence",
        ),
    ],
)
def test_named_contexts(calls: Sequence[tuple[float, str]], expected: str) -> None:
    assert counted(*calls) == expected


def test_two_named_generations_that_interleave_keep_their_steps_apart() -> None:
    """One may begin, jump and end while the other is under way."""
    first, second = [9.0, 8.0, 7.0, 6.0, 9.0, 8.0], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    calls: list[Call] = [call for a, b in zip(first, second, strict=True) for call in ((a, "first"), (b, "second"))]
    ticks = ticked(StepClock(), calls)
    assert [(t.step, t.fresh) for t in ticks[::2]] == [(1, True), (2, False), (3, False), (4, False), (1, True), (2, False)]
    assert [(t.step, t.fresh) for t in ticks[1::2]] == [(1, True), *((n, False) for n in range(2, 7))]


def test_names_and_turns_may_mix_in_one_run() -> None:
    assert counted((9, "a"), 9, 9, (8, "a"), 8, 8) == "1.a.1* 1.1.1* 1.2.1* 1.a.2 1.1.2 1.2.2"


def test_a_context_that_is_dropped_begins_again() -> None:
    clock = StepClock()
    ticked(clock, [(9, "a"), (9, "b"), (8, "a"), (8, "b")])
    clock.forget_context("a")
    assert shown(ticked(clock, [(7, "a"), (7, "b")])) == "1.a.1* 1.b.3"
    clock.forget_context("unknown")
    clock.forget_context(1)


def test_new_run_begins_one_with_the_next_call() -> None:
    clock = StepClock()
    assert shown(ticked(clock, [9, 8])) == "1.1.1* 1.1.2"
    clock.new_run(num_steps=5)
    assert not clock.running
    assert shown(ticked(clock, [7, 6])) == "2.1.1* 2.1.2"
    assert clock.running
    clock.new_run()
    assert shown(ticked(clock, [(6, "a"), (6, "b"), (5, "a")])) == "3.a.1* 3.b.1* 3.a.2"
    clock.new_run()
    assert shown(ticked(clock, [(4, "a"), (4, "b")])) == "4.a.1* 4.b.1*"


def test_the_end_of_a_run_is_followed_by_a_new_one_at_any_timestep() -> None:
    clock = StepClock()
    ticked(clock, [9, 9, 8, 8])
    clock.end_run()
    assert shown(ticked(clock, [7, 7, 6, 6])) == "2.1.1* 2.2.1* 2.1.2 2.2.2"


def test_without_timesteps_every_call_is_a_step_until_new_run() -> None:
    clock = StepClock()
    assert not clock.manual
    clock.new_run(num_steps=3)
    assert clock.manual
    assert shown(ticked(clock, [None, None, None])) == "1.1.1* 1.1.2 1.1.3"
    clock.new_run()
    assert shown(ticked(clock, [None, None])) == "2.1.1* 2.1.2"
    clock.new_run()
    assert shown(ticked(clock, [(None, "a"), (None, "b"), (None, "a"), (None, "b")])) == "3.a.1* 3.b.1* 3.a.2 3.b.2"


SIGMAS = (9.0, 6.0, 3.0, 6.0, 3.0, 0.0)


def test_a_jump_to_a_level_that_the_run_lists_is_a_step() -> None:
    clock = StepClock()
    clock.new_run(sigmas=SIGMAS)
    assert (clock.num_steps, clock.sigmas) == (5, SIGMAS)
    assert shown(ticked(clock, SIGMAS[:-1])) == "1.1.1* 1.1.2 1.1.3 1.1.4 1.1.5"
    clock.new_run(sigmas=SIGMAS)
    assert shown(ticked(clock, [(s, "a") for s in SIGMAS[:-1]])) == "2.a.1* 2.a.2 2.a.3 2.a.4 2.a.5"


def test_a_jump_above_the_first_level_does_not_turn_the_run_around() -> None:
    levels = (8.0, 5.0, 9.0, 6.0, 3.0, 0.0)
    clock = StepClock()
    clock.new_run(sigmas=levels)
    assert shown(ticked(clock, levels[:-1])) == "1.1.1* 1.1.2 1.1.3 1.1.4 1.1.5"


def test_a_jump_to_any_other_level_begins_a_run_that_has_no_levels() -> None:
    clock = StepClock()
    clock.new_run(num_steps=5, sigmas=SIGMAS)
    assert shown(ticked(clock, [9, 6, 3, 7])) == "1.1.1* 1.1.2 1.1.3 2.1.1*"
    assert (clock.num_steps, clock.sigmas) == (None, None)
    assert shown(ticked(clock, [3, 6])) == "2.1.2 3.1.1*"


@pytest.mark.parametrize("name", [None, "a"])
def test_a_run_that_nobody_announced_is_found_behind_one_with_levels(name: str | None) -> None:
    """It begins where the last one began: no sampler goes back there within a run."""
    clock = StepClock()
    clock.new_run(sigmas=(9.0, 6.0, 3.0, 0.0))
    ticks = [clock.tick(time, name) for time in (9.0, 6.0, 3.0, 9.0, 6.0)]
    assert [(t.run, t.step, t.fresh) for t in ticks] == [
        *((1, 1, True), (1, 2, False), (1, 3, False)),
        *((2, 1, True), (2, 2, False)),
    ]
    assert clock.sigmas is None


@pytest.mark.parametrize("unit", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_listed_levels_are_known_again_in_the_precision_and_unit_of_the_model(dtype: torch.dtype, unit: float) -> None:
    sigmas = (0.99, 0.61, 0.33, 0.67, 0.35, 0.0)
    clock = StepClock()
    clock.new_run(sigmas=sigmas)
    ticks = ticked(clock, (torch.tensor(sigmas[:-1]) * unit).to(dtype).tolist())
    assert [tick.step for tick in ticks] == [1, 2, 3, 4, 5]
    assert clock.tick(0.9 * unit).fresh, "not listed"


def test_the_schedule_belongs_to_the_run_it_was_given_for() -> None:
    clock = StepClock()
    clock.announce(4, (9.0, 8.0, 7.0, 6.0, 0.0))
    assert not clock.manual
    ticked(clock, [9, 9, 8, 8])
    assert clock.num_steps == 4
    ticked(clock, [7, 6])
    assert clock.num_steps is None, "the pattern broke: the steps are counted anew"
    clock.new_run(num_steps=7)
    ticked(clock, [(9, "a"), (9, "b"), (8, "a"), (8, "b")])
    assert clock.num_steps == 7, "a second context enters the same run"
    ticked(clock, [(9, "a")])
    assert clock.num_steps is None


# ---- properties ------------------------------------------------------------------------------------------------------

# Timesteps of a run, descending; mirrored for the models in which time flows the other way.
times = st.lists(st.integers(1, 999), min_size=2, max_size=12, unique=True).map(lambda t: sorted(map(float, t), reverse=True))
FIRST = 1000.0


@st.composite
def runs(draw: st.DrawFn, named: bool | None = None) -> tuple[list[list[Call]], int, bool]:
    """Several runs of k contexts, all from the same first timestep; k; whether the contexts are named."""
    k = draw(st.integers(1, 4))
    names = draw(st.booleans()) if named is None else named
    mirrored = draw(st.booleans())
    result: list[list[Call]] = []
    for _ in range(draw(st.integers(1, 4))):
        steps = [FIRST, *draw(times)]
        signed = [-time for time in steps] if mirrored else steps
        result.append([(time, str(c)) if names else time for time in signed for c in range(1, k + 1)])
    return result, k, names


def place(index: int, k: int, named: bool) -> tuple[ContextKey, int]:
    """Context and step of the call at a place in its run."""
    context = index % k + 1
    return (str(context) if named else context), index // k + 1


@given(runs())
def test_every_call_of_whole_runs_has_its_run_context_and_step(given_runs: tuple[list[list[Call]], int, bool]) -> None:
    sequence, k, named = given_runs
    clock = StepClock()
    for number, calls in enumerate(sequence, start=1):
        for index, tick in enumerate(ticked(clock, calls)):
            context, step = place(index, k, named)
            assert tick == Tick(number, context, step, step == 1, False)


@given(runs(), st.data())
def test_nothing_of_a_run_that_was_cut_is_used_in_the_next(
    given_runs: tuple[list[list[Call]], int, bool], data: st.DataObject
) -> None:
    """Runs cut anywhere behind their first step; the next one begins against the direction."""
    sequence, k, named = given_runs
    clock = StepClock()
    for calls in sequence:
        cut = data.draw(st.integers(k + 1, len(calls)))
        for index, tick in enumerate(ticked(clock, calls[:cut])):
            context, step = place(index, k, named)
            assert (tick.context, tick.step, tick.fresh) == (context, step, step == 1)


@given(runs(named=True), st.data())
def test_named_contexts_survive_a_cut_in_the_first_step_too(
    given_runs: tuple[list[list[Call]], int, bool], data: st.DataObject
) -> None:
    sequence, k, _ = given_runs
    clock = StepClock()
    for calls in sequence:
        cut = data.draw(st.integers(1, len(calls)))
        for index, tick in enumerate(ticked(clock, calls[:cut])):
            context, step = place(index, k, True)
            assert (tick.context, tick.step, tick.fresh) == (context, step, step == 1)


@st.composite
def guided(draw: st.DrawFn, steps: int, least: int) -> set[int]:
    """Steps, from 1, of a context that is left out at others: stretches of ``least`` steps and more."""
    wanted = draw(st.lists(st.booleans(), min_size=steps, max_size=steps))
    stretches = [(n, n + least) for n, begins in enumerate(wanted, start=1) if begins and n + least - 1 <= steps]
    return {n for begin, end in stretches for n in range(begin, end)}


def sampling(steps: Sequence[float], parts: dict[str, set[int]], order: Sequence[str]) -> list[tuple[tuple[float, str], int]]:
    """The calls of a run, each with the sampler's step; contexts that are not among the parts are called at all of them."""
    return [
        ((time, name), n) for n, time in enumerate(steps, start=1) for name in order if n in parts.get(name, {n})
    ]


@given(st.lists(times, min_size=1, max_size=3), st.booleans(), st.integers(1, 2), st.data())
def test_contexts_that_come_late_or_pause_are_at_the_step_of_the_one_that_goes_on(
    sequence: list[list[float]], mirrored: bool, guidances: int, data: st.DataObject
) -> None:
    """What is stored is used where the step before was called in the same run, and nowhere else."""
    clock = StepClock()
    names = [f"guidance {n}" for n in range(guidances)]
    for number, later in enumerate(sequence, start=1):
        steps = [-time if mirrored else time for time in (FIRST, *later)]
        parts = {name: data.draw(guided(len(steps), 1)) for name in names}
        for (time, name), n in sampling(steps, parts, ["cond", *names]):
            fresh = n == 1 or n - 1 not in parts.get(name, {n - 1})
            assert clock.tick(time, name) == Tick(number, name, n, fresh, False)


@given(times, st.booleans(), st.data())
def test_a_context_that_pauses_and_is_the_first_to_make_its_step_uses_nothing_from_before(
    later: list[float], mirrored: bool, data: st.DataObject
) -> None:
    steps = [-time if mirrored else time for time in (FIRST, *later)]
    parts = {"uncond": data.draw(guided(len(steps), 2))}
    clock = StepClock()
    for (time, name), n in sampling(steps, parts, ["uncond", "cond"]):
        tick = clock.tick(time, name)
        entered = name == "uncond" and n == min(parts["uncond"])
        # who comes first has nobody to tell its step by, until the next call
        assert tick.step == (1 if entered else n)
        assert tick.fresh or n - 1 in parts.get(name, {n - 1})
        assert tick.fresh == (n == 1) or name == "uncond"


@given(times, times, st.booleans(), st.data())
def test_generations_that_take_turns_count_their_own_steps(
    first: list[float], second: list[float], same: bool, data: st.DataObject
) -> None:
    """In any turns where they have the same timesteps, else in fair ones: some unfair ones look like guidance that pauses."""
    runs = {"first": [FIRST, *first], "second": [FIRST, *(first if same else second)]}
    clock, made = StepClock(), {"first": 0, "second": 0}
    if same:
        turns = data.draw(st.permutations([name for name, steps in runs.items() for _ in steps]))
    else:
        length = min(map(len, runs.values()))
        turns = ["first", "second"] * length
    for name in turns:
        time = runs[name][made[name]]
        made[name] += 1
        tick = clock.tick(time, name)
        assert (tick.context, tick.step, tick.fresh) == (name, made[name], made[name] == 1)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=8), st.integers(1, 3))
def test_numbers_of_contexts_that_change_never_mix_contexts_once_the_clock_has_noticed(counts: list[int], length: int) -> None:
    """Any pattern at all: a call that is not fresh follows a fresh one of its context, one step later, in the same run."""
    clock = StepClock()
    last: dict[ContextKey, Tick] = {}
    for step, count in enumerate(itertools.chain.from_iterable(itertools.repeat(c, length) for c in counts)):
        for _ in range(count):
            tick = clock.tick(100.0 - step)
            if not tick.fresh:
                before = last[tick.context]
                assert (before.run, before.step) == (tick.run, tick.step - 1)
            last[tick.context] = tick


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(2, 5))
def test_another_number_of_contexts_in_mid_run_is_found_out_within_a_step(k: int, steps: int, changed: int, more: int) -> None:
    clock = StepClock()
    ticked(clock, [100.0 - step for step in range(steps) for _ in range(k)])
    ticks = ticked(clock, [50.0 - step for step in range(1 + more) for _ in range(changed)])[changed:]
    already = steps + 1 if changed == k else 0
    for index, tick in enumerate(ticks):
        context, step = place(index, changed, False)
        assert (tick.context, tick.step) == (context, step + already)
        assert tick.fresh == (tick.step == 1)


@given(st.lists(st.one_of(st.floats(allow_nan=False), st.none()), max_size=60), st.booleans())
def test_any_timesteps_at_all_are_counted(timesteps: list[float | None], named: bool) -> None:
    clock = StepClock()
    run = 0
    for time in timesteps:
        tick = clock.tick(time, "a" if named else None)
        assert tick.run >= run
        assert tick.fresh == (tick.step == 1)
        run = tick.run


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        ([9, 5, 8, 6], [(5, 8)]),
        ([0, 4, 1, 3], [(4, 1)]),
        ([9, 9, 7, 7], []),
        ([0, 0, 2, 2], []),
        ([9, 7, 7, 8, 8, 6], [(7, 8)]),
        ([5, 7, 5], []),
        ([5], []),
        ([], []),
    ],
)
def test_the_jumps_of_a_list_are_its_steps_against_its_direction(
    sigmas: list[float], expected: list[tuple[float, float]]
) -> None:
    """As they are listed, and in thousandths."""
    assert listed_jumps(sigmas) == tuple((a * unit, b * unit) for a, b in expected for unit in (1.0, 1000.0))


@pytest.mark.parametrize(
    ("sigmas", "steps"),
    [
        ([9, 5, 8, 8, 6, 0], [3]),
        ([0, 4, 1, 1, 3, 9], [3]),
        ([9, 7, 5, 3, 1, 0], []),
        ([9, 5, 8, 4, 6, 0], [3, 5]),
        ([5, 8, 3, 0], [2]),
    ],
)
def test_the_steps_at_which_the_levels_jump_back(sigmas: list[float], steps: list[int]) -> None:
    clock = StepClock()
    clock.new_run(sigmas=sigmas)
    assert clock.restarts == bool(steps)
    assert [step for step in range(-1, 9) if clock.jumps_back(step)] == steps
    clock.end_run()
    assert not clock.restarts and not clock.jumps_back(3)


def test_several_unnamed_contexts_are_confirmed_by_the_second_step() -> None:
    clock = StepClock()
    clock.tick(9.0)
    assert not clock.is_unconfirmed(1, 2)
    clock.tick(9.0)
    assert clock.is_unconfirmed(1, 1) and clock.is_unconfirmed(1, 2)
    assert not clock.is_unconfirmed(1, 3)
    assert not clock.is_unconfirmed("name", 2)
    assert shown([clock.begin_anew(8.0)]) == "2.1.1*!"
