"""Inputs that enter the cached blocks past the blocks that always compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cache_dit.passes import Region, choose_region, control_inputs, find_blocks
from torch import Tensor, fx, nn

from tests import models
from tests.models import TOKENS, WIDTH, Block, TinyDiT, capture, example, seeded


class Controlled(TinyDiT):
    """A control network's outputs, added behind the blocks from the second on."""

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for i, block in enumerate(self.blocks):
            h = block(h, temb)
            if i > 0:
                h = h + control
        return self.head(h)


class ControlledEverywhere(TinyDiT):
    """One output of a control network, added behind every block, the front's included."""

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            h = block(h, temb) + control
        return self.head(h)


class Added(TinyDiT):
    """An input that every block hears through the stream, the first one too."""

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        h, temb = self.embed(x) + control, self.time(t)
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


class LongSkip(TinyDiT):
    """The embedded input is added again in the middle of the blocks."""

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        first, temb = self.embed(x), self.time(t)
        h = first
        for i, block in enumerate(self.blocks):
            h = block(h, temb) + (first if i == 2 else 0.0)
        return self.head(h) + control.sum()


def found(build: Callable[[], nn.Module], **wanted: int) -> list[str]:
    x, t = example()
    control = x.new_ones(x.shape[0], TOKENS, WIDTH)
    gm: fx.GraphModule = capture(seeded(build), x, t, control)
    region = choose_region(gm, find_blocks(gm), **wanted)
    assert isinstance(region, Region)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [placeholders[i].name for i in control_inputs(gm, region)]


@pytest.mark.parametrize("front", [0, 1, 2])
def test_what_is_added_behind_blocks_is_a_control(front: int) -> None:
    assert found(Controlled, front=front) == ["l_control_"]


@pytest.mark.parametrize("front", [0, 1, 2])
def test_a_control_that_the_front_shares(front: int) -> None:
    assert found(ControlledEverywhere, front=front) == ["l_control_"]


@pytest.mark.parametrize("build", [Added, LongSkip])
@pytest.mark.parametrize("front", [1, 2])
def test_what_the_first_block_hears_is_none(build: Callable[[], nn.Module], front: int) -> None:
    assert found(build, front=front) == []


def test_the_pass_is_an_analysis() -> None:
    gm = capture(seeded(lambda: TinyDiT(block=Block)), *example())
    region = choose_region(gm, find_blocks(gm))
    assert isinstance(region, Region)
    before = models.compact(gm)
    assert control_inputs(gm, region) == ()
    assert models.compact(gm) == before
