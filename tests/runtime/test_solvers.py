"""The recurrences are those of diffusers' schedulers, and unknown runs have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cache_dit.runtime.solvers import SOLVERS, SolverStep, TimeCheck, dpmpp_2m, solver_steps

LEVELS = [1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0]


def replay(steps: tuple[SolverStep, ...], outputs: list[Tensor], start: Tensor) -> Tensor:
    """The state behind a run of the recurrence, given the model's outputs."""
    x, before = start, torch.zeros_like(start)
    for step, output in zip(steps, outputs, strict=True):
        denoised = step.p * x + step.q * output
        x = step.a * x + step.b * denoised + step.c * before
        before = denoised
    return x


def scheduled(scheduler: Any, outputs: list[Tensor], start: Tensor) -> Tensor:
    """The same by a scheduler of diffusers."""
    x = start
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x


def outputs_of(count: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(3, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw() for _ in range(count)], draw()


def test_euler_is_flow_matching_as_diffusers_does_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=LEVELS[:-1])
    outputs, start = outputs_of(len(LEVELS) - 1)
    steps = solver_steps("euler", "flow", scheduler.sigmas.tolist(), len(LEVELS) - 1)
    assert steps is not None
    torch.testing.assert_close(replay(steps, outputs, start), scheduled(scheduler, outputs, start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("named", "kind"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_euler_is_that_of_the_older_models(named: str, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=kind)
    scheduler.set_timesteps(7)
    outputs, start = outputs_of(7)
    start = start * scheduler.init_noise_sigma
    steps = solver_steps("euler", named, scheduler.sigmas.tolist(), 7)
    assert steps is not None
    x = start
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(x, timestep)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(replay(steps, outputs, start), x.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [6, 20])
def test_dpmpp_2m_is_that_of_diffusers(count: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(count)
    outputs, start = outputs_of(count)
    steps = solver_steps("dpmpp_2m", "flow", scheduler.sigmas.tolist(), count)
    assert steps is not None
    torch.testing.assert_close(replay(steps, outputs, start), scheduled(scheduler, outputs, start), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "prediction", "sigmas", "num_steps"),
    [
        ("unipc", "flow", LEVELS, 6),
        (None, "flow", LEVELS, 6),
        ("euler", None, LEVELS, 6),
        ("euler", "flow", None, 6),
        ("euler", "flow", LEVELS, 5),
        ("euler", "flow", [1.0, 0.5, 0.5, 0.0], 3),
        ("euler", "flow", [1.0, 0.5, 0.7, 0.0], 3),
        ("euler", "flow", [1.5, 0.5, 0.0], 2),
        ("euler", "flow", [0.0, 0.5, 1.0], 2),
    ],
)
def test_a_run_that_is_not_known_well_enough_has_no_steps(
    solver: str | None, prediction: str | None, sigmas: list[float] | None, num_steps: int
) -> None:
    assert solver_steps(solver, prediction, sigmas, num_steps) is None


def test_every_solver_ends_at_the_denoised_sample() -> None:
    for name in SOLVERS:
        steps = solver_steps(name, "flow", LEVELS, 6)
        assert steps is not None
        assert steps[-1].a == 0.0
        assert steps[-1].b == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, ("euler", "flow")),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, (None, None)),
        ("FlowMatchHeunDiscreteScheduler", {}, (None, None)),
        ("EulerDiscreteScheduler", {}, ("euler", "epsilon")),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, ("euler", "v")),
        ("EulerAncestralDiscreteScheduler", {}, (None, None)),
        ("UniPCMultistepScheduler", {}, (None, None)),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            ("dpmpp_2m", "flow"),
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, (None, None)),
    ],
)
def test_schedulers_of_pipelines_name_their_solver(name: str, given: dict[str, Any], found: tuple[Any, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    from cache_dit.integrations.diffusers import PipelineRuns

    class Pipeline:
        scheduler = getattr(diffusers, name)(**given)

    pipeline = Pipeline()
    assert PipelineRuns(pipeline).solver() == found


def test_dpmpp_2m_of_the_older_models_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    outputs, start = outputs_of(20)
    levels = scheduler.sigmas.tolist()
    steps = solver_steps("dpmpp_2m", "epsilon", levels, 20)
    assert steps is not None
    # the scheduler's state is scaled to keep its variance, the recurrence's is not
    scale = (levels[0] ** 2 + 1.0) ** 0.5
    found = replay(steps, outputs, start * scale)
    torch.testing.assert_close(found, scheduled(scheduler, outputs, start), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [14, 15, 16])
def test_dpmpp_2m_ends_in_first_order_in_short_runs_alone(steps: int) -> None:
    """Where the last level is not 0; there it does so in any run."""
    found = dpmpp_2m([0.9 - 0.8 * n / steps for n in range(steps + 1)], "epsilon")
    assert [step.c == 0.0 for step in found] == [True, *[False] * (steps - 2), steps < 15]


def test_timesteps_go_with_the_levels_or_not() -> None:
    """Levels times a thousand; off by a hundredth of what has passed they fit, by a twelfth they do not."""
    sigmas = [1.0, 0.8, 0.5, 0.1, 0.0]

    def checked() -> TimeCheck:
        check = TimeCheck(sigmas, "flow")
        assert [check.agrees(n + 1, 1000.0 * sigma) for n, sigma in enumerate(sigmas)] == [True] * 5
        return check

    for off, fits in ((0.01, True), (-0.01, True), (0.08, False), (-0.08, False)):
        assert checked().agrees(3, 500.0 + off * 500.0) == fits
    assert checked().agrees(3, None) and TimeCheck(sigmas, "epsilon").agrees(3, 7.0)
    # the first one may come again, in another context; a course that stands still is none
    again = TimeCheck(sigmas, "flow")
    assert again.agrees(2, 800.0) and again.agrees(2, 800.0) and again.agrees(3, 500.0) and not again.agrees(4, 400.0)
    still = TimeCheck(sigmas, "flow")
    assert still.agrees(1, 5.0) and still.agrees(2, 5.0) and not still.agrees(3, 5.0)


def bent(steps: int, shift: float) -> list[float]:
    ramp = [1.0 - n / steps for n in range(steps + 1)]
    return [shift * level / (1.0 + (shift - 1.0) * level) for level in ramp]


@given(
    steps=st.integers(2, 100),
    shift=st.floats(0.3, 20.0),
    unit=st.sampled_from((1.0, 1000.0, -1000.0)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.int64)),
)
def test_timesteps_fit_whatever_they_are_rounded_to(steps: int, shift: float, unit: float, dtype: torch.dtype) -> None:
    sigmas = bent(steps, shift)
    offset = 1000.0 if unit < 0.0 else 0.0
    if dtype is torch.int64 and abs(unit) == 1.0:
        return
    times = (torch.tensor(sigmas[:-1], dtype=torch.float64) * unit + offset).to(dtype).tolist()
    check = TimeCheck(sigmas, "flow")
    assert all(check.agrees(n + 1, float(time)) for n, time in enumerate(times))


@given(
    steps=st.integers(8, 100),
    shift=st.floats(1.5, 20.0),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_timesteps_of_another_schedule_do_not_fit(steps: int, shift: float, dtype: torch.dtype) -> None:
    check = TimeCheck(bent(steps, 1.0), "flow")
    times = (torch.tensor(bent(steps, shift)[:-1]) * 1000.0).to(dtype).tolist()
    assert not all(check.agrees(n + 1, time) for n, time in enumerate(times))


def test_gain_is_how_far_the_state_moves() -> None:
    assert SolverStep(a=2.0, b=3.0, c=5.0, p=7.0, q=11.0).gain == 33.0
