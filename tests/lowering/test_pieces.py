"""The form in pieces: when it is taken, and what its driver keeps alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cache_dit.passes import BranchOptions
from torch import Tensor, fx, nn

import cache_dit
from cache_dit.lowering import DEEP, DEFAULT_LOWERING, LOWERINGS, choose_lowering, pieces, with_cache_examples
from tests import models
from tests.models import CacheState, rewrite, traced_variant

OPTIONS: dict[str, Any] = {
    "schedule": "110",
    "forecast": "reuse",
    "noise_scale": 0.0,
    "inner": "eager",
    "language": "en",
    "strict": True,
}


def form_of(model: nn.Module, **options: Any) -> str:
    cache_dit.enable_cache(model, **{**OPTIONS, **options})
    with torch.no_grad():
        for step in range(3):
            model(models.example()[0], torch.full((models.BATCH,), 0.9 - 0.1 * step))
    assert cache_dit.get_stats(model).hits == 1
    return str(cache_dit.explain(model).graphs[0].lowering)


def test_auto_takes_pieces_of_deep_models() -> None:
    assert choose_lowering("auto").name == choose_lowering("auto", blocks=DEEP - 1).name == DEFAULT_LOWERING == "specialize"
    assert choose_lowering("auto", blocks=DEEP).name == "pieces"
    assert choose_lowering("auto", blocks=DEEP, replayed=True).name == DEFAULT_LOWERING
    assert {choose_lowering(name, blocks=DEEP).name for name in LOWERINGS} == set(LOWERINGS)


@pytest.mark.parametrize(("depth", "form"), [(DEEP, "pieces"), (DEEP - 1, "specialize")])
def test_all_blocks_count_towards_the_depth(fresh_dynamo: None, depth: int, form: str) -> None:
    assert form_of(models.seeded(lambda: models.TinyDiT(depth))) == form


@pytest.mark.parametrize(("kinds", "form"), [(2, "pieces"), (DEEP, "specialize")])
def test_auto_leaves_blocks_that_are_not_alike_whole_without_a_word(
    fresh_dynamo: None, recwarn: pytest.WarningsRecorder, kinds: int, form: str
) -> None:
    model = models.seeded(lambda: models.TinyDiT(DEEP))
    for place, block in enumerate(model.blocks):
        block.mlp = _Scaled(block.mlp, 1.0 + place % kinds / 64)
    assert form_of(model) == form
    assert not recwarn.list


class _Scaled(nn.Module):
    """A number that a block's graph holds."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.factor)
        return out


@pytest.mark.parametrize("compute", [True, False])
def test_a_stream_is_gone_once_the_last_piece_that_reads_it_has_read_it(
    monkeypatch: pytest.MonkeyPatch, compute: bool
) -> None:
    """All but the base, which the residual is measured against."""
    kept: list[int] = []
    captured = traced_variant("stack")

    def watched(run: Callable[..., Any]) -> Callable[[list[Any]], Sequence[Any]]:
        def call(inputs: list[Any]) -> Sequence[Any]:
            streams = [weakref.ref(each) for each in inputs if getattr(each, "shape", None) == stream]
            outputs = [each.clone() for each in run(*inputs)]
            inputs.clear()
            kept.append(sum(ref() is not None for ref in streams))
            return outputs

        return call

    monkeypatch.setattr(pieces, "taking_a_list", watched)
    gm = captured.copy()
    _, inputs = rewrite(gm, BranchOptions())
    gm.recompile()
    stream = inputs.residuals[0].sizes
    programs = LOWERINGS["pieces"].lower(gm, with_cache_examples(gm, captured.inputs), _eager)
    flat = [*captured.inputs, *CacheState(inputs).operands(compute=compute, weights=(1.0,))]
    with torch.no_grad():
        results = (programs.compute if compute else programs.reuse)(flat)
    assert len(results) == 2
    # computed: the base in the second block; where the residual is stored, the result and the buffer; skipped: the buffer
    assert kept == ([0, 0, 1, 0, 2, 0] if compute else [0, 0, 1, 0])


def _eager(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward
