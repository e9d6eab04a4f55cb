"""Modular pipelines of diffusers: their guiders say which prediction a call makes, and may change the model for one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.registry import sessions_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from . import tiny_pipelines as tiny  # noqa: E402

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}


def modular(guider: Any) -> Any:
    """The modular pipeline of a family, with the tiny parts of the ordinary one."""
    ordinary = tiny.FAMILIES["QwenImage"].build()
    pipeline = diffusers.QwenImageAutoBlocks().init_pipeline()
    parts = {name: part for name, part in ordinary.components.items() if name in pipeline.components}
    pipeline.update_components(**parts, guider=guider)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, steps: int = 8) -> Tensor:
    # a guider of which the last run ended without guidance takes that over into the next one
    pipeline.guider._step = pipeline.guider._num_inference_steps = None
    images = pipeline(
        prompt=tiny.PROMPT,
        negative_prompt=tiny.NEGATIVE,
        num_inference_steps=steps,
        height=16,
        width=16,
        max_sequence_length=tiny.LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        output="images",
    )
    return images if isinstance(images, Tensor) else images[0]


def test_a_guider_names_the_contexts() -> None:
    """Guidance that ends in mid-run leaves the conditional calls where they are."""
    pipeline = modular(diffusers.ClassifierFreeGuidance(guidance_scale=4.0, stop=0.6))
    plain = sample(pipeline)
    cache_dit.enable_cache(pipeline, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        first, second = sample(pipeline), sample(pipeline)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    session = sessions_of(pipeline.transformer)[0]
    assert list(session.contexts) == ["guidance 1", "guidance 2"]
    stats = cache_dit.get_stats(pipeline)
    # guided up to step 4 of 8: steps 4, 6, 8 of the first context and step 4 of the second
    assert (stats.runs, stats.steps, stats.calls, stats.hits) == (2, 16, 2 * 12, 2 * 4)
    assert "pattern_broken" not in stats.refused
    cache_dit.disable_cache(pipeline)
    assert torch.equal(sample(pipeline), plain)


def test_a_guider_that_perturbs_the_model_costs_its_own_calls_only() -> None:
    guider = diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0, perturbed_guidance_layers=[1], perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    pipeline = modular(guider)
    plain = sample(pipeline, 6)
    cache_dit.enable_cache(pipeline, **EXACT)
    with pytest.warns(CacheDitWarning, match="guidance 3 does not compile"):
        found = sample(pipeline, 6)
    assert cache_dit.get_stats(pipeline).hits == 4
    assert not torch.equal(found, plain)
    cache_dit.disable_cache(pipeline)
    torch.testing.assert_close(sample(pipeline, 6), plain)
