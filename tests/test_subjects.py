"""The models that the benchmarks measure, by their names and by shapes that the command line gives."""

from __future__ import annotations

import argparse

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("flux-small", "Flux-shaped (2 + 4 blocks, dim 128, 64 + 64 tokens)"),
        ("flux", "Flux-shaped (2 + 4 blocks, dim 128, 64 + 64 tokens)"),
        ("flux-deep-9", "Flux-shaped (2 + 7 blocks, dim 128, 64 + 64 tokens)"),
        ("flux:single=3,side=6,text=10", "Flux-shaped (2 + 3 blocks, dim 128, 36 + 10 tokens)"),
        ("wan:depth=2,frames=2", "Wan-shaped (2 blocks, dim 128, 32 tokens)"),
        ("qwen:depth=3,heads=1", "Qwen-Image-shaped (3 blocks, dim 64, 64 + 64 tokens)"),
        ("sd3:depth=2,side=5", "SD3-shaped (2 blocks, dim 128, 25 + 64 tokens)"),
    ],
)
def test_a_subject_has_the_shape_that_its_name_says(name: str, title: str) -> None:
    from subjects import subject

    made = subject(name)
    assert made.title == title
    with torch.no_grad():
        (result, *_) = made.model(**made.inputs(0))
        (floor, *_) = made.floor()(**made.inputs(0))
    assert result.shape == floor.shape and result.isfinite().all()
    # the floor leaves the model as it was
    blocks = sum(len(getattr(made.model, each)) for each in made.lists)
    assert f"{blocks} blocks" in title or f"{len(getattr(made.model, made.lists[0]))} + " in title


def test_every_name_has_a_maker() -> None:
    from run import DEPTHS, NAMED
    from subjects import SUBJECTS, maker

    for name in (*SUBJECTS, *NAMED, *(f"flux-deep-{depth}" for depth in DEPTHS)):
        assert callable(maker(name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flx", "no subject 'flx': there are demo, .*flux-deep-N, flux:double=2,single=4,heads=2,side=8,text=64, wan:"),
        ("flux-deep-2", "no subject"),
        ("flux-deep-x", "no subject"),
        ("flux:depth=3", "'depth=3' in 'flux:depth=3': wanted is one of double, single, heads, side, text"),
        ("wan:depth=0", "'depth=0'.*a whole number from 1"),
        ("wan:depth", "'depth' in"),
        ("sd3:side=-4", "'side=-4'"),
    ],
)
def test_what_is_no_subject_says_what_there_is(name: str, said: str) -> None:
    from run import _subject_name
    from subjects import maker

    with pytest.raises(ValueError, match=said):
        maker(name)
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        _subject_name(name)


def test_a_shape_names_no_folder() -> None:
    from speed_report import _file_name

    assert _file_name("flux-small dynamic") == "flux-small-dynamic"
    assert _file_name("wan:depth=8,heads=4") == "wan-depth-8-heads-4"
