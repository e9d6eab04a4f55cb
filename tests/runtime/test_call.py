"""What stands in the compile slot: where it finds the timestep, how it goes in and out, whom it joins, what it compiles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.backend import owned_backend
from cache_dit.options import resolve_options
from cache_dit.runtime import call as module_of_calls
from cache_dit.runtime.call import CachedCall
from cache_dit.runtime.session import Session, active_session
from cache_dit.runtime.tracing import Capture

from .. import models

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}


# a function that runs no graph is one that was not compiled
pytestmark = pytest.mark.filterwarnings("ignore::cache_dit.messages.CacheDitWarning")


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> None:
    pass


def made(module: nn.Module, function: Callable[..., Any] | None = None, **options: Any) -> CachedCall:
    resolved = resolve_options({**EXACT, **options})
    return CachedCall(module, Session(resolved, "made", owns_calls=True), owned_backend(resolved.program()), function)


# The timestep.


class Several(nn.Module):
    def forward(self, x: Tensor, t: Tensor | None = None, *, timestep: Tensor | None = None, **more: Any) -> list[Any]:
        return [x, t, timestep]


class Positional(nn.Module):
    def forward(self, sigma: Tensor, /, x: Tensor, *args: Any) -> None:
        pass


class Keyword(nn.Module):
    def forward(self, x: Tensor, *, sigma: Tensor) -> None:
        pass


class Unreadable(nn.Module):
    forward = dict  # type: ignore[assignment]


def test_arguments_that_may_be_the_timestep_have_their_places() -> None:
    places = module_of_calls._time_arguments
    assert places(Several()) == [("timestep", None), ("t", 1)]
    assert places(Positional()) == [("sigma", 0)]
    assert places(Keyword()) == [("sigma", None)]
    assert places(models.seeded(models.TinyDiT)) == [("t", 1)]
    assert places(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_forward_without_a_signature_has_no_timestep(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def no_signature(function: object) -> None:
        raise error

    monkeypatch.setattr(module_of_calls.inspect, "signature", no_signature)
    assert module_of_calls._time_arguments(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("args", "kwargs", "time"),
    [
        ((7.0, 0.5), {}, 0.5),
        ((7.0,), {"t": torch.tensor(0.25)}, 0.25),
        # the better name first, and what is None is not given
        ((7.0, 0.5), {"timestep": 0.125}, 0.125),
        ((7.0, 0.5), {"timestep": None}, 0.5),
        ((7.0, None), {}, None),
        ((7.0,), {}, None),
        ((), {}, None),
    ],
)
def test_the_timestep_of_a_call_is_read_by_name_or_place(
    args: tuple[Any, ...], kwargs: dict[str, Any], time: float | None
) -> None:
    found: list[float | None] = []
    module = Several()
    call = made(module, lambda *args, **kwargs: found.append(call.session.call_time and call.session.call_time()))
    call._compiled = call._function
    with torch.no_grad():
        call(*args, **kwargs)
    assert found == [time]
    # for no longer than the call
    assert call.session.call_time is None and call._time() is None and call._arguments == ((), {})


# The slot.


def test_the_slot_is_put_back_as_it_was_unless_another_took_it() -> None:
    module = models.seeded(models.TinyDiT)
    call = made(module)
    call.install()
    assert vars(module)["_compiled_call_impl"] is call
    call.remove()
    assert "_compiled_call_impl" not in vars(module)
    theirs, others = object(), object()
    for value in (theirs, None):
        module._compiled_call_impl = value
        call.install()
        call.remove()
        assert vars(module)["_compiled_call_impl"] is value
    call.install()
    module._compiled_call_impl = others
    call.remove()
    assert module._compiled_call_impl is others


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda call: pickle.loads(pickle.dumps(call))])
def test_a_copy_of_it_is_nothing(duplicate: Callable[[Any], Any]) -> None:
    assert duplicate(made(models.seeded(models.TinyDiT))) is None


def test_what_it_calls_is_the_module_with_its_hooks_or_the_part_that_is_named() -> None:
    module, heard = models.seeded(models.TinyDiT), []
    module.register_forward_pre_hook(lambda module, args: heard.append(len(args)))
    with torch.no_grad():
        made(module)(*models.example())
        assert heard == [2]
        assert torch.equal(made(module, module.forward)(*models.example()), module.forward(*models.example()))
    assert heard == [2]


# What is known of the model before it is called.


@pytest.mark.parametrize(
    ("front", "back", "helps"), [(1, 0, True), (3, 0, True), (2, 1, True), (4, 0, False), (3, 1, False), (2, 2, False)]
)
def test_block_by_block_may_help_where_a_block_is_left_to_skip(front: int, back: int, helps: bool) -> None:
    session = made(models.seeded(models.TinyDiT), front_blocks=front, back_blocks=back).session
    assert session.tracing.blocks_may_help is helps and session.tracing.main_list == "blocks"


@pytest.mark.parametrize(
    ("by_hooks", "front", "way", "left"),
    [
        (True, 1, Capture.DEFAULT, Capture.BLOCKS),
        (False, 1, Capture.DEFAULT, Capture.DEFAULT),
        # nothing is left to cache, whichever way is tried
        (True, 4, Capture.DEFAULT, Capture.MORE),
        (True, 1, Capture.IN_VAIN, Capture.IN_VAIN),
    ],
)
def test_a_model_whose_parts_are_loaded_by_hooks_is_cached_block_by_block_from_the_first_call(
    by_hooks: bool, front: int, way: Capture, left: Capture
) -> None:
    module = models.seeded(models.TinyDiT)
    if by_hooks:
        module.blocks[1]._hf_hook = SimpleNamespace(offload=True)
    call = made(module, front_blocks=front)
    call.session.tracing.capture = call._capture = way
    call.install()
    taken = "_compiled_call_impl"
    with torch.no_grad():
        call(*models.example())
        assert call.session.tracing.capture is call._capture is left
        assert [taken in vars(block) for block in module.blocks] == [left is Capture.BLOCKS and i > 0 for i in range(4)]
    call.remove()
    assert not any(taken in vars(part) for part in module.modules())


@pytest.mark.parametrize(
    ("parallel", "spread", "hooks", "front", "kind", "way"),
    [
        (False, True, True, 1, None, Capture.DEFAULT),
        (True, False, False, 1, "Tensor", Capture.DEFAULT),
        (True, True, False, 1, "DTensor", Capture.DEFAULT),
        (True, True, True, 1, "DTensor", Capture.BLOCKS),
        (True, True, True, 4, "DTensor", Capture.DEFAULT),
    ],
)
def test_ranks_are_joined_once_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, parallel: bool, spread: bool, hooks: bool, front: int, kind: str | None, way: Capture
) -> None:
    module = models.seeded(models.TinyDiT)
    monkeypatch.setattr(module_of_calls, "is_parallel", lambda: parallel)
    monkeypatch.setattr(module_of_calls, "tensor_ranks", lambda given: [0, 1] if spread else [])
    monkeypatch.setattr(module_of_calls, "gathers_by_hooks", lambda given: hooks)
    monkeypatch.setattr(module_of_calls, "find_members", lambda given, option: [given, option])
    joined: list[Any] = []
    call = made(module, front_blocks=front, group="world")

    def join(members: list[Any], kind: str) -> None:
        joined.append((members, kind))
        call.session.ranks = SimpleNamespace(members=members)  # type: ignore[assignment]

    monkeypatch.setattr(call.session, "join", join)
    for _ in range(2):
        call.join_ranks()
    assert joined == ([] if kind is None else [([module, "world"], kind)])
    assert call.session.tracing.capture is call._capture is way


@pytest.mark.parametrize("way", [Capture.DEFAULT, Capture.MORE, Capture.IN_VAIN])
def test_more_is_captured_only_where_that_is_the_way(monkeypatch: pytest.MonkeyPatch, way: Capture) -> None:
    asked: list[bool] = []

    def traced_with(compiled: Callable[..., Any], *, more: bool, hooks: bool) -> Callable[..., Any]:
        asked.append(more)
        return compiled

    backends: list[Any] = []
    compile_ = torch.compile

    def compiles(function: Callable[..., Any], **given: Any) -> Any:
        backends.append(given["backend"])
        return compile_(function, **given)

    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(module_of_calls, "traced_with", traced_with)
    call = made(models.seeded(models.TinyDiT))
    call.session.tracing.capture = call._capture = way
    with torch.no_grad():
        call(*models.example())
    # by another backend, since graphs are shared by those of one
    assert asked == [each.capture for each in backends] == [way is Capture.MORE]


# Calls.


def test_ranks_are_looked_for_before_the_first_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call, joined = made(models.seeded(models.TinyDiT)), list[bool]()
    monkeypatch.setattr(call, "join_ranks", lambda: joined.append(call._compiled is None))
    with torch.no_grad():
        for _ in range(3):
            call(*models.example())
    assert joined == [True]


def test_where_torch_finds_no_place_to_write_to_each_call_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it finds one, or has broken off in the middle of an import, which it cannot do twice."""
    faults: list[Exception | None] = [OSError("full"), OSError("full"), None]
    compile_ = torch.compile

    def compiles(*args: Any, **kwargs: Any) -> Any:
        fault = faults.pop(0)
        if fault is not None:
            raise fault
        return compile_(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiles)
    module = models.seeded(models.TinyDiT)
    call = made(module)
    told = []
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(call(*models.example()), module.forward(*models.example()))
            told.append(call.session.tracing.no_folder)
    assert told == ["OSError: full", "OSError: full", "", ""] and faults == []
    assert call.session.counters.refused["no_folder"] == 2 and call.session.counters.compiles == 1
    faults[:] = [OSError("full"), AssertionError("half imported")]
    call = made(module)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(call(*models.example()), module.forward(*models.example()))
    assert faults == [] and call.session.counters.refused == {"no_folder": 3}
    faults[:] = [AssertionError("theirs")]
    with torch.no_grad(), pytest.raises(AssertionError, match="theirs"):
        made(module)(*models.example())


def test_a_call_within_a_call_of_the_same_model_is_a_part_of_it() -> None:
    module = models.seeded(models.TinyDiT)
    inner, under_way = list[Tensor](), list[bool]()

    def function(x: Tensor, t: Tensor) -> Tensor:
        if not inner:
            inner.append(x)
            inner.append(call(x, t))
            under_way.append(call.session.is_under_way)
        return x + t

    call = made(module, function)
    call._compiled = function
    with torch.no_grad():
        assert torch.equal(call(torch.ones(1), torch.ones(1)), torch.full((1,), 2.0))
    assert len(inner) == 2 and under_way == [True] and call.session.counters.calls == 1
    assert active_session.get() is None and not call.session.is_under_way


def test_the_session_in_force_is_the_one_of_the_model_called_and_the_outer_one_behind_it() -> None:
    seen: list[Session | None] = []
    second = made(models.seeded(models.TinyDiT), lambda: seen.append(active_session.get()))

    def outer() -> None:
        seen.append(active_session.get())
        second()
        seen.append(active_session.get())

    first = made(models.seeded(models.TinyDiT), outer)
    for each in (first, second):
        each._compiled = each._function
    with torch.no_grad():
        first()
    assert seen == [first.session, second.session, first.session] and active_session.get() is None
    assert [each.session.counters.calls for each in (first, second)] == [1, 1]


def test_an_error_ends_the_run_and_comes_out_as_it_is() -> None:
    def fails() -> None:
        raise LookupError("theirs")

    call = made(models.seeded(models.TinyDiT), fails)
    call._compiled = fails
    with torch.no_grad(), pytest.raises(LookupError, match="theirs"):
        call()
    assert call.session.counters.calls == 0 and not call.session.is_under_way and active_session.get() is None


def test_a_failure_of_the_tracer_is_forgiven_only_where_more_was_traced_than_torch_does_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the next way of tracing answers the call."""
    monkeypatch.setattr(module_of_calls, "is_tracing_failure", lambda error: isinstance(error, LookupError))
    for way, error, forgiven in (
        (Capture.MORE, LookupError, True),
        (Capture.MORE, ArithmeticError, False),
        (Capture.DEFAULT, LookupError, False),
    ):
        module = models.seeded(models.TinyDiT)
        call = made(module)
        call.session.tracing.capture = call._capture = way
        call.install()

        def fails(*args: Any, error: type[Exception] = error) -> None:
            raise error

        call._compiled = fails
        with torch.no_grad():
            if forgiven:
                assert torch.equal(module(*models.example()), module.forward(*models.example()))
                assert call._capture is Capture.BLOCKS
            else:
                with pytest.raises(error):
                    module(*models.example())
        call.remove()


def test_a_context_that_is_left_alone_is_not_compiled() -> None:
    module = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(module, **EXACT)
    call = module._compiled_call_impl
    call.session.tracing.leave("alone")
    with torch.no_grad():
        with cache_dit.context(module, "alone"):
            assert torch.equal(module(*models.example()), module.forward(*models.example()))
        assert cache_dit.get_stats(module).compiles == 0
        with cache_dit.context(module, "other"):
            module(*models.example())
    assert cache_dit.get_stats(module).compiles == 1
