"""Image models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tiny import Draw, TinyModel

STEP = 900


def _steps(batch: int) -> Tensor:
    return torch.full((batch,), STEP)


def _sigma(batch: int) -> Tensor:
    return torch.full((batch,), 0.9)


def _latents(draw: Draw, batch: int = 1, channels: int = 4, size: int = 8) -> Tensor:
    return draw(batch, channels, size, size)


def _grid(height: int, width: int, axes: int = 3) -> Tensor:
    ids = torch.zeros(height * width, axes)
    ids[:, 1] = torch.arange(height).repeat_interleave(width)
    ids[:, 2] = torch.arange(width).repeat(height)
    return ids


def _tokens(draw: Draw, channels: int = 4, text: int = 6, width: int = 32, batch: int = 1) -> dict[str, Any]:
    """What models of the Flux family take."""
    return {
        "hidden_states": draw(batch, 16, channels),
        "encoder_hidden_states": draw(batch, text, width),
        "img_ids": _grid(4, 4),
        "txt_ids": torch.zeros(text, 3),
        "timestep": _sigma(batch),
    }


def _sizes(batch: int) -> dict[str, Tensor]:
    size = torch.tensor([[64, 64]] * batch)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
SD3 = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}
HUNYUAN_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 4,
    "hidden_size": 16,
    "text_len": 4,
    "text_len_t5": 4,
    "activation_fn": "gelu-approximate",
}
HUNYUAN_IMAGE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": (1, 1),
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4),
}


def _sd3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latents(draw, 2),
        "encoder_hidden_states": draw(2, 6, 32),
        "pooled_projections": draw(2, 64),
        "timestep": _steps(2),
    }


def _hunyuan_dit(draw: Draw) -> dict[str, Any]:
    angles = draw(16, 8)
    return {
        "hidden_states": _latents(draw, 2),
        "encoder_hidden_states": draw(2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": draw(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "timestep": _steps(2).float(),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]] * 2),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hunyuan_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latents(draw, 1),
        "timestep": _steps(1).float(),
        "encoder_hidden_states": draw(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6),
    }


def _bria_fibo(draw: Draw) -> dict[str, Any]:
    given = _tokens(draw, 48, 6, 64)
    text = given["encoder_hidden_states"]
    return {**given, "text_encoder_layers": [text[:, :, :32].clone() for _ in range(5)]}


def _flux2(draw: Draw) -> dict[str, Any]:
    image = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(6))
    return {
        "hidden_states": draw(1, 16, 4),
        "encoder_hidden_states": draw(1, 6, 32),
        "img_ids": image[None],
        "txt_ids": text[None],
        "timestep": _sigma(1),
        "guidance": torch.ones(1),
    }


def _flux3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 4),
        "encoder_hidden_states": draw(1, 6, 32),
        "img_ids": torch.cat([_grid(4, 4), torch.zeros(16, 1)], dim=1),
        "txt_ids": torch.zeros(6, 4),
        "timestep": _sigma(1),
    }


def _qwen(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, 8, 16),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.int64),
        "timestep": _sigma(1),
        "img_shapes": [(1, 4, 4)],
    }


def _qwen21(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": _sigma(1),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.int64),
    }


def _omnigen(draw: Draw) -> dict[str, Any]:
    length = 24 + 1 + 16
    return {
        "hidden_states": _latents(draw, 2),
        "timestep": _sigma(2),
        "input_ids": draw.ints(10, 2, 24),
        "input_img_latents": [draw(1, 4, 8, 8)],
        "input_image_sizes": {0: [[0, 16]]},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length)[None].repeat(2, 1),
    }


def _ideogram4(draw: Draw) -> dict[str, Any]:
    hidden, text = torch.zeros(1, 8, 16), torch.zeros(1, 8, 24)
    hidden[:, 4:], text[:, :4] = draw(1, 4, 16), draw(1, 4, 24)
    position = torch.zeros(1, 8, 3, dtype=torch.int64)
    position[:, :4] = torch.arange(4)[:, None]
    position[:, 4:] = 65536 + torch.cat([torch.zeros(4, 1), _grid(2, 2)[:, 1:]], dim=1).long()
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "timestep": _sigma(1),
        "position_ids": position,
        "segment_ids": torch.ones(1, 8, dtype=torch.int64),
        "indicator": torch.tensor([[3] * 4 + [2] * 4]),
    }


def _krea2(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(1, 4, dtype=torch.bool)
    mask[:, -1] = False
    return {
        "hidden_states": draw(1, 9, 16),
        "encoder_hidden_states": draw(1, 4, 3, 16),
        "timestep": _sigma(1),
        "position_ids": torch.cat([torch.zeros(4, 3), _grid(3, 3)]),
        "encoder_attention_mask": mask,
    }


def _nucleus(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, 8, 16),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.int64),
        "timestep": _sigma(1),
        "img_shapes": [(1, 4, 4)],
    }


def _lumina(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latents(draw, 2),
        "encoder_hidden_states": draw(2, 6, 32),
        "timestep": _sigma(2),
        "encoder_mask": torch.ones(2, 6),
        "image_rotary_emb": draw(384, 384, 4),
        "cross_attention_kwargs": {},
    }


def _dual(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latents(draw, 2, 16),
        "encoder_hidden_states": draw(2, 77 + 257, 8),
        "timestep": _steps(2),
    }


def _glm(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latents(draw, 1),
        "encoder_hidden_states": draw(1, 6, 32),
        "prior_token_id": draw.ints(64, 1, 16),
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": _steps(1),
        "target_size": torch.tensor([[8.0, 8.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


def _text_to_image(channels: int = 4, text: int = 6, width: int = 8, batch: int = 2, size: int = 8, **more: Any) -> Any:
    """Inputs of models that take latents, a prompt and a timestep."""
    return lambda draw: {
        "hidden_states": _latents(draw, batch, channels, size),
        "encoder_hidden_states": draw(batch, text, width),
        "timestep": _steps(batch),
        **more,
    }


MODELS = (
    TinyModel(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 32},
        lambda d: {**_tokens(d), "pooled_projections": d(1, 32)},
    ),
    TinyModel("SD3Transformer2DModel", SD3, _sd3),
    TinyModel("SD3Transformer2DModel", {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, _sd3, variant="dual"),
    TinyModel(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen,
    ),
    TinyModel(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        _text_to_image(),
    ),
    TinyModel(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 4,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 8,
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
            "caption_channels": None,
        },
        _text_to_image(added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
    ),
    TinyModel(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        lambda d: {
            "hidden_states": _latents(d, 2),
            "encoder_hidden_states": d(2, 6, 32),
            "timestep": _sigma(2),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        },
    ),
    TinyModel(
        "DiTTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 4,
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 8,
        },
        lambda d: {"hidden_states": _latents(d, 2), "timestep": _steps(2), "class_labels": d.ints(4, 2)},
    ),
    TinyModel(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        lambda d: {"hidden_states": _latents(d, 2), "encoder_hidden_states": d(2, 6, 32), "timestep": _sigma(2)},
    ),
    TinyModel(
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
        _tokens,
    ),
    TinyModel("BriaTransformer2DModel", {**FLUX, "axes_dims_rope": (0, 8, 8), "pooled_projection_dim": None}, _tokens),
    TinyModel(
        "BriaFiboTransformer2DModel",
        {
            **FLUX,
            "in_channels": 48,
            "axes_dims_rope": (0, 8, 8),
            "pooled_projection_dim": None,
            "joint_attention_dim": 64,
            "text_encoder_dim": 32,
        },
        _bria_fibo,
        streams=False,
    ),
    TinyModel(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1, 3),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (8, 4, 4),
            "axes_lens": (64, 64, 64),
        },
        lambda d: {
            "hidden_states": _latents(d, 1),
            "timestep": _sigma(1),
            "encoder_hidden_states": d(1, 3, 6, 16),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        },
    ),
    TinyModel("Flux2Transformer2DModel", {**FLUX, "axes_dims_rope": (4, 4, 4, 4)}, _flux2),
    TinyModel(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
    ),
    TinyModel("OvisImageTransformer2DModel", {**FLUX, "out_channels": 4}, _tokens),
    TinyModel(
        "LongCatImageTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 32},
        lambda d: {**_tokens(d), "guidance": torch.full((1,), 3.5)},
    ),
    TinyModel(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1, 2, 3),
            "force_inference_output": True,
        },
        lambda d: {
            "hidden_states": _latents(d, 1),
            "encoder_hidden_states_t5": d(1, 6, 8),
            "encoder_hidden_states_llama3": d(4, 1, 6, 4),
            "pooled_embeds": d(1, 8),
            "timesteps": _steps(1),
        },
        time="timesteps",
    ),
    TinyModel(
        "QwenImage21Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen21,
    ),
    TinyModel(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": True,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": [2.0, 2.0, 2.0, 2.0],
        },
        _nucleus,
    ),
    TinyModel(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 4,
            "pad_token_id": 0,
            "vocab_size": 1000,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        _omnigen,
    ),
    TinyModel(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda d: {"x": [d(4, 1, 8, 8)], "cap_feats": [d(6, 16)], "t": _sigma(1)},
        time="t",
        moves=("x", "cap_feats"),
    ),
    TinyModel(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (4, 2, 2),
        },
        _krea2,
    ),
    TinyModel("HunyuanImageTransformer2DModel", HUNYUAN_IMAGE, _hunyuan_image),
    TinyModel(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN_IMAGE, "text_embed_2_dim": 12},
        lambda d: {
            **_hunyuan_image(d),
            "encoder_hidden_states_2": d(1, 5, 12),
            "encoder_attention_mask_2": torch.ones(1, 5),
        },
        variant="two_texts",
    ),
    TinyModel("HunyuanDiT2DModel", {**HUNYUAN_DIT, "num_layers": 6}, _hunyuan_dit, streams=False),
    TinyModel(
        "HunyuanDiT2DControlNetModel",
        {**HUNYUAN_DIT, "transformer_num_layers": 8},
        lambda d: {**_hunyuan_dit(d), "controlnet_cond": _latents(d, 2)},
        moves=("hidden_states", "controlnet_cond"),
        streams=False,
    ),
    TinyModel(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 4,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "norm_eps": 1e-05,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
        },
        _lumina,
    ),
    TinyModel(
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _text_to_image(**_sizes(2)),
    ),
    TinyModel(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        _text_to_image(**_sizes(2)),
    ),
    TinyModel(
        "GlmImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        _glm,
    ),
    TinyModel(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 4,
            "ffn_hidden_size": 16,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda d: {
            "hidden_states": _latents(d, 1, 16),
            "timestep": _steps(1).float(),
            "text_bth": d(1, 6, 16),
            "text_lens": torch.tensor([6]),
        },
    ),
    TinyModel(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        _ideogram4,
    ),
    TinyModel(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 4,
            "axes_dim": [8, 8],
        },
        _text_to_image(width=32, batch=1),
    ),
    TinyModel(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        lambda d: {"hidden_states": _latents(d, 2, 16), "encoder_hidden_states": d(2, 6, 8), "timestep": _steps(2)},
    ),
    TinyModel(
        "DreamLiteTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "use_linear_projection": True,
        },
        lambda d: {"hidden_states": _latents(d, 2, 16), "encoder_hidden_states": d(2, 6, 8), "timestep": _steps(2)},
    ),
    TinyModel(
        "DualTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        _dual,
    ),
    TinyModel(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 4,
            "embedding_dim": 8,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        lambda d: {
            "hidden_states": d(2, 8),
            "timestep": _steps(2),
            "proj_embedding": d(2, 8),
            "encoder_hidden_states": d(2, 7, 8),
        },
    ),
    TinyModel(
        "UTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 5,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "layer_norm",
            "activation_fn": "gelu",
        },
        lambda d: {"hidden_states": _latents(d, 2)},
        time=None,
        streams=False,
    ),
    TinyModel(
        "UniDiffuserModel",
        {
            "text_dim": 8,
            "clip_img_dim": 12,
            "num_text_tokens": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 5,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu",
            "norm_type": "layer_norm",
            "out_channels": 4,
            "use_data_type_embedding": True,
        },
        lambda d: {
            "latent_image_embeds": _latents(d, 2),
            "image_embeds": d(2, 1, 12),
            "prompt_embeds": d(2, 6, 8),
            "timestep_img": _steps(2),
            "timestep_text": _steps(2),
        },
        time="timestep_img",
        moves=("latent_image_embeds", "image_embeds", "prompt_embeds"),
        streams=False,
    ),
)
