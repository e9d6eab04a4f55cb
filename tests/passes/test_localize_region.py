"""Distributed tensors at the border of the region become local ones; on one process with a mesh of one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import expecttest
import pytest
import torch
import torch.distributed as dist
from cache_dit.passes import Refusal, Region, choose_region, find_blocks, localize_region, outline_region
from cache_dit.passes.graph_values import example_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..models import capture


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Block(nn.Module):
    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h + torch.tanh(h) * t


class Model(nn.Module):
    """Blocks between what makes a distributed tensor and what takes one; ``leaves``: how it is split behind them."""

    def __init__(self, leaves: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leaves = leaves

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, t)
            if self.leaves is not None and number == 1:
                x = x.redistribute(placements=self.leaves)  # type: ignore[attr-defined]
        return x * 2.0


def traced(model: nn.Module, *inputs: Tensor) -> tuple[Any, Region]:
    gm = capture(model, *inputs)
    region = choose_region(gm, find_blocks(gm))
    assert isinstance(region, Region)
    return gm, region


def split(mesh: DeviceMesh, placement: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        DTensor.from_local(torch.randn(2, 4), mesh, [placement]),
        DTensor.from_local(torch.randn(2, 4), mesh, [Replicate()]),
    )


class TestLocalizeRegion(expecttest.TestCase):
    @pytest.fixture(autouse=True)
    def _mesh(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def test_snapshot(self) -> None:
        gm, region = traced(Model(), *split(self.mesh, Shard(1)))
        local = localize_region(gm, region)
        assert isinstance(local, Region)
        outline_region(gm, local)
        gm.recompile()
        lines = [line.split(";")[0].rstrip() for line in gm.code.splitlines() if line.strip()]
        self.assertExpectedInline("\n".join(lines), """\
def forward(self, L_x_ : torch.distributed.tensor.DTensor, L_t_ : torch.distributed.tensor.DTensor):
    l_x_ = L_x_
    l_t_ = L_t_
    tanh = torch.tanh(l_x_)
    mul = tanh * l_t_
    x = l_x_ + mul
    to_local = x.to_local()
    cache_region = self.cache_region(to_local, x, l_t_)
    getitem = cache_region[0]
    with_layout_of = cache_dit_passes_localize_region_with_layout_of(getitem, x)
    mul_3 = with_layout_of * 2.0
    return (mul_3,)""")


def test_results_are_the_same_to_the_bit(mesh: DeviceMesh) -> None:
    inputs = split(mesh, Shard(1))
    gm, region = traced(Model(), *inputs)
    local = localize_region(gm, region)
    assert isinstance(local, Region)
    assert not any(isinstance(example_of(out.node), DTensor) for out in local.live_outs)
    assert not any(out.base is None or isinstance(example_of(out.base), DTensor) for out in local.live_outs)
    outline_region(gm, local)
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        [made] = gm(*inputs)
        wanted = Model()(*inputs)
    assert made.placements == wanted.placements and torch.equal(made.to_local(), wanted.to_local())
    # a second time there is nothing left to do
    assert localize_region(gm, local) is local


def test_plain_tensors_are_left_alone() -> None:
    gm, region = traced(Model(), torch.randn(2, 4), torch.randn(2, 4))
    before = str(gm.graph)
    assert localize_region(gm, region) is region
    assert str(gm.graph) == before


@pytest.mark.parametrize(("enters", "leaves"), [(Shard(1), [Replicate()]), (Shard(0), [Shard(1)]), (Partial(), None)])
def test_other_placements_and_partial_sums_are_refused(mesh: DeviceMesh, enters: Any, leaves: Any) -> None:
    gm, region = traced(Model(leaves), *split(mesh, enters))
    before = str(gm.graph)
    found = localize_region(gm, region)
    assert isinstance(found, Refusal) and found.key == "distributed_tensor"
    assert str(gm.graph) == before
