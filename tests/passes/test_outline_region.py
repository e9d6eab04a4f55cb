"""The region as a submodule: the same operations, the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cache_dit.passes import Refusal, choose_region, find_blocks, outline_region
from cache_dit.passes.outline_region import REGION_NAME
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.models import (
    VARIANTS,
    Captured,
    Stack,
    capture,
    compact,
    example,
    find_region,
    run,
    seeded,
    traced,
    traced_stack,
    traced_variant,
)


def body_of(gm: fx.GraphModule) -> fx.GraphModule:
    body = gm.get_submodule(REGION_NAME)
    assert isinstance(body, fx.GraphModule)
    return body


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs and weights in double precision."""
    return [value.double() for value in inputs]


def outlined(captured: Captured, **wanted: int) -> fx.GraphModule:
    gm = captured.copy()
    assert outline_region(gm, find_region(gm, **wanted)) == 1
    return gm


def assert_same(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(outputs) == len(expected)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=0.0, atol=0.0, equal_nan=True)
        assert output.stride() == value.stride()


def test_snapshot() -> None:
    assert_expected_inline(
        compact(outlined(traced_variant("stack"))),
        """\
(x, t)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = add(%0, %4)
%6 = cache_region(%5, %1, w, w, w, w)
%7 = getitem(%6, 0)
%8 = linear(%7, w, w)
return (%8)

cache_region:
(h, getitem)
%0 = linear(h, w, w)
%1 = tanh(%0)
%2 = mul(%1, getitem)
%3 = add(h, %2)
%4 = linear(%3, w, w)
%5 = tanh(%4)
%6 = mul(%5, getitem)
%7 = add(%3, %6)
return (%7)""",
    )


def test_snapshot_of_a_region_that_writes_to_its_input() -> None:
    gm = outlined(traced_variant("in_place"), front=1, back=1)
    assert_expected_inline(
        compact(gm),
        """\
(x, t)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = iadd(%0, %4)
%6 = cache_region(%5, %1, w, w)
%7 = getitem(%6, 0)
%8 = linear(%7, w, w)
%9 = tanh(%8)
%10 = mul(%9, %1)
%11 = iadd(%7, %10)
%12 = linear(%11, w, w)
return (%12)

cache_region:
(x, getitem)
%0 = .clone(x)
%1 = linear(%0, w, w)
%2 = tanh(%1)
%3 = mul(%2, getitem)
%4 = iadd(%0, %3)
return (%4)""",
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_outlined_graph_gives_the_same_bits(name: str) -> None:
    captured = traced_variant(name)
    expected = run(captured.copy(), captured.inputs)
    assert_same(run(outlined(captured), captured.inputs), expected)
    wide = run(captured.copy(), widened(captured.inputs))
    assert wide[0].dtype == torch.float64
    assert_same(run(outlined(captured), widened(captured.inputs)), wide)


@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_any_cut_of_any_stack_gives_the_same_bits(depth: int, front: int, back: int, seed: int) -> None:
    captured = traced_stack(depth)
    gm = captured.copy()
    region = choose_region(gm, find_blocks(gm), front=front, back=back)
    if isinstance(region, Refusal):
        return
    outline_region(gm, region)
    x, t = example(seed=seed)
    inputs = captured.fed(x=x, t=t)
    assert_same(run(gm, inputs), run(captured.copy(), inputs))


def test_inputs_that_are_written_in_place_keep_their_values() -> None:
    captured = traced_variant("in_place")
    before = [value.clone() for value in captured.inputs]
    run(outlined(captured), captured.inputs)
    assert_same(captured.inputs, before)


def test_the_submodule_stands_alone_and_gives_what_leaves() -> None:
    captured = traced_variant("two_streams")
    gm = outlined(captured)
    call = next(node for node in gm.graph.nodes if node.op == "call_module")
    examples = call.meta["example_value"]
    assert len(examples) == 2
    assert not [node for node in body_of(gm).graph.nodes if node.op == "get_attr"]
    assert [node.name for node in body_of(gm).graph.nodes if node.op == "placeholder"] == [node.name for node in call.args]
    users = sorted(user.args[1] for user in call.users)
    assert users == [0, 1]
    for user in call.users:
        assert tuple(user.meta["example_value"].shape) == tuple(examples[user.args[1]].shape)


def test_nested_graphs_move_into_the_submodule() -> None:
    gm = outlined(traced_variant("branching"))
    nested = [node.target for node in body_of(gm).graph.nodes if node.op == "get_attr"]
    assert len(nested) == 4
    for name in nested:
        assert isinstance(body_of(gm).get_submodule(str(name)), fx.GraphModule)


def test_tensors_that_are_attributes_become_inputs() -> None:
    captured = traced_variant("stack")
    gm = captured.copy()
    inside = next(node for node in gm.graph.nodes if node.name == "tanh_1")
    gm.register_buffer("shift", torch.ones(8))
    with gm.graph.inserting_before(inside):
        attribute = gm.graph.get_attr("shift")
        attribute.meta["example_value"] = torch.ones(8)
        shifted = gm.graph.call_function(torch.add, (inside.args[0], attribute))
        shifted.meta = dict(inside.args[0].meta)
    inside.args = (shifted,)
    expected = run(gm, captured.inputs)
    outline_region(gm, find_region(gm))
    assert_same(run(gm, captured.inputs), expected)
    assert not [node for node in body_of(gm).graph.nodes if node.op == "get_attr"]


def test_a_named_region_is_outlined_too() -> None:
    captured = traced_variant("stack")
    gm = captured.copy()
    outline_region(gm, find_region(gm, named=("blocks.1.mlp", "head")))
    assert_same(run(gm, captured.inputs), run(captured.copy(), captured.inputs))
    assert not [node for node in gm.graph.nodes if node.name in ("linear_2", "linear_4")]


def test_what_is_computed_before_the_region_gives_the_same_bits_for_other_sizes() -> None:
    class Measuring(Stack):
        def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
            second = self.blocks[1](self.blocks[0](h, t), t)
            return self.blocks[2](second, t) / (second.shape[1] * 3)

    captured = traced(seeded(Measuring), *example(tokens=6), dynamic=True)
    gm = outlined(captured)
    other = traced(seeded(Measuring), *example(tokens=9), dynamic=True)
    assert_same(run(gm, other.inputs), run(other.copy(), other.inputs))


def test_a_second_run_finds_nothing_more_to_outline() -> None:
    gm = outlined(traced_variant("stack"))
    assert choose_region(gm, find_blocks(gm)) == Refusal("no_blocks")


def test_the_graph_that_was_copied_is_left_alone() -> None:
    gm = capture(seeded(Stack), *example())
    before = compact(gm)
    captured = Captured(gm, ())
    outlined(captured)
    assert compact(gm) == before
