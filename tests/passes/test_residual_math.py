"""The arithmetic of the cache against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cache_dit.passes.residual_math import (
    SCALED,
    accumulation_dtype,
    noise,
    predict,
    quantised,
    rebuilt,
    relative_change,
    residual_of,
    statistics_length,
    store,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normal(key: int, stream: int = 0, count: int = 20_000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    value: torch.Tensor = noise((count,), count, torch.tensor(key), stream, CPU, dtype)
    return value


def measured(truth: torch.Tensor, stored: list[torch.Tensor]) -> list[float]:
    accumulate = accumulation_dtype(truth.dtype)
    return [float(value) for value in store(truth, [buffer.clone() for buffer in stored], truth.dtype, accumulate)]


@pytest.mark.parametrize("history", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_statistics_against_float64(history: int, dtype: torch.dtype, rtol: float) -> None:
    truth = random(5, 7, dtype=dtype)
    stored = [random(5, 7, seed=k + 1, dtype=dtype) for k in range(history)]
    values = measured(truth, stored)
    exact = [np.asarray(value.double()) for value in (truth, *stored)]
    differences = [newer - older for newer, older in pairwise(exact)]
    gram = [(a * b).mean() for i, a in enumerate(differences) for b in differences[i:]]
    assert len(values) == statistics_length(history)
    np.testing.assert_allclose(values, [0.0, (exact[0] ** 2).mean(), *gram], rtol=rtol, atol=rtol)


def test_statistics_of_neighbours_keep_digits_that_products_would_lose() -> None:
    older = random(1000, seed=1) + 100.0
    truth = older + 1e-3 * random(1000)
    exact = float(((truth.double() - older.double()) ** 2).mean())
    assert measured(truth, [older])[2] == pytest.approx(exact, rel=1e-5)


@given(st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_the_error_of_a_forecast_follows_from_the_statistics(history: int, seed: int) -> None:
    """||R - sum w r||^2 = c G c with the tail sums c of weights that sum to 1."""
    truth = random(64, seed=seed, dtype=torch.float64)
    stored = [random(64, seed=seed + k + 1, dtype=torch.float64) for k in range(history)]
    weights = np.random.default_rng(seed).normal(size=history)
    weights[0] += 1.0 - weights.sum()
    upper = iter(measured(truth, stored)[2:])
    gram = np.zeros((history, history))
    for a in range(history):
        for b in range(a, history):
            gram[a, b] = gram[b, a] = next(upper)
    tails = np.cumsum(weights[::-1])[::-1]
    miss = truth - sum(float(w) * r for w, r in zip(weights, stored, strict=True))
    assert tails @ gram @ tails == pytest.approx(float((miss**2).mean()), rel=1e-9)


def test_the_oldest_residual_is_overwritten_and_no_other() -> None:
    stored = [random(4, seed=k) for k in range(3)]
    before = [buffer.clone() for buffer in stored]
    truth = random(4, seed=9)
    store(truth, stored, torch.float32, torch.float32)
    assert torch.equal(stored[0], before[0])
    assert torch.equal(stored[1], before[1])
    assert torch.equal(stored[2], truth)


def test_what_is_not_finite_is_counted_and_stored_as_zero() -> None:
    truth = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0])
    stored = [torch.zeros(5)]
    count, mean_square, difference = store(truth, stored, torch.float32, torch.float32)
    assert count == 3.0
    assert stored[0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]
    assert mean_square == difference == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("large", [1e6, float("inf"), float("-inf"), float("nan")])
def test_what_overflows_the_stored_dtype_is_counted(dtype: torch.dtype, large: float) -> None:
    truth = torch.tensor([1.0, large])
    stored = [torch.zeros(2, dtype=dtype)]
    count, *rest = store(truth, stored, dtype, torch.float32)
    assert count == 1.0
    assert stored[0].tolist() == [1.0, 0.0]
    assert torch.stack(rest).isfinite().all()


QUANTISED = sorted(SCALED, key=str)


def step_of(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    """The distance from a number of a dtype of 8 bits to the next one."""
    if dtype == torch.int8:
        return torch.ones_like(value)
    # of the power of two below it; below the smallest normal number the step stays what it is there
    powers = torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=torch.finfo(dtype).smallest_normal))))
    # digits behind the point by its name: torch.finfo has another eps for float8_e5m2fnuz (seen in 2.13)
    return powers * (0.25 if "m2" in str(dtype) else 0.125)


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows of very different sizes, some with elements far from the others, some of zeros."""
    seed = draw(st.integers(0, 2**16))
    exponents = draw(st.lists(st.integers(-60, 100), min_size=1, max_size=4))
    values = random(len(exponents), draw(st.integers(1, 40)), seed=seed, dtype=torch.float64)
    values[:, 0] *= 10.0 ** draw(st.integers(-4, 3))
    values[draw(st.integers(0, len(exponents) - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return (values * torch.exp2(torch.tensor(exponents, dtype=torch.float64))[:, None]).float()


@pytest.mark.parametrize("dtype", QUANTISED)
@given(residual=rows())
@settings(max_examples=40, deadline=None)
def test_a_quantised_residual_is_off_by_half_a_step_at_most(dtype: torch.dtype, residual: torch.Tensor) -> None:
    stored, scale = quantised(residual, dtype, torch.float32)
    assert stored.dtype == dtype
    assert scale.shape == (len(residual), 1)
    exact, factor = residual.double(), scale.double()
    error = (stored.double() * factor - exact).abs()
    allowed = 0.5 * factor * step_of(dtype, exact / factor)
    # what the division in float32 adds
    assert (error <= allowed * (1.0 + 1e-6) + 2e-7 * exact.abs()).all()
    largest = exact.abs().amax(-1)
    top = torch.finfo(dtype).max if dtype.is_floating_point else 127
    torch.testing.assert_close(stored.double().abs().amax(-1)[largest > 0], torch.full_like(largest[largest > 0], top))
    assert not stored[largest == 0].double().any()


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_rows_at_the_limits_of_what_can_be_scaled(dtype: torch.dtype, accumulate: torch.dtype) -> None:
    limits = torch.finfo(accumulate)
    least = [limits.tiny / 2.0, limits.smallest_normal, -limits.smallest_normal * 3.0]
    sizes = [[0.0, -0.0, 0.0], least, [limits.max / 2.0, 1.0, -1.0], [limits.max, -limits.max, float("nan")]]
    residual = torch.tensor([*sizes, [float("inf"), 4.0, 2.0]], dtype=accumulate)
    stored, scales = [torch.zeros(5, 3, dtype=dtype)], [torch.zeros(5, 1, dtype=accumulate)]
    count, *rest = store(residual, stored, dtype, accumulate, scales)
    assert count == 4.0, "what is not finite, or so large that it might not be when it is restored"
    held = stored[0].to(accumulate) * scales[0]
    assert held.isfinite().all() and scales[0].isfinite().all()
    assert not held[0].any() and not held[3].any()
    assert (held[1] - residual[1]).abs().max() <= limits.tiny * 2.0
    assert held[2, 0] == pytest.approx(limits.max / 2.0, rel=1e-6)
    assert held[4].tolist() == pytest.approx([0.0, 4.0, 2.0], rel=1e-2)
    predicted = predict(stored, torch.zeros(2, dtype=accumulate), accumulate, CPU, scales)
    assert not predicted.any(), "a weight of 0 leaves it out"
    assert len(rest) == 2


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("history", [1, 3])
def test_statistics_and_forecasts_are_of_what_was_quantised(dtype: torch.dtype, history: int) -> None:
    truths = [random(6, 32, seed=k) * 10.0 ** (k - 2) for k in range(history + 1)]
    pairs = [quantised(each, dtype, torch.float32) for each in truths]
    stored, scales = [q.clone() for q, _ in pairs[1:]], [s.clone() for _, s in pairs[1:]]
    values = [float(v) for v in store(truths[0], stored, dtype, torch.float32, scales)]
    exact = [np.asarray(q.double() * s.double()) for q, s in pairs]
    differences = [newer - older for newer, older in pairwise(exact)]
    gram = [(a * b).mean() for i, a in enumerate(differences) for b in differences[i:]]
    np.testing.assert_allclose(values, [0.0, (exact[0] ** 2).mean(), *gram], rtol=1e-5, atol=1e-9)
    assert torch.equal(stored[-1].float(), pairs[0][0].float()) and torch.equal(scales[-1], pairs[0][1])
    for k in range(history - 1):
        assert torch.equal(stored[k].float(), pairs[k + 1][0].float()) and torch.equal(scales[k], pairs[k + 1][1])
    weights = [1.5, -0.75, 0.25][:history]
    control = torch.tensor([*weights, 0.0])
    wanted = sum(w * q.double() * s.double() for w, q, s in zip(weights, stored, scales, strict=True))
    predicted = predict(stored, control, torch.float32, CPU, scales)
    torch.testing.assert_close(predicted.double(), wanted, rtol=1e-5, atol=1e-6)


def test_statistics_are_of_what_is_stored() -> None:
    truth, stored = random(100), [torch.zeros(100, dtype=torch.bfloat16)]
    _, mean_square, _ = store(truth, stored, torch.bfloat16, torch.float32)
    assert mean_square == pytest.approx(float((stored[0].double() ** 2).mean()), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATING)
def test_sums_are_made_in_float32_or_better(dtype: torch.dtype) -> None:
    accumulate = accumulation_dtype(dtype)
    assert accumulate == (torch.float64 if dtype == torch.float64 else torch.float32)
    output, base = random(8, dtype=dtype), random(8, seed=1, dtype=dtype)
    residual = residual_of(output, base, accumulate)
    assert residual.dtype == accumulate
    assert torch.equal(residual, output.to(accumulate) - base.to(accumulate))
    assert torch.equal(residual_of(output, None, accumulate), output.to(accumulate))
    back = rebuilt(base, residual, dtype, accumulate)
    assert back.dtype == dtype
    torch.testing.assert_close(back, output, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_reuse_of_a_half_precision_residual_is_exact_where_it_is_kept_in_float32() -> None:
    output, base = random(1000, dtype=torch.bfloat16), 10.0 * random(1000, seed=1, dtype=torch.bfloat16)
    residual = residual_of(output, base, torch.float32)
    assert torch.equal(rebuilt(base, residual, torch.bfloat16, torch.float32), output)


def test_a_forecast_is_the_weighted_sum() -> None:
    stored = [random(6, seed=k, dtype=torch.float16) for k in range(3)]
    control = torch.tensor([2.0, -1.5, 0.5, 7.0])
    exact = sum(w * r.double() for w, r in zip([2.0, -1.5, 0.5], stored, strict=True))
    predicted = predict(stored, control, torch.float32, CPU)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_front_clock_is_a_ratio_of_means() -> None:
    now, before = random(50, dtype=torch.bfloat16), random(50, seed=1, dtype=torch.bfloat16)
    moved, size = relative_change(now, before, torch.float32)
    assert float(moved) == pytest.approx(float((now.double() - before.double()).abs().mean()), rel=1e-5)
    assert float(size) == pytest.approx(float(before.double().abs().mean()), rel=1e-5)
    assert float(relative_change(now, now, torch.float32)[0]) == 0.0


def test_noise_has_the_moments_of_a_normal_distribution() -> None:
    values = np.asarray(torch.cat([normal(key) for key in (0, 1, 12345, 2**31 - 1)]).double())
    count = len(values)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert abs((np.abs(values) > 1.959964).mean() - 0.05) < 4 * (0.05 * 0.95 / count) ** 0.5


def test_noise_is_independent_between_places_keys_and_streams() -> None:
    values = normal(7)
    bound = 4 / len(values) ** 0.5
    for other in (normal(8), normal(7, stream=1), normal(6), normal(7 + 2**20)):
        assert abs(float((values * other).mean())) < bound
        assert not torch.equal(values.sort().values, other.sort().values), "not the same numbers in another order"
    for lag in (1, 2, 8, 64, 1024):
        assert abs(float((values[lag:] * values[:-lag]).mean())) < bound * 1.05, lag


def test_noise_depends_on_the_key_the_stream_and_the_place_alone() -> None:
    state = torch.get_rng_state()
    values = normal(3, stream=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(normal(3, stream=2), values)
    assert torch.equal(normal(3, stream=2, count=100), values[:100])
    assert not torch.equal(normal(4, stream=2), values)
    assert not torch.equal(normal(3, stream=1), values)
    shaped = noise((10, 2000), 20_000, torch.tensor(3), 2, CPU, torch.float32)
    assert torch.equal(shaped.flatten(), values)
    torch.set_rng_state(state)


def test_noise_is_the_same_number_in_double_precision() -> None:
    assert normal(3, dtype=torch.float64).dtype == torch.float64
    torch.testing.assert_close(normal(3, dtype=torch.float64).float(), normal(3), rtol=1e-4, atol=1e-5)
