"""Where the computed steps of a run go when their number is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    """How often a step may be skipped before the second computed one; None: as `own_interval` has it."""
    max_consecutive_hits: int | None
    """Longest gap between computed steps, in skipped ones; None: no bound."""
    part: PartOfRun
    """Steps outside it compute."""
    sigma_share: float = 0.75
    """What the distance between computed steps is made of: this much of it sigma, the rest steps."""
    clock: tuple[float, ...] | None = None
    """In runs of its length the distance instead: how far the run has come before each step and at its end, from 0 to 1."""


def computed_count(num_steps: int, target_speedup: float) -> int:
    """How many steps are to compute: num_steps / target_speedup, rounded (a half down), at least 1."""
    return min(num_steps, max(1, math.ceil(num_steps / target_speedup - 0.5)))


EARLY_SECOND = 8
"""Computed steps of a run from which on the second one comes early, at step 3; fewer cannot spare one for the start."""


def own_interval(wanted: int) -> int:
    """The interval before the second computed step where none is given: 2, or none (1) where few steps compute."""
    return 2 if wanted >= EARLY_SECOND else 1


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


def _nearest(levels: Sequence[float], wanted: float, low: int, high: int) -> int:
    """The index from `low` to `high` whose level is nearest to `wanted`, the first of equals."""
    return min(range(low, high + 1), key=lambda index: abs(levels[index] - wanted))


def spread(levels: Sequence[float], after: int, before: int, count: int, max_gap: int | None) -> list[int]:
    """`count` increasing indices strictly between `after` and `before`, nearest to levels spaced evenly between theirs.

    Each is the nearest that leaves room for those to come and no gap longer than `max_gap`, which `count` must allow.
    The levels need not be monotone; of equally near ones the first is taken.
    """
    placed: list[int] = []
    previous = after
    for k in range(1, count + 1):
        wanted = levels[after] + (levels[before] - levels[after]) * k / (count + 1)
        low, high = previous + 1, before - (count - k) - 1
        if max_gap is not None:
            low = max(low, before - (count - k + 1) * (max_gap + 1))
            high = min(high, previous + 1 + max_gap)
        previous = _nearest(levels, wanted, low, high)
        placed.append(previous)
    return placed


def progress(num_steps: int, sigmas: Sequence[float] | None, sigma_share: float) -> list[float]:
    """How far a run has come before each of its steps and at its end, from 0 to 1: a mean of its way in sigma and in steps.

    Where no list of num_steps + 1 sigmas is given, or it ends where it began, steps alone. Sigmas above 1 are those of
    x = x₀ + σ ε and count as σ / (1 + σ), the share of noise.
    """
    steps = [index / num_steps for index in range(num_steps + 1)]
    if sigmas is None or len(sigmas) != num_steps + 1 or sigmas[0] == sigmas[-1]:
        return steps
    levels = [sigma / (1.0 + sigma) for sigma in sigmas] if max(sigmas) > 1.0 and min(sigmas) >= 0.0 else list(sigmas)
    whole = levels[-1] - levels[0]
    return [
        sigma_share * (level - levels[0]) / whole + (1.0 - sigma_share) * step
        for level, step in zip(levels, steps, strict=True)
    ]


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

    `computed_count` of them: those that must (the first ones, those outside the part), the rest at the indices nearest
    to even distances of `progress`. There are more of them where the rules ask for it: to keep the longest gap, and
    where a long warm-up has used the budget up; what follows is then never thinner than half the target's density.
    """
    wanted = computed_count(num_steps, rules.target_speedup)
    if wanted == num_steps:
        return frozenset(range(1, num_steps + 1))
    levels: Sequence[float] = progress(num_steps, sigmas, rules.sigma_share)
    if rules.clock is not None and len(rules.clock) == num_steps + 1:
        levels = rules.clock
    interval = own_interval(wanted) if rules.skip_interval is None else rules.skip_interval
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
    placed = spread(levels, after, before, min(count, free), rules.max_consecutive_hits)
    return frozenset(must | {index + 1 for index in placed})
