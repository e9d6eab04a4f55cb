"""What `noise_scale` and `tolerance` do to the pictures of the demo's model, through `enable_cache`.

    python benchmarks/settings.py

28 Euler steps, PSNR in dB against the uncached run, mean over the samples.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from beds import BEDS, Bed
from judge import psnr
from sampling import Sampler, Setting
from torch import Tensor

import cache_dit

NOISE_SCALES = (0.0, 0.001, 0.003, 0.01, 0.03)
TOLERANCES = (0.05, 0.1, 0.2)
OPTIONS: dict[str, Any] = {"strategy": "adaptive", "inner": "eager", "language": "en", "enable_stats": False}


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--bed", default="dit", choices=list(BEDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bed = BEDS[given.bed]()
    model = bed.load()
    setting = Setting(samples=given.samples)
    reference = Sampler(bed, setting).run(model)
    print("| `noise_scale` at 3x, shift 3 | corrected | not corrected |\n|---|---|---|")
    for scale in NOISE_SCALES:
        cells = [
            _sampled(bed, model, setting, reference, target_speedup=3.0, noise_scale=scale, **more)[0]
            for more in ({}, {"correction": False})
        ]
        print(f"| {scale:g} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)
    print("\n| `tolerance` | shift 3: steps computed, dB | linear: steps computed, dB |\n|---|---|---|")
    linear = replace(setting, shift=1.0)
    references = ((setting, reference), (linear, Sampler(bed, linear).run(model)))
    for tolerance in TOLERANCES:
        found = [_sampled(bed, model, each, images, tolerance=tolerance, noise_scale=0.0) for each, images in references]
        print(f"| {tolerance:g} | " + " | ".join(f"{computed}, {value:.1f}" for value, computed in found) + " |", flush=True)


def _sampled(bed: Bed, model: torch.nn.Module, setting: Setting, reference: Tensor, **options: Any) -> tuple[float, int]:
    """PSNR, and how many steps computed."""
    with cache_dit.cached(model, **OPTIONS, **options):
        images = Sampler(bed, setting, cached=True).run(model)
        stats = cache_dit.get_stats(model)
    return psnr(images, reference), stats.steps - stats.hits


if __name__ == "__main__":
    main()
