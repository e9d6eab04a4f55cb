"""The models that are measured, with inputs for every step, and the part of each that a skipped step still has to run.

Nothing but torch and diffusers is imported here: the peers' environments run it too.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One model: a function from the step (0, 1, …) to keyword arguments, and the lists of its blocks in their order.

    `grown` says how the sizes of a second shape are had: inputs of more tokens, for models compiled for any size.
    """

    title: str
    model: torch.nn.Module
    inputs: Inputs
    lists: tuple[str, ...]
    grown: Inputs | None = None

    def floor(self) -> torch.nn.Module:
        """The model with its first block and its head alone: what a skipped step cannot avoid."""
        held = {name: getattr(self.model, name) for name in self.lists}
        for name in self.lists:
            setattr(self.model, name, torch.nn.ModuleList())
        small = copy.deepcopy(self.model)
        for name, blocks in held.items():
            setattr(self.model, name, blocks)
        setattr(small, self.lists[0], copy.deepcopy(held[self.lists[0]][:1]))
        return small


def demo_model() -> Subject:
    """The trained digit model of the demo, 20 samples of 64 tokens."""
    from demo_model import IMAGE_SIZE, load_model

    def inputs(step: int, samples: int = 20) -> dict[str, Any]:
        noise = torch.randn(samples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        time = torch.full((samples,), 1000.0 - step)
        return {"hidden_states": noise, "timestep": time, "class_labels": torch.arange(samples) % 10, "return_dict": False}

    title = "demo (12 blocks, dim 96, 20 x 64 tokens)"
    return Subject(title, load_model(), inputs, ("transformer_blocks",), partial(inputs, samples=24))


def flux_shaped(double: int, single: int, heads: int, side: int, text: int = 64) -> Subject:
    """A random model with Flux's structure: joint blocks, then single-stream blocks. ``side``: of the square latent."""
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

    def inputs(step: int, side: int = side) -> dict[str, Any]:
        ids = torch.zeros(side, side, 3)
        ids[..., 1] += torch.arange(side)[:, None]
        ids[..., 2] += torch.arange(side)[None]
        draw = _draws()
        return {
            "hidden_states": draw(1, side * side, 16),
            "encoder_hidden_states": draw(1, text, 128),
            "pooled_projections": draw(1, 64),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.tensor([3.5]),
            "timestep": _sigma(step),
            "return_dict": False,
        }

    title = f"Flux-shaped ({double} + {single} blocks, dim {64 * heads}, {side * side} + {text} tokens)"
    return Subject(
        title, _ready(model), inputs, ("transformer_blocks", "single_transformer_blocks"), partial(inputs, side=side + 4)
    )


def wan_shaped(depth: int, heads: int, side: int, frames: int, text: int = 64) -> Subject:
    """A random model with Wan's structure: self- and cross-attention over a video."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=64,
        ffn_dim=256 * heads,
        num_layers=depth,
        rope_max_seq_len=128,
    )

    def inputs(step: int, side: int = side) -> dict[str, Any]:
        draw = _draws()
        return {
            "hidden_states": draw(1, 16, frames, side, side),
            "encoder_hidden_states": draw(1, text, 128),
            "timestep": _thousands(step),
            "return_dict": False,
        }

    title = f"Wan-shaped ({depth} blocks, dim {64 * heads}, {frames * side * side // 4} tokens)"
    return Subject(title, _ready(model), inputs, ("blocks",), partial(inputs, side=side + 4))


def qwen_shaped(depth: int, heads: int, side: int, text: int = 64) -> Subject:
    """A random model with Qwen-Image's structure: joint blocks of two streams."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=128,
        axes_dims_rope=(16, 24, 24),
    )

    def inputs(step: int, side: int = side) -> dict[str, Any]:
        draw = _draws()
        return {
            "hidden_states": draw(1, side * side, 64),
            "encoder_hidden_states": draw(1, text, 128),
            "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.int64),
            "timestep": _sigma(step),
            "img_shapes": [(1, side, side)],
            "return_dict": False,
        }

    title = f"Qwen-Image-shaped ({depth} blocks, dim {64 * heads}, {side * side} + {text} tokens)"
    return Subject(title, _ready(model), inputs, ("transformer_blocks",), partial(inputs, side=side + 4))


def sd3_shaped(depth: int, heads: int, side: int, text: int = 64) -> Subject:
    """A random model with Stable Diffusion 3's structure: joint blocks, the last one without a text stream."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=64,
    )

    def inputs(step: int, side: int = side) -> dict[str, Any]:
        draw = _draws()
        return {
            "hidden_states": draw(1, 16, 2 * side, 2 * side),
            "encoder_hidden_states": draw(1, text, 128),
            "pooled_projections": draw(1, 64),
            "timestep": _thousands(step),
            "return_dict": False,
        }

    title = f"SD3-shaped ({depth} blocks, dim {64 * heads}, {side * side} + {text} tokens)"
    return Subject(title, _ready(model), inputs, ("transformer_blocks",), partial(inputs, side=side + 4))


def _ready(model: torch.nn.Module) -> torch.nn.Module:
    return model.eval().requires_grad_(False)


def _draws() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _sigma(step: int) -> torch.Tensor:
    return torch.tensor([1.0 - step / 1000.0])


def _thousands(step: int) -> torch.Tensor:
    return torch.tensor([1000.0 - step])


# The models of random weights, each with the numbers that describe it and what they are where they are not given.
FAMILIES: dict[str, tuple[Callable[..., Subject], dict[str, int]]] = {
    "flux": (flux_shaped, {"double": 2, "single": 4, "heads": 2, "side": 8, "text": 64}),
    "wan": (wan_shaped, {"depth": 6, "heads": 2, "side": 8, "frames": 3, "text": 64}),
    "qwen": (qwen_shaped, {"depth": 6, "heads": 2, "side": 8, "text": 64}),
    "sd3": (sd3_shaped, {"depth": 6, "heads": 2, "side": 8, "text": 64}),
}
# small: calls and guards weigh; large: arithmetic does
SUBJECTS: dict[str, str] = {
    "demo": "demo",
    "flux-small": "flux",
    "wan-small": "wan",
    "qwen-small": "qwen",
    "sd3-small": "sd3",
    "flux-large": "flux:double=4,single=8,heads=8,side=24",
    "wan-large": "wan:depth=12,heads=8,side=24,frames=4",
    "qwen-large": "qwen:depth=12,heads=8,side=24",
    "sd3-large": "sd3:depth=12,heads=8,side=24",
}


def subject(name: str) -> Subject:
    """A subject by name; ``flux-deep-N``: N small Flux-shaped blocks, one of four of two streams; else a shape, such as
    ``flux:double=3,single=5,heads=4,side=12``.

    Raises:
        ValueError: there is none of that name, or the shape is none; it says what there is.
    """
    return maker(name)()


def maker(name: str) -> Callable[[], Subject]:
    """What makes a subject, by its name: as `subject`, which calls it."""
    if name == "demo":
        return demo_model
    family, _, given = _shape(name).partition(":")
    if family not in FAMILIES:
        shapes = [f"{each}:{','.join(f'{key}={n}' for key, n in usual.items())}" for each, (_, usual) in FAMILIES.items()]
        raise ValueError(f"no subject {name!r}: there are {', '.join([*SUBJECTS, 'flux-deep-N', *shapes])}")
    make, numbers = FAMILIES[family][0], dict(FAMILIES[family][1])
    for each in filter(None, given.split(",")):
        key, _, value = each.partition("=")
        if key not in numbers or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{each!r} in {name!r}: wanted is one of {', '.join(numbers)}, = and a whole number from 1")
        numbers[key] = int(value)
    return partial(make, **numbers)


def _shape(name: str) -> str:
    deep, _, depth = name.rpartition("-")
    if deep == "flux-deep" and depth.isdecimal() and int(depth) >= 4:
        return f"flux:double={int(depth) // 4},single={int(depth) - int(depth) // 4}"
    return SUBJECTS.get(name, name)
