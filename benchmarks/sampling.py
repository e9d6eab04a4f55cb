"""Sampling as users do it: noise levels, solvers, guidance. Every solver but the plainest is diffusers' own.

The cache is imported where it is told something: in the environment of the peers its name is another library's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from beds import Bed
from torch import Tensor

NULL_LABEL = 10
SAMPLES_OF_LENGTHS = 32
"""Samples of the runs that are measured for a mean over several lengths."""


@dataclass(frozen=True)
class Setting:
    """One way of sampling. `guidance`: 1 none; `separate`: positive and negative prompt in calls of their own.

    `known`: whether the run's noise levels are announced, as an integration does.
    """

    steps: int = 28
    shift: float = 3.0
    guidance: float = 1.0
    separate: bool = False
    solver: str = "euler"
    seed: int = 1234
    samples: int = 64
    known: bool = True

    def key(self) -> str:
        """A name for files and tables."""
        words = [f"{self.steps} steps", "linear" if self.shift == 1.0 else f"shift {self.shift:g}", self.solver]
        if self.guidance != 1.0:
            words.append(f"guidance {self.guidance:g} {'separate' if self.separate else 'batched'}")
        if not self.known:
            words.append("noise levels not announced")
        return ", ".join(words)


# What `new_run` is told of a solver: nothing where its steps are random or not of a kind that correction knows.
ANNOUNCED = {"euler": "euler", "dpm++2m": "dpmpp_2m"}


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """The noise levels of a run, from 1 to 0: a linear ramp s bent to shift * s / (1 + (shift - 1) * s)."""
    ramp = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return [float(value) for value in shift * ramp / (1 + (shift - 1) * ramp)]


def labels_of(setting: Setting) -> Tensor:
    """Labels 0, 1, … 9, 0, … for every sample."""
    return torch.arange(setting.samples) % 10


class Sampler:
    """Draws the samples of one setting from a model, cached or not."""

    def __init__(self, bed: Bed, setting: Setting, cached: bool = False) -> None:
        self.bed, self.setting, self.cached = bed, setting, cached
        self.labels = labels_of(setting)
        generator = torch.Generator().manual_seed(setting.seed)
        self.noise = torch.randn(setting.samples, 1, 24, 24, generator=generator)

    def velocity(self, model: torch.nn.Module, x: Tensor, sigma: float) -> Tensor:
        """The guided velocity, in one call with a batch of both prompts or in two named ones."""
        ask, labels, guidance = self.bed.velocity, self.labels, self.setting.guidance
        if guidance == 1.0:
            return ask(model, x, sigma, labels)
        nothing = torch.full_like(labels, NULL_LABEL)
        if self.setting.separate:
            with self.context(model, "positive"):
                cond = ask(model, x, sigma, labels)
            with self.context(model, "negative"):
                uncond = ask(model, x, sigma, nothing)
        else:
            both = ask(model, torch.cat([x, x]), sigma, torch.cat([labels, nothing]))
            cond, uncond = both.chunk(2)
        return uncond + guidance * (cond - uncond)

    def run(self, model: torch.nn.Module, on_step: Callable[[int, Tensor], object] | None = None) -> Tensor:
        """Sample once: float32 ``[N, 1, 24, 24]``."""
        with torch.no_grad():
            return SOLVERS[self.setting.solver](self, model, on_step)

    def context(self, model: torch.nn.Module, name: str) -> Any:
        """Name one of the two prompts, where there is a cache to tell."""
        if not self.cached:
            return nullcontext()
        import cache_dit

        return cache_dit.context(model, name)

    def announce(self, model: torch.nn.Module, sigmas: list[float]) -> None:
        """Tell the cache what an integration would tell it: the level of each evaluation, and the last."""
        if not self.cached:
            return
        import cache_dit

        if not self.setting.known:
            cache_dit.new_run(model)
            return
        cache_dit.new_run(
            model,
            num_steps=len(sigmas) - 1,
            sigmas=sigmas,
            solver=ANNOUNCED.get(self.setting.solver),
            prediction="flow",
        )


def _euler(sampler: Sampler, model: torch.nn.Module, on_step: Callable[[int, Tensor], object] | None) -> Tensor:
    sigmas = shifted_sigmas(sampler.setting.steps, sampler.setting.shift)
    sampler.announce(model, sigmas)
    x = sampler.noise
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * sampler.velocity(model, x, sigmas[i])
        if on_step is not None:
            on_step(i, x)
    return x


def _adams_bashforth(sampler: Sampler, model: torch.nn.Module, on_step: Callable[[int, Tensor], object] | None) -> Tensor:
    """The two-step Adams-Bashforth method on uneven steps: what fewer solver steps can do without any cache."""
    sigmas = shifted_sigmas(sampler.setting.steps, sampler.setting.shift)
    x, before, last_step = sampler.noise, None, 0.0
    for i in range(len(sigmas) - 1):
        step = sigmas[i + 1] - sigmas[i]
        now = sampler.velocity(model, x, sigmas[i])
        slope = 0.0 if before is None else step / (2.0 * last_step)
        x = x + step * (now if before is None else (1.0 + slope) * now - slope * before)
        before, last_step = now, step
        if on_step is not None:
            on_step(i, x)
    return x


def _diffusers(
    sampler: Sampler, model: torch.nn.Module, on_step: Callable[[int, Tensor], object] | None, name: str, **options: Any
) -> Tensor:
    import diffusers

    setting = sampler.setting
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
    sigmas = shifted_sigmas(setting.steps, setting.shift)
    if name.startswith("FlowMatch"):
        scheduler.set_timesteps(sigmas=sigmas[:-1]) if "Euler" in name else scheduler.set_timesteps(setting.steps)
    else:
        scheduler.set_timesteps(setting.steps)
    levels = [float(timestep) / 1000.0 for timestep in scheduler.timesteps]
    sampler.announce(model, [*levels, 0.0])
    generator = torch.Generator().manual_seed(setting.seed + 1)
    x = sampler.noise
    for i, timestep in enumerate(scheduler.timesteps):
        out = sampler.velocity(model, x, levels[i])
        more = {"generator": generator} if name.startswith("FlowMatch") else {}
        x = scheduler.step(out, timestep, x, return_dict=False, **more)[0]
        if on_step is not None:
            on_step(i, x)
    return x


def _named(name: str, **options: Any) -> Callable[..., Tensor]:
    def solve(sampler: Sampler, model: torch.nn.Module, on_step: Callable[[int, Tensor], object] | None) -> Tensor:
        given = dict(options)
        if "use_flow_sigmas" in given:
            given["flow_shift"] = sampler.setting.shift
        elif "Heun" in name:
            given["shift"] = sampler.setting.shift
        return _diffusers(sampler, model, on_step, name, **given)

    return solve


_FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": _euler,
    "ab2": _adams_bashforth,
    "heun": _named("FlowMatchHeunDiscreteScheduler"),
    "dpm++2m": _named("DPMSolverMultistepScheduler", **_FLOW),
    "sde": _named("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
    "unipc": _named("UniPCMultistepScheduler", **_FLOW),
}
