"""What a computed step measured: whether its residuals are finite, and how far each forecast would have been off."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from ..forecasts import FORECASTS, forecast_error
from ..passes.residual_math import statistics_length
from .buffers import Measurement


def read(pending: Measurement, history: int) -> list[list[float]]:
    """The statistics of each live-out: count of non-finite elements, mean square, and the upper triangle of the Gram matrix
    of the differences between ``history`` residuals. Waits for the device, or for the other ranks."""
    values: list[float] = (pending.agreed or pending.arrived or pending.values.tolist)()
    length = statistics_length(history)
    return [values[i : i + length] for i in range(0, len(values), length)]


def are_finite(parts: Sequence[Sequence[float]]) -> bool:
    """Whether every element was finite, and so is their mean square."""
    return all([part[0] <= 0 and isfinite(part[1]) for part in parts])


def forecast_errors(
    pending: Measurement, parts: Sequence[Sequence[float]], history: int, names: Sequence[str], order: int
) -> dict[str, float]:
    """The relative RMS error of each named forecast at the step measured; of several live-outs the largest."""
    size = len(pending.before)
    if size == 1:
        # every forecast is the one residual there is
        return dict.fromkeys(names, max(forecast_error((1.0,), [part[2:3]], part[1] ** 0.5) for part in parts))
    grams = [(_square(part[2:], history, size), part[1] ** 0.5) for part in parts]
    errors = {}
    for name in names:
        weights = FORECASTS[name].weights(pending.before, pending.target, order)
        errors[name] = max(forecast_error(weights, gram, rms) for gram, rms in grams)
    return errors


def _square(upper: Sequence[float], history: int, size: int) -> list[list[float]]:
    """The leading ``size`` rows of a symmetric matrix given by the rows of its upper triangle."""
    matrix = [[0.0] * history for _ in range(history)]
    values = iter(upper)
    for a in range(history):
        for b in range(a, history):
            matrix[a][b] = matrix[b][a] = next(values)
    return [row[:size] for row in matrix[:size]]
