"""Caching block by block, for models whose blocks do not come into one graph.

A block that reads tensors on the host is traced in pieces, so no pass can put a branch around a chain of such blocks. Here
the model runs in eager, each block compiled for itself, and what stands in a block's compile slot computes it or predicts
what it would have added. All blocks share the decision of their call. The price: one residual for each block where a
region of the graph has one for all, and what lies between the blocks is not compiled.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import passes
from .backend import FallbackCompiler
from .graph_report import GraphReport, RegionReport, describe_region
from .lowering import choose_lowering, lower, with_cache_examples
from .options import ProgramOptions
from .runtime.buffers import Dynamic, Sizes
from .runtime.program import Programs
from .runtime.session import active_session
from .texts import text
from .torch_internals import (
    COMPILE_SLOT,
    compile_limits,
    fake_like,
    traced_with,
    uncompiled_call,
    without_source,
    write_counter,
)

if TYPE_CHECKING:
    from .runtime.session import Session

# There is nothing to branch over between blocks that run one by one: the host picks the program.
LOWERING = "specialize"
BlockPrograms = tuple[Programs, passes.CacheInputs]
# Arguments of these types cannot carry state out of a block that is skipped.
_STATELESS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
# Combinations of shapes kept for a block.
MAX_SIGNATURES = 16


class Blockwise:
    """Calls a model in eager, with something that caches in the compile slot of each block behind the front.

    Args:
        paths: module paths of the chain's blocks, in order, front and back included.
        function: what runs the model.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        session: Session,
        program: ProgramOptions,
        paths: Sequence[str],
        function: Callable[..., Any],
    ) -> None:
        self._function, self.session, self.program = function, session, program
        stop = len(paths) - program.back_blocks
        self.front, self.cached, self.back = (
            tuple(paths[: program.front_blocks]),
            tuple(paths[program.front_blocks : stop]),
            tuple(paths[stop:]),
        )
        if program.lowering not in ("auto", LOWERING):
            why = text("whole_blockwise", session.options.language)
            session.said.warn("lowering_replaced", wanted=program.lowering, why=why, used=LOWERING)
        self.report = GraphReport(0, None, None, lowering=LOWERING)
        self.compile_inner = FallbackCompiler(program, None, session.options.language)
        self._programs: dict[Hashable, BlockPrograms] = {}
        self._blocks = [CachedBlock(module.get_submodule(path), self) for path in self.cached]

    def install(self) -> None:
        """Take the slots of the blocks."""
        for block in self._blocks:
            block.install()

    def remove(self) -> None:
        """Put back what was in the slots."""
        for block in self._blocks:
            block.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def programs_for(self, streams: Streams, bases: Sequence[Tensor], made: Sequence[Tensor]) -> BlockPrograms:
        """The programs around a block with these streams: those of the first block like it."""
        key = (streams.base_of, tuple(map(_kind, bases)), tuple(map(_kind, made)))
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = self._compile(streams, bases, made)
        return found

    def _compile(self, streams: Streams, bases: Sequence[Tensor], made: Sequence[Tensor]) -> BlockPrograms:
        graph, region = _graph_around_block(streams, fake_like([value.contiguous() for value in (*bases, *made)]), self)
        passes.outline_region(graph, region)
        inputs = passes.insert_cache_branch(graph, region, self.program.branch)
        if self.report.region is None:
            self.report.region = self._described(region, inputs, len(bases))
        examples = with_cache_examples(graph, [node.meta["example_value"] for node in region.live_ins])
        replayed = self.compile_inner.replays_on(inputs.device)
        form = choose_lowering(LOWERING)
        return lower(form, graph, inputs, examples, self.compile_inner, replayed=replayed), inputs

    def _described(self, region: passes.Region, inputs: passes.CacheInputs, bases: int) -> RegionReport:
        """As of one block, but for the memory, which each block takes."""
        found = describe_region(region, inputs)
        found = dataclasses.replace(found, live_ins=found.live_ins[:bases])
        if found.buffer_bytes is None:
            return found
        return dataclasses.replace(found, buffer_bytes=found.buffer_bytes * len(self.cached))


@dataclass(frozen=True, slots=True)
class Streams:
    """How a block's results continue its arguments.

    Attributes:
        base_of: for each tensor that the block makes the place of its base among the bases, or None.
        places: for each base its place among the tensor arguments.
        as_tuple: whether the block gives a tuple.
        none: which entries of that tuple are None.
    """

    base_of: tuple[int | None, ...]
    places: tuple[int, ...]
    as_tuple: bool
    none: tuple[bool, ...]

    def pack(self, made: Sequence[Tensor]) -> Any:
        """The block's result, of the tensors it makes."""
        if not self.as_tuple:
            return made[0]
        values = iter(made)
        return tuple(None if empty else next(values) for empty in self.none)


class CachedBlock:
    """What stands in the compile slot of one block."""

    def __init__(self, block: torch.nn.Module, owner: Blockwise) -> None:
        self._block, self._owner = block, owner
        self._replaced: Any = None
        self._had_slot = False
        self._graphs: dict[Hashable, BlockGraph | None] = {}
        self._run: Callable[..., Any] = uncompiled_call(block)
        if owner.program.inner != "eager":
            self._run = traced_with(torch.compile(self._run, backend=owner.compile_inner, **compile_limits()))

    def install(self) -> None:
        """Take the slot."""
        self._had_slot, self._replaced = COMPILE_SLOT in vars(self._block), vars(self._block).get(COMPILE_SLOT)
        setattr(self._block, COMPILE_SLOT, self)

    def remove(self) -> None:
        """Put back what was in it."""
        if vars(self._block).get(COMPILE_SLOT) is not self:
            return
        if self._had_slot:
            setattr(self._block, COMPILE_SLOT, self._replaced)
        else:
            delattr(self._block, COMPILE_SLOT)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model is uncached."""
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self._owner.session
        if torch.is_grad_enabled() or active_session.get() is not session or self._block.training:
            return self._run(*args, **kwargs)
        given = _Arguments()
        signature = given.take(args), given.take(kwargs)
        if signature not in self._graphs:
            return self._first_call(signature, args, kwargs, given)
        graph = self._graphs[signature]
        if graph is None:
            session.counters.refuse("block_state")
            return self._run(*args, **kwargs)
        result, wrote = graph.call(lambda: self._watched_run(args, kwargs, given), given.tensors)
        if wrote:
            self._graphs[signature] = None
        return result

    def _watched_run(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: _Arguments) -> tuple[Any, bool]:
        """The block's result, and whether it wrote to its arguments."""
        before = given.state()
        result = self._run(*args, **kwargs)
        return result, before is None or not _same(before, given.state())

    def _first_call(self, signature: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any], given: _Arguments) -> Any:
        """Run the block, see which arguments its results continue, and compile what stores and predicts them."""
        start = perf_counter()
        result, wrote = self._watched_run(args, kwargs, given)
        streams = None if wrote else _streams_of(result, given.tensors)
        if len(self._graphs) >= MAX_SIGNATURES:
            self._graphs.clear()
        if streams is None:
            self._graphs[signature] = None
            self._owner.session.counters.refuse("block_state")
            return result
        made = _tensors(result)
        bases = [given.tensors[place] for place in streams.places]
        programs, inputs = self._owner.programs_for(streams, bases, made)
        graph = self._graphs[signature] = BlockGraph(self._block, self._owner, streams, programs, inputs)
        self._owner.report.compile_seconds += perf_counter() - start
        self._owner.session.compiled(perf_counter() - start)
        return graph.call(lambda: (result, False), given.tensors)[0]


class _Arguments:
    """What a block is called with: its tensors, and the objects that may carry something out of it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.objects: list[Any] = []

    def take(self, values: Any) -> Hashable:
        """Collect the tensors and objects in ``values``; what two calls must have alike to share a program."""
        if isinstance(values, Tensor):
            self.tensors.append(values)
            return _kind(values)
        if isinstance(values, float):
            # no shape depends on it, and it may be another one at each step
            return float
        if isinstance(values, _STATELESS):
            return type(values), values
        if type(values) in (tuple, list):
            return type(values), tuple(map(self.take, values))
        if type(values) is dict and all(isinstance(name, str) for name in values):
            return tuple(values), tuple(map(self.take, values.values()))
        self.objects.append(values)
        return id(type(values))

    def state(self) -> list[tuple[Any, int]] | None:
        """Everything that the block could have written to, with its write counter; None where that cannot be told."""
        found: list[tuple[Any, int]] = []
        told = all(_state_of(each, found, 0) for each in (*self.tensors, *self.objects))
        return found if told else None


# Objects within objects that are looked into.
_MAX_DEPTH = 4


def _state_of(value: Any, found: list[tuple[Any, int]], depth: int) -> bool:
    """Append the parts of a value; False where they go deeper than is looked."""
    if isinstance(value, Tensor):
        found.append((value, write_counter(value)))
        return True
    found.append((value, 0))
    if isinstance(value, (*_STATELESS, type, FunctionType, BuiltinFunctionType)):
        return True
    if depth == _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        parts: list[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        slots = [name for each in type(value).__mro__ for name in getattr(each, "__slots__", ()) if hasattr(value, name)]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]
    return all(_state_of(part, found, depth + 1) for part in parts)


def _same(before: list[tuple[Any, int]], after: list[tuple[Any, int]] | None) -> bool:
    if after is None or len(before) != len(after):
        return False
    # numbers and texts are equal or not; everything else is the same object, not written to, or another one
    return all(
        (a is b or (isinstance(a, _STATELESS) and a == b)) and m == n for (a, m), (b, n) in zip(before, after, strict=True)
    )


class BlockGraph:
    """One block in one combination of shapes, as the session runs graphs: its arguments are (how to run it, *bases)."""

    def __init__(
        self, block: torch.nn.Module, owner: Blockwise, streams: Streams, programs: Programs, inputs: passes.CacheInputs
    ) -> None:
        # the session keeps the graph, and must not keep the model alive
        self.controls: tuple[int, ...] = ()
        # its results are not the model's output
        self.repeats = False
        self._block, self._session, self._streams = weakref.ref(block), owner.session, streams
        self.inputs, self.report, self.frame, self.outputs = inputs, owner.report, id(owner), len(streams.base_of)
        self.programs = Programs(self._computing(programs), self._reusing(programs))
        buffers = [*inputs.stored, *([inputs.front] if inputs.front is not None else [])]
        self._sizes = tuple(tuple(map(int, buffer.sizes)) for buffer in buffers)

    def call(self, run: Callable[[], tuple[Any, bool]], given: Sequence[Tensor]) -> tuple[Any, bool]:
        """The block's result, computed or predicted, and whether computing it wrote to its arguments."""
        wrote = [False]

        def compute() -> list[Tensor]:
            result, wrote[0] = run()
            return _tensors(result)

        bases = [given[place].contiguous() for place in self._streams.places]
        return self._streams.pack(self._session.run(self, (compute, *bases))), wrote[0]

    def plain(self, args: Sequence[Any]) -> Sequence[Any]:
        """The block computed, without the cache."""
        made: list[Tensor] = args[0]()
        return made

    def time(self, args: Sequence[Any]) -> float | None:
        """A block does not know the timestep."""
        return None

    def dynamic_sizes(self, args: Sequence[Any]) -> Dynamic:
        """Other shapes are another graph."""
        return ()

    def sizes(self, dynamic: Dynamic) -> Sizes:
        """Sizes of the buffers."""
        return self._sizes

    def watched(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """The block's weights; not the placeholders, new ones at each call, that offloading leaves where it takes them away."""
        block = self._block()
        return () if block is None else tuple(weight for weight in block.parameters() if not weight.is_meta)

    def given(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """What a block takes was made within the call."""
        return ()

    def _computing(self, programs: Programs) -> Callable[[Sequence[Any]], Sequence[Any]]:
        count = len(self._streams.places)

        def compute(flat: Sequence[Any]) -> Sequence[Any]:
            made = flat[0]()
            dense = [value.contiguous() for value in made]
            measured = programs.compute((*flat[1 : 1 + count], *dense, *flat[1 + count :]))
            return (*made, *measured[len(made) :])

        return compute

    def _reusing(self, programs: Programs) -> Callable[[Sequence[Any]], Sequence[Any]]:
        count, unused = len(self._streams.places), (None,) * self.outputs
        return lambda flat: programs.reuse((*flat[1 : 1 + count], *unused, *flat[1 + count :]))


def _kind(value: Tensor) -> Hashable:
    """What programs are made for. They get everything contiguous: a predicted stream may lie otherwise than a computed one."""
    return tuple(value.shape), value.dtype, value.device


def _tensors(result: Any) -> list[Tensor]:
    return [value for value in (result if isinstance(result, (tuple, list)) else (result,)) if value is not None]


def _streams_of(result: Any, given: Sequence[Tensor]) -> Streams | None:
    """Which argument each result continues: of those of its shape the one it is nearest to. None for other results."""
    entries = list(result) if type(result) in (tuple, list) else [result]
    made = [value for value in entries if value is not None]
    if not made or not all(isinstance(value, Tensor) and value.is_floating_point() for value in made):
        return None
    taken: list[int] = []
    base_of: list[int | None] = []
    for value in made:
        alike = [i for i, each in enumerate(given) if i not in taken and _fits(each, value)]
        if not alike:
            base_of.append(None)
            continue
        nearest = min(alike, key=lambda i: float(torch.linalg.vector_norm((value - given[i]).double())))
        base_of.append(len(taken))
        taken.append(nearest)
    if all(base is None for base in base_of):
        return None
    return Streams(tuple(base_of), tuple(taken), type(result) in (tuple, list), tuple(value is None for value in entries))


def _fits(base: Tensor, value: Tensor) -> bool:
    return base.shape == value.shape and base.dtype == value.dtype and base.device == value.device


def _graph_around_block(streams: Streams, examples: Sequence[Tensor], owner: Blockwise) -> tuple[fx.GraphModule, passes.Region]:
    """A graph that takes a block's bases and results, and a region that makes the results of themselves."""
    graph = fx.Graph()
    count = len(streams.places)
    names = [*(f"base_{i}" for i in range(count)), *(f"made_{i}" for i in range(len(examples) - count))]
    placeholders = []
    for name, example in zip(names, examples, strict=True):
        node = graph.placeholder(name)
        node.meta["example_value"] = example
        placeholders.append(without_source(node))
    bases, made = placeholders[:count], placeholders[count:]
    live_outs = []
    for node, base in zip(made, streams.base_of, strict=True):
        passed = graph.create_node("call_function", operator.pos, (node,), name=node.name.replace("made", "out"))
        passed.meta["example_value"] = node.meta["example_value"]
        live_outs.append(passes.LiveOut(passed, None if base is None else bases[base], True))
    graph.output(tuple(out.node for out in live_outs))
    lists = tuple(dict.fromkeys(path.rpartition(".")[0] for path in owner.cached))
    region = passes.Region(
        nodes=tuple(out.node for out in live_outs),
        hoisted=(),
        live_ins=tuple(placeholders),
        live_outs=tuple(live_outs),
        copied_live_ins=(),
        lists=lists,
        front=owner.front,
        cached=owner.cached,
        back=owner.back,
        blocks={},
    )
    return fx.GraphModule(torch.nn.Module(), graph), region
