"""Isolation of models: weights of another state, copies, models of one class, many times on and off."""

from __future__ import annotations

import copy
import gc
import pickle
import tracemalloc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.tracing import Capture
from cache_dit.torch_internals import RECOMPILE_LIMIT

from .. import models
from .generations import EXACT, GREEDY, Plan, Prompted, enabled, falling, generate, hits_of, prompted, same, tensor

pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def inputs_at(step: int) -> tuple[Tensor, Tensor]:
    x, t = models.example(seed=step)
    return x, t - 0.02 * step


def hits_with(model: nn.Module, steps: int, before: Callable[[int], None], *, compare: bool = True) -> list[bool]:
    """Which calls of a run were hits, where ``before(step)`` may change the model; computed ones are as without caching."""
    hits = []
    with torch.no_grad():
        for step in range(steps):
            before(step)
            count = hits_of(model)
            output = model(*inputs_at(step))
            hits.append(hits_of(model) > count)
            if compare and not hits[-1]:
                torch.testing.assert_close(output, model.forward(*inputs_at(step)), rtol=1e-6, atol=1e-6)
    return hits


# What a model holds.


class Scaled(models.Block):
    """A block with a number, an entry of a dictionary and a plain tensor of its own, as adapters have them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.scaling, self.direction = 1.0, {"adapter": 1.0}, torch.ones(models.WIDTH)
        self.register_buffer("offset", torch.zeros(models.WIDTH))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        added = super().forward(x, temb) - x
        return x + added * (self.scale * self.scaling["adapter"]) * self.direction + self.offset


def _number(block: Scaled, value: float) -> None:
    block.scale = value


def _entry(block: Scaled, value: float) -> None:
    block.scaling["adapter"] = value


def _plain_tensor(block: Scaled, value: float) -> None:
    block.direction = torch.full((models.WIDTH,), value)


def _plain_tensor_written_to(block: Scaled, value: float) -> None:
    block.direction.fill_(value)


def _buffer(block: Scaled, value: float) -> None:
    block.offset.fill_(value)


@pytest.mark.parametrize("change", [_number, _entry, _plain_tensor, _plain_tensor_written_to, _buffer])
def test_whatever_a_block_holds_the_step_behind_its_change_computes(change: Callable[[Scaled, float], None]) -> None:
    """More than once: what changed before has become an input of the graph."""
    model = models.seeded(lambda: models.TinyDiT(block=Scaled))
    cache_dit.enable_cache(model, **GREEDY)
    changes = (3, 6, 9, 12)

    def before(step: int) -> None:
        if step in changes:
            for block in model.blocks:
                change(block, 1.0 - step / 20)

    assert hits_with(model, 15, before) == [step != 0 and step not in changes for step in range(15)]


def test_an_adapter_loaded_scaled_switched_fused_and_unloaded_in_mid_run() -> None:
    """peft: each step behind a change computes with the weights as they then are."""
    peft = pytest.importorskip("peft")
    model = models.seeded(lambda: models.TinyDiT(2))
    cache_dit.enable_cache(model, **GREEDY)
    config = peft.LoraConfig(r=2, target_modules=r"blocks\.\d+\.(mlp|modulation)", init_lora_weights=False)

    def layers() -> list[Any]:
        return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]

    def each(act: Callable[[Any], object]) -> None:
        for layer in layers():
            act(layer)

    def unload() -> None:
        for block in model.blocks:
            block.mlp, block.modulation = block.mlp.get_base_layer(), block.modulation.get_base_layer()

    torch.manual_seed(0)
    changes: dict[int, Callable[[], object]] = {
        3: lambda: peft.inject_adapter_in_model(config, model, "first"),
        6: lambda: each(lambda layer: layer.set_scale("first", 0.5)),
        9: lambda: each(lambda layer: layer.set_scale("first", 0.25)),
        12: lambda: each(lambda layer: layer.set_scale("first", 0.1)),
        15: lambda: each(lambda layer: layer.merge()),
        18: lambda: each(lambda layer: layer.unmerge()),
        21: lambda: each(lambda layer: layer.enable_adapters(False)),
        24: unload,
    }
    plain = models.seeded(lambda: models.TinyDiT(2))
    hits = hits_with(model, 27, lambda step: changes.get(step, lambda: None)())
    assert hits == [step != 0 and step not in changes for step in range(27)]
    with torch.no_grad():
        torch.testing.assert_close(model.forward(*inputs_at(0)), plain(*inputs_at(0)), rtol=1e-5, atol=1e-5)


def test_writes_that_nobody_can_see_are_what_new_run_is_for() -> None:
    """``.data`` moves no counter: in mid-run the old residual is used, behind ``new_run`` and in the next run it is not."""
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **GREEDY)

    def write(step: int) -> None:
        if step in (3, 6):
            model.get_submodule("blocks.2.mlp").weight.data.mul_(1.1)
        if step == 6:
            cache_dit.new_run(model)

    assert hits_with(model, 8, write) == [False, *[True] * 5, False, True]


# Copies.


class WholeCopies(Prompted):
    """A class that copies every attribute, as some libraries write it."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


@pytest.mark.parametrize("build", [Prompted, WholeCopies])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_uncached_with_their_own_weights(
    build: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    if build is WholeCopies and duplicate is copy.copy:
        pytest.skip("a class that shares its whole __dict__ with its copy shares the compile slot, of torch.compile too")
    model, plan = cache_dit.enable_cache(models.seeded(build), **EXACT), Plan(10, falling(8))
    cached = generate(plan, model)
    copied = duplicate(model)
    calls = cache_dit.get_stats(model).calls
    with torch.no_grad():
        copied.get_submodule("blocks.1.mlp").weight.data = tensor(3, models.WIDTH, models.WIDTH)
    assert same(generate(plan, copied), generate(plan, copied.forward))
    assert cache_dit.get_stats(model).calls == calls
    if duplicate is not copy.copy:
        assert same(generate(plan, model), cached)
    cache_dit.enable_cache(copied, **EXACT)
    generate(plan, copied)
    assert hits_of(copied) == 3


# A model that calls itself.


class SelfCalling(models.TinyDiT):
    """Makes one of its two predictions through a call of itself, from code that Dynamo traces or from code that it does not."""

    def __init__(self, traced: bool) -> None:
        super().__init__()
        self.again: Callable[..., Tensor] = self._again if traced else torch.compiler.disable(self._again)

    def _again(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t, inner=True)

    def forward(self, x: Tensor, t: Tensor, inner: bool = False) -> Tensor:
        return super().forward(x, t) if inner else 2 * super().forward(x, t) - self.again(x + 1, t)


@pytest.mark.parametrize("traced", [True, False])
def test_a_model_that_calls_itself(traced: bool) -> None:
    model, plain = models.seeded(lambda: SelfCalling(traced)), models.seeded(lambda: SelfCalling(traced))
    plain.load_state_dict(model.state_dict())
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad():
        for step in range(8):
            before = hits_of(model)
            output = model(*inputs_at(step))
            if hits_of(model) == before:
                torch.testing.assert_close(output, plain(*inputs_at(step)), rtol=1e-6, atol=1e-6)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits) == (8, 3)


# Many.


def test_twenty_models_of_a_class_are_cached_and_apart() -> None:
    every = [enabled(EXACT) for _ in range(20)]
    with torch.no_grad():
        for i, model in enumerate(every):
            model.head.weight.mul_(1.0 + i / 10)
    plan = Plan(10, falling(8))
    alone = []
    for model in every:
        fresh = copy.deepcopy(model)
        alone.append(generate(plan, cache_dit.enable_cache(fresh, **EXACT)))
    running = [generate(plan, model) for model in every]
    assert all(same(found, wanted) for found, wanted in zip(running, alone, strict=True))
    assert [hits_of(model) for model in every] == [3] * 20
    assert sum(cache_dit.get_stats(model).compiles for model in every) <= 1


def test_a_hundred_times_off_and_on_again_neither_grows_nor_recompiles() -> None:
    model, plan = prompted(), Plan(10, falling(6))

    def once(n: int) -> weakref.ref[Any]:
        cache_dit.enable_cache(model, **EXACT, skip_interval=2 + n % 2, warmup_steps=n % 3)
        generate(plan, model)
        assert hits_of(model) > 0
        session = weakref.ref(model._compiled_call_impl.session)
        cache_dit.disable_cache(model)
        return session

    for n in range(6):
        once(n)
    gc.collect()
    tracemalloc.start()
    gone = []
    compiles = 0
    for n in range(100):
        gone.append(once(n))
        compiles += cache_dit.get_stats(model).compiles
        if n == 19:
            gc.collect()
            early = tracemalloc.get_traced_memory()[0]
    gc.collect()
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert compiles == 0
    # the last one is what statistics are read from
    assert [session() is None for session in gone[:-1]] == [True] * 99
    # torch keeps what its `torch.compile` returned, under a kilobyte each; a session is many times that
    assert late - early < 80 * 2048, (early, late)


def test_models_buffers_and_sessions_are_freed_with_their_models() -> None:
    gone = []
    for _ in range(10):
        model = enabled(EXACT)
        generate(Plan(10, falling(5)), model)
        session = model._compiled_call_impl.session
        store = next(iter(session.contexts[1].stores.values()))
        gone += [weakref.ref(each) for each in (model, session, store.residuals[0][0], model.blocks[0].mlp.weight)]
        del model, session, store
    gc.collect()
    assert [reference() for reference in gone] == [None] * 40


def test_shapes_beyond_the_recompile_limit_run_uncached_and_say_so(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    assert RECOMPILE_LIMIT == 64
    monkeypatch.setattr("cache_dit.torch_internals.RECOMPILE_LIMIT", 3)
    model = enabled(EXACT)
    plain = prompted()
    with pytest.warns(CacheDitWarning, match=r"recompile|limit") as said, torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=3
    ):
        for tokens in range(2, 9):
            plan = Plan(10, falling(5), tokens=tokens)
            found = generate(plan, model)
            assert [output.shape for output in found] == [plan.parts()[0].shape] * 5
    assert len(said) == 1
    assert cache_dit.get_stats(model).refused["not_compiled"] > 0
    plan = Plan(10, falling(5), tokens=8)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=3):
        assert same(generate(plan, model), generate(plan, plain))
    assert model._compiled_call_impl.session.tracing.capture is Capture.DEFAULT


def test_other_options_each_time() -> None:
    model, plan = prompted(), Plan(10, falling(10))
    plain = generate(plan, prompted())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        for options in (
            {"strategy": "fixed"},
            {"strategy": "dynamic", "skip_interval": 3},
            {"strategy": "adaptive", "tolerance": 1.0},
            {"forecast": "taylor", "order": 2},
            {"front_blocks": 2},
            {"residual_dtype": torch.bfloat16},
            {"schedule": "1" * 10},
        ):
            cache_dit.enable_cache(model, inner="eager", language="en", **options)
            found = generate(plan, model)
            assert torch.equal(found[0], plain[0])
            assert same(generate(plan, model), found)
            if options == {"schedule": "1" * 10}:
                assert same(found, plain)
            cache_dit.disable_cache(model)
    assert same(generate(plan, model), plain)
