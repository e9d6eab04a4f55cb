"""Graphs cut at the borders of their blocks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
import torch
from cache_dit.passes import BranchOptions, Piece, Unsplit, specialize_branch, split_pieces
from cache_dit.passes.split_pieces import _layout
from torch import Tensor, fx, nn

from cache_dit.torch_internals import fill_examples
from tests.models import (
    WRITES,
    AutocastStack,
    Captured,
    InPlaceStack,
    PartedBlock,
    PartedStack,
    SharedStack,
    SimpleBlock,
    Stack,
    example,
    rewrite,
    seeded,
    traced,
    traced_stack,
)


def cut(captured: Captured, compute: bool = True, options: BranchOptions | None = None, **wanted: object) -> list[Piece]:
    pieces = split_pieces(specialized(captured, compute, options, **wanted))
    assert isinstance(pieces, list), pieces
    return pieces


def specialized(
    captured: Captured, compute: bool = True, options: BranchOptions | None = None, **wanted: object
) -> fx.GraphModule:
    gm = captured.copy()
    rewrite(gm, options, **wanted)
    gm.recompile()
    specialize_branch(gm, compute=compute)
    fill_examples(gm)
    return gm


def keys(pieces: Sequence[Piece]) -> list[int]:
    """The key of each piece as a small number: equal numbers, equal keys."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(piece.key, len(numbers)) for piece in pieces]


def test_equal_blocks_are_one_program_at_any_depth() -> None:
    # embedding, block, …, block, what is stored, head
    assert keys(cut(traced_stack(3))) == [0, 1, 1, 1, 2, 3]
    assert keys(cut(traced_stack(8))) == [0, *[1] * 8, 2, 3]


def test_the_stride_along_a_single_element_is_no_difference() -> None:
    def key(batch: int, stride: int) -> Hashable:
        graph = fx.Graph()
        node = graph.placeholder("x")
        node.meta["example_value"] = torch.empty_strided((batch, 4, 2), (stride, 2, 1))
        return _layout(node.meta["example_value"], node)

    assert key(1, 8) == key(1, 16)
    assert key(2, 8) != key(2, 16)


class ScaledBlock(PartedBlock):
    """Computes something for the stream that nobody reads behind the last block."""

    def part(self, side: Tensor) -> Tensor:
        return side * 2.0


@pytest.mark.parametrize(("block", "same"), [(PartedBlock, True), (ScaledBlock, False)])
def test_views_that_nobody_reads_make_no_program_of_their_own(block: type[PartedBlock], same: bool) -> None:
    captured = traced(seeded(lambda: PartedStack(4, block)), *example())
    pieces = cut(captured)
    first, *blocks, last = [piece for piece in pieces if len(piece.inputs) > 4]
    assert (last.key == blocks[-1].key) is same
    assert [output is None for output in last.outputs] == ([False, True] if same else [False])
    assert all(None not in piece.outputs for piece in (first, *blocks))


def test_a_skipped_step_has_nothing_of_its_own_but_the_prediction() -> None:
    computed, skipped = cut(traced_stack(4)), cut(traced_stack(4), compute=False)
    own = {piece.key for piece in skipped} - {piece.key for piece in computed}
    assert len(skipped) == 4
    assert own == {skipped[2].key}


def test_the_front_clock_is_measured_where_residuals_are_stored_and_used() -> None:
    options = BranchOptions(front_clock=True)
    computed, skipped = (cut(traced_stack(4), compute, options) for compute in (True, False))
    assert keys(computed) == [0, 1, 1, 1, 1, 2, 3]
    assert keys(skipped) == [0, 1, 2, 3]
    for pieces in (computed, skipped):
        assert [node.name for node in pieces[-2].inputs if "cache_front" in node.name]


@pytest.mark.parametrize("other", ["width", "dtype", "operation", "constant"])
def test_blocks_that_differ_have_programs_of_their_own(other: str) -> None:
    class Wider(SimpleBlock):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    class Other(SimpleBlock):
        def update(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.sigmoid(self.mlp(x)) * t

    class Scaled(SimpleBlock):
        def update(self, x: Tensor, t: Tensor) -> Tensor:
            return super().update(x, t) * 2.0

    class Rounded(SimpleBlock):
        def update(self, x: Tensor, t: Tensor) -> Tensor:
            return super().update(x, t).to(torch.bfloat16)

    block = {"width": Wider, "dtype": Rounded, "operation": Other, "constant": Scaled}[other]

    def build() -> nn.Module:
        model = Stack(4)
        model.blocks[2] = block()
        return model

    assert keys(cut(traced(seeded(build), *example()))) == [0, 1, 1, 2, 1, 3, 4]


def test_additions_in_place_do_not_tie_blocks_together() -> None:
    pieces = cut(traced(seeded(InPlaceStack), *example()))
    assert len(pieces) > 4
    names = {str(node.target) for piece in pieces for node in piece.graph.graph.nodes}
    assert not any("iadd" in name or name == "add_" for name in names)


@pytest.mark.parametrize("write", WRITES)
def test_memory_that_is_written_to_and_shared_stays_in_one_piece(write: str) -> None:
    pieces = cut(traced(seeded(lambda: SharedStack(WRITES[write])), *example()))
    # embedding, block 0, blocks 1 to 4 in one (the fifth begins with what reads the view), 5, 6, 7, what is stored, head
    assert keys(pieces) == [0, 1, 2, 1, 1, 1, 3, 4]


def test_a_context_that_spans_blocks_stays_in_one_piece() -> None:
    pieces = cut(traced(seeded(lambda: AutocastStack(6)), *example()))
    for piece in pieces:
        names = [getattr(node.target, "__name__", "") for node in piece.graph.graph.nodes]
        assert names.count("_enter_autocast") == names.count("_exit_autocast")
    assert any("_enter_autocast" in str(piece.graph.graph) for piece in pieces)


def test_sizes_travel_with_the_tensors_that_need_them() -> None:
    captured = traced(seeded(lambda: Stack(4)), *example(tokens=7), dynamic=True)
    for piece in cut(captured):
        values = [node.meta["example_value"] for node in piece.inputs]
        carried = {value.node.expr for value in values if isinstance(value, torch.SymInt)}
        for value in values:
            if isinstance(value, Tensor):
                needed = {s for size in value.shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
                assert needed <= carried
    assert keys(cut(captured)) == [0, 1, 1, 1, 1, 2, 3]


def test_without_a_block_to_compute_the_cut_is_around_the_prediction() -> None:
    """All blocks are skipped: the embedding (without that of the time), the prediction, the head of a computed step."""
    computed, skipped = (cut(traced_stack(4), compute, front=0) for compute in (True, False))
    assert keys([*computed, *skipped]) == [0, 1, 1, 1, 1, 2, 3, *(4, 5, 3)]


def test_module_calls_are_refused() -> None:
    gm = specialized(traced_stack(4))
    gm.add_submodule("extra", nn.Identity())
    output = next(iter(reversed(gm.graph.nodes)))
    with gm.graph.inserting_before(output):
        gm.graph.call_module("extra", (output.args[0][0],))
    assert split_pieces(gm) == Unsplit("calls_modules")
