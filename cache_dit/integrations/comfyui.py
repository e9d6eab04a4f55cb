"""ComfyUI: caching in a ``ModelPatcher``, through wrappers on it; the model that patchers share is never changed.

Four of ComfyUI's wrapper points are used. ``OUTER_SAMPLE`` brackets a run and knows its noise levels, ``PREDICT_NOISE``
is one evaluation of the sampler, ``APPLY_MODEL`` names the conditions of a call, and ``DIFFUSION_MODEL`` is where the
compiled function takes the place of the model's own behind every other wrapper. Models that never reach the last one are
cached through their ``compile`` slot, for the time of the call. (ComfyUI 0.3.75 to 0.30.0.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ..backend import OwnedBackend, owned_backend
from ..errors import NoBlocksError
from ..messages import SaidOnce, announce
from ..options import CacheOptions
from ..runtime.call import CachedCall
from ..runtime.observers import CallRecord
from ..runtime.registry import model_name, register_holder
from ..runtime.session import Session, context_names
from ..statistics import CacheStats, Counters, format_speedup, stats_between
from ..structure import may_have_blocks
from ..texts import TEXTS, text
from ..torch_internals import COMPILE_SLOT, original_of, uncompiled_call
from .comfyui_models import Mentions, reaches_wrappers, unreached
from .comfyui_sampling import SamplerClock, Sampling
from .comfyui_solver import solver_of
from .timeline import Timeline

KEY = "cache_dit"
# Under this key ComfyUI's own node, and those of other packs, wrap a model that they have compiled.
COMPILE_KEY = "torch.compile"
OUTER_SAMPLE, PREDICT_NOISE, APPLY_MODEL, DIFFUSION_MODEL = (
    "outer_sample",
    "predict_noise",
    "apply_model",
    "diffusion_model",
)
_CALLBACK = 5
_ABSENT: Any = object()


def is_patcher(model: object) -> bool:
    """Whether ``model`` is a ``ModelPatcher``: it takes wrappers, and its model holds a ``diffusion_model``."""
    return hasattr(getattr(model, "model", None), "diffusion_model") and hasattr(model, "add_wrapper_with_key")


def cache_of(patcher: Any) -> PatcherCache | None:
    """The cache whose wrappers this patcher carries, its own or one that it was cloned with."""
    found = patcher.get_attachment(KEY)
    return found if isinstance(found, PatcherCache) else None


def enable_patcher(patcher: Any, options: CacheOptions) -> PatcherCache:
    """Put the wrappers on a patcher that has none in force.

    Raises:
        NoBlocksError: the model holds no repeated blocks; the patcher is untouched.
    """
    if not may_have_blocks(plain_module(patcher.model.diffusion_model)):
        raise NoBlocksError(text("no_transformer", options.language))
    return _attach(patcher, PatcherCache(options, patcher))


def disable_patcher(patcher: Any) -> bool:
    """Take the wrappers off again; whether there were any in force. Clones that were made with them keep theirs.

    The patcher keeps its statistics; a clone that shared them gets empty ones.
    """
    cache = cache_of(patcher)
    if cache is None or not cache.session.enabled:
        return False
    if cache.owner() is not patcher:
        cache = _attach(patcher, cache.switched_off(patcher))
    else:
        cache.switch_off()
    _detach(patcher)
    return True


def switch_off(patcher: Any) -> PatcherCache | None:
    """Let a clone run uncached: it keeps the settings it came with and goes on counting its calls."""
    cache = cache_of(patcher)
    if cache is None or not cache.session.enabled:
        return cache
    _detach(patcher)
    return _attach(patcher, cache.switched_off(patcher))


def switch_on(patcher: Any) -> PatcherCache | None:
    """Let a clone that was switched off run cached again, with the settings it came with; None where it has none."""
    cache = cache_of(patcher)
    if cache is None or cache.session.enabled:
        return cache
    _detach(patcher)
    return _attach(patcher, PatcherCache(cache.session.options, patcher))


def sessions_of_patcher(patcher: Any) -> list[Session]:
    """The session of the cache that a patcher carries."""
    cache = cache_of(patcher)
    return [] if cache is None else [cache.session]


def _attach(patcher: Any, cache: PatcherCache) -> PatcherCache:
    for kind, wrapper in cache.wrappers().items():
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
    patcher.set_attachments(KEY, cache)
    register_holder(cache, cache.session)
    return cache


def _detach(patcher: Any) -> None:
    for kind in (OUTER_SAMPLE, PREDICT_NOISE, APPLY_MODEL, DIFFUSION_MODEL):
        patcher.remove_wrappers_with_key(kind, KEY)


def plain_module(module: Any) -> torch.nn.Module:
    """The module inside what ``torch.compile(module)`` returned."""
    original = original_of(module)
    found: torch.nn.Module = original if isinstance(original, torch.nn.Module) else module
    return found


class Display(Protocol):
    """Where the state of a cache is shown while it samples, such as a node."""

    def began(self, steps: int | None) -> None:
        """A run begins."""

    def compiling(self, reason: str | None) -> None:
        """A model is about to be compiled; of a recompilation, what changed. `progress` or `ended` follows."""

    def progress(self, step: int, steps: int | None, skipped: int) -> None:
        """A call has ended."""

    def ended(self, line: str) -> None:
        """A run has ended; ``line`` says what came of it."""

    def said(self, message: str) -> None:
        """Something that the user has to know."""


_last: Callable[[], PatcherCache | None] = lambda: None  # noqa: E731


def last_sampled() -> PatcherCache | None:
    """The cache of the model that sampled last, while it lives."""
    return _last()


class PatcherCache:
    """What a patcher and its clones carry: a session, the compiled calls, and the run under way."""

    def __init__(self, options: CacheOptions, patcher: Any, *, enabled: bool = True) -> None:
        self.owner: Callable[[], Any] = weakref.ref(patcher)
        self._said = _SaidHere(options.language, self)
        self.session = Session(options, model_name(patcher), owns_calls=True, said=self._said)
        self.session.enabled = enabled
        self.clock = self.session.clock = SamplerClock()
        self.backend: OwnedBackend = owned_backend(options.program())
        self.timeline = Timeline()
        # weakly: a cache goes with the last patcher that carries it, and its statistics with it
        self.session.observer = weakref.proxy(self)
        self.session.timer.booked = self.timeline.timed
        self.display: Display | None = None
        self.before: Counters = replace(self.session.counters)
        self._calls: dict[int, PatchedCall] = {}
        self._run: Sampling | None = None

    def __deepcopy__(self, memo: object) -> PatcherCache:
        # early servers copy the options of a model deeply when it is cloned
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a cache belongs to its process")

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """The wrapper for each point where ComfyUI takes one."""
        return {
            OUTER_SAMPLE: self.outer_sample,
            PREDICT_NOISE: self.predict_noise,
            APPLY_MODEL: self.apply_model,
            DIFFUSION_MODEL: self.diffusion_model,
        }

    def switch_off(self) -> None:
        """Nothing is cached from now on."""
        self.session.enabled = False
        self.session.release()
        self._calls.clear()

    def switched_off(self, patcher: Any) -> PatcherCache:
        """A cache with the same settings for another patcher, which is off."""
        return PatcherCache(self.session.options, patcher, enabled=False)

    # ---- wrappers ----------------------------------------------------------------------------------------------

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One sampling: a run."""
        if self._run is not None:
            # a sampling within a sampling of the same model is no run of its own
            return executor(*args, **kwargs)
        run = self._begin(executor.class_obj, args)
        given = list(args)
        if len(given) > _CALLBACK:
            given[_CALLBACK] = run.counting(given[_CALLBACK])
        try:
            return executor(*given, **kwargs)
        except BaseException:
            self.session.abort()
            raise
        finally:
            self._end(run)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the sampler: a step."""
        run = self._run
        if run is not None:
            run.evaluate(args[1] if len(args) > 1 else kwargs.get("timestep"))
            self.clock.evaluation = run.evaluations
            self.clock.num_steps, self.clock.sigmas = run.expected_evaluations(), run.listed_sigmas()
            if not run.uniform:
                # a condition that comes or goes changes the weights of the others
                self.session.stop_correcting()
        return executor(*args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, for some of the conditions."""
        run = self._run
        if run is None or torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        if not self.session.enabled:
            return self._counted(executor, args, kwargs)
        run.applied += 1
        name = run.context(_options_among(args, kwargs))
        token = context_names.set({**context_names.get(), id(self.session): name})
        try:
            return self._applied(executor, args, kwargs)
        finally:
            context_names.reset(token)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The model itself: the compiled function takes its place, behind whatever else wraps it."""
        run = self._run
        if torch.compiler.is_compiling() or run is None or not self.session.enabled:
            return executor(*args, **kwargs)
        module, original = executor.class_obj, executor.original
        is_its_own: bool = getattr(original, "__self__", None) is module
        if not is_its_own:
            self._said.warn("comfy_forward_replaced", what=type(module).__name__)
            return executor(*args, **kwargs)
        executor.original = self._call(module, original)
        return executor(*args, **kwargs)

    def _applied(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model applied, with the compiled call in its slot where it does not wrap itself."""
        base = executor.class_obj
        held = base.diffusion_model
        module = plain_module(held)
        if held is not module:
            # compiled by another pack, which would trace into what compiles it here
            self._said.warn("comfy_compiled_elsewhere")
            base.diffusion_model = module
        inside = reaches_wrappers(type(module))
        run = self._run
        if run is not None:
            run.kind = type(module)
            run.freeze(module)
        before = vars(module).get(COMPILE_SLOT, _ABSENT)
        if not inside:
            setattr(module, COMPILE_SLOT, self._call(module, uncompiled_call(module)))
        elif before is not _ABSENT:
            delattr(module, COMPILE_SLOT)
        try:
            return executor(*args, **kwargs)
        finally:
            if before is not _ABSENT:
                setattr(module, COMPILE_SLOT, before)
            elif not inside:
                delattr(module, COMPILE_SLOT)
            if held is not module:
                base.diffusion_model = held

    def _counted(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a model that is switched off: counted and timed, and nothing else."""
        session, timer, timed = self.session, self.session.timer, self.session.counters.timed
        if timed:
            if args and isinstance(args[0], torch.Tensor):
                timer.watch(args[0].device)
            timer.start()
        result = executor(*args, **kwargs)
        session.counters.calls += 1
        self.called(CallRecord(None, False, "disabled", False, timed))
        if timed:
            timer.book(False)
        return result

    def _call(self, module: torch.nn.Module, function: Callable[..., Any]) -> PatchedCall:
        call = self._calls.get(id(module))
        if call is None:
            call = self._calls[id(module)] = PatchedCall(module, function, self)
        return call

    # ---- runs --------------------------------------------------------------------------------------------------

    def _begin(self, guider: Any, args: Sequence[Any]) -> Sampling:
        global _last
        _last = weakref.ref(self)
        sampler, sigmas = (args[2], args[3]) if len(args) > 3 else (None, None)
        run = Sampling(sampler, sigmas)
        session = self.session
        solver, prediction = solver_of(guider, sampler, run.listed_sigmas(), KEY)
        with session.lock:
            session.end_run()
            self.clock.begin()
            self.clock.announce(run.expected_evaluations(), run.listed_sigmas(), solver, prediction)
            self.before = replace(session.counters, refused=dict(session.counters.refused))
            self.timeline.begin(run.steps)
            self._run = run
        if session.enabled:
            self._leave_other_compilers(guider)
        if self.display is not None:
            self.display.began(run.steps)
        return run

    def _end(self, run: Sampling) -> None:
        session = self.session
        with session.lock:
            self._run = None
            run.learn()
            run.thaw()
            # the buffers are of no use to the next run, and the decoder wants the memory
            session.release()
            session.timer.collect()
        if session.enabled and run.applied and not run.calls and run.kind is not None and reaches_wrappers(run.kind):
            unreached.add(run.kind)
            self._said.warn("comfy_not_reached", what=run.kind.__name__)
        line = self.run_line()
        announce(line)
        if self.display is not None:
            self.display.ended(line)

    def _leave_other_compilers(self, guider: Any) -> None:
        """ComfyUI's own compile node, and packs that use its function: their compiled model is left out of this run."""
        options = getattr(guider, "model_options", {}).get("transformer_options", {})
        wrappers = options.get("wrappers", {}).get(APPLY_MODEL, {})
        if wrappers.pop(COMPILE_KEY, None):
            self._said.warn("comfy_compiled_elsewhere")

    def run_statistics(self) -> CacheStats:
        """The figures of the last run alone, or of the one under way."""
        session = self.session
        session.timer.collect()
        return stats_between(
            self.before,
            session.counters,
            name=session.name,
            strategy=session.options.strategy,
            enabled=session.enabled,
        )

    def run_line(self) -> str:
        """The last run in one line."""
        stats, language = self.run_statistics(), self.session.options.language
        if not self.session.enabled:
            return text("comfy_run_off", language, steps=self.timeline.steps_done(), calls=stats.calls)
        return text(
            "comfy_run",
            language,
            skipped=self.timeline.steps_skipped(),
            steps=self.timeline.steps_done(),
            speedup=format_speedup(stats, language),
        )

    # ---- what the session tells --------------------------------------------------------------------------------

    def compiling(self, reason: str | None) -> None:
        """A graph is about to be compiled."""
        if self.display is not None:
            self.display.compiling(reason)

    def called(self, call: CallRecord) -> None:
        """A call of the model has ended."""
        run = self._run
        if run is not None:
            run.calls += 1
        self.timeline.called(call, run.evaluations if run is not None else 0)
        if self.display is not None:
            steps = run.expected_evaluations() if run is not None else None
            self.display.progress(self.timeline.steps_done(), steps, self.timeline.steps_skipped())

    def measured(self, step: int, error: float) -> None:
        """A forecast error is known."""
        self.timeline.measured(step, error)

    @property
    def sigma(self) -> float | None:
        """The noise level of the evaluation under way."""
        return self._run.sigma if self._run is not None else None


class _SaidHere(SaidOnce):
    """Warnings that also reach the node, in the words for a workflow where there are such."""

    __slots__ = ("_cache",)

    def __init__(self, language: str | None, cache: PatcherCache) -> None:
        super().__init__(language)
        self._cache: Callable[[], PatcherCache | None] = weakref.ref(cache)

    def warn(self, key: str, **values: object) -> None:
        cache, here = self._cache(), f"comfy_{key}"
        key = here if here in TEXTS else key
        if key not in self._said and cache is not None and cache.display is not None:
            cache.display.said(text(key, self._language, **values))
        super().warn(key, **values)


class PatchedCall(CachedCall):
    """The compiled function of a patched model: takes the sampler's noise level, and what of the options the model reads."""

    def __init__(self, module: torch.nn.Module, function: Callable[..., Any], cache: PatcherCache) -> None:
        super().__init__(module, cache.session, cache.backend, function)
        self._cache: PatcherCache = weakref.proxy(cache)
        self._read = Mentions.of(module)
        self._first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._first:
            self._first = False
            self._cache.compiling(None)
        return super().__call__(
            *(self._trimmed(value) for value in args), **{name: self._trimmed(value) for name, value in kwargs.items()}
        )

    def _trimmed(self, value: Any) -> Any:
        if not isinstance(value, dict) or "cond_or_uncond" not in value:
            return value
        return self._read.trimmed(value)

    def _time(self) -> float | None:
        return self._cache.sigma


def _options_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``transformer_options`` of a call, wherever they stand."""
    for value in (kwargs.get("transformer_options"), *args):
        if isinstance(value, dict) and "cond_or_uncond" in value:
            return value
    return {}
