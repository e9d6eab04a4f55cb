"""Residuals in host memory, with stand-ins for a GPU's streams and events that note the order of what is asked of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache_dit.passes import from_host as module
from cache_dit.passes.insert_cache_branch import CacheInputs, ResidualBuffer
from torch import Tensor, fx

import cache_dit
from cache_dit.runtime import offload
from cache_dit.runtime.buffers import allocate
from tests import models

# the package gives the function of that name
BRANCHES = importlib.import_module("cache_dit.passes.insert_cache_branch")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OPTIONS: dict[str, Any] = {"noise_scale": 0.0, "language": "en", "forecast": "lagrange"}


class Gpu:
    """``log``: what was asked, in order, each with the stream it was asked of."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "main"

    def events(self) -> int:
        return sum(entry.endswith("record") for entry in self.log)

    def stream(self, name: str) -> Any:
        gpu = self

        class Stream:
            def record_event(self) -> Any:
                assert gpu.current == name, "asked for within its context alone"
                gpu.log.append(f"{name}: record")
                return Event(gpu.events())

            def wait_event(self, event: Event) -> None:
                gpu.log.append(f"{name}: wait {event.number}")

            @contextmanager
            def entered(self) -> Iterator[None]:
                before, gpu.current = gpu.current, name
                yield
                gpu.current = before

        class Event:
            def __init__(self, number: int) -> None:
                self.number = number

            def synchronize(self) -> None:
                gpu.log.append(f"host: wait {self.number}")

        return Stream()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Gpu:
    """Everything lies on the CPU, and what is kept there counts as offloaded from somewhere else."""
    gpu = Gpu()
    main = gpu.stream("main")
    real = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("non_blocking"):
            assert kwargs["copy"]
            gpu.log.append(f"{gpu.current}: copy")
        return real(tensor, *args, **kwargs)

    for place in (BRANCHES, offload):
        monkeypatch.setattr(place, "is_offloaded", lambda kept, device: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: gpu.stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream.entered())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: gpu.log.append("main: keeps"))
    monkeypatch.setattr(Tensor, "to", to)
    return gpu


def run_of(model: Any, steps: int = 8) -> list[Tensor]:
    x = models.example()[0]
    sigmas = torch.linspace(1.0, 0.0, steps + 1).tolist()
    cache_dit.new_run(model, steps, sigmas, "euler", "flow")
    with torch.no_grad():
        return [model(x + sigma, torch.full((models.BATCH,), sigma)) for sigma in sigmas[:-1]]


def plainly(**options: Any) -> list[Tensor]:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner="eager", **{**OPTIONS, **options})
    results = run_of(model)
    assert cache_dit.get_stats(model).hits > 0
    return results


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_copies_begin_with_the_call_and_are_waited_for_where_they_are_needed(gpu: Gpu, dtype: str | None) -> None:
    def logging(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            gpu.log.append("program")
            return gm.forward(*args)

        return run

    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner=logging, residual_dtype=dtype, correction=False, **OPTIONS)
    run_of(model)
    assert cache_dit.get_stats(model).hits == 3
    # two residuals, and their scales
    count = 2 if dtype is None else 4
    begun = ["side: copy", "side: record"] * count
    calls = "\n".join(gpu.log).split("program")
    assert calls[0].split() == " ".join(begun).split()
    seen = 0
    for hit, entries in zip("00010101", calls[1:], strict=True):
        found = entries.strip().split("\n")
        arrived: list[str] = []
        for number in range(seen + 1, seen + count + 1):
            # what a computed step writes to later must have been read before
            arrived += [] if hit == "1" else [f"host: wait {number}"]
            arrived += [f"main: wait {number}", "main: keeps"]
        assert found[: len(arrived)] == arrived
        assert found[len(arrived) :] in (begun, [])
        seen += count
    assert not module._under_way


@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
@pytest.mark.parametrize("options", [{}, {"residual_dtype": "int8"}, {"strategy": "adaptive", "target_speedup": 2.0}])
def test_the_numbers_are_the_same_in_every_form(gpu: Gpu, lowering: str, options: dict[str, Any]) -> None:
    found = plainly(lowering=lowering, **options)
    copied = gpu.log.count("side: copy")
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(BRANCHES, "is_offloaded", lambda kept, device: False)
        torch._dynamo.reset()
        cache_dit.backend.owned_backend.cache_clear()
        wanted = plainly(lowering=lowering, **options)
    assert gpu.log.count("side: copy") == copied > 0
    for result, each in zip(found, wanted, strict=True):
        assert torch.equal(result, each)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_compilers_take_the_operation(gpu: Gpu, inner: str, lowering: str) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner=inner, lowering=lowering, strict=True, **OPTIONS)
    results = run_of(model)
    assert "main: keeps" in gpu.log
    error = cache_dit.get_stats(model).mean_forecast_error
    exact = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(exact, inner="eager", **OPTIONS)
    for result, wanted in zip(results, run_of(exact), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    # the oldest residual was read before it was written over
    assert error == pytest.approx(cache_dit.get_stats(exact).mean_forecast_error, rel=1e-3)


def test_a_call_that_fails_leaves_no_word(gpu: Gpu) -> None:
    model = models.seeded(models.TinyDiT)
    failing = [False]

    def inner(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if failing[0]:
                assert module._under_way
                raise RuntimeError("lost")
            return gm.forward(*args)

        return run

    cache_dit.enable_cache(model, inner=inner, **OPTIONS)
    run_of(model, 2)
    failing[0] = True
    with pytest.raises(RuntimeError, match="lost"):
        run_of(model, 1)
    assert not module._under_way


def test_without_word_the_operation_copies_itself() -> None:
    kept, after = torch.arange(3.0), torch.zeros(())
    taken = torch.ops.cache_dit.from_host(kept, after)
    assert torch.equal(taken, kept) and taken.data_ptr() != kept.data_ptr()
    module.leave_word(kept, lambda: torch.full((3,), 7.0))
    assert torch.ops.cache_dit.from_host(kept, after).tolist() == [7.0] * 3
    assert torch.equal(torch.ops.cache_dit.from_host(kept, after), kept), "once"
    torch.library.opcheck(torch.ops.cache_dit.from_host.default, (kept, after))
    assert torch.Tag.cudagraph_unsafe in torch.ops.cache_dit.from_host.default.tags


def test_host_memory_for_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.zeros

    def zeros(size: Any, **wanted: Any) -> Tensor:
        asked.append(wanted)
        return real(size, dtype=wanted["dtype"])

    monkeypatch.setattr(torch, "zeros", zeros)
    for where, pinned in ((CPU, True), (CUDA, False)):
        asked.clear()
        inputs = CacheInputs((ResidualBuffer((2, 3), torch.int8, where, torch.float32),), 2, None, torch.float32, CUDA)
        allocate(inputs, ((2, 3), (2, 1)), (), ())
        assert [wanted.get("pin_memory", False) for wanted in asked] == [pinned] * 4 + [False]
        assert [wanted["dtype"] for wanted in asked[:4]] == [torch.int8] * 2 + [torch.float32] * 2
    asked.clear()
    allocate(CacheInputs((ResidualBuffer((2,), torch.float32, CPU),), 1, None, torch.float32, CPU), ((2,),), (), ())
    assert not any("pin_memory" in wanted for wanted in asked)


def test_on_one_device_nothing_is_fetched() -> None:
    for options in ({}, {"residual_device": "cpu"}):
        model = models.seeded(models.TinyDiT)
        graphs: list[str] = []

        def inner(gm: fx.GraphModule, examples: Sequence[Any], graphs: list[str] = graphs) -> Callable[..., Any]:
            graphs.append(str(gm.graph))
            return gm.forward

        cache_dit.enable_cache(model, inner=inner, **OPTIONS, **options)
        run_of(model)
        assert len(graphs) == 2 and not any("from_host" in graph for graph in graphs)
