"""The branch folded for a decision."""

from __future__ import annotations

import pytest
import torch
from cache_dit.passes import BranchOptions, Refusal, choose_region, find_blocks, specialize_branch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache_dit.torch_internals import copy_dynamo_graph
from tests.models import (
    VARIANTS,
    CacheState,
    Captured,
    SimpleBlock,
    Stack,
    capture,
    compact,
    example,
    rewrite,
    run,
    seeded,
    traced,
    traced_variant,
)


class Specialized:
    """The cond form of a variant and both graphs made of it."""

    def __init__(self, captured: Captured, options: BranchOptions | None = None, **wanted: object) -> None:
        self.captured = captured
        self.cond = captured.copy()
        self.region, self.inputs = rewrite(self.cond, options, **wanted)
        self.compute, self.reuse = copy_dynamo_graph(self.cond), copy_dynamo_graph(self.cond)
        assert specialize_branch(self.compute, compute=True) == 1
        assert specialize_branch(self.reuse, compute=False) == 1


def placeholders(gm: fx.GraphModule, used: bool) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "placeholder" and bool(node.users) is used]


def test_snapshot_of_the_compute_graph() -> None:
    assert_expected_inline(
        compact(Specialized(traced_variant("stack"), front=1, back=1).compute),
        """\
(x, t, cache_pred, cache_control, cache_key, cache_measured, cache_residual_0_0)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = add(%0, %4)
%6 = linear(%5, w, w)
%7 = tanh(%6)
%8 = mul(%7, %1)
%9 = add(%5, %8)
%10 = .to(%9, torch.float32)
%11 = .to(%5, torch.float32)
%12 = sub(%10, %11)
%13 = .abs(%12)
%14 = le(%13, 3.4028234663852886e+38)
%15 = zeros_like(%12)
%16 = where(%14, %12, %15)
%17 = .to(%16, torch.float32)
%18 = .to(%17, torch.float32)
%19 = getattr(%18, device)
%20 = .to(cache_residual_0_0, %19)
%21 = .to(%20, torch.float32)
%22 = sub(%18, %21)
%23 = invert(%14)
%24 = .sum(%23)
%25 = .to(%24, torch.float32)
%26 = mul(%18, %18)
%27 = .mean(%26)
%28 = mul(%22, %22)
%29 = .mean(%28)
%30 = .copy_(cache_residual_0_0, %17)
%31 = stack((%25, %27, %29))
%32 = linear(%9, w, w)
%33 = tanh(%32)
%34 = mul(%33, %1)
%35 = add(%9, %34)
%36 = linear(%35, w, w)
return (%36, %31)""",
    )


def test_snapshot_of_the_reuse_graph() -> None:
    assert_expected_inline(
        compact(Specialized(traced_variant("stack"), BranchOptions(history=2)).reuse),
        """\
(x, t, cache_pred, cache_control, cache_key, cache_measured, cache_residual_0_0, cache_residual_0_1)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = add(%0, %4)
%6 = .to(cache_residual_0_0, cpu)
%7 = .to(%6, torch.float32)
%8 = getitem(cache_control, 0)
%9 = mul(%7, %8)
%10 = .to(cache_residual_0_1, cpu)
%11 = .to(%10, torch.float32)
%12 = getitem(cache_control, 1)
%13 = mul(%11, %12)
%14 = add(%9, %13)
%15 = .to(%5, torch.float32)
%16 = add(%15, %14)
%17 = .to(%16, torch.float32)
%18 = zeros_like(cache_measured)
%19 = linear(%17, w, w)
return (%19, %18)""",
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_both_graphs_give_the_bits_of_the_cond_form(name: str) -> None:
    graphs = Specialized(traced_variant(name), BranchOptions(history=2, noise=True, front_clock=True))
    inputs = graphs.captured.inputs
    expected = run(graphs.captured.copy(), inputs)
    for compute, gm in ((True, graphs.compute), (False, graphs.reuse)):
        outputs, states = [], []
        for each in (gm, graphs.cond):
            state = CacheState(graphs.inputs)
            state.fill()
            operands = state.operands(compute=compute, weights=(1.5, -0.5), noise=0.01, key=11)
            outputs.append(run(each, [*inputs, *operands]))
            states.append(state.snapshot())
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        if compute:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], expected, strict=False))
        else:
            assert not torch.equal(outputs[0][0], expected[0])


def test_a_second_run_changes_nothing() -> None:
    graphs = Specialized(traced_variant("stack"))
    for gm in (graphs.compute, graphs.reuse):
        before = compact(gm)
        assert specialize_branch(gm, compute=True) == 0
        assert specialize_branch(gm, compute=False) == 0
        assert compact(gm) == before


def test_a_graph_without_a_branch_is_left_alone() -> None:
    gm = traced_variant("stack").copy()
    before = compact(gm)
    assert specialize_branch(gm, compute=True) == 0
    assert compact(gm) == before


def test_the_copy_it_was_made_from_keeps_its_branch() -> None:
    graphs = Specialized(traced_variant("stack"))
    assert [name for name, _ in graphs.cond.named_children()] == ["cache_compute", "cache_reuse"]
    assert any(node.target is torch.ops.higher_order.cond for node in graphs.cond.graph.nodes)


def test_the_reuse_graph_reads_no_weight_of_the_region() -> None:
    graphs = Specialized(traced_variant("stack"))
    unused = placeholders(graphs.reuse, used=False)
    assert unused[-2:] == ["cache_pred", "cache_key"]
    assert len(unused) == 2 + 2 * len(graphs.region.cached)
    assert all("blocks_modules_0" not in name for name in unused)
    assert {"cache_control", "cache_measured", "cache_residual_0_0"} <= set(placeholders(graphs.reuse, used=True))


def test_the_compute_graph_reads_no_weights_of_a_forecast() -> None:
    graphs = Specialized(traced_variant("stack"), BranchOptions(history=2, noise=True))
    assert placeholders(graphs.compute, used=False) == ["cache_pred", "cache_control", "cache_key", "cache_measured"]


def test_without_noise_the_reuse_graph_makes_no_numbers() -> None:
    def makes_numbers(options: BranchOptions) -> bool:
        nodes = Specialized(traced_variant("stack"), options).reuse.graph.nodes
        return any(node.target is torch.arange for node in nodes)

    assert makes_numbers(BranchOptions(noise=True))
    assert not makes_numbers(BranchOptions(noise=False))


def test_nothing_that_only_one_decision_needs_is_left_in_the_other() -> None:
    graphs = Specialized(traced_variant("stack"))
    tanhs = [sum(node.target is torch.tanh for node in gm.graph.nodes) for gm in (graphs.compute, graphs.reuse)]
    assert tanhs == [3, 1]
    for gm in (graphs.compute, graphs.reuse):
        assert not list(gm.named_children())
        assert not [node for node in gm.graph.nodes if node.op == "get_attr"]
        calls = [node for node in gm.graph.nodes if node.op.startswith("call") and not node.users]
        assert [node.target for node in calls] == (["copy_"] if gm is graphs.compute else [])


class Late(Stack):
    """Something is made in front that the later blocks alone read."""

    def run_blocks(self, h: Tensor, t: Tensor) -> Tensor:
        late = torch.cos(t)
        h = self.blocks[0](h, t)
        return self.blocks[2](self.blocks[1](h, late), late)


def test_what_is_made_for_the_region_alone_goes_with_it() -> None:
    graphs = Specialized(traced(seeded(Late), *example()))
    assert not any(node.target is torch.cos for node in graphs.region.nodes)
    made = [sum(node.target is torch.cos for node in gm.graph.nodes) for gm in (graphs.compute, graphs.reuse)]
    assert made == [1, 0]


def test_the_compute_graph_makes_no_copies_that_only_cond_needs() -> None:
    graphs = Specialized(traced_variant("transposed"))
    assert not [node for node in graphs.compute.graph.nodes if node.target in ("clone", "contiguous", "permute")]


def test_branches_of_the_model_itself_stay() -> None:
    graphs = Specialized(traced_variant("branching"))
    own = [sum(node.target is torch.ops.higher_order.cond for node in gm.graph.nodes) for gm in (graphs.compute, graphs.reuse)]
    assert own == [3, 1]
    assert specialize_branch(graphs.compute, compute=True) == 0


def test_all_passes_again_over_a_computed_graph_find_a_region_of_the_same_blocks() -> None:
    """What is inlined keeps the modules it was traced in."""
    graphs = Specialized(traced_variant("stack"))
    again = choose_region(graphs.compute, find_blocks(graphs.compute))
    assert not isinstance(again, Refusal)
    assert again.cached == graphs.region.cached
    assert isinstance(choose_region(graphs.reuse, find_blocks(graphs.reuse)), Refusal)


def test_the_choice_of_an_attention_kernel_is_kept() -> None:
    class Math(SimpleBlock):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                h = functional.scaled_dot_product_attention(x, x, x)
            return self.update(x + h, t) + x

    gm = capture(seeded(lambda: Stack(block=Math)), *example())
    chosen = [node.name for node in gm.graph.nodes if "_sdpa_kernel" in node.name]
    rewrite(gm)
    specialize_branch(gm, compute=True)
    kept = [node.name for node in gm.graph.nodes if "_sdpa_kernel" in node.name]
    assert len(kept) == len(chosen) > 0
