"""The files of texts that ComfyUI's front end reads, made from the definitions: ``python -m cache_dit.comfy.locales``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .definitions import Node
from .nodes import CATEGORY_NAMES, NODES

LANGUAGES = ("zh", "en")


def files(root: Path) -> dict[Path, str]:
    """Each file below the repository's root, and what it holds."""
    found: dict[Path, str] = {}
    for place, language in enumerate(LANGUAGES):
        nodes = {node.id: _texts_of(node, place) for node in NODES}
        names = {zh: (zh, en)[place] for zh, en in CATEGORY_NAMES.items()}
        folder = root / "locales" / language
        found[folder / "nodeDefs.json"] = _as_json(nodes)
        found[folder / "main.json"] = _as_json({"nodeCategories": names})
    return found


def _texts_of(node: Node, place: int) -> dict[str, Any]:
    return {
        "display_name": node.name[place],
        "description": node.about[place],
        "inputs": {each.id: {"name": each.label[place], "tooltip": each.tooltip[place]} for each in node.inputs},
        "outputs": {
            str(i): {"name": each.label[place], "tooltip": each.tooltip[place]} for i, each in enumerate(node.outputs)
        },
    }


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    """Write the files."""
    root = Path(__file__).resolve().parents[1]
    for path, content in files(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
