"""The language that a user has chosen in ComfyUI's settings, which the server keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# When the settings were last written, and what they said.
_known: tuple[int, str | None] = (0, None)


def chosen_language() -> str | None:
    """``'zh'`` or ``'en'``; None where nothing was chosen, or where users have settings of their own (``--multi-user``)."""
    global _known
    folder_paths: Any = sys.modules.get("folder_paths")
    if folder_paths is None:
        return None
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        written = file.stat().st_mtime_ns
        if written != _known[0]:
            _known = written, _language_of(json.loads(file.read_text(encoding="utf-8")).get("Comfy.Locale"))
    except (OSError, ValueError, AttributeError):
        # no settings yet, or half written ones
        return None
    return _known[1]


def _language_of(locale: object) -> str | None:
    if not isinstance(locale, str) or not locale:
        return None
    return "zh" if locale.lower().startswith("zh") else "en"
