"""Awkward runs under `adaptive` with placement and correction: a defined answer to each, and never a worse picture than
plain reuse by accident."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.strategies.part_of_run import PartOfRun
from cache_dit.strategies.placement import PlacementRules, place_steps

from . import models
from .reference import EagerCache

ADAPTIVE: dict[str, Any] = {
    "inner": "eager",
    "noise_scale": 0.0,
    "language": "en",
    "strategy": "adaptive",
    "target_speedup": 3.0,
}
FALLING = [1.0, 0.95, 0.9, 0.82, 0.74, 0.65, 0.55, 0.44, 0.32, 0.17, 0.08, 0.0]


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return models.TinyDiT().eval().requires_grad_(False)


def start() -> Tensor:
    return torch.randn(models.BATCH, models.TOKENS, models.CHANNELS, generator=torch.Generator().manual_seed(1))


def sampled(model: nn.Module, sigmas: Sequence[float], spread: float = 0.0, decisions: list[str] | None = None) -> Tensor:
    """Euler's method along these levels; `spread` sets the samples of the batch apart in their timesteps. What was
    computed goes to `decisions` as 1, what was skipped as 0."""
    x = start()
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            t = torch.tensor([sigma, max(0.0, sigma - spread)])
            hits = cache_dit.get_stats(model).hits if decisions is not None else 0
            x = x + (following - sigma) * model(x, t)
            if decisions is not None:
                decisions.append("0" if cache_dit.get_stats(model).hits > hits else "1")
    return x


def error(model: nn.Module, sigmas: Sequence[float], spread: float = 0.0, decisions: list[str] | None = None) -> float:
    """How far the picture is from the uncached one; the model runs as it is."""
    found = sampled(model, sigmas, spread, decisions)
    assert torch.isfinite(found).all()
    return float((found - sampled(tiny(), sigmas, spread)).square().mean().sqrt())


def cached(**options: Any) -> nn.Module:
    return cache_dit.enable_cache(tiny(), **{**ADAPTIVE, **options})


def decisions_of(model: nn.Module) -> tuple[int, int]:
    """Computed and skipped steps so far."""
    stats = cache_dit.get_stats(model)
    return stats.steps - stats.hits, stats.hits


def reuse_at_the_same_steps(decisions: Sequence[str], sigmas: Sequence[float], spread: float = 0.0) -> float:
    """The error of plain reuse, written in eager, that computes where this run did."""
    model = tiny()
    eager = EagerCache(model.blocks, streams=("x",))
    x = start()
    with torch.no_grad():
        for decision, (sigma, following) in zip(decisions, pairwise(sigmas), strict=True):
            eager.skip = decision == "0"
            x = x + (following - sigma) * model(x, torch.tensor([sigma, max(0.0, sigma - spread)]))
    return float((x - sampled(tiny(), sigmas, spread)).square().mean().sqrt())


RISING = [1.0 - sigma for sigma in FALLING]
REPEATED = [1.0, 0.95, 0.9, 0.9, 0.82, 0.65, 0.65, 0.44, 0.32, 0.17, 0.08, 0.0]
RESTARTED = [1.0, 0.8, 0.6, 0.4, 0.2, 0.5, 0.4, 0.3, 0.2, 0.12, 0.05, 0.0]


@pytest.mark.parametrize("sigmas", [FALLING, RISING, REPEATED, RESTARTED], ids=["falling", "rising", "repeated", "restarted"])
@pytest.mark.parametrize("announced", [True, False])
def test_levels_of_any_kind_are_no_worse_than_plain_reuse(sigmas: list[float], announced: bool) -> None:
    model = cached()
    if announced:
        cache_dit.new_run(model, sigmas=sigmas, solver="euler", prediction="flow")
    decisions: list[str] = []
    found = error(model, sigmas, decisions=decisions)
    computed, skipped = decisions_of(model)
    assert computed + skipped == len(sigmas) - 1
    assert skipped > 0
    assert found <= reuse_at_the_same_steps(decisions, sigmas) * 1.05 + 1e-6


def test_one_timestep_for_each_sample() -> None:
    model = cached()
    cache_dit.new_run(model, sigmas=FALLING, solver="euler", prediction="flow")
    decisions: list[str] = []
    found = error(model, FALLING, spread=0.05, decisions=decisions)
    assert "0" in decisions
    assert found <= reuse_at_the_same_steps(decisions, FALLING, spread=0.05) * 1.05


def test_levels_of_a_batch_are_refused() -> None:
    model = cached()
    with pytest.raises(TypeError, match="one per step and the last"):
        cache_dit.new_run(model, sigmas=torch.rand(2, 12))  # type: ignore[arg-type]


def test_levels_that_are_not_those_of_the_run_correct_nothing() -> None:
    wrong = [sigma**3 for sigma in FALLING]
    model = cached(correction=True)
    cache_dit.new_run(model, sigmas=wrong, solver="euler", prediction="flow")
    with pytest.warns(CacheDitWarning, match="timesteps do not go with the sigmas"):
        found = sampled(model, FALLING)
    model = cached(correction=False)
    cache_dit.new_run(model, sigmas=wrong)
    # by the time that it shows, two steps have fitted
    torch.testing.assert_close(found, sampled(model, FALLING), rtol=0.0, atol=1e-2)


def test_a_run_longer_than_announced_goes_on() -> None:
    model = cached()
    cache_dit.new_run(model, sigmas=FALLING[:7], solver="euler", prediction="flow")
    error(model, FALLING)
    computed, skipped = decisions_of(model)
    assert computed + skipped == len(FALLING) - 1


class Timeless(nn.Module):
    """No timestep among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = tiny()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside.embed(x)
        condition = torch.zeros(len(x), models.WIDTH)
        for block in self.inside.blocks:
            hidden = block(hidden, condition)
        out: Tensor = self.inside.head(hidden)
        return out


def test_without_a_timestep_runs_have_to_be_announced() -> None:
    model = cache_dit.enable_cache(Timeless(), **ADAPTIVE)
    with torch.no_grad(), pytest.warns(CacheDitWarning, match="new_run"):
        for _ in range(6):
            model(start())
    assert cache_dit.get_stats(model).hits == 0
    cache_dit.new_run(model, sigmas=FALLING, solver="euler", prediction="flow")
    x = start()
    with torch.no_grad():
        for sigma, following in pairwise(FALLING):
            x = x + (following - sigma) * model(x)
    assert cache_dit.get_stats(model).hits > 0
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(("mask", "computed"), [("100", 9), ("1" + "0" * 40, 1)])
def test_a_mask_shorter_or_longer_than_the_run(mask: str, computed: int) -> None:
    model = cached(schedule=mask, target_speedup=None)
    cache_dit.new_run(model, sigmas=FALLING, solver="euler", prediction="flow")
    error(model, FALLING)
    assert decisions_of(model) == (computed, len(FALLING) - 1 - computed)


def test_a_target_that_the_bound_rules_out_is_said_and_the_bound_holds() -> None:
    model = cached(target_speedup=6.0, max_consecutive_hits=1)
    cache_dit.new_run(model, sigmas=FALLING, solver="euler", prediction="flow")
    with pytest.warns(CacheDitWarning, match="max_consecutive_hits is too low"):
        error(model, FALLING)
    assert decisions_of(model)[1] <= (len(FALLING) - 1) // 2


@pytest.mark.parametrize("corrected", [True, False])
def test_steps_are_placed_by_whether_the_run_is_corrected(corrected: bool) -> None:
    model = cache_dit.enable_cache(tiny(), **ADAPTIVE, tolerance=1.0, correction=None if corrected else False)
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / 20 for i in range(21))]
    cache_dit.new_run(model, sigmas=sigmas, solver="euler", prediction="flow")
    decisions: list[str] = []
    sampled(model, sigmas, decisions=decisions)
    rules = PlacementRules(3.0, 0, None, None, PartOfRun(0.0, 1.0))
    placed = {way: place_steps(rules, 20, tuple(sigmas), way) for way in (True, False)}
    assert placed[True] != placed[False]
    assert {step for step, made in enumerate(decisions, start=1) if made == "1"} == placed[corrected]
