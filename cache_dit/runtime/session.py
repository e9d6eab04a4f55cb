"""The state of one cached model: its clock, its contexts with what they store, its decisions and its statistics."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..calibration import structure_of
from ..errors import CacheDitError, NoBlocksError
from ..forecasts import FORECASTS, Point, choose_forecast
from ..graph_report import GraphReport
from ..messages import SaidOnce, announce
from ..options import CacheOptions
from ..statistics import CacheStats, Counters, stats_from
from ..strategies import Decision, StepView, build_strategy
from ..texts import text
from ..torch_internals import begin_replayed_step
from . import measurements
from .buffers import ControlMark, Dynamic, Measurement, ResidualStore, allocate
from .clock import ContextKey, StepClock, Tick
from .corrector import Corrector
from .observers import CallRecord, Observer, RunSource
from .offload import Offload
from .operands import CacheOperands
from .program import Cacheable, UncachedGraph
from .ranks import Ranks, find_members, measures
from .signs import Former, Signs, current_caller
from .timing import CallTimer
from .tracing import Capture, Tracing

# Forecasts that 'auto' compares: all of them use the residuals that the others need too.
AUTO_CANDIDATES = ("reuse", "lagrange", "taylor")
# Runs of up to so many steps are those of models that were made for few: much changes from one step to the next.
FEW_STEPS = 5
# Measured steps of which nothing but the statistics needs the errors, worked out together.
MAX_UNREAD = 256
# Contexts kept: a server may name each request.
MAX_CONTEXTS = 64
COMPUTE_FIRST = Decision(False, "first_call")

active_session: ContextVar[Session | None] = ContextVar("cache_dit_active_session", default=None)
context_names: ContextVar[Mapping[int, str]] = ContextVar("cache_dit_context_names", default={})  # noqa: B039


@dataclass(slots=True)
class Context:
    """What one part of the model's step (a prompt, an expert) has stored."""

    run: int = 0
    stores: dict[tuple[Cacheable, int], ResidualStore] = field(default_factory=dict)
    clock: float = 0.0
    last_increment: float | None = None
    signs: Signs = field(default_factory=Signs)

    def forget(self) -> None:
        """Nothing stored is valid any more; buffers are kept for the next run of the same shapes."""
        self.signs.forget()
        for store in self.stores.values():
            store.forget()
        self.clock, self.last_increment = 0.0, None


@dataclass(slots=True)
class Forward:
    """One call of the model, which may run several graphs; they share its step and its decision."""

    name: str | None = None
    tick: Tick | None = None
    time: float | None = None
    decision: Decision = COMPUTE_FIRST
    frames: set[object] = field(default_factory=set)
    occurrences: dict[Cacheable, int] = field(default_factory=dict)
    skipped: int = 0
    computed: int = 0
    uncached: int = 0
    reason: str = ""


class Session:
    """The only mutable state of the runtime. Holds no reference to the model, so that it never keeps one alive.

    Args:
        options: the options in force.
        name: class and id of the model.
        owns_calls: whether someone brackets each call of the model with `begin` and `end`; else a call is what lies
            between two visits of the same frame.
        said: how the user is told what has to be said once; by default as a warning.
    """

    def __init__(self, options: CacheOptions, name: str, *, owns_calls: bool, said: SaidOnce | None = None) -> None:
        self.options, self.name, self.owns_calls = options, name, owns_calls
        self.enabled = True
        self.lock = threading.RLock()
        self.counters = Counters(timed=options.enable_stats)
        self.timer = CallTimer(self.counters)
        self.clock = StepClock()
        self.said = said if said is not None else SaidOnce(options.language)
        self.strategy = build_strategy(options)
        self.contexts: dict[ContextKey, Context] = {}
        self.tracing = Tracing(options.language)
        # set by whoever knows: how to read the timestep of a call, its context's name, and when the pipeline's runs begin
        self.call_time: Callable[[], float | None] | None = None
        self.named_context: str | None = None
        self.runs: RunSource | None = None
        self.runs_whole_schedule = False
        self.observer: Observer | None = None
        # the ranks that decide alike; None: this process by itself, or not known yet
        self.ranks: Ranks | None = None
        self._shares = False
        # whether CUDA graphs may be made of this model's programs
        self.replays = False
        self._touched: list[ResidualStore] = []
        # whether what calls the model stands in its compile slot, which others may take
        self.in_slot = True
        self._forward: Forward | None = None
        # whether what is done at a step depends on how far forecasts were off at earlier ones; else that waits to be worked out
        self._heeds_errors = measures(options)
        self._unread: list[tuple[Measurement, list[list[float]], int]] = []
        # whether the last call met weights that were not those of the call before, as a run's first one does
        self.began_anew = False
        # by run, since the runs of named contexts may overlap: of each step the decision and the hits in a row up to it
        self._decisions: dict[int, dict[int, tuple[Decision, int]]] = {}
        # what the unnamed contexts of former runs were called with throughout
        self._former = Former()
        self._noise_seed = 0
        self._looked_at_controls = False
        self._compiles_seen = 0
        self._several_graphs = False
        self._operands = CacheOperands(options.noise_scale)
        self._offload = Offload()
        self._corrector = Corrector(options, self.said, self._operands)

    # ---- a call of the model -----------------------------------------------------------------------------------

    def join(self, members: Sequence[int], kind: str = "") -> None:
        """From now on decide alike with these ranks; all of them have to say so.

        Raises:
            CacheDitError: some have not come within the time limit, or have other options.
        """
        if self.ranks is not None or not members:
            return
        if self.options.control_refresh is not None:
            raise CacheDitError(text("ranks_control", self.options.language))
        self.ranks = Ranks(members, self.options, kind)
        self._shares = measures(self.options)

    def begin(self) -> None:
        """A call of the model begins."""
        if self._touched:
            self._touched.clear()
        self.began_anew = False
        if self.replays:
            # results of the calls before are copies, so what replays have left may be written over
            begin_replayed_step()
        name = context_names.get().get(id(self)) or self.named_context
        if name is None and self.runs is not None:
            name = self.runs.context()
        self._forward = Forward(name)
        if self.counters.timed or self.options.debug:
            self.timer.start()

    def end(self) -> None:
        """A call of the model has ended: count it."""
        forward, counters = self._forward, self.counters
        self._forward = None
        if forward is None:
            return
        if self._touched:
            self._share()
        counters.calls += 1
        self._several_graphs = forward.computed + forward.skipped + forward.uncached > 1
        hit = forward.skipped > 0
        counters.hits += hit
        compiled = counters.compiles != self._compiles_seen
        if compiled:
            self._compiles_seen = counters.compiles
            counters.compile_calls += 1
        if self.observer is not None:
            timed = counters.timed and not compiled
            self.observer.called(CallRecord(forward.tick, hit, forward.reason, compiled, timed))
        if compiled:
            if forward.name is not None and self.tracing.compiles_for_ever(forward.name):
                self._leave_context(forward.name, "context_recompiles")
            self.timer.discard()
        else:
            if forward.name is not None:
                self.tracing.compiled_nothing(forward.name)
            if counters.timed:
                self.timer.book(hit)
            else:
                self.timer.discard()
        if forward.tick is None:
            self.began_anew = True
            self._count_uncached_step(forward)
            self._said_why_uncached(forward)
            return
        if compiled and self.tracing.main_list_came_apart():
            self._said_side_list()
        if self.options.debug:
            self._log(forward)

    @property
    def is_under_way(self) -> bool:
        """Whether a call of the model has begun and not ended."""
        return self._forward is not None

    @property
    def runs_eager(self) -> bool:
        """Whether the call that has begun belongs to a context that is not worth compiling."""
        forward = self._forward
        return forward is not None and forward.name is not None and self.tracing.is_eager(forward.name)

    def abort(self) -> None:
        """A call ended in an exception: the run counts as ended. Nothing measured is read, the device may be lost."""
        self._forward = None
        self._touched.clear()
        self.timer.discard()
        for context in self.contexts.values():
            context.forget()
        self.end_run()

    def end_run(self) -> None:
        """The next call begins a new run; nothing stored may be used in it. A call of another thread ends first."""
        with self.lock:
            self.clock.end_run()
            for context in self.contexts.values():
                self._forget(context)

    def new_run(
        self,
        num_steps: int | None,
        sigmas: Sequence[float] | None,
        solver: str | None = None,
        prediction: str | None = None,
    ) -> None:
        """The user says that the next call begins a new run."""
        self.end_run()
        self.clock.new_run(num_steps, sigmas, solver, prediction)

    def see(self, result: object) -> None:
        """What the call under way gives its caller."""
        if self._corrector.unseen is not None:
            self._corrector.see(result)

    def stop_correcting(self) -> None:
        """What the sampler makes of the model's output is not known any more: skipped steps stay as they are."""
        if self._corrector.steps is not None:
            self._corrector.end("correction_unknown")

    # ---- a graph within a call ---------------------------------------------------------------------------------

    def run(self, graph: Cacheable, args: Sequence[Any]) -> Sequence[Any]:
        """Run a graph with a cached region: decide, then compute and store, or predict."""
        if self.owns_calls:
            return self._run(graph, args)
        with self.lock:
            try:
                return self._run(graph, args)
            except BaseException:
                self.abort()
                raise

    def note_uncached(self, graph: UncachedGraph) -> None:
        """A graph without a region ran."""
        self.tracing.uncached[graph] = None
        if self._forward is not None:
            self._forward.uncached += 1

    def note_transform(self, what: str) -> None:
        """A call that torch transforms, or traces, runs as if caching were off: no step is counted, so the run ends with it."""
        with self.lock:
            self.abort()
            self.counters.calls += 1
            self.counters.refuse("transform")
            self.said.warn("transform", what=what)

    def _run(self, graph: Cacheable, args: Sequence[Any]) -> Sequence[Any]:
        if graph not in self.tracing.cached:
            self.tracing.cached[graph] = None
            self._drop_other_calibration(graph.report)
            if self.ranks is None:
                option = self.options.group
                self.join(find_members(None, option, graph.report.groups))
        forward = self._enter(graph)
        context = self._enter_step(forward, graph, args)
        assert forward.tick is not None
        occurrence = forward.occurrences.get(graph, 0)
        forward.occurrences[graph] = occurrence + 1
        store, why_empty = self._store_of(context, graph, occurrence, forward.tick.step, args)
        if store is None:
            forward.computed += 1
            result = graph.plain(args)
        else:
            first = forward.computed + forward.skipped == 0
            if first:
                self._decide(forward, context, store)
            result = self._step(forward, context, store, graph, args, why_empty)
        if not self.owns_calls:
            self._leave_graph(forward)
        return result

    def _step(
        self,
        forward: Forward,
        context: Context,
        store: ResidualStore,
        graph: Cacheable,
        args: Sequence[Any],
        why_empty: str,
    ) -> Sequence[Any]:
        assert forward.tick is not None
        if store.pending is not None:
            self._read(store)
        skip = forward.decision.skip
        if skip and not store.points:
            forward.reason = why_empty if why_empty != "unused" else "nothing_stored"
            self.counters.refuse(forward.reason)
            skip = False
        if graph.controls:
            skip = self._heeds_controls(forward, store, [args[i] for i in graph.controls], skip)
        point = Point(forward.tick.step, forward.time)
        before = store.points
        kept = None
        if skip and self._corrector.applies(point.step) and not self._several_graphs:
            kept = self._corrector.keep(store, graph, args)
        flat = (*args, *self._cache_operands(graph, store, point, forward.tick, skip), *store.operands())
        program = graph.programs.reuse if skip else graph.programs.compute
        if graph.inputs.fetches:
            with self._offload.under_way(store.kept(), graph.inputs.device, written=not skip):
                outputs = program(flat)
        else:
            outputs = program(flat)
        if skip:
            forward.skipped += 1
        else:
            forward.computed += 1
            store.computed(point, outputs[graph.outputs])
            if self.clock.jumps_back(forward.tick.step):
                # the sampler has added noise: no line through what was before it
                store.points = store.points[:1]
        if store.front is not None:
            store.moved(outputs[graph.outputs + 1] if store.front_known else None)
            store.front_known = True
        if self._shares:
            self._touched.append(store)
            if not self.owns_calls:
                self._share()
        store.last_step = forward.tick.step
        results = outputs[: graph.outputs]
        if not self._corrector.applies(forward.tick.step):
            return results
        if self._several_graphs:
            self._corrector.end("correction_outputs")
            return results
        if skip:
            if kept is None:
                return results
            return self._corrector.skipped(store, kept, point, self._noise_key_of(forward.tick), results)
        return self._corrector.computed(store, graph, point, before, self._forecast_name(store), results)

    def _share(self) -> None:
        """Send what this call measured to the other ranks: one message, read when the next step is decided."""
        if self.ranks is None or not self._touched:
            return
        stores = self._touched
        pending = [store.pending for store in stores if store.pending is not None and store.pending.agreed is None]
        changed = [store for store in stores if store.change is not None and store.agreed_change is None]
        self._touched = []
        measured = [*(each.values for each in pending), *(s.change for s in changed if s.change is not None)]
        if not measured:
            return
        readers = self.ranks.share(measured)
        for each, read in zip(pending, readers, strict=False):
            each.agreed = read
        for store, read in zip(changed, readers[len(pending) :], strict=True):
            store.agreed_change = read

    def _heeds_controls(
        self, forward: Forward, store: ResidualStore, tensors: Sequence[torch.Tensor], skip: bool
    ) -> bool:
        """What is left of the wish to skip, once it is known whether what enters the blocks from outside has moved.

        Where the user did not ask for that, the first skipped step looks once, to say that such changes are not heard.
        """
        refresh = self.options.control_refresh
        if refresh is None and self._looked_at_controls:
            return skip
        if not skip:
            store.controls = ControlMark(tensors)
            return False
        if store.controls is None or store.controls.same_as(tensors):
            return True
        moved = store.controls.moved(tensors)
        if refresh is None:
            self._looked_at_controls = True
            store.controls = None
            if moved != 0.0 and moved != float("inf"):
                self.said.warn("control_ignored", moved=100.0 * moved)
            return True
        if moved <= refresh:
            return True
        forward.reason = "control_moved"
        self.counters.refuse("control_moved")
        store.controls = ControlMark(tensors)
        return False

    def _enter(self, graph: Cacheable) -> Forward:
        forward = self._forward
        if not self.owns_calls:
            if forward is None or graph.frame in forward.frames:
                self.begin()
                forward = self._forward
            if forward is not None:
                forward.frames.add(graph.frame)
        if forward is None:
            raise AssertionError("a graph ran outside of a call of its model")
        return forward

    def _leave_graph(self, forward: Forward) -> None:
        """Without anyone to say where a call ends, the first graph of a call is what is counted and timed."""
        if forward.computed + forward.skipped == 1:
            self.end()
            self._forward = forward

    def _enter_step(self, forward: Forward, graph: Cacheable, args: Sequence[Any]) -> Context:
        if forward.tick is not None:
            return self.contexts[forward.tick.context]
        self.timer.watch(graph.inputs.device)
        time = self.call_time() if self.call_time is not None else None
        forward.time = time if time is not None else graph.time(args)
        if self.runs is not None:
            self._ask_runs(self.runs)
        tick = self.clock.tick(forward.time, forward.name)
        unnamed = isinstance(tick.context, int)
        caller, given, same = (current_caller(), graph.given(args), None) if unnamed else (None, (), None)
        if unnamed and not tick.fresh:
            known = self.contexts.get(tick.context)
            same = None if known is None else known.signs.same(given)
            if known is not None and same is not None and self._is_of_another(known, caller, given, same):
                tick, same = self.clock.begin_anew(forward.time), None
        forward.tick = tick
        if tick.broke:
            self.counters.refuse("pattern_broken")
        context = self.contexts.get(tick.context) or self._new_context(tick.context)
        if tick.fresh:
            self._forget(context)
            context.run = tick.run
            if tick.context == 1 and tick.broke:
                self._drop_other_contexts()
        if unnamed:
            context.signs.note(tick.step, caller, given, same)
        return context

    def _is_of_another(
        self, context: Context, caller: object, given: Sequence[torch.Tensor], same: list[bool]
    ) -> bool:
        """Whether an unnamed call that keeps to the pattern shows signs of another generation all the same.

        ``same``: which of the arguments are those of the context's last call.
        """
        signs = context.signs
        if signs.has_other_caller(caller):
            self.said.warn("several_callers")
            return True
        if signs.differ(same) or self._former.holds_one_of(given, same):
            return True
        if len(self.contexts) == 1:
            return False
        others = [each.signs for name, each in self.contexts.items() if isinstance(name, int) and each is not context]
        return signs.belong_to(others, given, same)

    def _new_context(self, key: ContextKey) -> Context:
        """A context seen for the first time; beyond a bound the oldest one goes (it would begin anew, and compute)."""
        if len(self.contexts) >= MAX_CONTEXTS:
            oldest = next(iter(self.contexts))
            del self.contexts[oldest]
            self.clock.forget_context(oldest)
        context = self.contexts[key] = Context()
        return context

    def _ask_runs(self, runs: RunSource) -> None:
        if runs.starts_run():
            self.end_run()
        if not self.clock.running and self.runs_whole_schedule and self.clock.sigmas is None:
            self.clock.announce(*runs.schedule(), *runs.solver())

    def _drop_other_contexts(self) -> None:
        for context in self.contexts.values():
            self._forget(context)

    def _forget(self, context: Context) -> None:
        """Nothing this context has stored is valid any more; what its last step measured is counted first."""
        self._read_all(context)
        self._former.extend(context.signs.steady())
        context.forget()

    # ---- what is stored ----------------------------------------------------------------------------------------

    def _store_of(
        self, context: Context, graph: Cacheable, occurrence: int, step: int, args: Sequence[Any]
    ) -> tuple[ResidualStore | None, str]:
        """The store of a region, emptied where it may not be used; and why it is empty."""
        key = (graph, occurrence)
        store = context.stores.get(key)
        dynamic, weights = graph.dynamic_sizes(args), graph.watched(args)
        if store is None or store.dynamic != dynamic:
            why = "first_call" if not context.stores else "shape_changed"
            context.stores.pop(key, None)
            self._release_stale(context, step)
            self.began_anew = True
            return self._allocate(context, key, graph, dynamic, weights), why
        why = "unused"
        if store.points and store.last_step != step - 1:
            store.forget()
            why = "shape_changed"
        if not store.weights.matches(weights):
            if store.points:
                why = "weights_changed"
            store.forget()
            self.began_anew = True
            store.weights = type(store.weights)(weights)
        return store, why

    def _release_stale(self, context: Context, step: int) -> None:
        """Free what other shapes stored: it was not touched in the last step, so it can never be used again."""
        for key in [key for key, store in context.stores.items() if store.last_step < step - 1 or not store.points]:
            del context.stores[key]

    def _allocate(
        self,
        context: Context,
        key: tuple[Cacheable, int],
        graph: Cacheable,
        dynamic: Dynamic,
        weights: Sequence[torch.Tensor],
    ) -> ResidualStore | None:
        try:
            store = allocate(graph.inputs, graph.sizes(dynamic), dynamic, weights)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "memory" not in str(error):
                raise
            self.counters.refuse("out_of_memory")
            if self.ranks is not None:
                raise CacheDitError(text("ranks_memory", self.options.language)) from error
            self.said.warn("out_of_memory")
            return None
        context.stores[key] = store
        return store

    @property
    def cache_bytes(self) -> int:
        """Bytes held now: the buffers, and what correction keeps of skipped steps."""
        # copies: another thread may be in the middle of a call
        return sum(store.held_bytes for context in list(self.contexts.values()) for store in list(context.stores.values()))

    def release(self) -> None:
        """Free everything stored."""
        self.end_run()
        self.contexts.clear()
        self._operands.clear()

    # ---- decisions ---------------------------------------------------------------------------------------------

    def _decide(self, forward: Forward, context: Context, store: ResidualStore) -> None:
        tick = forward.tick
        assert tick is not None
        if tick.run not in self._decisions:
            self._begin_run(tick.run)
        if forward.time is None and not self.clock.manual:
            self.counters.refuse("no_timestep")
            self.said.warn("no_timestep")
            forward.decision = Decision(False, "no_timestep")
        else:
            forward.decision = self._decision_of(tick, context, store)
        forward.reason = forward.decision.reason

    def _begin_run(self, run: int) -> None:
        under_way = {context.run for context in self.contexts.values()}
        self._decisions = {known: made for known, made in self._decisions.items() if known in under_way}
        self._decisions[run] = {}
        self.counters.runs += 1
        # read, not drawn: the noise follows the user's seed and leaves the generator where it is
        self._noise_seed = torch.initial_seed() if self.ranks is None else self.ranks.seed
        self._corrector.begin_run(self.clock, sees_whole_calls=self.owns_calls)
        self._said_about_run()

    def _decision_of(self, tick: Tick, context: Context, store: ResidualStore) -> Decision:
        step, decisions = tick.step, self._decisions[tick.run]
        known = decisions.get(step)
        if known is not None:
            return known[0]
        if store.pending is not None:
            self._read(store)
        if store.change is not None:
            self._read_change(context, store, step)
        hits_before = decisions.get(step - 1, (None, 0))[1]
        view = StepView(
            step=step,
            consecutive_hits=hits_before,
            num_steps=self.clock.num_steps,
            sigmas=self.clock.sigmas,
            stored=store.points,
            clock=context.clock,
            last_increment=context.last_increment,
            forecast_error=store.errors.get(self._forecast_name(store)) if store.errors else None,
            last_gap=store.gap,
            corrected=self._corrector.applies(step),
        )
        decision = self.strategy.decide(view)
        if step == 1:
            if decision.skip:
                self.counters.refuse("first_call")
            decision = COMPUTE_FIRST
        elif decision.skip and self.clock.is_unconfirmed(tick.context, step):
            self.counters.refuse("unconfirmed")
            decision = Decision(False, "unconfirmed")
        elif decision.skip and self.options.schedule is None and self.clock.jumps_back(step):
            # the sampler has added noise: what was stored before it says little of what follows
            self.counters.refuse("restart")
            decision = Decision(False, "restart")
        if not decision.skip:
            context.clock = 0.0
        self.counters.steps += 1
        decisions[step] = decision, hits_before + 1 if decision.skip else 0
        return decision

    def _read_change(self, context: Context, store: ResidualStore, step: int) -> None:
        """Advance the front clock by what the last step measured; a computed step starts it anew behind its change."""
        change = store.read_change()
        if change is None:
            return
        moved, size = change
        context.last_increment = moved / size if size > 0.0 else 0.0
        if not store.points or store.points[0].step != step - 1:
            context.clock += context.last_increment

    def _said_of_few_steps(self) -> None:
        """Which steps of a short run will be skipped, where the strategy goes by their numbers alone."""
        options, steps = self.options, self.clock.num_steps
        if options.strategy not in ("fixed", "dynamic") or options.schedule is not None or steps is None or steps > FEW_STEPS:
            return
        hits, skipped = 0, []
        # the first step computes whatever the strategy says
        for step in range(2, steps + 1):
            skips = self.strategy.decide(StepView(step, hits, steps, None, (), 0.0, None, None)).skip
            hits = hits + 1 if skips and not self.clock.jumps_back(step) else 0
            skipped += [step] if hits else []
        if skipped:
            self.said.warn("few_steps_skipped", steps=steps, skipped=", ".join(map(str, skipped)))

    def _said_about_run(self) -> None:
        options = self.options
        if self.clock.num_steps is None and (options.start_percent > 0.0 or options.end_percent < 1.0):
            self.said.warn("percent_ignored")
        warmup, steps = options.warmup_steps, self.clock.num_steps
        if options.schedule is None and warmup is not None and steps is not None and steps <= warmup:
            self.said.warn("few_steps", steps=steps, warmup=warmup)
        self._said_of_few_steps()
        places = options.strategy in ("adaptive", "sigma") and options.schedule is None
        if options.target_speedup is not None and not places:
            self.said.warn("target_speedup_unused")
        self._said_about_calibration()
        for key in self.strategy.notes():
            self.said.warn(key)

    def _said_about_calibration(self) -> None:
        options, steps = self.options, self.clock.num_steps
        if options.calibration is None:
            return
        if options.strategy != "adaptive" or options.schedule is not None or options.target_speedup is None:
            self.said.warn("calibration_unused")
        elif steps != options.calibration.num_steps:
            self.said.warn("calibration_steps", wanted=options.calibration.num_steps, steps="?" if steps is None else steps)

    def _drop_other_calibration(self, report: GraphReport) -> None:
        """A calibration of other blocks says nothing of these."""
        calibration = self.options.calibration
        if calibration is None or report.region is None or structure_of(report.region) in calibration.structure:
            return
        self.said.warn("calibration_structure")
        self.options = replace(self.options, calibration=None)
        self.strategy = build_strategy(self.options)

    # ---- forecasts ---------------------------------------------------------------------------------------------

    def _forecast_name(self, store: ResidualStore) -> str:
        wanted = self.options.forecast
        if wanted != "auto":
            return wanted
        # where the sampler adds noise again, what a forecast erred by before says nothing of what follows
        if self.clock.restarts:
            return "reuse"
        adaptive = self.options.strategy == "adaptive" and self.options.schedule is None
        # without a list nobody knows where the sampler adds noise again
        placed = adaptive and self.clock.sigmas is not None
        return choose_forecast(store.errors, placed=placed or self._corrector.steps is not None)

    def _read_all(self, context: Context) -> None:
        for store in context.stores.values():
            self._read(store)

    def _read(self, store: ResidualStore) -> None:
        """Read what the last computed step measured: whether it was finite, and how far each forecast was off."""
        pending = store.pending
        if pending is None:
            return
        store.pending = None
        history = len(store.residuals[0])
        parts = measurements.read(pending, history)
        if not measurements.are_finite(parts):
            self.counters.nonfinite += 1
            if self.ranks is not None and not self._shares:
                # to forget it would be a decision that the other ranks do not know of; its elements are stored as 0
                self.said.warn("nonfinite")
                return
            # dropped before anything is said: a warning may be an error to the user
            store.drop_newest(pending.replaced)
            self.said.warn("nonfinite")
            return
        if not pending.before:
            return
        if self._heeds_errors or self.observer is not None or self.options.debug:
            self._read_errors()
            store.errors = self._errors_of(pending, parts, history)
            error = store.errors[self._forecast_name(store)]
            self.counters.record_forecast_error(error)
            if self.observer is not None:
                self.observer.measured(pending.target.step, error)
            return
        self._unread.append((pending, parts, history))
        if len(self._unread) >= MAX_UNREAD:
            self._read_errors()

    def _errors_of(self, pending: Measurement, parts: Sequence[Sequence[float]], history: int) -> dict[str, float]:
        names = AUTO_CANDIDATES if self.options.forecast == "auto" else (self.options.forecast,)
        return measurements.forecast_errors(pending, parts, history, names, self.options.order)

    def _read_errors(self) -> None:
        """Count the errors of forecasts that nothing but the statistics asks for."""
        for measured in self._unread:
            self.counters.record_forecast_error(self._errors_of(*measured)[self.options.forecast])
        self._unread.clear()

    def _cache_operands(
        self, graph: Cacheable, store: ResidualStore, point: Point, tick: Tick, skip: bool
    ) -> tuple[torch.Tensor, ...]:
        weights: tuple[float, ...] = ()
        key = 0
        if skip:
            weights = FORECASTS[self._forecast_name(store)].weights(store.points, point, self.options.order)
            key = self._noise_key_of(tick)
        return self._operands.make(graph.inputs, skip=skip, weights=weights, key=key, measured=store.measured)

    def _noise_key_of(self, tick: Tick) -> int:
        return noise_key(self._noise_seed, tick.step, tick.context) if self.options.noise_scale > 0.0 else 0

    # ---- what the user reads -----------------------------------------------------------------------------------

    def compiled(self, seconds: float) -> None:
        """The backend has compiled a graph of this model."""
        self.counters.compiles += 1
        self.counters.compile_seconds += seconds

    def reset_statistics(self) -> None:
        """Set every statistic to zero."""
        self.timer.reset()
        self.counters.reset()
        self._unread.clear()
        self._compiles_seen = 0

    def statistics(self) -> CacheStats:
        """The measured figures as they stand."""
        self.timer.collect()
        # during a call of another thread the newest measurement is left for later
        if self.lock.acquire(blocking=False):
            try:
                for context in self.contexts.values():
                    self._read_all(context)
                self._read_errors()
            finally:
                self.lock.release()
        return stats_from(
            self.counters,
            name=self.name,
            strategy=self.options.strategy,
            enabled=self.enabled,
            cache_bytes=self.cache_bytes,
        )

    def _said_why_uncached(self, forward: Forward) -> None:
        """A call in which no region ran: say so once, with the reason."""
        if self.tracing.is_eager(forward.name):
            self.counters.refuse("eager_context")
            return
        reasons = [graph.report for graph in self.tracing.uncached]
        if self.tracing.no_folder:
            key = "no_folder"
        elif self.tracing.capture is Capture.BLOCKS:
            key = "grad_mode" if torch.is_grad_enabled() else "no_region"
        elif forward.uncached == 0:
            key = "not_compiled"
        elif any(report.reason == "grad_mode" for report in reasons) and torch.is_grad_enabled():
            key = "grad_mode"
        else:
            key = "no_region"
        self.counters.refuse(key)
        if key == "no_region" and forward.name is not None and self.tracing.cached:
            # Dynamo gave up code that the other contexts share
            self._leave_context(forward.name, "context_apart")
            self.tracing.must_begin_anew = True
            return
        if key == "no_region" and not self.tracing.holds_main_list() and self.tracing.tries_another_way():
            return
        details = "; ".join(dict.fromkeys(report.refusal_text(self.options.language) for report in reasons))
        if key == "no_folder":
            details = self.tracing.no_folder
        if self.options.strict and key in ("no_region", "no_folder"):
            error = NoBlocksError if key == "no_region" else CacheDitError
            raise error(text(key, self.options.language, details=details))
        self.said.warn(key, details=details)

    def _count_uncached_step(self, forward: Forward) -> None:
        """A call in which no region ran is a step of its run all the same."""
        time = self.call_time() if self.call_time is not None else None
        if time is None and not self.clock.manual:
            return
        tick = self.clock.tick(time, forward.name)
        context = self.contexts.get(tick.context)
        if tick.fresh and context is not None:
            context.forget()
            context.run = tick.run
        if tick.run not in self._decisions:
            self._begin_run(tick.run)
        if tick.step not in self._decisions[tick.run]:
            self._decisions[tick.run][tick.step] = COMPUTE_FIRST, 0
            self.counters.steps += 1

    def _leave_context(self, name: str, why: str) -> None:
        """Compiling this context does harm: it runs as it is."""
        self.tracing.leave(name)
        self.said.warn(why, context=name)

    def _said_side_list(self) -> None:
        """Blocks are cached, but not those of the longest list: trace in another way, or say so."""
        tracing = self.tracing
        if tracing.tries_another_way():
            return
        breaks = "; ".join(tracing.breaks()) or "-"
        self.said.warn("side_list", wanted=tracing.main_list, cached=", ".join(tracing.side_lists()), breaks=breaks)

    def notes(self) -> tuple[str, ...]:
        """What else there is to say of how the model is cached."""
        language, said = self.options.language, []
        if self.tracing.capture is Capture.BLOCKS:
            said.append(text("explain_blockwise", language, breaks="; ".join(self.tracing.breaks()) or "-"))
        if self.ranks is not None:
            count, sent = len(self.ranks.members), self.ranks.messages
            said.append(text("explain_ranks", language, count=count, rank=self.ranks.rank, sent=sent))
        return tuple(said)

    def trace_again(self) -> None:
        """The model is about to be traced anew: what is known of its graphs so far does not hold for it."""
        self.tracing.begin_anew()
        for context in self.contexts.values():
            self._forget(context)
            context.stores.clear()

    def _log(self, forward: Forward) -> None:
        tick = forward.tick
        assert tick is not None
        error = self.counters.forecast_error
        announce(
            text(
                "debug_line",
                self.options.language,
                run=tick.run,
                step=tick.step,
                context=tick.context,
                decision=text("skipped" if forward.skipped else "computed", self.options.language),
                reason=forward.reason,
                milliseconds=self.timer.elapsed() * 1e3,
                error="-" if error is None else f"{error:.2e}",
            )
        )


def noise_key(seed: int, step: int, context: ContextKey) -> int:
    """The key of the noise of one step in one context: 31 bits, the same in every process."""
    return zlib.crc32(f"{seed}/{step}/{context}".encode()) & 0x7FFFFFFF

