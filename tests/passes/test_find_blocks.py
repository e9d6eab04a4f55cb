"""Which modules are the blocks, and which lists of them make a chain."""

from __future__ import annotations

import pytest
import torch
from cache_dit.passes import BlockChains, find_blocks
from cache_dit.passes.module_paths import in_module, is_compute
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.models import (
    WIDTH,
    Plain,
    SimpleBlock,
    Stack,
    StagedStack,
    TinyDiT,
    capture,
    compact,
    example,
    run,
    seeded,
    traced_variant,
)


def described(found: BlockChains) -> str:
    """Lists with their blocks, then the chains in the order in which they are tried."""
    lines = [f"{each.path}: {' '.join(block.path for block in each.blocks)}" for each in found.lists]
    return "\n".join([*lines, *(f"chain {' > '.join(each.path for each in chain)}" for chain in found.chains)])


def found_in(name: str) -> str:
    return described(find_blocks(traced_variant(name).gm))


def test_snapshot() -> None:
    gm = traced_variant("stack").gm
    (blocks,) = find_blocks(gm).lists
    nodes = list(gm.graph.nodes)
    lines = [
        f"{block.path} {block.class_name}: {' '.join(node.name for node in nodes[block.first : block.last + 1])}"
        for block in blocks.blocks
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
blocks.0 SimpleBlock: linear_1 tanh mul h
blocks.1 SimpleBlock: linear_2 tanh_1 mul_1 h_1
blocks.2 SimpleBlock: linear_3 tanh_2 mul_2 h_2""",
    )
    assert (blocks.first, blocks.last, blocks.nodes) == (blocks.blocks[0].first, blocks.blocks[-1].last, 12)


def test_a_chain_of_lists_is_tried_whole_first() -> None:
    assert_expected_inline(
        found_in("joint"),
        """\
double_blocks: double_blocks.0 double_blocks.1 double_blocks.2
single_blocks: single_blocks.0 single_blocks.1
chain double_blocks > single_blocks
chain double_blocks""",
    )


def test_a_list_that_runs_backwards_is_named_in_the_order_it_runs() -> None:
    assert_expected_inline(
        found_in("reversed"),
        """\
blocks: blocks.2 blocks.1 blocks.0
chain blocks""",
    )


def test_a_list_called_twice_counts_where_it_ran_first() -> None:
    gm = traced_variant("twice").gm
    found = find_blocks(gm)
    assert described(found) == found_in("stack")
    (blocks,) = found.lists
    first_block = [i for i, node in enumerate(gm.graph.nodes) if is_compute(node) and in_module(node, "blocks.0")]
    assert blocks.first == first_block[0]
    assert blocks.last < first_block[-1]


@pytest.mark.parametrize(
    ("name", "path", "blocks"), [("named", "*", "entry middle exit"), ("keyed", "named", "named.entry named.middle named.exit")]
)
def test_modules_of_one_class_are_blocks_whatever_their_names(name: str, path: str, blocks: str) -> None:
    assert found_in(name) == f"{path}: {blocks}\nchain {path}"


def test_attributes_with_numbers_are_a_list() -> None:
    assert_expected_inline(
        found_in("attributes"),
        """\
block: block0 block1 block2
chain block""",
    )


def test_lists_that_take_turns_are_one_list_of_composite_blocks() -> None:
    assert_expected_inline(
        found_in("interleaved"),
        """\
spatial + temporal: spatial.0 spatial.1 spatial.2
chain spatial + temporal""",
    )
    gm = traced_variant("interleaved").gm
    (blocks,) = find_blocks(gm).lists
    nodes = list(gm.graph.nodes)
    for place, block in enumerate(blocks.blocks):
        inside = [node for node in nodes[block.first : block.last + 1] if is_compute(node)]
        assert [any(in_module(node, f"temporal.{other}") for node in inside) for other in range(3)] == [
            other == place for other in range(3)
        ]


def test_a_refiner_of_its_own_is_another_chain_to_fall_back_from() -> None:
    assert_expected_inline(
        found_in("refined"),
        """\
refiner: refiner.0 refiner.1
blocks: blocks.0 blocks.1 blocks.2
chain refiner > blocks
chain blocks""",
    )


def test_two_stages_give_way_to_the_longer_lists_inside_them() -> None:
    assert_expected_inline(
        found_in("staged"),
        """\
blocks.0.blocks: blocks.0.blocks.0 blocks.0.blocks.1 blocks.0.blocks.2
blocks.1.blocks: blocks.1.blocks.0 blocks.1.blocks.1 blocks.1.blocks.2
chain blocks.0.blocks > blocks.1.blocks
chain blocks.0.blocks""",
    )


def test_lists_inside_the_blocks_of_a_longer_list_are_parts_of_its_blocks() -> None:
    gm = capture(seeded(lambda: StagedStack(3, 2)), *example())
    assert described(find_blocks(gm)) == "blocks: blocks.0 blocks.1 blocks.2\nchain blocks"


def test_a_part_called_again_behind_the_chain_does_not_stretch_its_block() -> None:
    gm = traced_variant("stray").gm
    (blocks,) = find_blocks(gm).lists
    positions = [i for i, node in enumerate(gm.graph.nodes) if is_compute(node) and in_module(node, "blocks.0")]
    assert positions[-1] > blocks.last
    assert blocks.blocks[0].last < blocks.blocks[1].first


class Far(Stack):
    """A second list behind some work that belongs to no block; it takes the first one's output, or the embedding."""

    def __init__(self, glue: int, feeds: bool) -> None:
        super().__init__()
        self.late = nn.ModuleList(SimpleBlock() for _ in range(2))
        self.glue, self.feeds = glue, feeds

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        first = super().run_blocks(h, t)
        second = first if self.feeds else h
        for _ in range(self.glue):
            second = torch.sin(second)
        for block in self.late:
            second = block(second, t)
        return first + second


@pytest.mark.parametrize(("glue", "feeds", "chained"), [(2, True, True), (2, False, False), (20, True, False)])
def test_a_list_joins_the_chain_where_it_follows_closely_and_is_fed_by_it(glue: int, feeds: bool, chained: bool) -> None:
    found = find_blocks(capture(seeded(lambda: Far(glue, feeds)), *example()))
    assert [each.path for each in found.lists] == ["blocks", "late"]
    assert (["blocks", "late"] in [[each.path for each in chain] for chain in found.chains]) is chained


class Named(Stack):
    """One block in a list, activations in a list, and two blocks in a dictionary with numbers for names."""

    def __init__(self) -> None:
        super().__init__(1)
        self.activations = nn.ModuleList(nn.SiLU() for _ in range(4))
        self.parts = nn.ModuleDict({"0": SimpleBlock(), "1": SimpleBlock()})

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        h = super().run_blocks(h, t)
        for activation in self.activations:
            h = activation(h)
        return self.parts["1"](self.parts["0"](h, t), t)


def test_only_repeated_modules_that_do_some_work_are_blocks() -> None:
    found = find_blocks(capture(seeded(Named), *example()))
    assert described(found) == "parts: parts.0 parts.1\nchain parts"


def test_nothing_repeated_gives_nothing() -> None:
    assert find_blocks(capture(seeded(Plain), *example())) == BlockChains((), ())
    assert find_blocks(capture(seeded(lambda: TinyDiT(1)), *example())) == BlockChains((), ())


def test_a_model_that_is_a_list_of_blocks() -> None:
    class Bare(nn.Sequential):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self:
                x = block(x, t)
            return x

    gm = capture(seeded(lambda: Bare(*(SimpleBlock() for _ in range(3)))), torch.ones(2, 3, WIDTH), torch.ones(2, 1, 1))
    assert described(find_blocks(gm)) == ": 0 1 2\nchain "


def test_an_analysis_changes_nothing_and_finds_the_same_again() -> None:
    captured = traced_variant("joint")
    gm = captured.copy()
    before, output = compact(gm), run(gm, captured.inputs)
    assert find_blocks(gm) == find_blocks(gm)
    assert compact(gm) == before
    assert torch.equal(run(gm, captured.inputs)[0], output[0])


class Again(nn.Module):
    """``times`` calls of one block; an embedder is called thrice, and its parts bear numbers."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.block = times, SimpleBlock()
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x) + self.embed(2.0 * x) + self.embed(3.0 * x)
        for _ in range(self.times):
            h = self.block(h, t)
        return h


def test_one_block_that_runs_again_and_again_is_a_list_of_its_calls() -> None:
    given = torch.ones(2, 3, WIDTH), torch.ones(2, 1, 1)
    found = described(find_blocks(capture(seeded(lambda: Again(5)), *given)))
    assert found == "block: block block@1 block@2 block@3 block@4\nchain block"
    # three calls of an embedder, which is less than half of the model, make no blocks
    assert find_blocks(capture(seeded(lambda: Again(2)), *given)).lists == ()
