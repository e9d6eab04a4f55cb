"""Writing in place, written as making something new: what a block does to its input without saying so by name."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import fx

from ..torch_internals import is_higher_order, memory_of
from .graph_values import example_of, is_mutation, mutated_argument, tensors_in, viewed_argument
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


def write_apart(gm: fx.GraphModule, *, copying: bool = False) -> int:
    """Let what writes in place to memory of the graph's own make something new. Returns the number rewritten.

    *Detects* calls such as ``add_`` and ``+=`` on what the graph computed itself; with ``copying`` every other write too,
    also through a view.

    *Rewrites to*::

        %y = call_method[add_](%x, %z)                %y = call_method[add](%x, %z)
        %u = use(%x)                          ->      %u = use(%y)

        %v = getitem(%x, 0)                           %c = clone(%x)
        %y = call_method[add_](%v, %z)                %w = getitem(%c, 0)
        %u = use(%x)                          ->      %y = call_method[add_](%w, %z)
                                                      %u = use(%c)

    *Leaves alone* what is written to inputs and weights and, without ``copying``, memory that another value shares which is
    read later.

    *Exact*: the same values; where types differ, the sum is brought back to that of ``%x``, as in place.
    """
    memory = _Memory(gm)
    rewritten = 0
    for node in list(gm.graph.nodes):
        written = mutated_argument(node)
        if written is None or not isinstance(example_of(written), torch.Tensor) or not memory.is_own(written, node):
            continue
        others = memory.read_behind(written, node)
        plain = _OUT_OF_PLACE.get(node.target)
        if plain is not None and not others:
            _out_of_place(gm, node, plain, written, memory)
        elif not copying or not _to_a_copy(gm, node, written, others, memory):
            continue
        rewritten += 1
    return rewritten


class _Memory:
    """Which nodes of a graph share memory, kept up to date while writes are taken out of it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.order: dict[fx.Node, int] = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._key: dict[fx.Node, int] = {}
        self._sharing: dict[int, set[fx.Node]] = {}
        # nodes that have memory of their own, though they took the place of some that had not
        self._owners: set[fx.Node] = set()
        for node in gm.graph.nodes:
            viewed = viewed_argument(node)
            for tensor in tensors_in(example_of(node)):
                own = memory_of(tensor)
                self._key[node] = own if viewed is None else self._key.get(viewed, own)
                self._sharing.setdefault(self._key[node], set()).add(node)

    def is_own(self, written: fx.Node, node: fx.Node) -> bool:
        """Whether nothing outside of the graph has the memory that ``node`` writes to."""
        return is_compute(written) and all(is_compute(each) for each in self._before(written, node))

    def read_behind(self, written: fx.Node, node: fx.Node) -> list[fx.Node]:
        """What shares the memory of ``written`` beside it and is read behind ``node``, in order."""
        found = [each for each in self._before(written, node) if each is not written and self._users_behind(each, node)]
        return sorted(found, key=self.order.__getitem__)

    def redirect(self, old: fx.Node, new: fx.Node, node: fx.Node) -> None:
        """What reads ``old`` behind ``node`` reads ``new`` instead; views that are made of it tell whose memory is theirs."""
        for user in self._users_behind(old, node):
            user.replace_input_with(old, new)
        behind = [each for each in self._sharing[self._key[old]] if self.order[each] > self.order[node]]
        for each in sorted(behind, key=self.order.__getitem__):
            source = self.source(each)
            if source is not None:
                each.meta["example_value"] = example_of(source) if is_mutation(each) else _run(each)

    def add(self, new: fx.Node, old: fx.Node, node: fx.Node, *, owner: bool = False) -> None:
        """``new``, made at the place of ``node``, stands for ``old``. Both count as one memory."""
        self.order[new], self._key[new] = self.order[node], self._key[old]
        self._sharing[self._key[old]].add(new)
        if owner:
            self._owners.add(new)

    def forget(self, node: fx.Node) -> None:
        """``node`` is no longer in the graph."""
        for sharing in self._sharing.values():
            sharing.discard(node)

    def source(self, node: fx.Node) -> fx.Node | None:
        """The node that ``node`` is a view of, or the result in place; None where the memory begins with it."""
        if node in self._owners:
            return None
        if is_mutation(node):
            return mutated_argument(node)
        key = self._key[node]
        return next((each for each in node.all_input_nodes if self._key.get(each) == key), None)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that the memory of ``node`` begins with."""
        source = self.source(node)
        return node if source is None else self.root(source)

    def _before(self, written: fx.Node, node: fx.Node) -> Iterable[fx.Node]:
        sharing = self._sharing.get(self._key.get(written, -1), set())
        return [each for each in sharing if each is not node and self.order[each] <= self.order[node]]

    def _users_behind(self, node: fx.Node, place: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if self.order.get(user, -1) > self.order[place]]


def _out_of_place(gm: fx.GraphModule, node: fx.Node, plain: Any, written: fx.Node, memory: _Memory) -> None:
    value = example_of(written)
    assert isinstance(value, torch.Tensor)
    others = [example_of(argument) for argument in node.all_input_nodes if argument is not written]
    dtypes = [each.dtype for each in others if isinstance(each, torch.Tensor)]
    with gm.graph.inserting_before(node):
        insert = gm.graph.call_method if isinstance(plain, str) else gm.graph.call_function
        made = insert(plain, node.args, node.kwargs)
        # dense, as a result is, where what was written to need not be
        made.meta = {**node.meta, "example_value": value.clone().to(functools.reduce(torch.promote_types, dtypes, value.dtype))}
        if len(dtypes) < len(others) or any(dtype != value.dtype for dtype in dtypes):
            made = gm.graph.call_method("to", (made, value.dtype))
            made.meta = {**node.meta, "example_value": value.clone()}
    memory.add(made, written, node, owner=True)
    memory.redirect(written, made, node)
    node.replace_all_uses_with(made)
    memory.forget(node)
    gm.graph.erase_node(node)


def _to_a_copy(gm: fx.GraphModule, node: fx.Node, written: fx.Node, others: list[fx.Node], memory: _Memory) -> bool:
    """Copy the whole of the memory before it is written to; what is read of it later is read from the copy."""
    needed = [*others, written]
    root = memory.root(written)
    if any(memory.root(each) is not root for each in others):
        return False
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(each: fx.Node) -> fx.Node:
        if each not in copies:
            copies[each] = made(each)
        return copies[each]

    def made(each: fx.Node) -> fx.Node:
        source = memory.source(each)
        if source is not None and is_mutation(each):
            return copy_of(source)
        if source is not None:
            view = gm.graph.node_copy(each, lambda argument: copy_of(argument) if argument is source else argument)
        else:
            view = gm.graph.call_method("clone", (each,))
        view.meta = {**node.meta, "example_value": _run(view)}
        memory.add(view, each, node, owner=source is None)
        return view

    with gm.graph.inserting_before(node):
        replaced = {each: copy_of(each) for each in needed}
    for each, copy in replaced.items():
        memory.redirect(each, copy, node)
        node.replace_input_with(each, copy)
    return True


def _run(node: fx.Node) -> Any:
    """The example value of a copy or view, from those of its arguments."""
    if is_higher_order(node.target):
        return example_of(node)
    args: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: cast(Any, example_of(argument)))
    return getattr(args[0], node.target)(*args[1:], **kwargs) if isinstance(node.target, str) else node.target(*args, **kwargs)
