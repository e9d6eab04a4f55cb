"""Models of different structure, cached with no adapter; `make coverage` runs every class."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_the_parts_of_the_sweep_are_the_whole_and_a_process_checks_what_it_is_given_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "coverage.py"
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("sweep", script)
    assert spec is not None and spec.loader is not None
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)

    def chosen(*arguments: str) -> list[str]:
        return [tiny.label for tiny in coverage._chosen(coverage._parsed(arguments))]

    parts = [chosen("--part", f"{part}/3") for part in (1, 2, 3)]
    assert sorted(label for part in parts for label in part) == sorted(TINY_MODELS)
    assert chosen("--part", "today/3") in parts
    name = next(tiny.name for tiny in TINY_MODELS.values() if tiny.name != tiny.label)
    assert len(chosen(name)) > 1
    assert chosen("--worker", name) == [name]
