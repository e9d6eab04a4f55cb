"""How far a forecast was from the truth, from a few numbers that the program measures at each computed step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def _tails(weights: Sequence[float]) -> list[float]:
    """cₖ = Σ wⱼ over j >= k, for k = 0 … len(weights) − 1; c₀ is 1 by contract, however the weights were rounded."""
    tails: list[float] = []
    total = 0.0
    for weight in reversed(weights):
        total += weight
        tails.append(total)
    tails[-1] = 1.0
    return tails[::-1]


def forecast_error(weights: Sequence[float], gram: Sequence[Sequence[float]], rms: float) -> float:
    """The relative RMS error ‖R − Σ wₖ rₖ‖ / ‖R‖ of a forecast, without another pass over the residuals.

    With d₀ = R − r₀ and dₖ = rₖ₋₁ − rₖ, R − rₖ = d₀ + … + dₖ, so for weights that sum to 1 R − Σ wₖ rₖ = Σ wₖ (R − rₖ)
    = d₀ + Σₖ₌₁ cₖ dₖ with cₖ = Σ wⱼ over j >= k, whose mean square is cᵀ G c. Differences of neighbours keep the
    digits that products of the residuals themselves would lose.

    Args:
        weights: one for each stored residual r₀, r₁, … (newest first), summing to 1; zeros at the end may reach beyond
            `gram`.
        gram: G[a][b] = mean(dₐ · d_b), of size 1 × 1 at least; in the square of the residual's unit.
        rms: √mean(R²) of the residual that was computed, in the residual's unit.

    Returns:
        The error, no unit: 0 is exact, 1 misses as much as predicting nothing; inf where the measurement is not
        finite, and for rms = 0 unless the forecast was exact too.

    Raises:
        ValueError: a weight other than 0 has no row in `gram`.
    """
    tails = _tails(weights)
    size = min(len(tails), len(gram))
    if any(tails[size:]):
        raise ValueError(f"{len(weights)} weights, but differences of {len(gram)} residuals only")
    square = sum(tails[a] * tails[b] * gram[a][b] for a in range(size) for b in range(size))
    if not (math.isfinite(square) and math.isfinite(rms)):
        return math.inf
    if square <= 0.0:  # rounding can push an exact forecast below zero
        return 0.0
    return math.sqrt(square) / rms if rms > 0.0 else math.inf
