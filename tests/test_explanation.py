"""What `explain` tells: before the first call, after it, of what was refused, and in which words."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.explanation import readable_bytes
from cache_dit.messages import CacheDitWarning

from . import models

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
BUFFER = models.BATCH * models.TOKENS * models.WIDTH * 4

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def run(model: Callable[..., Any], steps: int = 6, **more: Any) -> None:
    with torch.no_grad():
        for step in range(steps):
            x, t, *rest = models.example(**more)
            model(x, t - 0.02 * step, *rest)


def test_before_the_first_call_there_is_nothing_to_tell_but_that() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    explanation = cache_dit.explain(model)
    assert (explanation.called, explanation.enabled, explanation.graphs) == (False, True, ())
    assert (explanation.buffer_bytes, explanation.held_bytes, explanation.blocks) == (None, 0, ())
    assert str(explanation) == (
        f"=== CacheDiT: TinyDiT_{id(model)} (enabled) ===\n"
        "The model has not been called yet, so nothing is compiled; run it once"
    )


def test_after_a_call_it_names_blocks_values_and_bytes() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, back_blocks=1, **EXACT)
    run(model, 1)
    explanation = cache_dit.explain(model)
    assert explanation.blocks == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    region = explanation.region
    assert region is not None
    assert (region.front, region.cached, region.back) == (("blocks.0",), ("blocks.1", "blocks.2"), ("blocks.3",))
    assert region.lists == ("blocks",)
    assert {value.sizes for value in region.live_ins} == {("2", "6", "8"), ("2", "8")}
    (out,) = region.live_outs
    assert (out.sizes, out.dtype) == (("2", "6", "8"), "float32")
    assert out.base in {value.name for value in region.live_ins}
    # three weights in each of two blocks: modulation and MLP, with their biases
    assert region.weights == 8
    assert explanation.graph_breaks == ()
    assert len(explanation.graphs) == 1
    assert explanation.compile_seconds > 0.0
    text = str(explanation)
    for words in ("graphs: 1, graph breaks: 0", "blocks.1 … blocks.2", "front blocks.0, back blocks.3", "cached 2"):
        assert words in text
    assert "specialize" in text
    assert readable_bytes(BUFFER) in text


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, 1),
        ({"forecast": "taylor", "order": 2}, 3),
        # the front's output, and two residuals more where skipped steps may be corrected
        ({"strategy": "adaptive"}, 4),
        ({"strategy": "adaptive", "correction": False}, 2),
        ({"residual_dtype": "bfloat16"}, 0.5),
        # a scale of four bytes for each token
        ({"residual_dtype": "int8"}, 0.25 + 1 / models.WIDTH),
    ],
)
@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_the_bytes_are_known_before_the_first_skip_and_are_what_is_held(
    options: dict[str, Any], held: float, lowering: str
) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, lowering=lowering, **{**EXACT, **options})
    run(model, 1)
    assert cache_dit.get_stats(model).hits == 0
    explanation = cache_dit.explain(model)
    assert explanation.buffer_bytes == explanation.held_bytes == int(BUFFER * held)
    cache_dit.new_run(model)
    run(model, 6)
    assert cache_dit.get_stats(model).hits > 0
    assert cache_dit.explain(model).held_bytes == cache_dit.get_stats(model).cache_bytes == int(BUFFER * held)


def test_each_context_takes_the_bytes_again() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    for name in ("positive", "negative"):
        with cache_dit.context(model, name):
            run(model, 1)
    explanation = cache_dit.explain(model)
    assert (explanation.buffer_bytes, explanation.held_bytes) == (BUFFER, 2 * BUFFER)


def test_dynamic_shapes_have_no_fixed_size() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options=EXACT, dynamic=True)
    run(caller)
    explanation = cache_dit.explain(caller)
    assert explanation.buffer_bytes is None
    assert explanation.held_bytes == BUFFER
    assert "as much as the shapes of a call ask for (dynamic)" in str(explanation)


def test_a_second_stream_is_told_with_its_own_base() -> None:
    model = models.seeded(lambda: models.JointDiT(4, 0))
    cache_dit.enable_cache(model, **EXACT)
    run(model, 1, context=True)
    region = cache_dit.explain(model).region
    assert region is not None
    bases = [out.base for out in region.live_outs]
    assert len(set(bases)) == 2
    assert None not in bases


def test_a_refused_region_comes_with_its_reason() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, front_blocks=4, **EXACT)
    with pytest.warns(CacheDitWarning):
        run(model, 3)
    explanation = cache_dit.explain(model)
    assert explanation.called
    assert explanation.region is None
    assert explanation.graphs[0].reason == "nothing_left"
    assert explanation.refused == {"no_region": 3}
    text = str(explanation)
    assert "front_blocks and back_blocks leave no block to skip (4 - 4 - 0); lower them" in text
    assert "no blocks to cache: 3" in text


class Breaking(models.TinyDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        torch._dynamo.graph_break()
        return out * 2.0


@pytest.mark.parametrize("bare", [False, True])
def test_graph_breaks_come_with_their_reason_and_place(bare: bool) -> None:
    model = models.seeded(Breaking)
    if bare:
        run(torch.compile(model, backend="cache_dit", options=EXACT))
    else:
        run(cache_dit.enable_cache(model, **EXACT))
    explanation = cache_dit.explain(model)
    (reason,) = explanation.graph_breaks
    assert "graph_break()" in reason
    assert "test_explanation.py:" in reason
    text = str(explanation)
    assert f"graph break: {reason}" in text
    assert "graph breaks: 1" in text
    # the part behind the break holds no blocks, and that is no refusal of the model
    assert explanation.region is not None
    assert cache_dit.get_stats(model).hits == 2


def test_every_refused_skip_is_counted_by_its_reason() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **{**EXACT, "schedule": "00000000"})
    run(model, 3)
    with torch.no_grad():
        model.get_submodule("blocks.2.mlp").weight.mul_(1.01)
    x, t = models.example(batch=3)
    with torch.no_grad():
        model(*models.example(seed=3)[:1], t[:2] - 0.3)
        model(x, t - 0.4)
    explanation = cache_dit.explain(model)
    assert explanation.refused == {"first_call": 1, "weights_changed": 1, "shape_changed": 1}
    lines = str(explanation).splitlines()
    for line in ("first call of a run: 1", "weights changed: 1", "shape or graph changed: 1"):
        assert f"    {line}" in lines


def test_grad_mode_is_told_beside_the_cached_graph() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        model(*models.example())
    run(model)
    explanation = cache_dit.explain(model)
    assert [graph.reason for graph in explanation.graphs] == [None, "grad_mode"]
    assert explanation.refused["grad_mode"] == 1
    assert "traced in grad mode" in str(explanation)


def test_what_changed_is_told_when_the_model_compiles_again(capfd: pytest.CaptureFixture[str]) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    run(model)
    assert "recompiling" not in capfd.readouterr().err
    run(model, batch=3)
    said = capfd.readouterr().err
    assert said.count("recompiling; what changed:") == 1
    assert "size mismatch" in said
    stats = cache_dit.get_stats(model)
    assert stats.compiles == 2
    assert cache_dit.explain(model).compile_seconds == stats.compile_seconds > 0.0


def test_it_stays_readable_once_caching_is_off() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    run(model)
    cache_dit.disable_cache(model)
    explanation = cache_dit.explain(model)
    assert (explanation.enabled, explanation.held_bytes) == (False, 0)
    assert str(explanation).startswith(f"=== CacheDiT: TinyDiT_{id(model)} (disabled) ===")


def test_it_is_data_that_nobody_can_change() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    run(model, 1)
    explanation = cache_dit.explain(model)
    assert isinstance(explanation, cache_dit.Explanation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.enabled = False  # type: ignore[misc]
    before = str(explanation)
    run(model, 4)
    cache_dit.reset_cache_stats()
    assert str(explanation) == before


def test_chinese_is_what_it_speaks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHE_DIT_LANG", raising=False)
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **{**EXACT, "language": None})
    run(model, 1)
    text = str(cache_dit.explain(model))
    for words in ("（启用）", "图: 1 个，图中断: 0 处", "缓存 3 个: blocks.1 … blocks.3", "缓存占用: 每个上下文 384 B"):
        assert words in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.00 GiB")]
)
def test_bytes_read_well(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_a_model_never_cached_has_no_explanation() -> None:
    with pytest.raises(cache_dit.CacheDitError, match="enable_cache"):
        cache_dit.explain(nn.Linear(2, 2))
