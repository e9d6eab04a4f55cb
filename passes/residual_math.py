"""The arithmetic of the cache: what a computed step stores and measures, and what a skipped step predicts.

Every function takes tensors or FX proxies alike; the passes write them into graphs, the tests call them.
Statistics of one live-out, in this order: count of non-finite elements, mean square of the residual, then the upper
triangle of the Gram matrix of differences G[a][b] = mean(d_a * d_b), with d_0 = R - h_0 and d_k = h_(k-1) - h_k, where R
is the residual just computed and h_0, h_1, … the stored ones, newest first. From it the host has the error of every
forecast whose weights sum to 1 (:mod:`cache_dit.forecasts.error`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

# A tensor, or a proxy of one while a graph is written.
Value = Any

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


def store(residual: Value, stored: Sequence[Value], dtype: torch.dtype, accumulate: torch.dtype) -> list[Value]:
    """Measure the residual, write it over the oldest stored one, and return the statistics (scalars, accumulate dtype).

    Elements that are not finite, or beyond what the dtype holds, are stored as 0 and counted, so that a later forecast with
    weight 0 stays finite (0 * NaN is NaN).
    """
    # before rounding, since some conversions to 8 bits turn infinity into the largest number; false for NaN too
    finite = residual.abs() <= min(_largest(dtype), _largest(accumulate))
    kept = torch.where(finite, residual, torch.zeros_like(residual)).to(dtype)
    truth = kept.to(accumulate)
    history = [buffer.to(truth.device).to(accumulate) for buffer in stored]
    differences = [truth - history[0], *(newer - older for newer, older in pairwise(history))]
    measured = [(~finite).sum().to(accumulate), (truth * truth).mean()]
    for a in range(len(differences)):
        measured.extend((differences[a] * differences[b]).mean() for b in range(a, len(differences)))
    stored[-1].copy_(kept)
    return measured


def _largest(dtype: torch.dtype) -> float:
    """The largest number that a dtype holds."""
    if dtype == torch.bool:
        return 1.0
    real = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype).max if real else torch.iinfo(dtype).max


def predict(stored: Sequence[Value], control: Value, accumulate: torch.dtype, device: torch.device) -> Value:
    """The forecast residual: the sum of ``control[k] * stored[k]``."""
    predicted = None
    for k, buffer in enumerate(stored):
        term = buffer.to(device).to(accumulate) * control[k]
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
