"""The nodes without a server: what both dialects are made from, the files of texts, the help pages, the old dialect."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
from cache_dit.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, entry_point
from cache_dit.comfy.definitions import Node
from cache_dit.comfy.locales import files
from cache_dit.comfy.nodes import ADVANCED, BASIC, NODES

from cache_dit.options import resolve_options

ROOT = Path(__file__).resolve().parents[2]
BY_ID = {node.id: node for node in NODES}


def test_the_files_of_texts_are_those_of_the_definitions() -> None:
    for path, content in files(ROOT).items():
        assert path.read_text(encoding="utf-8") == content, "run python -m cache_dit.comfy.locales"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)
def test_every_node_has_a_help_page_in_both_languages(node: Node) -> None:
    for place, language in enumerate(("zh", "en")):
        page = (ROOT / "comfy/web/docs" / node.id / f"{language}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node.name[place]}\n")
        for each in (*node.inputs, *node.outputs):
            assert each.label[place] in page, each.id


def test_categories_and_labels_are_the_documents() -> None:
    assert [BY_ID[name].category for name in ("CacheDitAccelerate", "CacheDitStats")] == [BASIC, BASIC]
    assert {BY_ID[name].category for name in BY_ID if name not in ("CacheDitAccelerate", "CacheDitStats")} == {ADVANCED}
    labels = {each.id: each.label[0] for each in BY_ID["CacheDitConfig"].inputs}
    assert {name: labels[name] for name in ("strategy", "skip_interval", "warmup_steps", "noise_scale", "enable_debug")} == {
        "strategy": "缓存策略",
        "skip_interval": "跳步间隔",
        "warmup_steps": "预热步数",
        "noise_scale": "噪声缩放",
        "enable_debug": "调试模式",
    }
    outputs = [node.outputs[0].label[0] for node in NODES]
    assert outputs == ["加速模型", "统计信息", "配置模型", "控制模型", "详细统计", "时间线"]


def test_further_inputs_are_options_of_the_api_with_its_defaults() -> None:
    further = [each for each in BY_ID["CacheDitConfig"].inputs if each.advanced]
    assert [each.id for each in further] == [
        "inner", "target_speedup", "tolerance", "forecast", "schedule", "front_blocks", "back_blocks", "start_percent",
        "end_percent",
    ]  # fmt: skip
    defaults = resolve_options({})
    for each in further:
        assert each.optional
        if each.id not in ("inner", "target_speedup", "schedule"):
            assert each.default == getattr(defaults, each.id)
            assert resolve_options({each.id: each.default}) == defaults


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)
def test_a_node_takes_what_its_definition_names(node: Node) -> None:
    parameters = inspect.signature(node.run).parameters
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for each in node.inputs:
        assert each.id in parameters or takes_more
        if each.optional and each.id in parameters:
            assert parameters[each.id].default is not inspect.Parameter.empty


def test_the_old_dialect() -> None:
    assert list(NODE_CLASS_MAPPINGS) == list(BY_ID) == list(NODE_DISPLAY_NAME_MAPPINGS)
    for name, kind in NODE_CLASS_MAPPINGS.items():
        node: Any = kind
        types = node.INPUT_TYPES()
        assert types["hidden"] == {"unique_id": "UNIQUE_ID"}
        assert callable(getattr(node(), node.FUNCTION))
        assert BY_ID[name].shows == node.OUTPUT_NODE
        assert hasattr(node, "IS_CHANGED") == BY_ID[name].shows
        if BY_ID[name].shows:
            assert math.isnan(node.IS_CHANGED(trigger=1))
    strategy = NODE_CLASS_MAPPINGS["CacheDitConfig"].INPUT_TYPES()["required"]["strategy"]  # type: ignore[attr-defined]
    assert strategy[0] == ["fixed", "dynamic", "adaptive"]
    trigger = NODE_CLASS_MAPPINGS["CacheDitStats"].INPUT_TYPES()["required"]["trigger"][0]  # type: ignore[attr-defined]
    differs = trigger != "LATENT"
    assert not differs and json.dumps(trigger) == '"*"'


def test_without_a_server_there_is_no_entry_point() -> None:
    assert entry_point() is None


def test_the_registry_finds_what_it_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= set(comfy)
    assert "comfyui" not in project["project"]["name"].lower()
    # an address: the registry does not take files
    assert comfy["Icon"].endswith("comfy/web/icon.png")
    assert (ROOT / "comfy/web/icon.png").stat().st_size < 100_000


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_hold_nodes_as_they_are_defined(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    ours = [node for node in workflow["nodes"] if node["type"] in BY_ID]
    assert ours
    for node in ours:
        named = {each["name"] for each in node["inputs"]}
        assert named <= {each.id for each in BY_ID[node["type"]].inputs}
    assert path.with_suffix(".jpg").exists()


def test_there_are_three_example_workflows() -> None:
    assert len(list((ROOT / "example_workflows").glob("*.json"))) == 3
