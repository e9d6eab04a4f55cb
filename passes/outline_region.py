"""outline_region: move the cached region into a submodule with explicit inputs and outputs."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..torch_internals import graph_module_like
from .choose_region import Region
from .graph_values import example_of

REGION_NAME = "cache_region"
# Meta key of the nodes of a block, (number of its list, number of the block): they stay together, in the region and outside.
BLOCK = "cache_dit_block"


def outline_region(gm: fx.GraphModule, region: Region) -> int:
    """Replace the nodes of ``region`` by one call of a submodule. Returns 1.

    *Detects* nothing: :func:`choose_region` did.

    *Rewrites to*::

        %h1 = block_0(%x)                       %h1 = block_0(%x)
        %h2 = block_1(%h1, %temb)        ->     %region = cache_region(%h1, %temb, %weights…)
        %h3 = block_2(%h2, %temb)               %h3 = getitem(%region, 0)
        %y = head(%h3)                          %y = head(%h3)

    Live-ins that the region writes to in place are copied first. Tensors that are attributes of the graph become
    inputs too, so that the submodule stands alone.

    *Refuses when*: never; the analysis has refused before.

    *Exact*: the same operations run in the same order, hoisted ones earlier.
    """
    graph = gm.graph
    for label, nodes in region.blocks.items():
        for node in nodes:
            node.meta[BLOCK] = label
    anchor = region.nodes[0]
    for node in region.hoisted:
        anchor.prepend(node)
    body, arguments = _body(gm, region)
    gm.add_submodule(REGION_NAME, graph_module_like(gm, gm, body))
    with graph.inserting_before(anchor):
        operands = [_operand(graph, node) for node in arguments]
        call = graph.call_module(REGION_NAME, tuple(operands))
        outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(region.live_outs))]
    call.meta["example_value"] = tuple(example_of(out.node) for out in region.live_outs)
    inside = set(region.nodes)
    for out, output in zip(region.live_outs, outputs, strict=True):
        output.meta = dict(out.node.meta)
        for user in list(out.node.users):
            if user not in inside:
                user.replace_input_with(out.node, output)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    return 1


def _body(gm: fx.GraphModule, region: Region) -> tuple[fx.Graph, list[fx.Node]]:
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    arguments = [node for node in region.live_ins if not _is_submodule(gm, node)]
    for node in arguments:
        placeholder = body.placeholder(node.name)
        placeholder.meta = dict(node.meta)
        copies[node] = placeholder
    for node in region.live_ins:
        if _is_submodule(gm, node):
            copies[node] = body.node_copy(node)
    for node in region.copied_live_ins:
        copies[node] = body.call_method("clone", (copies[node],))
        example = example_of(node)
        copies[node].meta["example_value"] = example.clone() if isinstance(example, torch.Tensor) else example
    for node in region.nodes:
        copies[node] = body.node_copy(node, lambda argument: copies[argument])
    body.output(tuple(copies[out.node] for out in region.live_outs))
    return body, arguments


def _is_submodule(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node names a nested graph (of a higher-order operator): these cannot be passed as an input."""
    if node.op != "get_attr":
        return False
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return not isinstance(value, torch.Tensor)


def _operand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.op != "get_attr":
        return node
    again = graph.get_attr(str(node.target))
    again.meta = dict(node.meta)
    return again
