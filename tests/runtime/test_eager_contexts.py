"""Contexts that are not worth compiling: what perturbs the model for the time of one call must not cost the other calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.tracing import MAX_COMPILES_IN_A_ROW

from .. import models

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
STEPS = 10
# Steps 4, 6, 8 and 10 of the two contexts that are not perturbed.
HITS = 8


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


class Breaking(models.Block):
    """Perturbed, the block does not come into one graph with the others."""

    perturbation: object = None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.perturbation is not None:
            torch._dynamo.graph_break()
            return x
        return super().forward(x, temb)


class Renewed(models.Block):
    """Perturbed, the block calls something that is made anew for each call."""

    perturbation: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return super().forward(x, temb) if self.perturbation is None else self.perturbation(x)


def perturbation() -> Callable[[Tensor], Tensor]:
    """Another code object each time, as a hook that is written anew has it."""
    made: dict[str, Any] = {}
    exec("def double(x):\n    return x * 2", made)
    double: Callable[[Tensor], Tensor] = made["double"]
    return double


def run(model: models.TinyDiT, cached: bool) -> list[Tensor]:
    """A run of two contexts, and from its second step on of a third one in which the third block is perturbed."""
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            x, t = models.example(seed=step)
            for name in ("cond", "uncond", "perturbed")[: 2 if step == 0 else 3]:
                if name == "perturbed":
                    model.blocks[2].perturbation = perturbation()
                with cache_dit.context(model, name) if cached else nullcontext():
                    outputs.append(model(x, t - 0.08 * step))
                model.blocks[2].perturbation = None
    return outputs


@pytest.mark.parametrize(("block", "said"), [(Breaking, "does not compile"), (Renewed, "compiles at every call")])
def test_a_perturbed_context_leaves_the_others_cached(block: Callable[[], nn.Module], said: str) -> None:
    model = models.seeded(lambda: models.TinyDiT(block=block))
    expected = run(model, cached=False)
    cache_dit.enable_cache(model, **EXACT)
    with pytest.warns(CacheDitWarning, match=said) as warned:
        found = run(model, cached=True)
    assert len([w for w in warned if "perturbed" in str(w.message)]) == 1
    stats = cache_dit.get_stats(model)
    perturbed = [i for i in range(len(expected)) if i > 2 and (i - 2) % 3 == 2]
    assert len(perturbed) == STEPS - 1
    if block is Breaking:
        assert stats.hits == HITS
        assert stats.refused["eager_context"] == len(perturbed) - 1
        for i in perturbed:
            torch.testing.assert_close(found[i], expected[i])
    else:
        assert stats.hits >= HITS
        assert stats.refused["eager_context"] == len(perturbed) - MAX_COMPILES_IN_A_ROW
    compiles = stats.compiles
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        cache_dit.new_run(model)
        again = run(model, cached=True)
    assert cache_dit.get_stats(model).compiles == compiles
    assert cache_dit.get_stats(model).hits == stats.hits + HITS
    for i in perturbed:
        torch.testing.assert_close(again[i], expected[i])


def test_a_change_of_shape_is_no_reason_to_leave_a_context() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        for tokens in (3, 5, 7, 9, 11, 13):
            cache_dit.new_run(model)
            for step in range(5):
                x, t = models.example(seed=step)
                x = x[:, :1].repeat(1, tokens, 1)
                with cache_dit.context(model, "cond"):
                    model(x, t - 0.08 * step)
    assert "eager_context" not in cache_dit.get_stats(model).refused
    assert cache_dit.get_stats(model).hits == 6
