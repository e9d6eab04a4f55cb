"""The rules that the strategies are compared with."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cache_dit.forecasts import Point
from cache_dit.options import RULES as RULE_OPTIONS
from cache_dit.options import resolve_options
from cache_dit.strategies import RULES, StepView, Strategy, build_strategy


def view(step: int, hits: int = 0, **more: object) -> StepView:
    """A step whose last computed one was step − hits − 1, of a run that has measured a small error."""
    newest = step - hits - 1
    stored = tuple(Point(s, None) for s in (newest, newest - 2) if s > 0)
    known: dict[str, object] = {
        "num_steps": None,
        "sigmas": None,
        "clock": 0.0,
        "last_increment": None,
        "forecast_error": 0.01,
        "last_gap": 2,
    }
    return StepView(step=step, consecutive_hits=hits, stored=stored, **{**known, **more})  # type: ignore[arg-type]


def built(name: str, **options: object) -> Strategy:
    return build_strategy(resolve_options({"strategy": name, **options}))


def test_every_rule_can_be_chosen() -> None:
    assert set(RULES) == set(RULE_OPTIONS)
    for name in RULES:
        assert not built(name, target_speedup=2.0).never_skips()


def test_the_front_clock_looks_half_a_step_further_than_teacache() -> None:
    given = view(10, hits=1, clock=0.05, last_increment=0.04)
    assert built("teacache", tolerance=0.1).decide(given).skip
    assert not built("front_clock", tolerance=0.1).decide(given).skip
    assert built("front_clock", tolerance=0.12).decide(given).skip


@pytest.mark.parametrize(
    ("hits", "measured", "distance"),
    [
        # the step before was computed, two steps behind the one before it: half of its change a step
        (0, 0.1, 0.05),
        # the step before was the first skipped one: two such steps
        (1, 0.1, 0.2),
        (3, 0.3, 0.4),
    ],
)
def test_the_first_block_rule_carries_the_distance_one_step_on(hits: int, measured: float, distance: float) -> None:
    given = view(10, hits=hits, last_increment=measured)
    assert built("first_block", tolerance=distance * 1.001).decide(given).skip
    assert not built("first_block", tolerance=distance * 0.999).decide(given).skip


def test_the_first_block_rule_needs_no_more_than_one_residual() -> None:
    """Plain reuse keeps one."""
    given = replace(view(10, last_increment=0.1), stored=(Point(9, None),))
    assert built("first_block", tolerance=0.051).decide(given).reason == "clock"
    assert not built("first_block", tolerance=0.049).decide(given).skip
    assert built("first_block").decide(replace(given, last_gap=None)).reason == "interval"


def test_the_first_block_rule_has_the_guards_of_the_clock() -> None:
    rule = built("first_block", tolerance=10.0, max_consecutive_hits=2)
    assert rule.decide(view(1)).reason == "warmup"
    assert rule.decide(view(10, hits=2, last_increment=0.1)).reason == "max_consecutive_hits"
    assert rule.decide(view(10, last_increment=0.1, forecast_error=0.9)).reason == "error_guard"
    assert rule.decide(replace(view(9), forecast_error=None)).reason == "interval"
    assert [rule.decide(view(n)).skip for n in (9, 10)] == [False, True]


def test_sigma_spacing_needs_the_number_of_steps() -> None:
    rule = built("sigma", target_speedup=4.0)
    sigmas = [(1 - i / 12) ** 2 for i in range(13)]
    computed = [n for n in range(1, 15) if not rule.decide(view(n, num_steps=12, sigmas=sigmas)).skip]
    wanted = [min(range(13), key=lambda i: abs(sigmas[i] - level)) + 1 for level in (1.0, 2 / 3, 1 / 3)]
    assert computed == [*wanted, 13, 14]
    assert all(not rule.decide(view(n)).skip for n in range(1, 6))
    assert all(b > a for a, b in pairwise(computed))
