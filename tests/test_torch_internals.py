"""Compiling beside Python: kernels that are waited for together, and what is prepared while a model is traced."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import async_compile, codecache

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.torch_internals import inner_compiler, kernels_at_once, prepare_cpp, taking_a_list

from . import models

WAIT = async_compile.AsyncCompile.wait
OPTIONS: dict[str, Any] = {"schedule": "1010", "forecast": "reuse", "noise_scale": 0.0, "correction": False, "language": "en"}


@pytest.fixture(autouse=True)
def _several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)


class Kernel:
    """A kernel under way: done when asked for."""

    def __init__(self, name: str, asked: list[str], error: Exception | None = None) -> None:
        self._name, self._asked, self._error = name, asked, error

    def __call__(self) -> Callable[..., str]:
        self._asked.append(self._name)
        if self._error is not None:
            raise self._error
        return lambda *args: f"{self._name}{args}"


def generated(*kernels: Any) -> dict[str, Any]:
    """What a generated module holds behind its call of ``wait``."""
    scope: dict[str, Any] = {"another": 1, **{f"kernel_{i}": kernel for i, kernel in enumerate(kernels)}}
    async_compile.AsyncCompile().wait(scope)
    return scope


def cpp(name: str, asked: list[str], error: Exception | None = None) -> Any:
    return async_compile.LambdaFuture(Kernel(name, asked, error))


def test_modules_do_not_wait_until_all_are_loaded() -> None:
    asked: list[str] = []
    with kernels_at_once() as wait_for_all:
        scopes = [generated(cpp("a", asked), cpp("b", asked)), generated(cpp("c", asked))]
        assert asked == []
        wait_for_all()
    assert asked == ["a", "b", "c"]
    assert [scope["kernel_0"](1) for scope in scopes] == ["a(1,)", "c(1,)"] and asked == ["a", "b", "c"]
    assert scopes[0]["another"] == 1
    assert async_compile.AsyncCompile.wait is WAIT


def test_elsewhere_a_module_waits_as_ever() -> None:
    asked: list[str] = []
    generated(cpp("before", asked))
    with kernels_at_once():
        other = threading.Thread(target=lambda: generated(cpp("another thread", asked)))
        other.start()
        other.join()
    generated(cpp("behind", asked))
    assert asked == ["before", "another thread", "behind"]


def test_a_kernel_that_nobody_waited_for_waits_when_it_is_called() -> None:
    asked: list[str] = []
    with kernels_at_once():
        scope = generated(cpp("a", asked))
    assert asked == []
    assert [scope["kernel_0"](i) for i in range(2)] == ["a(0,)", "a(1,)"]
    assert asked == ["a"]


def test_what_is_no_cpp_kernel_is_waited_for_at_once() -> None:
    """Inductor reads a Triton kernel as soon as it has waited."""
    asked: list[str] = []
    done: Future[str] = Future()
    done.set_result("done")
    with kernels_at_once() as wait_for_all:
        triton = generated(cpp("a", asked), async_compile.LambdaFuture(Kernel("triton", asked), future=done))
        assert asked == ["a", "triton"] and triton["kernel_1"]() == "triton()"
        assert generated(done)["kernel_0"] == "done"
        wait_for_all()
    assert asked == ["a", "triton"]


def test_the_first_error_is_raised_where_all_are_waited_for() -> None:
    asked: list[str] = []
    with kernels_at_once() as wait_for_all:
        generated(cpp("a", asked, ValueError("no compiler")))
        with pytest.raises(ValueError, match="no compiler"):
            wait_for_all()
    assert async_compile.AsyncCompile.wait is WAIT


@pytest.mark.parametrize("gone", ["AsyncCompile", "LambdaFuture"])
def test_a_torch_that_looks_otherwise_waits_as_ever(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    asked: list[str] = []
    compiler, future = async_compile.AsyncCompile(), cpp("a", asked)
    monkeypatch.delattr(async_compile, gone)
    with kernels_at_once() as wait_for_all:
        compiler.wait({"kernel": future})
        assert asked == ["a"]
        wait_for_all()


@pytest.fixture
def _broken_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    """A C++ compiler that compiles the headers, and no kernel."""
    compiled = codecache._worker_compile_cpp

    def fails(lock_path: str, builders: Any) -> None:
        if "precompiled_headers" in lock_path:
            return compiled(lock_path, builders)
        raise RuntimeError("cc1plus has gone")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    codecache.CppPythonBindingsCodeCache.cache_clear()
    monkeypatch.setattr(codecache, "_worker_compile_cpp", fails)
    yield
    codecache.CppPythonBindingsCodeCache.cache_clear()


def calls(model: Any) -> list[Tensor]:
    with torch.no_grad():
        examples = [models.example(seed=step) for step in range(4)]
        return [model(x, t - 0.08 * step) for step, (x, t) in enumerate(examples)]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_broken_toolchain")
@pytest.mark.parametrize("lowering", ["specialize", "pieces"])
def test_a_kernel_that_does_not_compile_is_a_failure_of_the_inner_compiler(lowering: str) -> None:
    """Graphs run as traced, still cached, which is said once; ``strict`` raises."""
    wanted = calls(cache_dit.enable_cache(models.seeded(models.TinyDiT), inner="eager", lowering=lowering, **OPTIONS))
    model = cache_dit.enable_cache(models.seeded(models.TinyDiT), lowering=lowering, **OPTIONS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CacheDitWarning)
        found = calls(model)
    ours = [str(each.message) for each in said if issubclass(each.category, CacheDitWarning)]
    assert len(ours) == 1 and "cc1plus has gone" in ours[0]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert cache_dit.get_stats(model).hits == 2
    strict = cache_dit.enable_cache(models.seeded(models.TinyDiT), lowering=lowering, strict=True, **OPTIONS)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="cc1plus has gone"):
        calls(strict)


def test_the_programs_of_a_graph_are_waited_for_together(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    seen: list[str] = []

    @contextmanager
    def recorded() -> Iterator[Callable[[], None]]:
        seen.append("begins")
        yield lambda: seen.append("waits")

    def inner(gm: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        seen.append("compiles")
        return gm.forward

    monkeypatch.setattr("cache_dit.backend.kernels_at_once", recorded)
    calls(cache_dit.enable_cache(models.seeded(models.TinyDiT), inner=inner, **OPTIONS))
    assert seen == ["begins", "compiles", "compiles", "waits"]


@pytest.mark.parametrize(
    ("options", "prepared"),
    [({}, True), ({"inner": "eager"}, False), ({"inner_options": {"epilogue_fusion": False}}, False)],
    ids=["inductor", "eager", "with options"],
)
def test_the_cpp_compiler_is_prepared_where_it_will_be_used(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None, options: dict[str, Any], prepared: bool
) -> None:
    called: list[bool] = []

    def prepare() -> None:
        called.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr("cache_dit.backend.prepare_cpp", prepare)
    model = cache_dit.enable_cache(models.seeded(models.TinyDiT), **{**OPTIONS, **options})
    try:
        if not prepared and "inner" not in options:
            monkeypatch.setattr(torch, "compile", lambda *_, **__: model.forward)
        calls(model)
    except KeyboardInterrupt:
        pass
    assert bool(called) is prepared


def test_what_is_prepared_compiles_no_kernel_and_hides_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    done = threading.Event()

    def load(argtypes: list[str], code: str, **more: Any) -> Any:
        asked.append((argtypes, "kernel" in code, more))
        done.set()
        raise RuntimeError("no compiler")

    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_pybinding_async", load)
    prepare_cpp.cache_clear()
    try:
        prepare_cpp()
        prepare_cpp()
        assert done.wait(60)
        assert asked == [([], True, {})]
        prepare_cpp.cache_clear()
        monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 1)
        prepare_cpp()
        assert len(asked) == 1 and not any(each.name == "cache_dit_prepare_cpp" for each in threading.enumerate())
    finally:
        prepare_cpp.cache_clear()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_program_lets_go_of_what_it_takes_in_a_list(fresh_dynamo: None, inner: str) -> None:
    """Inductor's and AOT autograd's without what is wrapped around them."""
    made: list[tuple[Any, Any]] = []

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        compiled = inner_compiler(inner, None, {})(gm, examples)
        made.append((compiled, taking_a_list(compiled)))
        return gm.forward

    weight, x = torch.ones(3, 3), torch.arange(3.0)

    @torch.compile(backend=backend)
    def double(x: Tensor) -> Tensor:
        return (x + weight) * 2

    with torch.no_grad():
        wanted = double(x)
        ((compiled, taking),) = made
        assert (taking is None) is (inner == "eager")
        if taking is not None:
            inputs = [x, weight]
            (found,) = taking(inputs)
            assert inputs == [] and torch.equal(found, wanted) and torch.equal(found, compiled(x, weight)[0])
