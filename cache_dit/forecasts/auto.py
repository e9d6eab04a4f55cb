"""The choice that `forecast='auto'` makes."""

from __future__ import annotations

import math
from collections.abc import Mapping


def choose_forecast(errors: Mapping[str, float]) -> str:
    """The name of the forecast that erred least at the last computed step of the run.

    Args:
        errors: `forecast_error` of each candidate, by name; empty until two computed steps of the run have given one.

    Returns:
        `'reuse'` where nothing has been measured or nothing is finite; of equal errors reuse's wins, then the first in
        order.
    """
    best, least = "reuse", math.inf
    for name in ("reuse", *errors):
        error = errors.get(name, math.inf)
        if error < least:
            best, least = name, error
    return best
