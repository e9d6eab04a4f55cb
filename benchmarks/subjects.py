"""The models that are measured, with inputs for every step, and the part of each that a skipped step still has to run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))


@dataclass(frozen=True)
class Subject:
    """One model: a function from the step (0, 1, …) to keyword arguments, and a function that makes its floor.

    The floor is a model of the front blocks and the head alone: what a skipped step cannot avoid.
    """

    name: str
    model: torch.nn.Module
    inputs: Callable[[int], dict[str, Any]]
    floor: Callable[[], torch.nn.Module]


def demo_model() -> Subject:
    """The trained digit model of the demo (12 blocks), 20 samples of 64 tokens."""
    from demo_model import IMAGE_SIZE, load_model

    model = load_model()
    noise = torch.randn(20, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 10

    def inputs(step: int) -> dict[str, Any]:
        return {"hidden_states": noise, "timestep": torch.full((20,), 1000.0 - step), "class_labels": labels}

    def floor() -> torch.nn.Module:
        small = copy.deepcopy(model)
        small.transformer_blocks = small.transformer_blocks[:1]
        return small

    return Subject("demo (12 blocks, dim 96, 20 x 64 tokens)", model, inputs, floor)


def flux_shaped(double: int = 4, single: int = 8, heads: int = 6, side: int = 16, text: int = 64) -> Subject:
    """A random model with Flux's structure: joint blocks, then single-stream blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=[16, 24, 24],
        guidance_embeds=True,
    )
    model.eval().requires_grad_(False)
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    generator = torch.Generator().manual_seed(0)
    fixed = {
        "hidden_states": torch.randn(1, side * side, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 128, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5]),
        "return_dict": False,
    }

    def inputs(step: int) -> dict[str, Any]:
        return {**fixed, "timestep": torch.tensor([1.0 - step / 1000.0])}

    def floor() -> torch.nn.Module:
        small = copy.deepcopy(model)
        small.transformer_blocks = small.transformer_blocks[:1]
        small.single_transformer_blocks = torch.nn.ModuleList()
        return small

    name = f"Flux-shaped ({double} + {single} blocks, dim {64 * heads}, {side * side} + {text} tokens)"
    return Subject(name, model, inputs, floor)


SUBJECTS: dict[str, Callable[[], Subject]] = {"demo": demo_model, "flux": flux_shaped}
