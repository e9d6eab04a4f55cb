"""What ComfyUI loads when this repository lies in its ``custom_nodes`` folder, with nothing installed.

Makes ``import cache_dit`` work for everybody and hands over the nodes. ``sys.path`` stays as it is: with this folder on
it, our folder ``comfy`` would shadow ComfyUI's package of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent


def _loaded_by_comfyui() -> bool:
    """ComfyUI names a pack by its path. Early versions name it by its folder, as pytest does: then its modules tell."""
    return __name__ not in ("__init__", "__main__", _ROOT.name) or "folder_paths" in sys.modules


def _importable() -> Path | None:
    """The folder of what ``import cache_dit`` gives before we do anything; None also for a mere folder of that name."""
    loaded = sys.modules.get("cache_dit")
    spec = None if loaded else importlib.util.find_spec("cache_dit")
    file = loaded.__file__ if loaded else spec and spec.origin
    return Path(file).resolve().parent if file else None


def _is_this_project(package: Path) -> bool:
    """Another checkout, an installed wheel or this one: all have both of our folders inside or beside."""
    return any((place / "passes").is_dir() and (place / "comfy").is_dir() for place in (package, package.parent))


def _load_from_here(name: str) -> ModuleType:
    """Import this repository's ``cache_dit`` as the module ``name``."""
    folder = _ROOT / "cache_dit"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} holds no package: the clone is incomplete")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _our_package() -> str:
    """The name under which this project's package can be imported from now on."""
    present = _importable()
    if present is None:
        return _load_from_here("cache_dit").__name__
    if _is_this_project(present):
        return "cache_dit"
    if "cache_dit_fx" not in sys.modules:
        logging.getLogger("cache_dit_fx").warning(
            "Another project provides the module cache_dit (%s). The nodes work all the same, but Python code finds "
            "this project as cache_dit_fx. To have it as cache_dit, uninstall the other (pip uninstall cache-dit).",
            present,
        )
        _load_from_here("cache_dit_fx")
    return "cache_dit_fx"


if _loaded_by_comfyui():
    _nodes = importlib.import_module(f"{_our_package()}.comfy")
    _entry_point = _nodes.entry_point()
    # a server that finds the mappings does not look for the entry point
    if _entry_point is not None:
        comfy_entrypoint = _entry_point
    else:
        NODE_CLASS_MAPPINGS: dict[str, type] = _nodes.NODE_CLASS_MAPPINGS
        NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = _nodes.NODE_DISPLAY_NAME_MAPPINGS
    if (_ROOT / "comfy" / "web").is_dir():
        WEB_DIRECTORY = "./comfy/web"
