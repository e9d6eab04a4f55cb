"""U-shaped models: is it better to reuse what the cached part adds, or its stream as it is?

Trains a small U-ViT and a small U-Net on the digits, takes the cached part that the finder chooses, and reuses both ways at
fixed steps. Prints PSNR to the pictures without reuse, and how much either changes from one step to the next.

    python benchmarks/long_skips.py --seconds 340
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# the script's own folder would hide the package named `coverage`
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "examples"))

import diffusers  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cache_dit.passes import Refusal, outline_region  # noqa: E402
from cache_dit.passes.outline_region import REGION_NAME  # noqa: E402
from demo_model import NUM_CLASSES, shifted_sigmas  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402
from train_demo_model import EMA_DECAY, LABEL_DROPOUT, WARMUP_STEPS, load_data  # noqa: E402

from cache_dit.backend import find_region  # noqa: E402
from cache_dit.torch_internals import copy_dynamo_graph  # noqa: E402

WIDTH, STEPS, SAMPLES, GUIDANCE = 64, 28, 16, 2.0
# Steps that compute at the start, and of how many steps one computes behind them.
FIRST, EVERY = 3, (2, 3, 4)


class Block(nn.Module):
    """A transformer block; ``skips``: joins a long skip to the stream and multiplies both."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if skips else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, tokens, WIDTH] to the same."""
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        update: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + update


class UViT(nn.Module):
    """U-ViT (Bao and others, 2022) in small: 4 blocks in, one in the middle, 4 out; time and label are tokens."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.patch, self.head, self.norm = nn.Conv2d(1, WIDTH, 3, 3), nn.Linear(WIDTH, 9), nn.LayerNorm(WIDTH)
        self.place, self.label = nn.Parameter(0.02 * torch.randn(1, 66, WIDTH)), nn.Embedding(NUM_CLASSES + 1, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.in_blocks = nn.ModuleList(Block(False) for _ in range(depth))
        self.middle = Block(False)
        self.out_blocks = nn.ModuleList(Block(True) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Images [B, 1, 24, 24] to velocities."""
        angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        h = torch.cat([time[:, None], self.label(label)[:, None], self.patch(x).flatten(2).mT], dim=1) + self.place
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.middle(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        pixels = self.head(self.norm(h))[:, 2:].reshape(-1, 8, 8, 3, 3)
        image: Tensor = pixels.permute(0, 1, 3, 2, 4).reshape(-1, 1, 24, 24)
        return image


class UNet(nn.Module):
    """A U-Net of three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = diffusers.UNet2DModel(
            sample_size=24,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 48, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            num_class_embeds=NUM_CLASSES + 1,
            attention_head_dim=16,
        )

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Images [B, 1, 24, 24] to velocities."""
        image: Tensor = self.net(x, timestep, label).sample
        return image


def train(model: nn.Module, seconds: float) -> nn.Module:
    """Flow matching on the digits for some time; the running average of the weights."""
    images, labels, _, _ = load_data()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    average = copy.deepcopy(model).requires_grad_(False)
    start, step, smooth = perf_counter(), 0, 0.0
    while (elapsed := perf_counter() - start) < seconds:
        decay = 0.51 + 0.49 * math.cos(math.pi * elapsed / seconds)
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        index = torch.randint(0, len(images), (32,), generator=generator)
        x, label = images[index], labels[index]
        label = torch.where(torch.rand(32, generator=generator) < LABEL_DROPOUT, NUM_CLASSES, label)
        sigma = torch.sigmoid(0.2 + 1.2 * torch.randn(32, generator=generator))
        noise, level = torch.randn(x.shape, generator=generator), sigma.view(-1, 1, 1, 1)
        loss = F.mse_loss(model((1 - level) * x + level * noise, sigma * 1000.0, label), noise - x)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth += max(0.01, 1 / step) * (loss.item() - smooth)
    print(f"{type(model).__name__}: {step} steps, loss {smooth:.4f}", flush=True)
    return average.eval()


class Reuse(nn.Module):
    """Stands for the cached part: computes it, or gives what it gave or added when it last computed."""

    def __init__(self, body: nn.Module, streams: Sequence[int], whole: bool) -> None:
        super().__init__()
        self.body, self.streams, self.whole, self.skip = body, streams, whole, False
        self.stored: list[Tensor] = []
        # relative changes from one computed step to the next: of what is added, of the stream
        self.changes: list[tuple[float, float]] = []
        self._before: tuple[Tensor, Tensor] | None = None

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """The region's outputs."""
        entered = [args[place].clone() for place in self.streams]
        if self.skip:
            return tuple(kept if self.whole else base + kept for base, kept in zip(entered, self.stored, strict=True))
        made = self.body(*args)
        self.stored = [out.clone() if self.whole else out - base for out, base in zip(made, entered, strict=True)]
        now = (made[0] - entered[0], made[0].clone())
        if self._before is not None:
            added, stream = (float((a - b).norm() / made[0].norm()) for a, b in zip(now, self._before, strict=True))
            self.changes.append((added, stream))
        self._before = now
        return tuple(made)


def with_reuse(model: nn.Module, whole: bool) -> tuple[Any, list[Reuse]]:
    """The model with the part that the finder chooses replaced, and what stands there, once it is called."""
    torch._dynamo.reset()
    parts: list[Reuse] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graph = copy_dynamo_graph(gm)
        region = find_region(graph)
        if isinstance(region, Refusal):
            raise AssertionError(f"nothing to cache: {region}")
        outline_region(graph, region)
        call = next(node for node in graph.graph.nodes if node.target == REGION_NAME)
        names = [getattr(argument, "name", None) for argument in call.args]
        streams = [names.index(out.stream.name) for out in region.live_outs if out.stream is not None]
        parts.append(Reuse(getattr(graph, REGION_NAME), streams, whole))
        setattr(graph, REGION_NAME, parts[-1])
        graph.recompile()
        return graph.forward

    return torch.compile(model, backend=backend), parts


@torch.no_grad()
def sample(model: Any, parts: Sequence[Reuse], every: int) -> Tensor:
    """Pictures [SAMPLES, 1, 24, 24]; behind the first steps one of ``every`` computes."""
    label = torch.arange(SAMPLES) % NUM_CLASSES
    both = torch.cat([label, torch.full_like(label, NUM_CLASSES)])
    x = torch.randn(SAMPLES, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    sigmas = shifted_sigmas(STEPS).tolist()
    for i in range(STEPS):
        for part in parts:
            part.skip = i >= FIRST and i % every != 0
        given = torch.full((2 * SAMPLES,), sigmas[i] * 1000.0)
        cond, uncond = model(torch.cat([x, x]), given, both).chunk(2)
        x = x + (sigmas[i + 1] - sigmas[i]) * (uncond + GUIDANCE * (cond - uncond))
    return x


def measure(model: nn.Module) -> None:
    """Print PSNR (range 2) of both ways at each rate, and the changes from step to step."""
    plain = sample(model, (), 1)
    for whole in (False, True):
        compiled, parts = with_reuse(model, whole)
        found = []
        for every in EVERY:
            errors = (sample(compiled, parts, every) - plain).square().flatten(1).mean(1)
            found.append(f"{float((-10 * torch.log10(errors / 4.0)).mean()):.1f}")
        print(f"  {'value' if whole else 'difference':10} PSNR at 1/{' 1/'.join(map(str, EVERY))}: {' '.join(found)} dB")
    compiled, parts = with_reuse(model, True)
    sample(compiled, parts, 1)
    ratios = sorted(stream / added for added, stream in parts[0].changes)
    print(f"  change of the value / of the difference: {ratios[0]:.2f} to {ratios[-1]:.2f}", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=340.0, help="training of each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for build in (UViT, UNet):
        torch.manual_seed(0)
        model = train(build(), options.seconds)
        measure(model)


if __name__ == "__main__":
    main()
