"""The arithmetic of the cache: what a computed step stores and measures, and what a skipped step predicts.

Every function takes tensors or FX proxies alike; the passes write them into graphs, the tests call them.
Statistics of one live-out, in this order: count of non-finite elements, mean square of the residual, then the upper
triangle of the Gram matrix of differences G[a][b] = mean(d_a * d_b), with d_0 = R - h_0 and d_k = h_(k-1) - h_k, where R
is the residual just computed and h_0, h_1, … the stored ones, newest first. From it the host has the error of every
forecast whose weights sum to 1 (:mod:`cache_dit.forecasts.error`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

# A tensor, or a proxy of one while a graph is written.
Value = Any

# Stored with a scale for each row along the last dimension.
SCALED = frozenset({torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})

# Odd constants of integer hashes (Weyl's golden ratio, and the finalizer of MurmurHash3), as signed 32-bit numbers.
_GOLDEN, _FIRST, _SECOND = -0x61C88647, -0x7A143595, -0x3D4D51CB


def statistics_length(history: int) -> int:
    """How many numbers a computed step measures for each live-out."""
    return 2 + history * (history + 1) // 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and differences: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def residual_of(output: Value, base: Value | None, accumulate: torch.dtype) -> Value:
    """What the region added to its base; the output itself where it has no base."""
    return output.to(accumulate) if base is None else output.to(accumulate) - base.to(accumulate)


def store(
    residual: Value,
    stored: Sequence[Value],
    dtype: torch.dtype,
    accumulate: torch.dtype,
    scales: Sequence[Value] = (),
    before: Sequence[Value] | None = None,
) -> list[Value]:
    """Measure the residual, write it over the oldest stored one, and return the statistics (scalars, accumulate dtype).

    Elements that are not finite, or beyond what the dtype holds, are stored as 0 and counted, so that a later forecast with
    weight 0 stays finite (0 * NaN is NaN). ``scales``: of the stored ones, where they have any. ``before``: what to read the
    stored ones and their scales from, where that is not where they are written.
    """
    # a row's largest element times its scale may be rounded up
    largest = _largest(accumulate) / 2.0 if scales else min(_largest(dtype), _largest(accumulate))
    # before rounding, since some conversions to 8 bits turn infinity into the largest number; false for NaN too
    finite = residual.abs() <= largest
    kept = torch.where(finite, residual, torch.zeros_like(residual))
    scale: Value = None
    if scales:
        kept, scale = quantised(kept, dtype, accumulate)
        truth = kept.to(accumulate) * scale
    else:
        kept = kept.to(dtype)
        truth = kept.to(accumulate)
    read = (*stored, *scales) if before is None else before
    history = list(_restored(read[: len(stored)], read[len(stored) :], truth.device, accumulate))
    differences = [truth - history[0], *(newer - older for newer, older in pairwise(history))]
    measured = [(~finite).sum().to(accumulate), (truth * truth).mean()]
    for a in range(len(differences)):
        measured.extend((differences[a] * differences[b]).mean() for b in range(a, len(differences)))
    stored[-1].copy_(kept)
    if scales:
        scales[-1].copy_(scale)
    return measured


def quantised(residual: Value, dtype: torch.dtype, accumulate: torch.dtype) -> tuple[Value, Value]:
    """A finite residual in a dtype of 8 bits, and the scale of each row along the last dimension: the largest element of a row
    becomes the largest number of the dtype. Their product is off by half a step of the dtype at most, times the scale."""
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # no smaller than a normal number: a row of zeros stays one, and nothing is divided by what a device takes for zero
    scale = (residual.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(accumulate).tiny)
    ratio = residual / scale
    if dtype == torch.int8:
        ratio = ratio.round()
    # a division may be rounded up
    return ratio.clamp(-top, top).to(dtype), scale


def _restored(
    stored: Sequence[Value], scales: Sequence[Value], device: torch.device, accumulate: torch.dtype
) -> Iterator[Value]:
    for k, buffer in enumerate(stored):
        value = buffer.to(device).to(accumulate)
        yield value * scales[k].to(device) if scales else value


def _largest(dtype: torch.dtype) -> float:
    """The largest number that a dtype holds."""
    if dtype == torch.bool:
        return 1.0
    real = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype).max if real else torch.iinfo(dtype).max


def predict(
    stored: Sequence[Value], control: Value, accumulate: torch.dtype, device: torch.device, scales: Sequence[Value] = ()
) -> Value:
    """The forecast residual: the sum of ``control[k] * stored[k]``, each times its scales where there are any."""
    predicted = None
    for k, value in enumerate(_restored(stored, scales, device, accumulate)):
        term = value * control[k]
        predicted = term if predicted is None else predicted + term
    return predicted


def rebuilt(base: Value | None, predicted: Value, dtype: torch.dtype, accumulate: torch.dtype) -> Value:
    """The region's output from its base and the forecast residual."""
    return (predicted if base is None else base.to(accumulate) + predicted).to(dtype)


def noise(shape: Sequence[Any], count: Any, key: Value, stream: int, device: torch.device, accumulate: torch.dtype) -> Value:
    """Standard normal numbers that depend on ``key`` (int64, 0-d), ``stream`` and the element's place alone.

    A counter-based generator: the finalizer of MurmurHash3 (Appleby, 2011) over the place, with the key brought in
    between its rounds, and its two halves as the two uniform numbers of one normal number (Box and Muller, 1958), which
    so reaches 4.9 standard deviations. No state is read or written, so the user's random generators stay where they
    were. The place is mixed before the key comes in: two keys alike in their upper bits would else give the same
    numbers in another order. In int32, whose products wrap, and with few rounds: inductor writes an expression out for
    each use, and every round uses its operand twice.
    """
    place = torch.arange(count, device=device, dtype=torch.int32)
    seed = key.to(torch.int32) * _GOLDEN + ((stream + 1) * 0x3C6EF372 & 0x7FFFFFFF)
    bits = _folded((place + 1) * _GOLDEN, 16) * _FIRST ^ seed
    bits = _folded(_folded(bits, 13) * _SECOND, 16)
    radius = torch.sqrt(-2.0 * torch.log(_uniform(_shifted(bits, 16), accumulate)))
    angle = 6.283185307179586 * _uniform(bits & 0xFFFF, accumulate)
    return (radius * torch.cos(angle)).reshape(shape)


def _folded(value: Value, bits: int) -> Value:
    return _shifted(value, bits) ^ value


def _shifted(value: Value, bits: int) -> Value:
    """A right shift that brings in zeros: that of a signed number brings in its sign."""
    return (value >> bits) & ((1 << (32 - bits)) - 1)


def _uniform(bits: Value, dtype: torch.dtype) -> Value:
    """16 bits as a number in (0, 1)."""
    return (bits.to(dtype) + 0.5) * (1.0 / 65536.0)


def relative_change(now: Value, before: Value, accumulate: torch.dtype) -> tuple[Value, Value]:
    """mean|now - before| and mean|before|: the increment of the front clock is their ratio."""
    now, before = now.to(accumulate), before.to(accumulate)
    return (now - before).abs().mean(), before.abs().mean()
