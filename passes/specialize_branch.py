"""specialize_branch: fold the branch for a decision that the host has taken."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .graph_values import is_removable
from .insert_cache_branch import COMPUTE_NAME, COND_ONLY, REUSE_NAME


def specialize_branch(gm: fx.GraphModule, *, compute: bool) -> int:
    """Inline the branch taken and drop what only the other one needed. Returns the number of branches folded.

    *Detects* the ``cond`` that :func:`insert_cache_branch` left.

    *Rewrites to*::

        %region = cond(%pred, compute, reuse, (…))         the nodes of compute, or of reuse
        %h = getitem(%region, 0)                     ->     (%h is their output itself)

    *Refuses when* there is none: returns 0 and leaves the graph alone, so a second run changes nothing.

    *Exact*: copies that only the cond form needs (its branches must agree in layout) are left out.
    """
    graph = gm.graph
    folded = 0
    for cond in [node for node in graph.nodes if node.target is torch.ops.higher_order.cond]:
        if cond.args[1].target != COMPUTE_NAME:
            continue
        _inline(gm, cond, getattr(gm, COMPUTE_NAME if compute else REUSE_NAME))
        folded += 1
    if folded:
        _remove_unused(graph)
        for name in (COMPUTE_NAME, REUSE_NAME):
            gm.delete_submodule(name)
    return folded


def _inline(gm: fx.GraphModule, cond: fx.Node, branch: fx.GraphModule) -> None:
    graph = gm.graph
    operands = cond.args[3]
    assert isinstance(operands, (tuple, list))
    placeholders = [node for node in branch.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    results: Any = ()
    with graph.inserting_before(cond):
        for node in branch.graph.nodes:
            if node.op == "output":
                results = fx.node.map_arg(node.args[0], lambda argument: copies[argument])
            elif node.meta.get(COND_ONLY) and node.op == "call_method":
                copies[node] = copies[node.args[0]]
            elif node.op == "get_attr":
                copies[node] = _adopted(gm, branch, node)
            elif node.op != "placeholder":
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    assert isinstance(results, tuple)
    for user in list(cond.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"unexpected user of the branch: {user}")
        place: Any = user.args[1]
        user.replace_all_uses_with(results[place])
        graph.erase_node(user)
    branches = [cond.args[1], cond.args[2]]
    graph.erase_node(cond)
    for attribute in branches:
        assert isinstance(attribute, fx.Node)
        graph.erase_node(attribute)


def _adopted(gm: fx.GraphModule, branch: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Give the parent the attribute (a nested graph) that the branch refers to."""
    name = str(node.target)
    if not hasattr(gm, name):
        gm.add_submodule(name, branch.get_submodule(name))
    copy = gm.graph.get_attr(name)
    copy.meta = dict(node.meta)
    return copy


def _remove_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and is_removable(node):
            graph.erase_node(node)
