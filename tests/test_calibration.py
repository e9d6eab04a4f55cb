"""One profiled run: what it says, how it is kept, and what it does to the placement."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.calibration import Calibration, read_calibration, structure_of
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.registry import session_of_module

from .models import TinyDiT, example, seeded

STEPS = 12
QUIET: dict[str, Any] = {"inner": "eager", "language": "en"}


def tiny() -> Any:
    return seeded(TinyDiT)


def times(steps: int = STEPS) -> list[float]:
    return [1.0 - i / steps for i in range(steps)]


def denoise(model: Callable[..., Tensor], steps: int = STEPS) -> Tensor:
    x, t = example()
    with torch.no_grad():
        for level in times(steps):
            x = x - model(x, t * 0.0 + level) / steps
    return x


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model = tiny()
    return cache_dit.calibrate(model, lambda: denoise(model), **QUIET)


def test_the_clock_is_the_change_of_the_residual(calibration: Calibration) -> None:
    """Against residuals taken by hand in float64, behind the first block."""
    model, residuals = tiny().double(), []
    x, t = (each.double() for each in example())
    with torch.no_grad():
        for level in times():
            h, temb = model.embed(x), model.time(t * 0.0 + level)
            h = base = model.blocks[0](h, temb)
            for block in model.blocks[1:]:
                h = block(h, temb)
            residuals.append(h - base)
            x = x - model.head(h) / STEPS
    changes = [float((b - a).norm() / b.norm()) for a, b in pairwise(residuals)]
    changes.append(changes[-1])
    wanted = [sum(changes[:i]) / sum(changes) for i in range(STEPS + 1)]
    assert calibration.clock == pytest.approx(wanted, abs=1e-4)
    assert (calibration.model, calibration.num_steps) == ("TinyDiT", STEPS)


def test_the_model_is_as_before(calibration: Calibration) -> None:
    model = tiny()
    before, state = dict(vars(model)), torch.get_rng_state()
    cache_dit.calibrate(model, lambda: denoise(model), **QUIET)
    assert vars(model).keys() == before.keys() and torch.equal(torch.get_rng_state(), state)
    assert not cache_dit.get_stats(model).enabled


def test_it_is_kept_as_a_file(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    calibration.save(file)
    assert read_calibration(str(file)) == read_calibration(file) == calibration
    assert json.loads(file.read_text())["format"] == 1


def computed(model: nn.Module, steps: int = STEPS) -> str:
    masks: list[str] = []

    class Seen:
        def compiling(self, reason: str | None) -> None: ...

        def called(self, call: Any) -> None:
            masks.append("01"[not call.skipped])

        def measured(self, step: int, error: float) -> None: ...

    session = session_of_module(model)
    assert session is not None
    session.observer = Seen()
    cache_dit.new_run(model, num_steps=steps)
    denoise(model, steps)
    return "".join(masks)


def late(calibration: Calibration) -> Calibration:
    """Nearly all of the change in the last third of the run."""
    clock = [0.05 * i / 8 for i in range(9)] + [0.25, 0.5, 0.75, 1.0]
    return Calibration("TinyDiT", calibration.structure, STEPS, tuple(clock))


def enabled(**options: Any) -> nn.Module:
    return cache_dit.enable_cache(tiny(), strategy="adaptive", target_speedup=2.0, correction=False, **QUIET, **options)


def test_computed_steps_lie_where_it_changes(calibration: Calibration) -> None:
    by_steps, by_change = computed(enabled()), computed(enabled(calibration=late(calibration)))
    assert by_change.count("1") == by_steps.count("1") == STEPS // 2
    assert by_change[8:].count("1") > by_steps[8:].count("1")


def test_it_holds_for_runs_of_its_length_alone(calibration: Calibration) -> None:
    model = enabled(calibration=late(calibration))
    with pytest.warns(CacheDitWarning, match="runs of 12 steps and this one has 8"):
        assert computed(model, 8) == computed(enabled(), 8)


def test_it_holds_for_the_blocks_that_were_measured(calibration: Calibration) -> None:
    model = enabled(calibration=late(calibration), front_blocks=2)
    with pytest.warns(CacheDitWarning, match="another structure"):
        assert computed(model) == computed(enabled(front_blocks=2))


def test_it_is_said_where_it_does_nothing(calibration: Calibration) -> None:
    model = cache_dit.enable_cache(tiny(), calibration=calibration, **QUIET)
    with pytest.warns(CacheDitWarning, match="target_speedup alone"):
        denoise(model)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda model: None, "Remedy"),
        (lambda model: denoise(model, 2), "got 1 runs, 2 steps"),
        (lambda model: [denoise(model), denoise(model)], "got 2 runs, 12 steps"),
    ],
)
def test_other_than_one_run_is_refused(run: Callable[[Any], object], said: str) -> None:
    model = tiny()
    with pytest.raises(cache_dit.CacheDitError, match=said):
        cache_dit.calibrate(model, lambda: run(model), **QUIET)
    assert not cache_dit.get_stats(model).enabled


def test_an_enabled_model_is_refused_and_left_on() -> None:
    model = cache_dit.enable_cache(tiny(), **QUIET)
    with pytest.raises(cache_dit.CacheDitError, match="cached already"):
        cache_dit.calibrate(model, lambda: denoise(model), **QUIET)
    assert cache_dit.get_stats(model).enabled


def test_structure_is_told_by_the_blocks(calibration: Calibration) -> None:
    model = enabled()
    denoise(model)
    region = cache_dit.explain(model).region
    assert region is not None and calibration.structure == (structure_of(region),)
