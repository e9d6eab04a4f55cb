"""cache_dit: caching for diffusion transformers as a compiler pass.

Three ways in: ``torch.compile(model, backend="cache_dit")``, :func:`enable_cache`, and the ComfyUI nodes.

The way of a call: ``api.py`` (what the user asks) -> ``backend.py`` (graph in, callable out) -> ``passes/`` (the
rewrite) -> ``lowering/`` (the rewritten graph to compiled programs) -> ``runtime/`` (decides at every call).

Importing this package is light: the public names load their modules on first use, because torch imports this package
itself, at the end of ``import torch``, where ``TORCH_LOGS="+cache_dit"`` is set.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        cached,
        context,
        disable,
        disable_cache,
        enable,
        enable_cache,
        explain,
        get_global_stats,
        get_stats,
        new_run,
        reset_cache_stats,
        set_global_config,
        stats,
        summary,
    )
    from .artifact.export import export
    from .artifact.load import load
    from .calibration import Calibration, calibrate
    from .errors import CacheDitError
    from .explanation import Explanation
    from .options import CacheOptions
    from .statistics import CacheStats

__version__ = "0.1.0"

_HOME = {
    "api": (
        "cached",
        "context",
        "disable",
        "disable_cache",
        "enable",
        "enable_cache",
        "explain",
        "get_global_stats",
        "get_stats",
        "new_run",
        "reset_cache_stats",
        "set_global_config",
        "stats",
        "summary",
    ),
    "artifact.export": ("export",),
    "artifact.load": ("load",),
    "calibration": ("Calibration", "calibrate"),
    "errors": ("CacheDitError",),
    "explanation": ("Explanation",),
    "options": ("CacheOptions",),
    "statistics": ("CacheStats",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CacheDitError",
    "CacheOptions",
    "CacheStats",
    "Calibration",
    "Explanation",
    "cached",
    "calibrate",
    "context",
    "disable",
    "disable_cache",
    "enable",
    "enable_cache",
    "explain",
    "export",
    "get_global_stats",
    "get_stats",
    "load",
    "new_run",
    "reset_cache_stats",
    "set_global_config",
    "stats",
    "summary",
]


def __getattr__(name: str) -> object:
    """Load a public name from the module that holds it, once."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# In a checkout the folders `passes` and `comfy` lie beside this one; a wheel has them inside.
_own_folder = Path(__file__).resolve().parent
if not (_own_folder / "passes").is_dir():
    __path__.append(str(_own_folder.parent))

from .registration import offer_backend  # noqa: E402

offer_backend(__name__, __version__)
del offer_backend
