"""Which blocks are cached, what enters and leaves them, and where nothing may be cached."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_dit.passes import Refusal, Region, choose_region, find_blocks
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from tests.models import (
    VARIANTS,
    DropoutBlock,
    InPlaceStack,
    JointDiT,
    PartedBlock,
    PartedStack,
    Plain,
    SimpleBlock,
    Stack,
    capture,
    compact,
    example,
    find_region,
    run,
    seeded,
    traced_stack,
    traced_variant,
)


def chosen(gm: fx.GraphModule, **wanted: Any) -> Region | Refusal:
    return choose_region(gm, find_blocks(gm), **wanted)


def chosen_in(build: Callable[[], nn.Module], **wanted: Any) -> Region | Refusal:
    return chosen(capture(seeded(build), *example()), **wanted)


def described(region: Region) -> str:
    """A region in one line for each of its parts; live-ins without the weights."""
    outs = [
        f"{out.node.name} = {out.base.name if out.base else 'whole'}{' + ...' if out.additive else ''}"
        for out in region.live_outs
    ]
    lines = [
        f"front: {' '.join(region.front)}",
        f"cached: {' '.join(region.cached)}",
        f"back: {' '.join(region.back)}",
        f"in: {' '.join(node.name for node in region.live_ins if '_parameters_' not in node.name)}",
        f"out: {', '.join(outs)}",
    ]
    lines += [f"hoisted: {' '.join(node.name for node in region.hoisted)}"] * bool(region.hoisted)
    lines += [f"copied: {' '.join(node.name for node in region.copied_live_ins)}"] * bool(region.copied_live_ins)
    return "\n".join(line.rstrip() for line in lines)


def test_snapshot() -> None:
    region = find_region(traced_variant("stack").gm, front=1, back=1)
    assert_expected_inline(
        described(region),
        """\
front: blocks.0
cached: blocks.1
back: blocks.2
in: h getitem
out: h_1 = h + ...""",
    )
    assert_expected_inline(" ".join(node.name for node in region.nodes), """linear_2 tanh_1 mul_1 h_1""")


def test_two_lists_make_one_region_whose_end_moves_behind_the_slice() -> None:
    region = find_region(traced_variant("joint").gm)
    assert region.lists == ("double_blocks", "single_blocks")
    assert_expected_inline(
        described(region),
        """\
front: double_blocks.0
cached: double_blocks.1 double_blocks.2 single_blocks.0 single_blocks.1
back:
in: context h t
out: getitem_1 = h + ...""",
    )


class Alike(PartedStack):
    """Two streams of one shape, which are joined and sliced in each block: where that is done tells them apart."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        side = torch.tanh(h)
        for block in self.blocks:
            h, side = block(h, t, side)
        return side if self.side else h

    def __init__(self, block: Callable[[], nn.Module], side: bool) -> None:
        super().__init__(3, block)
        self.side = side


class NegativeDimension(PartedBlock):
    """Joined along what is named from the end, the slices one after the other."""

    def forward(self, x: Tensor, t: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        joined = SimpleBlock.forward(self, torch.cat(tensors=(side, x), dim=-2), t)
        rest = joined[:, 2:]
        return rest[:, 4:, :], joined[:, :6]


@pytest.mark.parametrize("block", [PartedBlock, NegativeDimension])
@pytest.mark.parametrize("side", [False, True])
def test_of_streams_of_one_shape_the_base_is_the_one_that_is_continued(block: type[PartedBlock], side: bool) -> None:
    region = chosen_in(lambda: Alike(block, side))
    assert isinstance(region, Region) and region.front == ("blocks.0",)
    (out,) = region.live_outs
    assert out.base is not None and out.additive
    assert cut_of(out.base) == cut_of(out.node)


def cut_of(node: fx.Node) -> list[slice]:
    """Where a value was sliced from."""
    index = node.args[1]
    assert node.target is operator.getitem and isinstance(index, tuple)
    return [each for each in index if each != slice(None)]


def test_two_streams_that_leave_have_a_base_each() -> None:
    assert_expected_inline(
        described(find_region(traced_variant("two_streams").gm)),
        """\
front: double_blocks.0
cached: double_blocks.1 double_blocks.2
back:
in: context h t
out: h_2 = h + ..., context_2 = context + ...""",
    )


def test_a_tuple_that_travels_through_the_blocks_leaves_in_parts() -> None:
    assert_expected_inline(
        described(find_region(traced_variant("tuple").gm)),
        """\
front: double_blocks.0
cached: double_blocks.1 double_blocks.2
back:
in: context_1 t x_1
out: h = x_1 + ..., context_3 = context_1 + ...""",
    )


def test_a_stream_that_a_long_skip_is_mixed_into_is_cached_whole() -> None:
    region = find_region(traced_variant("long_skip").gm)
    assert_expected_inline(
        described(region),
        """\
front: blocks.0
cached: blocks.1 blocks.2 blocks.3
back:
in: h getitem
out: h_3 = whole""",
    )
    (out,) = region.live_outs
    assert out.stream is not None and out.stream.name == "h"


class Mixing(Stack):
    """A skip that ``mix`` brings in, in the middle."""

    def __init__(self, mix: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__(4)
        self.mix, self.join = mix, nn.Linear(2 * 8, 8)
        self.norm = nn.LayerNorm(2 * 8)

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        h = first = self.blocks[0](h, t)
        h = self.blocks[2](self.blocks[1](h, t), t)
        return self.blocks[3](self.mix(self, h, first), t)


MIXES: dict[str, tuple[Any, bool]] = {
    "normed": (lambda m, h, first: m.join(m.norm(torch.cat([h, first], dim=-1))), True),
    "shortcut": (lambda m, h, first: m.join(torch.cat([h, first], -1)) + torch.tanh(m.join(torch.cat([h, first], -1))), True),
    "lerp": (lambda m, h, first: torch.lerp(first, h, 0.3), False),
    "scaled": (lambda m, h, first: 0.7 * h + 0.3 * first, False),
    "update": (lambda m, h, first: h + m.join(torch.cat([h, first], dim=-1)), False),
    "projected": (lambda m, h, first: torch.tanh(m.join.weight[:, :8] @ h.mT).mT, False),
}


@pytest.mark.parametrize("name", MIXES)
def test_only_a_joined_and_weighted_skip_makes_a_stream_that_is_cached_whole(name: str) -> None:
    mix, whole = MIXES[name]
    (out,) = find_region(capture(seeded(lambda: Mixing(mix)), *example())).live_outs
    assert out.stream is not None
    assert (out.base is None) == whole


def test_a_long_skip_across_the_end_of_the_region_is_one_live_out_more() -> None:
    region = find_region(traced_variant("long_skip").gm, front=0, back=3)
    assert region.cached == ("blocks.0",)
    assert len(region.live_outs) == 1
    region = find_region(traced_variant("long_skip").gm, front=1, back=2)
    assert region.cached == ("blocks.1",)
    region = find_region(traced_variant("long_skip").gm, front=0, back=2)
    assert [out.base is not None for out in region.live_outs] == [True, True]
    assert all(out.stream is out.base for out in region.live_outs)


def test_a_refiner_before_the_chain_is_left_out() -> None:
    region = find_region(traced_variant("refined").gm)
    assert region.lists == ("blocks",)
    assert (region.front, region.cached) == (("blocks.0",), ("blocks.1", "blocks.2"))


def test_something_light_between_the_blocks_is_computed_before_the_region() -> None:
    assert_expected_inline(
        described(find_region(traced_variant("side").gm)),
        """\
front: blocks.0
cached: blocks.1 blocks.2
back:
in: first t side
out: add_3 = first + ...
hoisted: side""",
    )


def test_glue_between_blocks_belongs_to_the_region() -> None:
    assert_expected_inline(
        described(find_region(traced_variant("glued").gm)),
        """\
front: blocks.0
cached: blocks.1 blocks.2
back:
in: h getitem control
out: add_4 = h + ...""",
    )


def test_a_stream_written_in_place_enters_as_a_copy() -> None:
    assert_expected_inline(
        described(find_region(traced_variant("in_place").gm)),
        """\
front: blocks.0
cached: blocks.1 blocks.2
back:
in: x getitem
out: x_2 = x + ...
copied: x""",
    )


def test_only_weights_that_the_region_reads_enter_it_and_come_last() -> None:
    gm = traced_variant("stack").gm
    live_ins = [node.name for node in find_region(gm, front=2).live_ins]
    weights = [name for name in live_ins if "_parameters_" in name]
    assert len(weights) == 2
    assert all("_2_" in name for name in weights)
    assert live_ins[-2:] == weights


@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_front_and_back_blocks_of_any_stack(depth: int, front: int, back: int) -> None:
    region = chosen(traced_stack(depth).gm, front=front, back=back)
    paths = tuple(f"blocks.{i}" for i in range(depth))
    if front + back >= depth:
        assert region == Refusal("nothing_left", f"{depth} - {front} - {back}")
        return
    assert isinstance(region, Region)
    assert (region.front, region.back) == (paths[:front], paths[depth - back :])
    assert region.cached == paths[front : depth - back]
    (out,) = region.live_outs
    assert out.additive
    assert out.base is not None and out.base not in region.nodes


def test_front_and_back_blocks_are_counted_over_the_whole_chain() -> None:
    gm = traced_variant("joint").gm
    region = find_region(gm, front=2, back=1)
    assert region.front == ("double_blocks.0", "double_blocks.1")
    assert region.cached == ("double_blocks.2", "single_blocks.0")
    assert region.back == ("single_blocks.1",)
    only_single = find_region(gm, front=3, back=0)
    assert only_single.cached == ("single_blocks.0", "single_blocks.1")
    assert chosen(gm, front=3, back=2) == Refusal("nothing_left", "5 - 3 - 2")


@pytest.mark.parametrize(
    ("named", "cached", "first", "last"),
    [
        (("blocks.1", "blocks.1"), ("blocks.1",), "linear_2", "h_1"),
        (("blocks.0", "blocks.1"), ("blocks.0", "blocks.1"), "linear_1", "h_1"),
        (("blocks.1.mlp", "blocks.2"), ("blocks.1.mlp", "blocks.2"), "linear_2", "h_2"),
    ],
)
def test_a_region_named_by_its_modules(named: tuple[str, str], cached: tuple[str, ...], first: str, last: str) -> None:
    region = find_region(traced_variant("stack").gm, named=named)
    assert (region.cached, region.front, region.back, region.lists) == (cached, (), (), ())
    assert (region.nodes[0].name, region.nodes[-1].name) == (first, last)


def test_a_named_region_that_adds_to_nothing_is_cached_whole() -> None:
    (out,) = find_region(traced_variant("stack").gm, named=("head", "head")).live_outs
    assert out.base is None
    assert not out.additive


def test_a_region_may_be_named_where_no_blocks_are_found() -> None:
    gm = capture(seeded(Plain), *example())
    assert chosen(gm) == Refusal("no_blocks")
    assert find_region(gm, named=("embed", "embed")).cached == ("embed",)


def test_refuses_names_that_are_not_there_or_run_the_other_way() -> None:
    gm = traced_variant("stack").gm
    assert chosen(gm, named=("blocks.7", "blocks.7")) == Refusal("region_not_found", "blocks.7")
    assert chosen(gm, named=("blocks.0", "block")) == Refusal("region_not_found", "block")
    assert chosen(gm, named=("blocks.2", "blocks.0")) == Refusal("region_backwards", "blocks.2 .. blocks.0")


def test_refuses_random_numbers_inside_and_allows_them_in_front() -> None:
    gm = capture(seeded(lambda: Stack(block=DropoutBlock)).train(), *example())
    refusal = chosen(gm)
    assert isinstance(refusal, Refusal) and refusal.key == "random"
    assert "dropout" in refusal.detail

    class DropoutInFront(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0] = DropoutBlock()

    region = find_region(capture(seeded(DropoutInFront).train(), *example()))
    assert region.front == ("blocks.0",)
    assert isinstance(chosen_in(lambda: Stack(block=DropoutBlock)), Region), "dropout in evaluation mode draws nothing"


def test_refuses_to_write_to_what_is_read_behind_the_region() -> None:
    refusal = chosen_in(lambda: InPlaceStack(keeps=True))
    assert isinstance(refusal, Refusal) and refusal.key == "writes_outside"


class WritesInput(nn.Module):
    """Adds to a view of its input once it has read it."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.view = SimpleBlock(), view

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.block(x, t)
        self.view(x).add_(1.0)
        return out + x


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1),
    "select": lambda x: x.select(1, 0),
    "detach": lambda x: x.detach(),
    "diagonal": lambda x: torch.diagonal(x, dim1=1, dim2=2),
    "expand_as": lambda x: x.expand_as(x),
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("view", VIEWS)
def test_refuses_to_write_to_an_input_of_the_model(view: str) -> None:
    class NoEmbedding(Stack):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.run_blocks(x, t)

    gm = capture(seeded(lambda: NoEmbedding(block=lambda: WritesInput(VIEWS[view]))), torch.ones(2, 3, 8), torch.ones(2, 1, 1))
    refusal = chosen(gm, front=0)
    assert isinstance(refusal, Refusal) and refusal.key == "writes_outside"
    assert isinstance(chosen(gm, front=1), Region)


def test_nothing_is_moved_before_a_write_to_what_it_reads() -> None:
    class ReadsLate(Stack):
        """What the head needs is made of the stream's memory once the second block has written to it."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = t[:, None, None]
            first = self.blocks[0](self.embed(x), t)
            h = self.blocks[1](first, t)
            side = first * 2.0
            return self.head(self.blocks[2](h, t)) * self.head(side)

    region = chosen_in(lambda: ReadsLate(block=lambda: WritesInput(VIEWS["view"])))
    assert isinstance(region, Region)
    assert region.hoisted == ()


def test_refuses_to_cut_an_autocast_region() -> None:
    class Mixed(Stack):
        def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
            h = self.blocks[0](h, t)
            with torch.autocast("cpu", torch.bfloat16):
                h = self.blocks[2](self.blocks[1](h, t), t)
            return h.float()

    gm = capture(seeded(Mixed), *example())
    refusal = chosen(gm, named=("blocks.0", "blocks.1"))
    assert isinstance(refusal, Refusal) and refusal.key == "cuts_context"
    refusal = chosen(gm, front=0, back=1)
    assert isinstance(refusal, Refusal) and refusal.key == "cuts_context"
    assert isinstance(chosen(gm, named=("blocks.1", "blocks.1")), Region), "whole inside of it"


class Measuring(Stack):
    """Numbers made of the tensors' sizes between the blocks are read behind them."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        second = self.blocks[1](self.blocks[0](h, t), t)
        size = second.shape[1]
        for n in range(self.numbers):
            size = size * 3 + n
        return self.blocks[2](second, t) / size


def test_sizes_made_between_the_blocks_are_computed_before_the_region() -> None:
    region = find_region(capture(seeded(lambda: Measuring(1)), *example(), dynamic=True))
    assert len(region.hoisted) in (1, 2)
    assert len(region.live_outs) == 1


def test_refuses_what_is_not_a_tensor_where_it_leaves() -> None:
    refusal = chosen(capture(seeded(lambda: Measuring(3)), *example(), dynamic=True))
    assert isinstance(refusal, Refusal) and refusal.key == "not_a_tensor"
    assert refusal.detail.endswith(": SymInt")


def test_refuses_a_region_that_nothing_leaves() -> None:
    class Unused(Stack):
        def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
            super().run_blocks(h, t)
            return h

    assert chosen_in(Unused) == Refusal("nothing_leaves")


def test_a_shorter_chain_is_taken_where_the_longest_has_no_base() -> None:
    class Widening(JointDiT):
        """The single blocks work on a sequence that the double ones never had."""

        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            t = t[:, None, None]
            h, context = self.run_double(self.embed(x), self.embed_context(context), t)
            h = h.repeat(1, 2, 1)
            for block in self.single_blocks:
                h = block(h, t)
            return self.head(h)

    region = find_region(capture(seeded(lambda: Widening(4, 2)), *example(context=True)))
    assert region.lists == ("double_blocks",)
    assert all(out.base is not None for out in region.live_outs)


def test_an_analysis_changes_nothing_and_chooses_the_same_again() -> None:
    for name in ("joint", "in_place", "side"):
        captured = traced_variant(name)
        gm = captured.copy()
        before, output = compact(gm), run(gm, captured.inputs)
        assert find_region(gm) == find_region(gm)
        assert compact(gm) == before
        assert torch.equal(run(gm, captured.inputs)[0], output[0])


def test_every_variant_has_a_region() -> None:
    for name in VARIANTS:
        region = find_region(traced_variant(name).gm)
        assert region.cached, name
        assert all(out.stream is not None for out in region.live_outs), name
