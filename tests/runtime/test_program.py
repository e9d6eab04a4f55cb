"""What the host reads from a graph's inputs: the timestep, weights, sizes; and who runs the graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_dit.passes.insert_cache_branch import CacheInputs, ResidualBuffer
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from cache_dit.graph_report import GraphReport
from cache_dit.runtime.program import (
    CachedGraph,
    Programs,
    SizeReader,
    UncachedGraph,
    find_time,
    read_time,
    sizes_are_known,
    time_names,
)

CPU = torch.device("cpu")
MODEL = "L['self']._modules['blocks']._modules['0']"


class Inputs:
    """Placeholders of a graph made by hand."""

    def __init__(self) -> None:
        self.graph, self._env = fx.Graph(), ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)
        self.nodes: list[fx.Node] = []
        self._symbols = 0

    def add(self, source: str, example: Any, name: str = "") -> fx.Node:
        node = self.graph.placeholder(name or f"given_{len(self.nodes)}")
        node.meta["example_value"] = example
        if source:
            node._dynamo_source = SimpleNamespace(name=source)  # type: ignore[attr-defined]
        self.nodes.append(node)
        return node

    def given(self, name: str, example: Any) -> fx.Node:
        return self.add(f"L['{name}']", example)

    def size(self, value: int) -> torch.SymInt:
        """A size that may differ from call to call."""
        made = self._env.create_symintnode(self._symbol(value), hint=value)
        assert isinstance(made, torch.SymInt)
        return made

    def number(self, value: float) -> torch.SymFloat:
        """A float that may."""
        made = self._env.create_symfloatnode(self._symbol(value), hint=value)
        assert isinstance(made, torch.SymFloat)
        return made

    def _symbol(self, value: float) -> Any:
        self._symbols += 1
        return self._env.create_symbol(value, ConstantSource(f"n{self._symbols}"), DimDynamic.DYNAMIC)  # type: ignore[arg-type]

    def unbacked(self) -> torch.SymInt:
        made = self._env.create_unbacked_symint()
        assert isinstance(made, torch.SymInt)
        return made

    def fake(self, *sizes: Any) -> Tensor:
        with self._mode:
            return torch.empty(sizes)

    def module(self) -> fx.GraphModule:
        self.graph.output(tuple(self.nodes[:2]))
        return fx.GraphModule(nn.Module(), self.graph)


# The timestep.


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("x", "t", "timestep"), ["timestep", "t"]),
        (("sigma", "sigmas", "time"), ["time", "sigma", "sigmas"]),
        (("noise_levels", "t"), ["t", "noise_levels"]),
        (("my_timestep", "timestep_r", "t"), ["t", "my_timestep", "timestep_r"]),
        (("start_time", "times_x", "mytime", "img_sigmas", "sigma_y"), ["start_time", "img_sigmas"]),
        (("x", "context"), []),
    ],
)
def test_names_of_the_timestep_come_best_first(names: tuple[str, ...], found: list[str]) -> None:
    assert time_names(names) == found
    assert time_names(iter(names)) == found


SCALAR, ROW, PICTURE, WHOLE = torch.zeros(()), torch.zeros(3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        # by its name, whatever its kind
        ([("L['x']", ROW), ("L['t']", WHOLE)], 1),
        ([("L['t']", ROW), ("L['timestep']", PICTURE)], 1),
        ([("L['kwargs']['timestep']", ROW), ("L['x']", ROW)], 0),
        # of one name the first
        ([("L['a']['t']", ROW), ("L['b']['t']", ROW)], 0),
        # the only one of its kind
        ([("L['x']", PICTURE), ("L['level']", ROW)], 1),
        ([("L['x']", PICTURE), ("L['level']", SCALAR), ("L['n']", WHOLE)], 1),
        ([("", PICTURE), ("", SCALAR)], 1),
        ([("L['level']", ROW), ("L['other']", SCALAR)], None),
        ([("L['x']", PICTURE), ("L['n']", WHOLE)], None),
        ([("L['x']", PICTURE), ("L['t'].shape", 3)], None),
        ([], None),
    ],
)
def test_the_timestep_is_found_by_its_name_else_by_its_kind(given: list[tuple[str, Any]], place: int | None) -> None:
    inputs = Inputs()
    for source, example in given:
        inputs.add(source, example)
    assert find_time(inputs.nodes) == place


def test_neither_weights_nor_sizes_are_the_timestep_and_numbers_may_be() -> None:
    inputs = Inputs()
    inputs.add(f"{MODEL}._parameters['t']", nn.Parameter(torch.zeros(3)))
    inputs.given("timestep", inputs.size(4))
    assert find_time(inputs.nodes) is None
    inputs.given("x", inputs.number(0.5))
    assert find_time(inputs.nodes) == 2
    inputs.given("y", inputs.number(0.25))
    assert find_time(inputs.nodes) is None
    inputs.given("t", inputs.number(0.75))
    assert find_time(inputs.nodes) == 4


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        # clean tokens have 0 throughout
        (torch.tensor([0.0, 0.75, 0.5]), 0.75),
        (torch.tensor([[3, 7]]), 7.0),
        (torch.zeros(0), None),
        (3, 3.0),
        (0.25, 0.25),
        ("0.5", None),
        (None, None),
    ],
)
def test_a_timestep_is_read_as_a_number(value: object, time: float | None) -> None:
    found = read_time(value)
    assert found == time and type(found) is type(time)


# Sizes.


def buffer(*sizes: Any) -> ResidualBuffer:
    return ResidualBuffer(sizes, torch.float32, CPU)


def cache(*residuals: ResidualBuffer, front: ResidualBuffer | None = None) -> CacheInputs:
    return CacheInputs(residuals, 2, front, torch.float32, CPU)


def test_sizes_are_read_where_the_inputs_carry_them() -> None:
    inputs = Inputs()
    batch, tokens, text, other = (inputs.size(value) for value in (2, 6, 5, 3))
    inputs.given("m", other)
    inputs.given("x", inputs.fake(batch, tokens, 8))
    inputs.given("n", text)
    wanted = cache(buffer(batch, 2 * tokens + 1, 8), buffer(text, 3), front=buffer(3, tokens))
    assert sizes_are_known(wanted, inputs.nodes)
    reader = SizeReader(inputs.nodes, wanted)
    dynamic = reader.read((5, torch.zeros(4, 9, 8), 7))
    assert sorted(dynamic) == [4, 7, 9]
    assert reader.sizes(dynamic) == ((4, 19, 8), (7, 3), (3, 9))


def test_sizes_of_inputs_that_reach_no_buffer_count_too() -> None:
    inputs = Inputs()
    inputs.given("x", inputs.fake(2, 8))
    inputs.given("text", inputs.fake(2, inputs.size(5)))
    reader = SizeReader(inputs.nodes, cache(buffer(2, 8)))
    assert reader.read((torch.zeros(2, 8), torch.zeros(2, 11))) == (11,)
    assert reader.sizes((11,)) == ((2, 8),)
    # nothing may differ
    inputs = Inputs()
    inputs.given("x", inputs.fake(2, 8))
    reader = SizeReader(inputs.nodes, cache(buffer(2, 8)))
    assert reader.read((torch.zeros(2, 8),)) == () and reader.sizes(()) == ((2, 8),)


def test_numbers_of_the_model_count_behind_the_sizes() -> None:
    """An adapter's scale: a float that has changed once, or a tensor of no dimension on the host."""
    inputs = Inputs()
    inputs.given("x", inputs.fake(inputs.size(6), 8))
    inputs.add(f"{MODEL}.scale", inputs.number(0.5))
    inputs.add(f"{MODEL}.gate", torch.tensor(0.25))
    inputs.add(f"{MODEL}.row", torch.ones(1))
    inputs.given("strength", inputs.number(0.5))
    inputs.add(f"{MODEL}._parameters['w']", nn.Parameter(torch.tensor(0.25)))
    # one on a device would have to be waited for
    inputs.add(f"{MODEL}.gate", torch.zeros((), device="meta"))
    reader = SizeReader(inputs.nodes, cache(buffer(2, 8)))
    args = (torch.zeros(9, 8), 1.5, torch.tensor(3.0), torch.ones(1), 0.125, torch.tensor(1.0), torch.zeros((), device="meta"))
    assert reader.read(args) == (9, 1.5, 3.0)
    assert reader.sizes(reader.read(args)) == ((2, 8),)


def test_sizes_that_no_input_carries_are_not_known() -> None:
    inputs = Inputs()
    carried, hidden = inputs.size(6), inputs.size(7)
    inputs.given("x", inputs.fake(carried, 8))
    inputs.given("n", 3)
    assert sizes_are_known(cache(buffer(carried, 8)), inputs.nodes)
    for wanted in (
        cache(buffer(hidden, 8)),
        cache(buffer(carried, 8), buffer(8, carried + hidden)),
        cache(buffer(carried, 8), front=buffer(hidden)),
        cache(buffer(inputs.unbacked(), 8)),
    ):
        assert not sizes_are_known(wanted, inputs.nodes)
    with pytest.raises(AssertionError, match="no graph input carries the size"):
        SizeReader(inputs.nodes, cache(buffer(hidden, 8)))


# The graph.


class Runner:
    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def run(self, graph: object, args: Any) -> Any:
        return ("cached", graph, args)


def graph_of(inputs: Inputs, session: Runner | None = None, **more: Any) -> CachedGraph:
    programs: Any = Programs(lambda flat: flat, lambda flat: flat)
    report = GraphReport(1, None, None)
    return CachedGraph(
        lambda graph, args: session,
        programs,
        lambda *args: ("plain", args),
        cache(buffer(2)),
        inputs.module(),
        report,
        3,
        **more,
    )


def test_a_graph_runs_with_its_session_where_that_is_in_force() -> None:
    for session, cached in ((None, False), (Runner(False), False), (Runner(True), True)):
        inputs = Inputs()
        inputs.given("x", ROW)
        inputs.given("t", SCALAR)
        graph = graph_of(inputs, session)
        assert graph(1, 2) == (("cached", graph, (1, 2)) if cached else ("plain", (1, 2)))
    assert graph.plain([1, 2]) == ("plain", (1, 2))
    assert (graph.outputs, graph.controls, graph.frame) == (2, (), 3)
    assert graph.time([ROW, torch.tensor(0.25)]) == 0.25


def test_a_graph_without_a_timestep_has_none() -> None:
    inputs = Inputs()
    inputs.given("x", PICTURE)
    inputs.given("y", PICTURE)
    graph = graph_of(inputs, controls=(1,))
    assert graph.time([PICTURE, PICTURE]) is None and graph.controls == (1,)


def test_weights_and_what_the_caller_gives_are_picked_from_the_inputs() -> None:
    inputs = Inputs()
    inputs.given("x", PICTURE)
    inputs.given("n", 3)
    inputs.add(f"{MODEL}.table", ROW)
    inputs.add(f"{MODEL}._parameters['w']", nn.Parameter(torch.zeros(3)))
    inputs.given("t", SCALAR)
    inputs.add(f"{MODEL}.gate", torch.tensor(0.25))
    inputs.add("", ROW, "l_self_buffers_mask_")
    inputs.add("L['self']._parameters['b']", nn.Parameter(torch.zeros(3)))
    graph = graph_of(inputs)
    args = tuple("abcdefgh")
    assert graph.watched(args) == ("c", "d", "g", "h") and graph.weight_index == 3
    assert graph.given(args) == ("a", "e")


def test_one_weight_or_none_is_picked_as_several_are() -> None:
    one, none = Inputs(), Inputs()
    for inputs in (one, none):
        inputs.given("x", PICTURE)
    one.add(f"{MODEL}.table", ROW)
    none.given("y", PICTURE)
    assert graph_of(one).watched(("a", "b")) == ("b",) and graph_of(one).given(("a", "b")) == ("a",)
    graph = graph_of(none)
    assert graph.watched(("a", "b")) == () and graph.weight_index is None
    assert graph_of(one).weight_index is None


def test_a_graph_without_a_region_says_that_it_ran() -> None:
    noted: list[UncachedGraph] = []
    report = GraphReport(1, None, None)
    graph = UncachedGraph(lambda *args: args, report, noted.append)
    assert graph(1, 2) == (1, 2) and noted == [graph] and graph.report is report
