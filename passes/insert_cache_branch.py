"""insert_cache_branch: replace the outlined region by a branch that computes it or predicts what it would have added."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..torch_internals import graph_module_like, hint_of, without_source
from . import residual_math
from .choose_region import Region
from .from_host import is_offloaded
from .graph_values import example_of
from .outline_region import REGION_NAME

# Meta key of nodes that only the cond form needs (its branches must agree in memory layout); specializing drops them.
COND_ONLY = "cache_dit_cond_only"
# Meta key of the nodes that this pass makes.
MADE = "cache_dit_made"
COMPUTE_NAME, REUSE_NAME = "cache_compute", "cache_reuse"


@dataclass(frozen=True, slots=True)
class BranchOptions:
    """What changes the program. ``history``: residuals kept for each live-out; ``residual_dtype`` None: its own dtype."""

    history: int = 1
    noise: bool = False
    front_clock: bool = False
    residual_dtype: torch.dtype | None = None
    residual_device: str | None = None
    # the front's change is measured against the last computed step instead of the last one
    front_anchored: bool = False
    # what is kept in host memory is taken from there by `from_host`, else by a plain copy
    fetches: bool = True


@dataclass(frozen=True, slots=True)
class ResidualBuffer:
    """One live-out's cache: sizes (ints or symbolic), dtype and device; ``history`` buffers of it are held.

    ``scale``: dtype of the numbers by which the elements of each row along the last dimension are multiplied; None: no such
    numbers are kept.
    """

    sizes: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    scale: torch.dtype | None = None

    @property
    def scales(self) -> ResidualBuffer | None:
        """The buffer of the scales, one for each row; None where there are none."""
        return None if self.scale is None else ResidualBuffer((*self.sizes[:-1], 1), self.scale, self.device)


@dataclass(frozen=True, slots=True)
class CacheInputs:
    """What the rewritten graph takes behind its own inputs, in this order, and gives behind its own outputs.

    inputs: ``pred`` (bool, 0-d; True computes), ``control`` (floating, [history + 1]: weights, newest first, then the noise
    scale), ``key`` (int64, 0-d), ``measured`` (statistics of the last computed step), ``front`` (only with the front
    clock), then for each live-out its residuals, newest first, and behind them their scales where there are any; a computed
    step overwrites the last one of each.
    outputs: ``measured`` (floating, [live-outs * n]), then ``change`` (floating, [2], only with the front clock).
    """

    residuals: tuple[ResidualBuffer, ...]
    history: int
    front: ResidualBuffer | None
    accumulate: torch.dtype
    device: torch.device
    # whether programs take their residuals by `from_host`
    fetches: bool = False

    @property
    def stored(self) -> tuple[ResidualBuffer, ...]:
        """What is held ``history`` times, in the order of the inputs: each live-out's residual, then its scales."""
        return tuple(buffer for residual in self.residuals for buffer in (residual, residual.scales) if buffer is not None)


def insert_cache_branch(gm: fx.GraphModule, region: Region, options: BranchOptions) -> CacheInputs:
    """Turn the call of the outlined region into ``cond(pred, compute, reuse)``.

    *Detects* the call that :func:`outline_region` left.

    *Rewrites to*::

        %region = cache_region(%h, …)    ->    %region = cond(%pred, compute, reuse, (%control, …, %residuals…, %h, …))

        compute(…): out = cache_region(h, …); measure out - h; oldest residual := out - h; return out
        reuse(…):   return h + Σ control[k] * residual[k] (+ noise)

    *Refuses when*: never; a graph without an outlined region is the caller's mistake (``AssertionError``).

    *Approximate* where the predicate is False, exact where it is True.
    """
    graph = gm.graph
    call = next((node for node in graph.nodes if node.op == "call_module" and node.target == REGION_NAME), None)
    if call is None:
        raise AssertionError("insert_cache_branch needs the region outlined first")
    body = getattr(gm, REGION_NAME)
    inputs = _cache_inputs(region, options)
    placeholders = _add_placeholders(graph, inputs, _tensor(region.live_outs[0].node))
    writer = _BranchWriter(body, region, inputs, options)
    gm.add_submodule(COMPUTE_NAME, graph_module_like(gm, body, writer.compute()))
    gm.add_submodule(REUSE_NAME, graph_module_like(gm, body, writer.reuse()))
    front = placeholders.pop("front", None)
    pred = placeholders.pop("pred")
    with graph.inserting_before(call):
        branches = [graph.get_attr(COMPUTE_NAME), graph.get_attr(REUSE_NAME)]
        operands = (*placeholders.values(), *call.args)
        cond = graph.call_function(torch.ops.higher_order.cond, (pred, *branches, operands))
        measured = graph.call_function(operator.getitem, (cond, len(region.live_outs)))
        anchor = pred if options.front_anchored else None
        extra = [measured] if front is None else [measured, _front_clock(graph, region, call, front, inputs, anchor)]
    before = _tensor(placeholders["measured"])
    measured.meta["example_value"] = before.new_empty(before.shape)
    cond.meta = dict(call.meta)
    call.replace_all_uses_with(cond)
    graph.erase_node(call)
    gm.delete_submodule(REGION_NAME)
    output = next(iter(reversed(graph.nodes)))
    output.args = ((*output.args[0], *extra),)
    return inputs


def _cache_inputs(region: Region, options: BranchOptions) -> CacheInputs:
    values = [_tensor(out.node) for out in region.live_outs]
    accumulate = residual_math.accumulation_dtype(values[0].dtype)
    device = values[0].device
    residuals = tuple(_buffer_of(value, options, accumulate) for value in values)
    front = None
    if options.front_clock:
        value = _tensor(_front_of(region))
        front = ResidualBuffer(tuple(value.shape), value.dtype, value.device)
    fetches = options.fetches and any(is_offloaded(residual.device, device) for residual in residuals)
    return CacheInputs(residuals, options.history, front, accumulate, device, fetches)


def _buffer_of(value: torch.Tensor, options: BranchOptions, accumulate: torch.dtype) -> ResidualBuffer:
    dtype = options.residual_dtype if options.residual_dtype and value.dtype.is_floating_point else value.dtype
    scaled = dtype in residual_math.SCALED
    if scaled and value.dim() == 0:
        # one number is no row
        dtype, scaled = value.dtype, False
    device = torch.device(options.residual_device) if options.residual_device else value.device
    return ResidualBuffer(tuple(value.shape), dtype, device, accumulate if scaled else None)


def _named_buffers(inputs: CacheInputs) -> Iterator[tuple[str, ResidualBuffer]]:
    """The names of the inputs that hold residuals and their scales, in order."""
    for j, residual in enumerate(inputs.residuals):
        for name, buffer in (("residual", residual), ("scale", residual.scales)):
            if buffer is not None:
                yield from ((f"{name}_{j}_{k}", buffer) for k in range(inputs.history))


def _tensor(node: fx.Node) -> torch.Tensor:
    value = example_of(node)
    if not isinstance(value, torch.Tensor):
        raise AssertionError(f"{node.name} has no example tensor")
    return value


def _front_of(region: Region) -> fx.Node:
    """The front's output: the first stream, else the first floating-point activation that enters."""
    streams = [out.stream or out.base for out in region.live_outs]
    found = next((stream for stream in streams if stream is not None), None)
    if found is not None:
        return found
    return next(node for node in region.live_ins if getattr(example_of(node), "is_floating_point", bool)())


def _add_placeholders(graph: fx.Graph, inputs: CacheInputs, like: torch.Tensor) -> dict[str, fx.Node]:
    length = len(inputs.residuals) * residual_math.statistics_length(inputs.history)

    def empty(sizes: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return like.new_empty(tuple(sizes), dtype=dtype, device=device)

    examples = {
        "pred": empty((), torch.bool, inputs.device),
        "control": empty((inputs.history + 1,), inputs.accumulate, inputs.device),
        "key": empty((), torch.int64, inputs.device),
        "measured": empty((length,), inputs.accumulate, inputs.device),
    }
    if inputs.front is not None:
        examples["front"] = empty(inputs.front.sizes, inputs.front.dtype, inputs.front.device)
    for name, buffer in _named_buffers(inputs):
        examples[name] = empty(buffer.sizes, buffer.dtype, buffer.device)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    placeholders = {}
    for name, example in examples.items():
        with graph.inserting_after(last):
            last = graph.placeholder(f"cache_{name}")
        last.meta["example_value"] = example
        # AOT autograd asserts that every placeholder of a Dynamo graph names its source (seen in torch 2.13)
        without_source(last)
        placeholders[name] = last
    return placeholders


def _front_clock(
    graph: fx.Graph, region: Region, call: fx.Node, front: fx.Node, inputs: CacheInputs, anchor: fx.Node | None
) -> fx.Node:
    """Measure how far the front's output moved since the last step, and keep it for the next one.

    With an anchor, the predicate, only a computed step's is kept.
    """
    tracer = proxies_of(graph)
    source = next(node for node in call.args if isinstance(node, fx.Node) and node.name == _front_of(region).name)
    now: Any = fx.Proxy(source, tracer)
    before: Any = fx.Proxy(front, tracer)
    change: Any = torch.stack(residual_math.relative_change(now, before, inputs.accumulate))
    if anchor is not None:
        pred: Any = fx.Proxy(anchor, tracer)
        now = torch.where(pred, now, before)
    before.copy_(now)
    node: fx.Node = change.node
    return node


def proxies_of(graph: fx.Graph) -> Any:
    """A tracer whose proxies append what is done to them to a graph, marked as made here."""
    return _MarkingTracer(graph)


class _MarkingTracer(fx.proxy.GraphAppendingTracer):
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[MADE] = True
        return node


class _BranchWriter:
    """Writes the two branches; both take the same operands: cache inputs, then the region's live-ins."""

    def __init__(self, body: fx.GraphModule, region: Region, inputs: CacheInputs, options: BranchOptions) -> None:
        self.body, self.region, self.inputs, self.options = body, region, inputs, options

    def compute(self) -> fx.Graph:
        graph, named, live_ins = self._begin()
        results = graph.graph_copy(self.body.graph, live_ins)
        assert isinstance(results, tuple)
        tracer = proxies_of(graph)
        bases = self._bases(live_ins, tracer)
        outputs, measured = [], []
        for j, (out, node) in enumerate(zip(self.region.live_outs, results, strict=True)):
            value = fx.Proxy(node, tracer)
            buffer = self.inputs.residuals[j]
            accumulate = self.inputs.accumulate
            residual = residual_math.residual_of(value, bases[j], accumulate)
            stored, scales = self._stored(j, named, tracer)
            before = self._arrived((*stored, *scales), value)
            measured.extend(residual_math.store(residual, stored, buffer.dtype, accumulate, scales, before))
            outputs.append(_same_layout(value, _tensor(out.node)).node)
        stacked: Any = torch.stack(measured)
        graph.output((*outputs, stacked.node))
        return graph

    def reuse(self) -> fx.Graph:
        graph, named, live_ins = self._begin()
        tracer = proxies_of(graph)
        bases = self._bases(live_ins, tracer)
        control: Any = fx.Proxy(named["control"], tracer)
        measured: Any = fx.Proxy(named["measured"], tracer)
        key = fx.Proxy(named["key"], tracer)
        accumulate, history = self.inputs.accumulate, self.inputs.history
        outputs = []
        for j, out in enumerate(self.region.live_outs):
            example = _tensor(out.node)
            stored, scales = self._stored(j, named, tracer)
            arrived = self._arrived((*stored, *scales), next((base for base in bases if base is not None), control))
            stored, scales = arrived[:history], arrived[history:]
            predicted = residual_math.predict(stored, control, accumulate, example.device, scales)
            if self.options.noise and example.dtype.is_floating_point:
                mean_square = measured[j * residual_math.statistics_length(history) + 1]
                size = control[history] * torch.sqrt(mean_square)
                shape, count = predicted.shape, predicted.numel()
                predicted = predicted + size * residual_math.noise(shape, count, key, j, example.device, accumulate)
            value = residual_math.rebuilt(bases[j], predicted, example.dtype, accumulate)
            value = _in_order_of(value, example)
            if out.base is not None and _dimension_order(example) is None and _dimension_order(_tensor(out.base)) is not None:
                # the sum has the layout of its first term, the base
                value = value.contiguous()
            outputs.append(value.node)
        nothing: Any = torch.zeros_like(measured)
        graph.output((*outputs, _cond_only(nothing).node))
        return graph

    def _begin(self) -> tuple[fx.Graph, dict[str, fx.Node], dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        names = ["control", "key", "measured", *(name for name, _ in _named_buffers(self.inputs))]
        named = {name: graph.placeholder(f"cache_{name}") for name in names}
        live_ins = {}
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                copy = graph.placeholder(node.name)
                # the model may have a variable of the name of a cache input; an argument is named by its target
                copy.target = copy.name
                copy.meta = dict(node.meta)
                live_ins[node] = copy
        return graph, named, live_ins

    def _stored(self, j: int, named: dict[str, fx.Node], tracer: Any) -> tuple[list[fx.Proxy], list[fx.Proxy]]:
        """The residuals of a live-out and their scales, newest first; no scales where none are kept."""
        kinds = ("residual",) if self.inputs.residuals[j].scale is None else ("residual", "scale")
        found = [[fx.Proxy(named[f"{kind}_{j}_{k}"], tracer) for k in range(self.inputs.history)] for kind in kinds]
        return found[0], found[1] if len(found) > 1 else []

    def _arrived(self, kept: Sequence[fx.Proxy], after: fx.Proxy) -> list[fx.Proxy]:
        """What is kept in host memory on the device, no earlier than ``after``; all else as it is."""
        if not self.inputs.fetches:
            return list(kept)
        tracer: Any = after.tracer
        target = torch.ops.cache_dit.from_host.default
        return [fx.Proxy(tracer.create_node("call_function", target, (each.node, after.node), {}), tracer) for each in kept]

    def _bases(self, live_ins: dict[fx.Node, fx.Node], tracer: Any) -> list[fx.Proxy | None]:
        by_name = {node.name: copy for node, copy in live_ins.items() if node.op == "placeholder"}
        return [None if out.base is None else fx.Proxy(by_name[out.base.name], tracer) for out in self.region.live_outs]


def _cond_only(value: fx.Proxy) -> fx.Proxy:
    value.node.meta[COND_ONLY] = True
    return value


def _same_layout(value: fx.Proxy, example: torch.Tensor) -> fx.Proxy:
    """A fresh copy in the layout that the reuse branch gives: cond wants both alike and no aliases of its inputs."""
    return _in_order_of(_cond_only(value.clone(memory_format=torch.contiguous_format)), example, cond_only=True)


def _in_order_of(value: fx.Proxy, example: torch.Tensor, cond_only: bool = False) -> fx.Proxy:
    """Lay a tensor out in the order of dimensions of ``example`` (densely), so that views taken of it stay possible."""
    order = _dimension_order(example)
    if order is None:
        return value
    inverse = [order.index(i) for i in range(len(order))]
    steps = [value.permute(order)]
    steps.append(steps[-1].contiguous())
    steps.append(steps[-1].permute(inverse))
    if cond_only:
        for step in steps:
            _cond_only(step)
    return steps[-1]


def _dimension_order(example: torch.Tensor) -> list[int] | None:
    """Dimensions from the largest stride to the smallest where that is not the natural order; None where it is."""
    strides = example.stride()
    if not all(isinstance(stride, int) for stride in strides):
        hints = [hint_of(stride) for stride in strides]
        if any(hint is None for hint in hints):
            return None
        strides = tuple(int(hint) for hint in hints)
    order = sorted(range(len(strides)), key=lambda i: -strides[i])
    return None if order == list(range(len(strides))) else order
