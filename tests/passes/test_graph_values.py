"""What a node stands for: weights, writes, random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cache_dit.passes.graph_values import (
    example_of,
    is_mutation,
    is_parameter,
    is_random,
    is_removable,
    mutated_argument,
    name_of,
    repeats,
    shape_key,
)
from torch import Tensor, fx, nn
from torch.nn import functional

from cache_dit.torch_internals import memory_of
from tests.models import Stack, capture, example, seeded, traced_stack


class Operation(nn.Module):
    """One operation on a fresh tensor, in train mode."""

    def __init__(self, operation: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        fresh = x.abs()
        self.operation(fresh)
        return fresh * 1.0


def worked(operation: Callable[[Tensor], object]) -> list[fx.Node]:
    """The nodes of an operation, without the first and the last one that surround it."""
    gm = capture(Operation(operation), torch.ones(2, 3))
    return [node for node in gm.graph.nodes if node.op.startswith("call")][1:-1]


def set_item(x: Tensor) -> None:
    x[:, 0] = 1.0


def multiply_in_place(x: Tensor) -> None:
    x *= 2.0


WRITING = {
    "method": lambda x: x.add_(1.0),
    "operator": multiply_in_place,
    "item": set_item,
    "out": lambda x: torch.add(x, 1.0, out=x),
    "function": lambda x: torch.relu_(x),
    "named inplace": lambda x: functional.silu(x, inplace=True),
    "inplace by position": lambda x: functional.leaky_relu(x, 0.1, True),
    "dunder": lambda x: x.__iadd__(1.0),
    "aten": lambda x: torch.ops.aten.mul_.Tensor(x, 2.0),
}
READING = {
    "method": lambda x: x.add(1.0),
    "bitwise": lambda x: (x > 0) & (x < 1),
    "inplace false": lambda x: functional.leaky_relu(x, 0.1, False),
    "aten": lambda x: torch.ops.aten.mul.Tensor(x, 2.0),
}


def test_every_way_to_write_is_seen_and_names_what_it_writes_to() -> None:
    for name, operation in WRITING.items():
        nodes = worked(operation)
        written = [node for node in nodes if is_mutation(node)]
        assert len(written) == 1, name
        target = mutated_argument(written[0])
        assert target is not None and name_of(target) == "abs", name
        assert not is_removable(written[0]), name


def test_operations_that_only_read_are_no_writes() -> None:
    for name, operation in READING.items():
        assert [node for node in worked(operation) if is_mutation(node)] == [], name
        assert all(mutated_argument(node) is None and is_removable(node) for node in worked(operation)), name


@pytest.mark.parametrize(
    ("operation", "random"),
    [
        (lambda x: torch.rand_like(x), True),
        (lambda x: torch.randn(2), True),
        (lambda x: x.normal_(), True),
        (lambda x: torch.bernoulli(x), True),
        (lambda x: functional.dropout(x, 0.1, True), True),
        (lambda x: functional.dropout(x, 0.1, False), False),
        (lambda x: functional.dropout(x, 0.0, True), False),
        (lambda x: functional.dropout(x, p=0.1, training=True), True),
        (lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: functional.scaled_dot_product_attention(x, x, x, None, 0.1), True),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), False),
        (lambda x: torch.sin(x), False),
    ],
)
def test_random_numbers_are_seen_where_they_are_drawn(operation: Callable[[Tensor], object], random: bool) -> None:
    nodes = worked(operation)
    assert any(map(is_random, nodes)) is random
    assert all(is_removable(node) for node in nodes) is not random


def test_weights_are_told_from_activations() -> None:
    placeholders = [node for node in traced_stack(3).gm.graph.nodes if node.op == "placeholder"]
    activations = [node.name for node in placeholders if not is_parameter(node)]
    assert activations == ["l_x_", "l_t_"]
    assert len(placeholders) - len(activations) == sum(1 for _ in Stack(3).parameters())


def test_buffers_and_attributes_of_the_graph_are_weights() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    gm = capture(Buffered(), torch.ones(2, 3))
    named = {node.name: is_parameter(node) for node in gm.graph.nodes if node.op == "placeholder"}
    assert [is_weight for name, is_weight in named.items() if "table" in name] == [True]
    assert named["l_x_"] is False
    gm.register_buffer("constant", torch.ones(1))
    assert is_parameter(gm.graph.get_attr("constant"))
    assert is_removable(gm.graph.get_attr("constant"))


def test_example_values_come_from_either_tracer() -> None:
    node = fx.Graph().placeholder("x")
    assert example_of(node) is None
    node.meta["val"] = 3
    assert example_of(node) == 3
    node.meta["example_value"] = 4
    assert example_of(node) == 4


def test_symbolic_sizes_are_compared_by_expression() -> None:
    gm = capture(seeded(lambda: Stack(2)), *example(), dynamic=True)
    streams = [node for node in gm.graph.nodes if name_of(node) == "add"]
    first, second = (example_of(node) for node in streams)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    assert not all(isinstance(size, int) for size in first.shape)
    assert shape_key(first) == shape_key(second)
    assert shape_key(first) != shape_key(first.transpose(0, 1))
    assert shape_key(first) != shape_key(first.double())


def test_a_size_that_tracing_found_to_be_a_number_equals_it() -> None:
    """What is added has a size of its own: the symbol of the stream gives way to it, in what was made before, too."""

    class Steered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.abs() + torch.ones(4, 3)).relu()

    gm = capture(Steered(), torch.ones(4, 3), dynamic=True)
    before, after = (example_of(node) for node in gm.graph.nodes if name_of(node) in ("abs", "relu"))
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    assert isinstance(before.shape[0], torch.SymInt)
    assert shape_key(before) == shape_key(after)


def test_higher_order_operators_and_contexts_stay() -> None:
    graph = fx.Graph()
    assert not is_removable(graph.call_function(torch.ops.higher_order.cond, ()))
    assert not is_removable(graph.call_function(torch.amp.autocast_mode._enter_autocast, ()))
    assert not is_removable(graph.placeholder("x"))


def test_memory_is_told_under_a_transform_too() -> None:
    """Tensors within vmap have no storage of their own to ask for."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(memory_of(x) == memory_of(x[1:]))
        seen.append(memory_of(x) == memory_of(x * 2.0))
        return x

    torch.vmap(look)(torch.randn(3, 4))
    assert seen == [True, False]


class Once(nn.Module):
    """Does something besides what it returns, or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros(3))
        self.held = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "draws":
            x = x + torch.randn_like(x)
        elif self.kind == "counts in a buffer":
            self.calls += 1.0
        elif self.kind == "writes through a view of a buffer":
            self.calls[:2].add_(1.0)
        elif self.kind == "writes to a tensor that it holds":
            self.held.mul_(2.0)
        elif self.kind == "writes to its input":
            x *= 2.0
        elif self.kind == "writes to what it made":
            x = (x + 1.0).mul_(2.0)
        return x * 2.0 + self.calls


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("draws", False),
        ("counts in a buffer", False),
        ("writes through a view of a buffer", False),
        ("writes to a tensor that it holds", False),
        ("writes to its input", True),
        ("writes to what it made", True),
        ("nothing", True),
    ],
)
def test_whether_a_graph_may_run_once_more(kind: str, expected: bool) -> None:
    assert repeats(capture(Once(kind), torch.ones(2, 3))) is expected
