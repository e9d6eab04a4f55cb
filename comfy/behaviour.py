"""What the nodes do when ComfyUI runs them. torch and the rest of the package load at the first run of a node."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .definitions import Result

if TYPE_CHECKING:
    from ..integrations.comfyui import PatcherCache

logger = logging.getLogger(__name__)
# The compiler of the nodes: it needs no toolchain, and the first picture waits for the tracing alone.
DEFAULT_INNER = "eager"
_CORRECTION: dict[str, str | bool] = {"on": True, "off": False}
# Which run of which cache each statistics node showed last.
_shown: dict[str, tuple[int, int]] = {}


def accelerate(node_id: str | None, model: Any) -> Result:
    """Caching with the defaults."""
    return Result((_cached(node_id, model, {"inner": DEFAULT_INNER}),))


def configure(
    node_id: str | None,
    model: Any,
    strategy: str,
    skip_interval: int,
    warmup_steps: int,
    noise_scale: float,
    enable_debug: bool,
    inner: str = "auto",
    target_speedup: float = 0.0,
    correction: str = "auto",
    schedule: str = "",
    **more: Any,
) -> Result:
    """Caching with the settings given."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "skip_interval": skip_interval,
        "warmup_steps": warmup_steps,
        "noise_scale": noise_scale,
        "debug": enable_debug,
        "inner": DEFAULT_INNER if inner == "auto" else inner,
        "target_speedup": target_speedup or None,
        "correction": _CORRECTION.get(correction, correction),
        "schedule": schedule.strip() or None,
    }
    return Result((_cached(node_id, model, {**options, **more}),))


def control(node_id: str | None, model: Any, enable_cache: bool) -> Result:
    """Caching on or off in this branch."""
    from ..integrations.comfyui import cache_of, switch_off, switch_on
    from ..texts import text

    upstream = cache_of(model)
    if upstream is None and enable_cache:
        return Result((_cached(node_id, model, {"inner": DEFAULT_INNER}),))
    clone = _clone(node_id, model)
    cache = switch_on(clone) if enable_cache else switch_off(clone)
    if cache is not None and cache is not upstream:
        cache.display = _display(node_id)
    _say(node_id, text("comfy_switched_on" if enable_cache else "comfy_switched_off"))
    return Result((clone,))


def show_statistics(node_id: str | None, trigger: Any = None, model: Any = None) -> Result:
    """The statistics of the last run."""
    from ..statistics import format_summary
    from ..texts import text

    cache = _cache_to_show(model)
    if cache is None:
        return _shown_text(node_id, text("no_models"))
    return _shown_text(node_id, format_summary(cache.run_statistics()), _old_run(node_id, cache))


def show_details(
    node_id: str | None, trigger: Any = None, show_model_details: bool = True, model: Any = None
) -> Result:
    """The statistics of all models, or of the one that is named."""
    from ..integrations.comfyui import cache_of
    from ..runtime.registry import all_sessions
    from ..statistics import format_details

    cache = cache_of(model) if model is not None else None
    sessions = [cache.session] if cache is not None else all_sessions()
    models = [session.statistics() for session in sessions]
    return _shown_text(node_id, format_details(models, None, show_model_details))


def show_timeline(node_id: str | None, trigger: Any = None, model: Any = None) -> Result:
    """The last run as an image."""
    from .timeline_image import as_tensor, draw, save_preview

    cache = _cache_to_show(model)
    image = draw(cache)
    return Result((as_tensor(image),), {"images": [save_preview(image)]})


def _cached(node_id: str | None, model: Any, options: dict[str, Any]) -> Any:
    """A clone with caching on; where that cannot be, the model as it came, and the reason on the node."""
    from ..api import enable_cache
    from ..errors import CacheDitError
    from ..integrations.comfyui import cache_of
    from ..texts import text

    upstream = cache_of(model)
    if upstream is not None and upstream.session.enabled:
        _say(node_id, f"{text('already_enabled')}\n{text('comfy_kept_first')}", logging.WARNING)
        return model
    clone = _clone(node_id, model)
    try:
        enable_cache(clone, **options)
    except (CacheDitError, ValueError, TypeError) as error:
        _say(node_id, str(error), logging.WARNING)
        return model
    cache = cache_of(clone)
    if cache is not None:
        cache.display = _display(node_id)
    _say(node_id, text("comfy_ready"))
    return clone


def _clone(node_id: str | None, model: Any) -> Any:
    """A clone to put wrappers on. Weights that come and go while the model runs cannot be compiled: they are left out."""
    from ..texts import text

    is_dynamic = getattr(model, "is_dynamic", None)
    if is_dynamic is None or not is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except (RuntimeError, TypeError):
        _say(node_id, text("comfy_reload_failed"), logging.WARNING)
        return model.clone()


def _display(node_id: str | None) -> Any:
    from .display import NodeDisplay

    return None if node_id is None else NodeDisplay(node_id)


def _say(node_id: str | None, message: str, level: int = logging.DEBUG) -> None:
    from .display import show_text

    logger.log(level, "[CacheDit] %s", message)
    if node_id is not None:
        show_text(node_id, message)


def _cache_to_show(model: Any) -> PatcherCache | None:
    from ..integrations.comfyui import cache_of, last_sampled

    return last_sampled() if model is None else cache_of(model)


def _old_run(node_id: str | None, cache: PatcherCache) -> str:
    """A note where the sampler has not run again since this node showed its figures."""
    from ..texts import text

    run = id(cache), cache.clock.run
    before = _shown.get(str(node_id))
    _shown[str(node_id)] = run
    return text("comfy_sampler_cached") if before == run else ""


def _shown_text(node_id: str | None, shown: str, note: str = "") -> Result:
    _say(node_id, f"{shown}\n{note}" if note else shown)
    return Result((shown,), {"text": [shown]})
