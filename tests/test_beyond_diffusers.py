"""Models that are no diffusion transformers of diffusers: U-Nets, other packages' transformers, unusual ways to run blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cache_dit

from . import models

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
# The first steps of a first run may go to finding a way to trace the model.
SCHEDULE = "1111010"
Inputs = Callable[[int], tuple[Any, ...]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def at(step: int) -> Tensor:
    return torch.tensor([0.9 - 0.1 * step])


def tensor_of(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.sample
    return found


def assert_cached(build: Callable[[], nn.Module], inputs: Inputs, **options: Any) -> cache_dit.explanation.Explanation:
    """Two runs: computed steps are the plain model's, skipped ones are not and repeat themselves."""
    model = models.seeded(build)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            # many begin with blocks that add nothing
            if float(weight.abs().mean()) < 1e-4:
                weight.copy_(0.1 * random(*weight.shape, seed=i))
        plain = [tensor_of(model(*inputs(step))) for step in range(len(SCHEDULE))]
        cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT, **options)
        runs = []
        for _ in range(2):
            cache_dit.new_run(model)
            runs.append([tensor_of(model(*inputs(step))) for step in range(len(SCHEDULE))])
    for mark, first, second, wanted in zip(SCHEDULE, *runs, plain, strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, wanted, rtol=1e-5, atol=1e-6) == (mark == "1")
    stats = cache_dit.get_stats(model)
    assert (stats.hits, stats.calls) == (2 * SCHEDULE.count("0"), 2 * len(SCHEDULE))
    return cache_dit.explain(model)


# U-Nets.


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def unet_inputs(step: int) -> tuple[Any, ...]:
    return random(1, 4, 16, 16), torch.tensor(900 - 50 * step), random(1, 5, 16)


def test_a_unet_is_cached_behind_its_first_down_block() -> None:
    """As DeepCache does (Ma, Fang and Wang, 2023)."""
    found = assert_cached(unet, unet_inputs)
    assert found.region is not None
    assert (found.region.front, found.region.cached[0], found.region.cached[-1]) == (
        ("down_blocks.0",),
        "down_blocks.1",
        "up_blocks.2",
    )


@pytest.mark.parametrize("region", ["mid_block", ("down_blocks.2", "up_blocks.0")])
def test_a_part_of_a_unet_is_cached_by_name(region: Any) -> None:
    found = assert_cached(unet, unet_inputs, region=region)
    assert found.region is not None
    assert found.region.cached == ((region,) if isinstance(region, str) else region)


# Other packages.


def test_x_transformers() -> None:
    package = pytest.importorskip("x_transformers")

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.time, self.head = nn.Linear(4, 16), nn.Linear(1, 16), nn.Linear(16, 4)
            self.body = package.Encoder(
                dim=16,
                depth=4,
                heads=2,
                attn_dim_head=8,
                dim_condition=16,
                use_adaptive_layernorm=True,
                use_adaptive_layerscale=True,
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.head(self.body(self.embed(x), condition=self.time(t[:, None])))
            return output

    found = assert_cached(Denoiser, lambda step: (random(1, 8, 4), at(step)))
    # attention and feed-forward layers take turns in one list
    assert found.region is not None and len(found.region.cached) == 7


def test_a_diffusion_head_of_transformers() -> None:
    package = pytest.importorskip("transformers.models.qwen2_5_omni")
    config = package.configuration_qwen2_5_omni.Qwen2_5OmniDiTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        ff_mult=2,
        emb_dim=16,
        head_dim=16,
        mel_dim=8,
        enc_dim=8,
        enc_emb_dim=8,
        enc_channels=[8, 8, 8, 8, 24],
        enc_attention_channels=8,
        enc_se_channels=8,
        num_embeds=20,
        look_ahead_layers=[1],
        look_backward_layers=[0],
    )
    config._attn_implementation = "sdpa"

    def inputs(step: int) -> tuple[Any, ...]:
        return random(1, 12, 8), random(1, 12, 8), random(1, 12, 8), torch.zeros(1, 6, dtype=torch.int64), at(step)

    model = package.modeling_qwen2_5_omni.Qwen2_5OmniToken2WavDiTModel
    found = assert_cached(lambda: model(config), inputs)
    assert found.region is not None and len(found.region.cached) == 3


# Ways to run blocks.


class Checkpointed(models.TinyDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = checkpoint(block, h, temb, use_reentrant=False)
        return self.head(h)


class CalledByForward(models.TinyDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = block.forward(h, temb)
        return self.head(h)


class Wrapped(nn.Module):
    """The transformer lies deep in another module, with keyword arguments only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"denoiser": nn.Sequential(models.TinyDiT())})

    def forward(self, x: Tensor, noise_time: Tensor) -> dict[str, Tensor]:
        return {"sample": self.inner["denoiser"][0](x=x, t=noise_time)}


@pytest.mark.parametrize("build", [Checkpointed, CalledByForward])
def test_blocks_run_in_unusual_ways(build: Callable[[], nn.Module]) -> None:
    found = assert_cached(build, lambda step: (models.example()[0], models.example()[1] - 0.05 * step))
    assert found.region is not None and found.region.cached == ("blocks.1", "blocks.2", "blocks.3")


def test_a_wrapped_transformer_is_found_and_its_time_too() -> None:
    model = models.seeded(Wrapped)
    plain = copy.deepcopy(model)
    cache_dit.enable_cache(model, schedule=SCHEDULE, **EXACT)
    x, t = models.example()
    with torch.no_grad():
        for _ in range(2):
            for step, mark in enumerate(SCHEDULE):
                made = model(x, noise_time=t - 0.05 * step)["sample"]
                assert torch.equal(made, plain(x, t - 0.05 * step)["sample"]) == (mark == "1")
    assert cache_dit.get_stats(model).refused == {}
    assert cache_dit.get_stats(model).runs == 2


class Published(nn.Module):
    """A block as it is published: modulation, attention, feed-forward, each a module of parts."""

    def __init__(self) -> None:
        super().__init__()
        width = models.WIDTH
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(temb)[:, None].chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class InFloat32(Published):
    """Modulates in float32 by contexts that begin and end with the block."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            shift, scale, gate = (self.modulation(temb.float())[:, None]).chunk(3, dim=-1)
        update = self.mlp(self.norm(x.float()) * (1 + scale) + shift)
        with torch.autocast("cpu", enabled=False):
            return x + gate * update


class Looped(models.TinyDiT):
    """One block that the model goes through again and again."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.block = Published()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for _ in range(5):
            h = self.block(h, temb)
        return self.head(h)


def skipped_by_hand(model: Any, blocks: list[nn.Module], t: Tensor, before: Tensor) -> Tensor:
    """What a model gives at time ``t`` if all blocks but the first add what they added at time ``before``."""

    def behind_first(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        temb = model.time(time)
        h = model.embed(models.example()[0])
        return blocks[0](h, temb), temb, h

    with torch.no_grad():
        start, temb, _ = behind_first(before)
        h = start
        for block in blocks[1:]:
            h = block(h, temb)
        now, _, _ = behind_first(t)
        skipped: Tensor = model.head(now + (h - start))
    return skipped


@pytest.mark.parametrize(
    ("build", "blocks", "cached"),
    [
        (lambda: models.TinyDiT(block=InFloat32), lambda m: list(m.blocks), ("blocks.1", "blocks.2", "blocks.3")),
        (Looped, lambda m: [m.block] * 5, ("block@1", "block@2", "block@3", "block@4")),
    ],
    ids=["contexts", "looped"],
)
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_blocks_that_are_hard_to_tell_apart(build: Any, blocks: Any, cached: tuple[str, ...], lowering: str) -> None:
    model = models.seeded(build)
    plain = copy.deepcopy(model)
    x, t = models.example()
    times = [t - 0.1 * step for step in range(3)]
    cache_dit.enable_cache(model, schedule="110", lowering=lowering, **EXACT)
    with torch.no_grad():
        made = [model(x, time) for time in times]
        wanted = [plain(x, time) for time in times]
    torch.testing.assert_close(made[:2], wanted[:2])
    torch.testing.assert_close(made[2], skipped_by_hand(plain, blocks(plain), times[2], times[1]))
    assert not torch.allclose(made[2], wanted[2])
    region = cache_dit.explain(model).region
    assert region is not None and region.cached == cached


def test_a_model_of_no_blocks_is_cached_where_a_part_is_named() -> None:
    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + self.second(self.first(x) * t)

    with pytest.raises(cache_dit.CacheDitError):
        cache_dit.enable_cache(TwoParts(), **EXACT)
    model = cache_dit.enable_cache(models.seeded(TwoParts), schedule="110", region="second", **EXACT)
    with torch.no_grad():
        for step in range(3):
            model(torch.ones(2, 4), torch.tensor(0.9 - 0.1 * step))
    assert cache_dit.get_stats(model).hits == 1
