"""split_pieces: cut a graph at the borders of its blocks, so that blocks alike can share one program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import fx

from ..torch_internals import graph_module_like, is_distributed, memory_of, parts_of, symbol_of, without_source
from .graph_values import example_of, is_removable, mutated_argument, name_of, tensors_in
from .insert_cache_branch import MADE
from .module_paths import is_compute
from .outline_region import BLOCK
from .write_apart import write_apart

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a graph that stands alone.

    graph: takes ``inputs`` and gives a tuple, both in the order of first use and of production: pieces with equal
        ``key`` are the same program.
    inputs, outputs: nodes of the graph that was cut; an input may be a tensor attribute of it (``get_attr``), an output None
        where the program gives a view that this graph does not have.
    """

    graph: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    key: Hashable


@dataclass(frozen=True, slots=True)
class Unsplit:
    """Why a graph cannot be cut: a stable key."""

    key: str


def split_pieces(gm: fx.GraphModule) -> list[Piece] | Unsplit:
    """Cut a specialized graph into pieces, in order: what comes before the blocks, each block, the cache, the rest.

    *Detects* the blocks that :func:`outline_region` marked and what :func:`insert_cache_branch` made.

    *Rewrites to*::

        %t = embed(%x)                       piece 0:  embed
        %h1 = block_0(%t)                    piece 1:  block            key a
        %h2 = block_1(%h1)          ->       piece 2:  block            key a
        residual := %h2 - %h1                piece 3:  store
        %y = head(%h2)                       piece 4:  head

    Additions in place to a value that nothing else shares are made out of place first. Where memory that is written to is
    shared across a border, or a context (autocast) spans one, the pieces on both sides stay one.

    A graph without marked blocks (all of them skipped, none to compute) is cut around what the cache made. A piece that lacks
    nothing but views which nobody reads, as the last of a list may, is the program that makes them.

    *Refuses when* the graph calls modules or holds distributed tensors, or a value without an example crosses a border.

    *Exact*: the same operations run in the same order.
    """
    write_apart(gm)
    nodes = [node for node in gm.graph.nodes if is_compute(node)]
    if any(node.op == "call_module" for node in nodes):
        return Unsplit("calls_modules")
    if any(is_distributed(example_of(node)) for node in nodes):
        # the key of a piece knows nothing of meshes and placements
        return Unsplit("distributed")
    if any(MADE in node.meta and example_of(node) is None for node in nodes):
        return Unsplit("no_example")
    segments = _merged(_segments(nodes), nodes, gm)
    place = {node: i for i, segment in enumerate(segments) for node in segment}
    symbols = _symbol_inputs(gm)
    pieces = []
    for segment in segments:
        inputs = _inputs(gm, segment, symbols)
        if inputs is None:
            return Unsplit("sizes_unknown")
        outputs = [node for node in segment if any(place.get(user) != place[node] for user in node.users)]
        if not all(_crosses(node) for node in (*inputs, *outputs)):
            return Unsplit("no_example")
        pieces.append(_piece(gm, segment, inputs, outputs))
    return _sharing(pieces)


def _segments(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Runs of nodes of one block, of the cache, or of neither; glue between blocks of one list goes with the later block."""
    runs: list[tuple[Any, list[fx.Node]]] = []
    for node in nodes:
        label = "cache" if MADE in node.meta else node.meta.get(BLOCK)
        if runs and runs[-1][0] == label:
            runs[-1][1].append(node)
        else:
            runs.append((label, [node]))
    joined: list[list[fx.Node]] = []
    glue: list[fx.Node] = []
    for position, (label, run) in enumerate(runs):
        before = runs[position - 1][0] if position else None
        after = runs[position + 1][0] if position + 1 < len(runs) else None
        if label is None and _same_list(before, after):
            glue = run
            continue
        joined.append([*glue, *run])
        glue = []
    return joined


def _same_list(before: Any, after: Any) -> bool:
    return isinstance(before, tuple) and isinstance(after, tuple) and before[0] == after[0]


def _merged(segments: list[list[fx.Node]], nodes: Sequence[fx.Node], gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Join the segments that a context or memory written to ties together."""
    place = {node: i for i, segment in enumerate(segments) for node in segment}
    ties = [*_contexts(nodes, place), *_written_memory(gm, place), *_untransportable(nodes, place)]
    joined_behind = {i for low, high in ties for i in range(low, high)}
    merged: list[list[fx.Node]] = []
    for i, segment in enumerate(segments):
        if i and i - 1 in joined_behind:
            merged[-1].extend(segment)
        else:
            merged.append(list(segment))
    return merged


def _span(places: Iterable[int]) -> tuple[int, int]:
    found = list(places)
    return min(found), max(found)


def _contexts(nodes: Sequence[fx.Node], place: dict[fx.Node, int]) -> list[tuple[int, int]]:
    """From the entry of each context to its exit; nodes that set a mode without an end tie everything to it."""
    ties = []
    for node in nodes:
        name = name_of(node)
        if name.startswith("_enter"):
            ties.append(_span([place[node], *(place[user] for user in node.users)]))
        elif name.startswith(("_set_", "_vmap", "_add_batch", "_remove_batch")):
            ties.append((0, max(place.values())))
    return ties


def _written_memory(gm: fx.GraphModule, place: dict[fx.Node, int]) -> list[tuple[int, int]]:
    """For each memory that is written to: from the first to the last node that makes or reads a view of it."""
    views: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for tensor in tensors_in(example_of(node)):
            views.setdefault(memory_of(tensor), []).append(node)
    ties = []
    for node in place:
        written = mutated_argument(node)
        if written is None:
            continue
        sharing = [each for tensor in tensors_in(example_of(written)) for each in views[memory_of(tensor)]] or [written]
        touching = {user for each in sharing for user in each.users if user in place}
        ties.append(_span(place[each] for each in {node, *sharing, *touching} if each in place))
    return ties


def _untransportable(nodes: Sequence[fx.Node], place: dict[fx.Node, int]) -> list[tuple[int, int]]:
    """From each tuple, list or other value that is no tensor and no number to its last user."""
    return [
        _span([place[node], *(place[user] for user in node.users if user in place)])
        for node in nodes
        if not _crosses(node) and example_of(node) is not None
    ]


def _crosses(node: fx.Node) -> bool:
    return isinstance(example_of(node), (torch.Tensor, torch.SymInt, torch.SymFloat, int, float))


def _symbol_inputs(gm: fx.GraphModule) -> dict[Any, fx.Node]:
    """The graph inputs that carry a size, by its symbol."""
    found = {}
    for node in gm.graph.nodes:
        value = example_of(node)
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            found[symbol_of(value)] = node
    return found


def _inputs(gm: fx.GraphModule, segment: Sequence[fx.Node], symbols: dict[Any, fx.Node]) -> list[fx.Node] | None:
    """What a segment takes, in the order of first use, then the sizes that its tensors need; None: one is not known."""
    inside = set(segment)
    found: dict[fx.Node, None] = {}
    for node in segment:
        for argument in node.all_input_nodes:
            if argument not in inside and not _nested_graph(gm, argument):
                found[argument] = None
    needed = {symbol for node in found for symbol in _free_symbols(example_of(node))}
    for symbol in sorted(needed, key=str):
        if symbol not in symbols:
            return None
        found[symbols[symbol]] = None
    return list(found)


def _free_symbols(value: object) -> set[Any]:
    sizes: list[Any] = []
    if isinstance(value, torch.Tensor):
        sizes = [*value.shape, *value.stride()]
    elif isinstance(value, torch.SymInt):
        sizes = [value]
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in symbol_of(size).free_symbols}


def _nested_graph(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if node.op != "get_attr":
        return None
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, fx.GraphModule) else None


def _piece(gm: fx.GraphModule, segment: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Piece:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        copy = graph.placeholder(f"input_{i}")
        copy.meta = {key: node.meta[key] for key in ("example_value", "tensor_dict") if key in node.meta}
        copy.meta.setdefault("example_value", example_of(node))
        without_source(copy)
        copies[node] = copy
    nested: dict[str, fx.GraphModule] = {}
    for node in segment:
        for argument in node.all_input_nodes:
            inner = _nested_graph(gm, argument)
            if inner is not None and argument not in copies:
                name = f"graph_{len(nested)}"
                nested[name] = inner
                copies[argument] = graph.get_attr(name)
                copies[argument].meta = dict(argument.meta)
        copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output(tuple(copies[node] for node in outputs))
    return Piece(graph_module_like(gm, dict(nested), graph), tuple(inputs), tuple(outputs), _key(graph, nested))


def _sharing(pieces: list[Piece]) -> list[Piece]:
    """The pieces, each that is alone with its program as one of the others with more outputs where that is possible."""
    programs = {piece.key: piece for piece in pieces}
    times = Counter(piece.key for piece in pieces)

    def shared(piece: Piece) -> Piece:
        found = (_as_part_of(piece, other) for other in programs.values()) if times[piece.key] == 1 else ()
        return next((each for each in found if each is not None), piece)

    return [shared(piece) for piece in pieces]


def _as_part_of(piece: Piece, other: Piece) -> Piece | None:
    """A piece by the program of another one that makes views besides; None where it is no part of it."""
    more = len(other.graph.graph.nodes) - len(piece.graph.graph.nodes)
    if more <= 0 or len(other.outputs) <= len(piece.outputs) or len(other.inputs) != len(piece.inputs):
        return None
    for kept in combinations(range(len(other.outputs)), len(piece.outputs)):
        if _key_of_part(other.graph, kept) == piece.key:
            outputs = dict(zip(kept, piece.outputs, strict=True))
            return Piece(other.graph, piece.inputs, tuple(map(outputs.get, range(len(other.outputs)))), other.key)
    return None


def _key_of_part(gm: fx.GraphModule, kept: Sequence[int]) -> Hashable | None:
    """The key of a piece's graph with some of its outputs alone; None where that leaves out more than views."""
    graph = fx.Graph()
    results: Any = graph.graph_copy(gm.graph, {})
    graph.output(tuple(results[place] for place in kept))
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node.users:
            continue
        if not is_removable(node) or not _is_view(node):
            return None
        graph.erase_node(node)
    return _key(graph, {name: child for name, child in gm.named_children() if isinstance(child, fx.GraphModule)})


def _is_view(node: fx.Node) -> bool:
    """Whether a value is a part of what it is made from: nothing is computed for it."""
    made, sources = example_of(node), [example_of(source) for source in node.all_input_nodes]
    if not isinstance(made, torch.Tensor):
        return False
    return any(memory_of(each) == memory_of(made) for source in sources for each in tensors_in(source))


def _key(graph: fx.Graph, nested: dict[str, fx.GraphModule]) -> Hashable:
    """Equal for graphs that are the same program: operations, arguments, and the layout of every input."""
    numbers: dict[fx.Node, int] = {}
    parts: list[Hashable] = []
    for node in graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            parts.append(_layout(node.meta.get("example_value"), node))
        elif node.op == "get_attr":
            inner = nested.get(str(node.target))
            parts.append(_key_of_nested(inner) if inner is not None else ("attribute", id(node)))
        else:
            parts.append((node.op, node.target, _frozen(node.args, numbers), _frozen(node.kwargs, numbers)))
    return tuple(parts)


def _key_of_nested(inner: fx.GraphModule) -> Hashable:
    children = {name: child for name, child in inner.named_children() if isinstance(child, fx.GraphModule)}
    return _key(inner.graph, children)


def _layout(value: object, node: fx.Node) -> Hashable:
    if isinstance(value, torch.Tensor):
        static = bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))
        kind: Hashable = type(value)
        parts = parts_of(value)
        if parts is not None:
            kind = (kind, parts[0], *(_layout(part, node) for part in parts[1]))
        # along a dimension of one element nothing is ever strided
        strides = [stride if size != 1 else 1 for size, stride in zip(map(symbol_of, value.shape), value.stride(), strict=True)]
        sizes = [str(symbol_of(size)) for size in (*value.shape, *strides)]
        return (kind, value.dtype, str(value.device), static, value.dim(), *sizes)
    if isinstance(value, torch.SymInt):
        return ("size", str(symbol_of(value)))
    return _frozen(value, {})


def _frozen(value: Any, numbers: dict[fx.Node, int]) -> Hashable:
    """An argument as something hashable; what is not known counts by identity."""
    if isinstance(value, fx.Node):
        return ("node", numbers[value])
    if isinstance(value, (tuple, list)):
        return (type(value), *(_frozen(each, numbers) for each in value))
    if isinstance(value, dict):
        return (dict, *((name, _frozen(each, numbers)) for name, each in value.items()))
    if isinstance(value, slice):
        return (slice, *(_frozen(each, numbers) for each in (value.start, value.stop, value.step)))
    if isinstance(value, _PLAIN):
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0
        return (type(value), repr(value))
    return ("object", id(value))
