"""The choice that `forecast='auto'` makes."""

from __future__ import annotations

import math
from collections.abc import Mapping


def choose_forecast(errors: Mapping[str, float], *, corrected: bool = False) -> str:
    """The name of the forecast that erred least at the last computed step of the run; a straight line where skipped steps are
    put right afterwards, since what it leaves behind is less, and the error at the end of a gap says nothing of that.

    Args:
        errors: `forecast_error` of each candidate, by name; empty until two computed steps of the run have given one.
        corrected: whether the run's skipped steps are corrected.

    Returns:
        `'lagrange'` where `corrected`; else `'reuse'` where nothing has been measured or nothing is finite; of equal errors
        reuse's wins, then the first in order.
    """
    if corrected:
        return "lagrange"
    best, least = "reuse", math.inf
    for name in ("reuse", *errors):
        error = errors.get(name, math.inf)
        if error < least:
            best, least = name, error
    return best
