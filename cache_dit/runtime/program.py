"""A traced graph as the runtime calls it: compiled programs, what they take, and where the host finds what it must know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from ..passes.graph_values import example_of, is_of_model, is_parameter, repeats
from ..passes.insert_cache_branch import CacheInputs
from ..torch_internals import is_unbacked, source_name, symbol_of
from .buffers import Dynamic, Sizes

if TYPE_CHECKING:
    from ..graph_report import GraphReport

# Names under which diffusion models take the noise level, in the order of preference; then those that look like one.
_TIME_NAMES = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "times",
    "sigma",
    "sigmas",
    "time_step",
    "noise_level",
    "noise_levels",
    "diffusion_timestep",
    "time_cond",
)
_LIKE_A_TIME = re.compile(r"timestep|(^|_)(time|sigma)s?$")


# Timesteps of a batch that are read one by one.
FEW_TIMES = 64


def time_names(names: Iterable[str]) -> list[str]:
    """Those of the argument names that stand for the noise level, the best first."""
    given = list(names)
    known = [name for name in _TIME_NAMES if name in given]
    return known + [name for name in given if name not in known and _LIKE_A_TIME.search(name)]


class GraphRunner(Protocol):
    """The state of a model, as its graphs see it: what decides at each call."""

    enabled: bool

    def run(self, graph: Cacheable, args: Sequence[Any]) -> Sequence[Any]:
        """Run the graph with the program of this call's decision."""


FindSession = Callable[["CachedGraph", Sequence[Any]], GraphRunner | None]
FlatCall = Callable[[Sequence[Any]], Sequence[Any]]


class Programs:
    """The two compiled forms of a graph. Each takes the graph's inputs followed by the cache inputs."""

    __slots__ = ("compute", "reuse")

    def __init__(self, compute: FlatCall, reuse: FlatCall) -> None:
        self.compute, self.reuse = compute, reuse


class Cacheable(Protocol):
    """What a session can run: something with a program that computes and one that predicts."""

    @property
    def inputs(self) -> CacheInputs:
        """What the programs take behind the arguments, and give behind the results."""

    @property
    def programs(self) -> Programs:
        """The two programs."""

    @property
    def outputs(self) -> int:
        """Number of results."""

    @property
    def report(self) -> GraphReport:
        """What ``explain`` says of it."""

    @property
    def frame(self) -> object:
        """Which Python frame it comes from."""

    @property
    def controls(self) -> tuple[int, ...]:
        """Places of the arguments that enter the region past the blocks that always compute."""

    @property
    def repeats(self) -> bool:
        """Whether the program that predicts may be run once more, with earlier inputs, and nothing but its results matters."""

    @property
    def dynamic_sizes(self) -> Callable[[Sequence[Any]], Dynamic]:
        """Reads from the arguments the sizes, and numbers of the model, that may differ from call to call."""

    @property
    def sizes(self) -> Callable[[Dynamic], Sizes]:
        """Sizes of the buffers, from what ``dynamic_sizes`` gave."""

    @property
    def watched(self) -> Callable[[Sequence[Any]], Sequence[torch.Tensor]]:
        """Picks the weights from the arguments."""

    @property
    def given(self) -> Callable[[Sequence[Any]], Sequence[torch.Tensor]]:
        """Picks the tensors that the caller gives from the arguments."""

    def plain(self, args: Sequence[Any]) -> Sequence[Any]:
        """Runs without the cache."""

    def time(self, args: Sequence[Any]) -> float | None:
        """The timestep among the arguments; None where there is none."""


class UncachedGraph:
    """A graph without a region: runs as it is, and is known to ``explain``."""

    __slots__ = ("_note", "_run", "report")

    def __init__(self, run: Callable[..., Any], report: GraphReport, note: Callable[[UncachedGraph], None]) -> None:
        self._run, self.report, self._note = run, report, note

    def __call__(self, *args: Any) -> Any:
        self._note(self)
        return self._run(*args)


class CachedGraph:
    """A graph with a cached region. Shared by every model of its class: it holds no state of any model."""

    __slots__ = (
        "_find_session",
        "_plain",
        "controls",
        "dynamic_sizes",
        "frame",
        "given",
        "inputs",
        "outputs",
        "programs",
        "repeats",
        "report",
        "sizes",
        "time_index",
        "watched",
        "weight_index",
    )

    def __init__(
        self,
        find_session: FindSession,
        programs: Programs,
        plain: Callable[..., Any],
        inputs: CacheInputs,
        original: fx.GraphModule,
        report: GraphReport,
        frame: object,
        controls: tuple[int, ...] = (),
    ) -> None:
        placeholders = [node for node in original.graph.nodes if node.op == "placeholder"]
        self._find_session, self.programs, self._plain = find_session, programs, plain
        self.inputs, self.report, self.frame, self.controls = inputs, report, frame, controls
        self.repeats = repeats(original)
        self.outputs = len(next(iter(reversed(original.graph.nodes))).args[0])
        self.time_index = find_time(placeholders)
        self.weight_index, self.watched = _watched_weights(placeholders)
        self.given = _picker([i for i, node in enumerate(placeholders) if _is_given(node)])
        reader = SizeReader(placeholders, inputs)
        self.dynamic_sizes, self.sizes = reader.read, reader.sizes

    def __call__(self, *args: Any) -> Any:
        session = self._find_session(self, args)
        if session is None or not session.enabled:
            return self._plain(*args)
        return session.run(self, args)

    def plain(self, args: Sequence[Any]) -> Sequence[Any]:
        """The graph as it was traced, without the cache."""
        result: Sequence[Any] = self._plain(*args)
        return result

    def time(self, args: Sequence[Any]) -> float | None:
        """The timestep among the inputs; None where there is none."""
        return None if self.time_index is None else read_time(args[self.time_index])


class SizeReader:
    """Reads from a graph's inputs the sizes that may differ from call to call, and computes from them those of the buffers."""

    def __init__(self, placeholders: Sequence[fx.Node], inputs: CacheInputs) -> None:
        buffers = [*inputs.stored, *([inputs.front] if inputs.front is not None else [])]
        self._expressions = [tuple(symbol_of(size) for size in buffer.sizes) for buffer in buffers]
        symbols = {s for sizes in self._expressions for e in sizes for s in getattr(e, "free_symbols", ())}
        where = {symbol: _where_is(symbol, placeholders) for symbol in sorted(symbols, key=str)}
        # inputs that reach no buffer count too: with a text of another length the residual of an image is another one
        for i, node in enumerate(placeholders):
            value = example_of(node)
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    where.setdefault(symbol_of(size), (i, axis))
        self._symbols, self._places = tuple(where), tuple(where.values())
        # numbers that the model itself holds, such as an adapter's scale: what was stored is not valid under another one
        self._numbers = tuple(i for i, node in enumerate(placeholders) if _is_number_of_model(node))

    def read(self, args: Sequence[Any]) -> Dynamic:
        """The sizes, and the model's own numbers, among these inputs that may differ from call to call; () where none may."""
        if not self._places and not self._numbers:
            return ()
        sizes = tuple(args[i] if axis is None else args[i].shape[axis] for i, axis in self._places)
        return sizes + tuple(float(args[i]) for i in self._numbers) if self._numbers else sizes

    def sizes(self, dynamic: Dynamic) -> Sizes:
        """Sizes of the buffers for what `read` gave: of each that is stored, then the front's where it is kept."""
        replaced = dict(zip(self._symbols, dynamic, strict=False))
        return tuple(
            tuple(int(e.xreplace(replaced)) if hasattr(e, "xreplace") else int(e) for e in sizes) for sizes in self._expressions
        )


def _is_number_of_model(node: fx.Node) -> bool:
    """Whether an input is a float that an attribute of a module holds: Dynamo makes it one once it has changed."""
    value = example_of(node)
    if is_parameter(node) or not is_of_model(node):
        return False
    return isinstance(value, torch.SymFloat) or (
        isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu"
    )


def _is_tensor_of_model(node: fx.Node) -> bool:
    """Whether an input is a weight, a buffer or another tensor that the model holds."""
    if not isinstance(example_of(node), torch.Tensor):
        return False
    return is_parameter(node) or (is_of_model(node) and not _is_number_of_model(node))


def _is_given(node: fx.Node) -> bool:
    """Whether an input is a tensor that the caller of the model hands over."""
    return isinstance(example_of(node), torch.Tensor) and not is_parameter(node) and not is_of_model(node)


def sizes_are_known(inputs: CacheInputs, placeholders: Sequence[fx.Node]) -> bool:
    """Whether the host can tell the buffers' sizes from a graph's inputs before it runs."""
    buffers = [*inputs.stored, *([inputs.front] if inputs.front is not None else [])]
    expressions = [symbol_of(size) for buffer in buffers for size in buffer.sizes]
    if any(is_unbacked(expression) for expression in expressions):
        return False
    symbols = {symbol for expression in expressions for symbol in getattr(expression, "free_symbols", ())}
    return all(_find(symbol, placeholders) is not None for symbol in symbols)


def _where_is(symbol: Any, placeholders: Sequence[fx.Node]) -> tuple[int, int | None]:
    found = _find(symbol, placeholders)
    if found is None:
        raise AssertionError(f"no graph input carries the size {symbol}")
    return found


def _find(symbol: Any, placeholders: Sequence[fx.Node]) -> tuple[int, int | None] | None:
    """(input, None) for a size that is an input itself, (input, axis) for a tensor's."""
    for i, node in enumerate(placeholders):
        value = example_of(node)
        if isinstance(value, torch.SymInt) and symbol_of(value) == symbol:
            return i, None
        if isinstance(value, torch.Tensor):
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and symbol_of(size) == symbol:
                    return i, axis
    return None


_LAST_NAME = re.compile(r"\['(\w+)'\]$")


def find_time(placeholders: Sequence[fx.Node]) -> int | None:
    """The graph input that is the timestep, by the name of the argument it comes from.

    Where no name fits, the only floating-point input with at most one dimension is taken.
    """
    named: dict[str, int] = {}
    others = []
    for i, node in enumerate(placeholders):
        value = example_of(node)
        if is_parameter(node) or isinstance(value, torch.SymInt) or not isinstance(value, (torch.Tensor, torch.SymFloat)):
            continue
        match = _LAST_NAME.search(source_name(node))
        if match is not None:
            named.setdefault(match[1], i)
        if isinstance(value, torch.SymFloat) or (value.is_floating_point() and value.dim() <= 1):
            others.append(i)
    wanted = time_names(named)
    if wanted:
        return named[wanted[0]]
    return others[0] if len(others) == 1 else None


def read_time(value: object) -> float | None:
    """A timestep as a number. Of several (one a sample, one a token) the largest: clean tokens have 0 throughout."""
    if isinstance(value, torch.Tensor):
        count = value.numel()
        if count == 0:
            return None
        if count == 1:
            return float(value.item())
        if value.dim() == 1 and count <= FEW_TIMES:
            # cheaper to look at than to reduce; a NaN equals none
            listed = value.tolist()
            if listed.count(listed[0]) == count:
                return float(listed[0])
        return float(value.max().item())
    return float(value) if isinstance(value, (int, float)) else None


def _watched_weights(placeholders: Sequence[fx.Node]) -> tuple[int | None, Callable[[Sequence[Any]], Sequence[Any]]]:
    """The first parameter's place, and a function that picks all tensors of the model among the inputs."""
    indices = [i for i, node in enumerate(placeholders) if _is_tensor_of_model(node)]
    return next((i for i in indices if is_parameter(placeholders[i])), None), _picker(indices)


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if not indices:
        return lambda args: ()
    if len(indices) == 1:
        only = indices[0]
        return lambda args: (args[only],)
    return itemgetter(*indices)
