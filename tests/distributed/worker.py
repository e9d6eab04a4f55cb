"""One of several processes that run cached models together; `test_ranks.py` starts them and reads what they write.

    python worker.py FOLDER LIMIT SCENARIO…

Each scenario writes what this rank saw to FOLDER/SCENARIO.RANK.json, an error under "error".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cache_dit

WIDTH, TOKENS, STEPS, DEPTH = 16, 8, 12, 4
OPTIONS: dict[str, Any] = {"inner": "eager", "noise_scale": 0.0, "language": "en", "forecast": "reuse"}
ADAPTIVE: dict[str, Any] = {**OPTIONS, "strategy": "adaptive", "tolerance": 0.35, "correction": False}
FIXED: dict[str, Any] = {**OPTIONS, "strategy": "fixed", "skip_interval": 2, "warmup_steps": 3}


class Attention(nn.Module):
    """Two heads. With ``group`` the tokens are split over its ranks, and keys and values are gathered."""

    group: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.group is not None:
            from torch.distributed._functional_collectives import all_gather_tensor

            k, v = (all_gather_tensor(each.contiguous(), 2, self.group) for each in (k, v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.feed = nn.LayerNorm(WIDTH), Attention(), Feed()

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        h = h + self.attention(self.norm(h)) * t
        return h + self.feed(h) * t


class Model(nn.Module):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, t[:, None, None])
        return self.head(h)


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def noise(seed: int = 1) -> Tensor:
    return torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(seed))


class Masks:
    """Which calls were skipped, as an observer of a session hears it."""

    def __init__(self, model: Any) -> None:
        from cache_dit.runtime.registry import session_of_module

        self.skipped: list[bool] = []
        self.errors: list[float] = []
        session = session_of_module(model)
        assert session is not None
        self.session, session.observer = session, self

    def compiling(self, reason: str | None) -> None:
        pass

    def called(self, call: Any) -> None:
        self.skipped.append(call.skipped)

    def measured(self, step: int, error: float) -> None:
        self.errors.append(error)

    @property
    def schedule(self) -> str:
        """The same decisions as an option."""
        return "".join("01"[not skipped] for skipped in self.skipped)

    def report(self) -> dict[str, Any]:
        ranks = self.session.ranks
        return {
            "mask": self.schedule,
            "errors": self.errors,
            "members": [] if ranks is None else ranks.members,
            "messages": 0 if ranks is None else ranks.messages,
            "bytes": self.session.cache_bytes,
        }


def denoise(model: Callable[..., Tensor], x: Tensor, around: Callable[[int], None] | None = None) -> Tensor:
    """Euler steps from 1 to 0."""
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    with torch.no_grad():
        for i in range(STEPS):
            if around is not None:
                around(i)
            x = x + (sigmas[i + 1] - sigmas[i]) * model(x, sigmas[i].expand(len(x)))
    return x


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def alone(mask: str, x: Tensor) -> Tensor:
    """What one process makes of the same input with these decisions."""
    return denoise(cache_dit.enable_cache(new_model(), **{**OPTIONS, "schedule": mask, "group": False}), x)


def seen(model: Any, x: Tensor, result: Tensor, masks: Masks) -> dict[str, Any]:
    effect = apart(result, denoise(new_model(), x))
    return {**masks.report(), "apart": apart(result, alone(masks.schedule, x)), "effect": effect}


class Gathers:
    """Counts how often weights are gathered. No dispatch mode: under one a call computes as usual."""

    # how `fully_shard` calls it, in torch 2.13 and before
    NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

    def __enter__(self) -> Gathers:
        self.count, self.real = 0, getattr(dist, self.NAME)
        setattr(dist, self.NAME, self.gather)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(dist, self.NAME, self.real)

    def gather(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.real(*args, **kwargs)


# ---- scenarios -------------------------------------------------------------------------------------------------------


def data_parallel(rank: int) -> dict[str, Any]:
    model, x = cache_dit.enable_cache(new_model(), **ADAPTIVE), noise(rank) * (1 + rank)
    masks = Masks(model)
    return seen(model, x, denoise(model, x), masks)


def one_decision(rank: int) -> dict[str, Any]:
    """Different pictures, one decision."""
    model, x = cache_dit.enable_cache(new_model(), **ADAPTIVE, group="world"), noise(rank) * (1 + rank)
    masks = Masks(model)
    found = seen(model, x, denoise(model, x), masks)
    return {**found, "notes": str(cache_dit.explain(model))}


def own_group(rank: int) -> dict[str, Any]:
    """Two groups of half the ranks each."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(start, start + world // 2))) for start in (0, world // 2)]
    model, x = cache_dit.enable_cache(new_model(), **ADAPTIVE, group=groups[rank // (world // 2)]), noise(rank) * (1 + rank)
    masks = Masks(model)
    return seen(model, x, denoise(model, x), masks)


def known_to_the_host(rank: int) -> dict[str, Any]:
    model = cache_dit.enable_cache(new_model(), **FIXED, group="world")
    masks = Masks(model)
    return seen(model, noise(rank), denoise(model, noise(rank)), masks)


def fsdp(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model: Any = new_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    cache_dit.enable_cache(model, **ADAPTIVE)
    masks, x = Masks(model), noise(rank) * (1 + rank)
    counts: list[int] = []

    def counted(*args: Any) -> Tensor:
        with Gathers() as gathers:
            result: Tensor = model(*args)
        counts.append(gathers.count)
        return result

    return {**seen(model, x, denoise(counted, x), masks), "collectives": counts}


def tensor_parallel(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = new_model()
    for block in model.blocks:
        parallelize_module(block, mesh, {"feed.a": ColwiseParallel(), "feed.b": RowwiseParallel()})
    cache_dit.enable_cache(model, **ADAPTIVE)
    masks, x = Masks(model), noise()
    return seen(model, x, denoise(model, x), masks)


class Feeding(nn.Module):
    """A block without attention, whose activations can stay split over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(WIDTH), Feed()

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h + self.feed(self.norm(h)) * t[0]


def distributed_activations(rank: int) -> dict[str, Any]:
    """Blocks that hand DTensors on: each rank keeps the residual of its part of the tokens."""
    import warnings

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    class FeedingModel(Model):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h, t)
            return self.head(h)

    def new() -> Any:
        torch.manual_seed(0)
        model = FeedingModel(0)
        model.blocks = nn.ModuleList(Feeding() for _ in range(DEPTH))
        return model.eval()

    plan: dict[str, Any] = {
        "embed": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": RowwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(DEPTH):
        plan[f"blocks.{i}.norm"] = SequenceParallel()
        plan[f"blocks.{i}.feed.a"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{i}.feed.b"] = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # a DTensor times a tensor of one element is all that DTensor mixes
    whole = cache_dit.enable_cache(new(), **FIXED, group=False)
    reference = denoise(lambda x, t: whole(x, t[:1]), noise())
    found: dict[str, Any] = {"alone_bytes": cache_dit.get_stats(whole).cache_bytes}
    found["effect"] = apart(reference, denoise(lambda x, t: new()(x, t[:1]), noise()))
    for lowering in ("specialize", "cond", "pieces"):
        model: Any = parallelize_module(new(), mesh, plan)
        cache_dit.enable_cache(model, **FIXED, lowering=lowering)
        masks = Masks(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = denoise(lambda x, t, model=model: model(x, t[:1]), noise())
        ours = [str(each.message) for each in said if "cache_dit" in type(each.message).__module__]
        lowered = [graph.lowering for graph in cache_dit.explain(model).graphs]
        found[lowering] = {**masks.report(), "apart": apart(result, reference), "said": ours, "lowered": lowered}
    return found


def sequence_parallel(rank: int) -> dict[str, Any]:
    """Tokens are split over the ranks; the graph's collectives say so."""
    model: Any = new_model()
    for block in model.blocks:
        block.attention.group = dist.group.WORLD
    cache_dit.enable_cache(model, **ADAPTIVE)
    whole = cache_dit.enable_cache(new_model(), **ADAPTIVE, group=False)
    masks, together, x = Masks(model), Masks(whole), noise()
    part = denoise(model, x.chunk(dist.get_world_size(), dim=1)[rank].contiguous())
    one = denoise(whole, x)
    return {
        **masks.report(),
        "alone": together.report()["mask"],
        "alone_bytes": together.report()["bytes"],
        "apart": apart(part, one.chunk(dist.get_world_size(), dim=1)[rank]),
        "effect": apart(one, denoise(new_model(), x)),
    }


def context_parallel(rank: int) -> dict[str, Any]:
    """diffusers' own: ring and Ulysses attention."""
    import diffusers

    # diffusers counts accelerators to number this process's device, and a CPU has none
    torch.accelerator.device_count = lambda: 1
    world = dist.get_world_size()

    def flux() -> Any:
        torch.manual_seed(0)
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 4),
        ).eval()

    generator = torch.Generator().manual_seed(5)
    text, pooled = torch.randn(2, 8, 8, generator=generator), torch.randn(2, 8, generator=generator)
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0))

    def sampled(model: Any) -> Tensor:
        def call(x: Tensor, t: Tensor) -> Tensor:
            result: Tensor = model(
                hidden_states=x,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=t,
                img_ids=image_ids,
                txt_ids=torch.zeros(8, 3),
                return_dict=False,
            )[0]
            return result

        return denoise(call, noise())

    found: dict[str, Any] = {}
    for name in ("ulysses", "ring"):
        model = flux()
        if name == "ring":
            model.set_attention_backend("_native_cudnn" if torch.cuda.is_available() else "native")
        try:
            model.enable_parallelism(config=diffusers.ContextParallelConfig(**{f"{name}_degree": world}))
            plain = sampled(model)
        except Exception as error:
            found[name] = {"unavailable": f"{type(error).__name__}: {error}"}
            continue
        cache_dit.enable_cache(model, **FIXED)
        masks = Masks(model)
        result = sampled(model)
        one = sampled(cache_dit.enable_cache(flux(), **FIXED, group=False))
        found[name] = {**masks.report(), "apart": apart(result, one), "effect": apart(result, plain)}
    return found


def guidance_over_two(rank: int) -> dict[str, Any]:
    """Positive and negative prompt each on a rank; their outputs are gathered behind the model."""
    model: Any = cache_dit.enable_cache(new_model(), **ADAPTIVE, group="world")
    masks = Masks(model)
    shift = 0.3 if rank == 0 else -0.3

    def guided(x: Tensor, t: Tensor) -> Tensor:
        own = model(x + shift, t)
        both = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(both, own.contiguous())
        return both[1] + 2.0 * (both[0] - both[1])

    result = denoise(guided, noise())
    parts = [
        cache_dit.enable_cache(new_model(), **{**OPTIONS, "schedule": masks.schedule, "group": False}) for _ in range(2)
    ]
    one = denoise(lambda x, t: guided_alone(parts, x, t), noise())
    return {**masks.report(), "apart": apart(result, one)}


def guided_alone(parts: list[Any], x: Tensor, t: Tensor) -> Tensor:
    positive, negative = parts[0](x + 0.3, t), parts[1](x - 0.3, t)
    return negative + 2.0 * (positive - negative)


def export(rank: int) -> dict[str, Any]:
    """Write the file that `artifact` loads; in a launch before it, since compiling takes longer than ranks may wait."""
    with torch.no_grad():
        given = noise(), torch.ones(len(noise()))
        path = cache_dit.export(new_model(), given, Path(sys.argv[1]) / "model.pt2", **{**ADAPTIVE, "inner": "inductor"})
    return {"bytes": path.stat().st_size}


def artifact(rank: int) -> dict[str, Any]:
    """A compiled file loaded by each rank: different pictures, one decision."""
    path = Path(sys.argv[1]) / "model.pt2"
    model, x = cache_dit.load(path, group="world"), noise(rank) * (1 + rank)
    masks = Masks(model)
    return seen(model, x, denoise(model, x), masks)


def pipeline_stages(rank: int) -> dict[str, Any]:
    """Half of the blocks on each rank: each stage caches its own part at the same steps."""

    class Stage(nn.Module):
        def __init__(self, blocks: nn.ModuleList) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, h: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                h = block(h, t[:, None, None])
            return h

    whole = new_model()
    half = DEPTH // 2
    halves = [Stage(whole.blocks[:half]).eval(), Stage(whole.blocks[half:]).eval()]
    stage: Any = cache_dit.enable_cache(halves[rank], **{**ADAPTIVE, "front_blocks": 0}, group="world")
    masks = Masks(stage)

    def piped(x: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if rank == 0:
            dist.send(stage(whole.embed(x), t).contiguous(), 1)
            dist.recv(out, 1)
        else:
            h = torch.empty(*x.shape[:2], WIDTH)
            dist.recv(h, 0)
            out = whole.head(stage(h, t))
            dist.send(out.contiguous(), 0)
        return out

    result = denoise(piped, noise())
    schedule = {**OPTIONS, "schedule": masks.schedule, "front_blocks": 0, "group": False}
    model = new_model()
    first, second = (
        cache_dit.enable_cache(Stage(part).eval(), **schedule) for part in (model.blocks[:half], model.blocks[half:])
    )
    one = denoise(lambda x, t: model.head(second(first(model.embed(x), t), t)), noise())
    return {**masks.report(), "apart": apart(result, one)}


def different_options(rank: int) -> dict[str, Any]:
    options = {**FIXED, "skip_interval": 2 + rank}
    return failing(lambda: denoise(cache_dit.enable_cache(new_model(), **options, group="world"), noise()))


def control_refresh(rank: int) -> dict[str, Any]:
    return failing(lambda: denoise(cache_dit.enable_cache(new_model(), **FIXED, control_refresh=True, group="world"), noise()))


def sharded_and_not(rank: int) -> dict[str, Any]:
    """One rank has spread its weights; the other has not, and never comes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = new_model()
    parallelize_module(model.blocks[0], mesh, {"feed.a": ColwiseParallel()})
    model = model if rank == 0 else new_model()
    return failing(lambda: denoise(cache_dit.enable_cache(model, **FIXED), noise()))


def late_rank(rank: int) -> dict[str, Any]:
    """One rank stops for longer than the limit in the middle of a run."""
    model: Any = cache_dit.enable_cache(new_model(), **ADAPTIVE, group="world")
    limit = float(sys.argv[2])

    def around(step: int) -> None:
        if rank == 1 and step == 5:
            time.sleep(limit + 10.0)

    return failing(lambda: denoise(model, noise(), around))


def dead_rank(rank: int) -> dict[str, Any]:
    """One rank dies in the middle of a run."""
    model: Any = cache_dit.enable_cache(new_model(), **ADAPTIVE, group="world")

    def around(step: int) -> None:
        if rank == 1 and step == 5:
            os._exit(3)

    return failing(lambda: denoise(model, noise(), around))


def failing(run: Callable[[], object]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        run()
    except cache_dit.CacheDitError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"error": None, "seconds": time.monotonic() - start}


def main() -> None:
    folder, limit, names = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
    rank = dist.get_rank()
    for name in names:
        torch._dynamo.reset()
        found = globals()[name](rank)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
        if name not in ("late_rank", "dead_rank", "sharded_and_not"):
            dist.barrier()
    # a rank that failed must not wait for others at the end
    os._exit(0)


if __name__ == "__main__":
    main()
