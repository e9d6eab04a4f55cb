"""Plain reuse: the newest residual as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .points import Point, newest_only


@dataclass(frozen=True, slots=True)
class Reuse:
    """R(t) ≈ R₀, order 0 whatever is asked.

    Source: the rule of the first block caches, e.g. Δ-DiT (arXiv 2406.01125, 2024) and TeaCache (arXiv 2411.19108,
    2024).
    """

    name: str = "reuse"

    def weights(self, stored: Sequence[Point], target: Point, order: int) -> tuple[float, ...]:
        """1 for the newest residual, 0 for the others."""
        return newest_only(len(stored))
