"""Numbers at their limits: residuals that overflow, mixed and automatic precision, forecasts that run away."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.forecasts import FORECASTS, Point
from cache_dit.forecasts.points import MAX_WEIGHT_SUM
from cache_dit.messages import CacheDitWarning

from .. import models
from .generations import EXACT, GREEDY, hits_of

pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def inputs_at(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, t = models.example(seed=step)
    return x.to(dtype), (t - 0.04 * step).to(dtype)


class Huge(nn.Module):
    """The stream is large and changes its sign: its values fit in float16, the difference of two of them does not."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return -x + 0.001 * torch.tanh(self.mlp(x))


class HugeDiT(models.TinyDiT):
    def __init__(self) -> None:
        super().__init__(2, Huge)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.full_like(self.embed(x), 40000.0)
        for block in self.blocks:
            h = block(h, t)
        return h


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_that_overflows_is_not_used(dtype: torch.dtype) -> None:
    model = models.seeded(HugeDiT, dtype)
    cache_dit.enable_cache(model, **GREEDY)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always", CacheDitWarning)
        for step in range(5):
            output, wanted = model(*inputs_at(step, dtype)), model.forward(*inputs_at(step, dtype))
            assert output.isfinite().all()
            torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-2)
    overflows = dtype == torch.float16
    assert any("NaN" in str(each.message) for each in said) == overflows
    assert hits_of(model) == (0 if overflows else 4)


def test_a_residual_kept_smaller_that_overflows_there_is_not_used() -> None:
    """float32 throughout, kept in float16."""
    model = models.seeded(HugeDiT)
    cache_dit.enable_cache(model, **GREEDY, residual_dtype=torch.float16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CacheDitWarning)
        for step in range(5):
            output = model(*inputs_at(step))
            assert output.isfinite().all()
            torch.testing.assert_close(output, model.forward(*inputs_at(step)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_a_residual_that_would_overflow_eight_bits_is_scaled(dtype: str) -> None:
    model = models.seeded(HugeDiT)
    cache_dit.enable_cache(model, **GREEDY, residual_dtype=dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", CacheDitWarning)
        for step in range(5):
            output = model(*inputs_at(step))
            torch.testing.assert_close(output, model.forward(*inputs_at(step)), rtol=1e-2, atol=1e-2)
    assert hits_of(model) == 4


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside: bool) -> None:
    """Around the model, or in its blocks: computed steps are the plain ones, skipped ones near them; on and off in mid-run."""

    class Casting(models.Block):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            modulated = super().forward(x, temb)
            with nullcontext() if outside else torch.autocast("cpu", torch.bfloat16):
                added = self.mlp(modulated)
            return modulated + added.to(x.dtype)

    model = models.seeded(lambda: models.TinyDiT(block=Casting))
    cache_dit.enable_cache(model, **EXACT)
    hits = []
    with torch.no_grad():
        for step in range(16):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside and step < 12):
                before = hits_of(model)
                output, wanted = model(*inputs_at(step)), model.forward(*inputs_at(step))
            hits.append(hits_of(model) > before)
            assert output.dtype == wanted.dtype
            if not hits[-1]:
                torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-2)
            assert output.isfinite().all()
    assert hits[:10] == [False, False, False, True, False, True, False, True, False, True]
    # what was stored under autocast is not used without it
    assert not hits[12]


class Mixed(models.Block):
    """Works in bfloat16 on a stream of float32; or keeps a stream of bfloat16 with a float32 time embedding."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        added = torch.tanh(self.mlp(x.to(torch.bfloat16)))
        return x + added.to(x.dtype) * temb[:, None].float().mean().to(x.dtype)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_of_mixed_precision(stream: torch.dtype) -> None:
    class MixedDiT(models.TinyDiT):
        def __init__(self) -> None:
            super().__init__(3, Mixed)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h, temb = self.embed(x).to(stream), self.time(t)
            for block in self.blocks:
                h = block(h, temb)
            return self.head(h.float())

    model = models.seeded(MixedDiT)
    for block in model.blocks:
        block.mlp.to(torch.bfloat16)
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad():
        for step in range(8):
            before = hits_of(model)
            output, wanted = model(*inputs_at(step)), model.forward(*inputs_at(step))
            if hits_of(model) == before:
                torch.testing.assert_close(output, wanted)
    assert hits_of(model) == 3


class Runaway(models.TinyDiT):
    """Its residual changes its sign and doubles from step to step: no line through it says what comes next."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        step = ((1.0 - t) * 10).round()[:, None, None]
        growth = torch.cos(torch.pi * step) * 2.0**step
        for block in self.blocks:
            h = h + growth * torch.ones_like(h) + 0.0 * block(h, self.time(t))
        return h


def worst_error(**options: Any) -> float:
    """The largest error of a skipped step, relative to the largest residual computed so far."""
    model = models.seeded(Runaway)
    cache_dit.enable_cache(model, inner="eager", noise_scale=0.0, language="en", **options)
    worst, largest = 0.0, 0.0
    with torch.no_grad():
        for step in range(12):
            x, t = models.example(seed=1)[0], torch.full((2,), 1.0 - step / 10)
            before = hits_of(model)
            output, wanted = model(x, t), model.forward(x, t)
            if hits_of(model) > before:
                worst = max(worst, float((output - wanted).abs().max()) / largest)
            else:
                largest = max(largest, float(wanted.abs().max()))
    return worst


@pytest.mark.parametrize("forecast", sorted(FORECASTS))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_forecast_of_any_kind_multiplies_what_is_stored_by_a_bounded_number(forecast: str, order: int) -> None:
    """Also where two computed steps lie close together and the next one far away."""
    for times in ([1.0, 0.999, 0.998, 0.1], [1.0, 0.999999, 0.5, 0.4999999], [3.0, 2.0, 1.0, -1e6], [1.0, 1.0, 1.0, 0.0]):
        stored = [Point(step, time) for step, time in zip((3, 2, 1), reversed(times[:3]), strict=True)]
        weights = FORECASTS[forecast].weights(stored, Point(4, times[3]), order)
        assert sum(map(abs, weights)) <= MAX_WEIGHT_SUM
        assert sum(weights) == pytest.approx(1.0, abs=1e-6)


def test_forecasts_that_run_away_are_bounded_by_the_measured_error() -> None:
    """'auto' goes back to reuse where a line errs more; adaptive computes while the forecast misses half of the residual."""
    reused = worst_error(forecast="reuse", warmup_steps=3)
    assert reused > 0.2
    assert worst_error(forecast="auto", warmup_steps=3) <= 2.0 * reused
    assert worst_error(forecast="taylor", order=2, strategy="adaptive", tolerance=100.0) == 0.0
