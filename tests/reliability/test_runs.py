"""Isolation of runs: nothing of one generation reaches another, whatever was cut off, interleaved or changed in between."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cache_dit
from cache_dit.strategies import STRATEGIES

from .. import models
from .generations import (
    EXACT,
    GREEDY,
    Plan,
    Prompted,
    calls_of,
    cut,
    enabled,
    falling,
    generate,
    hits_of,
    interleaved,
    prompted,
    same,
    tensor,
)

TESTS = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


# Fifty in a row.

SAMPLERS = ("euler", "guided", "heun", "midpoint")


def fifty() -> list[Plan]:
    """Other seeds, prompts, lengths, samplers, shapes and starting points, each seen to begin by its first timestep."""
    plans = []
    for n in range(50):
        start = 0.6 if n % 7 == 6 else 1.0
        plans.append(Plan(1000 + 10 * n, falling(6 + n % 4, start), SAMPLERS[n % 4], 1 + n % 3, 6 - n // 5 % 2))
    return plans


IN_A_ROW: dict[str, Any] = {"inner": "eager", "language": "en", "noise_scale": 0.001, "warmup_steps": 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fifty_generations_are_each_that_of_a_model_never_used_before(strategy: str) -> None:
    model = enabled({**IN_A_ROW, "strategy": strategy})
    for plan in fifty():
        assert same(generate(plan, model), generate(plan, enabled({**IN_A_ROW, "strategy": strategy}))), plan
    assert hits_of(model) > 50


@pytest.mark.slow
def test_the_last_of_many_generations_is_that_of_a_fresh_process() -> None:
    """Under each strategy."""
    every = [{**IN_A_ROW, "strategy": strategy} for strategy in STRATEGIES]
    found = []
    for options in every:
        model = enabled(options)
        found.append([output for plan in fifty()[-6:] for output in generate(plan, model)][-len(fifty()[-1].times) :])
    code = (
        "import importlib.util, json, sys, torch\n"
        "def load(name, path, **more):\n"
        "    spec = importlib.util.spec_from_file_location(name, path, **more)\n"
        "    sys.modules[name] = module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    return module\n"
        f"tests = {str(TESTS)!r}\n"
        "import types\n"
        "for name, path in (('t', tests), ('t.reliability', tests + '/reliability')):\n"
        "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [path]\n"
        "from t.reliability.generations import Plan, enabled, generate\n"
        "given, every = json.loads(sys.stdin.read())\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "plan = Plan(given[0], tuple(given[1]), *given[2:])\n"
        "print(json.dumps([[o.flatten().tolist() for o in generate(plan, enabled(options))] for options in every]))\n"
    )
    plan = fifty()[-1]
    given = [plan.seed, plan.times, plan.sampler, plan.batch, plan.tokens]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([given, every]), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for outputs, alone in zip(found, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert same([output.flatten() for output in outputs], [torch.tensor(values) for values in alone][-len(outputs) :])


# Cut off.


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 0}, {"skip_interval": 1, "warmup_steps": 1}, {"schedule": "10" * 20}])
@pytest.mark.parametrize("after", SAMPLERS)
def test_a_run_that_was_cut_off_leaves_nothing_to_the_next_one(after: str, options: dict[str, Any]) -> None:
    """Whatever the cut run was about, the next one gives the same: nothing of it was used."""
    for n, calls in enumerate((1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8)):
        found = []
        for seed in (1, 2):
            model = enabled({**EXACT, **options})
            cut(Plan(10 * seed, falling(8), SAMPLERS[n % 4]), model, calls)
            found.append(generate(Plan(77, falling(8), after), model))
        assert same(*found), calls


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_a_run_from_the_middle_behind_one_that_was_cut_off_there_is_told_by_its_prompt(calls: int) -> None:
    """Its timesteps go on where those of the cut run ended."""
    found = []
    for seed in (1, 2):
        model = enabled(GREEDY)
        plan = Plan(10 * seed, falling(8))
        cut(plan, model, calls)
        if calls > 1:
            found.append(generate(Plan(77, plan.times[calls:]), model))
        else:
            # one call tells nothing of its arguments: this is what `new_run` is for
            cache_dit.new_run(model)
            found.append(generate(Plan(77, plan.times[calls:]), model))
    assert same(*found)
    assert same(found[0], generate(Plan(77, falling(8)[calls:]), enabled(GREEDY))) or calls > 1


def test_a_run_that_goes_on_where_the_last_one_ended_is_told_by_new_run() -> None:
    """Up and down again in one line of timesteps."""
    model = enabled(GREEDY)
    up, down = Plan(10, tuple(i / 8 for i in range(8))), Plan(20, falling(8))
    for _ in range(2):
        for plan in (up, down):
            cache_dit.new_run(model)
            assert same(generate(plan, model), generate(plan, enabled(GREEDY)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_that_go_up(sampler: str) -> None:
    model = enabled({**EXACT, "warmup_steps": 1})
    for seed in range(3):
        plan = Plan(10 * seed, tuple(i / 10 for i in range(10)), sampler)
        assert same(generate(plan, model), generate(plan, enabled({**EXACT, "warmup_steps": 1})))
    assert hits_of(model) >= 12


@pytest.mark.parametrize("listed", [False, True])
def test_a_sampler_that_restarts(listed: bool) -> None:
    times = (1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.1)
    found = []
    for seed in (1, 2):
        model = enabled({**EXACT, "warmup_steps": 1})
        generate(Plan(10 * seed, falling(8)), model)
        if listed:
            cache_dit.new_run(model, sigmas=[*times, 0.0])
        found.append(generate(Plan(77, times), model))
    assert same(*found)
    assert cache_dit.get_stats(model).runs == (2 if listed else 3)


# Interleaved.


def orders(parties: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, parties - 1), min_size=4, max_size=40)


few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(order=orders(2), warmup=st.integers(0, 3), sampler=st.sampled_from(["euler", "guided"]))
@few
def test_unnamed_generations_that_interleave_cost_speed_and_no_picture(order: list[int], warmup: int, sampler: str) -> None:
    """Told apart by their prompts, in any order of calls once each has made two steps."""
    begun = [0, 0, 1, 1] if sampler == "euler" else [0, 0, 0, 0, 1, 1]
    found = []
    for seed in (1, 2):
        model = enabled({**EXACT, "warmup_steps": warmup, "skip_interval": 1})
        running = [calls_of(Plan(77, falling(7), sampler), model), calls_of(Plan(10 * seed, falling(7)), model)]
        found.append(interleaved([*begun, *order], running)[0])
    assert same(*found)


@given(order=orders(3))
@few
def test_named_generations_that_interleave_are_each_as_if_alone(order: list[int]) -> None:
    model = enabled({**EXACT, "warmup_steps": 1})
    plans = [Plan(10, falling(7)), Plan(20, falling(9), "midpoint"), Plan(30, falling(6, 0.7), "heun")]

    def named(name: str) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            with cache_dit.context(model, name):
                output: Tensor = model(*inputs)
            return output

        return call

    outputs = interleaved(order, [calls_of(plan, named(f"request {i}")) for i, plan in enumerate(plans)])
    for i, (plan, found) in enumerate(zip(plans, outputs, strict=True)):
        alone = enabled({**EXACT, "warmup_steps": 1})
        with cache_dit.context(alone, f"request {i}"):
            assert same(found, generate(plan, alone))


def test_overlapping_runs_of_named_contexts_keep_the_bound_on_skipped_steps_and_are_counted_once() -> None:
    model = enabled({**EXACT, "warmup_steps": 1, "skip_interval": 1})
    plans = {"a": Plan(10, falling(20)), "b": Plan(20, falling(20))}
    hits: dict[str, list[bool]] = {"a": [], "b": []}

    def call(name: str, step: int) -> None:
        noise, prompt, _ = plans[name].parts()
        before = hits_of(model)
        with torch.no_grad(), cache_dit.context(model, name):
            model(noise, torch.full((2,), 1.0 - step / 20), prompt)
        hits[name].append(hits_of(model) > before)

    for step in range(3):
        call("a", step)
    call("b", 0)
    for step in range(19):
        # the second run of "a" overlaps with the first of "b"
        call("a", step)
        call("b", step + 1)
    for found in hits.values():
        longest = max(len(list(group)) for hit, group in itertools.groupby(found) if hit)
        assert longest == 4
    assert cache_dit.get_stats(model).runs == 2


# Changes in mid-run.


@pytest.mark.parametrize("negative_first", [False, True])
@pytest.mark.parametrize(("start", "end"), [(0, 5), (3, 9), (4, 6)])
def test_guidance_within_a_part_of_the_run(start: int, end: int, negative_first: bool) -> None:
    """The positive prompt's predictions never come from the negative one's calls, nor the other way round."""
    outputs = []
    for other in (1, 2):
        model = enabled({**EXACT, "warmup_steps": 0, "skip_interval": 1})
        positive, negative = tensor(5, 2, models.WIDTH), tensor(other, 2, models.WIDTH)
        found = []
        with torch.no_grad():
            for step in range(9):
                x, t = tensor(100 + step, 2, 6, models.CHANNELS), torch.full((2,), 1.0 - step / 9)
                guided = start <= step < end
                if guided and negative_first:
                    model(x, t, negative)
                found.append(model(x, t, positive))
                if guided and not negative_first:
                    model(x, t, negative)
        outputs.append(found)
    assert same(*outputs)


@pytest.mark.parametrize("sizes", [[(2, 6), (3, 6), (2, 6)], [(2, 6), (2, 9), (2, 6)], [(1, 4), (4, 4), (4, 8), (1, 4)]])
def test_batch_and_resolution_changed_and_changed_back(sizes: Sequence[tuple[int, int]]) -> None:
    model, plain = enabled(GREEDY), prompted()
    step = 0
    for batch, tokens in sizes:
        for place in range(3):
            x, prompt = tensor(step, batch, tokens, models.CHANNELS), tensor(9, batch, models.WIDTH)
            inputs = x, torch.full((batch,), 1 - step / 20), prompt
            before = hits_of(model)
            with torch.no_grad():
                output, wanted = model(*inputs), plain(*inputs)
            assert output.shape == wanted.shape
            if place == 0:
                assert hits_of(model) == before
                torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
            step += 1


def test_a_long_row_of_cut_runs_leaves_nothing() -> None:
    """Cut at any place, in any order, as an impatient user does it."""
    model = enabled({**EXACT, "warmup_steps": 2})
    generator = torch.Generator().manual_seed(3)
    for n in range(40):
        calls = int(torch.randint(1, 9, (1,), generator=generator))
        cut(Plan(10 * n, falling(8), SAMPLERS[n % 4]), model, calls)
    plan = Plan(5000, falling(8))
    first = generate(plan, model)
    assert same(generate(plan, model), generate(plan, enabled({**EXACT, "warmup_steps": 2})))
    assert len(first) == 8


def test_the_model_itself_is_not_touched() -> None:
    model, plain = prompted(), prompted()
    with cache_dit.cached(model, **EXACT):
        for seed in range(3):
            generate(Plan(seed, falling(8)), model)
    assert isinstance(model, Prompted)
    plan = Plan(7, falling(8))
    assert same(generate(plan, model), generate(plan, plain))
