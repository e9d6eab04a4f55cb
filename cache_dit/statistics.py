"""What is counted and timed while a model runs, and the texts and the dictionary made of it.

A *forward call* is one call of the model; a *step* is one evaluation of all its contexts. Times are in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Final

from .texts import text

_ID_DIGITS: Final = re.compile(r"(_\d{6})\d+$")


@dataclass(slots=True)
class Counters:
    """The mutable figures of one model, written by the runtime.

    A call in which something was compiled belongs in `calls` (and `compile_calls`), not among the timed calls.
    """

    timed: bool = True
    """Whether calls are timed (`enable_stats`): a setting, which `reset` keeps."""
    calls: int = 0
    hits: int = 0
    """Calls answered from the cache."""
    steps: int = 0
    runs: int = 0
    compute_calls_timed: int = 0
    compute_seconds: float = 0.0
    """Time in the `compute_calls_timed` computed calls."""
    reuse_calls_timed: int = 0
    reuse_seconds: float = 0.0
    """Time in the `reuse_calls_timed` hits."""
    compile_calls: int = 0
    """Calls in which something was compiled."""
    compiles: int = 0
    """Programs compiled."""
    compile_seconds: float = 0.0
    nonfinite: int = 0
    """Computed results that held an infinity or a NaN and were therefore not stored."""
    refused: dict[str, int] = field(default_factory=dict)
    """Calls that could have been hits but computed, by the reason's key in `texts.TEXTS`."""
    forecast_error: float | None = None
    """The last measured relative error of a forecast."""
    forecast_errors: int = 0
    """Forecast errors measured."""
    forecast_error_sum: float = 0.0

    def refuse(self, reason: str) -> None:
        """Count one call that computed because of `reason`, a key of `texts.TEXTS`."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def record_forecast_error(self, error: float) -> None:
        """Note one measured relative error of a forecast."""
        self.forecast_error = error
        self.forecast_errors += 1
        self.forecast_error_sum += error

    def reset(self) -> None:
        """Set every statistic to zero."""
        fresh = Counters(timed=self.timed)
        for each in fields(self):
            setattr(self, each.name, getattr(fresh, each.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """The measured figures of one model, or of several together. Only timed calls enter times and speed-up."""

    name: str
    """Class and `id` of the model, e.g. `ModelPatcher_140234567890123`."""
    strategy: str
    enabled: bool
    timed: bool
    calls: int
    hits: int
    steps: int
    runs: int
    compute_calls_timed: int
    compute_seconds: float
    reuse_calls_timed: int
    reuse_seconds: float
    uncached_seconds: float
    """What the timed calls would have taken, had each of them computed: their number × the average compute time."""
    compile_calls: int
    compiles: int
    compile_seconds: float
    nonfinite: int
    refused: Mapping[str, int]
    """Calls that could have been hits but computed, by the reason's key in `texts.TEXTS`."""
    forecast_error: float | None
    """The last measured relative error of a forecast; of several models the largest of theirs."""
    forecast_errors: int
    """Forecast errors measured."""
    mean_forecast_error: float | None
    cache_bytes: int
    """Device and host memory held now: the stored residuals, the front's output, what correction keeps of skipped steps."""
    hit_rate: float = field(init=False)
    """Percent of `calls`; 0 while there are none."""
    computed: int = field(init=False)
    """Calls that computed, `calls` less `hits`."""
    average_compute_time: float | None = field(init=False)
    average_reuse_time: float | None = field(init=False)
    expected_speedup: float | None = field(init=False)
    """`uncached_seconds` over the time in all timed calls; None until both kinds of call have been timed."""

    def __post_init__(self) -> None:
        derived: dict[str, object] = {
            "hit_rate": 100.0 * self.hits / self.calls if self.calls else 0.0,
            "computed": self.calls - self.hits,
            "average_compute_time": _average(self.compute_seconds, self.compute_calls_timed),
            "average_reuse_time": _average(self.reuse_seconds, self.reuse_calls_timed),
            "expected_speedup": self._speedup(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _speedup(self) -> float | None:
        spent = self.compute_seconds + self.reuse_seconds
        if not self.compute_calls_timed or not self.reuse_calls_timed or spent <= 0.0:
            return None
        return self.uncached_seconds / spent


def stats_from(counters: Counters, *, name: str, strategy: str, enabled: bool, cache_bytes: int = 0) -> CacheStats:
    """Return a frozen copy of one model's `counters` with everything that follows from them."""
    return CacheStats(
        name=name,
        strategy=strategy,
        enabled=enabled,
        timed=counters.timed,
        calls=counters.calls,
        hits=counters.hits,
        steps=counters.steps,
        runs=counters.runs,
        compute_calls_timed=counters.compute_calls_timed,
        compute_seconds=counters.compute_seconds,
        reuse_calls_timed=counters.reuse_calls_timed,
        reuse_seconds=counters.reuse_seconds,
        uncached_seconds=_uncached_seconds(counters),
        compile_calls=counters.compile_calls,
        compiles=counters.compiles,
        compile_seconds=counters.compile_seconds,
        nonfinite=counters.nonfinite,
        refused=dict(counters.refused),
        forecast_error=counters.forecast_error,
        forecast_errors=counters.forecast_errors,
        mean_forecast_error=_average(counters.forecast_error_sum, counters.forecast_errors),
        cache_bytes=cache_bytes,
    )


def stats_between(before: Counters, after: Counters, *, name: str, strategy: str, enabled: bool) -> CacheStats:
    """Return what `after` counts more than `before`: the figures of one run. Bytes are not counted."""
    since = Counters(timed=after.timed, forecast_error=after.forecast_error)
    for each in fields(Counters):
        new, old = getattr(after, each.name), getattr(before, each.name)
        if each.name == "refused":
            since.refused = {reason: count - old.get(reason, 0) for reason, count in new.items() if count > old.get(reason, 0)}
        elif each.name not in ("timed", "forecast_error"):
            # statistics that were reset in between count from there
            setattr(since, each.name, new - old if new >= old else new)
    if not since.forecast_errors:
        since.forecast_error = None
    return stats_from(since, name=name, strategy=strategy, enabled=enabled)


def merge_stats(parts: Sequence[CacheStats], name: str) -> CacheStats:
    """Return the sum over `parts`, e.g. the denoisers of a pipeline, under the name `name`.

    The speed-up compares times, not averages: of a slow model that never hits and a fast one that does, the average
    over all computed calls times the number of calls would be no time that either would have taken.
    """
    errors = [part.forecast_error for part in parts if part.forecast_error is not None]
    error_sum = sum((part.mean_forecast_error or 0.0) * part.forecast_errors for part in parts)
    return CacheStats(
        name=name,
        strategy=", ".join(dict.fromkeys(part.strategy for part in parts)),
        enabled=any(part.enabled for part in parts),
        timed=any(part.timed for part in parts),
        calls=sum(part.calls for part in parts),
        hits=sum(part.hits for part in parts),
        steps=sum(part.steps for part in parts),
        runs=sum(part.runs for part in parts),
        compute_calls_timed=sum(part.compute_calls_timed for part in parts),
        compute_seconds=sum(part.compute_seconds for part in parts),
        reuse_calls_timed=sum(part.reuse_calls_timed for part in parts),
        reuse_seconds=sum(part.reuse_seconds for part in parts),
        uncached_seconds=sum(part.uncached_seconds for part in parts),
        compile_calls=sum(part.compile_calls for part in parts),
        compiles=sum(part.compiles for part in parts),
        compile_seconds=sum(part.compile_seconds for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        refused=_sum_by_key(part.refused for part in parts),
        forecast_error=max(errors, default=None),
        forecast_errors=sum(part.forecast_errors for part in parts),
        mean_forecast_error=_average(error_sum, sum(part.forecast_errors for part in parts)),
        cache_bytes=sum(part.cache_bytes for part in parts),
    )


def format_summary(stats: CacheStats, language: str | None = None) -> str:
    """Return the basic statistics as text, one figure a line."""
    return text("summary", language, **_common_values(stats, "seconds", language), speedup=format_speedup(stats, language))


def format_details(models: Sequence[CacheStats], language: str | None = None, show_model_details: bool = True) -> str:
    """Return the statistics over all `models` as text, then with `show_model_details` those of each."""
    if not models:
        return text("no_models", language)
    total = merge_stats(models, "")
    overview = text(
        "details",
        language,
        **_common_values(total, "seconds", language),
        speedup=format_speedup(total, language),
        active=sum(stats.enabled for stats in models),
    )
    if not show_model_details:
        return overview
    details = "\n\n".join(_model_details(stats, language) for stats in models)
    return f"{overview}\n\n{text('details_models', language)}\n{details}"


def global_stats_dict(models: Sequence[CacheStats]) -> dict[str, object]:
    """Return the statistics over all `models` and of each, under its whole name; None for what was not measured."""
    total = merge_stats(models, "")
    return {
        "total_calls": total.calls,
        "total_cache_hits": total.hits,
        "global_hit_rate": total.hit_rate,
        "average_compute_time": total.average_compute_time,
        "expected_speedup": total.expected_speedup,
        "active_models": sum(stats.enabled for stats in models),
        "model_details": {stats.name: _model_dict(stats) for stats in models},
    }


def _model_dict(stats: CacheStats) -> dict[str, object]:
    return {
        "calls": stats.calls,
        "hits": stats.hits,
        "hit_rate": stats.hit_rate,
        "avg_time": stats.average_compute_time,
        "strategy": stats.strategy,
        "enabled": stats.enabled,
    }


def _model_details(stats: CacheStats, language: str | None) -> str:
    return text(
        "details_model",
        language,
        **_common_values(stats, "seconds_short", language),
        name=_ID_DIGITS.sub(r"\1...", stats.name),
        strategy=stats.strategy,
        status=text("enabled" if stats.enabled else "disabled", language),
    )


def _common_values(stats: CacheStats, seconds_key: str, language: str | None) -> dict[str, object]:
    return {
        "calls": stats.calls,
        "hits": stats.hits,
        "hit_rate": stats.hit_rate,
        "average": (
            _missing(stats, language)
            if stats.average_compute_time is None
            else text(seconds_key, language, seconds=stats.average_compute_time)
        ),
    }


def format_speedup(stats: CacheStats, language: str | None = None) -> str:
    """Return the measured speed-up as text, or that there is none."""
    if stats.expected_speedup is None:
        return _missing(stats, language)
    return text("factor", language, factor=stats.expected_speedup)


def _missing(stats: CacheStats, language: str | None) -> str:
    return text("not_measured" if stats.timed else "not_tracked", language)


def _average(total: float, count: int) -> float | None:
    return total / count if count else None


def _uncached_seconds(counters: Counters) -> float:
    average = _average(counters.compute_seconds, counters.compute_calls_timed)
    if average is None:  # nothing to compare the hits with: they count as no gain
        return counters.reuse_seconds
    return average * (counters.compute_calls_timed + counters.reuse_calls_timed)


def _sum_by_key(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total
