"""Video models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tiny import Draw, TinyModel

STEP = 900


def _steps(batch: int) -> Tensor:
    return torch.full((batch,), STEP)


def _video(
    channels: int = 4, frames: int = 2, size: int = 8, text: int = 6, width: int = 16, batch: int = 1, **more: Any
) -> Any:
    """Inputs of models that take latents of several frames, a prompt and a timestep."""
    return lambda draw: {
        "hidden_states": draw(batch, channels, frames, size, size),
        "encoder_hidden_states": draw(batch, text, width),
        "timestep": _steps(batch),
        **more,
    }


def _frames_first(channels: int, frames: int, size: int, text: int, width: int, batch: int = 1) -> Any:
    return lambda draw: {
        "hidden_states": draw(batch, frames, channels, size, size),
        "encoder_hidden_states": draw(batch, text, width),
        "timestep": _steps(batch),
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
COG_VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
}
HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 4,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 16,
    "rope_double_precision": False,
}
MOTIF = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_decoder_layers": 0,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "norm_type": "layer_norm",
    "text_embed_dim": 16,
    "image_embed_dim": 4,
    "rope_axes_dim": (4, 4, 4),
}


def _hunyuan_video(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 1, 8, 8),
        "timestep": _steps(1),
        "encoder_hidden_states": draw(1, 6, 16),
        "pooled_projections": draw(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.full((1,), 6000.0),
    }


def _framepack(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 3, 4, 4),
        "timestep": _steps(1),
        "encoder_hidden_states": draw(1, 6, 16),
        "pooled_projections": draw(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.full((1,), 6000.0),
        "image_embeds": draw(1, 5, 16),
        "indices_latents": torch.ones(3),
        "latents_clean": draw(1, 4, 2, 4, 4),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": draw(1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": draw(1, 4, 8, 4, 4),
        "indices_latents_history_4x": torch.ones(8),
    }


def _hunyuan15(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 1, 8, 8),
        "timestep": _steps(1).float(),
        "encoder_hidden_states": draw(1, 6, 16),
        "encoder_hidden_states_2": draw(1, 4, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def _helios(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 2, 16, 16),
        "timestep": _steps(1),
        "encoder_hidden_states": draw(1, 6, 16),
        "indices_hidden_states": torch.ones(1, 2),
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": draw(1, 4, 1, 16, 16),
        "latents_history_mid": draw(1, 4, 1, 16, 16),
        "latents_history_long": draw(1, 4, 4, 16, 16),
    }


def _consisid(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 1, 4, 8, 8),
        "encoder_hidden_states": draw(2, 8, 8),
        "timestep": _steps(2),
        "id_vit_hidden": [draw(2, 2, 2)],
        "id_cond": draw(2, 2),
    }


def _cosmos3(draw: Draw) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([1, 2, 3]),
        "text_indexes": torch.tensor([0, 1, 2]),
        "position_ids": torch.zeros(3, 7, dtype=torch.int64),
        "und_len": 3,
        "sequence_length": 7,
        "vision_tokens": [draw(1, 2, 1, 2, 2)],
        "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": torch.arange(3, 7),
        "vision_mse_loss_indexes": torch.arange(3, 7),
        "vision_timesteps": torch.full((4,), 0.9),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _kandinsky5(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 2, 8, 8, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.full((1,), 900.0),
        "pooled_projections": draw(1, 8),
        "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
        "text_rope_pos": torch.arange(6),
    }


def _kandinsky6(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 2, 8, 8, 9),
        "audio_hidden_states": draw(1, 5, 6),
        "encoder_hidden_states": draw(1, 6, 16),
        "pooled_projections": draw(1, 8),
        "timestep": torch.full((1,), 900.0),
    }


def _ltx2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 32, 4),
        "audio_hidden_states": draw(1, 9, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "audio_encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.full((1,), 900.0),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _refiner(draw: Draw) -> dict[str, Any]:
    angles = draw(1, 32, 16)
    return {
        "hidden_states": draw(1, 32, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.full((1,), 900.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
    }


def _minimax_h3(draw: Draw) -> dict[str, Any]:
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    position = torch.zeros(18, 3)
    position[:, 0] = torch.arange(18)
    return {
        "hidden_states": draw(1, 8, 16),
        "audio_hidden_states": draw(1, 6, 6),
        "encoder_hidden_states": draw(1, 4, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": position,
        "video_indices": torch.arange(10, 18),
        "audio_indices": torch.arange(4, 10),
        "text_indices": torch.arange(4),
    }


def _animate(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 12, 3, 8, 8),
        "timestep": _steps(1),
        "encoder_hidden_states": draw(1, 6, 16),
        "encoder_hidden_states_image": draw(1, 5, 16),
        "pose_hidden_states": draw(1, 4, 2, 8, 8),
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }


def _animate2(draw: Draw) -> dict[str, Any]:
    """A denoising step, beside reference tokens that an earlier pass has left."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    kept = WanAnimate2KVCache(4)
    for layer in kept.layer_caches:
        layer.store(draw(1, 8, 2, 16), draw(1, 8, 2, 16))
    return {
        "hidden_states": [draw(16, 2, 4, 4)],
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": [draw(8, 32)],
        "condition_latents": [draw(20, 2, 4, 4)],
        "encoder_hidden_states_image": draw(1, 4, 1280),
        "kv_cache": kept,
        "kv_cache_mode": "cached",
        "seq_len": 8,
        "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
        "origin_len": 4,
        "origin_area": [32, 32],
    }


def _sana_wm(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 2, 4, 4),
        "timestep": torch.full((1, 1, 2), STEP),
        "encoder_hidden_states": draw(1, 1, 6, 16),
        "mask": torch.ones(1, 6),
    }


MODELS = (
    TinyModel("WanTransformer3DModel", WAN, _video()),
    TinyModel(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda d: {**_video()(d), "control_hidden_states": d(1, 12, 2, 8, 8)},
        streams=False,
    ),
    TinyModel(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _animate,
        streams=False,
    ),
    TinyModel(
        "WanAnimate2Transformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "text_len": 16,
            "in_dim": 36,
            "dim": 32,
            "ffn_dim": 32,
            "freq_dim": 32,
            "text_dim": 32,
            "out_dim": 16,
            "num_heads": 2,
            "num_layers": 4,
            "use_img_emb": True,
        },
        _animate2,
    ),
    TinyModel("SkyReelsV2Transformer3DModel", WAN, _video()),
    TinyModel("ChronoEditTransformer3DModel", {**WAN, "rope_temporal_skip_len": 8}, _video()),
    TinyModel(
        "AnyFlowTransformer3DModel",
        {**WAN, "gate_value": 0.25, "deltatime_type": "r"},
        lambda d: {
            "hidden_states": d(1, 2, 4, 8, 8),
            "timestep": torch.full((1, 2), 900.0),
            "r_timestep": torch.full((1, 2), 250.0),
            "encoder_hidden_states": d(1, 6, 16),
        },
    ),
    TinyModel(
        "AnyFlowFARTransformer3DModel",
        {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        lambda d: {
            "hidden_states": d(1, 4, 4, 8, 8),
            "timestep": torch.full((1, 4), 900.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "encoder_hidden_states": d(1, 6, 16),
            "chunk_partition": [2, 2],
        },
    ),
    TinyModel(
        "HeliosTransformer3DModel",
        {
            **{name: value for name, value in WAN.items() if name != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        _helios,
    ),
    TinyModel("CogVideoXTransformer3DModel", {**COG_VIDEO, "patch_size_t": None}, _frames_first(4, 1, 8, 8, 8, 2)),
    TinyModel(
        "CogVideoXTransformer3DModel",
        {**COG_VIDEO, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
        _frames_first(4, 2, 8, 8, 8, 2),
        variant="patch_t",
    ),
    TinyModel(
        "ConsisIDTransformer3DModel",
        {
            **COG_VIDEO,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        _consisid,
        streams=False,
    ),
    TinyModel(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 4,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        lambda d: {**_video(frames=1)(d), "attention_mask": torch.ones(1, 6), "fps": 30},
    ),
    TinyModel(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        _cosmos3,
        time="vision_timesteps",
        moves=("vision_tokens",),
    ),
    TinyModel(
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        _video(),
    ),
    TinyModel("HunyuanVideoTransformer3DModel", HUNYUAN_VIDEO, _hunyuan_video),
    TinyModel(
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        _hunyuan_video,
        variant="token_replace",
    ),
    TinyModel(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 4,
            "num_refiner_layers": 2,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        _hunyuan15,
    ),
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN_VIDEO, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _framepack,
    ),
    TinyModel(
        "JoyImageEditTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 4,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        _video(frames=1),
    ),
    TinyModel(
        "JoyImageEditPlusTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 4,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        lambda d: {
            "hidden_states": d(1, 8, 4, 1, 2, 2),
            "encoder_hidden_states": d(1, 6, 16),
            "timestep": _steps(1).float(),
            "shape_list": [[(1, 2, 2), (1, 2, 2)]],
        },
    ),
    TinyModel(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 2,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky5,
    ),
    TinyModel(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 2,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 6,
            "out_audio_dim": 6,
        },
        _kandinsky6,
    ),
    TinyModel(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
        },
        lambda d: {"hidden_states": d(1, 2, 16, 16, 9), "timestep": torch.full((1,), 900.0)},
    ),
    TinyModel(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 4,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 8,
            "norm_type": "ada_norm_single",
            "video_length": 2,
        },
        lambda d: {**_video(frames=2, width=8)(d), "enable_temporal_attentions": True},
        streams=False,
    ),
    TinyModel(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 4,
            "caption_channels": 16,
        },
        lambda d: {
            "hidden_states": d(2, 32, 4),
            "encoder_hidden_states": d(2, 6, 16),
            "timestep": _steps(2),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    TinyModel("LTX2VideoTransformer3DModel", LTX2, _ltx2),
    TinyModel("SanaWMLTX2RefinerTransformer3DModel", LTX2, _refiner),
    TinyModel(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "caption_channels": 16,
            "mlp_ratio": 2.0,
            "softmax_every_n": 2,
            "chunk_plucker_channels": 8,
        },
        _sana_wm,
    ),
    TinyModel(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        _video(),
    ),
    TinyModel(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 4,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 8,
        },
        lambda d: {**_video(text=8)(d), "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool)},
    ),
    TinyModel(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 48,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "cross_attention_dim": 96,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        _video(width=8),
    ),
    TinyModel("MotifVideoTransformer3DModel", MOTIF, _video(channels=9)),
    TinyModel(
        "MotifVideoTransformer3DModel",
        {**MOTIF, "num_decoder_layers": 2},
        _video(channels=9),
        variant="decoder",
        streams=False,
    ),
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 2,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "patch_size": (1, 2, 2),
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    TinyModel(
        "TransformerTemporalModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 4, "norm_num_groups": 4},
        lambda d: {"hidden_states": d(4, 16, 4, 4), "timestep": _steps(4), "num_frames": 2},
    ),
    TinyModel(
        "TransformerSpatioTemporalModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 4, "cross_attention_dim": 8},
        lambda d: {
            "hidden_states": d(4, 32, 4, 4),
            "encoder_hidden_states": d(4, 3, 8),
            "image_only_indicator": torch.zeros(2, 2),
        },
        time=None,
        streams=False,
    ),
)
