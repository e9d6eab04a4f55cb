"""A small class-conditional diffusion transformer for handwritten digits, with a sampler and a judge.

The model is an ordinary ``diffusers`` :class:`~diffusers.DiTTransformer2DModel` with 12 blocks, trained with flow
matching on 24x24 digit images (``train_demo_model.py`` trains it). It is small enough to sample from on a CPU, yet it
has the structure that block caching cares about: a stack of equal blocks that is run once or twice per denoising step.

Images are float32 tensors of shape ``[N, 1, 24, 24]`` with values in ``[-1, 1]`` (-1 is the background); labels are
int64 tensors of shape ``[N]`` with values 0 to 9, and ``NUM_CLASSES`` (10) is the "no label" class of guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_SIZE = 24
NUM_CLASSES = 10
NUM_LAYERS = 12

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoints"
MODEL_FILE = CHECKPOINT_DIR / "dit_digits.safetensors"
CLASSIFIER_FILE = CHECKPOINT_DIR / "classifier.safetensors"


class DigitClassifier(nn.Module):
    """A small convolutional classifier that judges samples and offers features to compare them by."""

    def __init__(self, feature_dim: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.GroupNorm(4, 48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * (IMAGE_SIZE // 8) ** 2, feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(feature_dim, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the features before the last layer: float32 ``[N, 1, 24, 24]`` to float32 ``[N, 64]``."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits: float32 ``[N, 1, 24, 24]`` to float32 ``[N, 10]``."""
        out: Tensor = self.head(self.features(x))
        return out


def build_model() -> DiTTransformer2DModel:
    """Return the diffusion transformer with fresh float32 weights (2.4 million parameters, 64 tokens per image).

    It maps images ``[B, 1, 24, 24]``, timesteps ``[B]`` (float, 0 to 1000) and labels ``[B]`` (int64, 0 to 10) to
    a velocity ``[B, 1, 24, 24]``.
    """
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=NUM_LAYERS,
        dropout=0.0,
        sample_size=IMAGE_SIZE,
        patch_size=3,
        num_embeds_ada_norm=NUM_CLASSES,
    )


def build_classifier() -> DigitClassifier:
    """Return the digit classifier with fresh float32 weights."""
    return DigitClassifier()


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors checkpoint (stored as float16) into ``module`` as float32, ready for inference."""
    module.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    module.eval().requires_grad_(False)


def load_model(path: Path = MODEL_FILE) -> DiTTransformer2DModel:
    """Return the trained diffusion transformer: float32, in eval mode, without gradients."""
    model = build_model()
    load_weights(model, path)
    return model


def load_classifier(path: Path = CLASSIFIER_FILE) -> DigitClassifier:
    """Return the trained digit classifier: float32, in eval mode, without gradients."""
    classifier = build_classifier()
    load_weights(classifier, path)
    return classifier


def shifted_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """Return the noise levels of a run: float32 ``[steps + 1]``, falling from 1 (pure noise) to 0 (clean image).

    A linear ramp ``s`` is bent to ``shift * s / (1 + (shift - 1) * s)``; a shift above 1 spends more steps at high
    noise.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    ramp = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return (shift * ramp / (1 + (shift - 1) * ramp)).float()


def sample(
    model: Callable[..., Any],
    labels: Tensor,
    steps: int = 28,
    guidance: float = 2.0,
    seed: int = 0,
    shift: float = 3.0,
    batched_guidance: bool = True,
    progress: Callable[[int, int], object] | None = None,
    on_step: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Draw one image per label with the Euler method on the learnt flow.

    Args:
        model: the diffusion transformer, plain or compiled.
        labels: int64 ``[N]``, on the model's device.
        steps: number of denoising steps.
        guidance: strength of classifier-free guidance; 1.0 or less turns it off (one conditional call per step).
        seed: seed of the starting noise; the global random state is neither read nor changed.
        shift: bend of the noise schedule, see :func:`shifted_sigmas`.
        batched_guidance: with guidance, call the model once per step with a batch of ``2 * N`` (the labelled half
            first); if False, call it twice with a batch of ``N``, labelled first, then unlabelled.
        progress: called as ``progress(done, steps)`` after every step.
        on_step: called as ``on_step(index, images)`` after every step, with the float32 ``[N, 1, 24, 24]`` state.

    Returns:
        float32 ``[N, 1, 24, 24]``, about in ``[-1, 1]`` (not clipped).
    """
    device = labels.device
    count = labels.shape[0]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)
    null_labels = torch.full_like(labels, NUM_CLASSES)
    both_labels = torch.cat([labels, null_labels])
    sigmas = shifted_sigmas(steps, shift).tolist()

    def velocity(x: Tensor, sigma: float, y: Tensor) -> Tensor:
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=device)
        out: Tensor = model(x, timestep=timestep, class_labels=y, return_dict=False)[0]
        return out.float()

    with torch.no_grad():
        for index in range(steps):
            sigma, next_sigma = sigmas[index], sigmas[index + 1]
            if guidance <= 1.0:
                flow = velocity(images, sigma, labels)
            else:
                if batched_guidance:
                    cond, uncond = velocity(torch.cat([images, images]), sigma, both_labels).chunk(2)
                else:
                    cond = velocity(images, sigma, labels)
                    uncond = velocity(images, sigma, null_labels)
                flow = uncond + guidance * (cond - uncond)
            images = images + (next_sigma - sigma) * flow
            if on_step is not None:
                on_step(index, images)
            if progress is not None:
                progress(index + 1, steps)
    return images
