"""Nothing is unpickled, evaluated, fetched or written that the user did not ask for; options are hostile input."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cache_dit

from .generations import EXACT, prompted
from .test_compatibility import sources

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "open"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "subprocess", "socket", "urllib", "http", "requests"}
FORBIDDEN_METHODS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("torch.hub", "load")}
# Who may open a file, and why: the command that writes pictures where the user says; the nodes' own translations; the
# sources of a model's classes, read to see what they mention.
MAY_OPEN = {"cache_dit/__main__.py", "cache_dit/compare.py", "comfy/locales.py"}


def test_nothing_is_unpickled_evaluated_or_fetched() -> None:
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                if not (node.func.id == "open" and name in MAY_OPEN):
                    found.append(f"{name}:{node.lineno} {node.func.id}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # torch's own reader of tensors, which builds nothing else
                harmless = any(each.arg == "weights_only" and ast.unparse(each.value) == "True" for each in node.keywords)
                if (ast.unparse(node.func.value), node.func.attr) in FORBIDDEN_METHODS and not harmless:
                    found.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                if getattr(node, "level", 0) == 0 and {module.partition(".")[0] for module in modules} & FORBIDDEN_MODULES:
                    found.append(f"{name}:{node.lineno} {modules}")
    assert found == []


@pytest.mark.parametrize(
    "options",
    [
        {"inner": "os.system('true')"},
        {"inner": "../../etc/passwd"},
        {"strategy": "__class__"},
        {"region": "__class__.__init__"},
        {"region": "../blocks"},
        {"schedule": "1" * 10_000_000},
        {"skip_interval": 10**30},
        {"skip_interval": "2; import os"},
        {"noise_scale": float("nan")},
        {"residual_device": "cuda:99999999"},
        {"residual_device": "../../tmp"},
        {"residual_dtype": "__import__"},
        {"inner_options": {"__class__": 1}},
        {"language": "../../zh"},
    ],
)
def test_hostile_options_are_refused_or_harmless(options: dict[str, object]) -> None:
    """As a workflow file may hold them."""
    model = prompted()
    try:
        cache_dit.enable_cache(model, **{**EXACT, **options})
    except (ValueError, TypeError, cache_dit.CacheDitError) as error:
        assert len(str(error)) < 2000
    else:
        cache_dit.disable_cache(model)
    assert model._compiled_call_impl is None


USE = """
import torch, warnings
from torch import nn
import cache_dit

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)
    def forward(self, x, t):
        return x + self.mlp(x) * t

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x

model = cache_dit.enable_cache(Model().eval(), inner="eager", language="en")
with torch.no_grad():
    for step in range(6):
        model(torch.ones(1, 2, 4), torch.tensor(1.0 - step / 6))
print(cache_dit.summary(model)); print(cache_dit.explain(model))
cache_dit.disable_cache(model)
"""


def test_no_file_is_written(tmp_path: Path) -> None:
    """Enabling, running, asking and disabling leave the working directory and the home directory as they were."""
    folders = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    environment = {**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    # what torch itself may keep in its cache folder is not ours
    assert [path for path in written if "torchinductor" not in str(path)] == []
