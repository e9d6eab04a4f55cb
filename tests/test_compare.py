"""Runs with and without caching: what is measured, the texts and the picture made of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit import compare
from cache_dit.compare import (
    WARM_UP_STEPS,
    Contender,
    Measured,
    MissingPackageError,
    Panel,
    Run,
    Strip,
    compiled_copy,
    display_width,
    draw_comparison,
    format_table,
    measure,
    mosaic,
    progress_bar,
    psnr,
    require,
    result_table,
    steps_to_take,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.inner(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * (1 + timestep[:, None] / 1000)
        for block in self.blocks:
            x = block(x)
        return x


def denoise(model: Callable[..., Tensor], seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(steps):
            x = x - model(x, torch.full((3,), 1000.0 - 10 * step)) / steps
            on_step()
    return x


def measured(name: str, *outputs: Tensor, seconds: tuple[float, ...] = (1.0,), hits: int = 0) -> Measured:
    runs = zip(outputs, seconds * len(outputs), strict=False)
    return Measured(name, 0.5, tuple(Run(time, output, 10 * bool(hits), hits, ()) for output, time in runs))


def test_psnr_is_the_definition_in_float64() -> None:
    reference, outputs = torch.randn(5, 1, 6, 6), torch.randn(5, 1, 6, 6)
    squares = (reference.numpy().astype(np.float64) - outputs.numpy().astype(np.float64)) ** 2
    expected = 10 * np.log10(2.0**2 / squares.mean(axis=(1, 2, 3)))
    found = psnr(reference, outputs)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(psnr(reference, outputs, 1.0).numpy(), expected - 20 * math.log10(2), rtol=1e-12)


def test_psnr_keeps_differences_that_half_precision_would_lose() -> None:
    reference = torch.ones(1, 4, dtype=torch.bfloat16)
    assert psnr(reference, reference + 2**-7, 1.0).item() == pytest.approx(20 * 7 * math.log10(2))


def test_psnr_of_equal_samples_is_infinite_and_wrong_arguments_are_refused() -> None:
    same = torch.ones(2, 3)
    assert psnr(same, same.clone()).tolist() == [math.inf, math.inf]
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        psnr(same, torch.ones(3, 2))
    with pytest.raises(ValueError, match="value_range=0"):
        psnr(same, same, 0.0)


def test_mean_psnr_is_over_the_samples_that_differ() -> None:
    reference = torch.zeros(2, 4)
    outputs = torch.stack([torch.zeros(4), torch.full((4,), 0.2)])
    assert measured("b", outputs).psnr_to(measured("a", reference), 2.0) == pytest.approx(20.0)
    assert measured("b", reference).psnr_to(measured("a", reference), 2.0) == math.inf
    assert math.isnan(measured("b", outputs * math.nan).psnr_to(measured("a", reference), 2.0))


def test_runs_are_interleaved_from_the_same_seeds_after_two_short_ones() -> None:
    seen: list[tuple[str, int, int]] = []
    steps_told: list[int] = []

    def contender(name: str, tells: bool) -> Contender:
        def run(seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
            seen.append((name, seed, steps))
            for _ in range(steps if tells else 0):
                on_step()
            return torch.full((2, 1), float(seed))

        return Contender(name, run)

    pair = [contender("a", True), contender("b", False)]
    first, second = measure(pair, [7, 8], 10, lambda name, done: steps_told.append(done))
    warm = WARM_UP_STEPS
    assert seen[:4] == [("a", 7, warm), ("a", 7, warm), ("b", 7, warm), ("b", 7, warm)]
    assert seen[4:] == [("a", 7, 10), ("b", 7, 10), ("a", 8, 10), ("b", 8, 10)]
    assert first.outputs.flatten().tolist() == second.outputs.flatten().tolist() == [7, 7, 8, 8]
    assert sum(steps_told) == steps_to_take(2, 2, 10) == 64
    assert first.hit_rate is None and first.compile_seconds >= 0


def test_a_cached_model_is_measured_step_by_step(fresh_dynamo: None) -> None:
    model = Net().eval()
    plain = compiled_copy(model, "eager")
    cache_dit.enable_cache(model, inner="eager")
    pair = [
        Contender("plain", lambda *how: denoise(plain, *how)),
        Contender("cached", lambda *how: denoise(model, *how), lambda: cache_dit.get_stats(model)),
    ]
    reference, cached = measure(pair, [0, 1], 10)
    mask = tuple(step <= 3 or step % 2 == 1 for step in range(1, 11))
    assert [run.computed for run in cached.runs] == [mask, mask]
    assert [(run.calls, run.hits) for run in cached.runs] == [(10, 4), (10, 4)]
    assert cached.hit_rate == pytest.approx(40.0)
    assert reference.runs[0].computed == () and reference.hit_rate is None
    assert 20 < cached.psnr_to(reference) < 200


def test_plain_copy_shares_the_weights_and_leaves_the_model_alone(fresh_dynamo: None) -> None:
    model = Net().eval()
    plain = compiled_copy(model, "eager")
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert model._compiled_call_impl is None and plain._compiled_call_impl is not None


def test_result_table_holds_the_measured_figures() -> None:
    reference = measured("plain", torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), seconds=(2.0, 9.0, 3.0))
    cached = measured("cached", *[torch.full((1, 4), 0.2)] * 3, seconds=(1.5, 1.0, 4.0), hits=4)
    equal = measured("equal", *[torch.zeros(1, 4)] * 3, seconds=(3.0,))
    table = result_table([reference, cached, equal], 2.0, "en", {"more": ["x", "y", "z"]}).splitlines()
    assert table[0].split() == ["kind", "compile", "(s)", "a", "run", "(s)", "speed-up", "hit", "rate", "PSNR", "more"]
    assert table[2].split() == ["plain", "0.5", "3.00", "1.00x", "-", "-", "x"]
    assert table[3].split() == ["cached", "0.5", "1.50", "2.00x", "40.0%", "20.0", "dB", "y"]
    assert table[4].split() == ["equal", "0.5", "3.00", "1.00x", "-", "identical", "z"]


def test_columns_line_up_behind_chinese_letters() -> None:
    lines = format_table([["方式", "编译（秒）"], ["a", "1.0"], ["enable", "22.0"]]).splitlines()
    assert {display_width(line) for line in lines} == {6 + 2 + 10}
    assert lines[2] == "a" + " " * 14 + "1.0"


def test_progress_without_tqdm_is_a_line_for_each_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "is_installed", lambda package: False)
    logger = logging.getLogger("cache_dit")
    with progress_bar(4) as advance:
        assert logger.level == logging.WARNING
        for name, done in (("a", 0), ("a", 1), ("a", 1), ("b", 0), ("b", 2)):
            advance(name, done)
    assert logger.level == logging.NOTSET
    assert capsys.readouterr().err == "0/4 a\n2/4 b\n"


def test_progress_bar_is_on_stderr_and_obeys_the_users_level(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    logger = logging.getLogger("cache_dit")
    logger.setLevel(logging.DEBUG)
    try:
        with progress_bar(2) as advance:
            advance("kind", 0)
            advance("kind", 2)
            assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)
    captured = capsys.readouterr()
    assert captured.out == "" and "kind" in captured.err


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingPackageError, match=r"no_such_package.*\n.*pip install -e '\.\[demo\]'"):
        require("no_such_package", "en")
    with pytest.raises(MissingPackageError, match="no_such_package"):
        require("no_such_package.part")


def test_without_a_compiler_eager_is_what_is_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compare.cpp_compiler() is None
    assert compare.usable_inner("cpu") == "eager"
    monkeypatch.setattr(compare, "is_installed", lambda package: package == "triton")
    assert compare.usable_inner("cuda") == "inductor"


def test_mosaic_places_pictures_row_by_row_with_white_gaps() -> None:
    pictures = np.zeros((3, 2, 4), dtype=np.float32)
    pictures[1] = 0.5
    tiles = mosaic(pictures, columns=2, gap=1)
    assert tiles.shape == (5, 9)
    assert (tiles[:2, :4] == 0).all() and (tiles[:2, 5:] == 0.5).all() and (tiles[3:, :4] == 0).all()
    assert (tiles[2] == 1).all() and (tiles[:, 4] == 1).all() and (tiles[3:, 5:] == 1).all()
    assert mosaic(np.zeros((2, 2, 4, 3), dtype=np.float32), columns=2, gap=1).shape == (2, 9, 3)


@pytest.mark.parametrize("strips", [[], [Strip("a", (True, False)), Strip("b", (True, True))]])
def test_picture_is_written_into_a_new_folder(tmp_path: Path, strips: list[Strip]) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "new" / "picture.png"
    grey, colour = np.zeros((4, 8, 8), dtype=np.float32), np.ones((4, 8, 8, 3), dtype=np.float32)
    draw_comparison(path, [Panel("plain", grey), Panel("cached", colour)], strips, columns=2)
    pixels = image.imread(path)[..., :3]
    assert (pixels == 0).all(-1).sum() > 1000
    for wanted in (compare.COMPUTED_COLOUR, compare.SKIPPED_COLOUR):
        rgb = [int(wanted[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert bool(np.isclose(pixels, rgb, atol=1e-3).all(-1).any()) == bool(strips)
