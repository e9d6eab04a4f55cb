"""What every forecast promises of its weights, whatever the points."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.forecasts import FORECASTS, MAX_WEIGHT_SUM, Forecast, Point, forecast
from cache_dit.options import FORECASTS as FORECAST_OPTIONS

ALL = list(FORECASTS.values())
EVERY = pytest.mark.parametrize("rule", ALL, ids=[each.name for each in ALL])

times = st.one_of(st.none(), st.floats(min_value=-1000.0, max_value=1000.0, allow_nan=False))


@st.composite
def pasts(draw: st.DrawFn) -> tuple[list[Point], Point]:
    """Stored points, newest first, and a target after them; times known or not, equal, in any order."""
    steps = sorted(draw(st.sets(st.integers(1, 60), min_size=2, max_size=6)), reverse=True)
    target, *stored = [Point(step, draw(times)) for step in steps]
    return stored, target


def points(*steps_and_times: tuple[int, float | None]) -> list[Point]:
    return [Point(step, time) for step, time in steps_and_times]


def order_used(weights: tuple[float, ...]) -> int:
    return sum(weight != 0.0 for weight in weights) - 1


@EVERY
@given(past=pasts(), order=st.integers(0, 4))
def test_weights_sum_to_one_and_are_bounded(rule: Forecast, past: tuple[list[Point], Point], order: int) -> None:
    stored, target = past
    weights = rule.weights(stored, target, order)
    assert len(weights) == len(stored)
    assert math.isclose(sum(weights), 1.0, abs_tol=1e-9)
    assert sum(map(abs, weights)) <= MAX_WEIGHT_SUM
    assert order_used(weights) <= order
    if order == 0 or len(stored) == 1:
        assert weights == (1.0,) + (0.0,) * (len(stored) - 1)


@EVERY
@given(past=pasts(), order=st.integers(1, 3), shift=st.integers(1, 40))
def test_only_distances_in_steps_matter(rule: Forecast, past: tuple[list[Point], Point], order: int, shift: int) -> None:
    stored, target = past
    later = [Point(point.step + shift, point.time) for point in stored]
    expected = rule.weights(stored, target, order)
    assert rule.weights(later, Point(target.step + shift, target.time), order) == pytest.approx(expected)


@EVERY
def test_broken_times_and_shared_steps_end_in_finite_weights(rule: Forecast) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        stored = points((3, 0.5), (2, bad), (1, 1.0))
        for target in (Point(4, 0.2), Point(4, bad)):
            weights = rule.weights(stored, target, 2)
            assert math.isclose(sum(weights), 1.0, abs_tol=1e-9)
    assert math.isclose(sum(rule.weights(points((2, None), (2, None)), Point(3, None), 1)), 1.0)


@EVERY
def test_nothing_stored_is_refused(rule: Forecast) -> None:
    with pytest.raises(ValueError, match="at least one"):
        rule.weights([], Point(1, 1.0), 1)


def test_registry() -> None:
    assert {*FORECASTS, "auto"} == set(FORECAST_OPTIONS)
    assert all(forecast(name) is rule and rule.name == name for name, rule in FORECASTS.items())
    for unknown in ("auto", "cubic"):
        with pytest.raises(ValueError, match="'lagrange'"):
            forecast(unknown)


def polynomial(coefficients: list[float], at: float) -> float:
    return sum(coefficient * at**power for power, coefficient in enumerate(coefficients))


def predicted(rule: Forecast, stored: list[Point], target: Point, order: int, values: list[float]) -> float:
    return sum(w * value for w, value in zip(rule.weights(stored, target, order), values, strict=True))


SIGMAS = [3 * s / (1 + 2 * s) for s in (1.0, 0.95, 0.85, 0.8, 0.7)]
DOWN = points(*[(10 * n + 1, sigma) for n, sigma in enumerate(SIGMAS)])[::-1]
UP = points(*[(n + 1, 1.0 - sigma) for n, sigma in enumerate(SIGMAS)])[::-1]
ZIGZAG = points((9, 0.4), (7, 0.9), (4, 0.6), (2, 1.0), (1, 0.1))
coefficients = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


@pytest.mark.parametrize("stored", [DOWN, UP, ZIGZAG], ids=["falling", "rising", "neither"])
@pytest.mark.parametrize("order", [1, 2, 3])
@given(coefficients=coefficients, at=st.floats(0.35, 0.95))
def test_lagrange_is_exact_for_polynomials_in_time(
    stored: list[Point], order: int, coefficients: list[float], at: float
) -> None:
    target = Point(60, at)
    if order_used(forecast("lagrange").weights(stored, target, order)) < order:
        return  # the bound lowered it
    values = [polynomial(coefficients[: order + 1], point.time or 0.0) for point in stored]
    expected = polynomial(coefficients[: order + 1], at)
    assert predicted(forecast("lagrange"), stored, target, order, values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@given(coefficients=coefficients, gap=st.integers(1, 3))
def test_lagrange_without_times_is_exact_in_the_step(order: int, coefficients: list[float], gap: int) -> None:
    stored = points((12, None), (9, 0.5), (7, 0.7), (4, 0.8))
    target = Point(12 + gap, 0.3)
    weights = forecast("lagrange").weights(stored, target, order)
    used = order_used(weights)
    values = [polynomial(coefficients[: used + 1], point.step / 10) for point in stored]
    expected = polynomial(coefficients[: used + 1], target.step / 10)
    assert used == order or gap == 3
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_lagrange_of_order_1_is_the_line_in_sigma() -> None:
    weights = forecast("lagrange").weights(points((5, 0.8), (1, 1.0)), Point(6, 0.7), 1)
    assert weights == pytest.approx((1.5, -0.5))


def test_lagrange_interpolates_between_stored_points() -> None:
    stored = points((9, 0.2), (5, 0.6), (1, 1.0))
    assert forecast("lagrange").weights(stored, Point(5, 0.6), 2) == (0.0, 1.0, 0.0)
    assert forecast("lagrange").weights(stored, Point(7, 0.4), 2) == pytest.approx((0.375, 0.75, -0.125))


def test_lagrange_passes_over_equal_times() -> None:
    stored = points((5, 0.6), (4, 0.8), (3, 0.8), (2, 1.0), (1, 1.0))
    weights = forecast("lagrange").weights(stored, Point(6, 0.4), 2)
    assert weights == pytest.approx((3.0, -3.0, 0.0, 1.0, 0.0))
    alike = points((3, 0.5), (2, 0.5), (1, 0.5))
    assert forecast("lagrange").weights(alike, Point(4, 0.4), 2) == (1.0, 0.0, 0.0)


def test_order_falls_where_weights_explode() -> None:
    stored = points((9, 0.5), (8, 0.5001), (4, 0.9))
    assert forecast("lagrange").weights(stored, Point(10, 0.2), 1) == (1.0, 0.0, 0.0)
    far = points((3, None), (2, None), (1, None))
    assert order_used(forecast("lagrange").weights(far, Point(7, None), 2)) == 1
    assert order_used(forecast("taylor").weights(far, Point(7, None), 2)) == 1
    assert order_used(forecast("taylor").weights(far, Point(12, None), 2)) == 0


def taylorseer(stored: list[Point], target: Point, order: int, values: list[float]) -> float:
    """The published algorithm: differences updated at each computed step by that step's interval, then the series."""
    derivatives: list[float] = []
    for older, newer, value in zip([None, *stored[:0:-1]], stored[::-1], values[::-1], strict=True):
        updated = [value]
        for previous in derivatives[:order]:
            assert older is not None
            updated.append((updated[-1] - previous) / (newer.step - older.step))
        derivatives = updated
    x = target.step - stored[0].step
    return sum(derivative * x**k / math.factorial(k) for k, derivative in enumerate(derivatives))


@pytest.mark.parametrize("order", [1, 2, 3])
@given(gaps=st.lists(st.integers(1, 4), min_size=4, max_size=4), values=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_taylor_is_taylorseer(order: int, gaps: list[int], values: list[float]) -> None:
    steps = [1 + sum(gaps[:n]) for n in range(5)]
    target, *stored = [Point(step, None) for step in reversed(steps)]
    weights = forecast("taylor").weights(stored, target, order)
    # the bound may lower the order: then it is TaylorSeer's of that order
    found = sum(w * v for w, v in zip(weights, values, strict=True))
    expected = [taylorseer(stored, target, used, values) for used in range(order + 1)]
    assert any(math.isclose(found, each, abs_tol=1e-8) for each in expected)
    if max(gaps) == 1:
        assert math.isclose(found, expected[order], abs_tol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3])
@given(slope=st.floats(-3, 3), gaps=st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_taylor_is_exact_for_lines_in_the_step(order: int, slope: float, gaps: list[int]) -> None:
    steps = [1 + sum(gaps[:n]) for n in range(5)]
    target, *stored = [Point(step, time) for step, time in zip(reversed(steps), SIGMAS, strict=True)]
    if order_used(forecast("taylor").weights(stored, target, order)) == 0:
        return
    values = [0.5 + slope * point.step for point in stored]
    expected = 0.5 + slope * target.step
    assert predicted(forecast("taylor"), stored, target, order, values) == pytest.approx(expected, abs=1e-8)


def test_taylor_on_even_spacing_is_the_papers_formula() -> None:
    stored = points((9, None), (5, None), (1, None))
    x = 3 / 4
    assert forecast("taylor").weights(stored, Point(12, None), 1) == pytest.approx((1 + x, -x, 0))
    second = (1 + x + x * x / 2, -x - x * x, x * x / 2)
    assert forecast("taylor").weights(stored, Point(12, None), 2) == pytest.approx(second)


def test_hermite_is_the_contracted_series() -> None:
    stored = points((9, None), (5, None), (1, None))
    first, second = 0.5 * 2 * (0.5 * 3), 0.25 * (4 * (0.5 * 3) ** 2 - 2) / 2
    h = 1 / 4
    expected = (1 + first * h + second * h * h, -first * h - 2 * second * h * h, second * h * h)
    assert forecast("hermite").weights(stored, Point(12, None), 2) == pytest.approx(expected)
    third = 0.125 * (8 * 0.5**3 - 12 * 0.5) / 6
    four = points((4, None), (3, None), (2, None), (1, None))
    assert forecast("hermite").weights(four, Point(5, None), 3)[3] == pytest.approx(-third)


def test_hermite_of_order_1_is_taylor_damped_by_half() -> None:
    stored, target = points((9, None), (5, None)), Point(11, None)
    taylor, hermite = (forecast(name).weights(stored, target, 1) for name in ("taylor", "hermite"))
    assert hermite[1] == pytest.approx(taylor[1] / 2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_adams_bashforth_is_the_mean_over_the_next_interval(order: int) -> None:
    stored = points(*[(10 - 2 * n, None) for n in range(order + 1)])
    weights = forecast("adams_bashforth").weights(stored, Point(11, None), order)
    for power in range(order + 1):
        mean = 1 / (power + 1)  # of u**power over 0 … 1, the nodes at 0, -1, -2, …
        assert sum(w * (-n) ** power for n, w in enumerate(weights)) == pytest.approx(mean)


def test_reuse_takes_the_newest_alone() -> None:
    assert forecast("reuse").weights(points((9, 0.1), (5, 0.4), (1, 1.0)), Point(10, 0.05), 3) == (1.0, 0.0, 0.0)


def test_points_are_newest_first() -> None:
    assert all(newer.step > older.step for stored in (DOWN, UP, ZIGZAG) for newer, older in pairwise(stored))
