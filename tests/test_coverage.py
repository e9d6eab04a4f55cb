"""Models of different structure, cached with no adapter; `make coverage` runs every class."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("diffusers")

from .coverage import TINY_MODELS, discovered
from .coverage.check import check

# Classes with no configuration, and why.
UNTESTED = {"HunyuanDiT2DMultiControlNetModel": "a list of control networks, each of which is cached for itself"}

# One class for each structure: what the finder has to see in it.
STRUCTURES = {
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),  # two lists, joined streams
    "DiTTransformer2DModel": ("transformer_blocks",),  # a part of the first block runs again behind the last
    "UTransformer2DModel": ("transformer_in_blocks", "transformer_out_blocks"),  # skips across the middle
    "LatteTransformer3DModel": ("transformer_blocks + temporal_transformer_blocks",),  # lists that take turns
    "LTX2VideoTransformer3DModel": ("transformer_blocks",),  # two streams
    "Krea2Transformer2DModel": ("transformer_blocks",),  # two refiners in front
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_found_and_cached(name: str) -> None:
    tiny = TINY_MODELS[name]
    report = check(tiny, whole=False)
    assert report.cached, report.reason
    assert not report.wrong
    assert report.lists == STRUCTURES[name]


def test_every_class_of_diffusers_has_a_configuration() -> None:
    configured = {tiny.name for tiny in TINY_MODELS.values()}
    assert set(discovered()) - configured == set(UNTESTED)
    assert configured <= set(discovered())
