"""The error from differences against the same error computed from the residuals, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_dit.forecasts import FORECASTS, Point, choose_forecast, forecast_error


def measured(truth: np.ndarray, stored: list[np.ndarray]) -> tuple[list[list[float]], float]:
    """What the program measures at a computed step."""
    chain = [truth, *stored]
    differences = [chain[k] - chain[k + 1] for k in range(len(stored))]
    gram = [[float(np.mean(a * b)) for b in differences] for a in differences]
    return gram, math.sqrt(float(np.mean(truth * truth)))


@given(seed=st.integers(0, 10_000), free=st.lists(st.floats(-3, 3), min_size=0, max_size=4))
def test_error_equals_the_direct_computation(seed: int, free: list[float]) -> None:
    weights = [1.0 - sum(free), *free]
    random = np.random.default_rng(seed)
    truth, *stored = random.normal(size=(len(weights) + 1, 64))
    gram, rms = measured(truth, stored)
    forecast = sum(weight * each for weight, each in zip(weights, stored, strict=True))
    direct = np.linalg.norm(truth - forecast) / np.linalg.norm(truth)
    assert forecast_error(weights, gram, rms) == pytest.approx(direct, rel=1e-9, abs=1e-12)


def test_error_of_small_changes_keeps_its_digits() -> None:
    base, slope, noise = np.random.default_rng(0).normal(size=(3, 4096))
    stored = [base + 1e-6 * k * slope for k in (1, 2)]
    truth = base + 1e-9 * noise
    gram, rms = measured(truth, stored)
    direct = np.linalg.norm(truth - (2 * stored[0] - stored[1])) / np.linalg.norm(truth)
    assert forecast_error((2.0, -1.0), gram, rms) == pytest.approx(direct, rel=1e-3)


@pytest.mark.parametrize("name", FORECASTS)
def test_error_of_every_forecast_on_a_curve(name: str) -> None:
    base, slope, bend = np.random.default_rng(1).normal(size=(3, 256))

    def residual(time: float) -> np.ndarray:
        return np.asarray(base + slope * time + bend * time**2)

    points = [Point(7, 0.5), Point(4, 0.7), Point(1, 0.95)]
    target = Point(9, 0.4)
    gram, rms = measured(residual(0.4), [residual(point.time or 0.0) for point in points])
    weights = FORECASTS[name].weights(points, target, 2)
    forecast = sum(w * residual(point.time or 0.0) for w, point in zip(weights, points, strict=True))
    direct = float(np.linalg.norm(residual(0.4) - forecast) / np.linalg.norm(residual(0.4)))
    assert forecast_error(weights, gram, rms) == pytest.approx(direct, abs=1e-7)
    assert name != "lagrange" or direct < 1e-12


def test_zero_and_broken_measurements() -> None:
    assert forecast_error((1.0,), [[0.0]], 0.0) == 0.0
    assert forecast_error((1.0,), [[1.0]], 0.0) == math.inf
    assert forecast_error((1.0,), [[-1e-20]], 1.0) == 0.0
    for bad in (math.nan, math.inf):
        assert forecast_error((1.0,), [[bad]], 1.0) == math.inf
        assert forecast_error((1.0,), [[1.0]], bad) == math.inf


def test_weights_beyond_the_measurement() -> None:
    assert forecast_error((1.0, 0.0, 0.0), [[4.0]], 4.0) == 0.5
    with pytest.raises(ValueError, match="1 residuals"):
        forecast_error((2.0, -1.0), [[4.0]], 4.0)


def test_choice() -> None:
    assert choose_forecast({}) == "reuse"
    # what is corrected later is better off with a line, whatever the last gap's end said
    assert choose_forecast({}, placed=True) == choose_forecast({"reuse": 0.1, "lagrange": 0.2}, placed=True) == "lagrange"
    assert choose_forecast({"reuse": 0.2, "lagrange": 0.1, "taylor": 0.15}) == "lagrange"
    assert choose_forecast({"taylor": 0.2, "lagrange": 0.2, "reuse": 0.2}) == "reuse"
    assert choose_forecast({"taylor": 0.1, "lagrange": 0.1, "reuse": 0.2}) == "taylor"
    assert choose_forecast({"reuse": math.nan, "taylor": 0.5}) == "taylor"
    assert choose_forecast({"reuse": math.inf, "taylor": math.nan}) == "reuse"
