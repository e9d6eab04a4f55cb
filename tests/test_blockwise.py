"""Models whose blocks do not come into one graph: traced in another way, else cached block by block."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.structure import chain_of_blocks, main_list

from . import models
from .reference import EagerCache

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
# Finding a way to trace the model takes the first steps; these are far enough behind.
SCHEDULE = "1111010010"
SKIPPED = [mark == "0" for mark in SCHEDULE]
SLOT = "_compiled_call_impl"


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


class ReadsOnHost(models.Block):
    """Reads a tensor on the host, which torch's capture flags allow for."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return super().forward(x, temb) * (1.0 + 0.0 * temb.sum().item())


class Breaks(models.Block):
    """Breaks every graph."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = super().forward(x, temb)
        torch._dynamo.graph_break()
        return x


class Store:
    """Something that a block may write to."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


class Writes(models.Block):
    """Leaves its result in an object it is given."""

    def forward(self, x: Tensor, temb: Tensor, store: Store | None = None, write: bool = True) -> Tensor:
        x = super().forward(x, temb)
        torch._dynamo.graph_break()
        if store is not None and write:
            store.value = x
        return x


class WritesInPlace(models.Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.add_(super().forward(x, temb))


class StoringDiT(models.TinyDiT):
    def __init__(self) -> None:
        super().__init__(block=Writes)
        self.write = True

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = block(h, temb, Store(), write=self.write)
        return self.head(h)


class JointBreaks(models.JointDiT):
    """Two lists of about the same weight beside each other, and a small one in front."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.refiner = nn.ModuleList(models.SimpleBlock() for _ in range(2))
        self.refiner[0].mlp = self.refiner[1].mlp = nn.Linear(models.WIDTH, models.WIDTH, bias=False)

    def run_double(self, h: Tensor, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.refiner:
            context = block(context, t)
            torch._dynamo.graph_break()
        for block in self.double_blocks:
            h, context = block(h, context, t)
            torch._dynamo.graph_break()
        return h, context


def dit(block: type[nn.Module] = Breaks, depth: int = 4) -> nn.Module:
    return models.seeded(lambda: models.TinyDiT(depth, block))


def inputs_at(step: int, **more: Any) -> tuple[Any, ...]:
    x, t, *rest = models.example(seed=step, **more)
    return (x, t - 0.06 * step, *rest)


def run(model: nn.Module, steps: int = len(SCHEDULE), **more: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(*inputs_at(step, **more)) for step in range(steps)]


def with_eager_cache(model: nn.Module, skipped: list[bool] = SKIPPED, **more: Any) -> list[Tensor]:
    """The same run with caching written in eager over a copy of the model."""
    reference = copy.deepcopy(model)
    eager, outputs = EagerCache(reference.blocks, ("x",)), []
    with torch.no_grad():
        for step, eager.skip in enumerate(skipped):
            outputs.append(reference(*inputs_at(step, **more)))
    return outputs


def assert_close(outputs: list[Tensor], wanted: list[Tensor]) -> None:
    for output, right in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-6, atol=1e-6)


def slots(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if vars(module).get(SLOT) is not None]


def test_host_reads_are_captured_in_a_second_trace_and_the_run_stays_right() -> None:
    model = dit(ReadsOnHost)
    wanted = with_eager_cache(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        for _ in range(2):
            assert_close(run(model), wanted)
    assert cache_dit.get_stats(model).hits == 2 * sum(SKIPPED)
    found = cache_dit.explain(model)
    assert found.region is not None and found.region.cached == ("blocks.1", "blocks.2", "blocks.3")
    assert found.notes == () and slots(model) == [""]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_blocks_that_break_their_graphs_are_cached_one_by_one(inner: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = dit()
    wanted = with_eager_cache(model)
    state = torch.get_rng_state()
    cache_dit.enable_cache(model, schedule=SCHEDULE, **{**EXACT, "inner": inner})
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        for _ in range(2):
            assert_close(run(model), wanted)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.runs) == (2 * len(SCHEDULE), 2 * sum(SKIPPED), 2)
    assert torch.equal(state, torch.get_rng_state())
    found = cache_dit.explain(model)
    assert found.region is not None and found.region.cached == ("blocks.1", "blocks.2", "blocks.3")
    # a residual for each of three blocks
    assert found.buffer_bytes == found.held_bytes == 3 * 4 * models.BATCH * models.TOKENS * models.WIDTH
    assert "block by block" in str(found) and "graph_break" in str(found)
    assert "each block caches its own part" in capfd.readouterr().err


def test_forecasts_and_noise_work_block_by_block() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, inner="eager", forecast="lagrange", noise_scale=0.05, language="en")
    first, second = run(model), run(model)
    plain = run(copy.deepcopy(model))
    for skipped, a, b, exact in zip(SKIPPED, first, second, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, exact) != skipped
    assert cache_dit.get_stats(model).mean_forecast_error is not None


def test_the_front_clock_decides_for_all_blocks() -> None:
    model = dit()
    cache_dit.enable_cache(model, strategy="adaptive", tolerance=0.5, **EXACT)
    x, t = models.example()
    hits = [0]
    with torch.no_grad():
        for tolerable in (True, True, False):
            for step in range(12):
                model(x if tolerable else x * 3.0**step, t - 0.01 * step)
            hits.append(cache_dit.get_stats(model).hits)
    # the first run goes to finding a way to trace, the last one moves too fast
    assert hits[2] - hits[1] >= 6
    assert hits[3] - hits[2] <= 3


def test_disabling_puts_the_slots_of_the_blocks_back() -> None:
    model = dit()
    run_plain = run(model)
    model.blocks[2].compile(backend="eager")
    compiled = getattr(model.blocks[2], SLOT)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model)
    assert slots(model) == ["", "blocks.1", "blocks.2", "blocks.3"]
    assert getattr(model.blocks[2], SLOT) is not compiled
    cache_dit.disable_cache(model)
    assert slots(model) == ["blocks.2"] and getattr(model.blocks[2], SLOT) is compiled
    assert SLOT not in vars(model.blocks[1])
    assert_close(run(model), run_plain)
    # and on again
    wanted = with_eager_cache(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    assert_close(run(model), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_uncached(duplicate: Any) -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    outputs = run(model)
    copied = duplicate(model)
    assert slots(copied) == []
    for skipped, a, b in zip(SKIPPED, run(copied), outputs, strict=True):
        assert skipped or torch.equal(a, b)


def test_two_models_of_a_class_are_apart_and_free_themselves() -> None:
    first, second = dit(), dit()
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.1)
    pairs = [(model, with_eager_cache(model)) for model in (first, second)]
    for model, _ in pairs:
        cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
        run(model)
    with torch.no_grad():
        for step, skipped in enumerate(SKIPPED):
            for model, wanted in pairs:
                torch.testing.assert_close(model(*inputs_at(step)), wanted[step], rtol=1e-6, atol=1e-6)
            del skipped
    gone = weakref.ref(first)
    del first, model, pairs
    gc.collect()
    assert gone() is None


def test_changed_weights_and_shapes_compute_first() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule="1" + "0" * 30, **EXACT)
    run(model)
    with torch.no_grad():
        for step in range(4):
            model(*inputs_at(step))
        hits = cache_dit.get_stats(model).hits
        model.blocks[2].mlp.weight.mul_(1.5)
        wanted = model.forward(*inputs_at(4))
        del wanted
        model(*inputs_at(4))
    assert cache_dit.get_stats(model).refused["weights_changed"] == 1
    assert cache_dit.get_stats(model).hits == hits + 1  # the other blocks are as they were
    with torch.no_grad():
        other = copy.deepcopy(model)
        assert torch.equal(model(*inputs_at(5, batch=3)), other(*inputs_at(5, batch=3)))


def test_contexts_have_their_own_residuals() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model)
    wanted = [with_eager_cache(model), with_eager_cache(model, tokens=5)]
    with torch.no_grad():
        for step in range(len(SCHEDULE)):
            for tokens, right in zip((models.TOKENS, 5), wanted, strict=True):
                with cache_dit.context(model, str(tokens)):
                    output = model(*inputs_at(step, tokens=tokens))
                torch.testing.assert_close(output, right[step], rtol=1e-6, atol=1e-6)


def test_gradients_pass_through() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model)
    hits = cache_dit.get_stats(model).hits
    with pytest.warns(CacheDitWarning, match="no_grad"):
        for step in range(6):
            model(*inputs_at(step)).sum().backward()
    assert cache_dit.get_stats(model).hits == hits
    assert model.blocks[3].mlp.weight.grad is not None


def test_a_block_that_writes_to_what_it_is_given_always_computes() -> None:
    model = models.seeded(StoringDiT)
    wanted = run(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    with pytest.warns(CacheDitWarning, match="No transformer component"):
        for _ in range(2):
            assert_close(run(model), wanted)
    assert cache_dit.get_stats(model).hits == 0


def test_a_block_that_only_reads_an_object_is_cached() -> None:
    model = models.seeded(StoringDiT)
    model.write = False
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model)
    run(model)
    assert cache_dit.get_stats(model).hits == 2 * sum(SKIPPED)
    # from here on it writes: what was compiled for reading does not hold
    model.write = True
    wanted = run(copy.deepcopy(model))
    with pytest.warns(CacheDitWarning, match="No transformer component"):
        assert_close(run(model), wanted)


def test_a_block_that_writes_over_its_input_always_computes() -> None:
    model = dit(WritesInPlace)
    wanted = run(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    with pytest.warns(CacheDitWarning, match="No transformer component"):
        for _ in range(2):
            assert_close(run(model), wanted)
    assert cache_dit.get_stats(model).hits == 0


def test_a_cached_side_list_does_not_end_the_search() -> None:
    """The refiner comes whole into a graph, the main list does not."""

    class SideDiT(models.RefinedStack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = models.Stack(9).blocks

        def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                h = block(h, t)
                torch._dynamo.graph_break()
            return h

    model = models.seeded(SideDiT)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model, context=True)
    hits = cache_dit.get_stats(model).hits
    run(model, context=True)
    assert cache_dit.get_stats(model).hits - hits == sum(SKIPPED)
    found = cache_dit.explain(model)
    assert found.region is not None and found.region.cached == tuple(f"blocks.{i}" for i in range(1, 9))


class TakesNumber(models.Block):
    def forward(self, x: Tensor, temb: Tensor, sigma: float = 0.0) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, temb) + 1e-3 * sigma


class NumberDiT(models.TinyDiT):
    def __init__(self) -> None:
        super().__init__(block=TakesNumber)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = block(h, temb, sigma=float(t[0]))
        return self.head(h)


def test_a_number_that_changes_at_each_step_is_no_other_shape() -> None:
    model = models.seeded(NumberDiT)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    run(model)
    hits = cache_dit.get_stats(model).hits
    run(model)
    assert cache_dit.get_stats(model).hits - hits == sum(SKIPPED)


def test_a_failing_inner_compiler_leaves_the_blocks_in_eager() -> None:
    def fails(gm: Any, examples: Any) -> Any:
        raise ArithmeticError("no compiler")

    model = dit()
    wanted = with_eager_cache(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **{**EXACT, "inner": fails})
    with pytest.warns(CacheDitWarning, match="no compiler"):
        assert_close(run(model), wanted)
    assert cache_dit.get_stats(model).hits == sum(SKIPPED)


def test_a_lowering_that_blocks_cannot_have_is_said() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, lowering="cond", **EXACT)
    with pytest.warns(CacheDitWarning, match="cond"):
        run(model)
    assert "compiled as: specialize" in str(cache_dit.explain(model))


def test_strict_does_not_raise_before_every_way_was_tried() -> None:
    model = dit()
    cache_dit.enable_cache(model, schedule=SCHEDULE, strict=True, **EXACT)
    run(model)
    assert cache_dit.get_stats(model).hits == sum(SKIPPED)


def test_the_chain_of_blocks() -> None:
    assert chain_of_blocks(models.Plain()) == [] and main_list(models.Plain()) is None
    assert chain_of_blocks(models.TinyDiT(2)) == ["blocks.0", "blocks.1"]
    model = JointBreaks()
    assert main_list(model) == "double_blocks"
    assert chain_of_blocks(model) == [*(f"double_blocks.{i}" for i in range(3)), "single_blocks.0", "single_blocks.1"]
    # inside of another module, and with a long list inside of each block
    outer = nn.Module()
    outer.transformer = model
    assert chain_of_blocks(outer) == [f"transformer.{path}" for path in chain_of_blocks(model)]


def test_two_lists_and_two_streams() -> None:
    model = models.seeded(JointBreaks)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    first, second = run(model, context=True), run(model, context=True)
    plain = run(copy.deepcopy(model), context=True)
    for skipped, a, b, exact in zip(SKIPPED, first, second, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, exact) != skipped
