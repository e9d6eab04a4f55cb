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
    `progress` has it."""


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


SIGMA_SHARE = 0.5
"""What time is made of as residuals go: this much of it the noise level, the rest steps."""


def noise_levels(num_steps: int, sigmas: Sequence[float] | None) -> list[float]:
    """How much of the run's noise is left before each step and at its end, from 1 to 0.

    Where no list of num_steps + 1 sigmas is given, or it ends where it began, as if it fell evenly. Sigmas above 1 are those
    of x = x₀ + σ ε and count as σ / (1 + σ), the share of noise. What lies beyond the ends of the list counts as they do.
    """
    if sigmas is None or len(sigmas) != num_steps + 1 or sigmas[0] == sigmas[-1]:
        return [1.0 - index / num_steps for index in range(num_steps + 1)]
    levels = [sigma / (1.0 + sigma) for sigma in sigmas] if max(sigmas) > 1.0 and min(sigmas) >= 0.0 else list(sigmas)
    whole = levels[0] - levels[-1]
    return [min(1.0, max(0.0, (level - levels[-1]) / whole)) for level in levels]


def progress(levels: Sequence[float]) -> list[float]:
    """How far a run with these `noise_levels` has come before each of its steps and at its end, from 0 to 1, never back."""
    steps = len(levels) - 1
    way = [0.0, *accumulate(abs(after - before) for before, after in pairwise(levels))]
    return [SIGMA_SHARE * passed / way[-1] + (1.0 - SIGMA_SHARE) * index / steps for index, passed in enumerate(way)]


def turns_back(sigmas: Sequence[float], step: int) -> bool:
    """Whether the noise level of a step, from 1, goes against the direction of the whole list: samplers that restart add
    noise there, and what was stored before says little of what follows."""
    if not 1 < step < len(sigmas) or sigmas[0] == sigmas[-1]:
        return False
    before, now = sigmas[step - 2], sigmas[step - 1]
    return now != before and (now > before) != (sigmas[-1] > sigmas[0])


@lru_cache(maxsize=64)
def place_steps(rules: PlacementRules, num_steps: int, sigmas: tuple[float, ...] | None) -> frozenset[int]:
    """The steps, from 1, of a run of `num_steps` that compute.

    `computed_count` of them: those that must (the first ones, those outside the part), the rest where `least_error` puts
    them. There are more of them where the rules ask for it: to keep the longest gap, and where a long warm-up has used the
    budget up; what follows is then never thinner than half the target's density.
    """
    wanted = computed_count(num_steps, rules.target_speedup)
    if wanted == num_steps:
        return frozenset(range(1, num_steps + 1))
    levels = noise_levels(num_steps, sigmas)
    time = rules.clock if rules.clock is not None and len(rules.clock) == num_steps + 1 else progress(levels)
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
    placed = least_error(time[span], levels[span], count, rules.max_consecutive_hits, ends=before < num_steps) if free else []
    return frozenset(must | {after + index + 1 for index in placed})
