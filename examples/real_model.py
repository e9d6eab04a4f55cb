"""Draw one picture with a real model, first without and then with caching: times, statistics, both pictures.

Needs a machine with the weights, or with the room and the rights to download them (FLUX.1-dev asks for a Hugging Face
account that has accepted its licence), and ``pip install -e '.[diffusers]'``. Any pipeline of diffusers with a
transformer will do::

    python examples/real_model.py --model black-forest-labs/FLUX.1-dev --prompt "a photo of a cat"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import cache_dit

MODEL = "black-forest-labs/FLUX.1-dev"
FIRST_STEPS = 6
"""Steps of the run before the timed one, in which everything is compiled."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"id or folder of a diffusers pipeline ({MODEL})")
    parser.add_argument("--prompt", default="a photo of a cat in the grass")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (28)")
    parser.add_argument("--height", type=int, default=1024, help="in pixels (1024)")
    parser.add_argument("--width", type=int, default=1024, help="in pixels (1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting noise (0)")
    parser.add_argument("--strategy", choices=("fixed", "dynamic", "adaptive"), default="adaptive")
    parser.add_argument("--skip-interval", type=int, default=2)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--target-speedup", type=float, help="adaptive: by what factor the cached blocks' work is to fall")
    parser.add_argument("--inner", default="inductor", help="compiler of the plain and of the cached model (inductor)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--language", choices=("zh", "en"), help="language of the texts")
    parser.add_argument("--out", type=Path, default=Path("out/real_model"), help="folder of the pictures")
    return parser.parse_args(argv)


def load_pipeline(model: str, device: str) -> Any:
    """The pipeline on its device; for FLUX.1-dev a ``FluxPipeline``."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)


def draw(pipe: Any, options: argparse.Namespace, steps: int) -> tuple[Any, float]:
    """One picture from the noise of the seed, and the seconds that the whole pipeline took."""
    start = perf_counter()
    result = pipe(
        options.prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return result.images[0], perf_counter() - start


def draw_timed(pipe: Any, options: argparse.Namespace, name: str) -> float:
    """Draw twice, time the second, save it as ``name``.png."""
    draw(pipe, options, min(FIRST_STEPS, options.steps))
    cache_dit.reset_cache_stats()
    picture, seconds = draw(pipe, options, options.steps)
    path = options.out / f"{name}.png"
    picture.save(path)
    print(f"{name}: {seconds:.2f} s measured for the whole pipeline, {path}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options.model, options.device)
    pipe.transformer.compile(backend=options.inner)
    plain = draw_timed(pipe, options, "plain")
    cache_dit.enable_cache(
        pipe,
        strategy=options.strategy,
        skip_interval=options.skip_interval,
        warmup_steps=options.warmup_steps,
        target_speedup=options.target_speedup,
        inner=options.inner,
        language=options.language,
    )
    cached = draw_timed(pipe, options, "cached")
    print(f"{plain / cached:.2f}x\n\n{cache_dit.summary(pipe)}\n\n{cache_dit.explain(pipe)}")
    cache_dit.disable_cache(pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
