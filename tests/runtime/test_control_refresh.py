"""What enters the cached blocks from outside and moves: said once, or heeded under ``control_refresh``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_dit
from cache_dit.messages import CacheDitWarning

from .. import models
from ..passes.test_control_inputs import Controlled

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
STEPS = 8


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


def control(size: float) -> Tensor:
    return torch.full((models.BATCH, models.TOKENS, models.WIDTH), size)


def run(model: Controlled, sizes: list[float], one: Tensor | None = None) -> list[int]:
    """The steps that were skipped where the control has these values; with ``one`` tensor for all, written in place."""
    skipped = []
    cache_dit.new_run(model)
    with torch.no_grad():
        for step, size in enumerate(sizes):
            x, t = models.example(seed=step)
            before = cache_dit.get_stats(model).hits
            model(x, t - 0.08 * step, control(size) if one is None else one.fill_(size))
            if cache_dit.get_stats(model).hits > before:
                skipped.append(step + 1)
    return skipped


def enabled(**options: Any) -> Controlled:
    model: Any = cache_dit.enable_cache(models.seeded(Controlled), **EXACT, **options)
    return model


def test_a_control_that_moves_is_spoken_of_once() -> None:
    model = enabled()
    with pytest.warns(CacheDitWarning, match=r"moved by 20\.0 %.*\n.*control_refresh=True"):
        assert run(model, [1.0, 1.0, 1.0, 1.2, 1.2, 1.2, 1.2, 1.2]) == [4, 6, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        assert run(model, [float(n) for n in range(STEPS)]) == [4, 6, 8]


def test_equal_values_in_new_tensors_have_not_moved() -> None:
    model = enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        assert run(model, [1.0] * STEPS) == [4, 6, 8]


def test_a_step_is_computed_where_the_control_moved() -> None:
    model = enabled(control_refresh=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        assert run(model, [1.0, 1.0, 1.0, 1.2, 1.2, 1.6, 1.6, 1.6]) == [4, 8]
    assert cache_dit.get_stats(model).refused == {"control_moved": 1}


def test_true_means_a_tenth() -> None:
    assert run(enabled(control_refresh=True), [1.0, 1.0, 1.0, 1.09, 1.0, 1.11, 1.0, 1.0]) == [4, 8]


def test_a_control_from_nothing_has_moved() -> None:
    assert run(enabled(control_refresh=True), [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]) == [4, 8]


def test_a_control_that_turns_nan_has_moved() -> None:
    sizes = [1.0, 1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]
    assert 4 not in run(enabled(control_refresh=True), sizes)
    with pytest.warns(CacheDitWarning, match=r"moved by nan %"):
        run(enabled(), sizes)


def test_a_control_written_in_place_has_moved() -> None:
    assert run(enabled(control_refresh=True), [1.0] * STEPS, one=control(1.0)) == []


def test_what_moves_is_measured_from_the_last_computed_step() -> None:
    """Small moves add up over the steps that are skipped in a row."""
    model = enabled(control_refresh=0.1, skip_interval=1, max_consecutive_hits=6)
    assert run(model, [1.0, 1.0, 1.0, 1.04, 1.08, 1.12, 1.16, 1.2]) == [4, 5, 7, 8]
