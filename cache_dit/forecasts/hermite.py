"""HiCache: the expansion of TaylorSeer in contracted Hermite polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .differences import expand
from .points import Point

CONTRACTION = 0.5
"""The contraction factor σ, the paper's default."""


def _contracted_hermite(order: int, x: float) -> list[float]:
    """σᵏ · Hₖ(σx) / k! for k = 0 … order; physicists' polynomials: H₀ = 1, Hₖ₊₁ = 2x · Hₖ − 2k · Hₖ₋₁."""
    twice = 2.0 * CONTRACTION * x
    before, now, scale = 0.0, 1.0, 1.0
    factors = [1.0]
    for k in range(order):
        before, now = now, twice * now - 2.0 * k * before
        scale *= CONTRACTION / (k + 1)
        factors.append(scale * now)
    return factors


@dataclass(frozen=True, slots=True)
class Hermite:
    """R(s₀ + x) ≈ R₀ + Σₖ Dᵏ · σᵏ Hₖ(σx) / k!, σ = 0.5, x in steps, Dᵏ as in `differences`. Times are not looked at.

    The first order is Taylor's damped by 2σ² = 1/2: made for noisy residuals, too timid for smooth ones.

    Source: "HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion Acceleration"
    (arXiv 2508.16984, 2025).
    """

    name: str = "hermite"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """The expansion's weights; the order falls also where neighbouring points share a step."""
        return expand(stored, target, order, _contracted_hermite)
