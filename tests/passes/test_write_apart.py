"""Arithmetic in place is written as arithmetic where nobody can tell the difference, and left alone elsewhere."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from cache_dit.passes import Region, choose_region, find_blocks, write_apart
from cache_dit.passes.graph_values import is_mutation
from torch import Tensor, fx, nn
from torch.nn import functional

import cache_dit

from ..models import CHANNELS, WIDTH, InPlaceStack, capture, example, seeded


def rewritten(function: Any, *args: Any, copying: bool = False) -> tuple[int, fx.GraphModule]:
    """The traced graph of a function behind the pass; its results are those before it, and so is what it writes to."""

    class Holder(nn.Module):
        def forward(self, *given: Any) -> Any:
            return function(*given)

    gm = capture(Holder(), *args)
    # the tracer itself may round otherwise than the function: torch 2.11 writes `add_(x, alpha=3)` as a product and a sum
    traced = copy.deepcopy(gm)
    count = write_apart(gm, copying=copying)
    gm.graph.lint()
    gm.recompile()
    given, again = copy.deepcopy(args), copy.deepcopy(args)
    made, wanted, plain = gm(*given), traced(*again), function(*copy.deepcopy(args))
    for a, b in zip((*made, *given), (*wanted, *again), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a, b)
    return count, gm


def capture_of(function: Any) -> fx.GraphModule:
    """The graph as it was traced."""

    class Holder(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return capture(Holder(), torch.randn(3, 4))


def mutations(gm: fx.GraphModule) -> int:
    return sum(map(is_mutation, gm.graph.nodes))


def test_later_reads_see_what_was_written() -> None:
    def add(x: Tensor) -> tuple[Tensor, ...]:
        h = x * 2.0
        before = h + 1.0
        h.add_(x, alpha=3.0)
        h *= 2.0
        h.addcmul_(x, x)
        return before, h, h.sin()

    count, gm = rewritten(add, torch.randn(3, 4))
    assert count == 3 and mutations(gm) == 0


def test_types_stay_those_of_what_is_written_to() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        h = x.to(torch.bfloat16) * 2
        h.add_(x)
        return (h,)

    count, gm = rewritten(add, torch.randn(3, 4))
    assert count == 1 and mutations(gm) == 0


def test_inputs_keep_what_was_written_to_them() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        x.add_(1.0)
        return (x * 2.0,)

    count, gm = rewritten(add, torch.randn(3, 4))
    assert count == 0 and mutations(gm) == 1


@pytest.mark.parametrize("late", [True, False])
def test_shared_memory_that_is_read_later_is_left_alone(late: bool) -> None:
    def add(x: Tensor) -> tuple[Tensor, ...]:
        h = x * 2.0
        view = h[:, :2]
        early = view.cos()
        h.add_(1.0)
        return (h, early, view * 1.0) if late else (h, early)

    count, gm = rewritten(add, torch.randn(3, 4))
    assert (count, mutations(gm)) == ((0, 1) if late else (1, 0))


def test_a_view_of_a_sum_made_out_of_place_is_a_view_of_that_sum() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        h = x * 2.0
        h.add_(1.0)
        h[:, :2].mul_(3.0)
        return (h,)

    count, gm = rewritten(add, torch.randn(3, 4))
    assert (count, mutations(gm)) == (1, 1)


def test_a_dropout_that_drops_nothing_gives_the_memory_it_is_given() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        h = functional.dropout(x, 0.5, training=False)
        h += 1.0
        return (h * 2.0,)

    count, gm = rewritten(add, torch.randn(3, 4), copying=True)
    assert (count, mutations(gm)) == (0, 1)


def test_a_result_is_dense_where_what_was_written_to_was_not() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        h = (x * 2.0)[:, :2]
        h += 1.0
        return (h.sin(),)

    _, gm = rewritten(add, torch.randn(3, 4))
    made = next(node for node in gm.graph.nodes if node.target is operator.add)
    assert made.meta["example_value"].stride() == (2, 1)


def test_what_vmap_wraps_hides_its_memory_and_is_left_alone() -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.vmap(lambda each: each.mul(2.0).add_(1.0))(x)
            h += 1.0
            return h

    gm = capture(Mapped(), torch.ones(3, 4))
    assert write_apart(gm, copying=True) > 0
    gm.recompile()
    assert torch.equal(gm(torch.ones(3, 4))[0], torch.full((3, 4), 4.0))


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    h = x * 2.0
    h[:, :2] += 1.0
    h[:, 1:] *= 3.0
    return (h,)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    h = x * 2.0
    a, b = h.chunk(2, dim=1)
    a += 1.0
    b.mul_(a)
    h.add_(1.0)
    joined = torch.cat([a, b], dim=1)
    a.relu_()
    return h, joined, a * 1.0, b * 1.0


def _result_in_place(x: Tensor) -> tuple[Tensor, ...]:
    h = x * 2.0
    y = h.add_(1.0)
    z = y.view(-1)
    z[3:7] = 0.0
    torch.add(h, 1.0, out=h)
    return h, y * 1.0, z * 1.0


@pytest.mark.parametrize(("function", "left"), [(_slices, 4), (_parts, 4), (_result_in_place, 2)])
def test_what_is_no_plain_sum_is_written_to_a_copy(function: Any, left: int) -> None:
    count, gm = rewritten(function, torch.randn(3, 4), copying=True)
    # everything was moved; what still writes, writes to a copy
    assert count == sum(map(is_mutation, capture_of(function).graph.nodes)) and mutations(gm) == left
    copies = {node for node in gm.graph.nodes if node.target == "clone"}
    assert len(copies) == left


def test_a_write_through_a_view_is_left_alone_where_the_whole_is_read_later() -> None:
    def add(x: Tensor) -> tuple[Tensor]:
        h = x * 2.0
        h[:, :2].mul_(3.0)
        return (h,)

    count, _ = rewritten(add, torch.randn(3, 4))
    assert count == 0


def test_blocks_that_write_to_a_stream_that_is_read_behind_them_can_be_cached() -> None:
    gm = capture(seeded(lambda: InPlaceStack(keeps=True)), *example())
    assert not isinstance(choose_region(gm, find_blocks(gm)), Region)
    assert write_apart(gm) > 0
    assert isinstance(choose_region(gm, find_blocks(gm)), Region)


class WritingBlock(nn.Module):
    """Adds to the stream in place and returns nothing, as video models with sound do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> None:
        x.addcmul_(torch.tanh(self.mlp(x)), t)


class SliceBlock(WritingBlock):
    """Writes to one part of the stream after the other."""

    def forward(self, x: Tensor, t: Tensor) -> None:
        x[:, :2] += torch.tanh(self.mlp(x))[:, :2] * t
        x[:, 2:] = x[:, 2:] + torch.sin(self.mlp(x))[:, 2:] * t


class CopyingBlock(WritingBlock):
    def forward(self, x: Tensor, t: Tensor) -> None:
        x.copy_(x + torch.tanh(self.mlp(x)) * t)


class WritingModel(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            block(h, t[:, None, None])
        return self.head(h)


@pytest.mark.parametrize("block", [WritingBlock, SliceBlock, CopyingBlock])
@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_a_model_of_blocks_that_return_nothing_is_cached(lowering: str, block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = WritingModel(block).eval()
    model = cache_dit.enable_cache(
        copy.deepcopy(plain), schedule="1101", forecast="reuse", noise_scale=0.0, inner="eager", lowering=lowering
    )
    cache_dit.new_run(model, num_steps=4)
    x = torch.randn(2, 6, CHANNELS)
    times = [torch.full((2,), 1.0 - 0.25 * i) for i in range(4)]
    with torch.no_grad():
        made = [model(x, t) for t in times]
        wanted = [plain(x, t) for t in times]
        # the first block always computes; the others added at the second step what they add again at the third
        h = [plain.embed(x) for _ in range(3)]
        plain.blocks[0](h[0], times[1][:, None, None])
        plain.blocks[0](h[1], times[1][:, None, None])
        for block in list(plain.blocks)[1:]:
            block(h[1], times[1][:, None, None])
        plain.blocks[0](h[2], times[2][:, None, None])
        skipped = plain.head(h[2] + (h[1] - h[0]))
    assert cache_dit.get_stats(model).hits == 1
    for step in (0, 1, 3):
        torch.testing.assert_close(made[step], wanted[step])
    torch.testing.assert_close(made[2], skipped)
    assert not torch.allclose(made[2], wanted[2])
