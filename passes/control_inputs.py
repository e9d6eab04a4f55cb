"""control_inputs: which inputs of a graph enter the region by a way of their own, past the blocks that always compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from .choose_region import Region
from .graph_values import example_of, is_parameter
from .module_paths import in_module


def control_inputs(gm: fx.GraphModule, region: Region) -> tuple[int, ...]:
    """Places among the graph's inputs of those that a skipped step does not hear.

    *Detects* floating-point inputs of three dimensions and more (a picture, tokens, a volume) from which a live-in is
    made without passing through a block of the front, and which the first block does not take: the outputs of a control
    network, the embeddings of a reference picture. Run it before the region is outlined.

    *Rewrites* nothing: this is an analysis.

    *Refuses* never; () where there is none.
    """
    bases = [out.base for out in region.live_outs if out.base is not None]
    first = [node for node in gm.graph.nodes if region.front and in_module(node, region.front[0])]
    heard = _sources(first or bases)
    entering = _sources(
        (*region.live_ins, *region.hoisted), lambda node: not any(in_module(node, path) for path in region.front)
    )
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return tuple(i for i, node in enumerate(placeholders) if node in entering - heard and _is_signal(node))


def _sources(nodes: Iterable[fx.Node], passes: Callable[[fx.Node], bool] = lambda node: True) -> set[fx.Node]:
    """The nodes and everything they are made from, through nodes that ``passes`` lets through."""
    pending = list(nodes)
    seen = set(pending)
    while pending:
        node = pending.pop()
        if passes(node):
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            pending.extend(new)
    return seen


def _is_signal(node: fx.Node) -> bool:
    value = example_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3 and not is_parameter(node)
