"""localize_region: distributed tensors cross the border of the cached region as the part that lies on this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..torch_internals import is_distributed
from .choose_region import LiveOut, Refusal, Region
from .graph_values import example_of


def localize_region(gm: fx.GraphModule, region: Region) -> Region | Refusal:
    """Let a region whose blocks hand ``DTensor`` on take and give local tensors. Returns the region with its new border.

    *Detects* live-outs that are distributed tensors.

    *Rewrites to*, with `h1` the base and `h3` what leaves::

        %h3 = block_2(block_1(%h1))     ->      %l1 = %h1.to_local()
        %y = head(%h3)                          %l3 = block_2(block_1(%h1)).to_local()
                                                %y = head(with_layout_of(%l3, %h1))

    so that residuals are kept as the activations are split, and a prediction needs no message.

    *Refuses when* a live-out has no base that is split in the same way, or holds partial sums.

    *Exact*: nothing is moved between processes.
    """
    outs = [out for out in region.live_outs if is_distributed(example_of(out.node))]
    if not outs:
        return region
    if any(not _can_be_localized(out, region) for out in outs):
        return Refusal("distributed_tensor")
    inside = set(region.nodes)
    bases = {out.base: _local(gm.graph, out.base, behind=out.base) for out in outs if out.base is not None}
    last = region.nodes[-1]
    local_outs: dict[fx.Node, fx.Node] = {}
    for out in outs:
        local_outs[out.node] = last = _local(gm.graph, out.node, behind=last)
    behind = last
    for out in outs:
        users = [user for user in out.node.users if user not in inside and user is not local_outs[out.node]]
        with gm.graph.inserting_after(behind):
            behind = gm.graph.call_function(with_layout_of, (local_outs[out.node], out.base))
        behind.meta = dict(out.node.meta)
        for user in users:
            user.replace_input_with(out.node, behind)
    return replace(
        region,
        nodes=(*region.nodes, *local_outs.values()),
        live_ins=(*bases.values(), *region.live_ins),
        live_outs=tuple(_localized(out, local_outs, bases) for out in region.live_outs),
    )


def with_layout_of(local: torch.Tensor, like: Any) -> torch.Tensor:
    """The distributed tensor of ``like``'s sizes, mesh and placements whose part on this process is ``local``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _can_be_localized(out: LiveOut, region: Region) -> bool:
    if out.base is None or out.base in region.hoisted or not is_distributed(example_of(out.base)):
        return False
    value: Any = example_of(out.node)
    base: Any = example_of(out.base)
    alike = value.device_mesh == base.device_mesh and tuple(value.placements) == tuple(base.placements)
    return bool(alike and not any(placement.is_partial() for placement in value.placements))


def _local(graph: fx.Graph, node: fx.Node, behind: fx.Node) -> fx.Node:
    """This process's part of a distributed tensor."""
    with graph.inserting_after(behind):
        local = graph.call_method("to_local", (node,))
    value: Any = example_of(node)
    local.meta = {**node.meta, "example_value": value.to_local()}
    return local


def _localized(out: LiveOut, local_outs: dict[fx.Node, fx.Node], bases: dict[fx.Node, fx.Node]) -> LiveOut:
    if out.node not in local_outs or out.base is None:
        return out
    return replace(out, node=local_outs[out.node], base=bases[out.base], stream=None)
