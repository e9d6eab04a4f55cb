"""Hooks on the modules of a cached model: heard whenever they come, at no cost where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.runtime.hooks import HookWatch

from .. import models


def twice(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 2


def inputs_at(step: int) -> tuple[Tensor, Tensor]:
    x = torch.ones(models.BATCH, models.TOKENS, models.CHANNELS) + 0.1 * step
    return x, torch.full((models.BATCH,), 1.0 - step / 10)


def prepared() -> tuple[nn.Module, nn.Module]:
    """A cached model that skips every second step, and the same one without a cache."""
    model, reference = models.seeded(models.TinyDiT), models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner="eager", schedule="10" * 20, forecast="reuse", noise_scale=0.0, correction=False)
    return model, reference


def agrees(model: nn.Module, reference: nn.Module, step: int) -> bool:
    with torch.no_grad():
        return torch.allclose(model(*inputs_at(step)), reference(*inputs_at(step)), rtol=1e-5, atol=1e-6)


def test_a_model_is_looked_at_when_a_hook_was_planted_anywhere() -> None:
    model, other = models.seeded(models.TinyDiT), nn.Linear(1, 1)
    watch = HookWatch()
    assert not watch.is_current and not watch.look(model) and watch.is_current
    other.register_forward_hook(twice)
    assert not watch.is_current and not watch.look(model) and watch.is_current
    handle = model.get_submodule("blocks.2").register_forward_pre_hook(lambda module, arguments: None)
    assert not watch.is_current and watch.look(model) and watch.any
    # with hooks it is looked at at every call, so that the last one's end is seen
    assert not watch.is_current and not watch.look(model)
    handle.remove()
    assert watch.look(model) and not watch.any and watch.is_current


def test_hooks_that_come_and_go_compile_once_with_and_once_without() -> None:
    model, reference = prepared()
    assert agrees(model, reference, 0)
    compiled = []
    for step in range(1, 4):
        handles = [each.get_submodule("blocks.2").register_forward_hook(twice) for each in (model, reference)]
        cache_dit.new_run(model)
        assert agrees(model, reference, step)
        for handle in handles:
            handle.remove()
        cache_dit.new_run(model)
        assert agrees(model, reference, step)
        compiled.append(cache_dit.get_stats(model).compiles)
    assert compiled == [2, 2, 2]


@pytest.mark.parametrize("mid_run", [False, True])
def test_a_module_that_brings_its_hooks_is_heard(mid_run: bool) -> None:
    model, reference = prepared()
    others = [models.seeded(models.Block) for _ in range(2)]
    for other in others:
        other.register_forward_hook(twice)
    assert agrees(model, reference, 0)
    for each, other in zip((model, reference), others, strict=True):
        each.get_submodule("blocks")[2] = other  # type: ignore[operator]
    if not mid_run:
        cache_dit.new_run(model)
    assert agrees(model, reference, 1)
    assert cache_dit.get_stats(model).hits == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hooks_are_heard_where_nothing_is_cached() -> None:
    model, reference = (models.seeded(models.TinyDiT) for _ in range(2))
    others = [models.seeded(models.Block) for _ in range(2)]
    for other in others:
        other.register_forward_hook(twice)
    # no block is left to cache
    cache_dit.enable_cache(model, inner="eager", front_blocks=20)
    assert agrees(model, reference, 0)
    for each, other in zip((model, reference), others, strict=True):
        each.get_submodule("blocks")[2] = other  # type: ignore[operator]
    assert agrees(model, reference, 1)
