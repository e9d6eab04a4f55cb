"""Which steps of a run are skipped: step -> decision, from nothing but the step's `StepView`.

A new rule is one new file and one line here (and its name among those that the option takes). `STRATEGIES` are for users,
`RULES` are published ones that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..calibration import Calibration
from ..options import DEFAULT_MAX_CONSECUTIVE_HITS, DEFAULT_SKIP_INTERVAL, DEFAULT_WARMUP_STEPS
from .adaptive import PlacementStrategy
from .decision import Decision, Reason, StepView, Strategy
from .dynamic import Dynamic
from .first_block import FirstBlock
from .fixed import Fixed
from .front_clock import OWN_MAX_CONSECUTIVE_HITS, OWN_WARMUP_STEPS, ClockStrategy
from .part_of_run import PartOfRun, WithinPart
from .placement import PlacementRules
from .schedule import Schedule
from .sigma import SigmaSpaced
from .teacache import TeaCache

__all__ = ["RULES", "STRATEGIES", "Decision", "Reason", "StepView", "Strategy", "StrategyOptions", "build_strategy"]


class StrategyOptions(Protocol):
    """The options that a strategy is made from; they have been checked."""

    @property
    def strategy(self) -> str: ...
    @property
    def skip_interval(self) -> int | None: ...
    @property
    def warmup_steps(self) -> int | None: ...
    @property
    def schedule(self) -> Sequence[bool] | None: ...
    @property
    def start_percent(self) -> float: ...
    @property
    def end_percent(self) -> float: ...
    @property
    def max_consecutive_hits(self) -> int | None: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def target_speedup(self) -> float | None: ...
    @property
    def calibration(self) -> Calibration | None: ...


def _or_else(given: int | None, default: int) -> int:
    return default if given is None else given


def _fixed(options: StrategyOptions) -> Strategy:
    return Fixed(
        skip_interval=_or_else(options.skip_interval, DEFAULT_SKIP_INTERVAL),
        warmup_steps=_or_else(options.warmup_steps, DEFAULT_WARMUP_STEPS),
        max_consecutive_hits=_or_else(options.max_consecutive_hits, DEFAULT_MAX_CONSECUTIVE_HITS),
    )


def _dynamic(options: StrategyOptions) -> Strategy:
    return Dynamic(
        skip_interval=_or_else(options.skip_interval, DEFAULT_SKIP_INTERVAL),
        warmup_steps=_or_else(options.warmup_steps, DEFAULT_WARMUP_STEPS),
        max_consecutive_hits=_or_else(options.max_consecutive_hits, DEFAULT_MAX_CONSECUTIVE_HITS),
    )


def _adaptive(options: StrategyOptions) -> Strategy:
    """By placement where a target is given, else by the clock; each chooses warm-up and bound where none is given."""
    if options.target_speedup is None:
        return ClockStrategy(
            skip_interval=_or_else(options.skip_interval, DEFAULT_SKIP_INTERVAL),
            warmup_steps=_or_else(options.warmup_steps, OWN_WARMUP_STEPS),
            max_consecutive_hits=_or_else(options.max_consecutive_hits, OWN_MAX_CONSECUTIVE_HITS),
            tolerance=options.tolerance,
        )
    rules = PlacementRules(
        target_speedup=options.target_speedup,
        warmup_steps=_or_else(options.warmup_steps, 0),
        skip_interval=options.skip_interval,
        max_consecutive_hits=options.max_consecutive_hits,
        part=PartOfRun(options.start_percent, options.end_percent),
        clock=None if options.calibration is None else options.calibration.clock,
    )
    return PlacementStrategy(rules, options.tolerance)


def _by_threshold(rule: Callable[[int, int, int, float], Strategy]) -> Callable[[StrategyOptions], Strategy]:
    """A rule whose threshold is `tolerance`, with warm-up and bound as the clock has them where none is given."""

    def build(options: StrategyOptions) -> Strategy:
        warmup = _or_else(options.warmup_steps, OWN_WARMUP_STEPS)
        most = _or_else(options.max_consecutive_hits, OWN_MAX_CONSECUTIVE_HITS)
        return rule(_or_else(options.skip_interval, DEFAULT_SKIP_INTERVAL), warmup, most, options.tolerance)

    return build


STRATEGIES: dict[str, Callable[[StrategyOptions], Strategy]] = {
    "fixed": _fixed,
    "dynamic": _dynamic,
    "adaptive": _adaptive,
}

RULES: dict[str, Callable[[StrategyOptions], Strategy]] = {
    "front_clock": _by_threshold(ClockStrategy),
    "teacache": _by_threshold(TeaCache),
    "first_block": _by_threshold(FirstBlock),
    "sigma": lambda options: SigmaSpaced(options.target_speedup or 2.0),
}


def build_strategy(options: StrategyOptions) -> Strategy:
    """The strategy of these options.

    A `schedule` overrides the strategy, its warm-up and `max_consecutive_hits`. `start_percent` and `end_percent` bind
    any of them in runs whose number of steps is known. Raises `ValueError` for a strategy that is not in `STRATEGIES`.
    """
    rules = STRATEGIES | RULES
    if options.strategy not in rules:
        known = ", ".join(map(repr, STRATEGIES))
        raise ValueError(f"strategy={options.strategy!r} is not known; choose one of {known}")
    strategy = rules[options.strategy](options) if options.schedule is None else Schedule(tuple(options.schedule))
    part = PartOfRun(options.start_percent, options.end_percent)
    return strategy if part.is_whole() else WithinPart(strategy, part)
