"""Expansions in backward differences over the step index: what TaylorSeer and HiCache share.

Dᵏ estimates the k-th derivative of the residual R by the step s, at the newest stored step:

    D⁰ⱼ = Rⱼ,   Dᵏⱼ = (Dᵏ⁻¹ⱼ − Dᵏ⁻¹ⱼ₊₁) / (sⱼ − sⱼ₊₁),   Dᵏ = Dᵏ₀   (j = 0 is the newest)

the recursion that TaylorSeer runs at each computed step, dividing by the interval between what were then the last two
computed steps. On even spacing N it is ΔᵏR / Nᵏ; on uneven spacing D¹ is the exact divided difference, the higher ones
are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from .points import Point, bounded_weights, newest_only


def _usable_gaps(stored: Sequence[Point], order: int) -> list[int]:
    """The steps between neighbouring points, newest first: at most `order` of them, ending before one of zero."""
    gaps: list[int] = []
    for newer, older in pairwise(stored[: max(0, order) + 1]):
        if newer.step == older.step:
            break
        gaps.append(newer.step - older.step)
    return gaps


def _weights_of(factors: Sequence[float], gaps: Sequence[int]) -> list[float]:
    """The weight of each residual in Σₖ factors[k] · Dᵏ: the recursion of the differences, run backwards."""
    order = len(factors) - 1
    weights = [factors[order]]
    for k in range(order - 1, -1, -1):
        lower = [factors[k]] + [0.0] * (order - k)
        for index, weight in enumerate(weights):
            share = weight / gaps[index]
            lower[index] += share
            lower[index + 1] -= share
        weights = lower
    return weights


def expand(stored: Sequence[Point], target: Point, order: int, basis: Callable[[int, float], list[float]]) -> tuple[float, ...]:
    """The weights of Σₖ basis(order, x)[k] · Dᵏ, x = target.step − stored[0].step in steps, basis[0] = 1.

    The order falls as `Forecast` says, and where neighbouring points share a step.
    """
    gaps = _usable_gaps(stored, order)
    if not gaps:
        return newest_only(len(stored))
    factors = basis(len(gaps), float(target.step - stored[0].step))

    def weigh(lower: int) -> list[float]:
        return _weights_of(factors[: lower + 1], gaps) + [0.0] * (len(stored) - lower - 1)

    return bounded_weights(weigh, len(gaps), len(stored))
