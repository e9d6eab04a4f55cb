"""Where the computed steps of a run go when their number is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from .least_error import least_error
from .part_of_run import PartOfRun


# eq=False: rules key the memo of `place_steps` by identity, which costs a step less than hashing their values
@dataclass(frozen=True, slots=True, eq=False)
class PlacementRules:
    """What a placement has to respect."""

    target_speedup: float
    """Steps of the run / computed steps, at least 1."""
    warmup_steps: int
    """Steps at the start that compute."""
    skip_interval: int | None
    """How often a step may be skipped before the second computed one; None: whatever the placement makes of it."""
    max_consecutive_hits: int | None
    """Longest gap between computed steps, in skipped ones; None: no bound."""
    part: PartOfRun
    """Steps outside it compute."""
    clock: tuple[float, ...] | None = None
    """How far the residual has come before each step and at the end, from 0 to 1, in runs of its length; None: as
    `residual_time` has it."""


def computed_count(num_steps: int, target_speedup: float) -> int:
    """How many steps are to compute: num_steps / target_speedup, rounded (a half down), at least 1."""
    return min(num_steps, max(1, math.ceil(num_steps / target_speedup - 0.5)))


def first_steps(warmup_steps: int, skip_interval: int) -> list[int]:
    """The steps that compute at the start: the warm-up, or step 1 and the next that `skip_interval` does not let skip.

    A forecast error can be measured at the second computed step at the earliest. Up to there step n may be skipped
    only where n % skip_interval == 0, so step 3 computes for an interval of 2, step 2 for a longer one, none for 1.
    """
    if warmup_steps > 1:
        return list(range(1, warmup_steps + 1))
    if skip_interval == 1:
        return [1]
    return [1, 3 if skip_interval == 2 else 2]


def _fewest(steps: int, longest: int | None) -> int:
    """The fewest computed steps between two that are `steps` apart, with at most `longest` skipped in a row."""
    return 0 if longest is None else max(0, math.ceil(steps / (longest + 1)) - 1)


LITTLE_NOISE = 0.3
"""The share of noise below which residuals go as its logarithm does."""
LITTLE_PICTURE = 0.03
"""The share of picture below which residuals go as its logarithm does."""
LEAST_SHARE = 0.004
"""Smaller shares count as this one."""


def noise_levels(num_steps: int, sigmas: Sequence[float] | None) -> list[float]:
    """The share of noise in the state before each step and at the end of the run, from 1 to 0.

    Where no list of num_steps + 1 sigmas from 0 up is given, or it ends where it began, as if it fell evenly from 1 to 0.
    Lists that go above 1 are those of x = x₀ + σ ε, where it is σ / (1 + σ). What lies beyond the ends of the list counts as
    they do; a list that rises is taken as one that falls.
    """
    if sigmas is None or len(sigmas) != num_steps + 1 or sigmas[0] == sigmas[-1] or min(sigmas) < 0.0:
        return [1.0 - index / num_steps for index in range(num_steps + 1)]
    levels = [sigma / (1.0 + sigma) for sigma in sigmas] if max(sigmas) > 1.0 else list(sigmas)
    if levels[0] < levels[-1]:
        levels = [levels[0] + levels[-1] - level for level in levels]
    return [min(levels[0], max(levels[-1], level)) for level in levels]


def residual_time(levels: Sequence[float]) -> list[float]:
    """How far residuals have gone before each step of a run with these `noise_levels` and at its end, never back.

    It is the noise level between `LITTLE_NOISE` and 1 - `LITTLE_PICTURE`, and goes on as the logarithm of the noise's share
    below and of the picture's above, as log-SNR does: where little is left of either, the model's answer turns on it.
    """
    return _way(list(map(_residual_time, levels)))


def _way(values: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(abs(after - before) for before, after in pairwise(values))]


def _residual_time(noise: float) -> float:
    if noise < LITTLE_NOISE:
        return LITTLE_NOISE * (1.0 + math.log(max(noise, LEAST_SHARE) / LITTLE_NOISE))
    if noise > 1.0 - LITTLE_PICTURE:
        return 1.0 - LITTLE_PICTURE * (1.0 + math.log(max(1.0 - noise, LEAST_SHARE) / LITTLE_PICTURE))
    return noise


@lru_cache(maxsize=64)
def place_steps(
    rules: PlacementRules, num_steps: int, sigmas: tuple[float, ...] | None, corrected: bool
) -> frozenset[int]:
    """The steps, from 1, of a run of `num_steps` that compute, where skipped ones are `corrected` or are not.

    `computed_count` of them: those that must (the first ones, those outside the part), the rest where `least_error` puts
    them. There are more of them where the rules ask for it: to keep the longest gap, and where a long warm-up has used the
    budget up; what follows is then never thinner than half the target's density.
    """
    wanted = computed_count(num_steps, rules.target_speedup)
    if wanted == num_steps:
        return frozenset(range(1, num_steps + 1))
    levels = noise_levels(num_steps, sigmas)
    time = residual_time(levels) if corrected else _way(levels)
    if rules.clock is not None and len(rules.clock) == num_steps + 1:
        # in the units of the other up to the last step: what lies behind that is asked by nobody
        unit = time[-2] / (rules.clock[-2] or 1.0)
        time = [unit * passed for passed in rules.clock]
    interval = 1 if rules.skip_interval is None else rules.skip_interval
    start = first_steps(max(rules.warmup_steps, rules.part.first(num_steps) - 1), interval)
    end = range(max(1, rules.part.last(num_steps) + 1), num_steps + 1)
    must = {step for step in (*start, *end) if step <= num_steps}
    # indices from 0: the last of the first steps, and the first of those at the end
    before = end.start - 1 if end else num_steps
    after = max((step for step in must if step <= before), default=0) - 1
    free = before - after - 1
    count = max(
        wanted - len(must),
        int(free / (2.0 * rules.target_speedup)),
        _fewest(before - after, rules.max_consecutive_hits),
    )
    count = max(0, min(count, free))
    span = slice(after, before + 1)
    if free:
        ends = before < num_steps
        placed = least_error(time[span], levels[span], count, rules.max_consecutive_hits, ends=ends, corrected=corrected)
        must |= {after + index + 1 for index in placed}
    return frozenset(must)
