"""From the rewritten graph to compiled programs. Each file is one form of the same branch.

==========  ============================================================================================
form        what is compiled
==========  ============================================================================================
specialize  a compute graph and a reuse graph, each whole; the runtime picks
pieces      what comes before the blocks, one program for each distinct block, the cache, the rest: called in order
cond        the graph with the branch inside, once; the predicate is an input
==========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import fx

from ..passes import CacheInputs
from ..passes.graph_values import example_of
from ..runtime.program import Programs
from .cond import lower_cond
from .pieces import lower_pieces
from .replays import hold_buffers, lasting
from .specialize import lower_specialize
from .unsuited import Unsuited

InnerCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Lowering(NamedTuple):
    """One form: its name, and the function from the rewritten graph and its example inputs to programs."""

    name: str
    lower: Callable[[fx.GraphModule, Sequence[Any], InnerCompiler], Programs]


LOWERINGS = {
    each.name: each
    for each in (Lowering("specialize", lower_specialize), Lowering("pieces", lower_pieces), Lowering("cond", lower_cond))
}
DEFAULT_LOWERING = "specialize"
# From so many blocks on, calls of pieces are at par with the whole graph's step and compile in half of its time
# (docs/performance.md).
DEEP = 24


def choose_lowering(wanted: str, *, blocks: int = 0, replayed: bool = False) -> Lowering:
    """The form for the option ``lowering``: ``'auto'`` takes pieces where the blocks are many and mostly alike.

    Args:
        wanted: the option.
        blocks: how many blocks the graph has.
        replayed: CUDA graphs are made of the programs: one of a whole graph is replayed at once.
    """
    if wanted != "auto":
        return LOWERINGS[wanted]
    if blocks >= DEEP and not replayed:
        return Lowering("pieces", partial(lower_pieces, mostly_alike=True))
    return LOWERINGS[DEFAULT_LOWERING]


def lower(
    form: Lowering,
    gm: fx.GraphModule,
    inputs: CacheInputs,
    examples: Sequence[Any],
    compile_inner: InnerCompiler,
    *,
    replayed: bool,
) -> Programs:
    """The programs of a rewritten graph in this form. ``replayed``: the inner compiler makes CUDA graphs of them.

    Raises:
        Unsuited: the graph is better compiled in another form.
    """
    if not replayed:
        return form.lower(gm, examples, compile_inner)
    hold_buffers(gm, inputs)
    return lasting(form.lower(gm, examples, compile_inner), gm)


def with_cache_examples(gm: fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
    """The example inputs of the rewritten graph: those of the original, then those of the cache inputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [*examples, *(example_of(node) for node in placeholders[len(examples) :])]


__all__ = [
    "DEEP",
    "DEFAULT_LOWERING",
    "LOWERINGS",
    "InnerCompiler",
    "Lowering",
    "Unsuited",
    "choose_lowering",
    "lower",
    "with_cache_examples",
]
