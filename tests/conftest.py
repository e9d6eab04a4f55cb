"""What every test runs under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

_ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the working directory first: there our folder `comfy` would shadow ComfyUI's package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
# side by side each worker, and what it starts, has a core of its own
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# a busy machine is no failure
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes is for `make soak`."""
    if "CACHE_DIT_SOAK" not in os.environ:
        for item in items:
            if item.get_closest_marker("soak") is not None:
                item.add_marker(pytest.mark.skip(reason="make soak runs this"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before the test, nothing left after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled_for_this_module_alone() -> Iterator[None]:
    """The tests of a module share what they compile, and nothing with other modules."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of ``benchmarks`` and ``examples`` can be imported by their names."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(_ROOT / folder))
