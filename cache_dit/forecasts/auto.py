"""The choice that `forecast='auto'` makes."""

from __future__ import annotations

import math
from collections.abc import Mapping


def choose_forecast(errors: Mapping[str, float], *, placed: bool = False) -> str:
    """The name of the forecast that erred least at the last computed step of the run; a straight line in the noise level where
    the strategy places the computed steps, or skipped ones are put right: the error at the end of one gap says little of the
    next one, and nothing of what a correction leaves.

    Args:
        errors: `forecast_error` of each candidate, by name; empty until two computed steps of the run have given one.
        placed: whether the strategy is adaptive and knows the noise levels, or the run's skipped steps are corrected.

    Returns:
        `'lagrange'` where `placed`; else `'reuse'` where nothing has been measured or nothing is finite; of equal errors
        reuse's wins, then the first in order.
    """
    if placed:
        return "lagrange"
    best, least = "reuse", math.inf
    for name in ("reuse", *errors):
        error = errors.get(name, math.inf)
        if error < least:
            best, least = name, error
    return best
