"""The texts: both languages of each, and the ones that the API document fixes."""

import string
import subprocess
import sys
from pathlib import Path

import pytest

from cache_dit import texts
from cache_dit.texts import TEXTS, resolve_language, text


@pytest.fixture(autouse=True)
def _no_language_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(texts.LANGUAGE_VARIABLE, raising=False)


def fields_of(template: str) -> list[tuple[str, str]]:
    """The fields of a template with their formats."""
    return sorted((name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None)


@pytest.mark.parametrize("key", TEXTS)
def test_each_text_has_both_languages_with_the_same_fields(key: str) -> None:
    chinese, english = TEXTS[key]
    assert chinese.strip() and english.strip()
    assert fields_of(chinese) == fields_of(english)


def is_chinese(template: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in template)


@pytest.mark.parametrize("key", TEXTS)
def test_english_texts_hold_no_chinese_letters(key: str) -> None:
    assert not is_chinese(TEXTS[key][1])


@pytest.mark.parametrize(
    ("variable", "explicit", "expected"),
    [
        (None, None, "zh"),
        ("zh", None, "zh"),
        ("en", None, "en"),
        (" EN ", None, "en"),
        ("fr", None, "zh"),
        ("", None, "zh"),
        ("en", "zh", "zh"),
        ("zh", "en", "en"),
    ],
)
def test_the_language_is_the_argument_then_the_variable_then_chinese(
    variable: str | None, explicit: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(texts.LANGUAGE_VARIABLE, variable)
    assert resolve_language(explicit) == expected
    assert text("enabled", explicit) == {"zh": "启用", "en": "enabled"}[expected]


def test_an_unknown_language_and_an_unknown_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'fr'.*'zh', 'en'"):
        resolve_language("fr")
    with pytest.raises(KeyError):
        text("no such text")
    with pytest.raises(KeyError):
        text("seconds")


def test_texts_of_the_document() -> None:
    assert text("no_transformer").splitlines()[0] == "❌ 未能找到 transformer 组件"
    assert "检查模型类型，确保使用支持的模型架构" in text("no_transformer")
    assert text("already_enabled").splitlines()[0] == "⚠ 模型已经应用过缓存"
    assert "先调用 `disable_cache()` 再重新配置" in text("already_enabled")
    assert "每个模型实例只能应用一次缓存" in text("already_enabled")
    assert "确保插件正确安装到 ComfyUI 的 custom_nodes 目录" in text("import_failed")
    assert text("not_measured") == "未测量"
    assert text("not_measured", "en") == "not measured"
    assert text("not_tracked") == "未统计"
    assert text("not_tracked", "en") == "not measured"
    assert text("no_models") == "暂无已加速的模型"
    assert text("disabled") == "禁用"


def test_values_are_filled_in_as_they_are() -> None:
    assert text("recompiling", "en", what="{shape}") == "recompiling; what changed: {shape}"
    assert text("compiled", "en", seconds=12.34) == "compiled in 12.3 s"


LOAD_UNDER_ANOTHER_NAME = """
import importlib, sys, types
package = types.ModuleType("another_name")
package.__path__ = [sys.argv[1]]
sys.modules["another_name"] = package
for module in ("errors", "texts", "statistics", "options"):
    importlib.import_module("another_name." + module)
heavy = {"torch", "numpy", "cache_dit"} & set(sys.modules)
assert not heavy, heavy
"""


def test_light_modules_load_without_torch_and_under_another_package_name() -> None:
    folder = Path(texts.__file__).parent
    subprocess.run([sys.executable, "-c", LOAD_UNDER_ANOTHER_NAME, str(folder)], check=True)
