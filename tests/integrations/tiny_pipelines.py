"""Pipelines of diffusers with tiny random parts, from a text prompt to a picture or a video."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from ..coverage import TINY_MODELS
from ..reference import EagerCache

PROMPT = "a photo of a small red cat on a green hill"
NEGATIVE = "blurry picture"
LENGTH = 20

_SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")
_WORDS = (*_SPECIAL, *dict.fromkeys(f"{PROMPT} {NEGATIVE} describe the image system user assistant".split()))
_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_SIZES = {"vocab_size": len(_WORDS), "num_hidden_layers": 2, "num_attention_heads": 2, **_IDS}


def tokenizer(length: int = LENGTH) -> Any:
    """Words of a fixed vocabulary, between a token that begins and one that ends the text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=length,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def random_part(build: Callable[[], nn.Module]) -> Any:
    """What ``build`` returns, with random weights that do not depend on the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def denoiser(label: str, **changes: Any) -> Any:
    """The tiny transformer of this class, with blocks whose weights are large enough to show in the picture."""
    model = TINY_MODELS[label]
    built = replace(model, config={**model.config, "num_layers": 3, **changes}).build()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "blocks." in name and weight.dim() > 1:
                weight.mul_(3.0)
    return built


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIP text encoder; with a projection as SD3 takes it."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        max_position_embeddings=77,
        projection_dim=projection or width,
        **_SIZES,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return random_part(lambda: kind(config))


def t5(width: int, multilingual: bool = False) -> Any:
    """A T5 encoder, or the multilingual one of Wan."""
    name = "UMT5" if multilingual else "T5"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(_WORDS), d_model=width, d_kv=4, d_ff=2 * width, num_layers=2, num_heads=2, pad_token_id=1
    )
    return random_part(lambda: getattr(transformers, f"{name}EncoderModel")(config))


def gemma(width: int) -> Any:
    """A Gemma 2 model."""
    config = transformers.Gemma2Config(
        hidden_size=width, intermediate_size=2 * width, head_dim=4, num_key_value_heads=1, query_pre_attn_scalar=4, **_SIZES
    )
    return random_part(lambda: transformers.Gemma2Model(config))


def llama(width: int) -> Any:
    """A Llama model."""
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_key_value_heads=1, **_SIZES)
    return random_part(lambda: transformers.LlamaModel(config))


def qwen_vl(width: int) -> Any:
    """A Qwen 2.5 VL model, of which text is all that is used."""
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        **_SIZES,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return random_part(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))


def picture_vae(channels: int, levels: int = 2) -> Any:
    """A picture autoencoder that halves height and width ``levels - 1`` times."""
    return random_part(
        lambda: diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(4,) * levels,
            latent_channels=channels,
            norm_num_groups=1,
            scaling_factor=1.5,
            shift_factor=0.1,
        )
    )


def wan_vae() -> Any:
    """8 x 8 pixels and 4 frames a latent."""
    return random_part(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def qwen_vae() -> Any:
    """2 x 2 pixels a latent."""
    return random_part(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def ltx_vae() -> Any:
    """8 x 8 pixels and 8 frames a latent."""
    return random_part(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4,) * 4,
            decoder_block_out_channels=(4,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            patch_size=1,
        )
    )


def cog_vae() -> Any:
    """2 x 2 pixels and 2 frames a latent."""
    return random_part(
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
        )
    )


def hunyuan_vae() -> Any:
    """8 x 8 pixels and 4 frames a latent."""
    return random_part(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
        )
    )


def deep_vae() -> Any:
    """2 x 2 pixels a latent."""
    return random_part(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        )
    )


def flow(**settings: Any) -> Any:
    """The Euler scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flux_parts() -> dict[str, Any]:
    """The components of every Flux pipeline."""
    return {
        "scheduler": flow(),
        "vae": picture_vae(1),
        "text_encoder": clip(32),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(32),
        "tokenizer_2": tokenizer(),
        "transformer": denoiser("FluxTransformer2DModel", num_layers=2, num_single_layers=2),
    }


def _flux() -> Any:
    return diffusers.FluxPipeline(**flux_parts())


def flux_controlnet() -> Any:
    """A control network for the tiny Flux; those begin with zeros, this one does not."""
    config = {**TINY_MODELS["FluxTransformer2DModel"].config, "num_layers": 1, "num_single_layers": 1}
    network = random_part(lambda: diffusers.FluxControlNetModel(**config))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for weight in network.parameters():
            weight.normal_(std=0.1)
    return network


def _sd3(**changes: Any) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        scheduler=flow(shift=3.0),
        vae=picture_vae(4),
        text_encoder=clip(16, 32),
        tokenizer=tokenizer(),
        text_encoder_2=clip(16, 32),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
        transformer=denoiser("SD3Transformer2DModel", **changes),
    )


def _wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(16, multilingual=True),
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=denoiser("WanTransformer3DModel"),
        transformer_2=denoiser("WanTransformer3DModel"),
        boundary_ratio=0.51,
    )


def _qwen() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=qwen_vl(16),
        tokenizer=tokenizer(1024),
        transformer=denoiser("QwenImageTransformer2DModel", num_layers=2),
    )


def _ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=flow(),
        vae=ltx_vae(),
        text_encoder=t5(16),
        tokenizer=tokenizer(),
        transformer=denoiser("LTXVideoTransformer3DModel"),
    )


def _cog() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(8),
        vae=cog_vae(),
        transformer=denoiser("CogVideoXTransformer3DModel", max_text_seq_length=LENGTH, temporal_compression_ratio=2),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def _hunyuan() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama(16),
        tokenizer=tokenizer(),
        transformer=denoiser(
            "HunyuanVideoTransformer3DModel", num_layers=2, num_single_layers=2, num_refiner_layers=1
        ),
        vae=hunyuan_vae(),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(8),
        tokenizer_2=tokenizer(),
    )


def _sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=gemma(8),
        vae=deep_vae(),
        transformer=denoiser("SanaTransformer2DModel"),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(8),
        vae=picture_vae(4),
        transformer=denoiser("PixArtTransformer2DModel", caption_channels=8),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _lumina() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=denoiser("Lumina2Transformer2DModel", num_refiner_layers=1),
        scheduler=flow(),
        vae=picture_vae(4, levels=4),
        text_encoder=gemma(32),
        tokenizer=tokenizer(),
    )


@dataclass(frozen=True)
class Family:
    """A pipeline, how it is called, and what is expected of caching it with the defaults.

    Args:
        build: the pipeline.
        call: arguments of a run besides prompt, steps and generator.
        contexts: the contexts of each step.
        streams: the arguments of a block that carry hidden states, in the order in which it returns them.
        blocks: the lists of blocks, in execution order.
        steps: the steps that each denoiser makes in a run, by its name.
    """

    build: Callable[[], Any]
    call: dict[str, Any]
    contexts: tuple[str | int, ...]
    streams: tuple[str, ...] = ("hidden_states",)
    blocks: tuple[str, ...] = ("transformer_blocks",)
    steps: Mapping[str, int] = field(default_factory=lambda: {"transformer": 8})

    def sample(self, pipeline: Any) -> Tensor:
        """The picture of one run, from the same noise each time."""
        return sample(pipeline, **self.call)

    def hits(self) -> int:
        """Calls of a run that are answered from the cache: 4, 6, 8, … of each denoiser's steps."""
        return len(self.contexts) * sum(len(range(4, steps + 1, 2)) for steps in self.steps.values())

    def cached_by_hand(self, pipeline: Any) -> Any:
        """The pipeline with copies of its denoisers that skip steps 4, 6, 8, … of their first run, written in eager."""
        changed = {name: self._cached(getattr(pipeline, name)) for name in self.steps}
        return type(pipeline)(**{**pipeline.components, **changed}, **_settings(pipeline))

    def _cached(self, denoiser: Any) -> Any:
        copied, contexts = copy.deepcopy(denoiser), len(self.contexts)
        cache = EagerCache([block for name in self.blocks for block in getattr(copied, name)], self.streams)
        calls = itertools.count()

        def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step, cache.context = divmod(next(calls), contexts)
            cache.skip = step in range(3, 1000, 2)

        copied.register_forward_pre_hook(tell, with_kwargs=True)
        return copied


def _settings(pipeline: Any) -> dict[str, Any]:
    """What the pipeline takes besides components."""
    ratio = pipeline.config.get("boundary_ratio")
    return {} if ratio is None else {"boundary_ratio": ratio}


def sample(pipeline: Any, steps: int = 8, **call: Any) -> Tensor:
    """The picture of one run, from the same noise each time."""
    pipeline.set_progress_bar_config(disable=True)
    picture: Tensor = pipeline(
        prompt=PROMPT,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
        **call,
    )[0]
    return picture


_PICTURE = {"height": 16, "width": 16, "max_sequence_length": LENGTH}
_GUIDED = {**_PICTURE, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}
_TRUE_GUIDED = {**_PICTURE, "negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}
_LARGER = {"height": 32, "width": 32}
_NAMED, _BATCHED = ("cond", "uncond"), ("cond_uncond",)
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_TEXT_LAST = ("hidden_states", "encoder_hidden_states")
_TWO_LISTS = ("transformer_blocks", "single_transformer_blocks")

FLUX = Family(_flux, _TRUE_GUIDED, _NAMED, _TEXT_FIRST, _TWO_LISTS)
SD3 = Family(_sd3, _GUIDED, (1,), _TEXT_FIRST)
SD3_OF_TWO_BLOCKS = replace(SD3, build=lambda: _sd3(num_layers=2))
WAN = Family(
    _wan, {**_GUIDED, "num_frames": 5}, _NAMED, blocks=("blocks",), steps={"transformer": 4, "transformer_2": 4}
)
HUNYUAN_VIDEO = Family(
    _hunyuan,
    {**_TRUE_GUIDED, "num_frames": 5, "prompt_template": {"template": "{}", "crop_start": 0}},
    _NAMED,
    _TEXT_LAST,
    _TWO_LISTS,
)
_AS_IS = {"use_resolution_binning": False, "clean_caption": False}
SANA = Family(_sana, {**_GUIDED, **_LARGER, **_AS_IS, "complex_human_instruction": None}, (1,))

FAMILIES = {
    "Flux": FLUX,
    "StableDiffusion3": SD3,
    "Wan": WAN,
    "QwenImage": Family(_qwen, _TRUE_GUIDED, _NAMED, _TEXT_FIRST),
    "LTX": Family(_ltx, {**_GUIDED, **_LARGER, "num_frames": 9}, _BATCHED),
    "CogVideoX": Family(_cog, {**_GUIDED, "num_frames": 3}, _BATCHED, _TEXT_LAST),
    "HunyuanVideo": HUNYUAN_VIDEO,
    "Sana": SANA,
    "PixArtSigma": Family(_pixart, {**_GUIDED, **_AS_IS}, (1,)),
    "Lumina2": Family(_lumina, {**_GUIDED, **_LARGER, "system_prompt": "system"}, (1, 2), blocks=("layers",)),
}
