"""The polynomial through the newest residuals, in the true sigma or timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .points import Point, bounded_weights


def _abscissas(stored: Sequence[Point], target: Point) -> tuple[list[float], float]:
    """The times of the stored points and of the target; their steps instead where any time is unknown."""
    times = [point.time for point in stored if point.time is not None]
    if target.time is None or len(times) < len(stored):
        return [float(point.step) for point in stored], float(target.step)
    return times, target.time


def _distinct(times: Sequence[float], count: int) -> list[int]:
    """Indices of the newest `count` points, or fewer, of which no two share a time."""
    nodes: list[int] = []
    seen: list[float] = []
    for index, time in enumerate(times):
        if len(nodes) < count and time not in seen:
            nodes.append(index)
            seen.append(time)
    return nodes


def _basis(times: Sequence[float], nodes: Sequence[int], at: float) -> list[float]:
    """Lagrange's basis polynomials over `nodes`, at `at`: wⱼ = Π (at − tᵢ) / (tⱼ − tᵢ) over i ≠ j; 0 elsewhere."""
    weights = [0.0] * len(times)
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (at - times[other]) / (times[node] - times[other])
        weights[node] = weight
    return weights


@dataclass(frozen=True, slots=True)
class Lagrange:
    """R(t) ≈ the polynomial of degree p in t through the newest p + 1 residuals; order 1 is a straight line in sigma.

    Where a time is unknown all of them are replaced by the step index. Of points with equal times only the newest
    counts (samplers that evaluate twice a step visit a sigma twice), so the order is at most the number of distinct
    times less one. The direction of time does not matter, and a target between stored points is interpolated.

    Source: Lagrange interpolation; measured for caching in the true sigma against the step index in this project's
    quality bench.
    """

    name: str = "lagrange"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """The basis polynomials' values at the target's time."""
        times, at = _abscissas(stored, target)
        nodes = _distinct(times, max(0, order) + 1)
        return bounded_weights(lambda lower: _basis(times, nodes[: lower + 1], at), len(nodes) - 1, len(stored))
