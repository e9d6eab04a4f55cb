"""Computed steps where the error that the skipped ones leave behind is expected to be least.

Where skipped steps are corrected, the error that a skipped step m between the computed steps i and j leaves in the
picture is modelled as

    (1 + G σₘ) · |σₘ₊₁ − σₘ| · (A + (tₘ − tᵢ)(tⱼ − tₘ))

with t the time as residuals go (`placement.residual_time`). The product is what a straight line between two computed
residuals misses of a bent curve; A is what no neighbour tells, since residuals are not smooth from step to step; the
length of the step is how far the state moves by it; and errors made early, while noise decides what the picture becomes,
grow on the way. Behind the last computed step nothing is corrected: there the line is continued instead. Errors within a
gap add up; those of several gaps add as squares.

Where nothing is corrected (another solver, or none that is known), uneven gaps cost more than they save: a line through
two residuals that are close together goes astray behind them. There the sum of (1 + G σᵢ) times the squares of the gaps'
lengths is least, which spaces the steps evenly, the early ones a little closer.

Source: this project's quality bench (docs/quality.md); the errors of single gaps were measured on four small models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

GROWTH = 4.0
"""G above."""
ALWAYS = 0.001
"""A above."""
OPEN_END = 2.0
"""Without correction: how much more the square of the last gap counts, where no computed step ends it."""
FIRST_OF_EQUALS = 1e-6
"""Share of the distance to a gap's last skipped step that counts beside the gap's length, to choose among equal ones."""
LONGEST = 5
"""No gap is longer than so many mean distances and a step: what bounds the work."""


def least_error(
    time: Sequence[float], levels: Sequence[float], count: int, max_skipped: int | None, *, ends: bool, corrected: bool
) -> list[int]:
    """The `count` increasing indices between the first and the last that leave the least expected error.

    Args:
        time: the time as residuals go at each index, never back; without correction any that is to be divided evenly. The
            first index is a step that computes; the last is one too where `ends`, else the end of the run.
        levels: the share of noise there, from 1 to 0.
        count: how many, from 0 to all between.
        max_skipped: longest gap, in skipped steps, which `count` must allow; None: no bound.
        ends: whether a computed step follows, so that what is skipped before it is corrected.
        corrected: whether skipped steps are corrected at all.
    """
    # here, so that options can be checked without it
    import numpy as np

    last = len(time) - 1
    t = np.asarray(time, dtype=np.float64)
    longest = min(last, LONGEST * math.ceil(last / (count + 1)) + 1)
    if max_skipped is not None:
        longest = min(longest, max_skipped + 1)
    noise = np.asarray(levels, dtype=np.float64)
    grown = 1.0 + GROWTH * noise
    lengths, starts = range(longest + 1), range(last - longest, last)
    if corrected:
        weight = grown[:-1] * np.abs(np.diff(noise))
        gaps = [_between(t, weight, length) for length in lengths]
        ending = [gaps[last - i][i] if ends else _open_end(t, weight, i) for i in starts]
    else:
        gaps = [_length(t, length) * grown[: len(t) - length] for length in lengths]
        ending = [(1.0 if ends else OPEN_END) * gaps[last - i][i] for i in starts]
    return _least(gaps, ending, count)


def _least(gaps: Sequence[np.ndarray], ending: Sequence[float], count: int) -> list[int]:
    """The indices whose gaps cost least in sum: `gaps[n][i]` is the cost of the gap of length n from i on, and `ending`
    that of the last gap from each of the last indices on."""
    import numpy as np

    longest, last = len(gaps) - 1, len(gaps[0]) - 1
    # least[j]: the least cost up to j, where j is the k-th computed one; came[k][j]: the length of the gap before it
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
    at = last - longest + int((least[last - longest : last] + ending).argmin())
    placed = []
    for lengths in reversed(came):
        placed.append(at)
        at -= int(lengths[at])
    return placed[::-1]


def _between(t: np.ndarray, weight: np.ndarray, length: int) -> np.ndarray:
    """The squared error of the gap of this length from each index on."""
    import numpy as np

    count = len(t) - length
    error = np.zeros(count)
    for m in range(1, length):
        inside = t[m : m + count]
        error += weight[m : m + count] * (ALWAYS + (inside - t[:count]) * (t[length:] - inside))
    return error**2


def _length(t: np.ndarray, length: int) -> np.ndarray:
    """The squared length of the gap of this many steps from each index on; of steps at one time the first computes."""
    start = t[: len(t) - length]
    skipped = t[max(0, length - 1) : len(t) - 1 if length else None] - start
    squared: np.ndarray = (t[length:] - start) ** 2 + FIRST_OF_EQUALS * skipped**2
    return squared


def _open_end(t: np.ndarray, weight: np.ndarray, index: int) -> float:
    """The squared error of the gap from this index to the end of the run, through the residuals of this step and the one
    before it."""
    away = t[index + 1 : -1] - t[index]
    before = t[index] - t[index - 1] if index else t[1] - t[0]
    return float((weight[index + 1 :] * (ALWAYS + away * (away + before))).sum()) ** 2
