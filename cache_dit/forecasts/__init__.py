"""How a skipped step predicts the residual of the cached region: a weighted sum of the stored residuals.

A forecast looks only at *when* the residuals were computed and returns one weight for each of them, so every forecast
runs through the same fused kernel. A new forecast is one new file and one line in `FORECASTS`.
"""

from __future__ import annotations

from .adams_bashforth import AdamsBashforth
from .auto import choose_forecast
from .error import forecast_error
from .hermite import Hermite
from .lagrange import Lagrange
from .points import MAX_WEIGHT_SUM, Forecast, Point
from .reuse import Reuse
from .taylor import Taylor

__all__ = ["FORECASTS", "MAX_WEIGHT_SUM", "Forecast", "Point", "choose_forecast", "forecast", "forecast_error"]

_ORDERED: tuple[Forecast, ...] = (Reuse(), Lagrange(), Taylor(), Hermite(), AdamsBashforth())

FORECASTS: dict[str, Forecast] = {each.name: each for each in _ORDERED}
"""Every forecast by its name, in the order in which `'auto'` prefers them where they err alike."""


def forecast(name: str) -> Forecast:
    """The forecast of that name.

    Raises:
        ValueError: the name is not in `FORECASTS`; `'auto'` is not, being a choice among them.
    """
    try:
        return FORECASTS[name]
    except KeyError:
        raise ValueError(f"forecast={name!r} is not known; choose one of {', '.join(map(repr, FORECASTS))}") from None
