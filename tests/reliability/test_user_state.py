"""The user's own state: random generators, settings of torch, warnings, logging, environment; and the time an import takes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import cache_dit
from cache_dit.strategies import STRATEGIES

from .generations import EXACT, Plan, calls_of, falling, prompted


def settings_now() -> dict[str, Any]:
    """Everything of the process that a library could have changed."""
    backends = torch.backends
    return {
        "environment": dict(os.environ),
        "warnings": [str(each) for each in warnings.filters],
        "root logger": (logging.root.level, list(logging.root.handlers), logging.root.disabled),
        "our logger": (logging.getLogger("cache_dit").level, list(logging.getLogger("cache_dit").handlers)),
        "dynamo": torch._dynamo.config.get_config_copy() if hasattr(torch._dynamo.config, "get_config_copy") else {},
        "inductor": torch._inductor.config.get_config_copy() if "torch._inductor.config" in sys.modules else None,
        "cudnn": (backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.enabled),
        "matmul": (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile()),
    }


def generators_now() -> list[Any]:
    state = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    if torch.cuda.is_available():
        state.append(torch.cuda.get_rng_state().tolist())
    return state


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generators_and_settings_are_as_they_were(fresh_dynamo: None, strategy: str, lowering: str) -> None:
    """While caching is on as well as behind it; noise, which is on, is drawn from no generator of the user."""
    model = prompted()
    model(*Plan(1, falling(2)).parts()[:1], torch.ones(2), Plan(1, falling(2)).parts()[1])
    importlib.import_module("torch._inductor.config")
    settings, generators = settings_now(), generators_now()
    cache_dit.enable_cache(model, inner="eager", language="en", strategy=strategy, lowering=lowering)
    assert settings_now() == settings
    with torch.no_grad():
        for _ in calls_of(Plan(10, falling(8)), model):
            assert torch.get_rng_state().tolist() == generators[0]
    assert cache_dit.get_stats(model).hits > 0
    cache_dit.summary(model)
    cache_dit.disable_cache(model)
    now = settings_now()
    assert {name for name in settings if settings[name] != now[name]} == set()
    assert generators_now() == generators


def test_a_failing_call_leaves_them_too() -> None:
    model = cache_dit.enable_cache(prompted(), **EXACT)
    settings, generators = settings_now(), generators_now()
    with pytest.raises(TypeError):
        model(no_such_argument=1)
    now = settings_now()
    assert {name for name in settings if settings[name] != now[name]} == set()
    assert generators_now() == generators


def test_the_import_is_quick() -> None:
    """Behind torch, which is there anyway: measured in a process of its own."""
    code = (
        "import json, sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import cache_dit\n"
        "spent = time.perf_counter() - start\n"
        "print(json.dumps([spent, sorted(set(sys.modules) - before)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    seconds, imported = json.loads(done.stdout)
    assert seconds < 0.5
    assert not [name for name in imported if name.startswith(("torch._inductor", "torch._dynamo", "diffusers", "transformers"))]
