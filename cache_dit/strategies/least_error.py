"""Computed steps where the error that the skipped ones leave behind is expected to be least.

The error that a skipped step m between the computed steps i and j leaves in the state is modelled as

    wₘ (A + (tₘ − tᵢ)(tⱼ − tₘ)),   wₘ = (noise left)^P · |its change in the step|

with t the time as residuals go, in units of the mean distance of computed steps. The product is what a straight line
between two computed residuals misses of a bent curve; A is what no neighbour tells, since residuals are not smooth from
step to step; w says that the state moves by the step's length, and that errors made early, while noise decides what the
picture becomes, grow most on the way. Behind the last computed step nothing is corrected: there the line is continued
instead, and all of it counts `OPEN_END` times. Errors within a gap add up; those of several gaps add as squares.

Source: this project's quality bench (docs/quality.md); A, P and `OPEN_END` were chosen on two models at 20 to 40 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NOISE_POWER = 0.6
"""P above."""
ALWAYS = 0.3
"""A above."""
OPEN_END = 2.0
"""How much more an error behind the last computed step counts."""
LONGEST = 5
"""No gap is longer than so many mean distances and a step: what bounds the work."""


def least_error(
    time: Sequence[float], levels: Sequence[float], count: int, max_skipped: int | None, *, ends: bool
) -> list[int]:
    """The `count` increasing indices between the first and the last that leave the least expected error.

    Args:
        time: how far the run has come at each index, never back, no unit. The first index is a step that computes; the
            last is one too where `ends`, else the end of the run.
        levels: how much noise is left there, from 1 to 0.
        count: how many, from 0 to all between.
        max_skipped: longest gap, in skipped steps, which `count` must allow; None: no bound.
        ends: whether a computed step follows, so that what is skipped before it is corrected.
    """
    # here, so that options can be checked without it
    import numpy as np

    last = len(time) - 1
    unit = (time[-1] - time[0]) / (count + 1) or 1.0
    t = np.asarray(time, dtype=np.float64) / unit
    noise = np.asarray(levels, dtype=np.float64)
    weight = noise[:-1] ** NOISE_POWER * np.abs(np.diff(noise))
    longest = min(last, LONGEST * math.ceil(last / (count + 1)) + 1)
    if max_skipped is not None:
        longest = min(longest, max_skipped + 1)
    gaps = [_gaps(t, weight, length) for length in range(longest + 1)]
    # least[j]: the least error up to j, where j is the k-th computed one; came[k][j]: the length of the gap before it
    least = np.full(last + 1, np.inf)
    least[0] = 0.0
    came: list[np.ndarray] = []
    for _ in range(count):
        ways = np.full((longest + 1, last + 1), np.inf)
        for length in range(1, longest + 1):
            ways[length, length:] = least[: last + 1 - length] + gaps[length]
        # the last index is no candidate
        ways[:, last] = np.inf
        came.append(ways.argmin(axis=0))
        least = ways.min(axis=0)
    ending = [gaps[last - i][i] if ends else _open_end(t, weight, i) for i in range(last - longest, last)]
    at = last - longest + int((least[last - longest : last] + ending).argmin())
    placed = []
    for lengths in reversed(came):
        placed.append(at)
        at -= int(lengths[at])
    return placed[::-1]


def _gaps(t: np.ndarray, weight: np.ndarray, length: int) -> np.ndarray:
    """The squared error of the gap of this length from each index on."""
    import numpy as np

    count = len(t) - length
    error = np.zeros(count)
    for m in range(1, length):
        inside = t[m : m + count]
        error += weight[m : m + count] * (ALWAYS + (inside - t[:count]) * (t[length:] - inside))
    return error**2


def _open_end(t: np.ndarray, weight: np.ndarray, index: int) -> float:
    """The squared error of the gap from this index to the end of the run."""
    away = t[index + 1 : -1] - t[index]
    return float(OPEN_END * (weight[index + 1 :] * (ALWAYS + away * (away + 1.0))).sum()) ** 2
