"""Faults put in from outside: interrupts between any two lines, transforms of torch, hooks and code that change in mid-run,
global settings that change, tensors that the caller keeps or writes to."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import math
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.call import CachedCall
from cache_dit.runtime.session import active_session

from .. import models
from .generations import EXACT, GREEDY, Plan, cut, enabled, falling, generate, hits_of, prompted, same

PACKAGE = str(Path(cache_dit.__file__).parent)


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def inputs_at(step: int) -> tuple[Tensor, Tensor]:
    x, t = models.example()
    return x + step, t - 0.05 * step


def greedy(build: Callable[[], nn.Module] = models.TinyDiT, **options: Any) -> nn.Module:
    return cache_dit.enable_cache(models.seeded(build), **{**GREEDY, **options})


def call(model: nn.Module, step: int) -> tuple[bool, Tensor]:
    """Whether a call was a hit, and its output; a computed one is as without caching."""
    before = hits_of(model)
    with torch.no_grad():
        output: Tensor = model(*inputs_at(step))
        hit = hits_of(model) > before
        if not hit:
            torch.testing.assert_close(output, model.forward(*inputs_at(step)), rtol=1e-5, atol=1e-6)
    return hit, output


def hits(model: nn.Module, *steps: int) -> list[bool]:
    return [call(model, step)[0] for step in steps]


# Interrupts.


class Interrupt:
    """Raises at the n-th line of the package that runs within it, as a signal does.

    Not at those with ``with``: Python lets no signal come between a block's end and the release of its lock.
    """

    def __init__(self, at: int, *places: str) -> None:
        self._left, self._places = at, tuple(f"{PACKAGE}/{place}" for place in places)
        self.raised = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._calls)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _calls(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._lines if frame.f_code.co_filename.startswith(self._places) else None

    def _lines(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self._left -= 1
            if self._left == 0:
                self.raised = True
                raise KeyboardInterrupt
        return self._lines


@pytest.mark.parametrize("sampler", ["euler", "guided"])
def test_an_interrupt_between_any_two_lines_of_a_call_leaves_nothing_wrong(sampler: str) -> None:
    """The next generation is that of a model never used before, or of one whose last run was cut off there."""
    options = {**EXACT, "warmup_steps": 1}
    plan, other = Plan(10, falling(6), sampler), Plan(50, falling(6), sampler)
    model = enabled(options)
    generate(plan, model)
    interrupted = 0
    for calls in (0, 1, 3):
        allowed = [generate(plan, enabled(options))]
        for made in (calls, calls + 1):
            left = enabled(options)
            cut(other, left, made)
            allowed.append(generate(plan, left))
        for at in range(1 + calls, 1000, 11):
            cut(other, model, calls)
            x, positive, negative = other.parts()
            prompt = negative if sampler == "guided" and calls % 2 else positive
            interrupt = Interrupt(at, "runtime/")
            with torch.no_grad(), interrupt:
                model(x, torch.full((2,), other.times[calls // (2 if sampler == "guided" else 1)]), prompt)
            found = generate(plan, model)
            assert any(same(found, wanted) for wanted in allowed), (calls, at)
            interrupted += interrupt.raised
            # the next run starts where nothing is left of this one
            cache_dit.new_run(model)
            active_session.set(None)
            if not interrupt.raised:
                break
    assert interrupted > 60


def test_a_sign_of_a_call_under_way_that_an_interrupt_left_behind_is_not_believed() -> None:
    model = greedy()
    call(model, 0)
    active_session.set(model._compiled_call_impl.session)
    try:
        assert hits(model, 1, 2) == [True, True]
    finally:
        active_session.set(None)


@pytest.mark.parametrize("act", ["enable", "disable"])
def test_an_interrupt_while_caching_is_turned_on_or_off_leaves_a_model_that_can_be_turned_on_and_off(act: str) -> None:
    plan, options = Plan(10, falling(6)), {**EXACT, "warmup_steps": 1}
    plain, cached = generate(plan, prompted()), generate(plan, enabled(options))
    model = prompted()
    # what lies before are checks of options
    for at in range(1, 2000, 13 if act == "enable" else 3):
        if act == "disable":
            cache_dit.enable_cache(model, **options)
            generate(plan, model)
        interrupt = Interrupt(at, "")
        with interrupt:
            cache_dit.enable_cache(model, **options) if act == "enable" else cache_dit.disable_cache(model)
        on = model._compiled_call_impl is not None
        assert same(generate(plan, model), cached if on else plain), at
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheDitWarning)
            cache_dit.disable_cache(model)
        assert model._compiled_call_impl is None and same(generate(plan, model), plain), at
        if not interrupt.raised:
            break
    else:
        raise AssertionError("it never came to its end")


def test_an_error_while_caching_is_turned_off_does_not_keep_it_on() -> None:
    """A warning that the user made an error comes while the last measurement is read."""
    model = greedy()
    call(model, 0)
    with torch.no_grad():
        model.blocks[2].mlp.bias.fill_(math.nan)
    cache_dit.new_run(model)
    with torch.no_grad():
        model(*inputs_at(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        with pytest.raises(CacheDitWarning):
            cache_dit.disable_cache(model)
    cache_dit.disable_cache(model)
    assert model._compiled_call_impl is None
    assert isinstance(cache_dit.enable_cache(model, **GREEDY)._compiled_call_impl, CachedCall)


def test_a_pipeline_whose_second_denoiser_fails_has_none_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = prompted(), prompted()
    pipeline = SimpleNamespace(components={"transformer": first, "transformer_2": second})
    join = CachedCall.join_ranks

    def fails(self: CachedCall) -> None:
        if self._module is second:
            raise cache_dit.CacheDitError("a rank has not come")
        join(self)

    monkeypatch.setattr(CachedCall, "join_ranks", fails)
    with pytest.raises(cache_dit.CacheDitError, match="has not come"):
        cache_dit.enable_cache(pipeline, **EXACT)
    assert first._compiled_call_impl is second._compiled_call_impl is None
    monkeypatch.undo()
    cache_dit.enable_cache(pipeline, **EXACT)
    assert all(isinstance(each._compiled_call_impl, CachedCall) for each in (first, second))


def test_threads_that_turn_caching_on_and_off_leave_the_slot_as_it_was() -> None:
    """While two others call the model and read its statistics."""
    model, errors, done = greedy(), list[BaseException](), threading.Event()

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def calls() -> None:
        with torch.no_grad():
            for step in range(150):
                model(*inputs_at(step % 15))

    def turns() -> None:
        while not done.is_set():
            cache_dit.disable_cache(model)
            cache_dit.enable_cache(model, **GREEDY)
            cache_dit.explain(model), cache_dit.summary(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        callers = [threading.Thread(target=guarded, args=(calls,)) for _ in range(2)]
        turners = [threading.Thread(target=guarded, args=(turns,)) for _ in range(3)]
        for thread in (*callers, *turners):
            thread.start()
        for thread in callers:
            thread.join()
        done.set()
        for thread in turners:
            thread.join()
        cache_dit.disable_cache(model)
    assert errors == [] and model._compiled_call_impl is None
    cache_dit.enable_cache(model, **GREEDY)
    assert hits(model, 0, 1, 2) == [False, True, True]


@pytest.mark.parametrize("what", ["install", "remove"])
def test_who_asks_while_another_thread_turns_caching_on_or_off_hears_nothing_of_a_compile(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """For a moment the session is in force and the slot is empty, as it is where `model.compile()` took it."""
    model, asking = models.seeded(models.TinyDiT), list[threading.Thread]()
    change = getattr(CachedCall, what)

    def changed(self: CachedCall) -> None:
        if what == "remove":
            change(self)
        asking.append(threading.Thread(target=cache_dit.summary, args=(model,)))
        asking[0].start()
        asking[0].join(0.2)
        if what == "install":
            change(self)

    monkeypatch.setattr(CachedCall, what, changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache_dit.enable_cache(model, **GREEDY)
        cache_dit.disable_cache(model)
        asking[0].join(30)
    assert len(asking) == 1 and not asking[0].is_alive()
    assert [str(each.message) for each in said] == []


# What torch may do with a call beside computing it.


def _vmap(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.vmap(lambda each: model(each, t))(torch.stack([x, x + 1]))


def _jvp(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.stack(torch.func.jvp(lambda each: model(each, t), (x,), (x,)))


def _grad(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.func.grad(lambda each: model(each, t).sum())(x)


def _jit_trace(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.jit.trace(model, (x - 1, t + 0.1), check_trace=False)(x, t)


def _make_fx(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return make_fx(lambda x, t: model(x, t))(x - 1, t + 0.1)(x, t)


def _export(model: Any, x: Tensor, t: Tensor, strict: bool = True) -> Tensor:
    if not isinstance(model, nn.Module):
        return model(x, t)
    return torch.export.export(model, (x - 1, t + 0.1), strict=strict).module()(x, t)


def _flops(model: Any, x: Tensor, t: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        output = model(x, t)
    return torch.cat([output.flatten(), torch.tensor([float(counter.get_total_flops())])])


def _fake(model: Any, x: Tensor, t: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(x), mode.from_tensor(t)).shape
    return torch.zeros(shape)


def _fake_outside_of_the_mode(model: Any, x: Tensor, t: Tensor) -> Tensor:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return torch.zeros(model(mode.from_tensor(x), mode.from_tensor(t)).shape)


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "vmap": _vmap,
    "jvp": _jvp,
    "grad": _grad,
    "jit.trace": _jit_trace,
    "make_fx": _make_fx,
    "export": _export,
    "export, not strict": functools.partial(_export, strict=False),
    "flop counter": _flops,
    "fake": _fake,
    "fake tensors": _fake_outside_of_the_mode,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_or_a_tracing_of_torch_has_the_plain_model(name: str) -> None:
    """In mid-run, where a step is due to be skipped: right, said once, and the run after it is right."""
    transform, model = TRANSFORMS[name], greedy()
    hits(model, 0, 1, 2)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        for step in (3, 4):
            wanted = transform(model.forward, *inputs_at(step))
            torch.testing.assert_close(transform(model, *inputs_at(step)), wanted, rtol=1e-5, atol=1e-6)
    ours = [each for each in said if each.category is CacheDitWarning]
    count = cache_dit.get_stats(model).refused.get("transform", 0)
    # an export is of the model as it is, which needs no telling; torch.jit.trace calls more than once
    assert len(ours) == (0 if name.startswith("export") else 1)
    assert count == 0 if name.startswith("export") else count >= 2
    assert hits(model, 0, 1, 2) == [False, True, True]


def test_a_model_moved_to_no_device_runs_without_a_cache() -> None:
    model = greedy()
    hits(model, 0, 1)
    model.to("meta")
    with pytest.warns(CacheDitWarning, match="meta") as said, torch.no_grad():
        shapes = [model(*(value.to("meta") for value in inputs_at(step))).shape for step in (2, 3)]
    assert shapes == [inputs_at(0)[0].shape] * 2
    assert len(said) == 1


def test_functional_call_in_mid_run_computes_with_what_it_is_given() -> None:
    model, other = greedy(), models.seeded(models.TinyDiT)
    hits(model, 0, 1)
    weights = {name: value + 0.1 for name, value in model.state_dict().items()}
    other.load_state_dict(weights)
    with torch.no_grad():
        for step in (2, 3):
            weights = {name: value.clone() for name, value in weights.items()}
            found = torch.func.functional_call(model, weights, inputs_at(step))
            torch.testing.assert_close(found, other(*inputs_at(step)), rtol=1e-5, atol=1e-6)
    assert hits(model, 4, 5) == [False, True]


# Code that changes in mid-run.


def _twice(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 2


def _ones(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return arguments[0], torch.ones_like(arguments[1])


@pytest.mark.parametrize("place", ["", "head", "blocks.0", "blocks.2", "blocks.3.mlp"])
def test_a_hook_planted_in_mid_run_is_heard_and_one_taken_away_is_not(place: str) -> None:
    model = greedy()
    reference = models.seeded(models.TinyDiT)
    hits(model, 0, 1)
    # with a hook on the model itself ``forward`` alone is not the model
    planted = [each.get_submodule(place).register_forward_hook(_twice) for each in (model, reference)]

    def compared(step: int) -> None:
        cache_dit.new_run(model)
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs_at(step)), reference(*inputs_at(step)), rtol=1e-5, atol=1e-6)

    compared(2)
    if place.startswith("blocks.") and place.count(".") == 1:
        planted += [each.get_submodule(place).register_forward_pre_hook(_ones) for each in (model, reference)]
        compared(3)
    for handle in planted:
        handle.remove()
    compared(4)


def _delete(blocks: nn.ModuleList) -> None:
    del blocks[-1]


def _append(blocks: nn.ModuleList) -> None:
    blocks.append(models.seeded(models.Block))


def _swap(blocks: nn.ModuleList) -> None:
    blocks[1], blocks[2] = blocks[2], blocks[1]


def _patch(blocks: nn.ModuleList) -> None:
    before = blocks[2].forward
    blocks[2].forward = lambda x, temb: before(x, temb) * 1.5


def _hooked(blocks: nn.ModuleList) -> None:
    blocks[2].register_forward_hook(_twice)


class Labelled(torch.Tensor):
    """A tensor by another name."""


def _subclass(blocks: nn.ModuleList) -> None:
    layer = blocks[2].mlp
    layer.weight = nn.Parameter((layer.weight.detach() + 0.1).as_subclass(Labelled))


@pytest.mark.parametrize("change", [_delete, _append, _swap, _patch, _hooked, _subclass])
def test_blocks_that_change_in_mid_run_make_the_next_step_compute(change: Callable[[nn.ModuleList], None]) -> None:
    model = greedy()
    assert hits(model, 0, 1) == [False, True]
    change(model.blocks)
    assert hits(model, 2, 3) == [False, True]


def test_a_model_whose_forward_is_replaced_in_mid_run_runs_the_new_one() -> None:
    model = greedy()
    hits(model, 0, 1)
    before = model.forward
    model.forward = lambda x, t: before(x, t) + 1
    call(model, 2)
    cache_dit.new_run(model)
    assert not call(model, 3)[0]


def test_weights_may_be_exchanged_between_runs() -> None:
    """As `module.to` exchanges those of quantised models: it refuses tensors that someone refers to weakly."""
    model = greedy()
    assert hits(model, 0, 1) == [False, True]
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="swap"):
            model.to(torch.float64)
        cache_dit.new_run(model)
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    with torch.no_grad():
        for step in range(3):
            inputs = [value.double() for value in inputs_at(step)]
            found, wanted = model(*inputs), model.forward(*inputs)
            assert found.dtype == torch.float64
            assert (step > 0) or torch.allclose(found, wanted)
    assert hits_of(model) == 3


# Settings that change in mid-run.


class Function(TorchFunctionMode):
    """Passes everything on."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "a device of torch's own": lambda: torch.device("meta"),
    "a function mode": Function,
    "eager by stance": lambda: torch.compiler.set_stance("force_eager"),
    "dynamo reset": lambda: nullcontext(torch._dynamo.reset()),
    "autocast": lambda: torch.autocast("cpu"),
}


@pytest.mark.filterwarnings("ignore::cache_dit.messages.CacheDitWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_in_mid_run_makes_the_step_compute(setting: str) -> None:
    model = greedy()
    hits(model, 0, 1)
    before = hits_of(model)
    inputs = inputs_at(2)
    with torch.no_grad(), SETTINGS[setting]():
        found, wanted = model(*inputs), model.forward(*inputs)
    assert hits_of(model) == before and found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # another graph stored that step; Dynamo's memory alone is no setting
    assert hits(model, 3, 4) == [setting == "dynamo reset", True]


def _default_dtype(on: bool) -> None:
    torch.set_default_dtype(torch.float64 if on else torch.float32)


@pytest.mark.parametrize("change", [_default_dtype, torch.use_deterministic_algorithms])
def test_a_global_switch_that_is_thrown_in_mid_run_makes_the_step_compute(change: Callable[[bool], None]) -> None:
    model = greedy()
    hits(model, 0, 1)
    change(True)
    try:
        assert hits(model, 2, 3) == [False, True]
    finally:
        change(False)
    assert hits(model, 4, 5) == [False, True]


# Tensors that the caller keeps, shares or writes to.


class Headless(models.TinyDiT):
    """What the last block gives is the output: of the kind that a buffer has."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h, temb = self.embed(x), self.time(t)
        base = h
        for block in self.blocks:
            h = block(h, temb)
        return h, base, h[:, :2], temb, x


@pytest.mark.parametrize("lowering", ["specialize", "cond", "pieces"])
@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("forecast", ["reuse", "lagrange"])
def test_outputs_are_the_callers_own(lowering: str, front: int, forecast: str) -> None:
    """Kept over steps they stay as they are, written to they change nothing that follows, as the input does."""
    options = {"lowering": lowering, "front_blocks": front, "forecast": forecast}
    model, left_alone = greedy(Headless, **options), greedy(Headless, **options)
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for step in range(6):
            inputs = inputs_at(step)
            found, wanted = model(*inputs), left_alone(*inputs_at(step))
            assert same(found, wanted) and torch.equal(inputs[0], inputs_at(step)[0])
            plain = model.forward(*inputs)
            for i, each in enumerate(found):
                shares = [other.untyped_storage().data_ptr() == each.untyped_storage().data_ptr() for other in found]
                assert shares == [o.untyped_storage().data_ptr() == plain[i].untyped_storage().data_ptr() for o in plain]
            kept += [(each, each.clone()) for each in wanted]
            for each in found:
                each.fill_(77.0)
    assert hits_of(model) == 5
    assert all(torch.equal(each, copy) for each, copy in kept)


def test_inputs_of_any_layout_and_inputs_that_are_one_tensor_are_right() -> None:
    class Guided(models.TinyDiT):
        def forward(self, x: Tensor, t: Tensor, guide: Tensor) -> Tensor:
            return super().forward(x + guide, t)

    model = greedy(Guided)
    x, t = models.example()
    strided = torch.cat([x, x], 2)[:, :, ::2]
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    given = [(x, x), (x, x + 1), (strided, x), (transposed, x), (x[:1].expand_as(x), x), (x, x[:1])]
    with torch.no_grad():
        for step, (each, guide) in enumerate(given):
            before = hits_of(model)
            found = model(each, t - 0.05 * step, guide)
            assert hits_of(model) == before
            torch.testing.assert_close(found, model.forward(each, t - 0.05 * step, guide), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::cache_dit.messages.CacheDitWarning")
def test_nothing_at_all_is_right_too() -> None:
    """A batch of none, a picture of no tokens."""
    model = greedy()
    x, t = models.example()
    with torch.no_grad():
        assert [model(x[:0], t[:0] - step).shape for step in range(3)] == [(0, *x.shape[1:])] * 3
        assert [model(x[:, :0], t - step).shape for step in range(3)] == [(len(x), 0, x.shape[2])] * 3
    cache_dit.new_run(model)
    assert hits(model, 0, 1) == [False, True]


# Numbers of other kinds.


class Stack(nn.Module):
    """Blocks alone, which add a number of times what a layer makes of the real part."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Adds(scale, dtype) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


class _Adds(nn.Module):
    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.mlp, self.scale, self.dtype = nn.Linear(models.WIDTH, models.WIDTH), scale, dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        real = x.real if x.is_complex() else x
        return x + (torch.tanh(self.mlp(real.float())) * self.scale * t[:, None, None]).to(self.dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.complex64, 1.0), (torch.int64, 10.0), (torch.float32, 0.0), (torch.float32, 1e-40), (torch.float64, 1.0)],
)
def test_a_residual_of_any_kind_is_what_was_added(dtype: torch.dtype, scale: float) -> None:
    """Nothing at all, below the smallest normal number: a skipped step adds what the last one did. Complex and whole
    numbers have no residual: what left the blocks is kept as it is, which `explain` says."""
    model, plain = greedy(lambda: Stack(scale, dtype)), models.seeded(lambda: Stack(scale, dtype))
    x, t = torch.zeros(2, 6, models.WIDTH, dtype=dtype), torch.ones(2)
    with torch.no_grad():
        first = plain(x, t)
        added = first - x
        assert torch.equal(model(x, t), first)
        for step in (1, 2, 3):
            block = plain.blocks[0](x + step, t - 0.05 * step)
            found = model(x + step, t - 0.05 * step)
            # the first block always computes
            wanted = block + (first - plain.blocks[0](x, t)) if dtype.is_floating_point else first
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert hits_of(model) == 3 and bool((added != 0).any()) == (scale != 0.0)
    assert ("cached whole" in str(cache_dit.explain(model))) == (not dtype.is_floating_point)


@pytest.mark.parametrize(
    "times",
    [
        [1e30 * (8 - i) for i in range(6)],
        [1e-40 * (8 - i) for i in range(6)],
        [-0.1 * i for i in range(6)],
        [1.0, 1.0, 0.9, 0.9, 0.8, 0.8],
        [0.5] * 6,
        [1.0, 0.8, 0.9, 0.7, 0.8, 0.6],
        [1.0, 0.9, math.nan, 0.7, 0.6, 0.5],
        [1.0, 0.9, math.inf, 0.7, -math.inf, 0.5],
    ],
)
@pytest.mark.parametrize("options", [{}, {"forecast": "lagrange"}, {"strategy": "adaptive", "schedule": None}])
def test_timesteps_of_any_kind_give_finite_pictures(times: list[float], options: dict[str, Any]) -> None:
    model = greedy(**options)
    x, t = models.example()
    with torch.no_grad():
        for step, time in enumerate(times):
            before = hits_of(model)
            found, wanted = model(x + step, torch.full_like(t, time)), model.forward(x + step, torch.full_like(t, time))
            if hits_of(model) == before:
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert bool(found.isfinite().all()) == bool(wanted.isfinite().all())


def test_a_program_that_fails_behind_its_write_to_the_buffer_ends_the_run() -> None:
    """The residual is overwritten already, the step has not come to its end."""
    model = greedy()
    assert hits(model, 0, 1) == [False, True]
    (graph,) = model._compiled_call_impl.session.tracing.cached
    programs = graph.programs
    real = programs.compute

    def fails(arguments: Any) -> Any:
        real(arguments)
        raise RuntimeError("injected")

    programs.compute = fails
    cache_dit.new_run(model)
    with pytest.raises(RuntimeError, match="injected"):
        call(model, 2)
    programs.compute = real
    assert hits(model, 3, 4) == [False, True]


def test_a_host_clock_that_goes_backwards_is_not_taken_for_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(10_000, 0, -1))
    monkeypatch.setattr("cache_dit.runtime.timing.perf_counter", lambda: float(next(readings)))
    model = greedy()
    hits(model, 0, 1, 2, 3)
    stats = cache_dit.get_stats(model)
    assert stats.hits == 3
    assert stats.expected_speedup is None or stats.expected_speedup > 0


def test_memory_that_runs_out_while_statistics_are_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = greedy()
    hits(model, 0, 1)

    def fails(*_: Any) -> Any:
        raise MemoryError

    for name in ("statistics", "notes"):
        monkeypatch.setattr(f"cache_dit.runtime.session.Session.{name}", fails)
    for read in (cache_dit.explain, cache_dit.summary, cache_dit.get_stats):
        with pytest.raises(MemoryError):
            read(model)
    monkeypatch.undo()
    assert hits(model, 2) == [True]


def test_a_model_that_turns_its_own_caching_on_in_mid_call() -> None:
    class Starter(models.TinyDiT):
        started = False

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not self.started:
                self.started = True
                cache_dit.enable_cache(self, **GREEDY)
            return super().forward(x, t)

    model = models.seeded(Starter)
    with torch.no_grad():
        first = model(*inputs_at(0))
        torch.testing.assert_close(first, models.TinyDiT.forward(model, *inputs_at(0)))
    assert hits(model, 1, 2, 3) == [False, True, True]


def test_a_model_that_is_gone_in_mid_run_is_not_counted() -> None:
    model = greedy()
    hits(model, 0, 1)
    copied = copy.deepcopy(model)
    gc.collect()
    active = cache_dit.get_global_stats()["active_models"]
    del model
    gc.collect()
    assert cache_dit.get_global_stats()["active_models"] == active - 1
    assert copied._compiled_call_impl is None
