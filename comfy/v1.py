"""The nodes for servers of before ComfyUI's third node interface: classes with ``INPUT_TYPES``."""

from __future__ import annotations

from typing import Any

from .definitions import Input, Node
from .nodes import NODES


class AnyType(str):
    """The type ``*``, which differs from none: servers up to 0.3.75 at least compare the types of a link with ``!=``."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")


def node_class(node: Node) -> type:
    """The class of one node."""

    def input_types(cls: type) -> dict[str, Any]:
        return {
            "required": {each.id: _typed(each) for each in node.inputs if not each.optional},
            "optional": {each.id: _typed(each) for each in node.inputs if each.optional},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def execute(self: object, unique_id: str | None = None, **inputs: Any) -> Any:
        result = node.run(unique_id, **inputs)
        return {"ui": dict(result.ui), "result": result.values} if result.ui else result.values

    def never_equal(cls: type, **inputs: Any) -> float:
        return float("nan")

    of_class: Any = classmethod
    fresh = {"IS_CHANGED": of_class(never_equal)} if node.shows else {}
    return type(
        node.id,
        (),
        {
            "__doc__": node.about[1],
            "__module__": __name__,
            "INPUT_TYPES": of_class(input_types),
            "RETURN_TYPES": tuple(each.type for each in node.outputs),
            "RETURN_NAMES": tuple(each.label[0] for each in node.outputs),
            "OUTPUT_TOOLTIPS": tuple(each.tooltip[0] for each in node.outputs),
            "FUNCTION": "execute",
            "CATEGORY": node.category,
            "DESCRIPTION": node.about[0],
            "OUTPUT_NODE": node.shows,
            "execute": execute,
            **fresh,
        },
    )


def _typed(each: Input) -> tuple[Any, dict[str, Any]]:
    more = {**each.options(), "tooltip": each.tooltip[0], "display_name": each.label[0]}
    if each.advanced:
        more["advanced"] = True
    kind: Any = list(each.choices) if each.type == "COMBO" else ANY if each.type == ANY else each.type
    return kind, more


NODE_CLASS_MAPPINGS: dict[str, type] = {node.id: node_class(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {node.id: node.name[0] for node in NODES}
