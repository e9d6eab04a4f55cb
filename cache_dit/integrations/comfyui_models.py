"""What the code of a model says of it: whether ComfyUI's wrappers reach it, and which of the options it may read."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

_MAX_DEPTH = 4
# Classes whose code names the wrappers, and whose calls did not reach them all the same.
unreached: set[type] = set()


def reaches_wrappers(kind: type) -> bool:
    """Whether ``DIFFUSION_MODEL`` wrappers are where a model of this class is to be cached."""
    return kind not in unreached and wraps_itself(kind)


@functools.lru_cache(maxsize=256)
def wraps_itself(kind: Any) -> bool:
    """Whether calls of a model of this class go through ComfyUI's ``DIFFUSION_MODEL`` wrappers, by what its code names."""
    return _names(kind, "forward", "DIFFUSION_MODEL", _MAX_DEPTH)


def _names(kind: type, method: str, wanted: str, depth: int) -> bool:
    """Whether a method, or one that it names, names ``wanted``."""
    for owner in kind.__mro__:
        function = owner.__dict__.get(method)
        if not isinstance(function, FunctionType) or not owner.__module__ or owner is torch.nn.Module:
            continue
        names = _all_names(function.__code__)
        if wanted in names:
            return True
        return depth > 0 and any(
            name != method and isinstance(getattr(kind, name, None), FunctionType) and _names(kind, name, wanted, depth - 1)
            for name in names
        )
    return False


def _all_names(code: CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names, *(name for each in inner for name in _all_names(each))}


class Mentions:
    """Which of ComfyUI's ``transformer_options`` a model may read: those whose names its source files hold as text.

    All others are kept from the compiled function, which would be traced again whenever one of them changes: another
    number of steps, another pack's entry, new ids at each prompt.
    """

    _known: dict[type, Mentions] = {}  # noqa: RUF012
    # never read by a model, and new at each prompt
    _NEVER = frozenset({"wrappers", "callbacks", "uuids"})
    # with one of these a function of another pack runs inside the model and may read whatever it likes
    _FOREIGN = ("patches", "patches_replace", "optimized_attention_override")

    def __init__(self, module: torch.nn.Module) -> None:
        self._source = _source_around(module)
        self._keys: dict[str, bool] = {}

    @classmethod
    def of(cls, module: torch.nn.Module) -> Mentions:
        """The one for all models of a class."""
        kind = type(module)
        if kind not in cls._known:
            cls._known[kind] = cls(module)
        return cls._known[kind]

    def trimmed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the model may read."""
        if any(options.get(name) for name in self._FOREIGN):
            return {name: value for name, value in options.items() if name not in self._NEVER}
        return {name: value for name, value in options.items() if name not in self._NEVER and self._reads(name)}

    def _reads(self, name: str) -> bool:
        known = self._keys.get(name)
        if known is None:
            found = re.search(rf"""['"]{re.escape(str(name))}['"]""", self._source) is not None
            known = self._keys[name] = found
        return known


def _source_around(module: torch.nn.Module) -> str:
    """The source of the modules that define the model's parts, and of those of the same package that they use."""
    found: dict[str, str] = {}
    waiting = [type(part).__module__ for part in module.modules()]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in _FOREIGN_PACKAGES:
            continue
        python_module = sys.modules.get(name)
        if python_module is None:
            continue
        found[name] = _source_of(python_module)
        waiting.extend(used for used in map(_module_name, vars(python_module).values()) if used and _is_near(name, used))
    return "\n".join(found.values())


_FOREIGN_PACKAGES = frozenset({"torch", "einops", "numpy", "builtins", "typing", "math", "logging"})
# The parts of ComfyUI that models are made of; the rest of it names the options only to fill them in.
_MODEL_PARTS = ("comfy.ldm", "comfy.ops")


def _is_near(user: str, used: str) -> bool:
    if user.startswith("comfy."):
        return used.startswith(_MODEL_PARTS)
    return used.partition(".")[0] == user.partition(".")[0] or used.startswith(_MODEL_PARTS)


def _module_name(value: object) -> str | None:
    if isinstance(value, ModuleType):
        return value.__name__
    return value.__module__ if isinstance(value, (type, FunctionType)) else None


def _source_of(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        file = getattr(module, "__file__", None)
        return Path(file).read_text(errors="replace") if file and file.endswith(".py") else ""

