"""What CUDA graphs ask of programs: buffers that are not copied at each replay, and results that outlive the next one.

A replay reads and writes the memory that it was recorded with. Inputs are copied there first unless they are known to stay
where they are; what a program writes to must be known so, or torch leaves the graph unrecorded. Results lie in memory of the
recording, which the next replay writes over, while statistics are read a step later and a sampler may keep what it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..passes import CacheInputs
from ..passes.graph_values import example_of, tensors_in
from ..runtime.program import FlatCall, Programs
from ..torch_internals import at_fixed_address, memory_of


def hold_buffers(gm: fx.GraphModule, inputs: CacheInputs) -> int:
    """Mark the cache's buffers among a rewritten graph's inputs as tensors that stay where they are. Returns how many.

    The host exchanges references to them, so an input has as many addresses as there are buffers of its kind: torch records
    once for each.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    count = len(inputs.stored) * inputs.history + (inputs.front is not None)
    held = [node for node in placeholders[len(placeholders) - count :] if _device_of(node) == inputs.device]
    for node in held:
        at_fixed_address(node)
    return len(held)


def _device_of(node: fx.Node) -> torch.device | None:
    value = example_of(node)
    return value.device if isinstance(value, torch.Tensor) else None


def lasting(programs: Programs, gm: fx.GraphModule) -> Programs:
    """Programs whose results are copies, but for those that are parts of what the caller gave."""
    given = {memory_of(each) for node in gm.graph.nodes if node.op == "placeholder" for each in tensors_in(example_of(node))}
    results: Any = next(iter(reversed(gm.graph.nodes))).args[0]
    copied = [not any(memory_of(each) in given for each in tensors_in(_example(result))) for result in results]
    return Programs(_copying(programs.compute, copied), _copying(programs.reuse, copied))


def _example(result: object) -> object:
    return example_of(result) if isinstance(result, fx.Node) else None


def _copying(run: FlatCall, copied: Sequence[bool]) -> FlatCall:
    def call(flat: Sequence[Any]) -> Sequence[Any]:
        return tuple(
            value.clone() if copy and isinstance(value, torch.Tensor) else value
            for value, copy in zip(run(flat), copied, strict=True)
        )

    return call
