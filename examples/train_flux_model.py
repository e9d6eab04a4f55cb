"""Train the second small model, the Flux-like one, on a CPU: about an hour on one core.

Usage::

    python examples/train_flux_model.py --minutes 50     # train; a usable checkpoint is saved every few minutes
    python examples/train_flux_model.py --evaluate       # judge the checkpoint that is there
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F
from demo_model import NUM_CLASSES, load_classifier, load_weights, shifted_sigmas
from flux_model import FLUX_FILE, build_flux_model, load_flux_model, velocity
from safetensors import safe_open
from torch import Tensor, nn
from train_demo_model import accuracy, fit


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss; images and noise float32 ``[B, 1, 24, 24]``, labels and ``sigma`` ``[B]``."""
    level = sigma.view(-1, 1, 1, 1)
    return F.mse_loss(velocity(model, (1 - level) * images + level * noise, sigma, labels), noise - images)


def train(minutes: float, batch_size: int, peak_rate: float, resume: bool, compile_blocks: bool) -> None:
    """Train for ``minutes`` of wall time, saving the running average of the weights as it goes."""
    torch.manual_seed(0)
    model = build_flux_model()
    if resume:
        load_weights(model, FLUX_FILE)
        model.requires_grad_(True)
    if compile_blocks:
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.compile()
    fit(model, peak_rate, flow_loss, FLUX_FILE, minutes, batch_size, seed=3)


def sample(model: nn.Module, labels: Tensor, guidance: float, steps: int = 28, seed: int = 0) -> Tensor:
    """Draw one float32 image ``[1, 24, 24]`` per int64 label with Euler steps at shifted noise levels."""
    x = torch.randn(len(labels), 1, 24, 24, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])
    sigmas = shifted_sigmas(steps)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            cond, uncond = velocity(model, torch.cat([x, x]), sigma.expand(2 * len(labels)), both).chunk(2)
            x = x + (following - sigma) * (uncond + guidance * (cond - uncond))
    return x


def evaluate(count: int = 200) -> None:
    """Print what the checkpoint says of itself and how well the classifier recognises ``count`` samples."""
    with safe_open(FLUX_FILE, framework="pt") as checkpoint:
        print(f"{FLUX_FILE.name}: {FLUX_FILE.stat().st_size / 2**20:.2f} MiB, {checkpoint.metadata()}")
    classifier, model = load_classifier(), load_flux_model()
    labels = torch.arange(count) % NUM_CLASSES
    for guidance in (1.0, 2.0):
        score = accuracy(classifier, sample(model, labels, guidance), labels)
        print(f"samples: guidance {guidance}, class accuracy {score:.4f} of {count}", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (use 1 on a busy machine)")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    parser.add_argument("--compile", action="store_true", help="compile the blocks first (needs a C++ compiler)")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, judge the saved weights")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.evaluate:
        train(options.minutes, options.batch_size, options.rate, options.resume, options.compile)
    evaluate()


if __name__ == "__main__":
    main()
