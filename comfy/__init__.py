"""The ComfyUI node pack: what the repository's root hands to ComfyUI.

Installed as ``cache_dit.comfy``; ComfyUI's own package is the top-level ``comfy``, which an absolute import finds.
"""

from __future__ import annotations

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
