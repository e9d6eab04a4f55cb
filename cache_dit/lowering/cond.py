"""The form with the branch inside: one artifact, whose predicate is an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..passes.graph_values import example_of
from ..runtime.program import Programs
from ..torch_internals import copy_dynamo_graph, is_distributed
from .unsuited import Unsuited


def lower_cond(
    gm: fx.GraphModule, examples: Sequence[Any], compile_inner: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Programs:
    """Compile the graph whole. Both programs are the same callable; the first cache input says which branch runs.

    Raises:
        Unsuited: distributed tensors are among the values: cond takes no device meshes (seen in torch 2.13).
    """
    if any(is_distributed(example_of(node)) for node in gm.graph.nodes):
        raise Unsuited("distributed")
    graph = copy_dynamo_graph(gm)
    graph.graph.lint()
    graph.recompile()
    run = compile_inner(graph, examples)

    def call(flat: Sequence[Any]) -> Sequence[Any]:
        result: Sequence[Any] = run(*flat)
        return result

    return Programs(call, call)
