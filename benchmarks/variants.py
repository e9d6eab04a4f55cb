"""The ways of running a model that are measured beside one another: plain, ours, and the peers'.

Each is prepared in a process of its own (`worker.py`), the peers' in an environment of their own, since one of them shares
our import name. What skips skips every second step where it can be told to, so that computed steps are measured with skips
still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from subjects import Subject

ALTERNATE = "10" * 5000
# larger than any change of a residual
ANYTHING = 1e9


@dataclass(frozen=True)
class Options:
    """What holds for all variants of a run."""

    inner: str = "inductor"
    run_length: int = 28
    device: str = "cpu"


@dataclass(frozen=True)
class Prepared:
    """A model ready to be called. ``begin`` is called at each run's start; ``around`` makes what a call stands in."""

    call: Callable[..., Any]
    model: torch.nn.Module
    begin: Callable[[], Any] = lambda: None
    around: Callable[[], Any] = nullcontext
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Variant:
    """``pattern``: the steps that are computed and skipped, over and over, as 1 and 0; None where it decides by itself."""

    prepare: Callable[[Subject, Options], Prepared]
    pattern: str | None = "1"
    peer: bool = False


def _plain(subject: Subject, options: Options) -> Prepared:
    return _compiled(subject.model, options)


def _eager(subject: Subject, options: Options) -> Prepared:
    return Prepared(subject.model, subject.model)


def _floor(subject: Subject, options: Options) -> Prepared:
    return _compiled(subject.floor().to(options.device), options)


def _compiled(model: torch.nn.Module, options: Options, **more: Any) -> Prepared:
    return Prepared(torch.compile(model, backend=options.inner), model, **more)


def _ours(subject: Subject, options: Options, *, announce: bool = False, **given: Any) -> Prepared:
    import cache_dit

    model = subject.model
    cache_dit.enable_cache(model, inner=options.inner, **given)

    def begin() -> None:
        sigmas = [1.0 - i / options.run_length for i in range(options.run_length + 1)]
        cache_dit.new_run(model, num_steps=options.run_length, sigmas=sigmas if announce else None)

    def facts() -> dict[str, Any]:
        explanation = cache_dit.explain(model)
        return {
            "hits": cache_dit.get_stats(model).hits,
            "cached_bytes": cache_dit.get_stats(model).cache_bytes,
            "lowering": sorted({graph.lowering for graph in explanation.graphs if graph.region is not None}),
        }

    return Prepared(model, model, begin, facts=facts)


def _quiet(lowering: str, schedule: str = ALTERNATE, **given: Any) -> Callable[[Subject, Options], Prepared]:
    options = {"schedule": schedule, "forecast": "reuse", "noise_scale": 0.0, "correction": False, **given}
    return partial(_ours, lowering=lowering, **options)


def _hooked(make: Callable[[Options], Any]) -> Callable[[Subject, Options], Prepared]:
    """One of diffusers' own caches; its state needs a named context around each call."""

    def prepare(subject: Subject, options: Options) -> Prepared:
        model: Any = subject.model
        model.enable_cache(make(options))
        return _compiled(model, options, around=lambda: model.cache_context("prompt"))

    return prepare


def _first_block(options: Options) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=ANYTHING)


def _first_block_never(options: Options) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=-1.0)


def _taylorseer(options: Options) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)


def _mag_cache(options: Options) -> Any:
    from diffusers import MagCacheConfig

    return MagCacheConfig(
        threshold=ANYTHING, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=100_000, mag_ratios=[1.0] * 100_000
    )


def _sea_cache(options: Options) -> Any:
    from diffusers import SeaCacheConfig

    return SeaCacheConfig(threshold=ANYTHING, max_consecutive_cached=1, retention_steps=1, cache_end_steps=0)


def _faster_cache(options: Options) -> Any:
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: 500,
    )


def _dbcache(subject: Subject, options: Options, *, taylor: bool, whole: bool) -> Prepared:
    import cache_dit as peer
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig  # type: ignore[attr-defined]

    model: Any = subject.model
    config = DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=ANYTHING,
        max_warmup_steps=1,
        max_continuous_cached_steps=1,
        num_inference_steps=options.run_length,
    )
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    peer.enable_cache(model, cache_config=config, calibrator_config=calibrator)  # type: ignore[call-arg]

    def facts() -> dict[str, Any]:
        stats = peer.summary(model, logging=False)  # type: ignore[call-arg]
        return {"hits": len(getattr(stats[0] if isinstance(stats, list) else stats, "cached_steps", []))}

    if whole:
        return _compiled(model, options, facts=facts)
    model.compile_repeated_blocks(backend=options.inner)
    return Prepared(model, model, facts=facts)


VARIANTS: dict[str, Variant] = {
    "plain": Variant(_plain),
    "eager": Variant(_eager),
    "floor": Variant(_floor),
    "never hitting": Variant(_quiet("specialize", "1")),
    "specialize": Variant(_quiet("specialize"), "10"),
    "pieces": Variant(_quiet("pieces"), "10"),
    "cond": Variant(_quiet("cond"), "10"),
    "line, noise": Variant(_quiet("specialize", forecast="lagrange", noise_scale=0.001), "10"),
    "adaptive": Variant(partial(_ours, announce=True, strategy="adaptive", target_speedup=2), None),
    "diffusers FirstBlockCache, never": Variant(_hooked(_first_block_never), "1"),
    "diffusers FirstBlockCache": Variant(_hooked(_first_block), None),
    "diffusers TaylorSeerCache": Variant(_hooked(_taylorseer), None),
    "diffusers MagCache": Variant(_hooked(_mag_cache), None),
    "diffusers SeaCache": Variant(_hooked(_sea_cache), None),
    "diffusers FasterCache": Variant(_hooked(_faster_cache), None),
    "DBCache": Variant(partial(_dbcache, taylor=False, whole=False), None, peer=True),
    "DBCache, Taylor": Variant(partial(_dbcache, taylor=True, whole=False), None, peer=True),
    "DBCache, whole": Variant(partial(_dbcache, taylor=False, whole=True), None, peer=True),
}
