"""Where computed steps leave the least expected error: against trying every placement."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.strategies.least_error import ALWAYS, FIRST_OF_EQUALS, GROWTH, OPEN_END, least_error
from cache_dit.strategies.placement import residual_time

Run = tuple[list[float], list[float], int, int | None, bool]


def expected_error(t: list[float], levels: list[float], placed: list[int], ends: bool) -> float:
    """The model of the module's docstring, written down once more."""
    last = len(t) - 1
    w = [(1.0 + GROWTH * levels[m]) * abs(levels[m + 1] - levels[m]) for m in range(last)]
    total = 0.0
    for i, j in pairwise([0, *placed, *([last] if ends else [])]):
        total += sum(w[m] * (ALWAYS + (t[m] - t[i]) * (t[j] - t[m])) for m in range(i + 1, j)) ** 2
    if not ends:
        i = [0, *placed][-1]
        step = t[i] - t[i - 1] if i else t[1] - t[0]
        total += sum(w[m] * (ALWAYS + (t[m] - t[i]) * (t[m] - t[i] + step)) for m in range(i + 1, last)) ** 2
    return total


def unevenness(t: list[float], levels: list[float], placed: list[int], ends: bool) -> float:
    """What counts where nothing is corrected."""
    ends_of_gaps = pairwise([0, *placed, len(t) - 1])
    *inside, behind = [
        (1.0 + GROWTH * levels[i]) * ((t[j] - t[i]) ** 2 + FIRST_OF_EQUALS * (t[j - 1] - t[i]) ** 2) for i, j in ends_of_gaps
    ]
    return sum(inside) + (1.0 if ends else OPEN_END) * behind


@st.composite
def runs(draw: st.DrawFn) -> Run:
    steps = draw(st.integers(2, 11))
    falls = draw(st.lists(st.floats(0.01, 1), min_size=steps, max_size=steps))
    levels = [sum(falls[k:]) / sum(falls) for k in range(steps + 1)]
    time = [k / steps + 1.0 - level for k, level in enumerate(levels)]
    count = draw(st.integers(0, steps - 1))
    ends = draw(st.booleans())
    fewest = -(-(steps - 1) // (count + 1))
    bound = draw(st.one_of(st.none(), st.integers(max(1, fewest), steps)))
    return time, levels, count, bound, ends


@given(runs(), st.booleans())
def test_no_placement_has_less(run: Run, corrected: bool) -> None:
    time, levels, count, bound, ends = run
    last = len(time) - 1
    placed = least_error(time, levels, count, bound, ends=ends, corrected=corrected)
    assert len(placed) == count
    assert all(a < b for a, b in pairwise([0, *placed, last]))
    allowed = [
        list(each)
        for each in combinations(range(1, last), count)
        if bound is None or all(b - a - 1 <= bound for a, b in pairwise([0, *each, last]))
    ]
    assert placed in allowed
    cost = expected_error if corrected else unevenness
    least = min(cost(time, levels, each, ends) for each in allowed)
    assert cost(time, levels, placed, ends) <= least * (1 + 1e-9)


@pytest.mark.parametrize("corrected", [True, False])
def test_a_computed_step_that_follows_is_worth_a_longer_last_gap(corrected: bool) -> None:
    even = [1.0 - k / 12 for k in range(13)]
    time = [k / 12 for k in range(13)]
    open_end = least_error(time, even, 2, None, ends=False, corrected=corrected)
    closed = least_error(time, even, 2, None, ends=True, corrected=corrected)
    assert open_end[-1] > closed[-1]


def test_of_two_evaluations_at_one_level_the_first_computes() -> None:
    """As solvers of two evaluations a step have them: the second finds the residual of its own level."""
    levels = [1.0, *(level for k in range(9, 0, -1) for level in (k / 10, k / 10)), 0.0]
    placed = least_error([1.0 - level for level in levels], levels, 9, None, ends=False, corrected=False)
    assert placed == list(range(1, 18, 2))


def test_levels_that_stand_still_are_skipped_first() -> None:
    levels = [1.0, 0.8, 0.6, 0.6, 0.6, 0.4, 0.2, 0.0]
    time = [k / 7 for k in range(8)]
    placed = least_error(time, levels, 4, None, ends=False, corrected=True)
    assert {2, 3} - set(placed)


def test_a_run_of_a_thousand_steps_is_placed_too() -> None:
    levels = [1.0 - k / 1000 for k in range(1001)]
    placed = least_error(residual_time(levels), levels, 400, None, ends=False, corrected=True)
    assert len(placed) == 400
    assert placed == sorted(placed)
    # denser where noise is left, and again where little is
    gaps = [after - before for before, after in pairwise(placed)]
    assert max(gaps[:150]) == 2 and max(gaps[-25:-15]) == 5 and max(gaps[-4:]) == 2
