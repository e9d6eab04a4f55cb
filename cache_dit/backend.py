"""The backend: a Dynamo graph in, a callable out. Once for each graph; what happens at every call is the runtime's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import fx

from . import passes
from .errors import CacheDitError, NoBlocksError
from .graph_report import GraphReport, describe_region
from .lowering import Lowering, Unsuited, choose_lowering, lower, with_cache_examples
from .messages import announce, warn
from .options import CacheOptions, ProgramOptions, resolve_options
from .other_project import warn_of_other_project
from .runtime.program import CachedGraph, Programs, UncachedGraph, sizes_are_known
from .runtime.ranks import is_parallel
from .runtime.registry import session_of_parameter
from .runtime.session import Session, active_session
from .texts import text
from .torch_internals import (
    backend_failure,
    break_reason,
    check_internals,
    collective_groups,
    copy_dynamo_graph,
    forward_of,
    frame_id,
    inner_compiler,
    is_tracer_signal,
    kernels_at_once,
    makes_cuda_graphs,
    prepare_cpp,
    recompile_reason,
    record_rewrite,
    starts_compiled_call,
)

warn_of_other_project()


def cache_dit_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="cache_dit", options={...})``; options as `enable_cache` has them.

    Raises:
        ValueError, TypeError: a wrong option; reaches the user as the ``__cause__`` of torch's own error.
        CacheDitError: nothing could be cached and ``strict`` was asked for.
    """
    try:
        # nobody says where a call ends, so that none is ever corrected
        resolved = _interned(resolve_options(options).where_nothing_is_corrected())
        return compile_graph(gm, example_inputs, resolved.program(), mode, _UnownedCalls(resolved))
    except (ValueError, TypeError, CacheDitError) as error:
        raise backend_failure(error) from error


class OwnedBackend:
    """The backend of models enabled by `enable_cache`: one object for equal programs, so that models share code.

    What is compiled with guards on hooks and what is compiled without share none.
    """

    def __init__(self, program: ProgramOptions, mode: str | None, capture: bool, hooks: bool) -> None:
        self.program, self.mode, self.capture, self.hooks = program, mode, capture, hooks
        self.__name__ = "cache_dit"

    def prepare(self, device: torch.device | None) -> None:
        """Begin what compiling for a device needs while the model is being traced."""
        # options of inductor may say how kernels are compiled
        as_ever = self.program.inner == "inductor" and not self.program.inner_options and self.mode is None
        if as_ever and device is not None and device.type == "cpu":
            prepare_cpp()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return compile_graph(gm, example_inputs, self.program, self.mode, _OwnedCalls())
        except CacheDitError as error:
            raise backend_failure(error) from error


@functools.lru_cache(maxsize=256)
def owned_backend(
    program: ProgramOptions, mode: str | None = None, capture: bool = False, hooks: bool = False
) -> OwnedBackend:
    """The one backend object for these options and this way of tracing: Dynamo compiles anew for each object."""
    return OwnedBackend(program, mode, capture, hooks)


class _OwnedCalls:
    """Calls bracketed by `enable_cache`: the session in force is the one of the model being called."""

    options: CacheOptions | None = None

    def find(self, graph: CachedGraph, args: Sequence[Any]) -> Session | None:
        return active_session.get()

    def note(self, graph: UncachedGraph) -> None:
        session = active_session.get()
        if session is not None:
            session.note_uncached(graph)

    def compiled(self, report: GraphReport) -> None:
        session = active_session.get()
        if session is not None:
            session.compiled(report.compile_seconds)


class _UnownedCalls:
    """Calls under bare ``torch.compile``: the session is found by a parameter among the graph's inputs."""

    # whether a region was found in the frames since the last one that was traced to its end
    found = False

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        # a frame whose last graph break has no graph behind it never told that it was traced to its end
        if starts_compiled_call():
            _UnownedCalls.found = False

    def find(self, graph: CachedGraph, args: Sequence[Any]) -> Session | None:
        if graph.weight_index is None:
            return None
        session = session_of_parameter(args[graph.weight_index], self.options)
        if not graph.report.booked:
            graph.report.booked = True
            session.compiled(graph.report.compile_seconds)
        return session

    def note(self, graph: UncachedGraph) -> None:
        """Nobody asks for graphs of a model that is not known."""

    def compiled(self, report: GraphReport) -> None:
        """Say what could not be cached, once the last graph of a frame has been seen."""
        _UnownedCalls.found |= report.region is not None
        if report.break_reason is not None:
            return
        # a recompilation of the same frame has been spoken of
        if not _UnownedCalls.found and report.reason is not None and report.recompile_reason is None:
            key = "grad_mode" if report.reason == "grad_mode" else "no_region"
            warn(key, self.options.language, details=report.refusal_text(self.options.language))
        _UnownedCalls.found = False


_Calls = _OwnedCalls | _UnownedCalls
_interned_options: list[CacheOptions] = []


def _interned(options: CacheOptions) -> CacheOptions:
    """The first options object equal to this one, so that graphs of one model find one session."""
    for known in _interned_options:
        if known == options:
            return known
    _interned_options.append(options)
    return options


def compile_graph(
    gm: fx.GraphModule, examples: Sequence[Any], program: ProgramOptions, mode: str | None, calls: _Calls
) -> Callable[..., Any]:
    """Run the passes over a copy of the graph and compile what comes out with the inner compiler."""
    check_internals()
    language = calls.options.language if calls.options is not None else _language_of_session()
    compile_inner = FallbackCompiler(program, mode, language)
    report = GraphReport.of(gm, break_reason(gm), recompile_reason())
    if is_parallel():
        report.groups = collective_groups(gm)
    _announce_start(report, language)
    start = perf_counter()
    rewritten = rewrite_graph(gm, program)
    runnable: CachedGraph | UncachedGraph
    if isinstance(rewritten, passes.Refusal):
        report.reason, report.detail = rewritten.key, rewritten.detail
        _raise_if_strict(report, program, calls, language)
        runnable = UncachedGraph(compile_inner(copy_dynamo_graph(gm), examples), report, calls.note)
    else:
        report.region = describe_region(rewritten.region, rewritten.inputs)
        programs = _lowered(rewritten, examples, program, compile_inner, report, language)
        plain = _plain(gm, program, compile_inner)
        runnable = CachedGraph(
            calls.find, programs, plain, rewritten.inputs, gm, report, frame_id(gm), rewritten.controls
        )
    report.compile_seconds = perf_counter() - start
    announce(text("compiled", language, seconds=report.compile_seconds))
    calls.compiled(report)
    return runnable


class FallbackCompiler:
    """The inner compiler of one graph; where it fails, the graph runs as traced, said once. ``strict`` raises instead."""

    def __init__(self, program: ProgramOptions, mode: str | None, language: str | None) -> None:
        self.__name__ = "cache_dit"
        self._program, self._language = program, language
        self._compile = inner_compiler(program.inner, mode, dict(program.inner_options))
        self._replays = makes_cuda_graphs(program.inner, mode, dict(program.inner_options))
        self.gave_up = False

    def replays_on(self, device: torch.device) -> bool:
        """Whether CUDA graphs are made of what is compiled for a device."""
        return self._replays and device.type == "cuda"

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        spare = copy_dynamo_graph(gm)
        try:
            compiled: Callable[..., Any] = self._compile(gm, examples)
        except Exception as error:
            if is_tracer_signal(error):
                raise
            self.give_up(error)
            compiled = self._compile(spare, examples)
        return compiled

    def give_up(self, error: Exception) -> None:
        """From now on run graphs as traced.

        Raises:
            CacheDitError: the user wants no less than what was asked for.
        """
        if self._program.strict:
            raise CacheDitError(text("inner_failed", self._language, inner=self._program.inner, why=error)) from error
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        warn("inner_failed", self._language, stacklevel=4, inner=self._program.inner, why=reason)
        self.gave_up = True
        self._compile = inner_compiler("eager", None, {})


@dataclass(frozen=True, slots=True)
class Branched:
    """A graph with the cache branch in it. ``controls``: inputs that enter the region from outside, by position."""

    graph: fx.GraphModule
    region: passes.Region
    inputs: passes.CacheInputs
    controls: tuple[int, ...]


def rewrite_graph(
    gm: fx.GraphModule,
    program: ProgramOptions,
    sizes_known: Callable[[passes.CacheInputs, Sequence[fx.Node]], bool] = sizes_are_known,
    *,
    fetches: bool = True,
) -> Branched | passes.Refusal:
    """The passes up to the cond form, over a copy. ``fetches``: as of `BranchOptions`."""
    if torch.is_grad_enabled():
        return passes.Refusal("grad_mode")
    graph = copy_dynamo_graph(gm)
    named = (program.region, program.region) if isinstance(program.region, str) else program.region

    region = find_region(graph, front=program.front_blocks, back=program.back_blocks, named=named)
    if isinstance(region, passes.Refusal):
        return region
    controls = passes.control_inputs(graph, region)
    local = passes.localize_region(graph, region)
    if isinstance(local, passes.Refusal):
        return local
    if local is not region:
        record_rewrite("localize_region", 1, graph)
        region = local
    record_rewrite("outline_region", passes.outline_region(graph, region), graph)
    inputs = passes.insert_cache_branch(graph, region, replace(program.branch, fetches=fetches))
    record_rewrite("insert_cache_branch", 1, graph)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if not sizes_known(inputs, placeholders):
        return passes.Refusal("sizes_unknown")
    graph.graph.lint()
    graph.recompile()
    return Branched(graph, region, inputs, controls)


def find_region(
    graph: fx.GraphModule, *, front: int = 1, back: int = 0, named: tuple[str, str] | None = None
) -> passes.Region | passes.Refusal:
    """The analyses. Where blocks write to a stream that outlives them, the graph is rewritten first and searched once more."""

    def chosen() -> passes.Region | passes.Refusal:
        return passes.choose_region(graph, passes.find_blocks(graph), front=front, back=back, named=named)

    region = chosen()
    if isinstance(region, passes.Refusal) and region.key == "writes_outside":
        apart = passes.write_apart(graph, copying=True)
        record_rewrite("write_apart", apart, graph)
        region = chosen() if apart else region
    return region


def _lowered(
    rewritten: Branched,
    examples: Sequence[Any],
    program: ProgramOptions,
    compile_inner: FallbackCompiler,
    report: GraphReport,
    language: str | None,
) -> Programs:
    """The programs in the form that was asked for, else whole where the graph does not come in pieces."""
    graph, inputs = rewritten.graph, rewritten.inputs
    examples, replayed = with_cache_examples(graph, examples), compile_inner.replays_on(inputs.device)
    form = choose_lowering(program.lowering, blocks=len(rewritten.region.blocks), replayed=replayed)

    def lowered(form: Lowering) -> Programs:
        with kernels_at_once() as wait_for_all:
            programs = lower(form, graph, inputs, examples, compile_inner, replayed=replayed)
            try:
                wait_for_all()
            except Exception as error:
                compile_inner.give_up(error)
                programs = lower(form, graph, inputs, examples, compile_inner, replayed=replayed)
        return programs

    try:
        programs = lowered(form)
    except Unsuited as error:
        asked, form = form.name, choose_lowering("specialize")
        if program.lowering == asked:
            why = text(f"whole_{error}", language)
            warn("lowering_replaced", language, wanted=asked, why=why, used=form.name)
        programs = lowered(form)
    report.lowering = form.name
    return programs


def _plain(gm: fx.GraphModule, program: ProgramOptions, compile_inner: FallbackCompiler) -> Callable[..., Any]:
    """The graph as it was traced, for calls that must not use the cache; compiled when the first of them comes."""
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(compiled())
        return found[0](*args)

    def compiled() -> Callable[..., Any]:
        graph = copy_dynamo_graph(gm)
        if program.inner != "eager" and not compile_inner.gave_up:
            try:
                return torch.compile(graph, backend=compile_inner, dynamic=True)
            except OSError as error:
                # the folder of torch's caches has gone, and cannot be made again
                compile_inner.give_up(error)
        return forward_of(graph)

    return run


def _announce_start(report: GraphReport, language: str | None) -> None:
    session = active_session.get()
    if session is not None and session.observer is not None:
        session.observer.compiling(report.recompile_reason)
    if report.recompile_reason is not None:
        announce(text("recompiling", language, what=report.recompile_reason))
    else:
        announce(text("compiling", language))


def _raise_if_strict(report: GraphReport, program: ProgramOptions, calls: _Calls, language: str | None) -> None:
    """Under bare ``torch.compile`` the last graph of a frame is where it is known that nothing was found."""
    if not program.strict or isinstance(calls, _OwnedCalls) or report.break_reason or _UnownedCalls.found:
        return
    error = NoBlocksError if report.reason == "no_blocks" else CacheDitError
    raise error(text("no_region", language, details=report.refusal_text(language)))


def _language_of_session() -> str | None:
    session = active_session.get()
    return session.options.language if session is not None else None
