"""docs/reliability.md: every test that it names is there, and every test here is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    assert len(NAMED) > 60
    assert [f"{path}::{name}" for path, name in NAMED if name not in defined_in(ROOT / path)] == []


def test_every_test_of_this_folder_is_named() -> None:
    named = set(NAMED)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != Path(__file__).name:
            place = path.relative_to(ROOT).as_posix()
            assert sorted(name for name in defined_in(path) if (place, name) not in named) == []
