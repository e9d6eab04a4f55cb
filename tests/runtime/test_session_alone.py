"""A session by itself, over a graph written by hand: what it decides, hands to the programs, keeps, counts and says."""

from __future__ import annotations

import copy
import math
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_dit.passes.insert_cache_branch import CacheInputs, ResidualBuffer
from torch import Tensor

from cache_dit.errors import CacheDitError, NoBlocksError
from cache_dit.forecasts import Point
from cache_dit.graph_report import GraphReport, RegionReport
from cache_dit.messages import CacheDitWarning
from cache_dit.options import resolve_options
from cache_dit.runtime import session as module_of_sessions
from cache_dit.runtime.observers import CallRecord
from cache_dit.runtime.program import Programs
from cache_dit.runtime.session import MAX_CONTEXTS, Session, context_names, noise_key
from cache_dit.runtime.tracing import MAX_COMPILES_IN_A_ROW, Capture

CPU = torch.device("cpu")
# Skips whatever it may.
GREEDY: dict[str, Any] = {"forecast": "reuse", "noise_scale": 0.0, "language": "en", "schedule": "1" + "0" * 60}


class Graph:
    """Takes (timestep, input, weight) and gives input + what the region adds: weight · timestep at each place.

    ``calls`` notes what each program was given: whether it computed, and the forecast's weights, noise scale and key.
    """

    def __init__(self, *, history: int = 1, front: bool = False, controls: tuple[int, ...] = (), frame: object = 0) -> None:
        buffer = ResidualBuffer((2,), torch.float32, CPU)
        self.inputs = CacheInputs((buffer,), history, buffer if front else None, torch.float32, CPU)
        self.programs = Programs(lambda flat: self._run(flat, True), lambda flat: self._run(flat, False))
        self.outputs, self.controls, self.frame, self.repeats = 1, controls, frame, True
        region = RegionReport(("blocks",), (), ("blocks.1",), (), 1, (), (), 1, history, 8)
        self.report = GraphReport(1, None, None, region)
        self.calls: list[tuple[bool, list[float], int]] = []
        self.poison = 0.0
        # relative changes of the front at the next calls
        self.changes: list[tuple[float, float]] = []

    def _run(self, flat: Sequence[Tensor], computes: bool) -> list[Any]:
        time, x, weight, pred, control, key, _, *buffers = flat[:3] + flat[-(len(flat) - 3) :]
        assert bool(pred) is computes
        self.calls.append((computes, control.tolist(), int(key)))
        residuals = buffers[1:] if self.inputs.front is not None else buffers
        change = [torch.tensor(self.changes.pop(0))] if self.inputs.front is not None else []
        if not computes:
            predicted = sum(c * r for c, r in zip(control[:-1], residuals, strict=True))
            return [x + predicted, torch.zeros(1), *change]
        added = torch.full_like(x, float(weight[0] * time.max().nan_to_num()) + self.poison)
        differences = [added - residual for residual in residuals]
        neighbours = [a - b for a, b in zip([added, *residuals], residuals, strict=False)]
        gram = [(neighbours[a] * neighbours[b]).mean() for a in range(len(differences)) for b in range(a, len(differences))]
        bad = (~added.isfinite()).sum().to(torch.float32)
        residuals[-1].copy_(added.nan_to_num())
        return [x + added, torch.stack([bad, added.square().mean(), *gram]), *change]

    def dynamic_sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return (args[1].shape[0],)

    def sizes(self, dynamic: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return (dynamic,) * (1 if self.inputs.front is None else 2)

    def watched(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        return (args[2],)

    def given(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        return (args[0], args[1])

    def plain(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[1] + args[2] * args[0].max()]

    def time(self, args: Sequence[Any]) -> float | None:
        value = float(args[0].max())
        return None if math.isnan(value) else value


class Driven:
    """A session and a graph, called as an enabled model calls them."""

    def __init__(self, graph: Any = None, **options: Any) -> None:
        self.session = Session(resolve_options({**GREEDY, **options}), "Driven_1", owns_calls=True)
        self.graph = graph if graph is not None else Graph()
        self.weight = torch.ones(2)

    def __call__(self, time: float, name: str | None = None, x: Tensor | None = None, graphs: Sequence[Any] = ()) -> bool:
        """One call: whether it was skipped."""
        with named(self.session, name):
            self.session.begin()
            x = torch.ones(2) if x is None else x
            before = len(self.graph.calls)
            for graph in graphs or (self.graph,):
                self.session.run(graph, (torch.tensor([time]), x, self.weight))
            self.session.end()
        return len(self.graph.calls) > before and not self.graph.calls[before][0]

    def hits(self, *times: float, name: str | None = None) -> str:
        return "".join("01"[self(time, name)] for time in times)

    @property
    def refused(self) -> dict[str, int]:
        return self.session.counters.refused


@contextmanager
def named(session: Session, name: str | None) -> Iterator[None]:
    token = context_names.set({id(session): name} if name is not None else {})
    try:
        yield
    finally:
        context_names.reset(token)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        yield


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


DOWN = (0.9, 0.7, 0.5, 0.3, 0.1)

# Runs and steps.


def test_a_run_skips_what_its_mask_says_and_is_counted() -> None:
    driven = Driven(schedule="10010")
    assert driven.hits(*DOWN, 0.05) == "011010"
    counters = driven.session.counters
    assert (counters.calls, counters.hits, counters.steps, counters.runs, counters.refused) == (6, 3, 6, 1, {})
    assert driven.hits(*DOWN) == "01101"
    assert (counters.calls, counters.hits, counters.steps, counters.runs) == (11, 6, 11, 2)


def test_a_long_run_is_skipped_to_its_end() -> None:
    driven = Driven(schedule="1" + "0" * 400)
    assert driven.hits(*(1.0 - step / 500 for step in range(400))) == "0" + "1" * 399


def test_the_first_step_computes_whatever_is_asked_for() -> None:
    driven = Driven(schedule="000")
    assert driven.hits(0.9, 0.7) == "01"
    assert driven.refused == {"first_call": 1}


def test_a_new_run_that_is_said_has_what_was_said_of_it() -> None:
    driven = Driven()
    driven.hits(0.9, 0.7)
    driven.session.new_run(3, [1.0, 0.5, 0.2, 0.0], "euler", "flow")
    assert driven.hits(0.6, 0.5) == "01"
    clock = driven.session.clock
    assert (clock.run, clock.num_steps, clock.solver, clock.prediction, clock.manual) == (2, 3, "euler", "flow", True)


def test_an_aborted_call_ends_the_run_and_is_not_counted() -> None:
    driven = Driven()
    assert driven.hits(0.9, 0.7) == "01"
    driven.session.begin()
    assert driven.session.is_under_way
    driven.session.abort()
    assert not driven.session.is_under_way
    assert driven.session.counters.calls == 2
    assert driven.hits(0.5, 0.3) == "01" and driven.session.counters.runs == 2
    # ended twice, or never begun, is nothing
    driven.session.end()
    assert driven.session.counters.calls == 4


def test_released_buffers_are_gone() -> None:
    driven = Driven(Graph(history=2, front=True))
    driven.graph.changes = [(0.1, 1.0)] * 2
    driven.hits(0.9)
    assert driven.session.cache_bytes == 3 * 2 * 4
    assert driven.session.statistics().cache_bytes == 24
    driven.session.release()
    assert driven.session.cache_bytes == 0 and not driven.session.contexts
    assert driven.hits(0.7) == "0"


# Contexts.


def test_a_name_of_the_users_goes_before_one_of_an_integration_and_that_before_the_sources() -> None:
    driven = Driven()
    source = SimpleNamespace(context=lambda: "source", starts_run=lambda: False)
    driven(0.9)
    driven.session.runs = source
    driven(0.9)
    driven.session.named_context = "integration"
    driven(0.9)
    driven(0.9, "user")
    assert list(driven.session.contexts) == [1, "source", "integration", "user"]
    # of another session's name nothing is heard
    with named(Session(resolve_options({}), "other", owns_calls=True), "theirs"):
        driven.session.begin()
        driven.session.abort()
    assert "theirs" not in driven.session.contexts


def test_all_contexts_of_a_step_share_its_decision() -> None:
    driven = Driven(schedule=None, skip_interval=2, warmup_steps=1)
    found = [(driven(time, "a"), driven(time, "b")) for time in DOWN]
    assert found == [(step % 2 == 0,) * 2 for step in range(1, 6)]
    counters = driven.session.counters
    assert (counters.calls, counters.steps, counters.hits, counters.runs) == (10, 5, 4, 1)


def test_no_more_steps_in_a_row_are_skipped_than_is_allowed() -> None:
    driven = Driven(schedule=None, skip_interval=1, warmup_steps=1, max_consecutive_hits=2)
    assert driven.hits(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2) == "01101101"


# listed noise levels that go back at step 8
RESTARTED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
STRATEGIES: dict[str, dict[str, Any]] = {
    "fixed": {"skip_interval": 2},
    "dynamic": {"strategy": "dynamic", "skip_interval": 2},
    "clock": {"strategy": "adaptive", "skip_interval": 1},
    "placement": {"strategy": "adaptive", "target_speedup": 4.0, "skip_interval": 1},
    "part of a run": {"skip_interval": 2, "start_percent": 0.2},
}


@pytest.mark.parametrize("forecast", ["auto", "reuse", "lagrange"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_skips_where_the_sampler_has_added_noise(name: str, forecast: str) -> None:
    options = {"schedule": None, "forecast": forecast, **STRATEGIES[name]}
    front = options.get("strategy") == "adaptive"
    driven = Driven(Graph(history=2, front=front), **options)
    driven.graph.changes = [(0.001, 1.0)] * len(RESTARTED)
    driven.session.new_run(None, [*RESTARTED, 0.0])
    hits = driven.hits(*RESTARTED)
    # without the jump it would have skipped there
    assert driven.refused == {"restart": 1}
    assert hits[7] == "0" and "1" in hits[:7] and "1" in hits[8:]
    # what was stored before the jump is in no forecast behind it
    weights = next(weights for computed, weights, _ in driven.graph.calls[8:] if not computed)
    assert weights[1] == 0.0 or "0" in hits[8 : hits.index("1", 8)]


def test_an_explicit_schedule_is_obeyed_where_the_sampler_has_added_noise() -> None:
    driven = Driven(schedule="1111111011111")
    driven.session.new_run(None, [*RESTARTED, 0.0])
    assert driven.hits(*RESTARTED) == "0000000100000"
    assert driven.refused == {}


def test_a_short_run_names_the_steps_that_it_skips_and_not_the_one_behind_a_jump() -> None:
    driven = Driven(schedule=None, skip_interval=1, warmup_steps=1, max_consecutive_hits=4)
    driven.session.new_run(None, [0.9, 0.7, 0.8, 0.4, 0.0])
    with pytest.warns(CacheDitWarning, match="will skip these: 2, 4\\."):
        assert driven.hits(0.9, 0.7, 0.8, 0.4) == "0101"


def test_unnamed_contexts_are_confirmed_before_anything_is_skipped() -> None:
    driven = Driven()
    prompts = torch.ones(2), torch.ones(2)
    found = ["01"[driven(time, x=x)] for time in DOWN[:3] for x in prompts]
    assert found == ["0", "0", "0", "0", "1", "1"]
    assert driven.refused == {"unconfirmed": 1} and list(driven.session.contexts) == [1, 2]


def test_a_context_beyond_the_bound_takes_the_place_of_the_oldest() -> None:
    driven = Driven()
    names = [f"request {n}" for n in range(MAX_CONTEXTS)]
    for name in names:
        driven(0.9, name)
    assert list(driven.session.contexts) == names
    driven(0.9, "one more")
    assert list(driven.session.contexts) == [*names[1:], "one more"]
    # the oldest one begins anew, and the others go on
    assert driven(0.7, names[1]) and not driven(0.7, names[0])


def test_a_source_of_runs_is_asked_when_they_begin_and_for_their_schedule() -> None:
    driven, asked = Driven(), list[str]()
    starts = [True, False, True, False]

    def ask(name: str, answer: Any) -> Callable[[], Any]:
        return lambda: (asked.append(name), answer)[1]

    driven.session.runs = SimpleNamespace(
        context=lambda: None,
        starts_run=lambda: starts.pop(0),
        schedule=ask("schedule", (7, (1.0, 0.5, 0.0))),
        solver=ask("solver", ("euler", "flow")),
    )
    assert driven.hits(0.9, 0.7) == "01" and asked == [] and driven.session.clock.num_steps is None
    driven.session.runs_whole_schedule = True
    # in one direction: told by the source alone
    assert driven.hits(0.5, 0.3) == "01" and asked == ["schedule", "solver"]
    clock = driven.session.clock
    assert (clock.run, clock.num_steps, clock.sigmas, clock.solver, clock.prediction) == (
        2,
        7,
        (1.0, 0.5, 0.0),
        "euler",
        "flow",
    )
    # what the user said goes before it
    driven.session.new_run(5, [0.9, 0.1, 0.0])
    starts.append(False)
    driven(0.9)
    assert asked == ["schedule", "solver"] and clock.num_steps == 5


def test_a_prompt_of_a_former_run_at_the_second_step_begins_another_one() -> None:
    """What its first call stored is of another prompt."""
    for theirs_comes_again in (True, False):
        driven, mine, theirs = Driven(), torch.ones(2), torch.ones(2)
        assert [driven(time, x=theirs) for time in DOWN[:3]] == [False, True, True]
        assert not driven(DOWN[0], x=mine)
        assert driven(DOWN[1], x=theirs if theirs_comes_again else torch.ones(2)) is not theirs_comes_again


def test_a_prompt_of_another_context_at_the_second_step_breaks_the_pattern() -> None:
    prompts = torch.ones(2), torch.ones(2)
    for order, broken in (((0, 1), 0), ((1, 0), 1)):
        driven = Driven()
        for x in prompts:
            driven(0.9, x=x)
        for i in order:
            driven(0.8, x=prompts[i])
        assert driven.refused.get("pattern_broken", 0) == broken


def test_another_caller_in_mid_run_is_said_once() -> None:
    driven = Driven()
    assert driven.hits(0.9, 0.7) == "01"
    found: list[str] = []

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(driven.hits(0.5))
        found.extend(str(each.message) for each in said)

    for _ in range(2):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert found[0] == found[2] == "0" and "threads or asyncio tasks" in found[1] and len(found) == 3
    assert driven.refused == {"pattern_broken": 1}


# What is stored, and when it may not be used.


def test_what_was_stored_is_not_used_where_it_does_not_hold() -> None:
    driven = Driven()
    assert driven.hits(0.9, 0.8) == "01"
    assert not driven(0.7, x=torch.ones(3)) and driven.refused == {"shape_changed": 1}
    assert driven(0.6, x=torch.ones(3))
    driven.weight.add_(1.0)
    assert not driven(0.5, x=torch.ones(3)) and driven.refused == {"shape_changed": 1, "weights_changed": 1}
    assert driven(0.4, x=torch.ones(3))


def test_buffers_of_another_shape_go_once_a_step_was_made_without_them() -> None:
    driven = Driven()
    shapes = torch.ones(2), torch.ones(3)
    both = [(time, x) for time in (0.9, 0.8) for x in shapes]
    for time, x in both:
        driven(time, "a", x)
        driven.session.clock._named["a"].step -= x is shapes[0]
    assert len(driven.session.contexts["a"].stores) <= 2
    driven(0.7, "a", torch.ones(5))
    driven(0.6, "a", torch.ones(5))
    driven(0.5, "a", torch.ones(7))
    assert {store.dynamic for store in driven.session.contexts["a"].stores.values()} == {(7,)}


def test_a_graph_that_did_not_run_in_the_last_step_computes() -> None:
    driven, other = Driven(), Graph()
    both = (driven.graph, other)
    driven(0.9, graphs=both)
    assert driven(0.8) and not other.calls[1:]
    driven(0.7, graphs=both)
    assert [computes for computes, _, _ in other.calls] == [True, True]
    assert driven.refused == {"shape_changed": 1}
    # skipped in one graph is a hit
    assert driven.session.counters.hits == 2


def test_a_graph_that_runs_twice_in_a_call_has_a_store_for_each() -> None:
    driven = Driven()
    twice = (driven.graph, driven.graph)
    driven(0.9, graphs=twice)
    assert len(driven.session.contexts[1].stores) == 2
    assert driven(0.8, graphs=twice)
    assert [computes for computes, _, _ in driven.graph.calls] == [True, True, False, False]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("can't allocate memory")])
def test_without_memory_a_call_computes_without_the_cache(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def allocate(*args: Any) -> Any:
        raise error

    driven = Driven()
    with monkeypatch.context() as patch:
        patch.setattr(module_of_sessions, "allocate", allocate)
        with pytest.warns(CacheDitWarning, match="Not enough memory") as said:
            assert driven.hits(0.9, 0.8) == "00"
        assert len(said) == 1 and driven.refused == {"out_of_memory": 2} and driven.graph.calls == []
        driven.session.ranks = SimpleNamespace(seed=0)  # type: ignore[assignment]
        driven.session.begin()
        with pytest.raises(CacheDitError, match="This rank has no memory"):
            driven.session.run(driven.graph, (torch.tensor([0.7]), torch.ones(2), driven.weight))
        driven.session.abort()
    driven.session.ranks = None
    assert driven.hits(0.9, 0.8) == "01"


def test_an_error_that_is_not_about_memory_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: Any) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(module_of_sessions, "allocate", allocate)
    driven = Driven()
    driven.session.begin()
    with pytest.raises(RuntimeError, match="device lost"):
        driven.session.run(driven.graph, (torch.tensor([0.9]), torch.ones(2), driven.weight))


def test_residuals_behind_a_jump_of_the_levels_are_not_drawn_into_a_line() -> None:
    driven = Driven(Graph(history=2), schedule="11110", forecast="taylor")
    driven.session.new_run(None, [1.0, 0.5, 0.8, 0.4, 0.2, 0.0])
    points = []
    for time in (1.0, 0.5, 0.8, 0.4):
        driven(time)
        ((_, store),) = driven.session.contexts[1].stores.items()
        points.append([point.step for point in store.points])
    assert points == [[1], [2, 1], [3], [4, 3]]


def test_where_the_sampler_adds_noise_again_auto_reuses() -> None:
    forward = [(True, [0.0, 0.0, 0.0], 0)]
    for sigmas, weights in (([1.0, 0.8, 0.6, 0.4, 0.0], [2.0, -1.0, 0.0]), ([1.0, 0.8, 0.6, 0.4, 0.9, 0.0], [1.0, 0.0, 0.0])):
        driven = Driven(Graph(history=2), schedule="1110", forecast="auto")
        driven.session.new_run(None, sigmas)
        # what is added goes with the timestep: a line is right
        assert driven.hits(1.0, 0.8, 0.6, 0.4) == "0001"
        assert driven.graph.calls[:3] == forward * 3
        assert driven.graph.calls[3][1] == pytest.approx(weights)


# What the programs are given.


def test_the_noise_of_a_step_has_a_key_of_its_own_that_follows_the_users_seed() -> None:
    def keys(seed: int, scale: float = 0.5) -> list[int]:
        torch.manual_seed(seed)
        driven = Driven(noise_scale=scale)
        for time in DOWN[:3]:
            for name in "ab":
                driven(time, name)
        assert all(control == [0.0 if computes else 1.0, scale] for computes, control, _ in driven.graph.calls)
        return [key for _, _, key in driven.graph.calls]

    found = keys(3)
    assert found == [0, 0, *(noise_key(3, step, name) for step in (2, 3) for name in "ab")]
    assert len(set(found)) == 5 and keys(3) == found and keys(4) != found
    assert keys(3, scale=0.0) == [0] * 6


def test_a_key_has_31_bits_and_is_the_same_in_every_process() -> None:
    for seed, step, context in ((0, 1, 1), (2**63, 40, "prompt"), (7, 2, 16)):
        assert noise_key(seed, step, context) == zlib.crc32(f"{seed}/{step}/{context}".encode()) % 2**31


def test_the_noise_of_ranks_follows_the_seed_they_agreed_on() -> None:
    driven = Driven(noise_scale=0.5)
    driven.session.ranks = SimpleNamespace(seed=11)  # type: ignore[assignment]
    driven.hits(0.9, 0.8)
    assert driven.graph.calls[1][2] == noise_key(11, 2, 1)


# What was measured.


def test_a_forecasts_error_is_read_before_the_next_decision_and_told() -> None:
    driven, told = Driven(Graph(history=2), schedule="1" * 9, forecast="reuse"), list[tuple[int, float]]()
    driven.session.observer = SimpleNamespace(
        measured=lambda step, error: told.append((step, error)), called=lambda record: None
    )
    driven.hits(0.9, 0.6, 0.4)
    assert told == [(2, pytest.approx(0.3 / 0.6))]
    stats = driven.session.statistics()
    # of a computed step 0.4 · w, where 0.6 · w was stored
    assert told[1] == (3, pytest.approx(0.2 / 0.4)) and len(told) == 2
    assert stats.forecast_errors == 2 and stats.forecast_error == pytest.approx(0.5)


def test_what_is_not_finite_is_dropped_and_said_once() -> None:
    driven = Driven(Graph(history=2), schedule="1111000")
    driven.hits(0.9)
    driven.graph.poison = math.nan
    with pytest.warns(CacheDitWarning, match="NaN or infinity") as said:
        driven.hits(0.8, 0.7)
        driven.graph.poison = 0.0
        driven.hits(0.6)
    ((_, store),) = driven.session.contexts[1].stores.items()
    assert len(said) == 1 and driven.session.counters.nonfinite == 2
    assert [point.step for point in store.points] == [4, 1]
    assert driven.hits(0.5) == "1" and driven.session.statistics().forecast_errors == 1


def test_ranks_that_do_not_exchange_measurements_keep_what_one_of_them_found_not_finite() -> None:
    driven = Driven(Graph(history=2), schedule="110")
    driven.session.ranks = SimpleNamespace(seed=0)  # type: ignore[assignment]
    driven.graph.poison = math.nan
    driven.hits(0.9)
    with pytest.warns(CacheDitWarning, match="NaN or infinity"):
        driven.hits(0.8)
    ((_, store),) = driven.session.contexts[1].stores.items()
    assert [point.step for point in store.points] == [2, 1] and driven.session.counters.nonfinite == 1


def test_the_front_clock_adds_up_the_changes_since_the_last_computed_step() -> None:
    driven, seen = Driven(Graph(front=True), schedule="1001001"), list[tuple[float, float | None]]()
    driven.graph.changes = [(9.0, 1.0), (0.25, 1.0), (0.5, 2.0), (3.0, 4.0), (0.5, 0.0), (1.0, 8.0)]
    decide = driven.session.strategy.decide

    def seeing(view: Any) -> Any:
        seen.append((view.clock, view.last_increment))
        return decide(view)

    driven.session.strategy = SimpleNamespace(decide=seeing, notes=lambda: [])  # type: ignore[assignment]
    driven.hits(0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    # the first front has none before it; the change at a computed step starts the clock anew behind it
    assert seen == [(0.0, None), (0.0, None), (0.25, 0.25), (0.5, 0.25), (0.0, 0.75), (0.0, 0.0)]
    # nor does that of the run before
    driven.graph.changes = [(9.0, 1.0), (0.5, 1.0)]
    driven.hits(0.9, 0.8)
    assert seen[6:] == [(0.0, None), (0.0, None)]


def test_ranks_share_what_one_step_measured_in_one_message() -> None:
    sent: list[list[list[float]]] = []

    class Two:
        seed, members, rank, messages = 0, (0, 1), 1, 4

        def share(self, measured: Sequence[Tensor]) -> list[Callable[[], list[float]]]:
            sent.append([value.tolist() for value in measured])
            # of what all measured: four times the mean square, or half the change
            return [lambda value=value: agreed(value.tolist()) for value in measured]  # type: ignore[misc]

    def agreed(values: list[float]) -> list[float]:
        return [values[0] / 2, values[1]] if len(values) == 2 else [values[0], 4.0 * values[1], *values[2:]]

    driven = Driven(Graph(history=1, front=True), schedule=None, strategy="adaptive", correction=False)
    driven.session.ranks, driven.session._shares = Two(), True  # type: ignore[assignment]
    driven.graph.changes = [(0.0, 1.0), (0.5, 1.0), (0.5, 1.0)]
    driven(0.9)
    assert len(sent) == 1 and len(sent[0]) == 1 and sent[0][0] == pytest.approx([0.0, 0.81, 0.81])
    driven(0.8)
    assert len(sent) == 2 and sent[1] == [pytest.approx([0.0, 0.64, 0.01], abs=1e-6), [0.5, 1.0]]
    driven(0.7)
    # as agreed, and not as measured here
    assert driven.session.counters.forecast_error == pytest.approx(math.sqrt(0.01 / (4.0 * 0.64)), rel=1e-3)
    assert driven.session.contexts[1].last_increment == 0.25
    assert "decides alike with 2 ranks (this one: 1)" in driven.session.notes()[-1]
    assert "exchanged 4 times" in driven.session.notes()[-1]


def test_ranks_are_joined_once_and_not_with_a_rule_that_goes_by_each_ones_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(module_of_sessions, "Ranks", lambda *given: made.append(given) or SimpleNamespace(seed=0))
    session = Session(resolve_options({**GREEDY, "control_refresh": True}), "made", owns_calls=True)
    session.join([])
    with pytest.raises(CacheDitError, match="control_refresh"):
        session.join([0, 1])
    assert session.ranks is None and made == []
    for strategy, shares in (("fixed", False), ("adaptive", True)):
        given = {**GREEDY, "schedule": None, "strategy": strategy}
        session = Session(resolve_options(given), "made", owns_calls=True)
        session.join([0, 1], "DTensor")
        session.join([0, 1, 2])
        assert session._shares is shares and made.pop() == ([0, 1], session.options, "DTensor") and made == []


# Inputs from outside.


@pytest.mark.parametrize(
    ("refresh", "moves", "found", "said"),
    [
        (None, (0.0, 0.5, 0.5), "0111", 1),
        (None, (0.5, 0.5, 0.5), "0111", 1),
        (None, (0.0, 0.0, 0.0), "0111", 0),
        (0.2, (0.1, 0.1, 0.3), "0110", 0),
        (0.2, (0.3, 0.3, 0.3), "0011", 0),
        (0.25, (0.25, 0.0, 0.25), "0111", 0),
        (True, (0.05, 0.15, 0.15), "0101", 0),
    ],
)
def test_a_control_input_that_moved_is_heard_where_that_was_asked_for_and_said_where_not(
    refresh: Any, moves: Sequence[float], found: str, said: int
) -> None:
    driven = Driven(Graph(controls=(1,)), control_refresh=refresh)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        driven(0.9, x=torch.ones(2))
        rest = "".join("01"[driven(time, x=torch.ones(2) + move)] for time, move in zip(DOWN[1:], moves, strict=False))
    assert "0" + rest == found
    assert driven.refused.get("control_moved", 0) == found[1:].count("0")
    assert sum("moved by" in str(each.message) for each in told) <= said
    if refresh is None and moves[0]:
        assert len(told) == 1 and "moved by 50.0 %" in str(told[0].message)
        driven.hits(0.1)


def test_a_control_input_that_was_written_to_is_heard_and_where_not_nothing_can_be_said_of_it() -> None:
    for refresh, found in ((None, "11"), (0.5, "01")):
        driven, control = Driven(Graph(controls=(1,)), control_refresh=refresh), torch.ones(2)
        driven(0.9, x=control)
        control.add_(0.1)
        assert "".join("01"[driven(time, x=control)] for time in (0.8, 0.7)) == found


@pytest.mark.parametrize(
    ("cached", "uncached", "schedule", "several"),
    [(1, 0, "1", False), (2, 0, "1", True), (1, 1, "1", True), (1, 0, "10", False), (2, 0, "10", True), (1, 1, "10", True)],
)
def test_a_model_of_several_graphs_is_told_from_one_that_comes_into_one(
    cached: int, uncached: int, schedule: str, several: bool
) -> None:
    """The output of one graph is the model's; else no skipped step is put right."""
    driven = Driven(schedule=schedule)
    graphs = [Graph() for _ in range(cached)]
    for time in (0.9, 0.8)[: len(schedule)]:
        driven.session.begin()
        for graph in graphs:
            driven.session.run(graph, (torch.tensor([time]), torch.ones(2), driven.weight))
        for _ in range(uncached):
            driven.session.note_uncached(Plain("random"))  # type: ignore[arg-type]
        driven.session.end()
    assert driven.session._several_graphs is several


# Statistics, and who hears of calls.


def test_an_observer_hears_each_call_as_it_was() -> None:
    driven, heard = Driven(), list[CallRecord]()
    driven.session.observer = SimpleNamespace(called=heard.append, measured=lambda step, error: None)
    driven.session.compiled(1.5)
    driven.hits(0.9, 0.8)
    first, second = heard
    assert first.tick is not None and (first.tick.step, first.skipped, first.compiled, first.timed) == (1, False, True, False)
    assert second.tick is not None and (second.tick.step, second.skipped, second.compiled, second.timed) == (
        2,
        True,
        False,
        True,
    )
    assert (first.reason, second.reason) == ("first_call", "schedule")
    untimed = Driven(enable_stats=False)
    untimed.session.observer = driven.session.observer
    untimed(0.9)
    assert not heard[-1].timed


def test_calls_that_compiled_are_counted_and_not_timed() -> None:
    driven = Driven()
    driven.session.compiled(1.5)
    driven.session.compiled(0.5)
    driven.hits(0.9, 0.8, 0.7)
    counters = driven.session.counters
    assert (counters.compiles, counters.compile_seconds, counters.compile_calls) == (2, 2.0, 1)
    assert (counters.compute_calls_timed, counters.reuse_calls_timed) == (0, 2)
    driven.session.reset_statistics()
    driven.hits(0.6)
    assert (counters.calls, counters.compiles, counters.compile_calls, counters.reuse_calls_timed) == (1, 0, 0, 1)
    driven.session.compiled(1.0)
    driven.hits(0.5)
    assert (counters.compile_calls, counters.reuse_calls_timed) == (1, 1)


def test_statistics_without_times_read_none() -> None:
    driven = Driven(enable_stats=False)
    driven.hits(0.9, 0.8)
    counters = driven.session.counters
    assert (counters.calls, counters.hits, counters.compute_calls_timed, counters.reuse_calls_timed) == (2, 1, 0, 0)


def test_statistics_are_read_while_another_thread_is_in_a_call() -> None:
    """What that call's step measured is left for later."""
    driven = Driven(Graph(history=2), schedule="1" * 9)
    driven.hits(0.9, 0.8)
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with driven.session.lock:
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    assert driven.session.statistics().forecast_errors == 0
    done.set()
    thread.join()
    assert driven.session.statistics().forecast_errors == 1
    # the lock was given back
    free = list[bool]()
    asking = threading.Thread(target=lambda: free.append(driven.session.lock.acquire(blocking=False)))
    asking.start()
    asking.join()
    assert free == [True]


def test_the_debug_line_says_what_a_call_was(capfd: pytest.CaptureFixture[str]) -> None:
    driven = Driven(Graph(history=2), schedule="1101", debug=True)
    driven.hits(0.9, 0.6, 0.4, name="prompt")
    lines = [line for line in capfd.readouterr().err.splitlines() if "run 1 step" in line]
    assert len(lines) == 3
    assert "run 1 step 1 context prompt: computed (first_call)" in lines[0] and "forecast error -" in lines[0]
    assert "run 1 step 3 context prompt: skipped (schedule)" in lines[2] and "forecast error 5.00e-01" in lines[2]
    quiet = Driven(debug=False)
    quiet.hits(0.9, 0.8)
    assert capfd.readouterr().err == ""


# What is said of runs.


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"start_percent": 0.2}, None, "start_percent and end_percent are ignored"),
        ({"end_percent": 0.8}, None, "start_percent and end_percent are ignored"),
        ({"end_percent": 0.8}, 20, None),
        ({"target_speedup": 2.0}, 20, "target_speedup works under strategy='adaptive'"),
        ({"target_speedup": 2.0, "strategy": "adaptive"}, 20, None),
        ({"target_speedup": 2.0, "strategy": "adaptive", "schedule": "10"}, 20, "target_speedup works under"),
        ({"warmup_steps": 4}, 4, "the run has 4 steps, all within the warm-up of 4"),
        ({"warmup_steps": 20}, 20, "all within the warm-up of 20"),
        ({"warmup_steps": 4, "schedule": "10"}, 4, None),
        ({"warmup_steps": 1}, 5, "the run has 5 steps, and will skip these: 2, 4"),
        ({"warmup_steps": 1, "skip_interval": 1}, 4, "will skip these: 2, 3, 4"),
        ({"warmup_steps": 1, "skip_interval": 1, "max_consecutive_hits": 1}, 5, "will skip these: 2, 4"),
        ({"warmup_steps": 1, "skip_interval": 1, "max_consecutive_hits": 2}, 5, "will skip these: 2, 3, 5"),
        ({"warmup_steps": 1, "strategy": "dynamic"}, 3, "will skip these: 2"),
        ({"warmup_steps": 0, "skip_interval": 3}, 5, "will skip these: 3"),
        ({"warmup_steps": 1}, 6, None),
        ({"warmup_steps": 1, "strategy": "adaptive"}, 4, None),
        ({"warmup_steps": 1}, None, None),
        ({"warmup_steps": 1, "schedule": "10101"}, 5, None),
    ],
)
def test_what_a_run_cannot_have_or_will_skip_is_said_once(options: dict[str, Any], steps: int | None, said: str | None) -> None:
    front = options.get("strategy") == "adaptive"
    driven = Driven(Graph(front=front), **{"schedule": None, "correction": False, **options})
    driven.graph.changes = [(0.1, 1.0)] * 9
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            driven.session.new_run(steps, None)
            driven.hits(0.9, 0.8)
    texts = [str(each.message) for each in told]
    assert len(texts) == (said is not None), texts
    assert said is None or said in texts[0]


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"strategy": "adaptive", "target_speedup": 2.0}, 10, None),
        ({"strategy": "adaptive", "target_speedup": 2.0}, 12, "for runs of 10 steps and this one has 12"),
        ({"strategy": "adaptive", "target_speedup": 2.0}, None, "this one has ?"),
        ({"strategy": "adaptive"}, 10, "calibration works under"),
        ({"strategy": "fixed"}, 10, "calibration works under"),
        ({"strategy": "adaptive", "target_speedup": 2.0, "schedule": "10"}, 10, "calibration works under"),
    ],
)
def test_a_calibration_that_is_not_used_is_said(options: dict[str, Any], steps: int | None, said: str | None) -> None:
    driven = Driven(Graph(front=True), **{"schedule": None, "correction": False, **options})
    driven.graph.changes = [(0.1, 1.0)] * 9
    calibration = SimpleNamespace(num_steps=10, structure=(module_of_sessions.structure_of(driven.graph.report.region),))
    driven.session.options = copy.copy(driven.session.options)
    object.__setattr__(driven.session.options, "calibration", calibration)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        driven.session.new_run(steps, None)
        driven.hits(0.9)
    texts = [str(each.message) for each in told if "calibration" in str(each.message)]
    assert len(texts) == (said is not None) and (said is None or said in texts[0])
    assert driven.session.options.calibration is calibration


def test_what_a_strategy_has_to_tell_is_said_once() -> None:
    driven = Driven()
    driven.session.strategy = SimpleNamespace(decide=driven.session.strategy.decide, notes=lambda: ["target_speedup_unused"])  # type: ignore[assignment]
    with pytest.warns(CacheDitWarning, match="target_speedup works under") as told:
        driven.hits(0.9, 0.8, 0.9, 0.8)
    assert len(told) == 1


def test_what_else_there_is_to_say_of_a_model_that_is_cached_block_by_block() -> None:
    session = Driven().session
    assert session.notes() == ()
    session.tracing.capture = Capture.BLOCKS
    assert len(session.notes()) == 1 and session.notes()[0].endswith("Graph breaks: -")
    session.note_uncached(Plain("random", "print"))  # type: ignore[arg-type]
    session.note_uncached(Plain("random", "item"))  # type: ignore[arg-type]
    assert session.notes()[0].endswith("Graph breaks: print; item")


def test_a_calibration_of_other_blocks_is_dropped_and_said_once() -> None:
    driven = Driven(Graph(front=True), schedule=None, strategy="adaptive", target_speedup=2.0, correction=False)
    driven.graph.changes = [(0.1, 1.0)] * 9
    calibration = SimpleNamespace(num_steps=10, structure=("other",))
    object.__setattr__(driven.session.options, "calibration", calibration)
    without = driven.session.strategy
    with pytest.warns(CacheDitWarning, match="measured for another structure") as told:
        driven.session.new_run(10, None)
        driven.hits(0.9, 0.8)
    assert len(told) == 1 and driven.session.options.calibration is None
    assert driven.session.options.target_speedup == 2.0 and driven.session.strategy is not without


def test_a_call_without_a_timestep_computes_and_is_said_once_unless_its_run_was_named() -> None:
    driven = Driven()
    with pytest.warns(CacheDitWarning, match="new_run") as said:
        assert driven.hits(math.nan, math.nan) == "00"
    assert len(said) == 1 and driven.refused == {"no_timestep": 2}
    driven.session.new_run(None, None)
    assert driven.hits(math.nan, math.nan) == "01"
    # the model's own argument goes before the graph's input
    times = [0.9, 0.8]
    driven = Driven()
    driven.session.call_time = lambda: times.pop(0)
    assert driven.hits(math.nan, math.nan) == "01" and driven.session.counters.steps == 2


# Calls in which nothing was cached.


class Plain:
    """A graph without a region."""

    def __init__(self, reason: str, broke: str | None = None) -> None:
        self.report = GraphReport(1, broke, None, None, reason)


def uncached_call(driven: Driven, *graphs: Any, name: str | None = None) -> None:
    with named(driven.session, name):
        driven.session.begin()
        for graph in graphs:
            driven.session.note_uncached(graph)
        driven.session.end()


def test_why_nothing_is_cached_is_said_once_with_the_reasons() -> None:
    driven = Driven()
    driven.session.tracing.capture = Capture.IN_VAIN
    with pytest.warns(CacheDitWarning) as said:
        for _ in range(2):
            uncached_call(driven, Plain("random"), Plain("nothing_left"), Plain("random"))
    assert len(said) == 1 and driven.refused == {"no_region": 2} and driven.session.counters.calls == 2
    text = str(said[0].message)
    reasons = [Plain(reason).report.refusal_text("en") for reason in ("random", "nothing_left")]
    assert "; ".join(reasons) in text and text.count(reasons[0]) == 1


def test_where_no_graph_ran_the_model_was_not_compiled() -> None:
    driven = Driven()
    with pytest.warns(CacheDitWarning, match="recompile limit"):
        uncached_call(driven)
    assert driven.refused == {"not_compiled": 1}


def test_grad_mode_is_the_reason_while_it_is_on() -> None:
    driven = Driven()
    with torch.enable_grad(), pytest.warns(CacheDitWarning, match="no_grad"):
        uncached_call(driven, Plain("random"), Plain("grad_mode"))
    assert driven.refused == {"grad_mode": 1}
    driven = Driven()
    driven.session.tracing.capture = Capture.BLOCKS
    with torch.enable_grad(), pytest.warns(CacheDitWarning, match="no_grad"):
        uncached_call(driven)
    with pytest.warns(CacheDitWarning, match="No transformer component"):
        uncached_call(driven)
    assert driven.refused == {"grad_mode": 1, "no_region": 1}
    # a graph of a call with gradients says nothing of one without
    driven = Driven()
    driven.session.tracing.capture = Capture.IN_VAIN
    with pytest.warns(CacheDitWarning, match="No transformer component"):
        uncached_call(driven, Plain("grad_mode"))


def test_no_place_for_the_compiler_is_said_with_its_reason() -> None:
    driven = Driven()
    driven.session.tracing.no_folder = "OSError: full"
    with pytest.warns(CacheDitWarning, match="OSError: full"):
        uncached_call(driven)
    assert driven.refused == {"no_folder": 1}
    driven = Driven(strict=True)
    driven.session.tracing.no_folder = "OSError: full"
    with pytest.raises(CacheDitError, match="OSError: full") as raised:
        uncached_call(driven)
    assert not isinstance(raised.value, NoBlocksError)


def test_strict_raises_where_nothing_can_be_cached() -> None:
    driven = Driven(strict=True)
    driven.session.tracing.capture = Capture.IN_VAIN
    with pytest.raises(NoBlocksError):
        uncached_call(driven, Plain("random"))
    with pytest.warns(CacheDitWarning, match="recompile limit"):
        uncached_call(driven)


def test_another_way_of_tracing_is_tried_before_anything_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    driven = Driven(strict=True)
    uncached_call(driven, Plain("no_blocks"))
    assert driven.session.tracing.capture is Capture.MORE and driven.refused == {"no_region": 1}
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_context_that_leaves_the_graphs_of_the_others_is_left_alone() -> None:
    driven = Driven()
    driven(0.9, "prompt")
    with pytest.warns(CacheDitWarning, match="context other does not compile into one graph"):
        uncached_call(driven, Plain("no_blocks"), name="other")
    assert driven.session.tracing.is_eager("other") and driven.session.tracing.must_begin_anew
    driven.session.trace_again()
    assert not driven.session.tracing.cached and driven.session.cache_bytes == 0
    with named(driven.session, "other"):
        assert not driven.session.runs_eager
        driven.session.begin()
        assert driven.session.runs_eager
        driven.session.end()
    assert driven.refused == {"no_region": 1, "eager_context": 1}
    # the others begin anew
    assert driven.hits(0.8, 0.7, name="prompt") == "01"


def test_a_context_that_is_called_with_gradients_is_not_left_alone() -> None:
    driven = Driven()
    driven(0.9, "prompt")
    with torch.enable_grad(), pytest.warns(CacheDitWarning, match="no_grad"):
        uncached_call(driven, Plain("grad_mode"), name="prompt")
    assert not driven.session.tracing.is_eager("prompt") and not driven.session.tracing.must_begin_anew


def test_a_context_that_compiles_at_every_call_is_left_alone() -> None:
    driven = Driven()
    for n in range(MAX_COMPILES_IN_A_ROW):
        driven.session.compiled(0.1)
        if n + 1 < MAX_COMPILES_IN_A_ROW:
            driven(0.9 - 0.1 * n, "prompt")
        else:
            with pytest.warns(CacheDitWarning, match="context prompt compiles at every call"):
                driven(0.9 - 0.1 * n, "prompt")
    assert driven.session.tracing.is_eager("prompt")
    # unnamed calls are nobody's, and a call that compiled nothing ends the row
    driven = Driven()
    for n in range(2 * MAX_COMPILES_IN_A_ROW):
        driven.session.compiled(0.1)
        driven(0.9 - 0.05 * n)
        driven.session.compiled(0.1)
        driven(0.9 - 0.05 * n, "prompt")
        if n == MAX_COMPILES_IN_A_ROW - 2:
            driven(0.9 - 0.05 * n - 0.01, "prompt")
        if n == 2 * MAX_COMPILES_IN_A_ROW - 3:
            break
    assert not driven.session.tracing.is_eager("prompt")


def test_a_step_without_a_cached_graph_counts_as_a_step() -> None:
    driven = Driven()
    driven(0.9)
    times = [0.8, 0.9]
    driven.session.call_time = lambda: times.pop(0)
    for step in (2, 1):
        with pytest.warns(CacheDitWarning) if step == 2 else warnings.catch_warnings():
            uncached_call(driven)
    counters = driven.session.counters
    assert (counters.steps, counters.runs, counters.calls) == (3, 2, 3)
    driven.session.call_time = None
    # what was stored in the run before is not used
    assert driven.hits(0.8, 0.7) == "01"
    # without a timestep it is none
    steps = counters.steps
    uncached_call(driven)
    assert counters.steps == steps


def test_a_side_list_that_alone_is_cached_is_said_once_another_way_was_in_vain() -> None:
    driven = Driven()
    tracing = driven.session.tracing
    tracing.main_list, tracing.capture = "main", Capture.IN_VAIN
    driven.session.note_uncached(Plain("random", "print"))
    driven(0.9)
    driven.session.compiled(0.1)
    with pytest.warns(CacheDitWarning, match=r"only a side list is cached \(blocks\): the blocks of main .*: print"):
        driven(0.8)
    driven.session.compiled(0.1)
    driven(0.7)


# Calls that nobody brackets, and transforms.


def test_without_brackets_a_call_ends_where_a_frame_comes_again() -> None:
    session = Session(resolve_options(GREEDY), "bare", owns_calls=False)
    first, second, weight = Graph(frame="a"), Graph(frame="b"), torch.ones(2)

    def call(time: float) -> None:
        for graph in (first, second):
            session.run(graph, (torch.tensor([time]), torch.ones(2), weight))

    for time in (0.9, 0.8, 0.7):
        call(time)
    assert [computes for computes, _, _ in first.calls] == [computes for computes, _, _ in second.calls] == [True, False, False]
    assert (session.counters.calls, session.counters.steps, session.counters.hits) == (3, 3, 2)
    second.programs = Programs(fails, fails)
    with pytest.raises(LookupError):
        call(0.6)
    second.programs = first.programs
    session.run(first, (torch.tensor([0.5]), torch.ones(2), weight))
    assert first.calls[-1][0] and session.counters.runs == 2


def fails(flat: Sequence[Any]) -> Sequence[Any]:
    raise LookupError


def test_a_graph_outside_of_a_call_is_a_mistake_of_ours() -> None:
    driven = Driven()
    with pytest.raises(AssertionError, match="outside of a call"):
        driven.session.run(driven.graph, (torch.tensor([0.9]), torch.ones(2), driven.weight))


def test_a_call_under_a_transform_is_counted_and_ends_the_run() -> None:
    driven = Driven()
    driven.hits(0.9)
    with pytest.warns(CacheDitWarning, match=r"A call under torch.func"):
        driven.session.note_transform("torch.func")
    driven.session.note_transform("torch.func")
    assert driven.session.counters.calls == 3 and driven.refused == {"transform": 2}
    assert driven.hits(0.8, 0.7) == "01"


def test_decisions_of_runs_that_are_over_are_not_kept() -> None:
    driven = Driven()
    for _ in range(3):
        driven.hits(0.9, 0.8)
    assert list(driven.session._decisions) == [3]
    driven(0.9, "a")
    driven(0.9, "b")
    driven(0.95, "a")
    assert set(driven.session._decisions) >= {driven.session.contexts["b"].run, driven.session.contexts["a"].run}


def test_a_point_is_the_step_and_its_time() -> None:
    driven = Driven(schedule="101")
    driven.hits(0.9, 0.8, 0.7)
    ((_, store),) = driven.session.contexts[1].stores.items()
    assert store.points == (Point(3, pytest.approx(0.7)),) and store.last_step == 3


@pytest.mark.parametrize(
    ("options", "announced", "expected"),
    [
        ({"strategy": "adaptive"}, True, "lagrange"),
        ({"strategy": "adaptive"}, False, "reuse"),
        ({"strategy": "adaptive", "schedule": "1010"}, True, "reuse"),
        ({"strategy": "fixed"}, True, "reuse"),
    ],
)
def test_adaptive_follows_a_line_where_the_levels_are_announced(
    options: dict[str, Any], announced: bool, expected: str
) -> None:
    """Whatever erred least at the last computed step; nothing is corrected."""
    session = Session(resolve_options({"correction": False, **options}), "model", owns_calls=True)
    session.new_run(4, [1.0, 0.7, 0.4, 0.2, 0.0] if announced else None)
    store: Any = SimpleNamespace(errors={"reuse": 0.1, "lagrange": 0.2, "taylor": 0.3})
    assert session._forecast_name(store) == expected
