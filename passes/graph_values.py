"""What a node of a Dynamo graph stands for: its example value, whether it is a parameter, writes, or draws numbers."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx

from ..torch_internals import (
    hint_of,
    is_higher_order,
    is_mutable_overload,
    memory_of,
    shows_memory,
    source_name,
    symbol_of,
)

_MUTATING_FUNCTIONS = frozenset(
    {
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "imatmul",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "ilshift",
        "irshift",
        "setitem",
    }
)
# Names that end like an in-place method and are none.
_NOT_MUTATING = frozenset({"and_", "or_", "not_", "xor_", "is_", "requires_grad_"})
_RANDOM = frozenset(
    {
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
        "normal",
        "normal_",
        "uniform_",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "poisson",
        "random_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "cauchy_",
    }
)
_DROPOUT = frozenset(
    {
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "dropout_",
        "rrelu",
    }
)


def example_of(node: fx.Node) -> object:
    """The example value that the tracer left on a node (a fake tensor, a SymInt, a tuple of these), or None."""
    value: object = node.meta.get("example_value", node.meta.get("val"))
    return value


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensor that a value is, or those in its tuples, lists, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts: Iterable[object] = ()
    if isinstance(value, (tuple, list)):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif is_dataclass(value):
        parts = (getattr(value, each.name) for each in fields(value))
    return [each for part in parts for each in tensors_in(part)]


def shape_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """Dtype and sizes; symbolic sizes by their expression, since comparing SymInts would install guards.

    Tracing may have found a symbol to be a number: such a size equals that number.
    """
    return (tensor.dtype, *(str(symbol_of(size)) for size in tensor.shape))


def is_parameter(node: fx.Node) -> bool:
    """Whether a node holds a weight, buffer or constant of the model and not an activation."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if isinstance(example_of(node), torch.nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name:
        return True
    tensor_dict = node.meta.get("tensor_dict") or {}
    return bool(tensor_dict.get("_dynamo_static_input_type"))


_OF_MODEL = re.compile(r"^L\['self'\]|\._modules\[")


def is_of_model(node: fx.Node) -> bool:
    """Whether a graph's input is what a module holds, by where the tracer found it."""
    return bool(_OF_MODEL.search(source_name(node)))


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add_``, ``setitem``, ``linear``."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_mutation(node: fx.Node) -> bool:
    """Whether the node writes to its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name.strip("_") in _MUTATING_FUNCTIONS:
        return True
    if name in _NOT_MUTATING or name.startswith("_"):
        return False
    by_schema = is_mutable_overload(node.target)
    if by_schema is not None:
        return by_schema
    return name.endswith("_") or "out" in node.kwargs or _works_in_place(node)


def _works_in_place(node: fx.Node) -> bool:
    """Whether ``inplace`` is True, by name or, as modules such as ``nn.LeakyReLU`` pass it, by position."""
    place = _place_of_inplace(node.target) if node.op == "call_function" else None
    given = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get("inplace")
    return given is True


@functools.cache
def _place_of_inplace(target: Callable[..., object]) -> int | None:
    if getattr(target, "__module__", None) != "torch.nn.functional":
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def mutated_argument(node: fx.Node) -> fx.Node | None:
    """The node that a mutation writes to; None for other nodes."""
    if not is_mutation(node):
        return None
    written = node.kwargs.get("out", node.args[0] if node.args else None)
    return written if isinstance(written, fx.Node) else None


def viewed_argument(node: fx.Node) -> fx.Node | None:
    """The argument in whose memory the node's result lies: what it is a view of, or wrote to. None: the result is new.

    By the example values, which share memory where the real ones do.
    """
    if name_of(node) == "dropout" and not is_random(node):
        # gives what it is given; its example value is a copy (seen in torch 2.13)
        return next(iter(node.all_input_nodes), None)
    made = {memory_of(tensor) for tensor in tensors_in(example_of(node))}
    if not made:
        return None
    return next((each for each in node.all_input_nodes if made & {memory_of(t) for t in tensors_in(example_of(each))}), None)


def knows_memory(node: fx.Node) -> bool:
    """Whether the node's example value tells what it shares memory with."""
    tensors = tensors_in(example_of(node))
    return bool(tensors) and all(map(shows_memory, tensors))


def is_random(node: fx.Node) -> bool:
    """Whether running the node moves a random number generator."""
    name = name_of(node)
    if name in _RANDOM:
        return True
    if name in _DROPOUT:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else name != "rrelu")
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return training is not False and _is_not_zero(probability)
    if name == "scaled_dot_product_attention":
        return _is_not_zero(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return False


def _is_not_zero(probability: Any) -> bool:
    """Whether a probability of dropout, a number or a node, is one. ``dynamic=True`` makes a number of the model an input."""
    if not isinstance(probability, fx.Node):
        return bool(probability != 0.0)
    value = example_of(probability)
    if not isinstance(value, torch.SymFloat) or hint_of(value) is None:
        return True
    # asking guards the answer: with another value the model is traced again
    return bool(value != 0.0)


def repeats(gm: fx.GraphModule) -> bool:
    """Whether running the graph once more gives the same and changes nothing: it draws no random numbers, and writes to
    nothing that the model holds."""
    for node in gm.graph.nodes:
        if is_random(node):
            return False
        written = mutated_argument(node)
        while written is not None and written.op not in ("placeholder", "get_attr"):
            written = viewed_argument(written)
        if written is not None and (is_parameter(written) or is_of_model(written)):
            return False
    return True


def is_removable(node: fx.Node) -> bool:
    """Whether erasing the node, once nobody uses it, changes nothing else."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or is_mutation(node) or is_random(node):
        return False
    if is_higher_order(node.target):
        return False
    return not name_of(node).startswith(("_enter", "_exit", "_vmap", "_add_batch", "_remove_batch", "_set_", "_sdpa_kernel"))
