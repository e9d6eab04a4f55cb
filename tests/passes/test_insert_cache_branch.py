"""The cond form: what a computed step stores and measures, and what a skipped one predicts."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cache_dit.passes import (
    BranchOptions,
    CacheInputs,
    Refusal,
    choose_region,
    find_blocks,
    insert_cache_branch,
    outline_region,
)
from cache_dit.passes.insert_cache_branch import _cache_inputs
from cache_dit.passes.residual_math import noise, quantised, statistics_length
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from cache_dit.torch_internals import copy_dynamo_graph
from tests.models import (
    VARIANTS,
    CacheState,
    Captured,
    SimpleBlock,
    Stack,
    compact,
    example,
    find_region,
    rewrite,
    run,
    seeded,
    traced,
    traced_variant,
)

CPU = torch.device("cpu")


def give(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Make a graph return these nodes."""
    next(iter(reversed(gm.graph.nodes))).args = (tuple(nodes),)


class Branched:
    """A graph in the cond form, its cache, and what its region gave and was based on in the original."""

    def __init__(self, captured: Captured, options: BranchOptions | None = None, **wanted: object) -> None:
        self.captured = captured
        self.gm = captured.copy()
        self.region, self.inputs = rewrite(self.gm, options, **wanted)
        self.state = CacheState(self.inputs)
        self.count = len(run(captured.copy(), captured.inputs))

    def __call__(self, inputs: tuple[Tensor, ...] | None = None, **decision: object) -> tuple[Tensor, ...]:
        operands = self.state.operands(**decision)  # type: ignore[arg-type]
        return run(self.gm, [*(inputs or self.captured.inputs), *operands])

    def computed(self, inputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """A computed step, with the bookkeeping of the runtime behind it."""
        outputs = self(inputs, compute=True)
        self.state.computed(outputs[self.count])
        return outputs

    def truth(self, inputs: tuple[Tensor, ...] | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """(output, base) of each live-out, read in the original graph before anything is written over them."""
        gm = self.captured.copy()
        named = {node.name: node for node in gm.graph.nodes}
        wanted = [named[node.name] for out in self.region.live_outs for node in (out.node, out.base) if node is not None]
        copies = []
        for node in wanted:
            with gm.graph.inserting_after(node):
                copies.append(gm.graph.call_method("clone", (node,)))
        give(gm, copies)
        values = iter(run(gm, inputs or self.captured.inputs))
        return [(next(values), next(values) if out.base is not None else None) for out in self.region.live_outs]

    def live_outs(self, **decision: object) -> tuple[Tensor, ...]:
        """What the branch gives, before the rest of the model goes on with it."""
        gm = copy_dynamo_graph(self.gm)
        cond = next(node for node in gm.graph.nodes if node.target is torch.ops.higher_order.cond)
        with gm.graph.inserting_after(cond):
            outs = [gm.graph.call_function(operator.getitem, (cond, j)) for j in range(len(self.region.live_outs))]
        give(gm, outs)
        return run(gm, [*self.captured.inputs, *self.state.operands(**decision)])  # type: ignore[arg-type]

    def residuals(self, inputs: tuple[Tensor, ...] | None = None) -> list[Tensor]:
        return [output if base is None else output - base for output, base in self.truth(inputs)]


def test_snapshot() -> None:
    gm = traced_variant("stack").copy()
    rewrite(gm, front=1, back=1)
    assert_expected_inline(
        compact(gm),
        """\
(x, t, cache_pred, cache_control, cache_key, cache_measured, cache_residual_0_0)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = add(%0, %4)
%6 = cond(cache_pred, cache_compute, cache_reuse, (cache_control, cache_key, cache_measured, cache_residual_0_0, %5, %1, w...))
%7 = getitem(%6, 1)
%8 = getitem(%6, 0)
%9 = linear(%8, w, w)
%10 = tanh(%9)
%11 = mul(%10, %1)
%12 = add(%8, %11)
%13 = linear(%12, w, w)
return (%13, %7)

cache_compute:
(cache_control, cache_key, cache_measured, cache_residual_0_0, h, getitem)
%0 = linear(h, w, w)
%1 = tanh(%0)
%2 = mul(%1, getitem)
%3 = add(h, %2)
%4 = .to(%3, torch.float32)
%5 = .to(h, torch.float32)
%6 = sub(%4, %5)
%7 = .abs(%6)
%8 = le(%7, 3.4028234663852886e+38)
%9 = zeros_like(%6)
%10 = where(%8, %6, %9)
%11 = .to(%10, torch.float32)
%12 = .to(%11, torch.float32)
%13 = getattr(%12, device)
%14 = .to(cache_residual_0_0, %13)
%15 = .to(%14, torch.float32)
%16 = sub(%12, %15)
%17 = invert(%8)
%18 = .sum(%17)
%19 = .to(%18, torch.float32)
%20 = mul(%12, %12)
%21 = .mean(%20)
%22 = mul(%16, %16)
%23 = .mean(%22)
%24 = .copy_(cache_residual_0_0, %11)
%25 = .clone(%3, memory_format=torch.contiguous_format)
%26 = stack((%19, %21, %23))
return (%25, %26)

cache_reuse:
(cache_control, cache_key, cache_measured, cache_residual_0_0, h, getitem)
%0 = .to(cache_residual_0_0, cpu)
%1 = .to(%0, torch.float32)
%2 = getitem(cache_control, 0)
%3 = mul(%1, %2)
%4 = .to(h, torch.float32)
%5 = add(%4, %3)
%6 = .to(%5, torch.float32)
%7 = zeros_like(cache_measured)
return (%6, %7)""",
    )


def test_snapshot_of_the_front_clock() -> None:
    gm = traced_variant("stack").copy()
    rewrite(gm, BranchOptions(front_clock=True), front=1, back=1)
    lines = compact(gm).splitlines()
    assert_expected_inline(
        "\n".join(lines[: lines.index("cache_compute:")]),
        """\
(x, t, cache_pred, cache_control, cache_key, cache_measured, cache_front, cache_residual_0_0)
%0 = linear(x, w, w)
%1 = getitem(t, (:, None, None))
%2 = linear(%0, w, w)
%3 = tanh(%2)
%4 = mul(%3, %1)
%5 = add(%0, %4)
%6 = cond(cache_pred, cache_compute, cache_reuse, (cache_control, cache_key, cache_measured, cache_residual_0_0, %5, %1, w...))
%7 = getitem(%6, 1)
%8 = .to(%5, torch.float32)
%9 = .to(cache_front, torch.float32)
%10 = sub(%8, %9)
%11 = .abs(%10)
%12 = .mean(%11)
%13 = .abs(%9)
%14 = .mean(%13)
%15 = stack((%12, %14))
%16 = .copy_(cache_front, %5)
%17 = getitem(%6, 0)
%18 = linear(%17, w, w)
%19 = tanh(%18)
%20 = mul(%19, %1)
%21 = add(%17, %20)
%22 = linear(%21, w, w)
return (%22, %7, %15)
""",
    )


def test_a_graph_without_an_outlined_region_is_the_callers_mistake() -> None:
    gm = traced_variant("stack").copy()
    region = find_region(gm)
    with pytest.raises(AssertionError, match="outlined"):
        insert_cache_branch(gm, region, BranchOptions())
    outline_region(gm, region)
    insert_cache_branch(gm, region, BranchOptions())
    with pytest.raises(AssertionError, match="outlined"):
        insert_cache_branch(gm, region, BranchOptions())


def test_a_second_run_of_the_analyses_finds_nothing_more_to_cache() -> None:
    gm = traced_variant("stack").copy()
    rewrite(gm)
    assert choose_region(gm, find_blocks(gm)) == Refusal("no_blocks")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_computed_step_gives_the_same_bits_and_stores_the_residual(name: str) -> None:
    branched = Branched(traced_variant(name), BranchOptions(history=2))
    expected = run(branched.captured.copy(), branched.captured.inputs)
    outputs = branched(compute=True)
    assert len(outputs) == len(expected) + 1
    for output, value in zip(outputs, expected, strict=False):
        assert torch.equal(output, value)
    for history, residual in zip(branched.state.residuals, branched.residuals(), strict=True):
        assert torch.equal(history[1], residual)
        assert not history[0].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_skipped_step_repeats_the_computed_one(name: str) -> None:
    branched = Branched(traced_variant(name))
    expected = branched.computed()
    before = branched.state.snapshot()
    outputs = branched(compute=False)
    for output, value in zip(outputs[: branched.count], expected, strict=False):
        torch.testing.assert_close(output, value, rtol=1e-5, atol=1e-6)
        assert output.stride() == value.stride()
    assert all(torch.equal(a, b) for a, b in zip(branched.state.snapshot(), before, strict=True)), "reuse writes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_adds_the_weighted_residuals_to_the_base(dtype: torch.dtype) -> None:
    branched = Branched(traced_variant("two_streams", dtype), BranchOptions(history=3))
    assert branched.inputs.accumulate == dtype
    branched.state.fill()
    weights = (1.75, -1.0, 0.25)
    outputs = branched.live_outs(compute=False, weights=weights)
    for output, stored, (_, base) in zip(outputs, branched.state.residuals, branched.truth(), strict=True):
        assert base is not None
        assert output.dtype == dtype
        exact = base.double() + sum(w * r.double() for w, r in zip(weights, stored, strict=True))
        tolerance = 1e-15 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


def test_unused_weights_of_zero_leave_finite_buffers_out() -> None:
    branched = Branched(traced_variant("stack"), BranchOptions(history=2))
    branched.computed()
    branched.state.residuals[0][1].fill_(1e30)
    first = branched(compute=False, weights=(1.0,))[0]
    branched.state.residuals[0][1].zero_()
    assert torch.equal(branched(compute=False, weights=(1.0,))[0], first)


@pytest.mark.parametrize(
    ("name", "dtype"), [("stack", torch.float32), *(("two_streams", dtype) for dtype in (torch.float32, torch.float64))]
)
def test_the_numbers_measured_against_float64(name: str, dtype: torch.dtype) -> None:
    branched = Branched(traced_variant(name, dtype), BranchOptions(history=2))
    x, t = example(dtype)
    inputs = [branched.captured.fed(x=x * (1 + 0.1 * k), t=t - 0.1 * k) for k in range(3)]
    for each in inputs:
        measured = branched.computed(each)[branched.count]
    streams = [
        [np.asarray(residuals[j].double()) for residuals in map(branched.residuals, inputs)]
        for j in range(len(branched.state.residuals))
    ]
    expected = []
    for oldest, older, newest in streams:
        first, second = newest - older, older - oldest
        expected += [0.0, (newest**2).mean(), (first**2).mean(), (first * second).mean(), (second**2).mean()]
    assert measured.dtype == dtype
    assert len(measured) == len(streams) * statistics_length(2)
    np.testing.assert_allclose(np.asarray(measured.double()), expected, rtol=1e-4 if dtype == torch.float32 else 1e-11)


def test_what_is_not_finite_inside_the_region_is_stored_as_zero_and_counted() -> None:
    captured = traced_variant("stack")
    weights = [node.name for node in captured.gm.graph.nodes if node.op == "placeholder"]
    place = next(i for i, name in enumerate(weights) if "blocks_modules_1_modules_mlp_parameters_bias" in name)
    broken = list(captured.inputs)
    broken[place] = broken[place].detach().clone()
    broken[place][2] = float("nan")
    branched = Branched(Captured(captured.gm, tuple(broken)), front=1, back=1)
    outputs = branched.computed()
    expected = run(captured.copy(), broken)
    torch.testing.assert_close(outputs[0], expected[0], rtol=0.0, atol=0.0, equal_nan=True)
    (residual,), (truth,) = branched.state.residuals[0], branched.residuals()
    assert truth.isnan().any()
    assert torch.equal(residual, truth.nan_to_num(0.0))
    assert float(outputs[1][0]) == float(truth.isnan().sum())
    assert branched(compute=False)[0].isfinite().all()


def test_buffers_rotate_so_that_each_holds_one_step() -> None:
    captured = traced_variant("stack")
    branched = Branched(captured, BranchOptions(history=3))
    inputs = [captured.fed(x=example(seed=seed)[0]) for seed in range(5)]
    for each in inputs:
        branched.computed(each)
    for k in range(3):
        torch.testing.assert_close(branched.state.residuals[0][k], branched.residuals(inputs[4 - k])[0], rtol=0.0, atol=0.0)


def test_a_live_out_without_a_base_is_cached_whole() -> None:
    branched = Branched(traced_variant("stack"), named=("head", "head"))
    assert branched.region.live_outs[0].base is None
    expected = branched.computed()[0]
    assert torch.equal(branched.state.residuals[0][0], expected)
    moved = branched.captured.fed(x=example(seed=5)[0])
    assert torch.equal(branched(moved, compute=False)[0], expected)


def test_residuals_may_be_kept_in_a_smaller_dtype() -> None:
    branched = Branched(traced_variant("stack"), BranchOptions(residual_dtype=torch.bfloat16))
    assert [buffer.dtype for buffer in branched.inputs.residuals] == [torch.bfloat16]
    expected = branched.computed()
    assert torch.equal(branched.state.residuals[0][0], branched.residuals()[0].bfloat16())
    output = branched(compute=False)[0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected[0], rtol=0.02, atol=0.02)
    assert not torch.equal(output, expected[0])


SCALED = BranchOptions(history=2, residual_dtype=torch.int8)


def test_snapshot_of_residuals_with_scales() -> None:
    gm = traced_variant("stack").copy()
    rewrite(gm, BranchOptions(residual_dtype=torch.int8), front=1, back=1)
    lines = compact(gm).splitlines()
    assert_expected_inline("\n".join(lines[lines.index("cache_compute:") :]), """\
cache_compute:
(cache_control, cache_key, cache_measured, cache_residual_0_0, cache_scale_0_0, h, getitem)
%0 = linear(h, w, w)
%1 = tanh(%0)
%2 = mul(%1, getitem)
%3 = add(h, %2)
%4 = .to(%3, torch.float32)
%5 = .to(h, torch.float32)
%6 = sub(%4, %5)
%7 = .abs(%6)
%8 = le(%7, 1.7014117331926443e+38)
%9 = zeros_like(%6)
%10 = where(%8, %6, %9)
%11 = .abs(%10)
%12 = .amax(%11, -1, keepdim=True)
%13 = truediv(%12, 127.0)
%14 = .clamp(%13, min=1.1754943508222875e-38)
%15 = truediv(%10, %14)
%16 = .round(%15)
%17 = .clamp(%16, -127.0, 127.0)
%18 = .to(%17, torch.int8)
%19 = .to(%18, torch.float32)
%20 = mul(%19, %14)
%21 = getattr(%20, device)
%22 = .to(cache_residual_0_0, %21)
%23 = .to(%22, torch.float32)
%24 = .to(cache_scale_0_0, %21)
%25 = mul(%23, %24)
%26 = sub(%20, %25)
%27 = invert(%8)
%28 = .sum(%27)
%29 = .to(%28, torch.float32)
%30 = mul(%20, %20)
%31 = .mean(%30)
%32 = mul(%26, %26)
%33 = .mean(%32)
%34 = .copy_(cache_residual_0_0, %18)
%35 = .copy_(cache_scale_0_0, %14)
%36 = .clone(%3, memory_format=torch.contiguous_format)
%37 = stack((%29, %31, %33))
return (%36, %37)

cache_reuse:
(cache_control, cache_key, cache_measured, cache_residual_0_0, cache_scale_0_0, h, getitem)
%0 = .to(cache_residual_0_0, cpu)
%1 = .to(%0, torch.float32)
%2 = .to(cache_scale_0_0, cpu)
%3 = mul(%1, %2)
%4 = getitem(cache_control, 0)
%5 = mul(%3, %4)
%6 = .to(h, torch.float32)
%7 = add(%6, %5)
%8 = .to(%7, torch.float32)
%9 = zeros_like(cache_measured)
return (%8, %9)""")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_residuals_may_be_kept_in_eight_bits_with_a_scale_for_each_row(name: str, dtype: torch.dtype) -> None:
    branched = Branched(traced_variant(name), BranchOptions(history=2, residual_dtype=dtype))
    residuals = branched.residuals()
    assert len(branched.state.residuals) == 2 * len(residuals)
    expected = run(branched.captured.copy(), branched.captured.inputs)
    outputs = branched(compute=True)
    assert all(torch.equal(output, value) for output, value in zip(outputs, expected, strict=False))
    branched.state.computed(outputs[branched.count])
    for j, residual in enumerate(residuals):
        (newest, unused), (scale, no_scale) = branched.state.residuals[2 * j], branched.state.residuals[2 * j + 1]
        wanted, factor = quantised(residual, dtype, torch.float32)
        assert newest.dtype == dtype and torch.equal(newest.float(), wanted.float())
        assert torch.equal(scale, factor)
        assert not unused.float().any() and not no_scale.any()
    before = branched.state.snapshot()
    again = branched(compute=False)
    for output, value in zip(again[: branched.count], expected, strict=False):
        torch.testing.assert_close(output, value, rtol=0.1, atol=0.1)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(branched.state.snapshot(), before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_scales_are_of_the_precision_that_sums_are_made_in(dtype: torch.dtype, scale: torch.dtype) -> None:
    branched = Branched(traced_variant("two_streams", dtype), BranchOptions(residual_dtype=torch.int8))
    assert [buffer.dtype for buffer in branched.inputs.stored] == [torch.int8, scale] * 2
    expected = branched.computed()
    again = branched(compute=False)
    assert again[0].dtype == dtype
    torch.testing.assert_close(again[0], expected[0], rtol=0.05, atol=0.05)


def test_what_is_no_floating_number_and_what_is_no_row_is_kept_as_it_is() -> None:
    captured = traced_variant("stack")
    region = find_region(captured.copy())
    value = region.live_outs[0].node
    for example_value, dtype in ((torch.zeros(2, 3, dtype=torch.int64), torch.int64), (torch.zeros(()), torch.float32)):
        value.meta["example_value"] = example_value
        ((buffer,),) = (_cache_inputs(region, SCALED).residuals,)
        assert (buffer.dtype, buffer.scale, buffer.scales) == (dtype, None, None)


def test_the_inputs_say_what_is_to_be_held() -> None:
    gm = traced_variant("two_streams").copy()
    _, inputs = rewrite(gm, BranchOptions(history=2, front_clock=True, residual_device="cpu"))
    assert isinstance(inputs, CacheInputs)
    assert [tuple(buffer.sizes) for buffer in inputs.residuals] == [(2, 6, 8), (2, 3, 8)]
    assert inputs.front is not None and tuple(inputs.front.sizes) == (2, 6, 8)
    assert (inputs.history, inputs.accumulate, inputs.device) == (2, torch.float32, CPU)
    added = [node for node in gm.graph.nodes if node.op == "placeholder" and node.name.startswith("cache_")]
    assert [node.name for node in added] == [
        *("cache_pred", "cache_control", "cache_key", "cache_measured", "cache_front"),
        *("cache_residual_0_0", "cache_residual_0_1", "cache_residual_1_0", "cache_residual_1_1"),
    ]
    assert all(node._dynamo_source is None for node in added)
    scaled = rewrite(traced_variant("two_streams").copy(), SCALED)[1]
    assert [(tuple(each.sizes), each.dtype) for each in scaled.stored] == [
        ((2, 6, 8), torch.int8),
        ((2, 6, 1), torch.float32),
        ((2, 3, 8), torch.int8),
        ((2, 3, 1), torch.float32),
    ]
    state = CacheState(inputs)
    shapes = [tuple(operand.shape) for operand in state.operands(compute=True)]
    assert shapes == [tuple(node.meta["example_value"].shape) for node in added]
    assert [o.dtype for o in state.operands(compute=True)] == [node.meta["example_value"].dtype for node in added]


def test_the_front_clock_measures_how_far_the_front_moved() -> None:
    captured = traced_variant("stack")
    branched = Branched(captured, BranchOptions(front_clock=True))
    before = branched.truth()[0][1]
    assert before is not None and branched.state.front is not None
    outputs = branched.computed()
    assert len(outputs) == 3
    assert float(outputs[2][0]) == pytest.approx(float(before.abs().mean())), "against the zeros it began with"
    assert float(outputs[2][1]) == 0.0
    assert torch.equal(branched.state.front, before)
    moved = captured.fed(x=example(seed=3)[0])
    now = branched.truth(moved)[0][1]
    assert now is not None
    change = branched(moved, compute=False)[2]
    exact = [float((now.double() - before.double()).abs().mean()), float(before.double().abs().mean())]
    assert change.tolist() == pytest.approx(exact, rel=1e-5)
    assert torch.equal(branched.state.front, now), "kept in skipped steps too"


def test_noise_is_scaled_by_the_residual_and_set_by_its_key() -> None:
    branched = Branched(traced_variant("stack"), BranchOptions(noise=True), named=("blocks.1", "head"))
    measured = branched.computed()[1]
    state = torch.get_rng_state()
    calm = branched(compute=False, noise=0.0, key=7)[0]
    noisy = branched(compute=False, noise=0.01, key=7)[0]
    rms = float(branched.residuals()[0].double().pow(2).mean().sqrt())
    assert float(measured[1]) ** 0.5 == pytest.approx(rms, rel=1e-5)
    expected = 0.01 * rms * noise(calm.shape, calm.numel(), torch.tensor(7), 0, CPU, torch.float32)
    torch.testing.assert_close(noisy - calm, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(branched(compute=False, noise=0.01, key=7)[0], noisy)
    assert not torch.equal(branched(compute=False, noise=0.01, key=8)[0], noisy)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_live_out_has_noise_of_its_own() -> None:
    branched = Branched(traced_variant("two_streams", torch.float64), BranchOptions(noise=True))
    branched.computed()
    calm = branched.live_outs(compute=False, noise=0.0)
    noisy = branched.live_outs(compute=False, noise=0.1, key=3)
    for j, residual in enumerate(branched.residuals()):
        normal = (noisy[j] - calm[j]) / (0.1 * residual.pow(2).mean().sqrt())
        expected = noise(normal.shape, normal.numel(), torch.tensor(3), j, CPU, torch.float64)
        torch.testing.assert_close(normal, expected, rtol=1e-9, atol=1e-9)


class Permuting(SimpleBlock):
    """Its output lies in memory as [batch, channels, tokens]."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).transpose(1, 2).contiguous().transpose(1, 2)


class Dense(SimpleBlock):
    """Its output lies in memory as [batch, tokens, channels], whatever its input does."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).contiguous()


@pytest.mark.parametrize(("front", "last"), [(Dense, Permuting), (Permuting, Dense), (Permuting, Permuting)])
def test_both_branches_give_the_layout_of_the_original(front: type[nn.Module], last: type[nn.Module]) -> None:
    class Mixed(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0], self.blocks[2] = front(), last()

    branched = Branched(traced(seeded(Mixed), *example()))
    ((expected, base),) = branched.truth()
    assert base is not None
    assert [base.is_contiguous(), expected.is_contiguous()] == [front is Dense, last is Dense]
    for compute in (True, False):
        assert branched.live_outs(compute=compute)[0].stride() == expected.stride()


class Clashing(Stack):
    """Variables that have the names of cache inputs and live across the border of the region."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cache_key = torch.sin(t)[:, None, None]
        cache_control = self.embed(x)
        cache_measured = self.blocks[0](cache_control, cache_key)
        cache_residual_0_0 = self.blocks[1](cache_measured, cache_key)
        return self.head(self.blocks[2](cache_residual_0_0, cache_key))


def test_variables_with_the_names_of_cache_inputs_do_no_harm() -> None:
    branched = Branched(traced(seeded(Clashing), *example()))
    expected = run(branched.captured.copy(), branched.captured.inputs)
    assert torch.equal(branched.computed()[0], expected[0])
    torch.testing.assert_close(branched(compute=False)[0], expected[0])


def test_sizes_may_be_symbolic() -> None:
    captured = traced(seeded(Stack), *example(tokens=6), dynamic=True)
    gm = captured.copy()
    _, inputs = rewrite(gm, BranchOptions(history=2, noise=True, front_clock=True))
    assert any(isinstance(size, torch.SymInt) for size in inputs.residuals[0].sizes)
    larger = traced(seeded(Stack), *example(tokens=9, batch=3), dynamic=True)
    state = CacheState(inputs, [(3, 9, 8), (3, 9, 8)])
    outputs = run(gm, [*larger.inputs, *state.operands(compute=True)])
    assert torch.equal(outputs[0], run(larger.copy(), larger.inputs)[0])
    state.computed(outputs[1])
    torch.testing.assert_close(run(gm, [*larger.inputs, *state.operands(compute=False)])[0], outputs[0])


def test_the_regions_own_writes_do_not_reach_the_base() -> None:
    class Activated(nn.Module):
        """An activation by position, in place: over the block's input."""

        def __init__(self) -> None:
            super().__init__()
            self.block, self.activation = SimpleBlock(), nn.LeakyReLU(0.1, True)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.block(self.activation(x), t)

    branched = Branched(traced(seeded(lambda: Stack(block=Activated)), *example()))
    assert branched.region.copied_live_ins
    expected = branched.computed()
    torch.testing.assert_close(branched(compute=False)[0], expected[0])


def test_the_graph_has_one_branch_and_no_submodule_left() -> None:
    gm = traced_variant("joint").copy()
    rewrite(gm)
    called = [node for node in gm.graph.nodes if node.target is torch.ops.higher_order.cond]
    assert len(called) == 1
    assert sorted(name for name, child in gm.named_children() if isinstance(child, fx.GraphModule)) == [
        "cache_compute",
        "cache_reuse",
    ]
