"""The form in pieces: one program for each distinct block, called in order; compile time does not grow with depth.

The graphs of both decisions are cut at the borders of the blocks. Pieces alike, in one graph or across the two, are compiled
once: a skipped step shares all its programs with a computed one, but for the prediction. The price is a call for each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from torch import fx

from ..passes import Piece, Unsplit, split_pieces
from ..passes.graph_values import example_of
from ..passes.outline_region import BLOCK
from ..passes.specialize_branch import specialize_branch
from ..runtime.program import FlatCall, Programs
from ..torch_internals import copy_dynamo_graph, fill_examples, keep_dynamo_attributes, record_rewrite, taking_a_list
from .unsuited import Unsuited


def lower_pieces(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    compile_inner: Callable[[fx.GraphModule, Sequence[Any]], Any],
    *,
    mostly_alike: bool = False,
) -> Programs:
    """Compile each distinct piece once, those of the skipped step first (see :mod:`.specialize`).

    Raises:
        Unsuited: the graph cannot be cut, has no marked blocks, or no two pieces alike; with ``mostly_alike``, more than half
            of the pieces are programs of their own.
    """
    cuts = {compute: _Cut.of(gm, compute) for compute in (False, True)}
    # where no block always computes, the graph of a skipped step has none; that of a computed one has them all
    if not cuts[True].holds_blocks:
        raise Unsuited("no_blocks")
    computed = cuts[True].pieces
    distinct = len({piece.key for piece in computed})
    if distinct == len(computed) or (mostly_alike and 2 * distinct > len(computed)):
        raise Unsuited("nothing_alike")
    programs: dict[Hashable, Callable[..., Any]] = {}
    for cut in cuts.values():
        for piece in cut.pieces:
            if piece.key not in programs:
                programs[piece.key] = _compiled(gm, piece, compile_inner)
    return Programs(cuts[True].driver(programs), cuts[False].driver(programs))


def _compiled(gm: fx.GraphModule, piece: Piece, compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    keep_dynamo_attributes(gm, piece.graph)
    piece.graph.graph.lint()
    run = compile_inner(piece.graph, [example_of(node) for node in piece.inputs])
    return taking_a_list(run) or (lambda taken: run(*taken))


class _Call(NamedTuple):
    """A call of a piece, by places in the list of values: ``spent`` are read for the last time, ``unread`` are never read."""

    program: Callable[[list[Any]], Sequence[Any]]
    pick: Callable[[list[Any]], Sequence[Any]]
    spent: Sequence[int]
    results: slice
    unread: Sequence[int]


class _Cut:
    """The graph of one decision and its pieces."""

    def __init__(self, graph: fx.GraphModule, pieces: list[Piece]) -> None:
        self._graph, self.pieces = graph, pieces

    @classmethod
    def of(cls, gm: fx.GraphModule, compute: bool) -> _Cut:
        """Specialize a copy for a decision and cut it."""
        graph = copy_dynamo_graph(gm)
        folded = specialize_branch(graph, compute=compute)
        fill_examples(graph)
        pieces = split_pieces(graph)
        if isinstance(pieces, Unsplit):
            raise Unsuited(pieces.key)
        record_rewrite("specialize_branch", folded, graph)
        record_rewrite("split_pieces", len(pieces), graph)
        return cls(graph, pieces)

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks are marked in the graph."""
        return any(BLOCK in node.meta for node in self._graph.graph.nodes)

    def driver(self, programs: dict[Hashable, Callable[..., Any]]) -> FlatCall:
        """A function that calls the pieces in order.

        It lets go of a value before it calls the last piece that reads it, and that piece lets go of it in its midst: no
        stream is kept beside those that the whole graph would keep.
        """
        nodes = list(self._graph.graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        attributes = [node for node in nodes if node.op == "get_attr"]
        # a value's place in the list of values; those that nobody wants have one too, by where they come from
        places: dict[fx.Node | tuple[int, int], int] = {node: i for i, node in enumerate([*given, *attributes])}
        made = [[node or (i, j) for j, node in enumerate(piece.outputs)] for i, piece in enumerate(self.pieces)]
        for each in chain.from_iterable(made):
            places[each] = len(places)
        returned = nodes[-1].args[0]
        assert isinstance(returned, (tuple, list))
        last_use = {node: i for i, piece in enumerate(self.pieces) for node in (*made[i], *piece.inputs)}
        for node in (*given, *attributes, *(each for each in returned if isinstance(each, fx.Node))):
            last_use.pop(node, None)
        calls = []
        for i, piece in enumerate(self.pieces):
            first = places[made[i][0]] if made[i] else 0
            spent = [node for node, last in last_use.items() if last == i]
            taken = set(piece.inputs)
            calls.append(
                _Call(
                    programs[piece.key],
                    _picker([places[node] for node in piece.inputs]),
                    [places[node] for node in spent if node in taken],
                    slice(first, first + len(made[i])),
                    [places[node] for node in spent if node not in taken],
                )
            )
        constants = [self._attribute(str(node.target)) for node in attributes]
        room = [None] * (len(places) - len(given) - len(attributes))
        # what is returned: a place in the list of values, else a constant of the graph
        wanted = [(places[each], None) if isinstance(each, fx.Node) else (None, each) for each in returned]

        def run(flat: Sequence[Any]) -> Sequence[Any]:
            values = [*flat, *constants, *room]
            for program, pick, spent, results, unread in calls:
                taken = list(pick(values))
                for place in spent:
                    values[place] = None
                values[results] = program(taken)
                for place in unread:
                    values[place] = None
            return [constant if place is None else values[place] for place, constant in wanted]

        return run

    def _attribute(self, target: str) -> Any:
        value: Any = self._graph
        for part in target.split("."):
            value = getattr(value, part)
        return value


def _picker(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(places) == 1:
        only = places[0]
        return lambda values: (values[only],)
    return itemgetter(*places) if places else lambda values: ()
