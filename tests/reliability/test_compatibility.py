"""What of torch we rest on: all of it in one module, each name there, and one clear error where it has moved."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import cache_dit
from cache_dit import torch_internals
from cache_dit.torch_internals import ARTIFACT_NAMES, PRIVATE_NAMES, TESTED_VERSIONS, check_internals, missing_names

from .. import models
from .generations import EXACT, Plan, falling, generate, prompted

ROOT = Path(__file__).resolve().parents[2]
# May not import torch, and so looks at the registry of backends by itself.
EXEMPT = {"cache_dit/torch_internals.py", "cache_dit/registration.py"}
# Attributes of torch's objects that begin with an underscore, wherever they are read.
ATTRIBUTES = {name for names in PRIVATE_NAMES.values() for name in names if name.startswith("_")} | {
    "_orig_mod",
    "_schema",
    "_dynamo_source",
    "_param_name_to_source",
    "_backend_id",
}
OWN_FOLDERS = ("cache_dit", "passes", "comfy")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in OWN_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def private_names(tree: ast.Module) -> list[str]:
    """Private modules of torch that are named, and private attributes of its objects, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            if any(part.startswith("_") for part in f"{node.module}.{node.names[0].name}".split(".")):
                found.append(f"{node.lineno}: {node.module}")
        elif isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
            found += [f"{node.lineno}: {name}" for name in modules if name.startswith("torch.") and "._" in name]
        elif isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and node.attr != "__version__"
            under_torch = isinstance(node.value, ast.Name) and node.value.id == "torch" and private
            of_symbol = node.attr in ("expr", "hint") and isinstance(node.value, ast.Attribute) and node.value.attr == "node"
            if under_torch or of_symbol or node.attr in ATTRIBUTES:
                found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ATTRIBUTES:
            found.append(f"{node.lineno}: {node.value!r}")
    return found


def test_no_other_module_touches_private_names_of_torch() -> None:
    found = {name: names for name, tree in sources() if name not in EXEMPT and (names := private_names(tree))}
    assert found == {}
    # the search finds what there is
    own = dict(sources())["cache_dit/torch_internals.py"]
    assert len(private_names(own)) > 20


def test_every_private_name_is_in_this_torch() -> None:
    assert missing_names() == missing_names(ARTIFACT_NAMES) == []
    for name in ("GraphModule", "Node"):
        assert hasattr(fx, name)


def test_the_list_of_private_names_is_whole() -> None:
    """What the module imports from private places is in the list that is checked."""
    tree = dict(sources())["cache_dit/torch_internals.py"]
    imported = {
        (node.module or "", name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "._" in (node.module or "")
        for name in node.names
    }
    names_of = {**PRIVATE_NAMES, **ARTIFACT_NAMES}
    listed = {(place, name) for place, names in names_of.items() for name in names}
    # inductor is asked for only where it is the inner compiler, and config and the compiler are modules
    inductor = "torch._inductor.compile_fx"
    configs = {("torch._dynamo", "config"), ("torch._inductor", "config")}
    # what is compiled beside Python: where they look otherwise nothing is (tests/test_torch_internals.py)
    beside = {("torch._inductor", "async_compile"), ("torch._inductor", "codecache")}
    optional = {*configs, *beside, (inductor, "compile_fx"), (inductor, "compile_fx_aot")}
    assert imported - optional <= listed


def test_what_tracing_leaves_on_nodes_is_there() -> None:
    """Metadata that the passes read."""
    gm = models.traced(models.seeded(models.TinyDiT), *models.example()).gm
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert any("nn_module_stack" in node.meta for node in calls)
    assert all("example_value" in node.meta for node in calls)
    assert all(hasattr(node, "_dynamo_source") for node in gm.graph.nodes if node.op == "placeholder")
    assert torch_internals.frame_id(gm) is None or isinstance(torch_internals.frame_id(gm), int)


def test_this_version_is_among_those_tested() -> None:
    assert any(torch.__version__.startswith(version) for version in TESTED_VERSIONS)


@pytest.mark.parametrize(
    ("place", "name"),
    [("torch._dynamo.utils", "counters"), ("torch._ops", "HigherOrderOperator"), ("torch._dynamo.exc", "TorchDynamoException")],
)
def test_a_name_that_has_moved_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None, place: str, name: str
) -> None:
    monkeypatch.setitem(PRIVATE_NAMES, place, (*PRIVATE_NAMES[place], f"{name}_of_old"))
    check_internals.cache_clear()
    try:
        model = cache_dit.enable_cache(prompted(), **EXACT)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            generate(Plan(1, falling(2)), model)
    finally:
        check_internals.cache_clear()
    cause = caught.value.__cause__
    assert isinstance(cause, cache_dit.CacheDitError)
    assert f"{place}.{name}_of_old" in str(cause) and torch.__version__ in str(cause)
    assert all(version in str(cause) for version in TESTED_VERSIONS)


def test_a_module_that_has_moved_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIVATE_NAMES, "torch._nowhere", ("anything",))
    assert missing_names() == ["torch._nowhere.anything"]


def test_the_compile_slot_is_the_one_that_torch_calls() -> None:
    module = nn.Linear(1, 1)
    setattr(module, torch_internals.COMPILE_SLOT, lambda *args: "ours")
    assert module(torch.ones(1)) == "ours"
    assert torch_internals.in_compile_slot(module)() == "ours"
