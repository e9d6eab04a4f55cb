"""Adams and Bashforth's fixed coefficients over the stored residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .points import Point, newest_only

COEFFICIENTS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams–Bashforth's coefficients by order, newest first: row p belongs to the (p + 1)-step method."""


@dataclass(frozen=True, slots=True)
class AdamsBashforth:
    """R ≈ Σⱼ bⱼ Rⱼ with the coefficients of the (order + 1)-step Adams–Bashforth method; order at most 3.

    The weights do not depend on the target. On evenly spaced computed steps this is the mean, over the interval that
    begins at the newest, of the polynomial through them: a solver that uses it throughout the interval makes one
    Adams–Bashforth step.

    Source: AB-Cache (arXiv 2504.10540, 2025) for a fixed linear combination of cached outputs. Its own combination,
    the alternating binomials (2, −1), (3, −3, 1), …, predicts the far end of the interval; Adams' coefficients suit
    all of it.
    """

    name: str = "adams_bashforth"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """The row of `COEFFICIENTS` for the order, then zeros."""
        used = min(order, len(stored) - 1, len(COEFFICIENTS) - 1)
        if used < 1:
            return newest_only(len(stored))
        return COEFFICIENTS[used] + (0.0,) * (len(stored) - used - 1)
