"""The form with two whole graphs: one that computes the region and one that predicts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from torch import fx

from ..passes.specialize_branch import specialize_branch
from ..runtime.program import FlatCall, Programs
from ..torch_internals import copy_dynamo_graph, fill_examples, record_rewrite, taking_a_list


def lower_specialize(
    gm: fx.GraphModule, examples: Sequence[Any], compile_inner: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Programs:
    """Compile the graph once for each decision.

    The reuse graph comes first: AOT autograd leaves notes about the graph it compiled last, and the tracer reads them.
    """
    reuse = _specialized(gm, examples, compile_inner, compute=False)
    compute = _specialized(gm, examples, compile_inner, compute=True)
    return Programs(compute, reuse)


def _specialized(gm: fx.GraphModule, examples: Sequence[Any], compile_inner: Callable[..., Any], compute: bool) -> FlatCall:
    graph, kept = specialized_graph(gm, compute=compute)
    run = compile_inner(graph, [examples[i] for i in kept])
    pick = itemgetter(*kept) if len(kept) > 1 else itemgetter(slice(kept[0], kept[0] + 1))
    inside = taking_a_list(run)
    if inside is not None:
        return lambda flat: inside(list(pick(flat)))
    return lambda flat: run(*pick(flat))


def specialized_graph(gm: fx.GraphModule, *, compute: bool) -> tuple[fx.GraphModule, list[int]]:
    """The graph of one decision, and which of the inputs it still takes."""
    graph = copy_dynamo_graph(gm)
    folded = specialize_branch(graph, compute=compute)
    kept = _drop_unused_inputs(graph)
    fill_examples(graph)
    graph.graph.lint()
    graph.recompile()
    record_rewrite("specialize_branch", folded, graph)
    return graph, kept


def _drop_unused_inputs(gm: fx.GraphModule) -> list[int]:
    """Erase placeholders that nothing reads: a program that skips the blocks takes none of their weights."""
    kept = []
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(placeholders):
        if node.users:
            kept.append(i)
        else:
            gm.graph.erase_node(node)
    return kept
