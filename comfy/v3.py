"""The nodes in ComfyUI's third node interface. Imported by the server alone, which has ``comfy_api``."""

from __future__ import annotations

import inspect
from time import time_ns
from typing import Any

from comfy_api.latest import ComfyExtension, io

from .definitions import Input, Node
from .nodes import NODES

_TYPES = {
    "MODEL": io.Model,
    "INT": io.Int,
    "FLOAT": io.Float,
    "BOOLEAN": io.Boolean,
    "COMBO": io.Combo,
    "STRING": io.String,
    "IMAGE": io.Image,
    "*": io.AnyType,
}


def node_class(node: Node) -> type:
    """The class of one node."""

    def define_schema(cls: type) -> Any:
        return io.Schema(
            node_id=node.id,
            display_name=node.name[0],
            category=node.category,
            description=node.about[0],
            inputs=[_input(each) for each in node.inputs],
            outputs=[_TYPES[each.type].Output(each.id, each.label[0], each.tooltip[0]) for each in node.outputs],
            hidden=[io.Hidden.unique_id],
            is_output_node=node.shows,
            **_known(io.Schema, search_aliases=[node.name[1], "cache", "speed up", "加速", "缓存"]),
        )

    def execute(cls: Any, **inputs: Any) -> Any:
        result = node.run(cls.hidden.unique_id, **inputs)
        return io.NodeOutput(*result.values, ui=dict(result.ui) or None)

    def fingerprint_inputs(cls: type, **inputs: Any) -> int:
        return time_ns()

    of_class: Any = classmethod
    methods = {"define_schema": of_class(define_schema), "execute": of_class(execute)}
    if node.shows:
        methods["fingerprint_inputs"] = of_class(fingerprint_inputs)
    return type(node.id, (io.ComfyNode,), {"__doc__": node.about[1], "__module__": __name__, **methods})


def _input(each: Input) -> Any:
    kind = _TYPES[each.type].Input
    choices = {"options": list(each.choices)} if each.type == "COMBO" else {}
    return kind(
        each.id,
        display_name=each.label[0],
        tooltip=each.tooltip[0],
        optional=each.optional,
        **choices,
        **each.options(),
        **(_known(kind, advanced=True) if each.advanced else {}),
    )


def _known(function: Any, **more: Any) -> dict[str, Any]:
    """Those of the arguments that this version of the server knows."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in more.items() if name in names}


class CacheDitExtension(ComfyExtension):  # type: ignore[misc]
    """What the server asks for the nodes."""

    async def get_node_list(self) -> list[type]:
        """Every node of the pack."""
        return [node_class(node) for node in NODES]


async def comfy_entrypoint() -> CacheDitExtension:
    """ComfyUI calls this after it has loaded the pack."""
    return CacheDitExtension()
