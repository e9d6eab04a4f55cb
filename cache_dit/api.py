"""The public functions: turn caching on and off for a model, name runs and contexts, read what was measured."""

from __future__ import annotations

import math
import os
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

import torch

from .backend import owned_backend
from .calibration import Calibration
from .errors import CacheDitError, NoBlocksError
from .explanation import Explanation, explain_session
from .integrations import comfyui
from .integrations.targets import denoisers_of, follow_integration, leave_integration
from .messages import warn
from .options import CacheOptions, resolve_options, set_global_config
from .runtime.call import CachedCall
from .runtime.registry import all_sessions, model_name, register_module, session_of_module, sessions_of
from .runtime.session import Session, context_names
from .statistics import CacheStats, format_summary, global_stats_dict, merge_stats
from .structure import may_have_blocks
from .texts import text
from .torch_internals import in_compile_slot

Model = TypeVar("Model")


def enable_cache(
    model: Model,
    *,
    skip_interval: int | None = None,
    warmup_steps: int | None = None,
    strategy: str | None = None,
    noise_scale: float | None = None,
    enable_stats: bool | None = None,
    debug: bool | None = None,
    front_blocks: int | None = None,
    back_blocks: int | None = None,
    residual_dtype: torch.dtype | str | None = None,
    residual_device: torch.device | str | None = None,
    schedule: str | Sequence[bool] | None = None,
    start_percent: float | None = None,
    end_percent: float | None = None,
    region: str | tuple[str, str] | None = None,
    forecast: str | None = None,
    order: int | None = None,
    tolerance: float | None = None,
    target_speedup: float | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    correction: str | bool | None = None,
    max_consecutive_hits: int | None = None,
    control_refresh: bool | float | None = None,
    lowering: str | None = None,
    inner: str | Callable[..., Any] | None = None,
    inner_options: Mapping[str, Any] | None = None,
    group: Any = None,
    strict: bool | None = None,
    language: str | None = None,
    **unknown: object,
) -> Model:
    """Turn caching on for a model, in place, and return it.

    The model compiles at its next call. From then on the blocks behind the first ``front_blocks`` are computed at some
    steps and predicted at the others, as ``strategy`` says; in grad mode every call computes.

    Args:
        model: an ``nn.Module``, a diffusers pipeline (each of its denoisers is enabled), or a ComfyUI ``ModelPatcher`` (its
            own wrappers change, never the model that it shares).
        skip_interval: of this many steps one is skipped (int >= 1; default 2).
        warmup_steps: steps at the start of a run that always compute (int >= 0; default 3, adaptive: its own choice).
        strategy: ``'fixed'`` (default), ``'dynamic'`` or ``'adaptive'``.
        noise_scale: noise added where a result is reused, as a share of the residual's root mean square (0 to 1; 0.001).
        enable_stats: whether calls are timed (default True).
        debug: whether each call prints one line (default False).
        front_blocks, back_blocks: blocks at the start and the end of the chain that always compute (default 1, 0).
        residual_dtype, residual_device: how residuals are kept (default: as the model's own values). 8 bits (int8, float8) come
            with a scale for each row along the last dimension.
        schedule: an explicit mask by step, ``'1'`` or True = compute; overrides the strategy.
        start_percent, end_percent: skip only within this part of a run whose number of steps is known (0.0, 1.0).
        region: module path, or a pair of them, of the part to cache where the finder should not choose.
        forecast: how a skipped step predicts the residual: ``'auto'``, ``'reuse'``, ``'taylor'``, ``'lagrange'``,
            ``'hermite'``, ``'adams_bashforth'``.
        order: order of the forecast (1 to 3; default 1).
        tolerance: adaptive: how far the input of the cached blocks may move, relative to its size, between computed steps.
        target_speedup: adaptive: by what factor the cached blocks' work is to fall over a run.
        calibration: adaptive with a ``target_speedup``: what `calibrate` measured, or its file, to place
            computed steps by.
        correction: put skipped steps right once the next one has computed, by way of its output, where the run's noise levels,
            solver and prediction type are known: ``'auto'`` (default: under ``'adaptive'`` alone) or a bool.
        max_consecutive_hits: the most steps skipped in a row (default 4; adaptive: its own choice).
        control_refresh: compute a step due to be skipped where what enters the cached blocks from outside (the outputs of a
            control network) moved by more than this share of its mean size since the last computed step; True means 0.1
            (default False).
        lowering: ``'auto'``, ``'specialize'`` (two whole graphs), ``'pieces'`` (one program for each distinct block, so that
            compiling does not grow with depth) or ``'cond'`` (the branch inside one graph).
        inner: the compiler that gets the rewritten graph: ``'inductor'`` (default), ``'aot_eager'``, ``'eager'``, another
            backend of torch, or a callable (graph module, example inputs) -> callable.
        inner_options: options for it.
        group: which processes of ``torch.distributed`` take each decision together: ``'auto'`` (default: those that share
            the model's forward, by sharded weights, context parallelism or collectives in its graph), ``'world'``, a
            process group, or False (each by itself).
        strict: raise `CacheDitError` where nothing could be cached, instead of warning once.
        language: ``'zh'`` or ``'en'``.

    An option left out or None takes the global configuration's value, else the default above. A model that has caching on
    already is returned as it is, with a warning.

    Raises:
        ValueError, TypeError: a wrong option; the model is untouched.
        CacheDitError: no transformer blocks in the model, or no place for torch's compiler to write to.
    """
    named = {name: value for name, value in locals().items() if name not in ("model", "unknown")}
    options = resolve_options({**named, **unknown})
    _check_inner(options)
    if comfyui.is_patcher(model):
        if any(session.enabled for session in comfyui.sessions_of_patcher(model)):
            warn("already_enabled", options.language)
        else:
            comfyui.enable_patcher(model, options)
        return model
    targets = denoisers_of(model, options.language)
    if any(_is_enabled(module) for module in targets):
        warn("already_enabled", options.language)
        return model
    for module in targets:
        if options.region is None and not may_have_blocks(module):
            raise NoBlocksError(text("no_transformer", options.language))
    try:
        for module in targets:
            _enable(module, options)
        with _slots:
            follow_integration(model, [_own_session(module) for module in targets])
    except BaseException:
        # not half of a pipeline's denoisers: a second call would take them all for enabled
        leave_integration(model)
        for module in targets:
            _disable(module)
        raise
    return model


def _check_inner(options: CacheOptions) -> None:
    """Under bare ``torch.compile`` an unknown name is found when the first graph comes; here it can be at once."""
    inner = options.inner
    if not isinstance(inner, str) or inner in _OWN_INNER:
        return
    names = (*_OWN_INNER, *torch.compiler.list_backends(exclude_tags=()))
    if inner not in names:
        allowed = " | ".join(map(repr, dict.fromkeys(name for name in names if name != "cache_dit")))
        raise ValueError(text("option_value", options.language, name="inner", value=repr(inner), allowed=allowed))


_OWN_INNER = ("inductor", "aot_eager", "eager")


def _is_enabled(module: torch.nn.Module) -> bool:
    return isinstance(in_compile_slot(module), CachedCall)


# Held while a compile slot is looked at and taken, or given back, and for nothing that waits.
_slots = threading.RLock()


def _enable(module: torch.nn.Module, options: CacheOptions) -> None:
    session = Session(options, model_name(module), owns_calls=True)
    try:
        call = CachedCall(module, session, owned_backend(options.program()))
    except OSError as error:
        # torch makes the folder of its caches when its compiler is imported
        details = f"{type(error).__name__}: {error}"
        raise CacheDitError(text("no_folder", options.language, details=details)) from error
    call.join_ranks()
    with _slots:
        if _is_enabled(module):
            # another thread was quicker
            warn("already_enabled", options.language)
            return
        register_module(module, session)
        call.install()


def _own_session(module: torch.nn.Module) -> Session:
    session = session_of_module(module)
    if session is None:
        raise AssertionError("the module was just enabled")
    return session


def disable_cache(model: Model) -> Model:
    """Turn caching off and put the model's ``compile`` slot back as it was; what was measured stays readable.

    A model without caching is left alone, with a warning.
    """
    if comfyui.is_patcher(model):
        if not comfyui.disable_patcher(model):
            warn("nothing_to_disable")
        return model
    modules = denoisers_of(model, None, required=False)
    sessions = [session for module in modules for session in _sessions_in_force(module)]
    if not sessions:
        warn("nothing_to_disable")
        return model
    with _slots:
        leave_integration(model)
    for module in modules:
        _disable(module)
    return model


def _sessions_in_force(module: torch.nn.Module) -> list[Session]:
    return [session for session in sessions_of(module) if session.enabled]


def _disable(module: torch.nn.Module) -> None:
    """The slot first and the sign last: where an error or an interrupt comes between them, a second call does the rest."""
    for session in _sessions_in_force(module):
        # a call of another thread ends first
        with session.lock:
            with _slots:
                call = in_compile_slot(module)
                if isinstance(call, CachedCall) and call.session is session:
                    call.remove()
            session.release()
            session.enabled = False


def summary(model: object) -> str:
    """The statistics of a model as text; of a pipeline the sum over its denoisers."""
    sessions = _sessions(model)
    if not sessions:
        return text("never_enabled")
    return format_summary(_merged(model, sessions), sessions[0].options.language)


def get_stats(model: object) -> CacheStats:
    """Every measured figure of a model, frozen; of a pipeline the sum over its denoisers.

    Raises:
        CacheDitError: caching was never turned on for this model, or (under bare ``torch.compile``) it was not called yet.
    """
    return _merged(model, _required_sessions(model))


def get_global_stats() -> dict[str, object]:
    """The statistics of all models as a dictionary: totals, and ``model_details`` by model."""
    return global_stats_dict([session.statistics() for session in all_sessions()])


def reset_cache_stats() -> None:
    """Set every statistic to zero; caching stays on, and what is stored stays stored."""
    for session in all_sessions():
        session.reset_statistics()


def explain(model: object) -> Explanation:
    """What the compiler found in a model: blocks, region, live values, buffers, graphs, refusals. Print it to read it.

    Of a pipeline, the first denoiser's.

    Raises:
        CacheDitError: caching was never turned on for this model, or (under bare ``torch.compile``) it was not called yet.
    """
    return explain_session(_required_sessions(model)[0])


def new_run(
    model: object,
    num_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    solver: str | None = None,
    prediction: str | None = None,
) -> None:
    """Say that the next call begins a new run: nothing stored so far is used in it.

    Args:
        model: a model with caching on.
        num_steps: number of steps of the run.
        sigmas: its noise levels, one per step and the last: ``num_steps`` + 1 where both are given.
        solver: name of the solver, such as ``'euler'``.
        prediction: what the model predicts: ``'flow'``, ``'epsilon'`` or ``'v'``.

    Raises:
        CacheDitError: caching was never turned on for this model, or (under bare ``torch.compile``) it was not called yet.
        ValueError, TypeError: a wrong argument.
    """
    steps = _checked_steps(num_steps)
    levels = _checked_levels(sigmas)
    if steps is not None and levels is not None and len(levels) != steps + 1:
        raise ValueError(
            f"num_steps={steps} and {len(levels)} sigmas: {steps + 1} are wanted, one per step and the last"
            " (mostly 0.0), or only one of the two arguments"
        )
    if solver is not None and not isinstance(solver, str):
        raise TypeError(f"solver={solver!r}: a str is wanted")
    if prediction not in (None, "flow", "epsilon", "v"):
        raise ValueError(f"prediction={prediction!r}: 'flow', 'epsilon', 'v' or None is wanted")
    for session in _required_sessions(model):
        with session.lock:
            session.new_run(steps, levels, solver, prediction)


def _checked_steps(num_steps: object) -> int | None:
    if num_steps is None:
        return None
    if not isinstance(num_steps, Integral) or isinstance(num_steps, bool):
        raise TypeError(f"num_steps={num_steps!r}: an int is wanted")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: at least 1 is wanted")
    return int(num_steps)


def _checked_levels(sigmas: Iterable[float] | None) -> tuple[float, ...] | None:
    if sigmas is None:
        return None
    try:
        levels = tuple(map(_level, _in_order(sigmas)))
    except OverflowError:
        raise ValueError("sigmas: finite numbers are wanted, and one of them is too large for a float") from None
    except (TypeError, ValueError):
        raise TypeError(f"sigmas={reprlib.repr(sigmas)}: numbers are wanted, one per step and the last") from None
    if len(levels) < 2:
        raise ValueError(f"sigmas has {len(levels)} entries: one per step and the last are wanted, 2 at least")
    if not all(map(math.isfinite, levels)):
        raise ValueError(f"sigmas={reprlib.repr(levels)}: finite numbers are wanted")
    return levels


def _in_order(sigmas: Iterable[float]) -> Iterable[float]:
    """The levels one by one. What has characters or no order holds none, though it can be gone through."""
    if isinstance(sigmas, (str, bytes, bytearray, Set, Mapping)):
        raise TypeError
    return sigmas


def _level(sigma: object) -> float:
    # float() reads text too
    if isinstance(sigma, (str, bytes, bytearray)):
        raise TypeError
    return float(sigma)  # type: ignore[arg-type]


@contextmanager
def context(model: object, name: str) -> Iterator[None]:
    """Calls inside belong to the context ``name`` of this model: positive or negative prompt, an expert, a request.

    Raises:
        CacheDitError: caching was never turned on for this model, or (under bare ``torch.compile``) it was not called yet.
        TypeError: ``name`` is not a str.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: a str is wanted")
    names = {id(session): name for session in _required_sessions(model)}
    token = context_names.set({**context_names.get(), **names})
    try:
        yield
    finally:
        context_names.reset(token)


@contextmanager
def cached(model: Model, **options: Any) -> Iterator[Model]:
    """`enable_cache` on entry, `disable_cache` on exit. A model that had caching on keeps it, with its settings."""
    already = bool([s for m in denoisers_of(model, None, required=False) for s in _sessions_in_force(m)])
    enable_cache(model, **options)
    try:
        yield model
    finally:
        if not already:
            disable_cache(model)


def _sessions(model: object) -> list[Session]:
    if comfyui.is_patcher(model):
        return comfyui.sessions_of_patcher(model)
    modules = denoisers_of(model, None, required=False)
    for module in modules:
        _warn_if_displaced(module)
    return [session for module in modules for session in sessions_of(module)]


def _warn_if_displaced(module: torch.nn.Module) -> None:
    """``module.compile()`` takes the slot that `enable_cache` took, and nothing of ours is called any more."""
    session = session_of_module(module)
    # another thread may be in a call, or just taking the slot or giving it back: then the next question tells
    if session is None or not session.lock.acquire(blocking=False):
        return
    try:
        with _slots:
            displaced = session.enabled and session.in_slot and not _is_enabled(module)
    finally:
        session.lock.release()
    if displaced:
        session.said.warn("displaced")


def _required_sessions(model: object) -> list[Session]:
    sessions = _sessions(model)
    if not sessions:
        raise CacheDitError(text("never_enabled"))
    return sessions


def _merged(model: object, sessions: Sequence[Session]) -> CacheStats:
    parts = [session.statistics() for session in sessions]
    return parts[0] if len(parts) == 1 else merge_stats(parts, model_name(model))


enable, disable, stats = enable_cache, disable_cache, summary

__all__ = [
    "cached",
    "context",
    "disable",
    "disable_cache",
    "enable",
    "enable_cache",
    "explain",
    "get_global_stats",
    "get_stats",
    "new_run",
    "reset_cache_stats",
    "set_global_config",
    "stats",
    "summary",
]
