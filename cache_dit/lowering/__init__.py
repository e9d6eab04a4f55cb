"""From the rewritten graph to compiled programs. Each file is one form of the same branch.

==========  ============================================================================================
form        what is compiled
==========  ============================================================================================
specialize  a compute graph and a reuse graph, each whole; the runtime picks
cond        the graph with the branch inside, once; the predicate is an input
==========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx

from ..passes.graph_values import example_of
from ..runtime.program import Programs
from .cond import lower_cond
from .specialize import lower_specialize

InnerCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Lowering(NamedTuple):
    """One form: its name, and the function from the rewritten graph and its example inputs to programs."""

    name: str
    lower: Callable[[fx.GraphModule, Sequence[Any], InnerCompiler], Programs]


LOWERINGS = {each.name: each for each in (Lowering("specialize", lower_specialize), Lowering("cond", lower_cond))}
DEFAULT_LOWERING = "specialize"


def choose_lowering(wanted: str) -> Lowering:
    """The form for the option ``lowering``; a form that is not built gives way to the default."""
    return LOWERINGS.get(wanted, LOWERINGS[DEFAULT_LOWERING])


def with_cache_examples(gm: fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
    """The example inputs of the rewritten graph: those of the original, then those of the cache inputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [*examples, *(example_of(node) for node in placeholders[len(examples) :])]


__all__ = ["DEFAULT_LOWERING", "LOWERINGS", "InnerCompiler", "Lowering", "choose_lowering", "with_cache_examples"]
