"""Nodes for the tests: tiny models with random weights, and what looks into a server. Never shipped."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import statistics
import time
import types
import warnings
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
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
# video and audio in one latent, a list of two; not in early servers
LTXAV = {
    "image_model": "ltxav", "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 128,
    "audio_cross_attention_dim": 64, "attention_head_dim": 64, "audio_attention_head_dim": 32, "num_attention_heads": 2,
    "audio_num_attention_heads": 2, "caption_channels": 64, "num_layers": 3, "connector_attention_head_dim": 32,
    "connector_num_attention_heads": 2, "connector_num_layers": 1,
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
    "ltxav": ("LTXAV", LTXAV, 128, 0),
    "unet": ("SD15", UNET, 64, 0),
}
FAMILIES = {name: family for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family[0])}
# the lists of blocks in execution order, the streams that blocks take, and their places in what a block gives
CHAINS = {
    "flux": ("double_blocks", "single_blocks"),
    "wan": ("blocks",),
    "sd3": ("joint_blocks",),
    "ltxav": ("transformer_blocks",),
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a family as this server's version takes it."""
    config = {**FAMILIES[family][1], **changes}
    if family == "flux":
        from comfy.ldm.flux.model import FluxParams

        if "txt_ids_dims" in FluxParams.__dataclass_fields__:
            config.setdefault("txt_ids_dims", [])
    return config


def build(family: str, seed: int, weights: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A patcher with a model of random weights, which are cast to float32 where they are used."""
    described = getattr(comfy.supported_models, FAMILIES[family][0])(config_of(family, **changes))
    described.set_inference_dtype(weights, None if weights is torch.float32 else torch.float32)
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
        "weights": (["float32", "float8_e4m3fn", "float8_e5m2"], {"default": "float32"}),
    }

    def go(self, family: str, seed: int, copy: int, weights: str) -> tuple[Any]:
        return (build(family, seed, getattr(torch, weights)),)


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


class PartlyLoaded(getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)):  # type: ignore[misc]
    """A patcher that finds next to no room on its device: weights stay behind and are cast, and patched, at each use."""

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, **options: Any) -> Any:
        return super().load(device_to, lowvram_model_memory=1, **{**options, "full_load": False})


class TestPartlyLoaded(TestNode):
    """What --lowvram does to a model on a card that it does not fit on."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {"model": ("MODEL",)}  # noqa: RUF012

    def go(self, model: Any) -> tuple[Any]:
        return (PartlyLoaded(model.model, model.load_device, model.offload_device),)


class TestControlNet(TestNode):
    """A control network for the tests' Flux, of random weights."""

    RETURN_TYPES = ("CONTROL_NET",)

    def go(self) -> tuple[Any]:
        import comfy.controlnet
        import comfy.ldm.flux.controlnet
        import comfy.ops

        network = comfy.ldm.flux.controlnet.ControlNetFlux(
            operations=comfy.ops.disable_weight_init, device=torch.device("cpu"), dtype=torch.float32,
            **config_of("flux", depth_single_blocks=0),
        )
        fill(network, torch.Generator().manual_seed(21))
        device = comfy.model_management.get_torch_device()
        return (comfy.controlnet.ControlNet(network, load_device=device, extra_conds=["y", "guidance"]),)


class TestOutOfMemory(TestNode):
    """Memory runs out at one evaluation of a sampling, before or after the model has been called."""

    RETURN_TYPES = ("MODEL",)
    INPUTS = {  # noqa: RUF012
        "model": ("MODEL",),
        "evaluation": ("INT", {"default": 5}),
        "place": (["before", "after"],),
    }

    def go(self, model: Any, evaluation: int, place: str) -> tuple[Any]:
        patched, calls = model.clone(), []

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == evaluation and place == "before":
                raise torch.OutOfMemoryError("a test has run out of memory")
            made = executor(*args, **kwargs)
            if len(calls) == evaluation:
                raise torch.OutOfMemoryError("a test has run out of memory")
            return made

        patched.add_wrapper_with_key("diffusion_model", "out of memory", wrapper)
        return (patched,)


class TestAudioLatent(TestNode):
    """Room for sound."""

    RETURN_TYPES = ("LATENT",)

    def go(self) -> tuple[Any]:
        return ({"samples": torch.zeros(1, 8, 10, 16)},)


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
        if self.family == "ltxav":
            # video and sound in one argument
            return tuple(args[0])
        return args[:2] if self.family == "sd3" else args[:1]

    def _passed(self, streams: tuple[Any, ...]) -> Any:
        return streams if len(streams) == 2 else streams[0]

    def _added(self, made: Any) -> Any:
        if self.family == "flux":
            img, txt = self.entered
            # what leaves the chain is the part of the joined stream that belongs to the image
            return made[:, txt.shape[1] :] - img
        if self.family == "sd3":
            return made[1] - self.entered[1]
        if self.family == "ltxav":
            return made[0] - self.entered[0], made[1] - self.entered[1]
        return made - self.entered[0]

    def _predicted(self) -> Any:
        added = self.stored[self.key]
        if self.family == "flux":
            img, txt = self.entered
            return torch.cat((txt, img + added), dim=1)
        if self.family == "sd3":
            return None, self.entered[1] + added
        if self.family == "ltxav":
            return self.entered[0] + added[0], self.entered[1] + added[1]
        return self.entered[0] + added


def values_of(latent: dict[str, Any]) -> torch.Tensor:
    """The numbers of a latent; of one that is a list, those of its parts in a row."""
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False):
        return samples.float().contiguous()
    return torch.cat([part.float().flatten() for part in samples.unbind()])


class TestDigest(TestNode):
    """Shows what a latent is."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"samples": ("LATENT",)}  # noqa: RUF012

    def go(self, samples: dict[str, Any]) -> dict[str, Any]:
        values = values_of(samples)
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
        first, second = values_of(a).double(), values_of(b).double()
        shown = json.dumps({"difference": (first - second).abs().max().item(), "size": first.abs().max().item()})
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
            "partly_loaded": any(
                loaded.model is not None and loaded.model.model.model_lowvram
                for loaded in comfy.model_management.current_loaded_models
            ),
            "num_steps": clock and clock.num_steps,
            "sigmas": clock and clock.sigmas,
            "solver": clock and clock.solver,
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


class TestOverhead(TestNode):
    """Microseconds that an evaluation takes through ComfyUI's wrapper points, around a model that does nothing."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    INPUTS = {"plain": ("MODEL",), "idle": ("MODEL",), "evaluations": ("INT", {"default": 50})}  # noqa: RUF012

    def go(self, plain: Any, idle: Any, evaluations: int) -> dict[str, Any]:
        rounds = [[median_evaluation(model, evaluations) for model in (plain, idle)] for _ in range(100)]
        plain_us, idle_us = (statistics.median(times) for times in zip(*rounds, strict=True))
        shown = json.dumps({"plain_us": plain_us, "idle_us": idle_us})
        return {"ui": {"text": [shown]}, "result": (shown,)}


def median_evaluation(model: Any, evaluations: int) -> float:
    """Of one sampling with so many evaluations, as ComfyUI makes them."""
    executor_of = comfy.patcher_extension.WrapperExecutor.new_class_executor
    sigma, sigmas = torch.ones(1), torch.linspace(1, 0, evaluations + 1)
    latent = torch.zeros(1)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "sigmas": sigma}
    options.update({"cond_or_uncond": [1, 0], "uuids": [1, 2], "sample_sigmas": sigmas})
    times = []

    def around(kind: str, class_obj: Any, inner: Any) -> Any:
        return executor_of(inner, class_obj, comfy.patcher_extension.get_all_wrappers(kind, options))

    def nothing(*args: Any, **kwargs: Any) -> torch.Tensor:
        return latent

    def apply(*args: Any, **kwargs: Any) -> Any:
        return around("diffusion_model", model.model.diffusion_model, nothing).execute(latent, sigma, None, options)

    def predict(*args: Any, **kwargs: Any) -> Any:
        return around("apply_model", model.model, apply).execute(latent, sigma, None, None, None, options)

    def sample(*args: Any, **kwargs: Any) -> None:
        for _ in range(evaluations):
            begin = time.perf_counter()
            around("predict_noise", None, predict).execute(latent, sigma, {}, 1)
            times.append(time.perf_counter() - begin)

    guider = types.SimpleNamespace(model_options={"transformer_options": options})
    around("outer_sample", guider, sample).execute(latent, latent, None, sigmas, None, None, True, 1)
    return 1e6 * statistics.median(times)


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
_free_memory = comfy.model_management.get_free_memory


def _enough_memory(*args: Any, **kwargs: Any) -> Any:
    """Free memory, at least 8 GiB of it: with less ComfyUI calls a model once for each condition, and tests count calls."""
    found = _free_memory(*args, **kwargs)
    return tuple(max(each, 2**33) for each in found) if isinstance(found, tuple) else max(found, 2**33)


comfy.model_management.get_free_memory = _enough_memory
NODE_CLASS_MAPPINGS = DIGITS | {
    kind.__name__: kind
    for kind in (
        TestModel,
        TestFlux,
        TestConditioning,
        TestLora,
        TestPartlyLoaded,
        TestControlNet,
        TestOutOfMemory,
        TestAudioLatent,
        TestForeignWrapper,
        TestEagerCache,
        TestDigest,
        TestDifference,
        TestPsnr,
        TestServer,
        TestImport,
        TestOverhead,
        TestUnet,
        TestClip,
        TestVae,
    )
}
