"""``torch.compile(model, backend="cache_dit")``: graphs, sharing of compiled code, options, refusals, inner compilers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import cache_dit
from cache_dit.messages import CacheDitWarning

from . import models
from .reference import EagerCache

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
# Every other step from the fourth on.
FIXED_HITS = [False, False, False, True, False, True, False, True]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def inputs_at(step: int, **more: Any) -> tuple[Any, ...]:
    """Other numbers at each step, at falling timesteps."""
    x, t, *rest = models.example(seed=step, **more)
    return (x, t - 0.08 * step, *rest)


def run(caller: Callable[..., Tensor], steps: int = 8, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        return [caller(*inputs_at(step, **more)) for step in range(steps)]


def assert_cached_run(
    caller: Callable[..., Tensor], reference: nn.Module, streams: Sequence[str] = ("x",), front: int = 1
) -> None:
    """One run of a model, compared with caching written in eager over a copy of it."""
    reference = copy.deepcopy(reference)
    eager = EagerCache(reference.blocks, streams, front)
    with torch.no_grad():
        for step, eager.skip in enumerate(FIXED_HITS):
            torch.testing.assert_close(caller(*inputs_at(step)), reference(*inputs_at(step)), rtol=1e-6, atol=1e-6)


class Counting:
    """An inner compiler that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


# Graphs.


class Printing(models.TinyDiT):
    """The graph breaks behind the blocks."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        torch._dynamo.graph_break()
        return out * 2.0


def _enabled(model: nn.Module) -> Callable[..., Tensor]:
    return cache_dit.enable_cache(model, **EXACT)


def _compiled(model: nn.Module) -> Callable[..., Tensor]:
    caller: Callable[..., Tensor] = torch.compile(model, backend="cache_dit", options=EXACT)
    return caller


@pytest.mark.parametrize("entry", [_enabled, _compiled])
@pytest.mark.parametrize(
    ("build", "context", "graphs", "breaks"),
    [
        (models.TinyDiT, False, 1, 0),
        (models.JointDiT, True, 1, 0),
        (models.LongSkipStack, False, 1, 0),
        (models.InPlaceStack, False, 1, 0),
        pytest.param(Printing, False, 2, 1),
    ],
)
def test_graphs_and_breaks_are_those_of_plain_compiling(
    entry: Callable[[nn.Module], Callable[..., Tensor]],
    build: Callable[[], nn.Module],
    context: bool,
    graphs: int,
    breaks: int,
) -> None:
    def counted(caller: Callable[..., Tensor]) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        run(caller, context=context)
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    model = models.seeded(build)
    assert counted(torch.compile(copy.deepcopy(model), backend="eager")) == (graphs, breaks)
    assert counted(entry(model)) == (graphs, breaks)
    assert cache_dit.get_stats(model).hits == 3
    assert counters["cache_dit"]["insert_cache_branch"] == 1


@pytest.mark.parametrize(("lowering", "programs"), [("specialize", 2), ("pieces", 5), ("cond", 1)])
def test_the_inner_compiler_sees_each_program_once(lowering: str, programs: int) -> None:
    inner = Counting()
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, lowering=lowering, **{**EXACT, "inner": inner})
    for _ in range(3):
        run(model)
    assert inner.graphs == programs
    stats = cache_dit.get_stats(model)
    assert (stats.compiles, stats.compile_calls, stats.calls, stats.hits) == (1, 1, 24, 9)


def test_the_whole_model_may_be_asked_to_be_one_graph() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options=EXACT, fullgraph=True)
    assert_cached_run(caller, model)
    assert cache_dit.get_stats(model).hits == 3


def test_dynamic_shapes_compile_once() -> None:
    inner = Counting()
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options={**EXACT, "inner": inner}, dynamic=True)
    for batch, tokens in ((2, 6), (3, 9), (5, 4)):
        before = cache_dit.get_stats(model).hits if inner.graphs else 0
        run(caller, batch=batch, tokens=tokens)
        assert cache_dit.get_stats(model).hits - before == 3
    assert inner.graphs == 2


def test_an_outer_compiler_leaves_an_enabled_model_cached() -> None:
    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    outer = torch.compile(model, backend="eager")
    cache_dit.enable_cache(outer, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_cached_run(outer, reference)
    assert cache_dit.get_stats(outer).hits == cache_dit.get_stats(model).hits == 3


# Many models, one compiled program.


def test_twenty_instances_share_the_program_and_keep_their_residuals_apart() -> None:
    inner = Counting()
    found = []
    for seed in range(20):
        model = models.seeded(models.TinyDiT)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * seed)
        reference = copy.deepcopy(model)
        cache_dit.enable_cache(model, **{**EXACT, "inner": inner})
        found.append((model, reference, EagerCache(reference.blocks, ("x",))))
    with torch.no_grad():
        for step, hit in enumerate(FIXED_HITS):
            for model, reference, eager in found:
                eager.skip = hit
                torch.testing.assert_close(model(*inputs_at(step)), reference(*inputs_at(step)), rtol=1e-6, atol=1e-6)
    assert [cache_dit.get_stats(model).hits for model, _, _ in found] == [3] * 20
    assert inner.graphs == 2


@pytest.mark.parametrize("bare", [False, True])
def test_twenty_times_off_and_on_again_stays_cached(bare: bool) -> None:
    inner = Counting()
    options = {**EXACT, "inner": inner}
    model = models.seeded(models.TinyDiT)
    for _ in range(20):
        if bare:
            before = cache_dit.get_stats(model).hits if inner.graphs else 0
            torch.compile(model, backend="cache_dit", options=dict(options))
            run(torch.compile(model, backend="cache_dit", options=dict(options)))
            assert cache_dit.get_stats(model).hits - before == 3
        else:
            cache_dit.enable_cache(model, **options)
            run(model)
            assert cache_dit.get_stats(model).hits == 3
            cache_dit.disable_cache(model)
    assert inner.graphs == 2


def test_other_options_are_another_program_and_settings_of_the_runtime_are_not() -> None:
    inner = Counting()
    model = models.seeded(models.TinyDiT)
    base = {**EXACT, "inner": inner}
    for options in ({}, {"skip_interval": 3}, {"strategy": "dynamic"}, {"schedule": "10"}, {"debug": True}):
        with cache_dit.cached(model, **base, **options):
            run(model)
    assert inner.graphs == 2
    for count, options in enumerate(({"front_blocks": 2}, {"order": 2, "forecast": "taylor"}, {"noise_scale": 0.1}), 2):
        with cache_dit.cached(model, **{**base, **options}):
            run(model)
        assert inner.graphs == 2 * count


def test_two_settings_of_bare_compiling_on_one_model_do_not_mix() -> None:
    model = models.seeded(models.TinyDiT)
    often = torch.compile(model, backend="cache_dit", options={**EXACT, "schedule": "10000000"})
    seldom = torch.compile(model, backend="cache_dit", options=EXACT)
    reference = copy.deepcopy(model)
    run(often)
    assert_cached_run(seldom, reference)
    assert cache_dit.get_stats(model).hits == 10


# Statistics of bare compiling.


def test_statistics_and_explanation_of_a_compiled_model_and_of_the_module_in_it() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options=EXACT)
    with pytest.raises(cache_dit.CacheDitError, match="enable_cache"):
        cache_dit.get_stats(caller)
    run(caller)
    assert cache_dit.summary(caller) == cache_dit.summary(model)
    assert cache_dit.summary(model).splitlines()[:4] == [
        "Cache statistics:",
        "Total Forward calls: 8",
        "Cache hits: 3",
        "Cache hit rate: 37.5%",
    ]
    stats = cache_dit.get_stats(caller)
    assert stats == cache_dit.get_stats(model)
    assert (stats.compile_calls, stats.compute_calls_timed, stats.reuse_calls_timed) == (1, 4, 3)
    assert cache_dit.explain(caller).blocks == cache_dit.explain(model).blocks
    assert len(cache_dit.explain(model).blocks) == 4


def test_a_compiled_model_goes_by_the_name_of_its_class_and_its_id() -> None:
    model = models.seeded(models.TinyDiT)
    run(torch.compile(model, backend="cache_dit", options=EXACT))
    assert cache_dit.get_stats(model).name == f"TinyDiT_{id(model)}"
    assert cache_dit.explain(model).name == f"TinyDiT_{id(model)}"


@pytest.mark.parametrize("correction", ["auto", False])
def test_bare_compiling_keeps_no_residuals_for_a_correction_that_cannot_be(correction: object) -> None:
    model = models.seeded(models.TinyDiT)
    options = {**EXACT, "strategy": "adaptive", "correction": correction}
    run(torch.compile(model, backend="cache_dit", options=options))
    residual = models.BATCH * models.TOKENS * models.WIDTH * 4
    # and the front's output
    assert cache_dit.get_stats(model).cache_bytes == 2 * residual


def test_caching_of_a_compiled_model_can_be_turned_off() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options=EXACT)
    run(caller)
    cache_dit.disable_cache(caller)
    for output, wanted in zip(run(caller), run(model), strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    stats = cache_dit.get_stats(model)
    assert (stats.enabled, stats.hits, stats.cache_bytes) == (False, 3, 0)


def test_runs_and_contexts_can_be_named_under_bare_compiling() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options={**EXACT, "schedule": "1000"})
    hits = []
    with torch.no_grad():
        caller(*inputs_at(0))
        for name in ("a", "b", "a", "b"):
            before = cache_dit.get_stats(model).hits
            with cache_dit.context(caller, name):
                caller(*inputs_at(1))
            hits.append(cache_dit.get_stats(model).hits > before)
    assert hits[:2] == [False, False]
    run(caller, 3)
    cache_dit.new_run(caller)
    before = cache_dit.get_stats(model).hits
    with torch.no_grad():
        caller(*inputs_at(3))
    assert cache_dit.get_stats(model).hits == before


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_node_of_the_programs_has_an_example_value(dynamic: bool) -> None:
    """Without one torch takes a graph for unsafe to keep on disk, and every process compiles anew."""
    graphs: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    caller = torch.compile(models.seeded(models.TinyDiT), backend="cache_dit", options={"inner": look}, dynamic=dynamic)
    run(caller, 1)
    assert len(graphs) == 2
    for gm in graphs:
        without = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method") and "example_value" not in n.meta]
        assert without == []


# Refusals.


def test_a_model_without_blocks_warns_once_and_runs_as_it_is() -> None:
    model = models.seeded(models.Plain)
    caller = torch.compile(model, backend="cache_dit", options=EXACT)
    with pytest.warns(CacheDitWarning, match="No transformer component found") as said:
        for batch in (2, 3, 4):
            for output, wanted in zip(run(caller, batch=batch), run(model, batch=batch), strict=True):
                assert torch.equal(output, wanted)
    assert len(said) == 1
    assert "region=" in str(said[0].message)


class EndsInBreak(models.TinyDiT):
    """Its frame ends in a graph break with no graph behind it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = super().forward(x, t)
        torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("strict", [False, True])
def test_a_frame_that_ends_in_a_break_does_not_speak_for_the_next_model(strict: bool) -> None:
    run(torch.compile(models.seeded(EndsInBreak), backend="cache_dit", options={**EXACT, "strict": strict}))
    caller = torch.compile(models.seeded(models.Plain), backend="cache_dit", options={**EXACT, "strict": strict})
    expected: Any = pytest.raises(BackendCompilerFailed) if strict else pytest.warns(CacheDitWarning)
    with expected:
        run(caller)


class BreaksBehindBlocks(models.TinyDiT):
    """The graph behind the break has no blocks, the one before it has."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = super().forward(x, t)
        torch._dynamo.graph_break()
        return x * 2.0


def test_a_graph_without_blocks_behind_one_with_a_region_is_not_spoken_of() -> None:
    model = models.seeded(BreaksBehindBlocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        run(torch.compile(model, backend="cache_dit", options={**EXACT, "strict": True}))


def test_strict_raises_where_nothing_can_be_cached() -> None:
    model = models.seeded(models.Plain)
    caller = torch.compile(model, backend="cache_dit", options={**EXACT, "strict": True})
    with pytest.raises(BackendCompilerFailed, match="No transformer component found") as raised:
        run(caller)
    assert isinstance(raised.value.__cause__, cache_dit.CacheDitError)
    # the model itself is as it was
    assert len(run(model)) == 8


def test_gradients_are_left_to_the_plain_graph_and_said_once() -> None:
    model = models.seeded(models.TinyDiT)
    caller = torch.compile(model, backend="cache_dit", options=EXACT)
    with pytest.warns(CacheDitWarning, match="no_grad") as said:
        for step in range(5):
            output = caller(*inputs_at(step))
            assert torch.equal(output, model(*inputs_at(step)))
            output.sum().backward()
    assert len(said) == 1
    assert_cached_run(caller, model)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"skip_interval": 0}, ValueError, ["skip_interval", "0", ">= 1"]),
        ({"skip_interval": "two"}, TypeError, ["skip_interval", "two", "int"]),
        ({"strategy": "fast"}, ValueError, ["strategy", "fast", "adaptive"]),
        ({"skip_intervall": 2}, TypeError, ["skip_intervall", "skip_interval"]),
        ({"Fn_compute_blocks": 1}, TypeError, ["Fn_compute_blocks", "cache-dit", "front_blocks"]),
        ({"rel_l1_thresh": 0.1}, TypeError, ["rel_l1_thresh", "TeaCache", "tolerance"]),
    ],
)
def test_wrong_options_are_the_cause_of_the_first_calls_error(
    options: dict[str, Any], error: type[Exception], words: Sequence[str]
) -> None:
    model = models.seeded(models.TinyDiT)
    before = run(model)
    caller = torch.compile(model, backend="cache_dit", options={"inner": "eager", "language": "en", **options})
    attributes = set(vars(model))
    with pytest.raises(BackendCompilerFailed) as raised:
        run(caller)
    assert type(raised.value.__cause__) is error
    for word in words:
        assert word in str(raised.value.__cause__)
    assert set(vars(model)) == attributes
    for output, wanted in zip(run(model), before, strict=True):
        assert torch.equal(output, wanted)


# Inner compilers.


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_fx(gm: fx.GraphModule, examples: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = models.seeded(models.TinyDiT)
    run(torch.compile(model, backend="cache_dit", mode="max-autotune-no-cudagraphs"))
    assert [patches["max_autotune"] for patches in seen] == [True, True]
    seen.clear()
    run(torch.compile(model, backend="cache_dit", options={"inner_options": {"epilogue_fusion": False}}))
    assert seen == [{"epilogue_fusion": False}] * 2


def test_a_failing_inner_compiler_leaves_the_graph_as_traced_and_is_said() -> None:
    def broken(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("no toolchain")

    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    cache_dit.enable_cache(model, **{**EXACT, "inner": broken})
    with pytest.warns(CacheDitWarning, match="no toolchain"):
        assert_cached_run(model, reference)
    assert cache_dit.get_stats(model).hits == 3
    strict = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(strict, **{**EXACT, "inner": broken, "strict": True})
    with pytest.raises(BackendCompilerFailed) as raised:
        run(strict)
    assert isinstance(raised.value.__cause__, cache_dit.CacheDitError)


def test_a_form_that_a_model_cannot_have_gives_way_and_says_why() -> None:
    model = models.seeded(models.GluedStack)
    cache_dit.enable_cache(model, lowering="pieces", **{**EXACT, "language": "en"})
    said = "'pieces' does not suit this model: no two of its blocks have the same graph"
    with pytest.warns(CacheDitWarning, match=said), torch.no_grad():
        for step in range(8):
            model(models.example()[0], torch.full((models.BATCH,), 0.9 - 0.1 * step))
    assert cache_dit.get_stats(model).hits == 3
    assert "compiled as: specialize" in str(cache_dit.explain(model))


def test_pieces_need_no_block_that_always_computes() -> None:
    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    cache_dit.enable_cache(model, lowering="pieces", front_blocks=0, **{**EXACT, "language": "en"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        assert_cached_run(model, reference, front=0)
    assert "compiled as: pieces" in str(cache_dit.explain(model))


def test_pieces_of_a_part_that_is_named_are_one_program() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, lowering="pieces", region=("blocks.1", "blocks.2"), **{**EXACT, "language": "en"})
    with pytest.warns(CacheDitWarning, match="the region was given by module names, so no blocks are marked"):
        run(model)
    assert cache_dit.get_stats(model).hits == 3
    assert "compiled as: specialize" in str(cache_dit.explain(model))
