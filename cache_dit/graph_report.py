"""What was found in one traced graph: written down by the backend, read by the runtime and by `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from .passes.graph_values import example_of, is_parameter
from .passes.module_paths import is_compute
from .texts import TEXTS, text

if TYPE_CHECKING:
    from .passes import CacheInputs, Region, ResidualBuffer


@dataclass(frozen=True, slots=True)
class ValueReport:
    """A tensor that enters or leaves the region: its name in the graph, sizes (symbols where dynamic) and dtype."""

    name: str
    sizes: tuple[str, ...]
    dtype: str
    base: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(self.sizes)}]"


@dataclass(frozen=True, slots=True)
class RegionReport:
    """The cached part of one graph. ``buffer_bytes`` is for one context; None where sizes are only known at a call."""

    lists: tuple[str, ...]
    front: tuple[str, ...]
    cached: tuple[str, ...]
    back: tuple[str, ...]
    nodes: int
    live_ins: tuple[ValueReport, ...]
    live_outs: tuple[ValueReport, ...]
    weights: int
    history: int
    buffer_bytes: int | None

    def holds(self, path: str) -> bool:
        """Whether blocks of the module list at ``path`` are cached, alone or taking turns with those of another."""
        taking_turns = {name for names in self.lists for name in names.split(" + ")}
        return path in taking_turns or any(block.startswith(f"{path}.") for block in self.cached)


@dataclass(slots=True)
class GraphReport:
    """One traced graph. ``reason`` is None where a region was found, else a key of the texts."""

    nodes: int
    break_reason: str | None
    recompile_reason: str | None
    region: RegionReport | None = None
    reason: str | None = None
    detail: str = ""
    lowering: str = ""
    compile_seconds: float = 0.0
    booked: bool = False
    # process groups whose collectives the graph holds
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule, break_reason: str | None, recompile_reason: str | None) -> GraphReport:
        """What is known of a graph before the passes run."""
        nodes = [node for node in gm.graph.nodes if is_compute(node)]
        return cls(len(nodes), break_reason, recompile_reason)

    def refusal_text(self, language: str | None) -> str:
        """Why nothing is cached in this graph, in plain words; '' where something is."""
        if self.reason is None:
            return ""
        key = f"refusal_{self.reason}"
        why = text(key if key in TEXTS else "refusal_other", language, detail=self.detail, reason=self.reason)
        return why if self.break_reason is None else f"{why}; {text('explain_break', language, reason=self.break_reason)}"


def describe_region(region: Region, inputs: CacheInputs) -> RegionReport:
    """The report of a region and of the buffers its cache takes."""
    live_ins = [node for node in region.live_ins if isinstance(example_of(node), torch.Tensor) and not is_parameter(node)]
    return RegionReport(
        lists=region.lists,
        front=region.front,
        cached=region.cached,
        back=region.back,
        nodes=len(region.nodes),
        live_ins=tuple(_value(node) for node in live_ins),
        live_outs=tuple(_value(out.node, out.base) for out in region.live_outs),
        weights=sum(map(is_parameter, region.live_ins)),
        history=inputs.history,
        buffer_bytes=_buffer_bytes(inputs),
    )


def _value(node: fx.Node, base: fx.Node | None = None) -> ValueReport:
    value = example_of(node)
    assert isinstance(value, torch.Tensor)
    dtype = str(value.dtype).removeprefix("torch.")
    return ValueReport(node.name, tuple(str(size) for size in value.shape), dtype, base.name if base is not None else None)


def _buffer_bytes(inputs: CacheInputs) -> int | None:
    buffers = [*(buffer for buffer in inputs.stored for _ in range(inputs.history))]
    if inputs.front is not None:
        buffers.append(inputs.front)
    if not all(isinstance(size, int) for buffer in buffers for size in buffer.sizes):
        return None
    return sum(_bytes_of(buffer) for buffer in buffers)


def _bytes_of(buffer: ResidualBuffer) -> int:
    count = 1
    for size in buffer.sizes:
        count *= int(size)
    return count * buffer.dtype.itemsize
