"""The forms of one branch: for the same decisions they give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from cache_dit.passes import BranchOptions, CacheInputs
from torch import Tensor, fx, nn

from cache_dit.lowering import DEFAULT_LOWERING, LOWERINGS, InnerCompiler, Unsuited, choose_lowering, with_cache_examples
from cache_dit.runtime.program import Programs
from cache_dit.torch_internals import copy_dynamo_graph, inner_compiler
from tests.models import (
    VARIANTS,
    WRITES,
    AutocastStack,
    CacheState,
    InPlaceStack,
    JointDiT,
    SharedStack,
    Stack,
    example,
    rewrite,
    run,
    seeded,
    traced_variant,
)

EVERYTHING = BranchOptions(history=2, noise=True, front_clock=True)
EAGER = inner_compiler("eager", None, {})
# compute, compute, then skip and compute in turns, with the weights of a forecast that extrapolates
DECISIONS = ((True, ()), (True, ()), (False, (1.5, -0.5)), (True, ()), (False, (1.0,)))


class Step(NamedTuple):
    """What one call gave: the model's outputs with what was measured, and what is stored behind it."""

    outputs: list[Tensor]
    stored: list[Tensor]


def lowered(
    name: str, form: str, compile_inner: InnerCompiler = EAGER, options: BranchOptions = EVERYTHING
) -> tuple[Programs, CacheInputs, tuple[Any, ...]]:
    captured = traced_variant(name)
    gm = captured.copy()
    _, inputs = rewrite(gm, options)
    gm.recompile()
    examples = with_cache_examples(gm, captured.inputs)
    return LOWERINGS[form].lower(gm, examples, compile_inner), inputs, captured.inputs


def driven(programs: Programs, state: CacheState, calls: Sequence[Sequence[Any]], outputs: int) -> list[Step]:
    """Run the decisions over the calls' inputs, with the runtime's bookkeeping done by hand."""
    steps = []
    with torch.no_grad():
        for n, ((compute, weights), flat) in enumerate(zip(DECISIONS, calls, strict=True)):
            operands = state.operands(compute=compute, weights=weights, noise=0.01, key=n)
            given = list((programs.compute if compute else programs.reuse)([*flat, *operands]))
            steps.append(Step([each.clone() for each in given], state.snapshot()))
            if compute:
                state.computed(given[outputs].clone())
    return steps


def assert_equal(steps: Sequence[Step], expected: Sequence[Step]) -> None:
    for n, (step, wanted) in enumerate(zip(steps, expected, strict=True)):
        for ours, theirs in zip((*step.outputs, *step.stored), (*wanted.outputs, *wanted.stored), strict=True):
            assert torch.equal(ours, theirs), n


def assert_close(steps: Sequence[Step], expected: Sequence[Step]) -> None:
    for step, wanted in zip(steps, expected, strict=True):
        for ours, theirs in zip((*step.outputs, *step.stored), (*wanted.outputs, *wanted.stored), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Three blocks, each with glue of its own: compiled whole.
NOTHING_ALIKE = ("glued", "side", "transposed")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forms_agree_bit_for_bit_and_computed_steps_with_the_model(name: str) -> None:
    results = {}
    for form in LOWERINGS:
        if form == "pieces" and name in NOTHING_ALIKE:
            with pytest.raises(Unsuited, match="nothing_alike"):
                lowered(name, form)
            continue
        programs, inputs, flat = lowered(name, form)
        results[form] = driven(programs, CacheState(inputs), [flat] * len(DECISIONS), outputs=1)
    for steps in results.values():
        assert_equal(steps, results["specialize"])
    expected = run(traced_variant(name).copy(), traced_variant(name).inputs)[0]
    for (compute, _), step in zip(DECISIONS, results["specialize"], strict=True):
        assert torch.equal(step.outputs[0], expected) is compute


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("name", ["stack", "two_streams", "joint"])
def test_the_forms_agree_bit_for_bit_whatever_residuals_are_kept_in(name: str, dtype: torch.dtype) -> None:
    options = replace(EVERYTHING, residual_dtype=dtype)
    results = []
    for form in LOWERINGS:
        programs, inputs, flat = lowered(name, form, options=options)
        results.append(driven(programs, CacheState(inputs), [flat] * len(DECISIONS), outputs=1))
    for steps in results[1:]:
        assert_equal(steps, results[0])


class Compiled(NamedTuple):
    """The steps of each form, those of the eager specialized form for the same calls, and what the model itself gave."""

    forms: dict[str, list[Step]]
    eager: list[Step]
    plain: list[Tensor]


def compiled(
    build: Callable[[], nn.Module],
    calls: Sequence[tuple[Tensor, ...]],
    inner: str,
    dynamic: bool | None = None,
    forms: Sequence[str] = tuple(LOWERINGS),
) -> Compiled:
    """Lower inside a backend, as it is done in earnest, then call the programs by hand."""
    made: list[tuple[dict[str, Programs], CacheInputs]] = []
    flats: list[tuple[Any, ...]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graph = copy_dynamo_graph(gm)
        _, inputs = rewrite(graph, EVERYTHING)
        graph.recompile()
        all_examples = with_cache_examples(graph, examples)
        compile_inner = inner_compiler(inner, None, {})
        programs = {name: LOWERINGS[name].lower(graph, all_examples, compile_inner) for name in forms}
        programs["eager"] = LOWERINGS["specialize"].lower(graph, all_examples, EAGER)
        made.append((programs, inputs))

        def forward(*flat: Any) -> Any:
            flats.append(flat)
            return gm.forward(*flat)

        return forward

    torch._dynamo.reset()
    model = torch.compile(seeded(build), backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        plain = [model(*arguments) for arguments in calls]
    torch._dynamo.reset()
    ((programs, inputs),) = made
    batch, tokens = calls[0][0].shape[:2]
    sizes = [(batch, tokens, 8), *([(batch, 3, 8)] if len(calls[0]) == 3 else []), (batch, tokens, 8)]
    steps = {name: driven(each, CacheState(inputs, sizes), flats, outputs=1) for name, each in programs.items()}
    return Compiled(steps, steps.pop("eager"), plain)


def test_aot_eager_agrees_to_rounding() -> None:
    found = compiled(lambda: JointDiT(2, 0), [example(context=True)] * 5, "aot_eager")
    for steps in found.forms.values():
        assert_close(steps, found.eager)


@pytest.mark.parametrize(("inner", "assert_alike"), [("eager", assert_equal), ("aot_eager", assert_close)])
def test_one_program_serves_every_call_under_dynamic_shapes(
    inner: str, assert_alike: Callable[[list[Step], list[Step]], None]
) -> None:
    found = compiled(lambda: Stack(2), [example(seed=seed, tokens=7) for seed in range(5)], inner, dynamic=True)
    for steps in found.forms.values():
        assert_alike(steps, found.eager)
        for (compute, _), step, plain in zip(DECISIONS, steps, found.plain, strict=True):
            assert torch.allclose(step.outputs[0], plain, rtol=1e-5, atol=1e-6) is compute


@pytest.mark.slow
def test_inductor_agrees_to_rounding() -> None:
    found = compiled(lambda: Stack(2), [example(seed=seed) for seed in range(5)], "inductor")
    for steps in found.forms.values():
        assert_close(steps, found.eager)


def test_the_form_is_the_one_asked_for() -> None:
    assert {name: choose_lowering(name).name for name in LOWERINGS} == {name: name for name in LOWERINGS}
    assert choose_lowering("auto").name == DEFAULT_LOWERING


TIED = {
    **{f"shared_{name}": lambda name=name: SharedStack(WRITES[name]) for name in WRITES},
    "autocast": lambda: AutocastStack(6),
    "in_place": InPlaceStack,
}


@pytest.mark.parametrize("name", TIED)
def test_pieces_tied_by_memory_or_by_a_context_agree(name: str) -> None:
    found = compiled(TIED[name], [example(seed=seed) for seed in range(5)], "aot_eager", forms=("specialize", "pieces"))
    assert_close(found.forms["pieces"], found.forms["specialize"])
    for (compute, _), step, plain in zip(DECISIONS, found.forms["pieces"], found.plain, strict=True):
        assert torch.allclose(step.outputs[0], plain, rtol=1e-4, atol=1e-5) is compute


def test_the_examples_of_the_cache_inputs_follow_those_of_the_model() -> None:
    captured = traced_variant("stack")
    gm = captured.copy()
    _, inputs = rewrite(gm, EVERYTHING)
    examples = with_cache_examples(gm, captured.inputs)
    assert all(a is b for a, b in zip(examples, captured.inputs, strict=False))
    added = examples[len(captured.inputs) :]
    wanted = CacheState(inputs).operands(compute=True)
    assert [(value.shape, value.dtype) for value in added] == [(value.shape, value.dtype) for value in wanted]


def test_lowering_leaves_the_graph_it_was_given_alone() -> None:
    captured = traced_variant("stack")
    gm = captured.copy()
    _, inputs = rewrite(gm, EVERYTHING)
    examples = with_cache_examples(gm, captured.inputs)
    text = str(gm.graph)
    first = LOWERINGS["specialize"].lower(gm, examples, EAGER)
    assert str(gm.graph) == text
    second = LOWERINGS["cond"].lower(gm, examples, EAGER)
    assert str(gm.graph) == text
    steps = [driven(each, CacheState(inputs), [captured.inputs] * 5, outputs=1) for each in (first, second)]
    assert_equal(*steps)


class Recording:
    """An inner compiler that notes what it is given."""

    def __init__(self) -> None:
        self.graphs: list[tuple[list[str], int]] = []

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self.graphs.append((names, len(examples)))
        return gm.forward


def test_specialize_compiles_each_decision_with_what_it_reads_alone() -> None:
    recording = Recording()
    lowered("stack", "specialize", recording)
    assert len(recording.graphs) == 2
    for names, examples in recording.graphs:
        assert len(names) == examples
    reading = sorted(recording.graphs, key=lambda graph: graph[1])
    reuse, compute = (set(names) for names, _ in reading)
    assert {"cache_control", "cache_key", "cache_measured"} <= reuse
    assert not {"cache_pred", "cache_control", "cache_key", "cache_measured"} & compute
    assert not any("blocks_modules_1" in name for name in reuse)
    assert {name for name in compute if name.startswith("cache_")} == {
        "cache_front",
        "cache_residual_0_0",
        "cache_residual_0_1",
    }


def test_cond_compiles_one_program_that_takes_everything() -> None:
    recording = Recording()
    programs, _, _ = lowered("stack", "cond", recording)
    assert programs.compute is programs.reuse
    ((names, examples),) = recording.graphs
    assert len(names) == examples
    assert "cache_pred" in names
