"""What is measured of pictures: distance to the uncached ones, class accuracy, Fréchet distance to real ones."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Judgement:
    """psnr: mean of each picture's dB against the uncached one, range 2, not clipped; perceptual: distance in the
    classifier's features (no unit, 0 is equal); accuracy: share recognised as its label; frechet: against real images."""

    psnr: float
    perceptual: float
    accuracy: float
    frechet: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@functools.cache
def _classifier() -> nn.Module:
    from demo_model import load_classifier

    return load_classifier()


@functools.cache
def _real_statistics() -> tuple[np.ndarray, np.ndarray]:
    from train_demo_model import load_data

    images, _, _, _ = load_data()
    return _moments(_classifier().features(images))


def judge(images: Tensor, reference: Tensor, labels: Tensor) -> Judgement:
    """Judge float32 ``[N, 1, 24, 24]`` images against the uncached ones of the same noise; `labels` int64 ``[N]``."""
    with torch.no_grad():
        classifier = _classifier()
        accuracy = float((classifier(images).argmax(dim=1) == labels).float().mean())
        return Judgement(psnr(images, reference), perceptual(images, reference), accuracy, _frechet(images))


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over the pictures of 10 log10(2² / mean square difference); equal pictures count as 150 dB."""
    squares = (images - reference).double().square().flatten(1).mean(dim=1).clamp(min=4e-15)
    return float((10.0 * torch.log10(4.0 / squares)).mean())


def perceptual(images: Tensor, reference: Tensor) -> float:
    """LPIPS with the bench's classifier: features of each convolution, normalised over channels, squared distance.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924,
    2018), with weights of 1.
    """
    total = 0.0
    x, y = images, reference
    for layer in _classifier().body:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU) and x.dim() == 4:
            total += float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean())
    return total


def _moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = features.double().numpy()
    return values.mean(axis=0), np.cov(values, rowvar=False)


def _frechet(images: Tensor) -> float:
    """Fréchet distance of classifier features to those of the training images (Heusel et al., arXiv 1706.08500, 2017)."""
    mean, covariance = _moments(_classifier().features(images))
    real_mean, real_covariance = _real_statistics()
    # the trace of the root of a product of two covariances is the sum of the roots of its eigenvalues
    eigenvalues = np.linalg.eigvals(covariance @ real_covariance).real.clip(min=0.0)
    distance = float(np.square(mean - real_mean).sum())
    return distance + float(np.trace(covariance) + np.trace(real_covariance) - 2.0 * np.sqrt(eigenvalues).sum())
