"""The ComfyUI node pack: what the repository's root hands to ComfyUI.

Installed as ``cache_dit.comfy``; ComfyUI's own package is the top-level ``comfy``, which an absolute import finds. Each
node is defined once (``nodes.py``) and offered in the dialect that the server speaks: ``v3.py`` or ``v1.py``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..texts import prefer_language
from .language import chosen_language
from .v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

DIALECT_VARIABLE = "CACHE_DIT_COMFY_NODES"
"""Set to ``v1``, the old interface is used wherever the pack is loaded."""

prefer_language(chosen_language)


def entry_point() -> Callable[..., Any] | None:
    """What a server with the third node interface calls; None on others."""
    if os.environ.get(DIALECT_VARIABLE, "").lower() == "v1" or "comfy_api.latest" not in sys.modules:
        return None
    try:
        found: Callable[..., Any] = importlib.import_module(f"{__name__}.v3").comfy_entrypoint
    except (ImportError, AttributeError, KeyError):
        # an interface that lacks something the nodes need
        return None
    return found


__all__ = ["DIALECT_VARIABLE", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "entry_point"]
