"""What each `residual_dtype` does to the pictures of the demo model, and the bytes it takes.

    python benchmarks/residuals.py

Every second step of 20 is skipped, with a line through two residuals; PSNR against the same run with residuals in float32,
and against the run without a cache.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

import cache_dit

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from demo_model import load_model, sample

STEPS, SAMPLES = 20, 4
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")


def drawn(dtype: str | None) -> tuple[torch.Tensor, int]:
    """Pictures and the cache's bytes; None: without a cache."""
    model = load_model()
    if dtype is not None:
        cache_dit.enable_cache(
            model,
            residual_dtype=dtype,
            strategy="fixed",
            skip_interval=2,
            warmup_steps=2,
            forecast="lagrange",
            noise_scale=0.0,
            correction=False,
            inner="eager",
        )
        cache_dit.new_run(model, num_steps=STEPS)
    pictures = sample(model, torch.arange(SAMPLES), steps=STEPS)
    return pictures, 0 if dtype is None else cache_dit.get_stats(model).cache_bytes


def psnr(pictures: torch.Tensor, wanted: torch.Tensor) -> float:
    """In dB, for pictures in [-1, 1]."""
    error = float((pictures - wanted).square().mean())
    return math.inf if error == 0.0 else 10.0 * math.log10(4.0 / error)


def main() -> None:
    """Print a row for each dtype."""
    uncached, _ = drawn(None)
    exact, _ = drawn("float32")
    print("| residual_dtype | bytes | PSNR against float32, dB | against no cache, dB |\n|---|---|---|---|")
    for dtype in DTYPES:
        pictures, size = drawn(dtype)
        print(f"| {dtype} | {size} | {psnr(pictures, exact):.1f} | {psnr(pictures, uncached):.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
