"""What a forecast sees of the past, and the bound that keeps every extrapolation sane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

MAX_WEIGHT_SUM = 16.0
"""Largest Σ|w| that a forecast may return.

Rounding and noise in the stored residuals come out multiplied by up to Σ|w|. 16 admits order 3 one whole interval
ahead (15), order 2 (7), and a straight line up to 7.5 intervals ahead (2x + 1); beyond that the order is lowered.
"""


class Point(NamedTuple):
    """When a residual was computed, or is to be predicted."""

    step: int
    """The step of the run, from 1; no two points of a run share it."""
    time: float | None
    """The step's sigma or timestep, one unit throughout a run; None where it is not known."""


class Forecast(Protocol):
    """A rule that turns the past's points into weights; without state, one instance serves every model."""

    @property
    def name(self) -> str:
        """The value of the option `forecast` that selects it."""

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """The weight of each stored residual in the residual predicted at `target`.

        Args:
            stored: the points of the stored residuals, newest first, at least one.
            target: the point to predict.
            order: the highest order wanted; the one used is never more than `len(stored) - 1`, and less where the
                points do not carry it (each forecast says when) or where Σ|w| would exceed `MAX_WEIGHT_SUM`. Order 0
                is plain reuse.

        Returns:
            `len(stored)` weights that sum to 1; the unused ones are 0.0.
        """


def newest_only(count: int) -> tuple[float, ...]:
    """The weights of plain reuse, 1 for the newest of `count` stored residuals; `ValueError` where there is none."""
    if count < 1:
        raise ValueError("a forecast needs at least one stored residual")
    return (1.0,) + (0.0,) * (count - 1)


def bounded_weights(weigh: Callable[[int], Sequence[float]], order: int, count: int) -> tuple[float, ...]:
    """`weigh(p)` of the highest order p <= `order` that keeps Σ|w| within `MAX_WEIGHT_SUM`, else plain reuse."""
    for lower in range(order, 0, -1):
        weights = weigh(lower)
        # false for NaN too, so points with broken times end at plain reuse
        if sum(map(abs, weights)) <= MAX_WEIGHT_SUM:
            return tuple(weights)
    return newest_only(count)
