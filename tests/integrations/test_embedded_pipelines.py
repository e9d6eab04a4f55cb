"""More pipelines of diffusers, begun behind their text encoders: prompt embeddings in, latents out.

What is caught here is how a pipeline calls its denoiser: which contexts it names or not, how often and with which timesteps,
and whether its runs are told apart.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from torch import Tensor

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.registry import sessions_of

from ..coverage import TINY_MODELS
from . import tiny_pipelines as tiny

pytestmark = pytest.mark.slow

STEPS = 8
# steps 4, 6 and 8
SKIPPED = 3
OPTIONS: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}


@dataclass(frozen=True)
class Case:
    """A pipeline class, its denoiser's class, and what it is called with."""

    pipeline: str
    denoiser: str
    call: Callable[[], dict[str, Any]]
    contexts: tuple[Any, ...] = (1,)
    parts: Callable[[], dict[str, Any]] = dict
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    # calls of the first run that went to finding a way to trace the model
    traced_again: int = 0

    def build(self) -> Any:
        """The pipeline with a tiny denoiser; parts that are not needed are left out."""
        kind = getattr(diffusers, self.pipeline)
        parameters = inspect.signature(kind.__init__).parameters.values()
        needed = {each.name: None for each in parameters if each.name != "self" and each.default is each.empty}
        model = TINY_MODELS[self.denoiser]
        transformer = dataclasses.replace(model, config={**model.config, **self.changes}).build()
        return kind(**{**needed, "scheduler": tiny.flow(), **self.parts(), "transformer": transformer})


def drawn(*sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def prompts(tokens: int, channels: int, *, masks: bool = False, **more: Any) -> Callable[[], dict[str, Any]]:
    """Embeddings of a positive and a negative prompt."""

    def call() -> dict[str, Any]:
        given = {"prompt_embeds": drawn(1, tokens, channels), "negative_prompt_embeds": drawn(1, tokens, channels, seed=2)}
        if masks:
            given |= {f"{name}prompt_attention_mask": torch.ones(1, tokens) for name in ("", "negative_")}
        return {"height": 16, "width": 16, "guidance_scale": 4.0, **given, **more}

    return call


def hidream() -> dict[str, Any]:
    given = {}
    for name, seed in (("", 1), ("negative_", 2)):
        given[f"{name}prompt_embeds_t5"] = drawn(1, 6, 8, seed=seed)
        given[f"{name}prompt_embeds_llama3"] = drawn(4, 1, 6, 4, seed=seed)
        given[f"{name}pooled_prompt_embeds"] = drawn(1, 8, seed=seed)
    return {**given, "height": 16, "width": 16, "guidance_scale": 4.0}


def kandinsky() -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, seed in (("", 1), ("negative_", 2)):
        given[f"{name}prompt_embeds_qwen"] = drawn(1, 6, 16, seed=seed)
        given[f"{name}prompt_embeds_clip"] = drawn(1, 8, seed=seed)
        given[f"{name}prompt_cu_seqlens"] = torch.tensor([0, 6])
    return {**given, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 4.0}


def hunyuan_dit() -> dict[str, Any]:
    given: dict[str, Any] = {"height": 16, "width": 16, "use_resolution_binning": False}
    for name, seed in (("", 1), ("negative_", 2)):
        for suffix in ("", "_2"):
            given[f"{name}prompt_embeds{suffix}"] = drawn(1, 4, 8, seed=seed)
            given[f"{name}prompt_attention_mask{suffix}"] = torch.ones(1, 4)
    return given


def picture(size: int = 16) -> Any:
    return PIL.Image.new("RGB", (size, size), (200, 30, 90))


def kontext() -> dict[str, Any]:
    given = {"prompt_embeds": drawn(1, 6, 32), "pooled_prompt_embeds": drawn(1, 32)}
    return {**given, "image": picture(), "height": 16, "width": 16, "_auto_resize": False, "max_area": 256}


def filling() -> dict[str, Any]:
    given = {"prompt_embeds": drawn(1, 6, 32), "pooled_prompt_embeds": drawn(1, 32), "height": 16, "width": 16}
    return {**given, "image": picture(), "mask_image": PIL.Image.new("L", (16, 16), 255)}


def vae(channels: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"vae": tiny.picture_vae(channels)}


def of(scheduler: str, **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"scheduler": getattr(diffusers, scheduler)(**settings)}


_NO_TEXT = {"prompt": None, "negative_prompt": None}
_FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_NAMED = ("cond", "uncond")
_WAN = prompts(6, 16, num_frames=5)
CASES = {
    "AuraFlow": Case("AuraFlowPipeline", "AuraFlowTransformer2DModel", prompts(6, 32, masks=True), parts=vae(4)),
    "Allegro": Case(
        "AllegroPipeline",
        "AllegroTransformer3DModel",
        prompts(6, 8, masks=True, height=64, width=64, num_frames=8, negative_prompt=None),
        parts=of("EulerAncestralDiscreteScheduler"),
    ),
    "Bria": Case("BriaPipeline", "BriaTransformer2DModel", prompts(6, 32), parts=vae(1)),
    "Chroma": Case("ChromaPipeline", "ChromaTransformer2DModel", prompts(6, 32, masks=True), (1, 2), vae(1)),
    "CogView3Plus": Case(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        prompts(6, 8, original_size=(16, 16)),
        parts=lambda: {**vae(4)(), **of("CogVideoXDDIMScheduler")()},
    ),
    "CogView4": Case("CogView4Pipeline", "CogView4Transformer2DModel", prompts(16, 8, original_size=(16, 16)), _NAMED, vae(4)),
    "DiT": Case(
        "DiTPipeline",
        "DiTTransformer2DModel",
        lambda: {"class_labels": [1, 2], "guidance_scale": 4.0, "output_type": "np"},
        parts=lambda: {**vae(4)(), **of("DDIMScheduler")()},
        changes={"num_embeds_ada_norm": 1001},
    ),
    "Flux2": Case(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        lambda: {"prompt_embeds": drawn(1, 6, 32), "height": 16, "width": 16},
        parts=lambda: {"scheduler": tiny.flow(use_dynamic_shifting=True)},
    ),
    "FluxFill": Case(
        "FluxFillPipeline", "FluxTransformer2DModel", filling, parts=vae(1), changes={"in_channels": 24, "out_channels": 4}
    ),
    "FluxKontext": Case("FluxKontextPipeline", "FluxTransformer2DModel", kontext, parts=vae(1)),
    "HiDream": Case("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", hidream, parts=vae(4), traced_again=2),
    "HunyuanDiT": Case(
        "HunyuanDiTPipeline",
        "HunyuanDiT2DModel",
        hunyuan_dit,
        parts=lambda: {**vae(4)(), **of("DDPMScheduler")(), "requires_safety_checker": False},
    ),
    "Kandinsky5": Case("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", kandinsky, _NAMED),
    "LTXCondition": Case(
        "LTXConditionPipeline",
        "LTXVideoTransformer3DModel",
        prompts(6, 16, masks=True, height=32, width=32, num_frames=9),
        ("cond_uncond",),
        lambda: {"vae": tiny.ltx_vae()},
    ),
    "Mochi": Case(
        "MochiPipeline",
        "MochiTransformer3DModel",
        prompts(8, 16, masks=True, height=64, width=64, num_frames=7),
        ("cond_uncond",),
        traced_again=1,
    ),
    "PixArtAlpha": Case(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        prompts(6, 8, masks=True, use_resolution_binning=False, **_NO_TEXT),
        parts=lambda: {**vae(4)(), **of("DPMSolverMultistepScheduler")()},
    ),
    "PRX": Case(
        "PRXPipeline",
        "PRXTransformer2DModel",
        prompts(6, 32, masks=True, use_resolution_binning=False, prompt=None),
        parts=vae(4),
    ),
    "SanaVideo": Case(
        "SanaVideoPipeline",
        "SanaVideoTransformer3DModel",
        prompts(6, 16, masks=True, height=32, width=32, frames=5, use_resolution_binning=False, **_NO_TEXT),
        parts=of("DPMSolverMultistepScheduler", **_FLOW_SOLVER),
    ),
    "SkyReelsV2": Case(
        "SkyReelsV2Pipeline",
        "SkyReelsV2Transformer3DModel",
        _WAN,
        _NAMED,
        lambda: {"vae": tiny.wan_vae(), **of("UniPCMultistepScheduler", **_FLOW_SOLVER)()},
    ),
    "WanImageToVideo": Case(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        lambda: {**_WAN(), "image": picture()},
        _NAMED,
        lambda: {"vae": tiny.wan_vae()},
        {"in_channels": 12, "out_channels": 4},
    ),
    "ZImage": Case(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        lambda: {
            "prompt_embeds": [drawn(6, 16)],
            "negative_prompt_embeds": [drawn(5, 16, seed=2)],
            "height": 64,
            "width": 64,
            "guidance_scale": 4.0,
        },
    ),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(case: Case, pipeline: Any) -> Tensor:
    """What one run gives, from the same noise each time."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"output_type": "latent", **case.call()}
    made = pipeline(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), return_dict=False, **call)
    return torch.as_tensor(made[0])


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_is_cached_with_its_contexts_and_runs(name: str) -> None:
    case = CASES[name]
    pipeline = case.build()
    plain = run(case, pipeline)
    calls = STEPS * len(case.contexts)
    cache_dit.enable_cache(pipeline, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        made = [run(case, pipeline) for _ in range(2)]
    stats = cache_dit.get_stats(pipeline)
    assert (stats.runs, stats.calls, stats.hits) == (2, 2 * calls, 2 * SKIPPED * len(case.contexts))
    (session,) = sessions_of(pipeline.transformer)
    assert tuple(session.contexts) == case.contexts
    assert sum(session.counters.refused.values()) == case.traced_again
    assert torch.isfinite(made[0]).all() and torch.equal(made[0], made[1])
    assert not torch.equal(made[0], plain)
    cache_dit.disable_cache(pipeline)
    assert torch.equal(run(case, pipeline), plain)
    cache_dit.enable_cache(pipeline, schedule="1" * STEPS, **OPTIONS)
    # blocks that are compiled one by one, or traced in another way, may add in another order
    torch.testing.assert_close(run(case, pipeline), plain, rtol=1e-4, atol=1e-5)
