"""Audio, music and protein models."""

from __future__ import annotations

from typing import Any

import torch

from .tiny import Draw, TinyModel

PROTEINA = {
    "nlayers": 5,
    "token_dim": 32,
    "nheads": 2,
    "dim_cond": 16,
    "pair_repr_dim": 16,
    "latent_dim": 4,
    "token_type_emb_dim": 8,
    "cath_emb_dim": 4,
    "t_emb_dim": 16,
    "seq_sep_dim": 16,
    "xt_pair_dist_dim": 8,
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists",),
    "tri_mult_c": 16,
    "num_sequence_classes": 12,
}


def _proteina(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(1, 6, dtype=torch.bool)
    return {
        "bb_ca": draw(1, 6, 3),
        "local_latents": draw(1, 6, 4),
        "bb_ca_time": torch.full((1,), 0.9),
        "local_latents_time": torch.full((1,), 0.9),
        "padding_mask": mask,
        "token_type": torch.zeros(1, 6, dtype=torch.int64),
        "conditioning": {"is_in_context_conditioning": ~mask, "supports_local_latent": mask},
    }


def _film(draw: Draw) -> dict[str, Any]:
    return {
        "encodings_and_masks": [(draw(1, 5, 16), torch.ones(1, 5)), (draw(1, 4, 16), torch.ones(1, 4))],
        "decoder_input_tokens": draw(1, 6, 8),
        "decoder_noise_time": torch.full((1,), 0.9),
    }


def _stable_audio(draw: Draw) -> dict[str, Any]:
    angles = draw(9, 8)
    return {
        "hidden_states": draw(1, 4, 8),
        "timestep": torch.full((1,), 0.9),
        "encoder_hidden_states": draw(1, 5, 16),
        "global_hidden_states": draw(1, 1, 12),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


MODELS = (
    TinyModel(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 16,
        },
        lambda d: {
            "hidden_states": d(2, 8, 8),
            "timestep": torch.full((2,), 0.9),
            "timestep_r": torch.full((2,), 0.1),
            "encoder_hidden_states": d(2, 10, 32),
            "context_latents": d(2, 8, 16),
        },
    ),
    TinyModel(
        "StableAudioDiTModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 12,
            "cross_attention_input_dim": 16,
        },
        _stable_audio,
    ),
    TinyModel(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 4,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        lambda d: {
            "hidden_states": d(2, 8, 16),
            "timestep": torch.full((2,), 0.9),
            "encoder_hidden_states": d(2, 4, 16),
            "global_hidden_states": d(2, 12),
        },
    ),
    TinyModel(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 64, "dit_depth": 4, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda d: {
            "hidden_states": d(1, 16, 8),
            "encoder_hidden_states": d(1, 10, 32),
            "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
            "attention_mask": torch.ones(1, 16, dtype=torch.bool),
            "timestep": torch.full((1,), 0.9),
        },
    ),
    TinyModel(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda d: {
            "hidden_states": d(1, 8, 12),
            "encoder_hidden_states": d(1, 12, 16),
            "timestep": torch.full((1,), 0.9),
        },
    ),
    TinyModel(
        "MiniMaxMusic3RVQDepthDecoder",
        {"hidden_size": 32, "num_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "audio_vocab_size": 8},
        lambda d: {"inputs_embeds": d(2, 5, 32)},
        time=None,
        moves=("inputs_embeds",),
    ),
    TinyModel(
        "T5FilmDecoder",
        {"input_dims": 8, "targets_length": 6, "d_model": 16, "num_layers": 4, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        _film,
        time="decoder_noise_time",
        moves=("decoder_input_tokens",),
    ),
    TinyModel("RFD4ProteinaTransformer", PROTEINA, _proteina, time="bb_ca_time", moves=("bb_ca",), streams=False),
    TinyModel(
        "RFD4ProteinaTransformer",
        PROTEINA,
        lambda d: {**_proteina(d), "recycle_depth": 2},
        time="bb_ca_time",
        moves=("bb_ca",),
        variant="recycled",
        streams=False,
    ),
)
