"""CUDA graphs, with fakes: programs that replay into memory of their own, as recorded ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cache_dit.passes import BranchOptions
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func

import cache_dit
from cache_dit.backend import FallbackCompiler
from cache_dit.errors import CacheDitError
from cache_dit.lowering import LOWERINGS, lower, with_cache_examples
from cache_dit.lowering.replays import hold_buffers
from cache_dit.messages import CacheDitWarning
from cache_dit.options import resolve_options
from cache_dit.torch_internals import inner_compiler, makes_cuda_graphs
from tests import models

STEPS = 12
EXACT: dict[str, Any] = {"noise_scale": 0.0, "language": "en"}


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FallbackCompiler, "replays_on", lambda self, device: True)


def is_held(node: fx.Node) -> bool:
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


class Recorder:
    """An inner compiler whose programs give the same memory at each call of the model, and spoil what was given before it.

    ``addresses``: for each program where the inputs lay that are said to stay where they are, at each call.
    """

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.addresses: dict[int, list[tuple[int, ...]]] = {}
        # of the programs within this call: one that is called again is recorded again
        self.called: list[int] = []

    def begin(self) -> None:
        """A call of the model: what was given before it may be written over."""
        for old in self.given:
            old.fill_(float("nan"))
        self.given, self.called = [], []

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        held = [i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder") if is_held(node)]
        number = len(self.addresses)
        calls = self.addresses[number] = []
        recordings: dict[int, list[Tensor]] = {}

        def replay(*args: Any) -> Any:
            calls.append(tuple(args[i].data_ptr() for i in held))
            outputs = gm.forward(*args)
            recorded = recordings.setdefault(self.called.count(number), [torch.empty_like(each) for each in outputs])
            self.called.append(number)
            for mine, each in zip(recorded, outputs, strict=True):
                mine.copy_(each)
            self.given.extend(recorded)
            return list(recorded)

        return replay


def sampled(model: nn.Module, begin: Callable[[], None] = lambda: None) -> list[Tensor]:
    """The results of a run, all of them kept to its end."""
    x = models.example()[0]
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1).tolist()
    cache_dit.new_run(model, STEPS, sigmas, "euler", "flow")
    results = []
    for sigma in sigmas[:-1]:
        begin()
        results.append(model(x + sigma, torch.full((models.BATCH,), sigma)))
    return results


STRATEGIES: list[dict[str, Any]] = [
    {"forecast": "reuse"},
    {"forecast": "lagrange", "order": 2},
    {"strategy": "adaptive", "tolerance": 0.5},
    {"strategy": "adaptive", "target_speedup": 2.0, "correction": True},
    {"residual_dtype": "int8"},
]


@pytest.mark.parametrize("lowering", ["specialize", "pieces"])
@pytest.mark.parametrize("options", STRATEGIES)
def test_what_is_kept_outlives_the_next_replay(_recorded: None, lowering: str, options: dict[str, Any]) -> None:
    """Statistics, fronts and the caller's results, in every strategy: the same as without replays."""
    found = []
    for recorder in (None, Recorder()):
        torch._dynamo.reset()
        model = models.seeded(models.TinyDiT)
        inner = "eager" if recorder is None else recorder
        cache_dit.enable_cache(model, inner=inner, lowering=lowering, **EXACT, **options)
        found.append((sampled(model, (lambda: None) if recorder is None else recorder.begin), cache_dit.get_stats(model)))
    (wanted, expected), (results, stats) = found
    assert stats.hits == expected.hits > 0
    assert stats.mean_forecast_error == expected.mean_forecast_error
    assert stats.nonfinite == 0
    for result, each in zip(results, wanted, strict=True):
        assert torch.equal(result, each)


def test_without_copies_the_next_replay_shows() -> None:
    """The stand-in spoils what a recorded program would."""
    recorder = Recorder()
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner=recorder, forecast="reuse", correction=False, **EXACT)
    with pytest.warns(CacheDitWarning, match="NaN"):
        results = sampled(model, recorder.begin)
    assert torch.equal(results[0], results[-1]), "the memory of one recording"


@pytest.mark.parametrize("order", [1, 2])
def test_buffers_lie_at_as_many_places_as_are_kept(_recorded: None, order: int) -> None:
    recorder = Recorder()
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, inner=recorder, forecast="lagrange", order=order, correction=False, **EXACT)
    for _ in range(3):
        sampled(model, recorder.begin)
    assert len(recorder.addresses) == 2
    for calls in recorder.addresses.values():
        assert len(calls) > order + 1 == len(set(calls))


@pytest.mark.parametrize("options", [BranchOptions(), BranchOptions(history=2, front_clock=True, residual_dtype=torch.int8)])
@pytest.mark.parametrize("form", ["specialize", "pieces", "cond"])
def test_what_programs_write_to_is_said_to_stay_where_it_is(form: str, options: BranchOptions) -> None:
    captured = models.traced_variant("stack")
    gm = captured.copy()
    _, inputs = models.rewrite(gm, options)
    seen: dict[str, bool] = {}

    def compile_inner(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        seen.update({node.name: is_held(node) for node in graph.graph.nodes if node.op == "placeholder"})
        return graph.forward

    lower(LOWERINGS[form], gm, inputs, with_cache_examples(gm, captured.inputs), compile_inner, replayed=True)
    buffers = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name.startswith(("cache_res", "cache_sc", "cache_fr"))]
    assert all(map(is_held, buffers)) and hold_buffers(gm, inputs) == len(buffers)
    small = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name.startswith("cache_") and n not in buffers]
    assert len(small) == 4 and not any(map(is_held, small)), "made anew, or given by a program: copied at each replay"
    if form != "pieces":
        # pieces name their inputs by their places
        assert all(seen[node.name] for node in buffers)


def test_torchs_compiler_hears_which_inputs_stay(_recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as module

    real, static = module.compile_fx, []

    def inner(gm: fx.GraphModule, examples: Sequence[Any], **known: Any) -> Any:
        static.append((list(known["static_input_idxs"]), len(examples)))
        return make_boxed_func(gm.forward)

    def compile_fx(gm: fx.GraphModule, examples: Sequence[Any], config_patches: Any = None) -> Any:
        assert config_patches["triton.cudagraphs"] is True
        return real(gm, examples, inner_compile=inner)

    monkeypatch.setattr(module, "compile_fx", compile_fx)
    model = models.seeded(models.TinyDiT)
    options = {"forecast": "lagrange", "correction": False, "inner_options": {"mode": "reduce-overhead"}}
    cache_dit.enable_cache(model, **options, **EXACT)
    sampled(model)
    assert cache_dit.get_stats(model).hits > 0
    (reuse, inputs_of_reuse), (compute, inputs_of_compute) = static
    # the two residuals come last
    for places, count in ((reuse, inputs_of_reuse), (compute, inputs_of_compute)):
        assert {count - 2, count - 1} <= set(places)


class Marks:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr("cache_dit.runtime.call._may_replay", lambda backend: bool(backend.program.inner_options))
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.mark)

    def mark(self) -> None:
        self.count += 1


class BreakingBlock(models.Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, temb)


@pytest.mark.parametrize("block", [models.Block, BreakingBlock])
@pytest.mark.parametrize("graphs", [True, False])
def test_each_call_is_a_step_to_cuda_graphs(monkeypatch: pytest.MonkeyPatch, block: type[nn.Module], graphs: bool) -> None:
    """Also where each block is a program of its own: within a call their results must live."""
    marks = Marks(monkeypatch)
    model = models.seeded(lambda: models.TinyDiT(block=block))
    chosen = {"graphs": True} if graphs else {}
    cache_dit.enable_cache(model, inner="eager", inner_options=chosen, **EXACT)
    sampled(model)
    assert marks.count == (STEPS if graphs else 0)


@pytest.mark.parametrize(
    ("inner", "mode", "options", "makes"),
    [
        ("inductor", None, {}, False),
        ("inductor", "reduce-overhead", {}, True),
        ("inductor", "max-autotune", {}, True),
        ("inductor", "max-autotune-no-cudagraphs", {}, False),
        ("inductor", None, {"mode": "max-autotune"}, True),
        ("inductor", None, {"mode": "max-autotune", "triton.cudagraphs": False}, False),
        ("inductor", None, {"triton.cudagraphs": True}, True),
        ("cudagraphs", None, {}, True),
        ("eager", "max-autotune", {}, False),
        (lambda gm, examples: gm.forward, None, {"triton.cudagraphs": True}, False),
    ],
)
def test_who_makes_cuda_graphs(inner: Any, mode: str | None, options: dict[str, Any], makes: bool) -> None:
    assert makes_cuda_graphs(inner, mode, options) is makes
    if inner == "inductor":
        program = resolve_options({"inner_options": options}).program()
        compiler = FallbackCompiler(program, mode, None)
        assert compiler.replays_on(torch.device("cuda", 0)) is makes
        assert compiler.replays_on(torch.device("cpu")) is False


def test_the_users_own_setting_of_inductor_counts() -> None:
    from torch._inductor import config

    with config.patch({"triton.cudagraphs": True}):
        assert makes_cuda_graphs("inductor", None, {})


def test_a_mode_among_the_options_of_inductor_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_fx(gm: fx.GraphModule, examples: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    gm = models.traced_variant("stack").copy()
    options = {"mode": "max-autotune", "coordinate_descent_tuning": False}
    inner_compiler("inductor", None, options)(gm, ())
    assert seen == [{"max_autotune": True, "triton.cudagraphs": True, "coordinate_descent_tuning": False}]
    with pytest.raises(CacheDitError, match="Unrecognized mode=fastest"):
        inner_compiler("inductor", None, {"mode": "fastest"})
