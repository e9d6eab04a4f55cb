"""ComfyUI: caching in a ``ModelPatcher``, through wrappers on it; the model that patchers share is never changed.

Four of ComfyUI's wrapper points are used. ``OUTER_SAMPLE`` brackets a run and knows its noise levels, ``PREDICT_NOISE``
is one evaluation of the sampler, ``APPLY_MODEL`` names the conditions of a call, and ``DIFFUSION_MODEL`` is where the
compiled function takes the place of the model's own behind every other wrapper. Models that never reach the last one are
cached through their ``compile`` slot, for the time of the call. (ComfyUI 0.3.75 to 0.30.0.)
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Protocol

import torch

from ..backend import OwnedBackend, owned_backend
from ..errors import NoBlocksError
from ..messages import SaidOnce, announce
from ..options import CacheOptions
from ..runtime.call import CachedCall
from ..runtime.clock import ContextKey, StepClock, Tick
from ..runtime.registry import model_name, register_holder
from ..runtime.session import CallRecord, Session, context_names
from ..statistics import CacheStats, Counters, format_speedup, stats_between
from ..structure import may_have_blocks
from ..texts import text
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
_SLOT = "_compiled_call_impl"
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
    original = getattr(module, "_orig_mod", None)
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
        self.session = Session(options, model_name(patcher), owns_calls=True)
        self.session.enabled = enabled
        self.clock = self.session.clock = SamplerClock()
        self.session.said = self._said = _SaidHere(options.language, self)
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
        inside = _wraps_itself(type(module))
        run = self._run
        if run is not None:
            run.kind = type(module)
        before = vars(module).get(_SLOT, _ABSENT)
        if not inside:
            setattr(module, _SLOT, self._call(module, module._call_impl))
        elif before is not _ABSENT:
            delattr(module, _SLOT)
        try:
            return executor(*args, **kwargs)
        finally:
            if before is not _ABSENT:
                setattr(module, _SLOT, before)
            elif not inside:
                delattr(module, _SLOT)
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
        with session.lock:
            session.end_run()
            self.clock.begin(run.expected_evaluations(), run.listed_sigmas())
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
            # the buffers are of no use to the next run, and the decoder wants the memory
            session.release()
            session.timer.collect()
        if session.enabled and run.applied and not run.calls and run.kind is not None and _wraps_itself(run.kind):
            _unreached.add(run.kind)
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
    """Warnings that also reach the node."""

    __slots__ = ("_cache",)

    def __init__(self, language: str | None, cache: PatcherCache) -> None:
        super().__init__(language)
        self._cache: Callable[[], PatcherCache | None] = weakref.ref(cache)

    def warn(self, key: str, **values: object) -> None:
        cache = self._cache()
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


class SamplerClock(StepClock):
    """Counts what the sampler says: which run, and which of its evaluations. Nothing is guessed from timesteps."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.evaluation = 0
        self._seen: set[str] = set()

    def begin(self, num_steps: int | None, sigmas: Sequence[float] | None) -> None:
        """A sampling begins."""
        self.run += 1
        self.evaluation = 0
        self._seen.clear()
        self.announce(num_steps, sigmas)

    def end_run(self) -> None:
        """What is stored may not be used again; the sampler itself may go on."""
        self._seen.clear()

    def forget_context(self, name: ContextKey) -> None:
        """The next call in this context finds nothing stored."""
        self._seen.discard(str(name))

    @property
    def running(self) -> bool:
        """Whether a call was counted since the run began."""
        return bool(self._seen)

    def tick(self, time: float | None, name: str | None = None) -> Tick:
        """One call of the model."""
        key = name or "model"
        fresh = key not in self._seen
        self._seen.add(key)
        return Tick(self.run, key, max(1, self.evaluation), fresh, False)


@dataclass(slots=True)
class Pace:
    """How a sampler evaluates: evaluations of a run of ``steps`` steps, and whether each is at a listed noise level."""

    steps: int
    evaluations: int
    listed: bool

    def evaluations_of(self, steps: int) -> int:
        """Evaluations of a run of so many steps: a sampler with two a step makes one or none less in all."""
        each = -(-self.evaluations // self.steps)
        return each * steps - (each * self.steps - self.evaluations)


_paces: dict[object, Pace] = {}


class Sampling:
    """One sampling under way: its noise levels, its evaluations, and the conditions that each of them has seen.

    The noise level of an evaluation is read where that costs nothing. On other devices it is taken from the list once
    the sampler has been seen to evaluate at listed levels alone, so that the host never waits for the device.
    """

    def __init__(self, sampler: Any, sigmas: Any) -> None:
        self.sigmas = _levels(sigmas)
        self.steps = len(self.sigmas) - 1 if self.sigmas is not None else None
        self.evaluations = 0
        # calls of the model, and those of them that reached the compiled function
        self.applied = 0
        self.calls = 0
        self.sigma: float | None = None
        self.kind: type | None = None
        self._sampler = _sampler_key(sampler)
        self._next = 0
        self._since_callback = 0
        self._unlisted = False
        self._names: dict[object, str] = {}
        self._seen: dict[object, int] = {}

    def counting(self, callback: Any) -> Callable[..., Any]:
        """The sampler's callback, which says how many of the steps are done."""

        def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
            self._next = int(step) + 1
            self._since_callback = 0
            return callback(step, *args, **kwargs) if callback is not None else None

        return counted

    def evaluate(self, timestep: Any) -> None:
        """The sampler evaluates the model."""
        self.evaluations += 1
        self._since_callback += 1
        self._seen.clear()
        self.sigma = self._sigma_of(timestep)

    def listed_sigma(self) -> float | None:
        """The noise level that the list has for the step under way."""
        levels = self.sigmas
        return levels[self._next] if levels is not None and self._next < len(levels) else None

    def _sigma_of(self, timestep: Any) -> float | None:
        listed, pace = self.listed_sigma(), _paces.get(self._sampler)
        if not isinstance(timestep, torch.Tensor):
            return listed
        if listed is not None and pace is not None and pace.listed and timestep.device.type != "cpu":
            return listed
        sigma = float(timestep.max())
        self._unlisted |= listed is None or not isclose(sigma, listed, rel_tol=1e-4, abs_tol=1e-6)
        return sigma

    def expected_evaluations(self) -> int | None:
        """The evaluations of the whole run: as many as steps, unless the sampler is known to make, or makes, more."""
        if self.steps is None:
            return None
        pace = _paces.get(self._sampler)
        if pace is not None:
            return max(self.evaluations, pace.evaluations_of(self.steps))
        if self.evaluations > self._next + 1:
            return max(self.evaluations, 2 * self.steps - (self.sigmas is not None and self.sigmas[-1] == 0.0))
        return max(self.evaluations, self.steps)

    def listed_sigmas(self) -> tuple[float, ...] | None:
        """The noise levels of the evaluations, where there is one for each step."""
        return self.sigmas if self.expected_evaluations() == self.steps else None

    def learn(self) -> None:
        """Remember the sampler's way, where the run went to its end."""
        if self.steps and self._next >= self.steps and self.evaluations >= self.steps:
            if len(_paces) >= _MAX_PACES:
                _paces.clear()
            _paces[self._sampler] = Pace(self.steps, self.evaluations, not self._unlisted)

    def context(self, options: Mapping[str, Any]) -> str:
        """The name of a call: what it is for, by the order in which the run first saw such calls.

        Conditions are known by ComfyUI's ``uuids``; the same ones come again in a step where windows or several passes of
        a guider ask for it, and are then told apart by the window, else by their order.
        """
        kinds = tuple(options.get("cond_or_uncond") or ())
        window = getattr(options.get("context_window"), "index_list", None)
        key = kinds, tuple(options.get("uuids") or ()), None if window is None else tuple(window)
        turn = self._seen.get(key, 0)
        self._seen[key] = turn + 1
        name = self._names.get((key, turn))
        if name is None:
            what = "+".join(_KINDS.get(kind, str(kind)) for kind in kinds) or "model"
            name = self._names[key, turn] = f"{what} {len(self._names) + 1}"
        return name


_KINDS = {0: "cond", 1: "uncond"}
_MAX_PACES = 64


def _levels(sigmas: Any) -> tuple[float, ...] | None:
    if not isinstance(sigmas, torch.Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
        return None
    return tuple(sigmas.tolist())


def _sampler_key(sampler: Any) -> object:
    function = getattr(sampler, "sampler_function", None)
    named = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
    extra = getattr(sampler, "extra_options", None) or {}
    return named, tuple(sorted((name, repr(value)) for name, value in extra.items()))


def _options_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``transformer_options`` of a call, wherever they stand."""
    for value in (kwargs.get("transformer_options"), *args):
        if isinstance(value, dict) and "cond_or_uncond" in value:
            return value
    return {}


# ---- what a model's code says of it ----------------------------------------------------------------------------

_MAX_DEPTH = 4
# Classes whose code names the wrappers, and whose calls did not reach them all the same.
_unreached: set[type] = set()


def _wraps_itself(kind: type) -> bool:
    return kind not in _unreached and wraps_itself(kind)


@functools.lru_cache(maxsize=256)
def wraps_itself(kind: Any) -> bool:
    """Whether calls of a model of this class go through ComfyUI's ``DIFFUSION_MODEL`` wrappers, by what its code names."""
    return _names(kind, "forward", "DIFFUSION_MODEL", _MAX_DEPTH)


def _names(kind: type, method: str, wanted: str, depth: int) -> bool:
    """Whether a method, or one that it names, names ``wanted``."""
    for owner in kind.__mro__:
        function = owner.__dict__.get(method)
        if not isinstance(function, FunctionType) or not owner.__module__ or owner is torch.nn.Module:
            continue
        names = _all_names(function.__code__)
        if wanted in names:
            return True
        return depth > 0 and any(
            name != method and isinstance(getattr(kind, name, None), FunctionType) and _names(kind, name, wanted, depth - 1)
            for name in names
        )
    return False


def _all_names(code: CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names, *(name for each in inner for name in _all_names(each))}


class Mentions:
    """Which of ComfyUI's ``transformer_options`` a model may read: those whose names its source files hold as text.

    All others are kept from the compiled function, which would be traced again whenever one of them changes: another
    number of steps, another pack's entry, new ids at each prompt.
    """

    _known: dict[type, Mentions] = {}  # noqa: RUF012
    # never read by a model, and new at each prompt
    _NEVER = frozenset({"wrappers", "callbacks", "uuids"})
    # with one of these a function of another pack runs inside the model and may read whatever it likes
    _FOREIGN = ("patches", "patches_replace", "optimized_attention_override")

    def __init__(self, module: torch.nn.Module) -> None:
        self._source = _source_around(module)
        self._keys: dict[str, bool] = {}

    @classmethod
    def of(cls, module: torch.nn.Module) -> Mentions:
        """The one for all models of a class."""
        kind = type(module)
        if kind not in cls._known:
            cls._known[kind] = cls(module)
        return cls._known[kind]

    def trimmed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the model may read."""
        if any(options.get(name) for name in self._FOREIGN):
            return {name: value for name, value in options.items() if name not in self._NEVER}
        return {name: value for name, value in options.items() if name not in self._NEVER and self._reads(name)}

    def _reads(self, name: str) -> bool:
        known = self._keys.get(name)
        if known is None:
            found = re.search(rf"""['"]{re.escape(str(name))}['"]""", self._source) is not None
            known = self._keys[name] = found
        return known


def _source_around(module: torch.nn.Module) -> str:
    """The source of the modules that define the model's parts, and of those of the same package that they use."""
    found: dict[str, str] = {}
    waiting = [type(part).__module__ for part in module.modules()]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in _FOREIGN_PACKAGES:
            continue
        python_module = sys.modules.get(name)
        if python_module is None:
            continue
        found[name] = _source_of(python_module)
        waiting.extend(used for used in map(_module_name, vars(python_module).values()) if used and _is_near(name, used))
    return "\n".join(found.values())


_FOREIGN_PACKAGES = frozenset({"torch", "einops", "numpy", "builtins", "typing", "math", "logging"})
# The parts of ComfyUI that models are made of; the rest of it names the options only to fill them in.
_MODEL_PARTS = ("comfy.ldm", "comfy.ops")


def _is_near(user: str, used: str) -> bool:
    if user.startswith("comfy."):
        return used.startswith(_MODEL_PARTS)
    return used.partition(".")[0] == user.partition(".")[0] or used.startswith(_MODEL_PARTS)


def _module_name(value: object) -> str | None:
    if isinstance(value, ModuleType):
        return value.__name__
    return value.__module__ if isinstance(value, (type, FunctionType)) else None


def _source_of(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        file = getattr(module, "__file__", None)
        return Path(file).read_text(errors="replace") if file and file.endswith(".py") else ""

