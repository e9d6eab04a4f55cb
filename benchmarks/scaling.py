"""What caching does to time, communication and memory where a model runs on several devices: a model of costs, and runs.

    python benchmarks/scaling.py              tables for 8, 64 and 512 GPUs, from the shapes of two published models
    python benchmarks/scaling.py --measure    runs with 1, 2 and 4 processes here, and what the model says of them

The model of costs: a step of a rank takes the work of the blocks that run, over its rate, plus what it sends, over the
bandwidth, plus a latency for each collective. A skipped step runs the front alone. What is said of GPUs rests on the rates
named in `H100`, which are assumptions; what is said of the runs here, on rates measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model: blocks, width, tokens of the stream, parameters of a block, bytes of a value, forwards a step."""

    name: str
    blocks: int
    width: int
    tokens: int
    block_parameters: float
    bytes: int = 2
    forwards: int = 1

    def block_flops(self) -> float:
        """Two for each weight and token, four for each pair of tokens and channel of the attention."""
        return 2.0 * self.block_parameters * self.tokens + 4.0 * self.tokens**2 * self.width

    def residual_bytes(self, history: int) -> float:
        """Of one context, over all ranks of a sequence."""
        return float(history * self.tokens * self.width * self.bytes)


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a device; bytes/s that a device sends within a node and between nodes; seconds a collective takes at least."""

    flops: float
    near: float
    far: float
    latency: float


@dataclass(frozen=True)
class Layout:
    """Devices: `sequence` of them share a sequence by Ulysses in one node; weights are sharded over `shards` in nodes of 8."""

    devices: int
    sequence: int
    shards: int


# A 5 s video of 720p in latents of 21 x 45 x 80 tokens, guidance in two forwards; a picture of 1024 x 1024 with 512 of text.
WAN = Shape("Wan 14B", 40, 5120, 75_600, 14.0e9 / 40, forwards=2)
FLUX = Shape("Flux 12B", 57, 3072, 4096 + 512, 11.9e9 / 57)
H100 = Rates(flops=4.0e14, near=3.5e11, far=4.0e10, latency=2.0e-5)
LAYOUTS = (Layout(8, 8, 1), Layout(64, 8, 64), Layout(512, 8, 64))


@dataclass(frozen=True)
class Step:
    """Of one rank: seconds, collectives, and bytes that it sends."""

    seconds: float
    collectives: int
    bytes: float


def step(shape: Shape, layout: Layout, rates: Rates, blocks: int) -> Step:
    """A step that runs this many blocks."""
    runs = blocks * shape.forwards
    work = runs * shape.block_flops() / layout.sequence / rates.flops
    sent = seconds = 0.0
    collectives = 0
    if layout.sequence > 1:
        # queries, keys and values go out and the result comes back, each but for the rank's own part
        part = shape.tokens / layout.sequence * shape.width * shape.bytes * (layout.sequence - 1) / layout.sequence
        sent += 4 * runs * part
        seconds += 4 * runs * (part / rates.near + rates.latency)
        collectives += 4 * runs
    if layout.shards > 1:
        # each block's weights are gathered; between nodes each device receives what the other nodes hold, over 8 links
        gathered = shape.block_parameters * shape.bytes * (layout.shards - 1) / layout.shards
        sent += runs * gathered
        seconds += runs * (gathered / 8 / rates.far + gathered / rates.near + rates.latency)
        collectives += runs
    return Step(work + seconds, collectives, sent)


def speedup(computed: float, skipped: float, share: float) -> float:
    """Of a run in which this share of the steps is skipped."""
    return computed / ((1.0 - share) * computed + share * skipped)


def tables(share: float, front: int, history: int) -> str:
    """Markdown: a row for each model and layout."""
    lines = [
        "| model | GPUs (sequence x shards) | computed step | skipped step | collectives of a step, computed / skipped "
        "| sent by a rank, computed / skipped | residuals of a rank | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in (WAN, FLUX):
        for layout in LAYOUTS:
            whole, part = (step(shape, layout, H100, blocks) for blocks in (shape.blocks, front))
            held = shape.residual_bytes(history) * shape.forwards / layout.sequence
            lines.append(
                f"| {shape.name} | {layout.devices} ({layout.sequence} x {layout.shards}) "
                f"| {whole.seconds * 1e3:.1f} ms | {part.seconds * 1e3:.1f} ms | {whole.collectives} / {part.collectives} "
                f"| {whole.bytes / 2**30:.2f} / {part.bytes / 2**30:.3f} GiB | {held / 2**20:.0f} MiB "
                f"| {speedup(whole.seconds, part.seconds, share):.2f}x |"
            )
    return "\n".join(lines)


# ---- runs with several processes here ------------------------------------------------------------------------------

TOKENS, WIDTH, HEADS, BLOCKS, STEPS, CALLS = 512, 256, 8, 8, 40, 12


def build(group: Any) -> Any:
    """Blocks of attention and feed-forward; with a group the tokens are split over it, and keys and values gathered."""
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, h: Tensor, t: Tensor) -> Tensor:
            q, k, v = (e.unflatten(-1, (HEADS, -1)).transpose(1, 2) for e in self.qkv(self.norm(h)).chunk(3, -1))
            if group is not None:
                from torch.distributed._functional_collectives import all_gather_tensor

                k, v = (all_gather_tensor(each.contiguous(), 2, group) for each in (k, v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + self.out(mixed) * t
            return h + self.down(nn.functional.gelu(self.up(h))) * t

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h, t[:, None, None])
            return self.head(h)

    torch.manual_seed(0)
    return Model().eval()


def timed(call: Any, count: int) -> float:
    """Median seconds."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def run_rank(folder: Path) -> None:
    """One of the processes: its rates, and its steps."""
    import torch
    import torch.distributed as dist

    import cache_dit
    from cache_dit.runtime.registry import session_of_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world > 1 else None
    options: dict[str, Any] = {"inner": "eager", "noise_scale": 0.0, "forecast": "reuse", "language": "en"}
    with torch.no_grad():
        # rates of this rank while the others are at work too: of one block without what it sends, and of one message
        block, h = build(None).blocks[0], torch.randn(1, TOKENS // world, WIDTH)
        alone = timed(lambda: block(h, torch.ones(1)), CALLS)
        part = torch.randn(1, HEADS, TOKENS // world, WIDTH // HEADS)
        gathered = [torch.empty_like(part) for _ in range(world)]
        message = timed(lambda: dist.all_gather(gathered, part), CALLS) if world > 1 else 0.0
        model = cache_dit.enable_cache(build(group), schedule="10" * (STEPS // 2), **options)
        x = torch.randn(1, TOKENS // world, 16)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for i in range(STEPS):
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            model(x, torch.full((1,), 1.0 - i / STEPS))
            seconds[i % 2 == 1].append(time.perf_counter() - start)
        rest = timed(lambda: model.head(model.embed(x)), CALLS)
    session = session_of_module(model)
    assert session is not None
    found = {
        "block": alone,
        "message": message,
        "rest": rest,
        "computed": median(seconds[False][2:]),
        "skipped": median(seconds[True][2:]),
        "bytes": session.cache_bytes,
        "sequence_of_block": TOKENS // world,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
    os._exit(0)


def predicted(found: dict[str, Any], world: int) -> tuple[float, float]:
    """Seconds of a computed and of a skipped step by the model of costs, from the rates measured beside them."""
    # a block alone attends to its own tokens only; in the model it attends to those of all ranks
    own = found["sequence_of_block"]
    dense, pairs = 2.0 * 12 * WIDTH**2 * own, 4.0 * own * own * WIDTH
    work = found["block"] * (dense + pairs * world) / (dense + pairs)
    each = work + (2 * found["message"] if world > 1 else 0.0)
    return found["rest"] + BLOCKS * each, found["rest"] + each


def measure(world: int) -> dict[str, Any]:
    """Start `world` processes; the medians over ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        command = [sys.executable, __file__, "--rank-of", folder]
        processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(world)]
        codes = [process.wait(timeout=500) for process in processes]
        if any(codes):
            raise SystemExit(f"exit codes {codes}")
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return {name: median(rank[name] for rank in ranks) for name in ranks[0]}


def measured_table(worlds: tuple[int, ...]) -> str:
    """Markdown: measured beside predicted."""
    lines = [
        "| processes | computed step, measured / predicted | skipped step, measured / predicted "
        "| speed-up at half the steps, measured / predicted | residuals of a rank, measured / predicted |",
        "|---|---|---|---|---|",
    ]
    shape = Shape("here", BLOCKS, WIDTH, TOKENS, 12.0 * WIDTH**2, bytes=4)
    for world in worlds:
        found = measure(world)
        computed, skipped = predicted(found, world)
        lines.append(
            f"| {world} | {found['computed'] * 1e3:.1f} / {computed * 1e3:.1f} ms "
            f"| {found['skipped'] * 1e3:.1f} / {skipped * 1e3:.1f} ms "
            f"| {speedup(found['computed'], found['skipped'], 0.5):.2f}x / {speedup(computed, skipped, 0.5):.2f}x "
            f"| {found['bytes']:.0f} / {shape.residual_bytes(1) / world:.0f} B |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run with several processes here")
    parser.add_argument("--share", type=float, default=0.5, help="share of the steps that is skipped")
    parser.add_argument("--front", type=int, default=1, help="blocks that always compute")
    parser.add_argument("--history", type=int, default=2, help="residuals kept")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of is not None:
        run_rank(given.rank_of)
    elif given.measure:
        print(measured_table((1, 2, 4)))
    else:
        print(tables(given.share, given.front, given.history))


if __name__ == "__main__":
    main()
