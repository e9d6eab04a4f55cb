"""Other ways of compiling before, after and around ours: they work, or the text says what to change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cache_dit
from cache_dit.messages import CacheDitWarning

from . import models
from .coverage import TINY_MODELS

EAGER: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
STEPS, HITS = 8, 3


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


def call(model: Any) -> list[Tensor]:
    with torch.no_grad():
        examples = [models.example(seed=step) for step in range(STEPS)]
        return [model(x, t - 0.08 * step) for step, (x, t) in enumerate(examples)]


def enabled_over_its_own_compile(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return cache_dit.enable_cache(model, **EAGER)


def enabled_over_bare_backend(model: nn.Module) -> Any:
    model.compile(backend="cache_dit", options=EAGER)
    return cache_dit.enable_cache(model, **EAGER)


HABITS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile before": lambda model: cache_dit.enable_cache(torch.compile(model, backend="eager"), **EAGER),
    "model.compile before": enabled_over_its_own_compile,
    "our backend before": enabled_over_bare_backend,
    "torch.compile after": lambda model: torch.compile(cache_dit.enable_cache(model, **EAGER), backend="eager"),
    "fullgraph": lambda model: torch.compile(model, backend="cache_dit", fullgraph=True, options=EAGER),
    "dynamic": lambda model: torch.compile(model, backend="cache_dit", dynamic=True, options=EAGER),
    "static": lambda model: torch.compile(model, backend="cache_dit", dynamic=False, options=EAGER),
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_compile_habit_is_cached(habit: str) -> None:
    model = models.seeded(models.TinyDiT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        call(HABITS[habit](model))
    assert cache_dit.get_stats(model).hits == HITS


def test_mode_under_bare_compile() -> None:
    model = models.seeded(lambda: models.TinyDiT(depth=2))
    call(torch.compile(model, backend="cache_dit", mode="max-autotune-no-cudagraphs"))
    assert cache_dit.get_stats(model).hits == HITS


def test_fullgraph_around_an_enabled_model_says_what_to_change() -> None:
    model = cache_dit.enable_cache(models.seeded(models.TinyDiT), **EAGER)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="enable_cache compiles the model itself"):
        call(torch.compile(model, backend="eager", fullgraph=True))
    call(model)
    assert cache_dit.get_stats(model).hits == HITS


def test_compile_after_enable_is_not_silent() -> None:
    model = cache_dit.enable_cache(models.seeded(models.TinyDiT), **EAGER)
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    call(model)
    with pytest.warns(CacheDitWarning, match="call `enable_cache\\(model\\)` once more"):
        assert cache_dit.get_stats(model).calls == 0
    cache_dit.enable_cache(model, **EAGER)
    call(model)
    assert cache_dit.get_stats(model).hits == HITS
    cache_dit.disable_cache(model)
    assert model._compiled_call_impl is theirs


def test_disabling_leaves_a_later_compile_in_place() -> None:
    model = cache_dit.enable_cache(models.seeded(models.TinyDiT), **EAGER)
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    cache_dit.disable_cache(model)
    assert model._compiled_call_impl is theirs


class AttentionBlock(models.Block):
    """Attention with a probability of dropout that is a number of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout_p = 0.0

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        attended = functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=self.dropout_p)
        return super().forward(x + attended[:, 0], temb)


def test_a_dropout_that_is_an_input_of_the_graph() -> None:
    """``dynamic=True`` makes the number an input; at 0 nothing is drawn, at another value the blocks may not be skipped."""
    model = models.seeded(lambda: models.TinyDiT(block=AttentionBlock))
    compiled = torch.compile(model, backend="cache_dit", dynamic=True, options=EAGER)
    call(compiled)
    assert cache_dit.get_stats(model).hits == HITS
    for block in model.blocks:
        block.dropout_p = 0.5
    torch.manual_seed(0)
    found = call(compiled)
    assert cache_dit.get_stats(model).hits == HITS
    torch.manual_seed(0)
    for output, expected in zip(found, call(model), strict=True):
        torch.testing.assert_close(output, expected)


# Blocks compiled one by one, as diffusers offers it.


FLUX = TINY_MODELS["FluxTransformer2DModel"]


def flux_call(model: nn.Module) -> None:
    with torch.no_grad():
        for inputs in FLUX.run(STEPS):
            model(**inputs)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_repeated_blocks_compiled(first: bool) -> None:
    model = FLUX.build()
    if first:
        model.compile_repeated_blocks(backend="eager")
    cache_dit.enable_cache(model, **EAGER)
    if not first:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        flux_call(model)
    assert cache_dit.get_stats(model).hits == HITS
    assert len(cache_dit.explain(model).graphs) == 1


def test_our_backend_on_blocks_alone_says_what_to_compile() -> None:
    model = FLUX.build()
    model.compile_repeated_blocks(backend="cache_dit", options=EAGER)
    with pytest.warns(CacheDitWarning, match="compile the whole model"):
        flux_call(model)
