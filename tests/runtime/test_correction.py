"""Skipped steps are put right as the formula says, within the bound, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.forecasts import Point
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime import correction
from cache_dit.runtime.solvers import SolverStep, solver_steps

from .. import models
from ..reference import EagerCache

SIGMAS = [1.0, 0.9, 0.78, 0.6, 0.45, 0.25, 0.0]
PLAN = "100101"
OPTIONS: dict[str, Any] = {"inner": "eager", "noise_scale": 0.0, "language": "en", "schedule": PLAN, "forecast": "lagrange"}


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return models.TinyDiT().double().eval().requires_grad_(False)


def noise() -> Tensor:
    return torch.randn(models.BATCH, models.TOKENS, models.CHANNELS, generator=torch.Generator().manual_seed(1)).double()


def step_of(solver: str) -> Callable[[int, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """One step of a solver's recurrence: (index, x, output, last denoised) -> (x, denoised)."""
    steps = solver_steps(solver, "flow", SIGMAS, len(SIGMAS) - 1)
    assert steps is not None
    known: tuple[SolverStep, ...] = steps

    def advance(i: int, x: Tensor, output: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        step = known[i]
        denoised = step.p * x + step.q * output
        return step.a * x + step.b * denoised + (0.0 if before is None else step.c * before), denoised

    return advance


def sampled(
    model: nn.Module, solver: str = "euler", in_place: bool = False, announce: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The last state of a run with caching, and what the model gave at each step."""
    advance = step_of(solver)
    if announce:
        cache_dit.new_run(model, sigmas=SIGMAS, solver=solver, prediction="flow")
    x, before, outputs = noise(), None, []
    with torch.no_grad():
        for i, sigma in enumerate(SIGMAS[:-1]):
            out = model(x, torch.full((models.BATCH,), sigma, dtype=x.dtype))
            outputs.append(out.clone())
            moved, before = advance(i, x, out, before)
            if in_place:
                x.copy_(moved)
                out.zero_()
            else:
                x = moved
    return x, outputs


def corrected_by_hand(order: int, solver: str) -> Tensor:
    """The same with the state itself put right: at a computed step the skipped ones before it are done again."""
    model = tiny()
    eager = EagerCache(model.blocks, streams=("x",))
    advance = step_of(solver)
    stored: list[tuple[float, Tensor]] = []

    def through(points: Sequence[tuple[float, Tensor]], at: float) -> Tensor:
        """Newton's form of the polynomial through all of these points."""
        (s0, r0), *others = points
        if not others:
            return r0
        slopes = [(s, (r - r0) / (s - s0)) for s, r in others]
        return r0 + (at - s0) * through(slopes, at)

    def between(points: Sequence[tuple[float, Tensor]], at: float) -> Tensor:
        """A parabola, or a line where the third point lies close behind the second."""
        close = len(points) > 2 and points[2][0] - points[1][0] < 0.5 * (points[1][0] - points[0][0])
        return through(points[: 2 if close else 3], at)

    def asked(x: Tensor, sigma: float, residual: Tensor | None) -> Tensor:
        eager.skip = residual is not None
        if residual is not None:
            eager.residuals[0] = [residual]
        out: Tensor = model(x, torch.full((models.BATCH,), sigma, dtype=x.dtype))
        return out

    x = noise()
    before: Tensor | None = None
    since: list[tuple[int, Tensor]] = []
    anchor: tuple[Tensor, Tensor | None] = (x, None)
    with torch.no_grad():
        for i, sigma in enumerate(SIGMAS[:-1]):
            if PLAN[i] == "0":
                if not since:
                    anchor = (x, before)
                since.append((i, x))
                out = asked(x, sigma, through(stored[: order + 1], sigma))
            else:
                out = asked(x, sigma, None)
                residual = eager.residuals[0][0]
                assert residual is not None
                stored.insert(0, (sigma, residual))
                if since:
                    # the way from before the skipped steps up to here once more, with better outputs
                    state, last = anchor
                    for m, seen in since:
                        better = asked(seen, SIGMAS[m], between(stored, SIGMAS[m]))
                        state, last = advance(m, state, better, last)
                    x, before = state, last
                    since = []
            x, before = advance(i, x, out, before)
    return x


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize(("forecast", "order"), [("reuse", 0), ("lagrange", 1)])
def test_the_state_is_put_right_by_way_of_the_output(
    monkeypatch: pytest.MonkeyPatch, solver: str, forecast: str, order: int
) -> None:
    monkeypatch.setattr(correction, "BOUND", 1e9)
    model = cache_dit.enable_cache(tiny(), **{**OPTIONS, "forecast": forecast, "correction": True})
    by_output, _ = sampled(model, solver)
    assert cache_dit.get_stats(model).hits == PLAN.count("0")
    by_state = corrected_by_hand(order, solver)
    torch.testing.assert_close(by_output, by_state, rtol=1e-10, atol=1e-12)
    uncorrected, _ = sampled(cache_dit.enable_cache(tiny(), **{**OPTIONS, "forecast": forecast, "correction": False}), solver)
    assert float((uncorrected - by_state).abs().max()) > 1e-4


@pytest.mark.parametrize(("steps", "times", "degree"), [
    ((5, 3), (0.4, 0.6), 1),
    ((5, 3, 1), (0.4, 0.6, 0.8), 2),
    ((5, 3, 2), (0.4, 0.6, 0.7), 2),
    ((5, 3, 2), (0.4, 0.6, 0.69), 1),
    # where a time is not known, steps count
    ((7, 3, 1), (0.4, None, 0.61), 2),
    ((8, 3, 1), (0.4, None, 0.9), 1),
])  # fmt: skip
def test_a_third_residual_close_behind_the_second_is_left_out(
    steps: tuple[int, ...], times: tuple[float | None, ...], degree: int
) -> None:
    stored = [Point(step, time) for step, time in zip(steps, times, strict=True)]
    assert correction._degree(stored) == degree


def test_auto_is_a_line_where_steps_are_corrected() -> None:
    by_choice, by_name, uncorrected = (
        sampled(
            cache_dit.enable_cache(tiny(), **{**OPTIONS, "forecast": forecast, "correction": correction_, "schedule": "101001"})
        )[0]
        for forecast, correction_ in (("auto", True), ("lagrange", True), ("auto", False))
    )
    assert torch.equal(by_choice, by_name)
    assert not torch.equal(by_choice, uncorrected)


def test_what_the_caller_does_to_inputs_and_outputs_does_not_matter() -> None:
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    kept, _ = sampled(model)
    overwritten, _ = sampled(model, in_place=True)
    torch.testing.assert_close(overwritten, kept, rtol=0.0, atol=0.0)


def test_the_bound_holds_and_an_exact_forecast_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=False))
    moved = []
    for bound in (0.0, 1e-3, 1e9):
        monkeypatch.setattr(correction, "BOUND", bound)
        _, outputs = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=True))
        moved.append(float((outputs[3] - plain[3]).square().mean().sqrt()))
    assert moved[0] == 0.0
    assert 0.0 < moved[1] < moved[2]
    # two skipped steps, each with what its share of the state's movement lets through, at an error of 1 at most
    shares = sum((SIGMAS[m] - SIGMAS[m + 1]) for m in (1, 2)) / (SIGMAS[3] - SIGMAS[4])
    assert moved[1] <= 1e-3 * shares * max(float(out.square().mean().sqrt()) for out in plain)


@pytest.mark.parametrize("given", [{}, {"solver": "unipc"}, {"prediction": None}, {"sigmas": None}])
def test_an_unknown_run_is_left_alone_and_that_is_said(given: dict[str, Any]) -> None:
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    known = {"sigmas": SIGMAS, "solver": "euler", "prediction": "flow", "num_steps": len(SIGMAS) - 1}
    cache_dit.new_run(model, **({**known, **given} if given else {}))
    with pytest.warns(CacheDitWarning, match="skipped steps are not corrected"):
        _, outputs = sampled(model, announce=False)
    _, plain = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=False))
    for mine, theirs in zip(outputs, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_auto_is_for_the_adaptive_strategy_alone() -> None:
    _, automatic = sampled(cache_dit.enable_cache(tiny(), **OPTIONS))
    _, plain = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=False))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(automatic, plain, strict=True))
    adaptive = {**OPTIONS, "strategy": "adaptive", "schedule": None, "target_speedup": 2.0}
    _, automatic = sampled(cache_dit.enable_cache(tiny(), **adaptive))
    _, plain = sampled(cache_dit.enable_cache(tiny(), **adaptive, correction=False))
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(automatic, plain, strict=True))


def test_contexts_are_corrected_each_on_its_own() -> None:
    alone, _ = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=True))
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    cache_dit.new_run(model, sigmas=SIGMAS, solver="euler", prediction="flow")
    advance = step_of("euler")
    x, other = noise(), noise().flip(0) * 0.5
    with torch.no_grad():
        for i, sigma in enumerate(SIGMAS[:-1]):
            t = torch.full((models.BATCH,), sigma, dtype=x.dtype)
            with cache_dit.context(model, "one"):
                x, _ = advance(i, x, model(x, t), None)
            with cache_dit.context(model, "two"):
                other, _ = advance(i, other, model(other, t), None)
    torch.testing.assert_close(x, alone, rtol=0.0, atol=0.0)


def euler_of(model: nn.Module, start: int, joins: Callable[[int], list[str]]) -> Tensor:
    """The last state of a generation from a step on, as the context 'late'; 'all' is another one, of every step."""
    x, other = noise(), noise().flip(0) * 0.5
    with torch.no_grad():
        for i, (sigma, following) in enumerate(pairwise(SIGMAS)):
            t = torch.full((models.BATCH,), sigma, dtype=x.dtype)
            for name in joins(i):
                with cache_dit.context(model, name):
                    if name == "late" and i >= start:
                        x = x + (following - sigma) * model(x, t)
                    elif name == "all":
                        other = other + (following - sigma) * model(other, t)
    return x


def test_a_context_that_begins_late_is_corrected_by_its_own_steps() -> None:
    """As in a run of the levels that are left; not by the run's first ones, whose timesteps would not go with its own."""
    left = {**OPTIONS, "schedule": PLAN[1:]}
    alone = cache_dit.enable_cache(tiny(), **left, correction=True)
    cache_dit.new_run(alone, sigmas=SIGMAS[1:], solver="euler", prediction="flow")
    wanted = euler_of(alone, 1, lambda i: ["late"] if i else [])
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    cache_dit.new_run(model, sigmas=SIGMAS, solver="euler", prediction="flow")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        found = euler_of(model, 1, lambda i: ["all", "late"])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert cache_dit.get_stats(model).hits == 5


def test_inference_tensors_are_copied() -> None:
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    usual, _ = sampled(model)
    with torch.inference_mode():
        inside, _ = sampled(model, in_place=True)
    torch.testing.assert_close(inside.clone(), usual, rtol=1e-12, atol=1e-12)


def test_a_residual_that_is_not_finite_corrects_nothing() -> None:
    measured = torch.tensor([1.0, 4.0, 0.5, 0.0, 0.0])
    assert float(correction._relative_error(measured, 2, (1.0,))) == 0.0
    measured[0] = 0.0
    assert float(correction._relative_error(measured, 2, (1.0,))) == pytest.approx((0.5 / 4.0) ** 0.5)


def test_inputs_too_large_to_keep_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from cache_dit.runtime import corrector

    monkeypatch.setattr(corrector, "FREE_BYTES", -(2**40))
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    with pytest.warns(CacheDitWarning, match="too large to be kept"):
        _, outputs = sampled(model)
    _, plain = sampled(cache_dit.enable_cache(tiny(), **OPTIONS, correction=False))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, plain, strict=True))


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_what_is_kept_of_skipped_steps_is_counted(solver: str) -> None:
    model = cache_dit.enable_cache(tiny(), **OPTIONS, correction=True)
    cache_dit.new_run(model, sigmas=SIGMAS, solver=solver, prediction="flow")
    residuals = 3 * models.BATCH * models.TOKENS * models.WIDTH * 8
    output = models.BATCH * models.TOKENS * models.CHANNELS * 8
    inputs = output + models.BATCH * 8
    # at the computed steps: the copies of the newest inputs, and the deviations of this gap and of the one before
    wanted = [0, inputs + output, 2 * (inputs + output), inputs + output, inputs + 2 * output, inputs + 2 * output]
    # a solver with memory makes up for the last one at the next step, and that is another deviation
    wanted[4] += output if solver == "dpmpp_2m" else 0
    x, held = noise(), []
    with torch.no_grad():
        for sigma in SIGMAS[:-1]:
            model(x.clone(), torch.full((models.BATCH,), sigma, dtype=x.dtype))
            held.append(cache_dit.get_stats(model).cache_bytes - residuals)
            assert cache_dit.explain(model).held_bytes == held[-1] + residuals
    assert held == wanted
    cache_dit.new_run(model)
    assert cache_dit.get_stats(model).cache_bytes == residuals


def test_under_bare_torch_compile_nothing_is_corrected() -> None:
    with pytest.warns(CacheDitWarning, match="only tensor of one graph"):
        model = tiny()
        compiled = torch.compile(model, backend="cache_dit", options={**OPTIONS, "correction": True})
        with torch.no_grad():
            compiled(noise(), torch.full((models.BATCH,), SIGMAS[0], dtype=torch.float64))


def test_a_prompt_that_comes_again_is_copied_once_and_not_kept_alive() -> None:
    past = correction.Past()
    prompt, weight = torch.ones(3), torch.ones(2)
    first = past.keep((prompt, weight, 7), [weight])
    second = past.keep((prompt, weight, 7), [weight])
    assert first[0] is second[0]
    assert first[0] is not prompt
    assert first[1] is weight
    prompt.add_(1.0)
    third = past.keep((prompt, weight, 7), [weight])
    assert third[0] is not first[0]
    assert float(first[0][0]) == 1.0


class Scaled(nn.Module):
    """The tiny model behind a timestep of its own unit."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t * 3.0)  # type: ignore[no-any-return]


class ScaledInPlace(Scaled):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t *= 3.0
        return self.model(x, t)  # type: ignore[no-any-return]


def test_a_model_that_writes_to_its_inputs_is_corrected_as_one_that_does_not() -> None:
    found = [sampled(cache_dit.enable_cache(kind(), correction=True, **OPTIONS))[0] for kind in (Scaled, ScaledInPlace)]
    assert torch.equal(*found)


class Noisy(Scaled):
    """Draws random numbers in front of its blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x + 0.05 * torch.randn_like(x), t)  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_run_once_more_is_left_alone() -> None:
    found = []
    for correction_wanted in (False, True):
        torch.manual_seed(5)
        model = cache_dit.enable_cache(Noisy(), correction=correction_wanted, **OPTIONS)
        torch.manual_seed(7)
        if correction_wanted:
            with pytest.warns(CacheDitWarning, match="random numbers or writes to its own buffers"):
                x, _ = sampled(model)
        else:
            x, _ = sampled(model)
        found.append((x, torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


class Normed(Scaled):
    """What the model gives is made of the blocks' output by code that is not traced."""

    @torch.compiler.disable
    def tail(self, v: Tensor) -> Tensor:
        return v / v.square().mean(-1, keepdim=True).sqrt()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.tail(self.model(x, t))


def test_an_output_that_is_not_the_graphs_is_left_alone() -> None:
    without, _ = sampled(cache_dit.enable_cache(Normed(), correction=False, **OPTIONS))
    with pytest.warns(CacheDitWarning, match="not the only tensor of one graph"):
        found, _ = sampled(cache_dit.enable_cache(Normed(), correction=True, **OPTIONS))
    assert torch.equal(found, without)


def strict(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler whose programs rely on the strides that they were compiled for, as inductor's do."""
    wanted = [each.stride() if isinstance(each, Tensor) else None for each in examples]

    def run(*args: Any) -> Any:
        assert [each.stride() if isinstance(each, Tensor) else None for each in args] == wanted
        return gm(*args)

    return run


@pytest.mark.parametrize("given", ["expanded", "sliced"])
def test_inputs_of_another_layout_are_kept_in_it(given: str) -> None:
    model = cache_dit.enable_cache(tiny(), correction=True, **{**OPTIONS, "inner": strict})
    plain = cache_dit.enable_cache(tiny(), correction=True, **OPTIONS)
    found = []
    for each in (model, plain):
        cache_dit.new_run(each, sigmas=SIGMAS, solver="euler", prediction="flow")
        x = noise()
        with torch.no_grad():
            for i, sigma in enumerate(SIGMAS[:-1]):
                level = torch.tensor(sigma, dtype=torch.float64)
                wide = torch.cat([x, x], dim=2)[:, :, : x.shape[2]] if given == "sliced" and each is model else x
                t = level.expand(len(x)) if given == "expanded" and each is model else level.repeat(len(x))
                x = x + (SIGMAS[i + 1] - sigma) * each(wide, t)
        assert cache_dit.get_stats(each).hits == PLAN.count("0")
        found.append(x)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_timesteps_rounded_to_bfloat16_are_corrected_too() -> None:
    """As pipelines in bfloat16 hand them over."""
    steps = 28
    sigmas = [3.0 * s / (1.0 + 2.0 * s) for s in (1.0 - n / steps for n in range(steps + 1))]
    errors = []
    for corrects in (False, True):
        model, reference = tiny(), tiny()
        options = {**OPTIONS, "schedule": None, "strategy": "adaptive", "target_speedup": 2.0}
        cache_dit.enable_cache(model, correction=corrects, **options)
        cache_dit.new_run(model, sigmas=sigmas, solver="euler", prediction="flow")
        states = []
        for each in (model, reference):
            x = noise()
            with torch.no_grad():
                for i, sigma in enumerate(sigmas[:-1]):
                    t = torch.full((len(x),), sigma).bfloat16().double()
                    x = x + (sigmas[i + 1] - sigma) * each(x, t)
            states.append(x)
        errors.append(float((states[0] - states[1]).norm()))
    assert errors[1] < 0.5 * errors[0]
