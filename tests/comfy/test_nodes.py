"""The nodes without a server: what both dialects are made from, the files of texts, the help pages, the old dialect."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cache_dit.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, entry_point
from cache_dit.comfy.definitions import Node
from cache_dit.comfy.display import NodeDisplay, show_text
from cache_dit.comfy.locales import files
from cache_dit.comfy.nodes import ADVANCED, BASIC, NODES

from cache_dit.options import resolve_options
from cache_dit.texts import LANGUAGE_VARIABLE, text

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
        "end_percent", "correction",
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


def test_the_registrys_archive_holds_all_that_comfyui_reads() -> None:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines if line and not line.startswith("#")}
    assert all((ROOT / name).is_dir() for name in left_out)
    read = {"__init__.py", "cache_dit", "passes", "comfy", "locales", "example_workflows", "pyproject.toml", "LICENSE", "docs"}
    assert not left_out & read


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


@pytest.mark.parametrize(
    ("settings", "variable", "expected"),
    (
        (None, None, "zh"),
        ("{}", None, "zh"),
        ('{"Comfy.Locale": "en"}', None, "en"),
        ('{"Comfy.Locale": "fr"}', None, "en"),
        ('{"Comfy.Locale": "zh-TW"}', None, "zh"),
        ('{"Comfy.Locale": "en"}', "zh", "zh"),
        ('{"Comfy.Loc', None, "zh"),
        ("[]", None, "zh"),
    ),
)
def test_texts_follow_the_language_chosen_in_the_servers_settings(
    settings: str | None, variable: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_paths: Any = types.ModuleType("folder_paths")
    folder_paths.get_user_directory = lambda: str(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    monkeypatch.delenv(LANGUAGE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(LANGUAGE_VARIABLE, variable)
    if settings is not None:
        (tmp_path / "default").mkdir()
        (tmp_path / "default/comfy.settings.json").write_text(settings)
    assert text("enabled") == {"zh": "启用", "en": "enabled"}[expected]


def test_another_choice_is_heard_at_the_next_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_paths: Any = types.ModuleType("folder_paths")
    folder_paths.get_user_directory = lambda: str(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    monkeypatch.delenv(LANGUAGE_VARIABLE, raising=False)
    file = tmp_path / "default/comfy.settings.json"
    file.parent.mkdir()
    said = []
    for moment, language in enumerate(("en", "zh", "ja")):
        file.write_text(json.dumps({"Comfy.Locale": language}))
        os.utime(file, ns=(moment, moment))
        said.append(text("enabled"))
    assert said == ["enabled", "启用", "enabled"]


def test_texts_on_a_node_keep_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    server: Any = types.ModuleType("server")
    instance = types.SimpleNamespace(send_progress_text=lambda message, node: shown.append((node, message)))
    server.PromptServer = types.SimpleNamespace(instance=instance)
    monkeypatch.setitem(sys.modules, "server", server)
    show_text("7", "all:\n  calls: 3\n    hits: 1")
    NodeDisplay("8").ended("skipped 3 of 8 steps, measured speed-up 1.4x")
    NodeDisplay("9").ended("跳过 3/8 步，实测加速 1.4x")
    assert shown == [
        ("7", "all:\n\u00a0\u00a0calls: 3\n\u00a0\u00a0\u00a0\u00a0hits: 1"),
        ("8", "skipped 3 of 8 steps,\nmeasured speed-up 1.4x"),
        ("9", "跳过 3/8 步，\n实测加速 1.4x"),
    ]
