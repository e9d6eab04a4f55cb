"""TaylorSeer: a Taylor expansion by finite differences in the step index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .differences import expand
from .points import Point


def _monomials(order: int, x: float) -> list[float]:
    """xᵏ / k! for k = 0 … order."""
    factors = [1.0]
    for k in range(1, order + 1):
        factors.append(factors[-1] * x / k)
    return factors


@dataclass(frozen=True, slots=True)
class Taylor:
    """R(s₀ + x) ≈ R₀ + Σₖ Dᵏ · xᵏ / k!, x in steps, Dᵏ as in `differences`. Times are not looked at.

    Exact for residuals that are linear in the step, at any spacing and any order. From order 2 on it keeps the
    published form, in which a backward difference stands for the derivative at s₀: not the interpolating polynomial,
    which is what `lagrange` gives where no times are known.

    Source: "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers" (arXiv 2503.06923, 2025).
    """

    name: str = "taylor"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """The expansion's weights; the order falls also where neighbouring points share a step."""
        return expand(stored, target, order, _monomials)
