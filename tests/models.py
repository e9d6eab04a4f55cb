"""Tiny diffusion transformers in plain PyTorch, and how the tests get at their graphs.

Each variant is one shape that the passes meet in real models. All take ``(x, t)`` unless they say otherwise: ``x`` is
[batch, tokens, CHANNELS], ``t`` is [batch].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from cache_dit.passes.residual_math import statistics_length
from torch import Tensor, fx, nn
from torch.nn import functional

from cache_dit import passes
from cache_dit.torch_internals import copy_dynamo_graph

BATCH, TOKENS, CHANNELS, WIDTH = 2, 6, 4, 8


class TimeEmbedding(nn.Module):
    """Sines and cosines of the timestep through an MLP: [batch] to [batch, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=t.device, dtype=t.dtype))
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Block(nn.Module):
    """A residual block with modulation: x + gate * mlp(norm(x) * (1 + scale) + shift)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(temb)[:, None].chunk(3, dim=-1)
        return x + gate * torch.tanh(self.mlp(self.norm(x) * (1 + scale) + shift))


class TinyDiT(nn.Module):
    """A whole transformer in small: embedding, timestep embedding, modulated blocks, head."""

    def __init__(self, depth: int = 4, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time = TimeEmbedding()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


# The variants have the smallest blocks that the finder takes: what is traced in them is their shape.


class SimpleBlock(nn.Module):
    """x + tanh(mlp(x)) * t, with t as [batch, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def update(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.mlp(x)) * t

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.update(x, t)


class InPlaceBlock(SimpleBlock):
    """Writes over its input."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x += self.update(x, t)
        return x


class DropoutBlock(SimpleBlock):
    """Draws random numbers in train mode."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + functional.dropout(self.update(x, t), 0.1, self.training)


class BranchingBlock(SimpleBlock):
    """Has a data-dependent branch of its own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        update = self.update(x, t)
        return x + torch.cond(update.sum() > 0, torch.sin, torch.cos, (update,))


class SkipBlock(SimpleBlock):
    """Takes the output of an earlier block too."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.merge(torch.cat([x, skip], dim=-1))
        return x + self.update(x, t)


class JointBlock(nn.Module):
    """Two streams, each of which reads the mean of the other; returns (x, context)."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = SimpleBlock(), SimpleBlock()

    def forward(self, x: Tensor, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        toward_image, toward_text = context.mean(1, keepdim=True), x.mean(1, keepdim=True)
        return self.image(x, t * toward_image), self.text(context, t * toward_text)


class PartedBlock(SimpleBlock):
    """Two streams that are one within the block, as in Flux's later ones."""

    def forward(self, x: Tensor, t: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        joined = super().forward(torch.cat([side, x], dim=1), t)
        return joined[:, side.shape[1] :], self.part(joined[:, : side.shape[1]])

    def part(self, side: Tensor) -> Tensor:
        return side


class TupleBlock(nn.Module):
    """A hidden state that is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = SimpleBlock(), SimpleBlock()

    def forward(self, state: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        x, context = state
        return self.image(x, t * context.mean(1, keepdim=True)), self.text(context, t)


class Stack(nn.Module):
    """Blocks between two linear layers: the model of the snapshots. Variants override how the blocks are run."""

    def __init__(self, depth: int = 3, block: Callable[[], nn.Module] = SimpleBlock) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, t)
        return h

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.run_blocks(self.embed(x), t[:, None, None]))


class PartedStack(Stack):
    """Nobody reads the second stream behind the last block."""

    def __init__(self, depth: int = 4, block: Callable[[], nn.Module] = PartedBlock) -> None:
        super().__init__(depth, block)

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        side = h[:, :2]
        for block in self.blocks:
            h, side = block(h, t, side)
        return h


class ReversedStack(Stack):
    """The blocks run from the last to the first."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            h = block(h, t)
        return h


class TwiceStack(Stack):
    """The same list runs a second time behind some glue."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        return super().run_blocks(torch.tanh(super().run_blocks(h, t)), t)


class AttributeStack(Stack):
    """Blocks as attributes ``block0`` to ``block2``."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.block0, self.block1, self.block2 = (SimpleBlock() for _ in range(3))

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        return self.block2(self.block1(self.block0(h, t), t), t)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda h: h.add_(1.0),
    "copy_": lambda h: h.copy_(h * 2.0),
    "setitem": lambda h: h.__setitem__((0, 0), 1.0),
}


class SharedStack(Stack):
    """What the second block gave is written to, and a view of it taken before is read behind the fourth."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__(8)
        self.write = write

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        h = self.blocks[1](self.blocks[0](h, t), t)
        view = h[:, :1]
        self.write(h)
        h = self.blocks[3](self.blocks[2](h, t), t) + view
        for block in self.blocks[4:]:
            h = block(h, t)
        return h


class AutocastStack(Stack):
    """Two blocks lie in one autocast region."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        h = self.blocks[1](self.blocks[0](h, t), t)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.blocks[3](self.blocks[2](h, t), t)
        return self.blocks[5](self.blocks[4](h.float(), t), t)


class NamedStack(Stack):
    """Blocks as attributes without numbers, beside a module of another class; ``keyed``: in a ``ModuleDict`` instead."""

    def __init__(self, keyed: bool = False) -> None:
        super().__init__(depth=0)
        names = ("entry", "middle", "exit")
        if keyed:
            self.named = nn.ModuleDict({name: SimpleBlock() for name in names})
        else:
            for name in names:
                setattr(self, name, SimpleBlock())

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        for block in self.named.values() if hasattr(self, "named") else (self.entry, self.middle, self.exit):
            h = block(h, t)
        return h


class InPlaceStack(Stack):
    """``x += ...`` in every block. ``keeps``: the first hidden state is read again behind the blocks."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__(3, InPlaceBlock)
        self.keeps = keeps

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        out = super().run_blocks(h, t)
        return out + h if self.keeps else out


class LongSkipStack(Stack):
    """U-shaped: the second half of the blocks takes what the first half made, the last made first."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth, SkipBlock)

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        half = len(self.blocks) // 2
        skips = []
        for block in self.blocks[:half]:
            h = block(h, t)
            skips.append(h)
        for block in self.blocks[half:]:
            h = block(h, t, skips.pop())
        return h


class GluedStack(Stack):
    """Something that belongs to no block is added behind each of them."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        control = torch.sin(h)
        for block in self.blocks:
            h = block(h, t) + 0.1 * control
        return h


class StrayStack(Stack):
    """A part of the first block is called again behind the last one."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        return self.blocks[0].mlp(super().run_blocks(h, t))


class InterleavedStack(Stack):
    """Two lists take turns: spatial, temporal, spatial, …"""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.spatial = nn.ModuleList(SimpleBlock() for _ in range(3))
        self.temporal = nn.ModuleList(SimpleBlock() for _ in range(3))

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            h = temporal(spatial(h, t).flip(1), t)
        return h


class Stage(Stack):
    """A list of blocks that is itself an entry of a list."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.run_blocks(x, t)


class StagedStack(Stack):
    """Lists inside the entries of a list: ``stages`` times ``depth`` blocks."""

    def __init__(self, stages: int, depth: int) -> None:
        super().__init__(stages, lambda: Stage(depth))


class SideStack(Stack):
    """Between the blocks something light is made that the last block and the head need."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        first = self.blocks[0](self.embed(x), t)
        h = self.blocks[1](first, t)
        side = first * 2.0
        return self.head(self.blocks[2](h + side, t)) * self.head(side)


class TransposedStack(Stack):
    """The hidden state is [batch, WIDTH, tokens] between the blocks, and reaches the head as a view."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        h = h.transpose(1, 2)
        for block in self.blocks:
            h = block(h.transpose(1, 2), t).transpose(1, 2)
        return h.transpose(1, 2)


class JointDiT(nn.Module):
    """Two-stream blocks, then single-stream blocks over both sequences; takes ``(x, t, context)``.

    With ``single=0`` both streams leave the blocks: two live-outs.
    """

    def __init__(self, double: int = 3, single: int = 2, block: Callable[[], nn.Module] = JointBlock) -> None:
        super().__init__()
        self.embed, self.embed_context = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.double_blocks = nn.ModuleList(block() for _ in range(double))
        self.single_blocks = nn.ModuleList(SimpleBlock() for _ in range(single))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def run_double(self, h: Tensor, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.double_blocks:
            h, context = block(h, context, t)
        return h, context

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        t = t[:, None, None]
        h, context = self.run_double(self.embed(x), self.embed_context(context), t)
        if len(self.single_blocks) == 0:
            return self.head(h) + self.head(context).mean(1, keepdim=True)
        length = context.shape[1]
        h = torch.cat([context, h], dim=1)
        for block in self.single_blocks:
            h = block(h, t)
        return self.head(h[:, length:])


class TupleDiT(JointDiT):
    """The two streams travel as one tuple."""

    def __init__(self, double: int = 3) -> None:
        super().__init__(double, 0, TupleBlock)

    def run_double(self, h: Tensor, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        state = (h, context)
        for block in self.double_blocks:
            state = block(state, t)
        return state


class RefinedStack(Stack):
    """A refiner of its own list comes before the main one, without feeding its stream; takes ``(x, t, context)``."""

    def __init__(self) -> None:
        super().__init__(3)
        self.refiner = nn.ModuleList(SimpleBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        h, context, t = self.embed(x), self.embed(context), t[:, None, None]
        for block in self.refiner:
            context = block(context, t)
        return self.head(self.run_blocks(h, t + context.mean(1, keepdim=True)))


class Plain(nn.Module):
    """Nothing is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)) * t[:, None, None])


# name: how the model is built, and whether it takes a context
VARIANTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "tiny": (TinyDiT, False),
    "stack": (Stack, False),
    "reversed": (ReversedStack, False),
    "twice": (TwiceStack, False),
    "attributes": (AttributeStack, False),
    "named": (NamedStack, False),
    "keyed": (lambda: NamedStack(keyed=True), False),
    "in_place": (InPlaceStack, False),
    "long_skip": (LongSkipStack, False),
    "joint": (JointDiT, True),
    "two_streams": (lambda: JointDiT(3, 0), True),
    "tuple": (TupleDiT, True),
    "parted": (PartedStack, False),
    "refined": (RefinedStack, True),
    "glued": (GluedStack, False),
    "stray": (StrayStack, False),
    "interleaved": (InterleavedStack, False),
    "staged": (lambda: StagedStack(2, 3), False),
    "side": (SideStack, False),
    "transposed": (TransposedStack, False),
    "branching": (lambda: Stack(block=BranchingBlock), False),
}


def seeded(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model with weights that are the same in every process, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model().to(dtype).eval()


def example(
    dtype: torch.dtype = torch.float32, *, context: bool = False, batch: int = BATCH, tokens: int = TOKENS, seed: int = 1
) -> tuple[Tensor, ...]:
    """Inputs ``(x, t)``, with ``context`` (x, t, context): three tokens of text."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x, t = normal(batch, tokens, CHANNELS), torch.full((batch,), 0.7, dtype=dtype)
    return (x, t, normal(batch, 3, CHANNELS)) if context else (x, t)


@dataclass(frozen=True, slots=True)
class Captured:
    """A traced graph and the flat inputs it was traced with."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]

    def fed(self, **values: Tensor) -> tuple[Any, ...]:
        """The inputs with some of the model's arguments replaced."""
        names = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
        return tuple(values.get(name[2:-1], value) for name, value in zip(names, self.inputs, strict=True))

    def copy(self) -> fx.GraphModule:
        """A copy to rewrite."""
        return copy_dynamo_graph(self.gm)


def traced(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    """Trace one call of a model with Dynamo, without gradients, as one graph."""
    found: list[Captured] = []

    def keep(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        copy = copy_dynamo_graph(gm)

        def run(*flat: Any) -> Any:
            found.append(Captured(copy, flat))
            return gm.forward(*flat)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return found[0]


@cache
def traced_variant(name: str, dtype: torch.dtype = torch.float32) -> Captured:
    """A variant's graph, traced once; rewrite a copy of it."""
    build, context = VARIANTS[name]
    return traced(seeded(build, dtype), *example(dtype, context=context))


@cache
def traced_stack(depth: int) -> Captured:
    """The graph of a `Stack`, traced once; rewrite a copy of it."""
    return traced(seeded(lambda: Stack(depth)), *example())


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The graph that a backend gets for one call of a model without gradients; a copy, free to be rewritten."""
    return traced(model, *args, **kwargs).gm


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Check a rewritten graph and run it without gradients."""
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = gm(*inputs)
    return outputs


def find_region(gm: fx.GraphModule, **wanted: Any) -> passes.Region:
    """The region of a graph in which there is one."""
    region = passes.choose_region(gm, passes.find_blocks(gm), **wanted)
    assert isinstance(region, passes.Region), region
    return region


def rewrite(
    gm: fx.GraphModule, options: passes.BranchOptions | None = None, **wanted: Any
) -> tuple[passes.Region, passes.CacheInputs]:
    """All passes up to the cond form, in place."""
    region = find_region(gm, **wanted)
    passes.outline_region(gm, region)
    return region, passes.insert_cache_branch(gm, region, options or passes.BranchOptions())


class CacheState:
    """What the runtime holds for one region, made by hand. ``residuals[j][k]``: the k-th newest of ``inputs.stored[j]``."""

    def __init__(self, inputs: passes.CacheInputs, sizes: Sequence[Sequence[int]] | None = None) -> None:
        """``sizes``, where those of ``inputs`` are symbolic: one for each that is stored, then the front's where it is kept."""
        self.inputs = inputs
        buffers = [*inputs.stored, *([inputs.front] if inputs.front is not None else [])]
        shapes = sizes if sizes is not None else [buffer.sizes for buffer in buffers]
        made = [
            [torch.zeros(tuple(shape), dtype=buffer.dtype) for _ in range(inputs.history)]
            for shape, buffer in zip(shapes, buffers, strict=True)
        ]
        self.front = made.pop()[0] if inputs.front is not None else None
        self.residuals = made
        self.measured = torch.zeros(len(inputs.residuals) * statistics_length(inputs.history), dtype=inputs.accumulate)

    def operands(self, *, compute: bool, weights: Sequence[float] = (1.0,), noise: float = 0.0, key: int = 0) -> list[Tensor]:
        """The cache inputs of one call, in the order the graph takes them."""
        padded = (*weights, *([0.0] * (self.inputs.history - len(weights))), noise)
        front = [] if self.front is None else [self.front]
        return [
            torch.tensor(compute),
            torch.tensor(padded, dtype=self.inputs.accumulate),
            torch.tensor(key),
            self.measured,
            *front,
            *chain.from_iterable(self.residuals),
        ]

    def computed(self, measured: Tensor) -> None:
        """Note that a program has overwritten the oldest residuals."""
        self.measured = measured
        for history in self.residuals:
            history.insert(0, history.pop())

    def fill(self, seed: int = 2) -> None:
        """Put numbers into the buffers, as if steps had been computed."""
        generator = torch.Generator().manual_seed(seed)
        for buffer in chain(chain.from_iterable(self.residuals), [self.measured]):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)

    def snapshot(self) -> list[Tensor]:
        """Copies of everything that a program may write to."""
        front = [] if self.front is None else [self.front]
        return [tensor.clone() for tensor in (*front, *chain.from_iterable(self.residuals))]


def compact(gm: fx.GraphModule) -> str:
    """A graph in few lines: nodes are numbered, weights are ``w``, nested graphs follow behind. Unused inputs are listed."""
    lines = _compact_graph(gm.graph, gm)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and any(node.target == name for node in gm.graph.nodes):
            lines += ["", f"{name}:", *_compact_graph(child.graph, child)]
    return "\n".join(lines)


def _compact_graph(graph: fx.Graph, gm: fx.GraphModule) -> list[str]:
    names: dict[fx.Node, str] = {}
    lines, inputs = [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            weight = "_parameters_" in node.name
            names[node] = "w" if weight else _plain_name(node.name)
            if not weight:
                inputs.append(names[node])
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "output":
            lines.append(f"return {_compact_value(node.args[0], names)}")
        else:
            names[node] = f"%{sum(name.startswith('%') for name in names.values())}"
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            dot = "." if node.op == "call_method" else ""
            arguments = [_compact_value(argument, names) for argument in node.args]
            arguments += [f"{key}={_compact_value(value, names)}" for key, value in node.kwargs.items()]
            lines.append(f"{names[node]} = {dot}{target}({', '.join(arguments)})")
    return [f"({', '.join(inputs)})", *lines]


def _plain_name(name: str) -> str:
    """``l_x_`` is how Dynamo names the argument x."""
    return name[2:-1] if name.startswith("l_") and name.endswith("_") else name


def _compact_value(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        items = [_compact_value(item, names) for item in value]
        shown = [item for i, item in enumerate(items) if item != "w" or i == 0 or items[i - 1] != "w"]
        return f"({', '.join('w...' if item == 'w' and 'w' in items[1:] else item for item in shown)})"
    if isinstance(value, slice):
        return ":".join("" if part is None else _compact_value(part, names) for part in (value.start, value.stop))
    return str(value)
