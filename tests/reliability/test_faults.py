"""Faults: an exception at any place, a compiler that fails, a compile cache that is broken, weights that are not finite."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning

from .. import models
from .generations import EXACT, GREEDY, Plan, cut, enabled, falling, generate, hits_of, prompted, same

pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


# An exception at any place.

armed: dict[str, Any] = {}


@torch.library.custom_op("cache_dit_tests::faulty", mutates_args=())
def faulty(x: Tensor, place: int) -> Tensor:
    if armed.get("place") == place:
        armed.clear()
        raise armed_error[0]("injected")
    return x.clone()


@faulty.register_fake
def _(x: Tensor, place: int) -> Tensor:
    return torch.empty_like(x)


armed_error: list[type[BaseException]] = [ArithmeticError]


class FaultyBlock(models.Block):
    """Raises where it is told to, before or behind its own work."""

    place = 0

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = faulty(x, self.place)
        return faulty(super().forward(x, temb), self.place + 1)


class FaultyDiT(models.TinyDiT):
    """A fault can be put into every block, before the blocks (100) and behind them (101)."""

    def __init__(self) -> None:
        super().__init__(3, FaultyBlock)
        for i, block in enumerate(self.blocks):
            block.place = 2 * i

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        h, temb = faulty(self.embed(x), 100), self.time(t) + prompt
        for block in self.blocks:
            h = block(h, temb)
        return faulty(self.head(h), 101)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("sampler", ["euler", "guided"])
def test_a_fault_at_every_place_of_every_step(sampler: str, error: type[BaseException]) -> None:
    """The error comes out as it is, and the next generation is that of a model never used before."""
    options = {**EXACT, "warmup_steps": 1}
    model = cache_dit.enable_cache(models.seeded(FaultyDiT), **options)
    plan, other = Plan(10, falling(6), sampler), Plan(50, falling(6), sampler)
    wanted = generate(plan, cache_dit.enable_cache(models.seeded(FaultyDiT), **options))
    armed_error[0] = error
    raised = 0
    for place in (100, *range(6), 101):
        for calls in range(len(wanted)):
            cut(other, model, calls)
            armed["place"] = place
            try:
                # a skipped step does not reach the blocks
                cut(other, model, 0) if calls == 0 else None
                with torch.no_grad():
                    x, positive, _ = other.parts()
                    model(x, torch.full((2,), 1.0 - calls / 12), positive)
            except error as caught:
                raised += 1
                assert str(caught) == "injected"
            armed.clear()
            assert same(generate(plan, model), wanted), (place, calls)
    assert raised > 30


def test_a_warning_that_is_an_error_to_the_user_leaves_nothing_wrong_behind() -> None:
    """The residual that is not finite is not used, whoever heard of it."""

    class Poisoned(models.TinyDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h, temb = self.embed(x), self.time(t)
            bad = x[:, :1, :1] > 50.0
            for i, block in enumerate(self.blocks):
                h = torch.where(bad & (i > 0), math.nan, block(h, temb))
            return self.head(h)

    model = cache_dit.enable_cache(models.seeded(Poisoned), **GREEDY)
    x, t = models.example()
    with torch.no_grad():
        model(torch.cat([torch.full_like(x[:, :1], 100.0), x[:, 1:]], 1), t)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CacheDitWarning)
            with pytest.raises(CacheDitWarning):
                cache_dit.get_stats(model)
        torch.testing.assert_close(model(x, t - 0.1), model.forward(x, t - 0.1), rtol=1e-6, atol=1e-6)
    assert hits_of(model) == 0


# Memory.


def test_memory_that_comes_back_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the buffers steps compute; the next run that has room is cached."""
    from cache_dit.runtime import session

    real, full = session.allocate, [True]

    def allocate(*args: Any) -> Any:
        if full[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(*args)

    monkeypatch.setattr(session, "allocate", allocate)
    model, plan = enabled(EXACT), Plan(10, falling(8))
    with pytest.warns(CacheDitWarning, match="residual_dtype"):
        assert same(generate(plan, model), generate(plan, prompted()))
    full[0] = False
    generate(plan, model)
    assert hits_of(model) == 3


def test_an_error_that_is_not_about_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr("cache_dit.runtime.session.allocate", allocate)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        generate(Plan(10, falling(3)), enabled(EXACT))


# Compilers.


def refuses(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    raise RuntimeError("no toolchain here")


def test_a_failing_inner_compiler_without_memory_for_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults at once: the graph without a cache falls back as the others do."""

    def allocate(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("cache_dit.runtime.session.allocate", allocate)
    model, plan = enabled({**EXACT, "inner": refuses}), Plan(10, falling(4))
    with pytest.warns(CacheDitWarning) as said:
        found = generate(plan, model)
    assert same(found, generate(plan, prompted()))
    assert sum("no toolchain here" in str(each.message) for each in said) >= 1


def test_a_failing_inner_compiler_is_an_error_under_strict() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        generate(Plan(10, falling(2)), enabled({**EXACT, "inner": refuses, "strict": True}))
    assert isinstance(caught.value.__cause__, cache_dit.CacheDitError)
    assert "no toolchain here" in str(caught.value.__cause__)


def test_a_compiler_that_fails_when_its_program_runs_is_the_users_error_and_ends_the_run() -> None:
    fails = [False]

    def inner(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if fails[0]:
                raise RuntimeError("kernel failed")
            return gm.forward(*args)

        return run

    model, plan = enabled({**EXACT, "inner": inner}), Plan(10, falling(8))
    wanted = generate(plan, model)
    for calls in range(1, 8):
        cut(Plan(50, falling(8)), model, calls)
        fails[0] = True
        with pytest.raises(RuntimeError, match="kernel failed"):
            cut(Plan(50, falling(8, 1.0 - calls / 8)), model, 1)
        fails[0] = False
        assert same(generate(plan, model), wanted)


INDUCTOR = """
import sys, torch, cache_dit
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)
    def forward(self, x, t):
        return x + torch.tanh(self.mlp(x)) * t

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x

torch.manual_seed(0)
model, x = Model().eval(), torch.randn(2, 5, 8)
cache_dit.enable_cache(model, warmup_steps=1, noise_scale=0.0)
with torch.no_grad():
    outputs = [model(x + step, torch.tensor(1.0 - step / 8)) for step in range(6)]
    for step in (0, 2, 4):
        torch.testing.assert_close(outputs[step], model.forward(x + step, torch.tensor(1.0 - step / 8)))
stats = cache_dit.get_stats(model)
assert stats.hits == 3 and not torch.isnan(outputs[5]).any()
print("hits", stats.hits)
"""


@pytest.mark.soak
@pytest.mark.parametrize("damage", ["cut short", "other bytes"])
def test_a_broken_compile_cache_on_disk_costs_time_alone(tmp_path: Path, damage: str) -> None:
    """torch's caches for graphs and for AOT autograd, with every file in them spoilt."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", INDUCTOR], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "hits 3" in done.stdout

    run()
    kept = [path for folder in ("fxgraph", "aotautograd") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"spoilt" + content[6:])
    run()


@pytest.mark.parametrize("strict", [False, True])
def test_without_a_place_for_what_is_compiled_the_model_runs_and_is_cached_once_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    folder, plan = tmp_path / "cache", Plan(10, falling(8))
    folder.write_text("a file in its place")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    model = enabled({**EXACT, "strict": strict})
    if strict:
        with pytest.raises(cache_dit.CacheDitError, match="TORCHINDUCTOR_CACHE_DIR"):
            generate(plan, model)
    else:
        with pytest.warns(CacheDitWarning, match="TORCHINDUCTOR_CACHE_DIR") as said:
            assert same(generate(plan, model), generate(plan, prompted()))
        assert len(said) == 1 and str(folder) in str(said[0].message)
        assert cache_dit.get_stats(model).refused == {"no_folder": 8} and hits_of(model) == 0
    folder.unlink()
    generate(plan, model)
    assert hits_of(model) == 3


UNWRITABLE = {
    # not even where the folder is there already
    "no byte": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "no folder": "import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = '/proc/cache_dit'",
}
UNCACHED = """
import warnings
with torch.no_grad(), warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        cache_dit.enable_cache(model, warmup_steps=1, noise_scale=0.0, language="en")
    except cache_dit.CacheDitError as error:
        print("refused:", error)
    for step in range(6):
        assert torch.equal(model(x + step, torch.tensor(1.0 - step / 8)), model.forward(x + step, torch.tensor(1.0 - step / 8)))
print("said:", *(each.message for each in said if issubclass(each.category, cache_dit.messages.CacheDitWarning)))
"""


@pytest.mark.parametrize("fault", UNWRITABLE)
def test_where_nothing_can_be_written_the_model_runs_as_it_is(tmp_path: Path, fault: str) -> None:
    """A disk that is full or read-only: found when torch's compiler is imported, or at the first call."""
    code = UNWRITABLE[fault] + INDUCTOR.partition("cache_dit.enable_cache")[0] + UNCACHED
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, _, said = done.stdout.rpartition("said:")
    told = said if fault == "no byte" else refused
    assert told.count("TORCHINDUCTOR_CACHE_DIR") == 1 and done.stdout.count("TORCHINDUCTOR_CACHE_DIR") == 1


DAMAGES = {
    "a file": "shutil.rmtree(folder); folder.write_text('in its place')",
    "no byte": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "spoilt": "[f.write_bytes(b'spoilt') for f in folder.rglob('*') if f.is_file() and f.suffix != '.so']",
    "removed": "shutil.rmtree(folder)",
}

AGAIN = """
import os, pathlib, shutil, warnings
folder = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
exec(os.environ["DAMAGE"])
warnings.simplefilter("ignore")
for sizes in ((2, 5, 8), (3, 7, 8), (4, 9, 8)):
    x = torch.randn(sizes)
    with torch.no_grad():
        outputs = [model(x + step, torch.tensor(1.0 - step / 8)) for step in range(6)]
        for step in (0, 2, 4):
            torch.testing.assert_close(outputs[step], model.forward(x + step, torch.tensor(1.0 - step / 8)))
print("hits", cache_dit.get_stats(model).hits)
"""


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_compile_cache_that_breaks_in_mid_session(tmp_path: Path, damage: str) -> None:
    """New shapes compile all the same."""
    folder = tmp_path / "cache"
    folder.mkdir()
    settings = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "DAMAGE": DAMAGES[damage],
    }
    command = [sys.executable, "-c", INDUCTOR + AGAIN]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("hits")[1:] == [" 3\n", " 12\n"]


# Signals.


SIGNALLED = """
import os, signal, sys, torch, cache_dit
from tests import models
HANDLER
model = models.seeded(models.TinyDiT)
cache_dit.enable_cache(model, inner="eager", warmup_steps=1)
x, t = models.example()
with torch.no_grad():
    for step in range(10**9):
        model(x, t - 0.05 * (step % 18))
        if step == 20:
            print("running", flush=True)
"""


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        ("", -signal.SIGTERM),
        ("signal.signal(signal.SIGTERM, lambda *about: sys.exit(3))", 3),
        ("signal.signal(signal.SIGTERM, lambda *about: (cache_dit.disable_cache(model), sys.exit(4)))", 4),
    ],
)
def test_a_process_that_is_told_to_end_in_mid_run_ends_as_without_us(handler: str, code: int) -> None:
    command = [sys.executable, "-c", SIGNALLED.replace("HANDLER", handler)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "running\n", process.stderr.read()[-3000:]
            # again where it does not end: what a handler raises within a guard of Dynamo is lost, without caching too
            for _ in range(6):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                    break
                except subprocess.TimeoutExpired:
                    continue
            assert process.returncode == code
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


# Values that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["weight", "input", "timestep"])
def test_values_that_are_not_finite_stay_in_their_own_run(value: float, which: str) -> None:
    """In a weight, the input or the timestep of one run: it gives what the plain model gives, the next run is as ever."""
    model, plain, plan = enabled(EXACT), prompted(), Plan(10, falling(6))
    wanted = generate(plan, model)
    x, prompt, _ = plan.parts()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CacheDitWarning)
        for step in range(4):
            time = 1.0 - step / 6
            if which == "weight":
                for each in (model, plain):
                    each.blocks[2].mlp.weight[0, 0] = value
            given = x * value if which == "input" else x
            t = torch.full((2,), time * (value if which == "timestep" else 1.0))
            found = model(given, t, prompt)
            if step < 3:
                torch.testing.assert_close(found, plain(given, t, prompt), equal_nan=True)
        model.load_state_dict(prompted().state_dict())
        assert same(generate(plan, model), wanted)


def test_a_model_whose_weights_are_broken_throughout_is_never_predicted() -> None:
    model = enabled(GREEDY)
    with torch.no_grad():
        model.blocks[2].mlp.bias.fill_(math.nan)
    with pytest.warns(CacheDitWarning, match="NaN") as said:
        outputs = generate(Plan(10, falling(8)), model)
    assert len(said) == 1
    assert all(output.isnan().any() for output in outputs)
    stats = cache_dit.get_stats(model)
    assert (stats.hits, stats.nonfinite) == (0, 8)


def test_the_hooks_of_a_module_may_turn_caching_off_in_mid_call() -> None:
    model, plan = enabled(EXACT), Plan(10, falling(8))

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        cache_dit.disable_cache(module)

    generate(plan, model)
    handle = model.register_forward_hook(stop)
    cache_dit.disable_cache(model)
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, prompt, _ = plan.parts()
        model(x, torch.ones(2), prompt)
    handle.remove()
    assert model._compiled_call_impl is None
    assert same(generate(plan, model), generate(plan, prompted()))
