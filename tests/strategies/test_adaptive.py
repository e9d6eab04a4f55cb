"""The adaptive strategy: its clock, its guards, and the placement of computed steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.options import resolve_options
from cache_dit.strategies import StepView, Strategy, build_strategy
from cache_dit.strategies.least_error import least_error
from cache_dit.strategies.part_of_run import PartOfRun
from cache_dit.strategies.placement import (
    PlacementRules,
    computed_count,
    first_steps,
    noise_levels,
    place_steps,
    residual_time,
)
from cache_dit.strategies.sigma import SigmaSpaced

WHOLE = PartOfRun(0.0, 1.0)


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    return [shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]


def adaptive(**options: object) -> Strategy:
    return build_strategy(resolve_options({"strategy": "adaptive", **options}))


def simulate(
    strategy: Strategy,
    steps: int,
    *,
    increments: Sequence[float] | None = None,
    errors: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    num_steps: int | None = None,
    corrected: bool = False,
) -> list[tuple[bool, str]]:
    """One run as the runtime drives it: the front's change of step n is `increments[n - 1]`, known from step n + 1 on;
    the error of the forecast at a computed step n is `errors[n - 1]`, measured where a residual is stored."""
    decisions: list[tuple[bool, str]] = []
    hits, clock, increment, error = 0, 0.0, None, None
    for n in range(1, steps + 1):
        view = StepView(n, hits, num_steps, sigmas, (), clock, increment, error, corrected=corrected)
        decision = strategy.decide(view)
        decisions.append(tuple(decision))
        increment = increments[n - 1] if increments is not None and n > 1 else None
        hits = hits + 1 if decision.skip else 0
        clock = clock + (increment or 0.0) if decision.skip else 0.0
        if not decision.skip and n > 1 and errors is not None:
            error = errors[n - 1]
    return decisions


def computed(decisions: Sequence[tuple[bool, str]]) -> list[int]:
    return [n for n, (skip, _) in enumerate(decisions, start=1) if not skip]


QUIET = [0.01] * 100


# The clock.


def test_clock_has_its_own_warmup_and_bound() -> None:
    decisions = simulate(adaptive(), 20, increments=[1e-6] * 20, errors=QUIET)
    assert computed(decisions) == [1, 2, 9, 16]
    assert decisions[1] == (False, "warmup")
    assert decisions[2] == (True, "clock")
    assert decisions[8] == (False, "max_consecutive_hits")


def test_given_warmup_and_bound_bind_the_clock() -> None:
    strategy = adaptive(warmup_steps=5, max_consecutive_hits=2)
    assert computed(simulate(strategy, 14, increments=[1e-6] * 14, errors=QUIET)) == [1, 2, 3, 4, 5, 8, 11, 14]


def test_clock_looks_one_step_and_a_half_ahead() -> None:
    """0.04 a step against 0.15: skipped while a + 0.06 <= 0.15, so at a = 0, 0.04 and 0.08."""
    decisions = simulate(adaptive(tolerance=0.15), 14, increments=[0.04] * 14, errors=QUIET)
    assert computed(decisions) == [1, 2, 6, 10, 14]
    assert decisions[5] == (False, "clock")


def test_clock_follows_the_pace_of_the_front() -> None:
    increments = [0.08] * 10 + [0.01] * 10 + [0.08] * 10
    decisions = simulate(adaptive(tolerance=0.1), 30, increments=increments, errors=QUIET)
    assert computed(decisions[:10]) == list(range(1, 11))
    assert len(computed(decisions[11:20])) <= 2
    assert len(computed(decisions[22:])) == 8


@given(tolerance=st.floats(0.01, 1.0), seed=st.lists(st.floats(0.0, 0.3), min_size=30, max_size=30))
def test_more_tolerance_never_exceeds_its_promise(tolerance: float, seed: list[float]) -> None:
    """At each skipped step the change so far and half as much again of the newest increment fit the tolerance."""
    decisions = simulate(adaptive(tolerance=tolerance), 30, increments=seed, errors=QUIET)
    clock = 0.0
    for n, (skip, _) in enumerate(decisions, start=1):
        if skip:
            assert clock + 1.5 * seed[n - 2] <= tolerance + 1e-12
        clock = clock + seed[n - 1] if skip else 0.0


@pytest.mark.parametrize("increment", [math.nan, math.inf])
def test_broken_increments_compute(increment: float) -> None:
    decisions = simulate(adaptive(), 10, increments=[increment] * 10, errors=QUIET)
    assert computed(decisions) == list(range(1, 11))


# Until the first error has been measured, and the guard on it.


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_skip_interval_rules_until_an_error_is_measured(interval: int) -> None:
    decisions = simulate(adaptive(skip_interval=interval), 20, increments=[1e-6] * 20)
    for n, (skip, reason) in enumerate(decisions, start=1):
        assert not skip or n % interval == 0
        assert skip or reason in ("warmup", "interval", "max_consecutive_hits")


def test_without_increments_the_clock_keeps_to_the_interval() -> None:
    decisions = simulate(adaptive(), 10, errors=QUIET)
    assert [n for n, (skip, _) in enumerate(decisions, start=1) if skip] == [4, 6, 8, 10]


@pytest.mark.parametrize("options", [{}, {"target_speedup": 2.0}])
@pytest.mark.parametrize("bad", [0.51, math.inf, math.nan])
def test_error_guard_computes_until_the_error_falls(options: dict[str, object], bad: float) -> None:
    errors = [0.1] * 9 + [bad] * 11 + [0.1] * 10
    decisions = simulate(adaptive(**options), 30, increments=[1e-6] * 30, errors=errors, num_steps=30)
    first = next(n for n in computed(decisions) if n >= 10)
    assert first < 18
    assert not any(skip for skip, _ in decisions[first - 1 : 21])
    assert "error_guard" in [reason for _, reason in decisions[first:21]]
    assert any(skip for skip, _ in decisions[:first])
    assert any(skip for skip, _ in decisions[21:])


def test_an_error_of_half_the_residual_is_still_allowed() -> None:
    assert any(skip for skip, _ in simulate(adaptive(), 9, increments=[1e-6] * 9, errors=[0.5] * 9))


def test_runs_in_a_row_behave_alike() -> None:
    for strategy in (adaptive(), adaptive(target_speedup=3.0)):
        runs = [simulate(strategy, 28, increments=[0.02] * 28, errors=QUIET, sigmas=shifted(28)) for _ in range(50)]
        assert all(each == runs[0] for each in runs)


# Placement.


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (2.0, [1, 6, 10, 14, 16, 18, 20, 22, 23, 24, 25, 26, 27, 28]),
        (3.0, [1, 9, 14, 18, 21, 23, 25, 27, 28]),
        (4.0, [1, 10, 16, 20, 23, 26, 28]),
    ],
)
def test_placement_is_even_in_sigma(target: float, expected: list[int]) -> None:
    strategy = SigmaSpaced(target)
    decisions = simulate(strategy, 28, errors=QUIET, sigmas=shifted(28))
    assert computed(decisions) == expected
    assert {reason for _, reason in decisions} == {"placement"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (4.0, [1, 8, 14, 19, 23, 26, 28]),
        (1.12, [n for n in range(1, 29) if n not in (3, 5, 7)]),
    ],
)
def test_placement_on_shifted_levels(target: float, expected: list[int]) -> None:
    """Early steps change the residual much and move the state little; the last ones move it far and are never corrected."""
    decisions = simulate(adaptive(target_speedup=target), 28, errors=QUIET, sigmas=shifted(28), corrected=True)
    assert computed(decisions) == expected


@pytest.mark.parametrize("falling", [True, False])
def test_placement_on_linear_levels_is_denser_where_noise_is_left_and_at_the_end(falling: bool) -> None:
    sigmas = [1 - i / 28 if falling else i / 28 for i in range(29)]
    for known in (sigmas, None):
        strategy = adaptive(target_speedup=4.0)
        decisions = simulate(strategy, 28, errors=QUIET, sigmas=known, num_steps=28, corrected=True)
        assert computed(decisions) == [1, 5, 9, 14, 19, 24, 27]


def test_placement_without_correction_is_even_in_sigma() -> None:
    for sigmas in (shifted(28), None):
        decisions = simulate(adaptive(target_speedup=4.0), 28, errors=QUIET, sigmas=sigmas, num_steps=28)
        levels = noise_levels(28, sigmas)
        at = [levels[step - 1] for step in computed(decisions)]
        gaps = [before - after for before, after in pairwise(at)]
        assert len(at) == 7 and max(gaps) - min(gaps) < 0.11
        # what is behind the last computed step is not put right by the next one
        assert at[-1] < min(gaps) + 1e-9


def test_noise_levels_of_sigmas_that_say_nothing() -> None:
    even = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert noise_levels(4, None) == even
    assert noise_levels(4, [1.0, 0.5, 0.0]) == even
    assert noise_levels(4, [1.0, 0.5, 0.2, 0.5, 1.0]) == even
    assert noise_levels(4, [1.0, 0.5, 0.2, 0.0, -1.0]) == even
    # those of a part of a run are its own
    assert noise_levels(2, [0.6, 0.25, 0.0]) == [0.6, 0.25, 0.0]
    # σ of the older models counts as its share of noise
    assert noise_levels(2, [9.0, 1.0, 0.0]) == pytest.approx([0.9, 0.5, 0.0])
    # rising levels count as falling ones do, and those beyond the ends as the ends
    assert noise_levels(2, [0.0, 0.25, 1.0]) == [1.0, 0.75, 0.0]
    assert noise_levels(3, [0.8, 1.0, 0.4, 0.0]) == [0.8, 0.8, 0.4, 0.0]


def test_residual_time_is_noise_in_the_middle_and_its_logarithm_at_the_ends() -> None:
    assert residual_time([0.9, 0.5, 0.3]) == pytest.approx([0.0, 0.4, 0.6])
    # never back
    assert residual_time([0.9, 0.4, 0.6, 0.3]) == pytest.approx([0.0, 0.5, 0.7, 1.0])
    for k in range(1, 7):
        low, high = 0.3 / 2**k, 0.03 / 2**k
        assert residual_time([low * 2, max(low, 0.004)])[1] == pytest.approx(0.3 * math.log(low * 2 / max(low, 0.004)))
        assert residual_time([1.0 - max(high, 0.004), 1.0 - max(high * 2, 0.004)])[1] == pytest.approx(
            0.03 * math.log(max(high * 2, 0.004) / max(high, 0.004))
        )
    # both are joined without a bend, and end
    assert residual_time([0.301, 0.299])[1] == pytest.approx(0.002, rel=1e-2)
    assert residual_time([0.971, 0.969])[1] == pytest.approx(0.002, rel=2e-2)
    assert residual_time([1.0, 0.996, 0.004, 0.0])[::2] == pytest.approx([0.0, residual_time([0.996, 0.004])[1]])


@pytest.mark.parametrize(("interval", "start"), [(1, [1, 10]), (2, [1, 3]), (3, [1, 2]), (10, [1, 2])])
def test_second_computed_step_is_the_first_that_the_interval_does_not_let_skip(interval: int, start: list[int]) -> None:
    strategy = adaptive(target_speedup=4.0, skip_interval=interval)
    decisions = simulate(strategy, 28, errors=QUIET, sigmas=shifted(28))
    assert computed(decisions)[:2] == start
    assert len(computed(decisions)) == 7


@given(
    steps=st.integers(1, 80),
    target=st.floats(1.0, 8.0),
    warmup=st.integers(0, 6),
    interval=st.integers(1, 4),
    most=st.one_of(st.none(), st.integers(1, 8)),
    shift=st.floats(0.2, 8.0),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    corrected=st.booleans(),
)
def test_placement_properties(
    steps: int,
    target: float,
    warmup: int,
    interval: int,
    most: int | None,
    shift: float,
    part: tuple[float, float],
    corrected: bool,
) -> None:
    inside = PartOfRun(*sorted(part))
    rules = PlacementRules(target, warmup, interval, most, inside)
    placed = place_steps(rules, steps, tuple(shifted(steps, shift)), corrected)
    assert placed <= set(range(1, steps + 1))
    assert 1 in placed
    assert set(range(1, min(warmup, steps) + 1)) <= placed
    assert {n for n in range(1, steps + 1) if not inside.first(steps) <= n <= inside.last(steps)} <= placed
    assert len(placed) >= computed_count(steps, target)
    if most is not None:
        assert all(later - sooner - 1 <= most for sooner, later in pairwise([*sorted(placed), steps + 1]))


@given(steps=st.integers(1, 80), target=st.floats(1.0, 8.0), interval=st.integers(1, 4), shift=st.floats(0.2, 8.0))
def test_placement_computes_as_many_steps_as_asked(steps: int, target: float, interval: int, shift: float) -> None:
    rules = PlacementRules(target, 0, interval, None, WHOLE)
    count = computed_count(steps, target)
    fewest = sum(step <= steps for step in first_steps(0, interval))
    for sigmas, corrected in product((tuple(shifted(steps, shift)), None), (True, False)):
        found = len(place_steps(rules, steps, sigmas, corrected))
        if interval == 1 or steps / target >= 4:
            assert found == count
        # fewer are left than the first steps use up: one more keeps the rest from going without
        assert max(count, fewest) <= found <= max(count, fewest) + 1
    assert abs(count - steps / target) <= 0.5 or count == 1


@given(st.lists(st.floats(-1, 20), min_size=2, max_size=40), st.floats(1, 6), st.booleans())
def test_placement_takes_any_list_of_sigmas(sigmas: list[float], target: float, corrected: bool) -> None:
    steps = len(sigmas) - 1
    placed = place_steps(PlacementRules(target, 0, 1, None, WHOLE), steps, tuple(sigmas), corrected)
    assert len(placed) == computed_count(steps, target)


def test_sigmas_of_another_length_are_not_used() -> None:
    rules = PlacementRules(4.0, 0, 1, None, WHOLE)
    assert place_steps(rules, 28, tuple(shifted(20)), True) == place_steps(rules, 28, None, True)


def test_what_is_skipped_before_a_part_that_computes_is_corrected_like_the_rest() -> None:
    rules = PlacementRules(4.0, 0, 1, None, PartOfRun(0.0, 0.96))
    levels = noise_levels(28, None)
    time = residual_time(levels)
    # from step 1 to step 27, the first of those that compute at the end
    between, as_if_open = (
        least_error(time[:27], levels[:27], 4, None, ends=ends, corrected=True) for ends in (True, False)
    )
    assert place_steps(rules, 28, None, True) == {1, 27, 28, *(index + 1 for index in between)}
    assert between != as_if_open


def test_a_warmup_shares_the_budget() -> None:
    strategy = adaptive(target_speedup=2.0, warmup_steps=5)
    decisions = simulate(strategy, 20, errors=QUIET, num_steps=20)
    assert computed(decisions)[:5] == [1, 2, 3, 4, 5]
    assert len(computed(decisions)) == 10
    assert decisions[4] == (False, "warmup")


def test_a_warmup_that_uses_the_budget_up_leaves_half_the_density() -> None:
    decisions = simulate(adaptive(target_speedup=4.0, warmup_steps=8), 40, errors=QUIET, num_steps=40)
    assert len(computed(decisions)) == 8 + 4


def test_part_of_the_run_shares_the_budget() -> None:
    strategy = adaptive(target_speedup=2.0, start_percent=0.25, end_percent=0.9)
    decisions = simulate(strategy, 20, errors=QUIET, num_steps=20)
    assert len(computed(decisions)) == 10
    assert set(range(1, 6)) | {19, 20} <= set(computed(decisions))


@pytest.mark.parametrize(("target", "expected"), [(3.0, [1, 4, 7, 10]), (2.5, [1, 4, 6, 9, 11]), (1.0, range(1, 12))])
def test_a_run_of_unknown_length_computes_at_the_targets_rate(target: float, expected: Sequence[int]) -> None:
    decisions = simulate(adaptive(target_speedup=target, skip_interval=1), 11, errors=QUIET)
    assert computed(decisions) == list(expected)


def test_steps_past_the_end_compute_at_the_targets_rate() -> None:
    decisions = simulate(adaptive(target_speedup=3.0, skip_interval=1), 18, errors=QUIET, num_steps=9)
    # nine steps placed, then every third
    assert computed(decisions) == [1, 4, 8, 10, 13, 16]


def test_given_bound_binds_the_placement() -> None:
    strategy = adaptive(target_speedup=4.0, max_consecutive_hits=2)
    decisions = simulate(strategy, 28, errors=QUIET, sigmas=shifted(28))
    assert all(later - sooner <= 3 for sooner, later in pairwise([*computed(decisions), 29]))
    assert strategy.notes() == ["target_speedup_unreachable"]
    unknown = simulate(strategy, 28, errors=QUIET)
    assert (False, "max_consecutive_hits") in unknown
    assert adaptive(target_speedup=3.0, max_consecutive_hits=2).notes() == []
    assert adaptive(target_speedup=3.0, start_percent=0.1, max_consecutive_hits=1).notes() != []


def test_drift_computes_out_of_turn() -> None:
    strategy = adaptive(target_speedup=4.0, tolerance=0.1, skip_interval=1)
    calm = simulate(strategy, 16, increments=[0.2] * 16, errors=QUIET, num_steps=16)
    assert computed(calm) == [1, 5, 9, 14]
    decisions = simulate(strategy, 16, increments=[0.6] * 16, errors=QUIET, num_steps=16)
    assert (False, "clock") in decisions
    assert len(computed(decisions)) > 4


def test_placement_without_a_measured_error_keeps_to_the_interval() -> None:
    decisions = simulate(adaptive(target_speedup=4.0, skip_interval=3), 20, num_steps=20)
    assert all(n % 3 == 0 for n, (skip, _) in enumerate(decisions, start=1) if skip)
