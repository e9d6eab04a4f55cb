"""No step waits for the device: what was measured is copied to the host behind it, what programs need is sent, with fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import cache_dit
from cache_dit.runtime import transfers
from cache_dit.runtime.correction import _relative_error
from tests import models
from tests.runtime.test_session_alone import Driven, Graph

CUDA = torch.device("cuda", 0)
Tensors = Sequence[Any]
# What brings numbers to the host at once.
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__format__),
}
GET_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


class Device:
    """Notes, in order, what is asked of the device that the stand-ins below pretend to lie on."""

    def __init__(self) -> None:
        self.log: list[str] = []


class OnDevice(Tensor):
    """Says that it lies on a GPU, and may not be read on the host. So is whatever is computed from it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise AssertionError(f"{func.__name__}: the host waits for the device")
        if func == GET_DEVICE:
            return CUDA
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda each: each.as_subclass(OnDevice), result)


class Pinned(Tensor):
    """Memory of the host: notes what is copied to it and from it."""

    device_of: Device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        log, given = cls.device_of.log, kwargs or {}
        if func is Tensor.to:
            log.append(f"send, non_blocking={given['non_blocking']}")
            return args[0].as_subclass(Tensor).clone().as_subclass(OnDevice)
        if func is Tensor.copy_ and isinstance(args[1], OnDevice):
            log.append(f"fetch, non_blocking={given['non_blocking']}")
        if func is Tensor.tolist:
            log.append("read")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, where: torch.device) -> None:
            assert where == CUDA
            self.recorded = False

        def record(self) -> None:
            device.log.append("record")
            self.recorded = True

        def synchronize(self) -> None:
            assert self.recorded
            device.log.append("wait")

    Pinned.device_of = device
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(transfers, "_pinned", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype).as_subclass(Pinned))
    return device


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_read_begins_behind_what_is_queued_and_waits_for_itself_alone(device: Device) -> None:
    read = transfers.begin_read(torch.tensor([1.0, 2.5]).as_subclass(OnDevice))
    assert read is not None
    assert device.log == ["fetch, non_blocking=True", "record"]
    assert read() == [1.0, 2.5]
    assert device.log[2:] == ["wait", "read"]


def test_what_lies_on_the_host_is_read_where_it_is(device: Device) -> None:
    assert transfers.begin_read(torch.tensor([1.0])) is None
    assert device.log == []


@pytest.mark.parametrize("content", [True, 7, [1.5, -0.5], ()])
def test_numbers_are_sent_without_waiting(device: Device, content: Any) -> None:
    dtype = torch.bool if content is True else torch.int64 if content == 7 else torch.float32
    sent = transfers.send(content, dtype, CUDA)
    assert isinstance(sent, OnDevice) and device.log == ["send, non_blocking=True"]
    assert torch.equal(sent.as_subclass(Tensor), torch.tensor(content, dtype=dtype))
    here = transfers.send(content, dtype, torch.device("cpu"))
    assert torch.equal(here, torch.tensor(content, dtype=dtype)) and len(device.log) == 1


def test_the_bound_of_a_correction_is_worked_out_on_the_device(device: Device) -> None:
    measured = torch.tensor([0.0, 4.0, 0.25, 0.0, 0.0])
    error = _relative_error(measured.as_subclass(OnDevice), 2, (1.0,))
    assert isinstance(error, OnDevice) and device.log == ["send, non_blocking=True"]
    assert torch.equal(error.as_subclass(Tensor), _relative_error(measured, 2, (1.0,)))


class DeviceGraph(Graph):
    """Its statistics, and how far its front moved, lie on the device."""

    def _run(self, flat: Sequence[Tensor], computes: bool) -> list[Any]:
        result, *measured = super()._run(flat, computes)
        return [result, *(each.as_subclass(OnDevice) for each in measured)]


TIMES = tuple(1.0 - step / 20 for step in range(16))
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "fixed", "forecast": "reuse"},
    {"strategy": "fixed", "forecast": "auto"},
    {"strategy": "dynamic", "forecast": "lagrange"},
    {"strategy": "adaptive", "forecast": "auto", "tolerance": 0.5},
    {"strategy": "adaptive", "forecast": "lagrange", "target_speedup": 2.0},
]


@pytest.mark.parametrize("options", STRATEGIES)
def test_no_step_reads_what_lies_on_the_device(device: Device, options: dict[str, Any]) -> None:
    front = options["strategy"] == "adaptive"
    found = []
    for kind in (Graph, DeviceGraph):
        graph = kind(history=1 if options["forecast"] == "reuse" else 2, front=front)
        graph.changes = [(0.1, 1.0)] * len(TIMES)
        driven = Driven(graph, **{**options, "schedule": None, "correction": False})
        if front:
            driven.session.new_run(len(TIMES), [*TIMES, 0.0], None, None)
        found.append((driven.hits(*TIMES), driven.session.statistics().mean_forecast_error))
    assert found[0] == found[1] and "1" in found[0][0], "the same decisions, of the same numbers"
    fetched, waited = device.log.count("fetch, non_blocking=True"), device.log.count("wait")
    assert fetched == device.log.count("record") >= waited == device.log.count("read") > 0
    # each is waited for at the next step: first all that a step has begun, then what the next one needs
    for before, entry in zip(device.log, device.log[1:], strict=False):
        assert (entry == "read") == (before == "wait")
        assert (entry == "record") == (before == "fetch, non_blocking=True")


@pytest.mark.parametrize("options", [{}, *STRATEGIES])
def test_a_whole_model_reads_nothing_but_its_timestep(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None, options: dict[str, Any]
) -> None:
    """Every tensor counts as one on a device, but for the timestep and what was copied to the host."""
    host: list[Tensor] = []
    read: list[str] = []

    def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        host.append(torch.empty(tuple(shape), dtype=dtype))
        return host[-1]

    class Event:
        def __init__(self, where: torch.device) -> None:
            """Of any device."""

        def record(self) -> None:
            """Passes at once."""

        synchronize = record

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any) -> Any:
            if not any(tensor is each for each in host):
                read.append(name)
            return real(tensor, *args)

        return call

    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner="eager", language="en", **options)
    x = models.example()[0]
    sigmas = torch.linspace(1.0, 0.0, 13).tolist()
    with monkeypatch.context() as patched:
        for run in range(2):
            cache_dit.new_run(model, 12, sigmas, "euler", "flow")
            for step, sigma in enumerate(sigmas[:-1]):
                time = torch.full((models.BATCH,), sigma)
                host.append(time)
                if (run, step) == (1, 0):
                    # what is compiled may be looked at; what runs may not
                    patched.setattr(transfers, "queues_copies", lambda device: True)
                    patched.setattr(transfers, "_pinned", pinned)
                    patched.setattr(torch, "Event", Event)
                    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy"):
                        patched.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
                model(x + sigma, time)
        stats = cache_dit.get_stats(model)
    assert read == []
    assert stats.hits > 0 and stats.mean_forecast_error is not None
