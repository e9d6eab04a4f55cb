"""The shape of a node: what both dialects of ComfyUI's node interface, and the files of texts, are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Words = tuple[str, str]
"""A text in Chinese, which is the language of the definitions, and in English."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input: its id as workflow files and API calls have it, its type, label, tooltip and, of a widget, its range."""

    id: str
    type: str
    label: Words
    tooltip: Words
    default: Any = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    advanced: bool = False

    def options(self) -> dict[str, Any]:
        """What ComfyUI's interface takes beside the id and the type; only what is set."""
        named = {"default": self.default, "min": self.low, "max": self.high, "step": self.step}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output."""

    id: str
    type: str
    label: Words
    tooltip: Words


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of a node gives: its outputs, and what the browser is told."""

    values: tuple[Any, ...]
    ui: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node. ``run(node_id, **inputs)``; ``shows``: it stands at the end of a workflow and runs at every prompt."""

    id: str
    name: Words
    category: str
    about: Words
    inputs: Sequence[Input]
    outputs: Sequence[Output]
    run: Callable[..., Result]
    shows: bool = False
