"""Arithmetic in place, written as arithmetic: what a block adds to its input without saying so by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..torch_internals import memory_of
from .graph_values import example_of, mutated_argument, tensors_in
from .module_paths import is_compute

# What writes to its first argument, and what gives the same value without writing.
_OUT_OF_PLACE: dict[Any, Callable[..., Any] | str] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
    "addcmul_": "addcmul",
    "addcdiv_": "addcdiv",
    "lerp_": "lerp",
    "neg_": "neg",
    "clamp_": "clamp",
}


def write_apart(gm: fx.GraphModule) -> int:
    """Make arithmetic in place out of place where nothing else reads that memory later. Returns the number rewritten.

    *Detects* calls such as ``add_`` and ``+=`` on what the graph computed itself.

    *Rewrites to*::

        %y = call_method[add_](%x, %z)                %y = call_method[add](%x, %z)
        %u = use(%x)                          ->      %u = use(%y)

    *Leaves alone* what is written to inputs and weights, and memory that another value shares which is read later.

    *Exact*: the same values; where types differ, the sum is brought back to that of ``%x``, as in place.
    """
    rewritten = 0
    views: dict[int, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        for tensor in tensors_in(example_of(node)):
            views.setdefault(memory_of(tensor), set()).add(node)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        plain = _OUT_OF_PLACE.get(node.target) if is_compute(node) else None
        written = mutated_argument(node)
        if plain is None or written is None:
            continue
        before = example_of(written)
        if not isinstance(before, torch.Tensor):
            continue
        others = views[memory_of(before)] - {written, node}
        if not is_compute(written) or any(_is_read_behind(each, node, order) for each in others):
            continue
        _replace(gm, node, plain, written, before.dtype, order)
        rewritten += 1
    return rewritten


def _is_read_behind(sharing: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a write by ``node`` may be seen through another node that shared the memory before."""
    if order[sharing] > order[node]:
        return False
    return not is_compute(sharing) or any(order.get(user, -1) > order[node] for user in sharing.users)


def _replace(
    gm: fx.GraphModule, node: fx.Node, plain: Any, written: fx.Node, dtype: torch.dtype, order: dict[fx.Node, int]
) -> None:
    with gm.graph.inserting_before(node):
        insert = gm.graph.call_method if isinstance(plain, str) else gm.graph.call_function
        made = insert(plain, node.args, node.kwargs)
        made.meta = dict(node.meta)
        other = [example_of(argument) for argument in node.all_input_nodes if argument is not written]
        if not all(isinstance(each, torch.Tensor) and each.dtype == dtype for each in other):
            made = gm.graph.call_method("to", (made, dtype))
            made.meta = dict(node.meta)
    for user in list(written.users):
        if order.get(user, -1) > order[node]:
            user.replace_input_with(written, made)
    order[made] = order[node]
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
