"""torch's caches on disk: our programs are found there again, and never the program of another option."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_dit

from . import models

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BASE: dict[str, Any] = {
    "strategy": "fixed",
    "skip_interval": 2,
    "warmup_steps": 2,
    "forecast": "reuse",
    "noise_scale": 0.0,
    "correction": False,
    "language": "en",
}
# one for each field of `ProgramOptions` that the compiled programs depend on
OTHERS: dict[str, dict[str, Any]] = {
    "front_blocks": {"front_blocks": 2},
    "back_blocks": {"back_blocks": 1},
    "residual_dtype": {"residual_dtype": "bfloat16"},
    "region": {"region": ("blocks.2", "blocks.3")},
    "history": {"forecast": "lagrange", "order": 2},
    "noise": {"noise_scale": 0.01},
    "front_clock": {"strategy": "adaptive", "tolerance": 0.5},
    "front_anchored": {"strategy": "first_block", "tolerance": 0.5},
    "lowering": {"lowering": "pieces"},
    "inner_options": {"inner_options": {"epilogue_fusion": False}},
}
# what fills the caches where the defaults differ in more than the one field
FILLED: dict[str, dict[str, Any]] = {"front_anchored": {"strategy": "front_clock", "tolerance": 0.5}}
MORE: dict[str, dict[str, Any]] = {"int8": {"residual_dtype": "int8"}, "float8": {"residual_dtype": "float8_e4m3fn"}}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    torch._dynamo.reset()


def run(inner: str, device: str = "cpu", **options: Any) -> tuple[list[Tensor], int, int]:
    """Six steps of a model compiled anew, with the numbers of programs found on disk and compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.TinyDiT(depth=5)
        x = torch.randn(models.BATCH, models.TOKENS, models.CHANNELS).to(device)
    if inner != "inductor":
        options.pop("inner_options", None)
    cache_dit.enable_cache(model.to(device).eval(), inner=inner, **{**BASE, **options})
    cache_dit.new_run(model, num_steps=6)
    with torch.no_grad():
        results = [model(x + 0.1 * i, torch.full((models.BATCH,), 1.0 - i / 6, device=device)) for i in range(6)]
    assert cache_dit.get_stats(model).hits > 0
    found = counters["aot_autograd"]
    return results, found["autograd_cache_hit"], found["autograd_cache_miss"]


@pytest.mark.parametrize("lowering", ["specialize", "pieces"])
def test_a_second_compilation_finds_every_program(lowering: str) -> None:
    first, hits, misses = run("inductor", lowering=lowering)
    assert hits == 0 and misses >= 2
    again, hits, missed = run("inductor", lowering=lowering)
    assert hits == misses and missed == 0
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*OTHERS, *MORE])
def test_another_option_is_another_program(name: str) -> None:
    """The caches are filled with the programs of the defaults; what runs is that of the option."""
    run("inductor", **FILLED.get(name, {}))
    options = {**OTHERS, **MORE}[name]
    compiled, _, misses = run("inductor", **options)
    wanted, _, _ = run("eager", **options)
    assert misses >= 1
    for a, b in zip(compiled, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_another_option_is_another_program_in_pieces_too() -> None:
    """A piece that an option leaves as it is may be found on disk; what runs is the option's program all the same."""
    run("inductor", lowering="pieces")
    missed = 0
    for name, options in (OTHERS | MORE).items():
        if "lowering" in options:
            continue
        compiled, _, misses = run("inductor", lowering="pieces", **options)
        wanted, _, _ = run("eager", **options)
        missed += misses
        for a, b in zip(compiled, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert missed > 0


@pytest.mark.parametrize(("inner", "lowering"), [("aot_eager", "specialize"), ("inductor", "cond")])
def test_what_torch_does_not_keep_is_not_taken_from_its_caches(inner: str, lowering: str) -> None:
    """Another inner compiler, and graphs with a branch in them."""
    run("inductor")
    compiled, hits, _ = run(inner, lowering=lowering)
    assert hits == 0
    wanted, _, _ = run("eager", lowering=lowering)
    for a, b in zip(compiled, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"strict": True}, {"residual_device": "cpu"}], ids=["strict", "residual_device"])
def test_an_option_that_changes_no_program_finds_every_program(options: dict[str, Any]) -> None:
    """A refusal raises instead of warning; residuals of a model on the CPU are there already."""
    first, _, misses = run("inductor")
    again, hits, missed = run("inductor", **options)
    assert (hits, missed) == (misses, 0)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="residuals move to the host from a GPU alone")
def test_residuals_in_host_memory_are_another_program() -> None:
    run("inductor", device="cuda")
    compiled, _, misses = run("inductor", device="cuda", residual_device="cpu")
    wanted, _, _ = run("eager", device="cuda", residual_device="cpu")
    assert misses >= 1
    for a, b in zip(compiled, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def in_a_process(**options: Any) -> tuple[list[float], int, int]:
    """The last result, and the programs found and compiled, of `run` in a process of its own with the same folder."""
    command = [sys.executable, "-m", "tests.test_compiler_caches", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result, hits, misses = json.loads(done.stdout.splitlines()[-1])
    return result, hits, misses


def test_a_second_process_finds_every_program_and_none_of_another_option() -> None:
    first, hits, misses = in_a_process()
    assert hits == 0 and misses >= 2
    assert in_a_process() == (first, misses, 0)
    _, _, misses = in_a_process(front_blocks=2)
    assert misses >= 1


def test_every_option_of_the_program_is_tried() -> None:
    from cache_dit.options import ProgramOptions

    # the tests above
    elsewhere = {"residual_device", "inner", "strict"}
    names = {name for name in ProgramOptions.__dataclass_fields__ if not name.startswith("_")}
    assert names == set(OTHERS) | elsewhere


if __name__ == "__main__":
    results, found, compiled = run("inductor", **json.loads(sys.argv[1]))
    print(json.dumps([results[-1].flatten().tolist(), found, compiled]))
