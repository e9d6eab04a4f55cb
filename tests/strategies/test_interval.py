"""The fixed and the dynamic strategy against their formulas, and the explicit mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.options import STRATEGIES as STRATEGY_OPTIONS
from cache_dit.options import CacheOptions, resolve_options
from cache_dit.strategies import STRATEGIES, StepView, Strategy, build_strategy

VIEW = StepView(
    step=1,
    consecutive_hits=0,
    num_steps=None,
    sigmas=None,
    stored=(),
    clock=0.0,
    last_increment=None,
    forecast_error=None,
)


def run(strategy: Strategy, steps: int = 60, view: StepView = VIEW) -> dict[int, tuple[bool, str]]:
    """The decisions of one run, by step."""
    decisions: dict[int, tuple[bool, str]] = {}
    hits = 0
    for step in range(1, steps + 1):
        decision = strategy.decide(replace(view, step=step, consecutive_hits=hits))
        hits = hits + 1 if decision.skip else 0
        decisions[step] = tuple(decision)
    return decisions


def skipped(strategy: Strategy, steps: int = 60, view: StepView = VIEW) -> list[int]:
    return [step for step, (skip, _) in run(strategy, steps, view).items() if skip]


def built(**options: object) -> Strategy:
    return build_strategy(resolve_options(options))


def by_formula(steps: int, interval_at: list[int], warmup: int, most: int) -> list[int]:
    found: list[int] = []
    for n in range(1, steps + 1):
        in_a_row = all(n - back in found for back in range(1, most + 1))
        if n > warmup and n % interval_at[n] == 0 and not in_a_row:
            found.append(n)
    return found


@given(interval=st.integers(1, 12), warmup=st.integers(0, 20), most=st.one_of(st.none(), st.integers(1, 8)))
def test_fixed_follows_its_formula(interval: int, warmup: int, most: int | None) -> None:
    strategy = built(strategy="fixed", skip_interval=interval, warmup_steps=warmup, max_consecutive_hits=most)
    assert skipped(strategy) == by_formula(60, [interval] * 61, warmup, most or 4)


@given(interval=st.integers(1, 12), warmup=st.integers(0, 20), most=st.one_of(st.none(), st.integers(1, 8)))
def test_dynamic_follows_its_formula(interval: int, warmup: int, most: int | None) -> None:
    strategy = built(strategy="dynamic", skip_interval=interval, warmup_steps=warmup, max_consecutive_hits=most)
    intervals = [max(1, interval - (n - warmup) // 10) for n in range(61)]
    assert skipped(strategy) == by_formula(60, intervals, warmup, most or 4)


def test_fixed_by_default() -> None:
    assert skipped(built(), 20) == [4, 6, 8, 10, 12, 14, 16, 18, 20]
    reasons = run(built(), 5)
    assert reasons == {n: (False, "warmup") for n in (1, 2, 3)} | {4: (True, "interval"), 5: (False, "interval")}


def test_dynamic_as_recommended_for_batches() -> None:
    """interval 3 up to step 11, 2 up to 21, then 1 with four in a row."""
    expected = [3, 6, 9, 12, 14, 16, 18, 20, 22, 23, 24, 25, 27, 28, 29, 30]
    strategy = built(strategy="dynamic", skip_interval=3, warmup_steps=2)
    assert skipped(strategy, 30) == expected
    assert run(strategy, 30)[26] == (False, "max_consecutive_hits")


def test_interval_of_one_computes_again() -> None:
    strategy = built(skip_interval=1)
    assert skipped(strategy, 15) == [4, 5, 6, 7, 9, 10, 11, 12, 14, 15]
    assert skipped(built(skip_interval=1, max_consecutive_hits=1), 8) == [4, 6, 8]


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_warmup_defaults_to_three(name: str) -> None:
    options = CacheOptions(strategy=name, skip_interval=1, warmup_steps=None)
    assert skipped(build_strategy(options), 5) == [4, 5]


def test_schedule_overrides_and_ends() -> None:
    strategy = built(schedule="110000001", strategy="dynamic", warmup_steps=9, max_consecutive_hits=1)
    assert skipped(strategy, 20) == [3, 4, 5, 6, 7, 8]
    assert run(strategy, 20)[9] == (False, "schedule")
    assert run(strategy, 20)[10] == (False, "schedule_end")
    assert skipped(strategy, 4) == [3, 4]


def test_schedule_that_starts_with_a_skip_leaves_that_to_the_runtime() -> None:
    assert skipped(built(schedule=[False, True, False]), 4) == [1, 3]


@pytest.mark.parametrize(
    ("options", "never"),
    [
        ({}, False),
        ({"schedule": "111"}, True),
        ({"schedule": "011"}, True),
        ({"schedule": "110"}, False),
        ({"strategy": "dynamic"}, False),
        ({"strategy": "adaptive"}, False),
        ({"strategy": "adaptive", "target_speedup": 1.0}, True),
        ({"strategy": "adaptive", "target_speedup": 2.0}, False),
        ({"schedule": "111", "start_percent": 0.5}, True),
    ],
)
def test_never_skips(options: dict[str, object], never: bool) -> None:
    strategy = built(**options)
    assert strategy.never_skips() is never
    if never:
        assert not [step for step in skipped(strategy, 30) if step > 1]


def test_registry() -> None:
    assert set(STRATEGIES) == set(STRATEGY_OPTIONS)
    with pytest.raises(ValueError, match=r"'eager'.*'fixed'"):
        build_strategy(replace(CacheOptions(), strategy="eager"))


@pytest.mark.parametrize(
    ("part", "steps", "inside"),
    [
        ((0.25, 0.75), 20, range(6, 16)),
        ((0.3, 0.7), 10, range(4, 8)),
        ((0.1, 0.3), 30, range(4, 10)),
        ((0.07, 1.0), 100, range(8, 101)),
        ((0.0, 0.29), 100, range(1, 30)),
        ((0.0, 0.5), 7, range(1, 4)),
        ((0.5, 1.0), 7, range(5, 8)),
        ((0.5, 0.5), 7, range(0)),
        ((0.0, 0.0), 7, range(0)),
        ((1.0, 1.0), 7, range(0)),
    ],
)
def test_part_of_run(part: tuple[float, float], steps: int, inside: range) -> None:
    strategy = built(schedule="0" * 100, start_percent=part[0], end_percent=part[1])
    view = replace(VIEW, num_steps=steps)
    assert skipped(strategy, steps, view) == list(inside)
    outside = [decision for step, decision in run(strategy, steps, view).items() if step not in inside]
    assert set(outside) <= {(False, "outside_range")}


def test_part_of_run_follows_the_sigmas_and_is_ignored_without_a_length() -> None:
    strategy = built(start_percent=0.5)
    assert skipped(strategy, 20, replace(VIEW, sigmas=[1.0] * 21)) == [12, 14, 16, 18, 20]
    assert skipped(strategy, 20) == skipped(built(), 20)
    assert run(strategy, 25, replace(VIEW, num_steps=20))[24] == (False, "outside_range")


@given(start=st.floats(0, 1), end=st.floats(0, 1), steps=st.integers(1, 200))
def test_part_of_run_holds_whole_steps(start: float, end: float, steps: int) -> None:
    start, end = sorted((start, end))
    strategy = built(schedule="0" * 200, start_percent=start, end_percent=end)
    for n in skipped(strategy, steps, replace(VIEW, num_steps=steps)):
        assert (n - 1) / steps >= start - 1e-9
        assert n / steps <= end + 1e-9
