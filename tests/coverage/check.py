"""One class, cached through `enable_cache`: what is found in it, and how far its steps are from two references.

The references of a skipped step: the same graph with the region replaced by hand (`_ReplayedRegion`), and, where every
block takes its streams from the block before, the eager model with its blocks bypassed (`_Bypass`), which knows
nothing of graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from time import perf_counter
from typing import Any

import torch
from cache_dit.passes import Refusal, Region, outline_region
from cache_dit.passes.outline_region import REGION_NAME
from torch import Tensor, fx, nn

import cache_dit
from cache_dit.backend import find_region
from cache_dit.explanation import Explanation
from cache_dit.graph_report import RegionReport
from cache_dit.runtime.registry import sessions_of
from cache_dit.runtime.tracing import Capture
from cache_dit.structure import main_list
from cache_dit.torch_internals import copy_dynamo_graph

from .tiny import TinyModel

SCHEDULE = "110101"
HITS = SCHEDULE.count("0")
OPTIONS: dict[str, Any] = {
    "inner": "eager",
    "schedule": SCHEDULE,
    "forecast": "reuse",
    "noise_scale": 0.0,
    "correction": False,
    "language": "en",
}
# Relative to the largest element: the eager reference adds in another order.
ROUNDING = 1e-4

Outputs = list[Tensor]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found and measured for one tiny model. Errors are relative to the largest element of the reference."""

    label: str
    cached: bool
    lists: tuple[str, ...] = ()
    blocks: int = 0
    cached_blocks: int = 0
    live_outs: tuple[tuple[str, str | None], ...] = ()
    graphs: int = 0
    breaks: int = 0
    plain_graphs: int = 0
    plain_breaks: int = 0
    hits: int = 0
    computed_error: float = 0.0
    graph_error: float | None = None
    eager_error: float | None = None
    effect: float = 0.0
    blockwise: bool = False
    reason: str = ""
    wrong: tuple[str, ...] = ()
    variations: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


def check(tiny: TinyModel, *, whole: bool = True) -> Report:
    """Run a tiny model plain and cached, and compare every step.

    ``whole=False`` saves the second compilation (plain counts and replayed graph) where there is an eager reference, and the
    batches of several sizes.
    """
    start = perf_counter()
    model = tiny.build()
    steps = len(SCHEDULE)
    with torch.no_grad():
        plain = [tensors_of(model(**inputs)) for inputs in tiny.run(steps)]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()
        _reset()
        cache_dit.enable_cache(model, **OPTIONS)
        # steps of the first run may go to finding a way to trace the model
        compiling = _run(model, tiny)
        hits = cache_dit.get_stats(model).hits
        first = _run(model, tiny)
        second = _run(model, tiny)
        graphs, breaks = _compiled()
        stats, explanation = cache_dit.get_stats(model), cache_dit.explain(model)
        # the sizes become dynamic in the model that is compiled already
        varied = (("batches", _verdict(tiny, VARIATIONS["batches"], model)),) if whole and hits < stats.hits else ()
        cache_dit.disable_cache(model)
        untouched = _same_state(state, model) and torch.equal(random_state, torch.get_rng_state())
        regions = _regions(explanation)
        main = main_list(model)
        assert main is not None
        holds_main = any(region.holds(main) for region in regions)
        hits = stats.hits - hits
        cached = holds_main and hits == 2 * HITS
        blockwise = bool(explanation.notes)
        # the graph of another way of tracing is not the one that is replayed
        as_usual = sessions_of(model)[0].tracing.capture is Capture.DEFAULT
        replayed, plain_graphs, plain_breaks = None, graphs, breaks
        if whole or not tiny.streams:
            _reset()
            replayed = _replay(model, tiny)
            plain_graphs, plain_breaks = _compiled()
        bypassed = _bypass(model, regions, lambda: tiny.run(len(SCHEDULE))) if cached and tiny.streams else None
    _reset()
    skipped = [i for i, mark in enumerate(SCHEDULE) if mark == "0"]
    computed = [i for i, mark in enumerate(SCHEDULE) if mark == "1" or stats.hits == 0]
    computed_error = max(error(run[i], plain[i]) for i in computed for run in (compiling, first))
    graph_error = max(error(first[i], replayed[i]) for i in skipped) if cached and as_usual and replayed is not None else None
    eager_error = max(error(first[i], bypassed[i]) for i in skipped) if bypassed is not None else None
    effect = max(error(first[i], plain[i]) for i in skipped)
    wrong = [
        text
        for holds, text in (
            (computed_error <= ROUNDING, "computed steps differ from the plain model"),
            (graph_error is None or graph_error <= ROUNDING, "skipped steps differ from the replayed graph"),
            (eager_error is None or eager_error <= ROUNDING, "skipped steps differ from the eager reference"),
            (all(error(a, b) == 0.0 for a, b in zip(first, second, strict=True)), "a second run differs"),
            (untouched, "weights or random state changed"),
            (not cached or effect > 0.0, "skipping changed nothing, so nothing was tested"),
            (not cached or graph_error is not None or eager_error is not None, "skipped steps were compared with nothing"),
        )
        if not holds
    ]
    return Report(
        tiny.label,
        cached,
        graphs=graphs,
        breaks=breaks,
        plain_graphs=plain_graphs,
        plain_breaks=plain_breaks,
        hits=hits,
        blockwise=blockwise,
        computed_error=computed_error,
        graph_error=graph_error,
        eager_error=eager_error,
        effect=effect,
        reason="" if cached else _reason(explanation, regions if not holds_main else []),
        wrong=tuple(wrong),
        variations=varied,
        seconds=perf_counter() - start,
        **_found(regions),
    )


def _run(model: nn.Module, tiny: TinyModel) -> list[Outputs]:
    if tiny.time is None:
        cache_dit.new_run(model, num_steps=len(SCHEDULE))
    return [tensors_of(model(**inputs)) for inputs in tiny.run(len(SCHEDULE))]


def _regions(explanation: Explanation) -> list[RegionReport]:
    """The cached parts of a model, the largest first; recompilations of one count once."""
    regions = {graph.region.cached: graph.region for graph in explanation.graphs if graph.region is not None}
    return sorted(regions.values(), key=lambda region: -region.nodes)


def _found(regions: Sequence[RegionReport]) -> dict[str, Any]:
    return {
        "lists": tuple(name for region in regions for name in region.lists),
        "blocks": sum(len(region.front) + len(region.cached) + len(region.back) for region in regions),
        "cached_blocks": sum(len(region.cached) for region in regions),
        "live_outs": tuple((str(out), out.base) for region in regions for out in region.live_outs),
    }


def _reason(explanation: Explanation, others: Sequence[RegionReport]) -> str:
    """Why the largest graph is not cached, and the first graph break; and what else than the main list is cached."""
    uncached = sorted((graph for graph in explanation.graphs if graph.region is None), key=lambda graph: -graph.nodes)
    reasons = [f"only a side list is cached: {', '.join(region.lists)}" for region in others]
    reasons += [graph.refusal_text("en") for graph in uncached[:1]]
    reasons.extend(f"graph break: {reason}" for reason in dict.fromkeys(explanation.graph_breaks[:1]))
    reasons.extend(f"{key}: {count} calls" for key, count in explanation.refused.items())
    return "; ".join(reasons) or "nothing was compiled"


def tensors_of(result: Any) -> Outputs:
    """Every tensor of a model's result, in order, copied."""
    if isinstance(result, Tensor):
        return [result.clone()]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in tensors_of(value)]
    if isinstance(result, (list, tuple)):
        return [tensor for value in result for tensor in tensors_of(value)]
    if is_dataclass(result):
        return [tensor for each in fields(result) for tensor in tensors_of(getattr(result, each.name))]
    return []


def error(values: Outputs, reference: Outputs) -> float:
    """The largest difference, relative to the largest element of each tensor; infinite where one is not finite."""
    assert len(values) == len(reference) > 0
    worst = 0.0
    for value, wanted in zip(values, reference, strict=True):
        if value.is_floating_point() and value.numel():
            difference = (value.double() - wanted.double()).abs().max()
            ratio = float(difference / wanted.double().abs().max().clamp_min(1e-12))
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _same_state(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(value, now[name]) for name, value in state.items())


def _reset() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _compiled() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# ---- the graph with the region replaced by hand -----------------------------------------------------------------


class _ReplayedRegion(nn.Module):
    """Stands for the region: computes it and keeps what it added, or adds that to today's base."""

    def __init__(self, body: nn.Module, bases: Sequence[int | None], switch: dict[str, bool]) -> None:
        super().__init__()
        self.body, self.bases, self.switch = body, bases, switch
        self.stored: Outputs | None = None

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        entered = [None if base is None else args[base].clone() for base in self.bases]
        if self.switch["skip"] and self.stored is not None:
            pairs = zip(entered, self.stored, strict=True)
            return tuple(added.clone() if base is None else base + added for base, added in pairs)
        made = self.body(*args)
        pairs = zip(entered, made, strict=True)
        self.stored = [value.clone() if base is None else value - base for base, value in pairs]
        return tuple(made)


def _replay(model: nn.Module, tiny: TinyModel) -> list[Outputs]:
    switch = {"skip": False}

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graph = copy_dynamo_graph(gm)
        region = find_region(graph)
        if isinstance(region, Refusal):
            run: Callable[..., Any] = gm.forward
            return run
        outline_region(graph, region)
        setattr(graph, REGION_NAME, _ReplayedRegion(getattr(graph, REGION_NAME), _base_places(graph, region), switch))
        graph.recompile()
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    outputs = []
    for mark, inputs in zip(SCHEDULE, tiny.run(len(SCHEDULE)), strict=True):
        switch["skip"] = mark == "0"
        outputs.append(tensors_of(compiled(**inputs)))
    return outputs


def _base_places(graph: fx.GraphModule, region: Region) -> list[int | None]:
    call = next(node for node in graph.graph.nodes if node.target == REGION_NAME)
    names = [getattr(argument, "name", None) for argument in call.args]
    return [None if out.base is None else names.index(out.base.name) for out in region.live_outs]


# ---- the eager model with its blocks bypassed ---------------------------------------------------------------------


class _Bypass:
    """Takes over the cached blocks of an eager model: they compute, hand their streams on, or add what they added.

    What the cached part added is what its last block made when all computed, minus what that block was handed when
    the others handed their streams on.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.mode = "compute"
        self.last = blocks[-1]
        self.passed: Outputs = []
        self.added: Outputs = []
        for block in blocks:
            block.forward = self._instead_of(block, block.forward)  # type: ignore[method-assign]

    def _instead_of(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        places: list[int | None] = []
        makes_tuple = [False]

        def run(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if self.mode == "compute":
                result = forward(*args, **kwargs)
                makes_tuple[0] = isinstance(result, tuple)
                made = result if isinstance(result, tuple) else (result,)
                places[:] = _stream_places(made, given)
                if block is self.last:
                    self.passed = [out.clone() for out in made if out is not None]
                return result
            streams = [None if place is None else given[place] for place in places]
            if block is self.last:
                present = [stream for stream in streams if stream is not None]
                if self.mode == "measure":
                    self.added = [out - stream for out, stream in zip(self.passed, present, strict=True)]
                added = iter(self.added)
                streams = [None if stream is None else stream + next(added) for stream in streams]
            return tuple(streams) if makes_tuple[0] else streams[0]

        return run


def _stream_places(made: Sequence[Any], given: Sequence[Tensor]) -> list[int | None]:
    """For each tensor that a block makes, the argument it continues: the first one left of its shape."""
    taken: set[int] = set()
    places: list[int | None] = []
    for out in made:
        place = None
        if out is not None:
            alike = (i for i, value in enumerate(given) if i not in taken and value.shape == out.shape)
            place = next((i for i in alike if given[i].dtype == out.dtype), None)
            if place is None:
                raise LookupError("a block makes a tensor that continues none of its arguments")
            taken.add(place)
        places.append(place)
    return places


def _bypass(model: nn.Module, regions: Sequence[RegionReport], steps: Callable[[], Sequence[dict[str, Any]]]) -> list[Outputs]:
    """``steps`` gives the inputs of a run anew at each call: models may keep what they are given."""
    model = copy.deepcopy(model)
    parts = [_Bypass([model.get_submodule(path) for path in region.cached]) for region in regions]
    outputs = []
    for mark, inputs, again in zip(SCHEDULE, steps(), steps(), strict=True):
        for mode in ("compute", "measure") if mark == "1" else ("add",):
            for part in parts:
                part.mode = mode
            made = tensors_of(model(**(again if mode == "measure" else inputs)))
            if mode != "measure":
                outputs.append(made)
    return outputs


# ---- other dtypes, batches and inner compilers ------------------------------------------------------------------------

# bfloat16 has 8 bits, and the references add in another order.
BF16_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class Variation:
    """Another way to run a tiny model. ``batches``: one run each, in turns, so that sizes become dynamic."""

    name: str
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = (1,)
    inner: str = "eager"
    rounding: float = ROUNDING


VARIATIONS = {
    each.name: each
    for each in (
        Variation("bf16", dtype=torch.bfloat16, rounding=BF16_ROUNDING),
        Variation("batches", batches=(2, 3, 4, 2)),
        Variation("inductor", inner="inductor", rounding=1e-3),
    )
}


def check_variation(tiny: TinyModel, name: str) -> str:
    """A model of its own, cached and run in another way (see `_verdict`)."""
    variation = VARIATIONS[name]
    with torch.no_grad():
        _reset()
        model = tiny.build().to(variation.dtype)
        cache_dit.enable_cache(model, **{**OPTIONS, "inner": variation.inner})
        verdict = _verdict(tiny, variation, model)
        cache_dit.disable_cache(model)
    _reset()
    return verdict


def _verdict(tiny: TinyModel, variation: Variation, model: nn.Module) -> str:
    """``'yes'``, ``'not run: …'`` where the model itself does not run so, ``'no: …'`` or ``'WRONG: …'``."""
    try:
        plain_model = tiny.build().to(variation.dtype)
        plain = [
            [tensors_of(plain_model(**inputs)) for inputs in _varied(tiny, variation, batch)] for batch in variation.batches
        ]
    except Exception as raised:
        return f"not run: the model itself raises {type(raised).__name__}"
    hits = []
    # twice the first: steps may go to finding a way to trace the model
    for batch in (variation.batches[0], *variation.batches):
        if tiny.time is None:
            cache_dit.new_run(model, num_steps=len(SCHEDULE))
        made = [tensors_of(model(**inputs)) for inputs in _varied(tiny, variation, batch)]
        hits.append((cache_dit.get_stats(model).hits, made))
    regions = _regions(cache_dit.explain(model))
    verdict = "yes"
    for (before, _), (after, made), wanted, batch in zip(hits, hits[1:], plain, variation.batches, strict=False):
        if after - before != HITS:
            verdict = f"no: {after - before} hits"
        skipped = _bypass(plain_model, regions, lambda batch=batch: _varied(tiny, variation, batch)) if tiny.streams else None
        for i, mark in enumerate(SCHEDULE):
            right = wanted[i] if mark == "1" or after == before else skipped[i] if skipped is not None else None
            if right is not None and error(made[i], right) > variation.rounding:
                return f"WRONG: step {i + 1} of batch {batch} is {error(made[i], right):.0e} off"
    return verdict


def _varied(tiny: TinyModel, variation: Variation, batch: int) -> list[dict[str, Any]]:
    return [_cast(inputs, variation.dtype, batch, tiny.time) for inputs in tiny.run(len(SCHEDULE))]


def _cast(inputs: dict[str, Any], dtype: torch.dtype, batch: int, time: str | None) -> dict[str, Any]:
    """Floating inputs in a dtype (the timestep in its own), and everything that is one sample repeated."""

    def cast(value: Any, keep: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(cast(part, keep) for part in value)
        if not isinstance(value, Tensor):
            return value
        value = value.to(dtype) if value.is_floating_point() and not keep else value
        alone = batch > 1 and value.dim() > 0 and value.shape[0] == 1
        return value.repeat(batch, *(1 for _ in value.shape[1:])) if alone else value

    return {name: cast(value, name == time) for name, value in inputs.items()}
