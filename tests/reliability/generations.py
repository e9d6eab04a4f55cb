"""Whole generations in small: samplers that call a tiny model, and what such a generation gives in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cache_dit

from .. import models

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
# Skips whatever it may: nothing that is stored goes unused.
GREEDY: dict[str, Any] = {**EXACT, "schedule": "1" + "0" * 60}


class Prompted(models.TinyDiT):
    """Takes a prompt, [batch, WIDTH], which every block hears."""

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t) + prompt
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


def tensor(seed: int, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True)
class Plan:
    """One generation: its seed, its sampler, and the timesteps from first to last."""

    seed: int
    times: tuple[float, ...]
    sampler: str = "euler"
    batch: int = 2
    tokens: int = 6

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The noise that it starts from, and its positive and negative prompts."""
        noise = tensor(self.seed, self.batch, self.tokens, models.CHANNELS)
        return noise, tensor(self.seed + 1, self.batch, models.WIDTH), tensor(self.seed + 2, self.batch, models.WIDTH)


def falling(steps: int, start: float = 1.0) -> tuple[float, ...]:
    return tuple(start * (1.0 - i / steps) for i in range(steps))


def calls_of(plan: Plan, model: Callable[..., Tensor]) -> Generator[Tensor, None, None]:
    """Runs a generation, giving the model's output after each call."""
    x, positive, negative = plan.parts()
    ends = (*plan.times[1:], plan.times[-1] - (plan.times[-2] - plan.times[-1]))
    for time, end in zip(plan.times, ends, strict=True):
        t, later = torch.full((plan.batch,), time), torch.full((plan.batch,), end)
        velocity = model(x, t, positive)
        yield velocity
        if plan.sampler == "guided":
            other = model(x, t, negative)
            yield other
            velocity = other + 2.0 * (velocity - other)
        elif plan.sampler == "heun":
            second = model(x + (end - time) * velocity, later, positive)
            yield second
            velocity = (velocity + second) / 2
        elif plan.sampler == "midpoint":
            half = (time + end) / 2
            velocity = model(x + (half - time) * velocity, torch.full((plan.batch,), half), positive)
            yield velocity
        x = x + (end - time) * velocity


def generate(plan: Plan, model: Callable[..., Tensor]) -> list[Tensor]:
    """Every output of the model in one generation."""
    torch.manual_seed(plan.seed)
    with torch.no_grad():
        return list(calls_of(plan, model))


def cut(plan: Plan, model: Callable[..., Tensor], calls: int) -> None:
    """A generation that is given up behind so many calls of the model."""
    running = calls_of(plan, model)
    with torch.no_grad():
        for _ in range(calls):
            next(running)


def prompted() -> Prompted:
    model = models.seeded(Prompted)
    assert isinstance(model, Prompted)
    return model


def enabled(options: dict[str, Any]) -> Prompted:
    """A model with caching on that has never been called."""
    return cache_dit.enable_cache(prompted(), **options)


def hits_of(model: nn.Module) -> int:
    return cache_dit.get_stats(model).hits


def same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def interleaved(order: Sequence[int], running: Sequence[Generator[Tensor, None, None]]) -> list[list[Tensor]]:
    """The outputs of several generations that are advanced in this order, then to their ends."""
    outputs: list[list[Tensor]] = [[] for _ in running]
    with torch.no_grad():
        for place in order:
            outputs[place].extend(output for output in [next(running[place], None)] if output is not None)
        for found, rest in zip(outputs, running, strict=True):
            found.extend(rest)
    return outputs
