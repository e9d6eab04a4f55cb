"""The straight line in sigma, no further ahead than the distance that its slope was measured over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .lagrange import Lagrange
from .points import Point, newest_only

REACH = 1.0
"""How far ahead the line is followed, in distances between the two newest residuals; further on it stays level."""

_STRAIGHT = Lagrange()


@dataclass(frozen=True, slots=True)
class Line:
    """R(t) ≈ R₀ + min(x, 1) · (R₀ − R₁), x = (t − t₀) / (t₀ − t₁), in the true sigma as `Lagrange` of order 1.

    On evenly spaced computed steps it is that line throughout. Where a wide gap follows a narrow one, as behind the
    first steps of a run, a slope from next to nothing would be carried far; there the forecast stops at the distance
    that it has seen. The order is 1 whatever is asked for.

    Source: this project's quality bench (docs/quality.md).
    """

    name: str = "line"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """Lagrange's weights of order 1, with the extrapolation cut off at `REACH`."""
        weights = _STRAIGHT.weights(stored, target, min(order, 1))
        ahead = weights[0] - 1.0
        if ahead <= REACH:
            return weights
        older = next(index for index, weight in enumerate(weights) if index and weight)
        limited = [0.0] * len(weights)
        limited[0], limited[older] = 1.0 + REACH, -REACH
        return tuple(limited) if len(weights) > 1 else newest_only(len(weights))
