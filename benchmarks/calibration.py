"""What a calibration gains: the adaptive rule as it is, and with a placement measured on other samples.

    python benchmarks/calibration.py --samples 32

Each bed is calibrated on one run of eight samples of the digits 0 to 4; what is compared has another seed and the digits 5
to 9. PSNR in dB against the uncached run at 2x / 3x / 4x, 28 Euler steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from beds import BEDS, Bed
from judge import judge
from sampling import Sampler, Setting
from torch import Tensor

import cache_dit

RATIOS = (2.0, 3.0, 4.0)
CALIBRATED, COMPARED = Setting(seed=99, samples=8), Setting(seed=4321)
OPTIONS: dict[str, Any] = {"inner": "eager", "noise_scale": 0.0, "language": "en", "enable_stats": False}


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | adaptive | calibrated |\n|---|---|---|")
    for name, load in BEDS.items():
        for shift in (3.0, 1.0):
            cells = _compared(load(), replace(COMPARED, shift=shift, samples=given.samples))
            noise = "linear" if shift == 1.0 else f"shift {shift:g}"
            print(f"| {name}, {noise} | " + " | ".join(cells) + " |", flush=True)


def _compared(bed: Bed, setting: Setting) -> list[str]:
    model = bed.load()
    sampler = _of_digits(bed, replace(CALIBRATED, shift=setting.shift), first=0)
    calibration = cache_dit.calibrate(model, lambda: sampler.run(model), inner="eager", language="en")
    judged = _of_digits(bed, setting, first=5)
    judged.cached = False
    reference = judged.run(model)
    judged.cached = True
    found = []
    for more in ({}, {"calibration": calibration}):
        values = [_psnr(model, judged, reference, target_speedup=ratio, **more) for ratio in RATIOS]
        found.append(" / ".join(f"{value:.1f}" for value in values))
    return found


def _of_digits(bed: Bed, setting: Setting, first: int) -> Sampler:
    """Samples of five digits from ``first`` on, by turns."""
    sampler = Sampler(bed, setting, cached=True)
    sampler.labels = torch.arange(setting.samples) % 5 + first
    return sampler


def _psnr(model: torch.nn.Module, sampler: Sampler, reference: Tensor, **options: Any) -> float:
    with cache_dit.cached(model, strategy="adaptive", **OPTIONS, **options):
        images = sampler.run(model)
    return judge(images, reference, sampler.labels).psnr


if __name__ == "__main__":
    main()
