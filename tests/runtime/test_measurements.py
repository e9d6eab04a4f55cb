"""What the runtime reads from the statistics of a computed step, against residuals written out."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, pairwise

import pytest
import torch

from cache_dit.forecasts import FORECASTS, Point
from cache_dit.runtime import measurements
from cache_dit.runtime.buffers import Measurement

# Times at which residuals were computed, newest first, and the time of the step measured.
BEFORE = (Point(5, 0.5), Point(3, 0.8), Point(2, 0.9))
TARGET = Point(7, 0.25)


def statistics(target: torch.Tensor, stored: list[torch.Tensor]) -> list[float]:
    """As a program gives them: not finite, mean square, the upper triangle of the Gram matrix of neighbours' differences."""
    differences = [before - after for before, after in pairwise([target, *stored])]
    pairs = combinations_with_replacement(range(len(stored)), 2)
    gram = [float((differences[a] * differences[b]).mean()) for a, b in pairs]
    return [float((~target.isfinite()).sum()), float(target.square().mean()), *gram]


def measured(values: list[float], stored: int) -> Measurement:
    return Measurement(torch.tensor(values, dtype=torch.float64), torch.zeros(0), BEFORE[:stored], TARGET)


def residuals(seed: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("history", [1, 2, 3])
def test_the_statistics_of_each_live_out_come_apart(history: int) -> None:
    length = 2 + history * (history + 1) // 2
    values = [float(i) for i in range(3 * length)]
    assert measurements.read(measured(values, 1), history) == [values[i * length : (i + 1) * length] for i in range(3)]


def test_what_the_ranks_agreed_on_holds() -> None:
    pending = measured([0.0, 1.0, 2.0], 1)
    pending.agreed = lambda: [0.0, 4.0, 8.0]
    assert measurements.read(pending, 1) == [[0.0, 4.0, 8.0]]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("count", "square", "finite"),
    [(0.0, 2.0, True), (0.0, 0.0, True), (1.0, 2.0, False), (0.5, 2.0, False), (0.0, math.inf, False), (0.0, math.nan, False)],
)
def test_one_live_out_that_is_not_finite_is_enough(which: int, count: float, square: float, finite: bool) -> None:
    parts = [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    parts[which] = [count, square, 1.0]
    assert measurements.are_finite(parts) is finite


@pytest.mark.parametrize("stored", [1, 2, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_a_forecasts_error_is_that_of_the_residual_it_would_have_given(stored: int, order: int) -> None:
    """Where fewer residuals are stored than there is room for, the rows of the others do not count."""
    target, *kept = residuals(0)
    names = tuple(FORECASTS)
    found = measurements.forecast_errors(measured([], stored), [statistics(target, kept)], 3, names, order)
    assert list(found) == list(names)
    for name in names:
        weights = FORECASTS[name].weights(BEFORE[:stored], TARGET, order)
        given = sum(weight * residual for weight, residual in zip(weights, kept, strict=False))
        wanted = float((given - target).square().mean().sqrt() / target.square().mean().sqrt())
        assert found[name] == pytest.approx(wanted, rel=1e-9)


def test_of_several_live_outs_the_largest_error_counts() -> None:
    (target, *kept), (other, *also) = residuals(0), residuals(1)
    parts = [statistics(target, kept), statistics(other, [other + 5.0 * each for each in also])]
    together = measurements.forecast_errors(measured([], 2), parts, 3, ("reuse",), 1)
    apart = [measurements.forecast_errors(measured([], 2), [part], 3, ("reuse",), 1)["reuse"] for part in parts]
    assert apart[1] > apart[0] and together == {"reuse": apart[1]}
    assert measurements.forecast_errors(measured([], 2), parts[::-1], 3, ("reuse",), 1) == {"reuse": apart[1]}
