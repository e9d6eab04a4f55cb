"""choose_region: the interval of the graph that is cached, what enters it, what leaves it and what it adds to."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from .find_blocks import MULTIPLIES, BlockChains, BlockList
from .graph_values import (
    example_of,
    is_mutation,
    is_parameter,
    is_random,
    is_removable,
    knows_memory,
    mutated_argument,
    name_of,
    shape_key,
    viewed_argument,
)
from .module_paths import in_module, is_compute

# How far behind the last block the end of the region may move, in nodes.
MAX_TAIL_NODES = 40

_ADDITIVE = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, torch.addcmul, torch.lerp, torch.where}
_ADDITIVE_METHODS = {"add", "add_", "sub"}
_SHAPING_METHODS = frozenset(
    {
        "to",
        "type_as",
        "contiguous",
        "clone",
        "view",
        "reshape",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "clip",
        "clamp",
        "expand",
        "float",
        "half",
        "bfloat16",
        "double",
        "split",
        "chunk",
        "split_with_sizes",
        "type",
        "unbind",
        "movedim",
        "narrow",
    }
)
_SHAPING = {
    torch.clamp,
    torch.reshape,
    torch.transpose,
    torch.permute,
    torch.flatten,
    torch.split,
    torch.chunk,
    torch.clone,
    torch.nan_to_num,
    torch.unbind,
    torch.squeeze,
    torch.unsqueeze,
    torch.narrow,
    operator.getitem,
}
_JOINING = {torch.cat, torch.stack}
_NORMING = frozenset({"layer_norm", "group_norm", "rms_norm"})


@dataclass(frozen=True, slots=True)
class LiveOut:
    """A value that leaves the region. ``base`` is the live-in it adds to; without one the value is cached whole.

    ``stream``: the live-in that the chain carried in its place; the base, but where a long skip is mixed into the stream.
    """

    node: fx.Node
    base: fx.Node | None
    additive: bool
    stream: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """The cached part of a graph, in graph order. ``hoisted`` nodes lie in its interval but are computed before it."""

    nodes: tuple[fx.Node, ...]
    hoisted: tuple[fx.Node, ...]
    live_ins: tuple[fx.Node, ...]
    live_outs: tuple[LiveOut, ...]
    copied_live_ins: tuple[fx.Node, ...]
    lists: tuple[str, ...]
    front: tuple[str, ...]
    cached: tuple[str, ...]
    back: tuple[str, ...]
    blocks: Mapping[tuple[int, int], tuple[fx.Node, ...]]
    """Nodes of each block of the chain, front and back included, by (list, place in it); empty where modules were named."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no region: a stable key and what it applies to."""

    key: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Span:
    first: int
    last: int
    previous: int
    lists: tuple[str, ...]
    front: tuple[str, ...]
    cached: tuple[str, ...]
    back: tuple[str, ...]
    blocks: Mapping[tuple[int, int], tuple[int, int]]


def choose_region(
    gm: fx.GraphModule, chains: BlockChains, *, front: int = 1, back: int = 0, named: tuple[str, str] | None = None
) -> Region | Refusal:
    """Choose blocks [front, N - back) of the best chain, or the interval between two named modules.

    *Detects* for each chain the interval of graph positions, its live-ins and live-outs, and for each live-out the
    base: the live-in of the same shape and dtype that the stream carried out of the last front block. The chain taken
    is the longest one whose every live-out has such a base; else the longest whose live-outs all have some base;
    else the largest list alone, with live-outs cached whole. A stream that a long skip is mixed into (U-ViT, U-Net) is
    cached whole too: what it would add to its base then repeats worse than the stream itself.

    *Rewrites* nothing: this is an analysis.

    *Refuses when* no chain is there, front and back leave nothing, the region draws random numbers, writes to values
    that live outside, cuts an autocast region, or lets other things than tensors out.
    """
    region = _named_region(gm, named) if named is not None else _best_region(gm, chains, front, back)
    if isinstance(region, Refusal):
        return region
    inside = set(region.nodes)
    mixed = {out.node for out in region.live_outs if not out.additive and _mixes(out.node, inside)}
    outs = tuple(replace(out, base=None) if out.node in mixed else out for out in region.live_outs)
    return replace(region, live_outs=outs)


def _named_region(gm: fx.GraphModule, named: tuple[str, str]) -> Region | Refusal:
    span = _named_span(gm, named)
    return span if isinstance(span, Refusal) else _region(gm, span)


def _best_region(gm: fx.GraphModule, chains: BlockChains, front: int, back: int) -> Region | Refusal:
    if not chains.chains:
        return Refusal("no_blocks")
    refusals: list[Refusal] = []
    best: tuple[int, Region] | None = None
    for chain in chains.chains:
        chain_span = _chain_span(chain, front, back)
        if chain_span is None:
            total = sum(len(part.blocks) for part in chain)
            refusals.append(Refusal("nothing_left", f"{total} - {front} - {back}"))
            continue
        region = _region(gm, chain_span)
        if isinstance(region, Refusal):
            refusals.append(region)
            continue
        rank = _rank(gm, region, chain_span)
        if rank == 2:
            return region
        if best is None or rank > best[0]:
            best = rank, region
    return best[1] if best is not None else refusals[0]


def _chain_span(chain: Sequence[BlockList], front: int, back: int) -> _Span | None:
    blocks = [block for part in chain for block in part.blocks]
    if len(blocks) - front - back < 1:
        return None
    stop = len(blocks) - back
    last = max(part.last for part in chain) if back == 0 else blocks[stop - 1].last
    previous = blocks[front - 1].first if front > 0 else 0
    paths = [block.path for block in blocks]
    lists = tuple(part.path for part in chain)
    places = {(i, j): (block.first, block.last) for i, part in enumerate(chain) for j, block in enumerate(part.blocks)}
    return _Span(
        blocks[front].first, last, previous, lists, tuple(paths[:front]), tuple(paths[front:stop]), tuple(paths[stop:]), places
    )


def _named_span(gm: fx.GraphModule, named: tuple[str, str]) -> _Span | Refusal:
    """From the first node of one named module to the last node of another (or the same)."""
    positions = []
    for path in named:
        inside = [i for i, node in enumerate(gm.graph.nodes) if is_compute(node) and in_module(node, path)]
        if not inside:
            return Refusal("region_not_found", path)
        positions.append(inside)
    first, last = positions[0][0], positions[1][-1]
    if last < first:
        return Refusal("region_backwards", " .. ".join(named))
    cached = tuple(dict.fromkeys(named))
    return _Span(first, last, 0, (), (), cached, (), {})


def _region(gm: fx.GraphModule, span: _Span) -> Region | Refusal:
    order = list(gm.graph.nodes)
    span = _around_contexts(order, span)
    last = _end_of_region(order, span)
    nodes = [node for node in order[span.first : last + 1] if is_compute(node)]
    hoisted = _hoisted(nodes, order, span)
    kept = [node for node in nodes if node not in hoisted]
    refusal = _objection(kept, order)
    if refusal is not None:
        return refusal
    copied = _written_live_ins(kept, order)
    if isinstance(copied, Refusal):
        return copied
    live_outs = _live_outs(kept, _made_before(order, span))
    if not live_outs:
        return Refusal("nothing_leaves")
    return Region(
        tuple(kept),
        tuple(node for node in nodes if node in hoisted),
        tuple(_live_ins(kept)),
        tuple(live_outs),
        copied,
        span.lists,
        span.front,
        span.cached,
        span.back,
        {
            label: tuple(node for node in order[start : stop + 1] if is_compute(node) and node not in hoisted)
            for label, (start, stop) in span.blocks.items()
        },
    )


def _rank(gm: fx.GraphModule, region: Region, span: _Span) -> int:
    """2: every live-out continues the stream of the last front block; 1: every live-out has some base; 0: otherwise."""
    if any(out.base is None for out in region.live_outs):
        return 0
    made = _made_before(list(gm.graph.nodes), span)
    return 2 if not span.front or all(_continues_stream(out, region, made) for out in region.live_outs) else 1


def _continues_stream(out: LiveOut, region: Region, made: set[fx.Node]) -> bool:
    """Whether the base was made by the last front block, and no other value of its shape is what ``out`` adds to.

    A control branch has the shape of the stream that it steers: what the main blocks add to passes it by.
    """
    value = example_of(out.node)
    if out.base not in made or not isinstance(value, torch.Tensor):
        return False
    if out.additive:
        return True
    _, adds = _reached(out.node, set(region.nodes))
    return not any(_same_shape(example_of(node), value) for node in adds if not is_parameter(node))


def _made_before(order: Sequence[fx.Node], span: _Span) -> set[fx.Node]:
    """What the last front block made, glue behind it included."""
    if not span.front:
        return set()
    return {node for node in order[span.previous : span.first] if is_compute(node)}


def _live_ins(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for argument in node.all_input_nodes:
            if argument not in inside:
                found[argument] = None
    activations = [node for node in found if not is_parameter(node)]
    return activations + [node for node in found if is_parameter(node)]


def _leaving(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _live_outs(nodes: Sequence[fx.Node], made_before: set[fx.Node]) -> list[LiveOut]:
    inside = set(nodes)
    streams = [node for node in _live_ins(nodes) if isinstance(example_of(node), torch.Tensor)]
    taken: set[fx.Node] = set()
    found = []
    for node in _leaving(nodes):
        base, additive = _base_of(node, inside, streams, made_before, taken)
        if base is not None:
            taken.add(base)
        found.append(LiveOut(node, base, additive, base))
    return found


def _base_of(
    out: fx.Node, inside: set[fx.Node], streams: Sequence[fx.Node], made_before: set[fx.Node], taken: set[fx.Node]
) -> tuple[fx.Node | None, bool]:
    value = example_of(out)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return None, False
    depends, adds = _reached(out, inside)
    alike = [node for node in streams if node in depends and not is_parameter(node) and _same_shape(example_of(node), value)]
    continued = _continued(out, inside) if len(alike) > 1 else set()
    for wanted in (
        [node for node in alike if node in continued and node in made_before],
        [node for node in alike if node in adds and node in made_before],
        [node for node in alike if node in made_before],
        [node for node in alike if node in adds],
        alike,
    ):
        free = [node for node in wanted if node not in taken] or wanted
        if free:
            # behind a front block the newest of its results; else what the first block takes, not what steers a later one
            base = free[-1] if made_before else free[0]
            return base, base in adds
    return None, False


def _same_shape(a: object, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and shape_key(a) == shape_key(b) and a.device == b.device


def _reached(out: fx.Node, inside: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The live-ins that ``out`` depends on, and those it reaches through additions and reshapes alone."""
    depends: set[fx.Node] = set()
    adds: set[fx.Node] = set()
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(out, True)]
    while stack:
        node, additive = stack.pop()
        if (node, additive) in seen:
            continue
        seen.add((node, additive))
        if node not in inside:
            depends.add(node)
            if additive:
                adds.add(node)
            continue
        carries = additive and _carries(node)
        stack.extend((argument, carries) for argument in node.all_input_nodes)
    return depends, adds


def _carries(node: fx.Node) -> bool:
    """Whether a value is a sum of others, others in another shape, or others side by side."""
    return _is_addition(node) or _is_shaping(node) or node.target in _JOINING


def _continued(out: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Of the live-ins that ``out`` reaches through additions and reshapes those whose part of what is joined it is.

    Streams of one shape that are joined and sliced in every block are told apart so.
    """
    found: set[fx.Node] = set()
    seen: set[tuple[fx.Node, _Window | None]] = set()
    stack: list[tuple[fx.Node, _Window | None]] = [(out, None)]
    while stack:
        node, window = stack.pop()
        if (node, window) in seen:
            continue
        seen.add((node, window))
        if node not in inside:
            found.add(node)
        elif _carries(node):
            parts = _joined_parts(node, window) if window is not None and node.target is torch.cat else None
            if parts is None:
                parts = {argument: _window_into(node, argument, window) for argument in node.all_input_nodes}
            stack.extend(parts.items())
    return found


class _Window(NamedTuple):
    """The part of a value from ``start`` to ``stop`` along a dimension."""

    dim: int
    start: int
    stop: int


def _window_into(node: fx.Node, argument: fx.Node, window: _Window | None) -> _Window | None:
    """The part of an argument that a part of a slice or a sum is of; None where that is not known, or all of it."""
    made, given = example_of(node), example_of(argument)
    if not isinstance(made, torch.Tensor) or not isinstance(given, torch.Tensor) or made.dim() != given.dim():
        return None
    if _is_addition(node):
        sizes = [] if window is None else [made.shape[window.dim], given.shape[window.dim]]
        # two symbols are not compared: that would be a guard
        return window if sizes and all(isinstance(each, int) for each in sizes) and sizes[0] == sizes[1] else None
    index: Any = node.args[1] if node.target is operator.getitem else None
    cut = [dim for dim, each in enumerate(index) if each != slice(None)] if isinstance(index, tuple) else []
    if len(cut) != 1 or not isinstance(index[cut[0]], slice):
        return None
    dim, size, bounds = cut[0], given.shape[cut[0]], index[cut[0]]
    known = all(isinstance(each, int) for each in (size, bounds.start or 0, bounds.stop or 0))
    if not known or bounds.step not in (None, 1) or (window is not None and window.dim != dim):
        return None
    start, stop, _ = bounds.indices(size)
    return _Window(dim, start, stop) if window is None else _Window(dim, start + window.start, start + window.stop)


def _joined_parts(node: fx.Node, window: _Window) -> dict[fx.Node, _Window | None] | None:
    """Which of the values that are joined lie within a part of the result, and which part of each; None: not known."""
    values = node.args[0] if node.args else node.kwargs.get("tensors")
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(values, (tuple, list)) or not isinstance(dim, int):
        return None
    examples = [example_of(each) if isinstance(each, fx.Node) else None for each in values]
    offset, parts = 0, dict[fx.Node, "_Window | None"]()
    for value, tensor in zip(values, examples, strict=True):
        if not isinstance(tensor, torch.Tensor) or dim % tensor.dim() != window.dim or not isinstance(tensor.shape[dim], int):
            return None
        size = tensor.shape[dim]
        start, stop = max(window.start - offset, 0), min(window.stop - offset, size)
        if start < stop:
            assert isinstance(value, fx.Node)
            # one that is joined twice is not followed further
            parts[value] = None if value in parts or (start, stop) == (0, size) else _Window(window.dim, start, stop)
        offset += size
    return parts


def _mixes(out: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether what ``out`` is a sum of was joined with something else and multiplied by a weight."""
    seen: set[fx.Node] = set()
    stack = [out]
    while stack:
        node = stack.pop()
        if node not in inside or node in seen:
            continue
        seen.add(node)
        if _is_addition(node) or _is_shaping(node):
            stack.extend(node.all_input_nodes)
        elif name_of(node) in MULTIPLIES and _is_joined(node.all_input_nodes[0]):
            return True
    return False


def _is_joined(node: fx.Node) -> bool:
    while node.target not in _JOINING and (_is_shaping(node) or name_of(node) in _NORMING):
        node = node.all_input_nodes[0]
    return node.target in _JOINING


def _is_addition(node: fx.Node) -> bool:
    return node.target in (_ADDITIVE_METHODS if node.op == "call_method" else _ADDITIVE)


def _is_shaping(node: fx.Node) -> bool:
    return is_compute(node) and node.target in (_SHAPING_METHODS if node.op == "call_method" else _SHAPING)


def _around_contexts(order: Sequence[fx.Node], span: _Span) -> _Span:
    """Take in the entry of a context (autocast) that the first block begins with, and the exit that the last one ends with.

    These belong to no module, so a block seems to begin behind the one and to end before the other.
    """
    first, last = span.first, span.last
    for position in range(first - 1, -1, -1):
        if is_compute(order[position]):
            if not any(_leaves(user) and user in order[first : last + 1] for user in order[position].users):
                break
            first = position
    for position in range(last + 1, len(order)):
        if is_compute(order[position]):
            if not _leaves(order[position]) or not _is_entered(order[position], order[first : last + 1]):
                break
            last = position
    return replace(span, first=first, last=last)


def _leaves(node: fx.Node) -> bool:
    """Whether the node leaves a context."""
    return name_of(node).startswith(("_exit", "_vmap_decrement"))


def _is_entered(leaving: fx.Node, inside: Sequence[fx.Node]) -> bool:
    """Whether what ``leaving`` leaves was entered inside."""
    entries = leaving.all_input_nodes
    if entries:
        return any(entry in inside for entry in entries)
    names = [name_of(node) for node in inside]
    return names.count("_vmap_increment_nesting") > names.count("_vmap_decrement_nesting")


def _end_of_region(order: Sequence[fx.Node], span: _Span) -> int:
    """Move the end over what follows where that gives live-outs a base or joins them into fewer.

    Single-stream chains hand back text and image in one sequence, sliced behind the loop; and a loop that adds the
    residual itself leaves its last addition behind the last block.
    """
    last = _over_unpacking(order, span.first, span.last)
    made = _made_before(order, span)
    for position in _tail_ends(order, span.first, last, made):
        last = position
    return last


def _over_unpacking(order: Sequence[fx.Node], first: int, last: int) -> int:
    """Take in the ``getitem`` of tuples made inside: only tensors can leave."""
    while True:
        place = {node: i for i, node in enumerate(order)}
        inside = [node for node in order[first : last + 1] if is_compute(node)]
        users = [
            place[user]
            for node in _leaving(inside)
            if isinstance(example_of(node), (tuple, list))
            for user in node.users
            if user.target is operator.getitem and place[user] > last
        ]
        if not users or max(users) - last > MAX_TAIL_NODES:
            return last
        last = max(users)


def _tail_ends(order: Sequence[fx.Node], first: int, last: int, made: set[fx.Node]) -> Iterable[int]:
    def outs(end: int) -> tuple[int, int]:
        nodes = [node for node in order[first : end + 1] if is_compute(node)]
        live_outs = [out for out in _live_outs(nodes, made) if isinstance(example_of(out.node), torch.Tensor)]
        return sum(out.base is None for out in live_outs), len(live_outs)

    baseless, count = outs(last)
    for position in range(last + 1, min(last + 1 + MAX_TAIL_NODES, len(order))):
        if baseless == 0 and count <= 1:
            return
        node = order[position]
        if node.op == "output" or any(is_parameter(argument) for argument in node.all_input_nodes):
            return
        if not is_compute(node):
            continue
        now_baseless, now_count = outs(position)
        if (now_baseless < baseless and now_count <= count) or (now_baseless <= baseless and now_count < count):
            baseless, count = now_baseless, now_count
            yield position


def _hoisted(nodes: Sequence[fx.Node], order: Sequence[fx.Node], span: _Span) -> set[fx.Node]:
    """Nodes that leave the interval without depending on anything heavy in it: they are computed before the region.

    Only what a leaving node needs is moved, and only where it reads no parameter and nothing in the interval wrote to.
    """
    inside, everywhere = set(nodes), set(order)
    leaving, fixed = _leaving(nodes), _fixed(nodes)
    written = {_storage_owner(mutated_argument(node), everywhere) for node in nodes if is_mutation(node)}
    moved: set[fx.Node] = set()
    for node in leaving:
        needed = _needed_inside(node, inside)
        if any(is_parameter(a) for n in needed for a in n.all_input_nodes) or needed & fixed:
            continue
        reads_written = any(_storage_owner(a, everywhere) in written for n in needed for a in (n, *n.all_input_nodes))
        if not reads_written and _is_light(needed, nodes):
            moved |= needed
    return moved if moved != inside else set()


def _fixed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that act on others (they write, draw numbers, switch autocast), and those under a switch in the interval."""
    switched = 0
    found = set()
    for node in nodes:
        switched += name_of(node).startswith("_enter") - name_of(node).startswith("_exit")
        if switched or not is_removable(node):
            found.add(node)
    return found


def _needed_inside(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in needed or current not in inside:
            continue
        needed.add(current)
        stack.extend(current.all_input_nodes)
    return needed


def _is_light(needed: set[fx.Node], nodes: Sequence[fx.Node]) -> bool:
    return len(needed) <= max(2, len(nodes) // 20)


def _objection(nodes: Sequence[fx.Node], order: Sequence[fx.Node]) -> Refusal | None:
    for node in nodes:
        if is_random(node):
            return Refusal("random", node.name)
    for node in _leaving(nodes):
        value = example_of(node)
        if "autocast" in str(node.target) or "_vmap" in str(node.target):
            return Refusal("cuts_context", node.name)
        if not isinstance(value, torch.Tensor):
            return Refusal("not_a_tensor", f"{node.name}: {type(value).__name__}")
    inside = set(nodes)
    for node in nodes:
        if str(node.target).find("_exit_autocast") >= 0 and any(a not in inside for a in node.all_input_nodes):
            return Refusal("cuts_context", node.name)
    return None


def _written_live_ins(nodes: Sequence[fx.Node], order: Sequence[fx.Node]) -> tuple[fx.Node, ...] | Refusal:
    """Live-ins that the region writes to in place. It may write to a copy where nobody else reads the original later."""
    inside = set(nodes)
    place = {node: i for i, node in enumerate(order)}
    begin, end = place[nodes[0]], place[nodes[-1]]
    copied: dict[fx.Node, None] = {}
    for node in nodes:
        root = _storage_owner(mutated_argument(node), inside)
        if root is None or root in inside:
            continue
        others = _sharing_memory(root, order, inside) - {root}
        read_elsewhere = any(place[user] >= begin for other in others for user in other.users)
        owned = all(map(is_compute, others)) and is_compute(root)
        if not owned or _is_view(root) or read_elsewhere or any(place[user] > end for user in root.users):
            return Refusal("writes_outside", node.name)
        copied[root] = None
    return tuple(copied)


def _storage_owner(node: fx.Node | None, inside: set[fx.Node]) -> fx.Node | None:
    """Follow views and in-place results inside the region back to the node that owns the memory."""
    while node is not None and node in inside:
        if is_mutation(node):
            node = mutated_argument(node)
        elif _viewed(node) is not None:
            node = _viewed(node)
        else:
            return node
    return node


def _sharing_memory(node: fx.Node, order: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes outside whose results lie in the memory of ``node``'s: views and in-place results, on both sides of it.

    What is made of it inside the region is not followed: it will lie in the copy.
    """
    owner = _storage_owner(node, set(order))
    found = {node} if owner is None else {owner}
    stack = list(found)
    while stack:
        current = stack.pop()
        for user in current.users:
            views = _viewed(user) is current
            if user not in found and user not in inside and (views or mutated_argument(user) is current):
                found.add(user)
                stack.append(user)
    return found


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the node's result may share."""
    if knows_memory(node):
        return viewed_argument(node)
    if not _is_shaping(node) or node.target in (torch.clamp, torch.nan_to_num, torch.clone, "clip", "clamp", "clone"):
        return None
    source = next(iter(node.all_input_nodes), None)
    made, given = example_of(node), example_of(source) if source is not None else None
    if isinstance(made, torch.Tensor) and isinstance(given, torch.Tensor) and made.dtype != given.dtype:
        return None
    return source


def _is_view(node: fx.Node) -> bool:
    """Whether the node gives a part or another shape of memory that has an owner; the result of a write is that owner."""
    return not is_mutation(node) and _viewed(node) is not None
