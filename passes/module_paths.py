"""Which numbered modules an FX node belongs to, read from the ``nn_module_stack`` that Dynamo leaves on it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from torch import fx

# Dynamo writes one path in several ways, by how the model reached the module (seen in torch 2.11 and 2.13).
_SPELLINGS = (
    (re.compile(r"\.__dict__\['_modules'\]\['([^']*)'\]"), r".\1"),
    (re.compile(r"\._modules\['([^']*)'\]"), r".\1"),
    (re.compile(r"\.__dict__\['_modules'\]"), ""),
    (re.compile(r"\._modules"), ""),
    (re.compile(r"\['([^']*)'\]"), r".\1"),
    (re.compile(r"\[(\d+)\]"), r".\1"),
)
_ROOT = re.compile(r"^L\['[^']*'\]")
_CALL_TAG = re.compile(r"@\d+")
_TRAILING_NUMBER = re.compile(r"(.*\D)(\d+)")

COMPUTE_OPS = frozenset({"call_function", "call_method", "call_module"})


class Membership(NamedTuple):
    """One numbered module that a node belongs to: ``container`` holds it under ``number``."""

    container: str
    number: int
    class_name: str


def is_compute(node: fx.Node) -> bool:
    """Whether the node does work, in contrast to placeholders, attributes and the output."""
    return node.op in COMPUTE_OPS


@lru_cache(maxsize=65536)
def normalize_path(path: str) -> str:
    """``L['self']._modules['blocks'].3`` -> ``blocks.3``."""
    path = _ROOT.sub("", path)
    for spelling, plain in _SPELLINGS:
        path = spelling.sub(plain, path)
    return _CALL_TAG.sub("", path.replace("getattr", "").strip("."))


def module_entries(node: fx.Node) -> list[tuple[str, str]]:
    """(path, class name) of the modules the node was traced in, outermost first; empty where it has no stack."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(normalize_path(path), getattr(cls, "__name__", str(cls))) for path, cls in stack.values()]


def module_calls(node: fx.Node) -> list[tuple[str, str, int]]:
    """As :func:`module_entries`, with the number of the call: 0 where a module runs for the first time in its graph."""
    stack = node.meta.get("nn_module_stack") or {}
    numbers = [int(key.rpartition("@")[2]) if "@" in key else 0 for key in map(str, stack)]
    return [(*entry, number) for entry, number in zip(module_entries(node), numbers, strict=True)]


def in_module(node: fx.Node, path: str) -> bool:
    """Whether the node was traced inside the module at ``path``."""
    return any(entry == path or entry.startswith(path + ".") for entry, _ in module_entries(node))


def memberships(node: fx.Node) -> list[Membership]:
    """The numbered modules a node belongs to, outermost first.

    The number is taken from any prefix of any entry of the stack: a ``ModuleList`` of parts is never called itself.
    Attributes that end in a number (``block0``, ``block1``) count as a container ``block*``.
    """
    entries = module_entries(node)
    class_of = dict(entries)
    found: dict[tuple[str, int], Membership] = {}
    for path, _ in entries:
        tokens = path.split(".")
        for position, token in enumerate(tokens):
            numbered = _number_of(tokens[:position], token)
            if numbered is not None and numbered not in found:
                full = ".".join(tokens[: position + 1])
                found[numbered] = Membership(*numbered, class_of.get(full, ""))
    return list(found.values())


def _number_of(prefix: list[str], token: str) -> tuple[str, int] | None:
    if token.isdigit():
        return ".".join(prefix), int(token)
    match = _TRAILING_NUMBER.fullmatch(token)
    if match is None:
        return None
    return ".".join([*prefix, match[1] + "*"]), int(match[2])


def block_path(container: str, index: int) -> str:
    """The module path of block ``index`` of a container as :func:`memberships` names it."""
    if container.endswith("*"):
        return f"{container[:-1]}{index}"
    return f"{container}.{index}" if container else str(index)
