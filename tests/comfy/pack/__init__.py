"""Nodes for the tests: tiny models with random weights, and what looks into a server. Never shipped."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import warnings
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from .digits import NODES as DIGITS

SAID: list[str] = []

# Of each family: its class among ComfyUI's supported models, its configuration, features of the text, of the pooled text.
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
    "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 2, "ffn_dim": 256,
    "num_layers": 3, "patch_size": (1, 2, 2), "freq_dim": 64, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 64, "text_len": 32,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 3, "input_size": None, "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 192}},
    "num_patches": 1024, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None,
}  # fmt: skip
# a UNet, which holds no chain of blocks that the finder knows
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": 64, "num_heads": 2, "num_head_channels": -1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "flux": ("Flux", FLUX, 64, 32),
    "wan": ("WAN21_T2V", WAN, 64, 0),
    "sd3": ("SD3", SD3, 64, 32),
    "unet": ("SD15", UNET, 64, 0),
}
# the lists of blocks in execution order, the streams that blocks take, and their places in what a block gives
CHAINS = {
    "flux": ("double_blocks", "single_blocks"),
    "wan": ("blocks",),
    "sd3": ("joint_blocks",),
}


def build(family: str, seed: int, **changes: Any) -> Any:
    """A patcher with a model of random weights."""
    name, config, _, _ = FAMILIES[family]
    config = {**config, **changes}
    if family == "flux":
        from comfy.ldm.flux.model import FluxParams

        if "txt_ids_dims" in FluxParams.__dataclass_fields__:
            config.setdefault("txt_ids_dims", [])
    described = getattr(comfy.supported_models, name)(config)
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "", device=comfy.model_management.unet_offload_device())
    fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


@torch.no_grad()
def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """ComfyUI's layers leave their memory as they find it."""
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim <= 1 or name.endswith("scale"):
            is_gain = "norm" in name and not name.endswith("bias")
            weight.copy_(float(is_gain) + 0.02 * noise)
        else:
            weight.copy_(noise * weight[0].numel() ** -0.5)
    for name, buffer in module.named_buffers():
        if "pos_embed" in name:
            buffer.copy_(0.02 * torch.randn(buffer.shape, generator=generator))


class TestNode:
    """What the nodes here have in common."""

    CATEGORY = "testing"
    FUNCTION = "go"
    INPUTS: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS}


class TestModel(TestNode):
    """A loader."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {  # noqa: RUF012
        "family": (list(FAMILIES),),
        "seed": ("INT", {"default": 0, "max": 2**31}),
        # nodes with equal inputs share what they made
        "copy": ("INT", {"default": 0, "max": 2**31}),
    }

    def go(self, family: str, seed: int, copy: int) -> tuple[Any]:
        return (build(family, seed),)


class TestFlux(TestNode):
    """A Flux of the depth and width given."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {  # noqa: RUF012
        "depth": ("INT", {"default": 2}),
        "depth_single": ("INT", {"default": 2}),
        "width": ("INT", {"default": 128}),
        "copy": ("INT", {"default": 0, "max": 2**31}),
    }

    def go(self, depth: int, depth_single: int, width: int, copy: int) -> tuple[Any]:
        changes = {"depth": depth, "depth_single_blocks": depth_single, "hidden_size": width, "num_heads": width // 64}
        return (build("flux", 1, **changes),)


class TestConditioning(TestNode):
    """A prompt."""

    RETURN_TYPES = ("CONDITIONING",)
    INPUTS = {  # noqa: RUF012
        "family": (list(FAMILIES),),
        "tokens": ("INT", {"default": 16, "min": 1, "max": 512}),
        "seed": ("INT", {"default": 0, "max": 2**31}),
    }

    def go(self, family: str, tokens: int, seed: int) -> tuple[Any]:
        _, _, width, pooled = FAMILIES[family]
        generator = torch.Generator().manual_seed(seed)
        more: dict[str, Any] = {"guidance": 3.5}
        if pooled:
            more["pooled_output"] = torch.randn(1, pooled, generator=generator)
        return ([[torch.randn(1, tokens, width, generator=generator), more]],)


class TestLora(TestNode):
    """A LoRA on the first block, which always computes, and on the last, which is cached."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {"model": ("MODEL",), "strength": ("FLOAT", {"default": 0.5, "min": -10.0, "max": 10.0})}  # noqa: RUF012

    def go(self, model: Any, strength: float) -> tuple[Any]:
        patched = model.clone()
        weights = dict(model.model.diffusion_model.named_parameters())
        names = [name for name in weights if name.endswith((".qkv.weight", "self_attn.q.weight"))]
        generator = torch.Generator().manual_seed(9)
        for name in (names[0], names[-1]):
            rows, columns = weights[name].shape
            lora = {
                "a.lora_up.weight": torch.randn(rows, 4, generator=generator),
                "a.lora_down.weight": torch.randn(4, columns, generator=generator) / columns,
            }
            patched.add_patches(comfy.lora.load_lora(lora, {"a": f"diffusion_model.{name}"}), strength)
        return (patched,)


class TestForeignWrapper(TestNode):
    """What another pack does: a wrapper at each point, and an entry of its own in the options."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {"model": ("MODEL",), "entry": ("STRING", {"default": "a"})}  # noqa: RUF012
    calls = 0

    def go(self, model: Any, entry: str) -> tuple[Any]:
        patched = model.clone()
        patched.model_options["transformer_options"][f"foreign_{entry}"] = {"of": entry}

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            TestForeignWrapper.calls += 1
            return executor(*args, **kwargs)

        for kind in ("outer_sample", "predict_noise", "apply_model", "diffusion_model"):
            patched.add_wrapper_with_key(kind, f"foreign_{entry}", wrapper)
        return (patched,)


class TestEagerCache(TestNode):
    """Caching written by hand: the blocks behind the first add what they added when they last computed.

    Knows nothing of the package. The blocks are taken over for the time of a sampling.
    """

    RETURN_TYPES = ("MODEL",)
    INPUTS = {"model": ("MODEL",), "family": (list(FAMILIES),), "schedule": ("STRING", {"default": ""})}  # noqa: RUF012

    def go(self, model: Any, family: str, schedule: str) -> tuple[Any]:
        patched = model.clone()
        reference = EagerCache(patched.model.diffusion_model, family, schedule)

        def outer(executor: Any, *args: Any, **kwargs: Any) -> Any:
            reference.evaluation = 0
            reference.stored.clear()
            reference.install()
            try:
                return executor(*args, **kwargs)
            finally:
                reference.remove()

        def predict(executor: Any, *args: Any, **kwargs: Any) -> Any:
            reference.evaluation += 1
            return executor(*args, **kwargs)

        def apply(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = next(each for each in (*args, *kwargs.values()) if isinstance(each, dict) and "uuids" in each)
            reference.key = tuple(options["uuids"])
            return executor(*args, **kwargs)

        patched.add_wrapper_with_key("outer_sample", "reference", outer)
        patched.add_wrapper_with_key("predict_noise", "reference", predict)
        patched.add_wrapper_with_key("apply_model", "reference", apply)
        return (patched,)


class EagerCache:
    """Takes over the forward functions of the blocks of one model."""

    def __init__(self, module: torch.nn.Module, family: str, schedule: str) -> None:
        self.schedule, self.family = schedule, family
        self.evaluation, self.key = 0, ()
        self.stored: dict[Any, Any] = {}
        self.entered: Any = None
        self.blocks = [block for name in CHAINS[family] for block in getattr(module, name)][1:]

    def install(self) -> None:
        for block in self.blocks:
            self._take(block, "first" if block is self.blocks[0] else "last" if block is self.blocks[-1] else "inner")

    def remove(self) -> None:
        for block in self.blocks:
            del block.forward

    def skips(self) -> bool:
        return self.schedule[self.evaluation - 1 : self.evaluation] == "0" and self.key in self.stored

    def _take(self, block: torch.nn.Module, place: str) -> None:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            streams = self._streams(args, kwargs)
            if place == "first":
                # blocks add to what they are given in place
                self.entered = tuple(stream.clone() for stream in streams)
            if not self.skips():
                made = forward(*args, **kwargs)
                if place == "last":
                    self.stored[self.key] = self._added(made)
                return made
            return self._predicted() if place == "last" else self._passed(streams)

        block.forward = run

    def _streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if self.family == "flux":
            # double blocks take img and txt by name, single blocks the joined stream
            return (kwargs["img"], kwargs["txt"]) if "img" in kwargs else (args[0],)
        return args[:2] if self.family == "sd3" else args[:1]

    def _passed(self, streams: tuple[Any, ...]) -> Any:
        return streams if self.family == "sd3" or len(streams) == 2 else streams[0]

    def _added(self, made: Any) -> Any:
        if self.family == "flux":
            img, txt = self.entered
            # what leaves the chain is the part of the joined stream that belongs to the image
            return made[:, txt.shape[1] :] - img
        if self.family == "sd3":
            return made[1] - self.entered[1]
        return made - self.entered[0]

    def _predicted(self) -> Any:
        added = self.stored[self.key]
        if self.family == "flux":
            img, txt = self.entered
            return torch.cat((txt, img + added), dim=1)
        if self.family == "sd3":
            return None, self.entered[1] + added
        return self.entered[0] + added


class TestDigest(TestNode):
    """Shows what a latent is."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"samples": ("LATENT",)}  # noqa: RUF012

    def go(self, samples: dict[str, Any]) -> dict[str, Any]:
        values = samples["samples"].float().contiguous()
        digest = {
            "shape": list(values.shape),
            "finite": bool(values.isfinite().all()),
            "sum": values.double().sum().item(),
            "square": values.double().square().sum().item(),
            "sha": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
        }
        shown = json.dumps(digest)
        return {"ui": {"text": [shown]}, "result": (shown,)}


class TestDifference(TestNode):
    """The largest difference of two latents, and the size of the first."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"a": ("LATENT",), "b": ("LATENT",)}  # noqa: RUF012

    def go(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        difference = (a["samples"].double() - b["samples"].double()).abs().max().item()
        shown = json.dumps({"difference": difference, "size": a["samples"].abs().max().item()})
        return {"ui": {"text": [shown]}, "result": (shown,)}


class TestPsnr(TestNode):
    """Mean over a batch of the peak signal-to-noise ratio, for values of that range."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"a": ("LATENT",), "b": ("LATENT",), "range": ("FLOAT", {"default": 2.0})}  # noqa: RUF012

    def go(self, a: dict[str, Any], b: dict[str, Any], range: float) -> dict[str, Any]:
        error = (a["samples"].double() - b["samples"].double()).square().flatten(1).mean(1)
        shown = json.dumps({"psnr": float((10 * torch.log10(range**2 / error)).mean())})
        return {"ui": {"text": [shown]}, "result": (shown,)}


class TestServer(TestNode):
    """What the tests ask a server behind a sampling: graphs traced so far, what was said, what is held."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"after": ("*",)}  # noqa: RUF012

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def go(self, after: Any) -> dict[str, Any]:
        counters = torch._dynamo.utils.counters
        import cache_dit
        from cache_dit.integrations.comfyui import last_sampled
        from cache_dit.runtime.registry import all_sessions

        clock = last_sampled().clock if last_sampled() is not None else None

        facts = {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "said": list(SAID),
            "foreign": TestForeignWrapper.calls,
            "held": sum(session.cache_bytes for session in all_sessions()),
            "sessions": len(all_sessions()),
            "stats": {key: value for key, value in cache_dit.get_global_stats().items() if key != "model_details"},
            "resident": resident(),
            "num_steps": clock and clock.num_steps,
            "sigmas": clock and clock.sigmas,
        }
        SAID.clear()
        shown = json.dumps(facts)
        return {"ui": {"text": [shown]}, "result": (shown,)}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True


class TestImport(TestNode):
    """What the public names of a module are."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"after": ("*",), "module": ("STRING", {})}  # noqa: RUF012

    def go(self, after: Any, module: str) -> dict[str, Any]:
        names = vars(importlib.import_module(module))
        shown = json.dumps({key: value for key, value in names.items() if not key.startswith("_") and isinstance(value, str)})
        return {"ui": {"text": [shown]}, "result": (shown,)}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True


class TestUnet(TestNode):
    """Stands where an example workflow loads a model."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {"unet_name": ("STRING", {}), "weight_dtype": ("STRING", {})}  # noqa: RUF012

    def go(self, unet_name: str, weight_dtype: str) -> tuple[Any]:
        return (build("flux", 1),)


class TestClip(TestNode):
    """Stands where an example workflow loads text encoders: a text is noise with a seed of its own."""

    RETURN_TYPES = ("CLIP",)
    INPUTS = {name: ("STRING", {}) for name in ("clip_name1", "clip_name2", "type", "device")}  # noqa: RUF012

    def go(self, **inputs: str) -> tuple[Any]:
        return (self,)

    def tokenize(self, text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)

    def encode_from_tokens_scheduled(self, tokens: int) -> list[Any]:
        conditioning: list[Any] = TestConditioning().go("flux", 16, tokens)[0]
        return conditioning


class TestVae(TestNode):
    """Stands where an example workflow loads a VAE: three channels of the latent are the colours."""

    RETURN_TYPES = ("VAE",)
    INPUTS = {"vae_name": ("STRING", {})}  # noqa: RUF012

    def go(self, vae_name: str) -> tuple[Any]:
        return (self,)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        colours = samples[:, :3].sigmoid()
        return torch.nn.functional.interpolate(colours, scale_factor=8).movedim(1, -1).contiguous()


def resident() -> int:
    """Bytes of memory that the process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _hear(message: Any, category: Any, filename: str, line: int, file: Any = None, text: str | None = None) -> None:
    SAID.append(str(message))
    logging.getLogger().warning("%s", message)


warnings.showwarning = _hear
NODE_CLASS_MAPPINGS = DIGITS | {
    kind.__name__: kind
    for kind in (
        TestModel,
        TestFlux,
        TestConditioning,
        TestLora,
        TestForeignWrapper,
        TestEagerCache,
        TestDigest,
        TestDifference,
        TestPsnr,
        TestServer,
        TestImport,
        TestUnet,
        TestClip,
        TestVae,
    )
}
