"""A second small trained model: double- and single-stream blocks with joint attention, in the manner of Flux.

An ordinary ``diffusers`` :class:`~diffusers.FluxTransformer2DModel` with 3 double and 8 single blocks, trained with
flow matching on the same 24x24 digits as the demo's model (``train_flux_model.py`` trains it). The benchmark of
pictures' quality uses both, so that a rule that suits one architecture alone is seen to do so.

Images and labels are those of ``demo_model``. The model sees an image as 64 tokens of 3x3 pixels, and a label as a
"prompt" of 4 tokens: one-hot vectors of the label and of the token's place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from demo_model import CHECKPOINT_DIR, IMAGE_SIZE, NUM_CLASSES, load_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

FLUX_FILE = CHECKPOINT_DIR / "flux_digits.safetensors"
PATCH = 3
SIDE = IMAGE_SIZE // PATCH
TEXT_TOKENS = 4
TEXT_WIDTH = NUM_CLASSES + 1 + TEXT_TOKENS


def build_flux_model() -> FluxTransformer2DModel:
    """Return the transformer with fresh float32 weights (2.2 million parameters, 64 + 4 tokens per image)."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=PATCH * PATCH,
        num_layers=3,
        num_single_layers=8,
        attention_head_dim=16,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=NUM_CLASSES + 1,
        axes_dims_rope=(4, 6, 6),
    )


def load_flux_model(path: Path = FLUX_FILE) -> FluxTransformer2DModel:
    """Return the trained model: float32, in eval mode, without gradients."""
    model = build_flux_model()
    load_weights(model, path)
    return model


def pack(images: Tensor) -> Tensor:
    """Turn images ``[B, 1, 24, 24]`` into tokens ``[B, 64, 9]``, row by row."""
    tokens = images.reshape(-1, SIDE, PATCH, SIDE, PATCH).permute(0, 1, 3, 2, 4)
    return tokens.reshape(-1, SIDE * SIDE, PATCH * PATCH)


def unpack(tokens: Tensor) -> Tensor:
    """Turn tokens ``[B, 64, 9]`` back into images ``[B, 1, 24, 24]``."""
    images = tokens.reshape(-1, SIDE, SIDE, PATCH, PATCH).permute(0, 1, 3, 2, 4)
    return images.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def prompt(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 "prompt" ``[B, 4, 15]`` and its pooled form ``[B, 11]`` of int64 labels ``[B]``, 0 to 10."""
    pooled = nn.functional.one_hot(labels, NUM_CLASSES + 1).float()
    places = torch.eye(TEXT_TOKENS, device=labels.device).expand(len(labels), -1, -1)
    return torch.cat([pooled.unsqueeze(1).expand(-1, TEXT_TOKENS, -1), places], dim=-1), pooled


def positions(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the position ids of text ``[4, 3]`` and of image tokens ``[64, 3]``."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    image = torch.stack([torch.zeros(SIDE, SIDE), rows, columns], dim=-1).reshape(-1, 3)
    return torch.zeros(TEXT_TOKENS, 3, device=device), image.to(device)


def velocity(model: nn.Module, images: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """Return the model's velocity ``[B, 1, 24, 24]`` for images of that shape, timesteps (0 to 1) and labels ``[B]``."""
    text, pooled = prompt(labels)
    text_ids, image_ids = positions(images.device)
    out: Tensor = model(
        hidden_states=pack(images),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=timestep,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return unpack(out)
