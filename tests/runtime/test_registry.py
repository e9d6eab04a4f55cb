"""Which session belongs to which model."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from cache_dit.options import resolve_options
from cache_dit.runtime import registry
from cache_dit.runtime.session import Session


def session() -> Session:
    return Session(resolve_options({}), "made", owns_calls=True)


class Holder:
    """Where an integration keeps a session."""


def test_a_models_name_is_its_class_and_id() -> None:
    model = nn.Linear(2, 2)
    assert registry.model_name(model) == f"Linear_{id(model)}"


def test_a_module_has_the_session_it_was_given_last_as_long_as_it_lives() -> None:
    model, first, second = nn.Linear(2, 2), session(), session()
    assert registry.session_of_module(model) is None and registry.sessions_of(model) == []
    registry.register_module(model, first)
    registry.register_module(model, second)
    assert registry.session_of_module(model) is second and registry.sessions_of(model) == [second]
    assert second in registry.all_sessions() and first not in registry.all_sessions()
    assert registry.session_of_module(nn.Linear(2, 2)) is None
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and second not in registry.all_sessions()


def test_a_holder_keeps_its_session_known() -> None:
    holder, held = Holder(), session()
    registry.register_holder(holder, held)
    assert held in registry.all_sessions()
    del holder
    gc.collect()
    assert held not in registry.all_sessions()


def test_a_parameter_has_a_session_for_each_set_of_options() -> None:
    model = nn.Linear(2, 2)
    first, second = resolve_options({}), resolve_options({})
    made = registry.session_of_parameter(model.bias, first)
    assert made.options is first and not made.owns_calls and made.name == f"Module_{id(model.bias)}"
    # by identity: the backend keeps one object for equal options
    other = registry.session_of_parameter(model.bias, second)
    assert other is not made and other.options is second
    assert registry.session_of_parameter(model.bias, first) is made
    assert registry.session_of_parameter(model.weight, first) is not made
    known = registry.all_sessions()
    assert made in known and other in known


def test_a_module_has_the_sessions_of_its_parameters_each_once_and_they_get_its_name() -> None:
    model, options = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), resolve_options({})
    made = [registry.session_of_parameter(model[i].weight, options) for i in (1, 0)]
    also = registry.session_of_parameter(model[0].weight, resolve_options({}))
    # the same session under two parameters is one
    registry._of_parameter[model[1].bias] = [made[0]]
    assert registry.sessions_of(model) == [made[1], also, made[0]]
    assert {each.name for each in (*made, also)} == {registry.model_name(model)}
    assert registry.sessions_of(nn.Linear(2, 2)) == []
    # what `enable_cache` made stands before them
    own = session()
    registry.register_module(model, own)
    assert registry.sessions_of(model) == [own]
    parameters = [weakref.ref(each) for each in model.parameters()]
    del model
    gc.collect()
    assert all(each() is None for each in parameters)
    assert not {id(each) for each in (*made, also, own)} & {id(each) for each in registry.all_sessions()}


def test_sessions_are_counted_while_other_threads_make_some() -> None:
    options, stop, errors = resolve_options({}), threading.Event(), list[Exception]()

    def make() -> None:
        kept = []
        while not stop.is_set():
            kept.append((nn.Linear(1, 1), Holder()))
            registry.register_module(kept[-1][0], session())
            registry.register_holder(kept[-1][1], session())
            registry.session_of_parameter(kept[-1][0].bias, options)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(100):
            registry.all_sessions()
    except Exception as error:
        errors.append(error)
    stop.set()
    thread.join()
    assert errors == []


def test_one_session_for_a_parameter_that_several_threads_meet_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them waits in the middle for the others to come."""
    weight, options, both = torch.nn.Parameter(torch.zeros(1)), resolve_options({}), threading.Barrier(2)

    def slow(*args: Any, **kwargs: Any) -> Session:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return Session(*args, **kwargs)

    monkeypatch.setattr(registry, "Session", slow)
    found: list[Session] = []
    threads = [threading.Thread(target=lambda: found.append(registry.session_of_parameter(weight, options))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] is found[1]
