"""What the compiler found in a model, as data and in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .graph_report import GraphReport, RegionReport
from .texts import TEXTS, text

if TYPE_CHECKING:
    from .runtime.session import Session


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the compiler found in one model; ``str()`` of it is the text for the user.

    Attributes:
        name: class and id of the model.
        enabled: whether caching is on.
        called: whether the model has been called, and so compiled, since caching was turned on.
        graphs: one report for each compiled graph that ran, cached ones first.
        graph_breaks: the reason and the user's line of each graph break.
        buffer_bytes: bytes of the buffers for one context, known before the first skip; None where shapes are dynamic.
        held_bytes: bytes held now for all contexts: the buffers, and what correction keeps of skipped steps.
        refused: how often each reason made a step compute that was due to be skipped.
        compile_seconds: time spent in compiling.
    """

    name: str
    enabled: bool
    called: bool
    graphs: tuple[GraphReport, ...]
    graph_breaks: tuple[str, ...]
    buffer_bytes: int | None
    held_bytes: int
    refused: Mapping[str, int]
    compile_seconds: float
    notes: tuple[str, ...] = ()
    language: str | None = field(default=None, repr=False)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module paths of every block of the chain, in execution order: front, cached, back."""
        region = self.region
        return () if region is None else (*region.front, *region.cached, *region.back)

    @property
    def region(self) -> RegionReport | None:
        """The largest region of all graphs."""
        regions = [graph.region for graph in self.graphs if graph.region is not None]
        return max(regions, key=lambda region: region.nodes, default=None)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Sequence[str]:
        language = self.language
        lines = [text("explain_title", language, name=self.name, status=self._status())]
        if not self.called:
            return [*lines, text("explain_not_called", language)]
        breaks = len(self.graph_breaks)
        lines.append(text("explain_graphs", language, graphs=len(self.graphs), breaks=breaks, seconds=self.compile_seconds))
        for number, graph in enumerate(self.graphs, 1):
            lines.extend(_graph_lines(number, graph, language))
        lines.extend(text("explain_break", language, reason=reason) for reason in self.graph_breaks)
        lines.append(text("explain_held", language, size=readable_bytes(self.held_bytes)))
        if self.refused:
            lines.append(text("explain_refused", language))
            lines.extend(f"    {refusal_name(key, language)}: {count}" for key, count in self.refused.items())
        return [*lines, *self.notes]

    def _status(self) -> str:
        return text("enabled" if self.enabled else "disabled", self.language)


def _graph_lines(number: int, graph: GraphReport, language: str | None) -> list[str]:
    head = text("explain_graph", language, number=number, nodes=graph.nodes, seconds=graph.compile_seconds)
    region = graph.region
    if region is None:
        return [head, "    " + graph.refusal_text(language)]
    size = text("explain_dynamic", language)
    if region.buffer_bytes is not None:
        size = readable_bytes(region.buffer_bytes)
    lines = [
        head,
        text(
            "explain_region",
            language,
            lists=" -> ".join(region.lists) or " .. ".join(region.cached),
            total=len(region.front) + len(region.cached) + len(region.back),
            cached=_span(region.cached),
            count=len(region.cached),
            front=_span(region.front),
            back=_span(region.back),
        ),
        text("explain_live_ins", language, values=", ".join(map(str, region.live_ins)), weights=region.weights),
    ]
    for value in region.live_outs:
        key = "explain_residual" if value.base else "explain_whole"
        lines.append(text(key, language, value=str(value), base=value.base))
    lines.append(text("explain_buffers", language, size=size, history=region.history, lowering=graph.lowering))
    return lines


def _span(paths: Sequence[str]) -> str:
    if not paths:
        return "-"
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"


def refusal_name(key: str, language: str | None) -> str:
    """The short name of a reason to compute, for counts."""
    name = f"count_{key}"
    return text(name, language) if name in TEXTS else key


def readable_bytes(count: int) -> str:
    """Bytes with a unit that reads well."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def explain_session(session: Session) -> Explanation:
    """What is known of one session's model."""
    # blocks that are cached one by one share a report
    cached = list({id(graph.report): graph.report for graph in session.tracing.cached}.values())
    uncached = [graph.report for graph in session.tracing.uncached]
    reports = [*cached, *uncached]
    # several graphs of one frame are the same call in other shapes; those of several frames run in one call
    sizes: dict[object, list[int | None]] = {}
    for graph in session.tracing.cached:
        if graph.report.region is not None:
            sizes.setdefault(graph.frame, []).append(graph.report.region.buffer_bytes)
    known = [max(size for size in frame if size is not None) for frame in sizes.values() if None not in frame]
    return Explanation(
        name=session.name,
        enabled=session.enabled,
        called=bool(reports),
        graphs=tuple(reports),
        graph_breaks=tuple(report.break_reason for report in reports if report.break_reason is not None),
        buffer_bytes=sum(known) if known and len(known) == len(sizes) else None,
        held_bytes=session.cache_bytes,
        refused=dict(session.counters.refused),
        compile_seconds=session.counters.compile_seconds,
        notes=session.notes(),
        language=session.options.language,
    )
