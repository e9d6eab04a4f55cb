"""Where computed steps leave the least expected error: against trying every placement."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.strategies.least_error import ALWAYS, NOISE_POWER, OPEN_END, least_error


def expected_error(time: list[float], levels: list[float], placed: list[int], ends: bool) -> float:
    """The model of the module's docstring, written down once more."""
    last = len(time) - 1
    unit = (time[-1] - time[0]) / (len(placed) + 1)
    t = [value / unit for value in time]
    w = [levels[m] ** NOISE_POWER * abs(levels[m + 1] - levels[m]) for m in range(last)]
    total = 0.0
    for i, j in pairwise([0, *placed, *([last] if ends else [])]):
        total += sum(w[m] * (ALWAYS + (t[m] - t[i]) * (t[j] - t[m])) for m in range(i + 1, j)) ** 2
    if not ends:
        i = [0, *placed][-1]
        total += (OPEN_END * sum(w[m] * (ALWAYS + (t[m] - t[i]) * (t[m] - t[i] + 1)) for m in range(i + 1, last))) ** 2
    return total


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[float], list[float], int, int | None, bool]:
    steps = draw(st.integers(2, 11))
    falls = draw(st.lists(st.floats(0.01, 1), min_size=steps, max_size=steps))
    levels = [sum(falls[k:]) / sum(falls) for k in range(steps + 1)]
    time = [k / steps + 1.0 - level for k, level in enumerate(levels)]
    count = draw(st.integers(0, steps - 1))
    ends = draw(st.booleans())
    fewest = -(-(steps - 1) // (count + 1))
    bound = draw(st.one_of(st.none(), st.integers(max(1, fewest), steps)))
    return time, levels, count, bound, ends


@given(runs())
def test_no_placement_has_less(run: tuple[list[float], list[float], int, int | None, bool]) -> None:
    time, levels, count, bound, ends = run
    last = len(time) - 1
    placed = least_error(time, levels, count, bound, ends=ends)
    assert len(placed) == count
    assert all(a < b for a, b in pairwise([0, *placed, last]))
    allowed = [
        list(each)
        for each in combinations(range(1, last), count)
        if bound is None or all(b - a - 1 <= bound for a, b in pairwise([0, *each, last]))
    ]
    assert placed in allowed
    least = min(expected_error(time, levels, each, ends) for each in allowed)
    assert expected_error(time, levels, placed, ends) <= least * (1 + 1e-9)


def test_a_computed_step_that_follows_is_worth_a_longer_last_gap() -> None:
    even = [1.0 - k / 12 for k in range(13)]
    time = [k / 12 for k in range(13)]
    open_end = least_error(time, even, 2, None, ends=False)
    closed = least_error(time, even, 2, None, ends=True)
    assert open_end[-1] > closed[-1]


def test_levels_that_stand_still_are_skipped_first() -> None:
    levels = [1.0, 0.8, 0.6, 0.6, 0.6, 0.4, 0.2, 0.0]
    time = [k / 7 for k in range(8)]
    placed = least_error(time, levels, 4, None, ends=False)
    assert {2, 3} - set(placed)


def test_a_run_of_a_thousand_steps_is_placed_too() -> None:
    time = [k / 1000 for k in range(1001)]
    placed = least_error(time, [1.0 - t for t in time], 400, None, ends=False)
    assert len(placed) == 400
    assert placed == pytest.approx(sorted(placed))
    # denser where noise is left
    assert placed[199] < 500
