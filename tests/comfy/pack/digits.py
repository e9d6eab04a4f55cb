"""The demo's trained model as a ComfyUI model: pictures of handwritten digits, from class labels.

The transformer is written out once more, with the names of the checkpoint's weights: an environment for ComfyUI has no
diffusers, whose class the checkpoint is of.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn

CHECKPOINT = Path(__file__).resolve().parents[3] / "examples/checkpoints/dit_digits.safetensors"
CLASSES = 10
HEADS, WIDTH, LAYERS, PATCH, SIZE = 6, 96, 12, 3, 24
SHIFT = 3.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mixed: Tensor = nn.functional.scaled_dot_product_attention(*parts)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(256, WIDTH)
        self.timestep_embedder.linear_2 = nn.Linear(WIDTH, WIDTH)
        self.class_embedder = nn.Module()
        self.class_embedder.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 127)
        angles = t[:, None].float() * rates[None]
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        layers: Any = self.timestep_embedder
        time = layers.linear_2(nn.functional.silu(layers.linear_1(waves)))
        table: Any = self.class_embedder
        return time + table.embedding_table(labels)  # type: ignore[no-any-return]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = Embedder()
        self.linear = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, t: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(self.emb(t, labels)))[:, None].chunk(6, dim=-1)  # type: ignore[no-any-return]


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(), nn.Identity(), nn.Linear(4 * WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1, self.ff = Norm(), Attention(), Mlp()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(t, labels)
        x = x + gate * self.attn1(normed(x) * (1 + scale) + shift)
        return x + gate_mlp * self.ff(normed(x, 1e-5) * (1 + scale_mlp) + shift_mlp)


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,), eps=eps)


def position_table() -> Tensor:
    """Sines and cosines of the column, then of the row: [1, 64, 96]."""
    side, quarter = SIZE // PATCH, WIDTH // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()[None]


class DigitsTransformer(nn.Module):
    """A diffusion transformer of 12 blocks over 64 tokens."""

    dtype = torch.float32

    def __init__(self, **unused: Any) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.pos_embed.register_buffer("pos_embed", torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
        self.transformer_blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.proj_out_1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.proj_out_2 = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None = None, transformer_options: Any = None, **kwargs: Any
    ) -> Tensor:
        extension = comfy.patcher_extension
        wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, transformer_options or {})
        executor = extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        made: Tensor = executor.execute(x, timestep, context, transformer_options=transformer_options)
        return made

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor | None = None, transformer_options: Any = None) -> Tensor:
        assert context is not None
        labels = context[:, 0, 0].round().long()
        embed: Any = self.pos_embed
        tokens = embed.proj(x).flatten(2).transpose(1, 2) + embed.pos_embed
        for block in self.transformer_blocks:
            tokens = block(tokens, timestep, labels)
        first: Any = self.transformer_blocks[0]
        conditioning = first.norm1.emb(timestep, labels)
        shift, scale = self.proj_out_1(nn.functional.silu(conditioning))[:, None].chunk(2, dim=-1)
        patches = self.proj_out_2(normed(tokens) * (1 + scale) + shift)
        side = SIZE // PATCH
        pixels = patches.view(-1, side, side, PATCH, PATCH, 1).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, 1, SIZE, SIZE)


class Digits(comfy.model_base.BaseModel):  # type: ignore[misc]
    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device, DigitsTransformer)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {"c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}


class DigitsFormat(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
    latent_channels = 1
    scale_factor = 1.0


class DigitsConfig(comfy.supported_models_base.BASE):  # type: ignore[misc]
    unet_config = {"digits": True}  # noqa: RUF012
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    latent_format = DigitsFormat
    sampling_settings = {"shift": SHIFT, "multiplier": 1000.0}  # noqa: RUF012
    memory_usage_factor = 1.0


def load() -> Any:
    """A patcher with the trained model."""
    config = DigitsConfig({"digits": True, "in_channels": 1})
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = Digits(config, device=offload)
    weights = {name: value.float() for name, value in comfy.utils.load_torch_file(str(CHECKPOINT)).items()}
    missing, unknown = model.diffusion_model.load_state_dict(weights, strict=False)
    if unknown or any(not name.endswith("pos_embed.pos_embed") for name in missing):
        raise ValueError(f"the checkpoint is another one: missing {missing}, unknown {unknown}")
    if missing:
        model.diffusion_model.pos_embed.pos_embed.copy_(position_table())
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


class TestDigitsModel:
    """The trained model."""

    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "go", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def go(self) -> tuple[Any]:
        return (load(),)


class TestDigitsLabels:
    """One label for each picture of a batch; class 10 is "no label"."""

    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "go", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"labels": ("STRING", {"default": "0 1 2 3 4 5 6 7 8 9"})}}

    def go(self, labels: str) -> tuple[Any]:
        return ([[torch.tensor([float(label) for label in labels.split()])[:, None, None], {}]],)


class TestDigitsLatent:
    """Room for a batch of pictures."""

    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "go", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"batch": ("INT", {"default": 10})}}

    def go(self, batch: int) -> tuple[Any]:
        return ({"samples": torch.zeros(batch, 1, SIZE, SIZE)},)


class TestDigitsImage:
    """The pictures of a batch in a row."""

    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "go", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def go(self, samples: dict[str, Any]) -> tuple[Any]:
        row = torch.cat(list(samples["samples"][:, 0].clamp(-1, 1)), dim=1)
        large = (row / 2 + 0.5).repeat_interleave(4, 0).repeat_interleave(4, 1)
        return (large[None, ..., None].repeat(1, 1, 1, 3),)


NODES = {
    kind.__name__: kind for kind in (TestDigitsModel, TestDigitsLabels, TestDigitsLatent, TestDigitsImage)
}
