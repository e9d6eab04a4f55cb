"""The trained models whose pictures are judged: two architectures, one interface."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

Velocity = Callable[[torch.nn.Module, Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Bed:
    """A model, and how to ask it for the velocity of images ``[B, 1, 24, 24]`` at a sigma, given labels ``[B]``.

    `time_scale`: the timestep that the model takes, divided by sigma.
    """

    name: str
    title: str
    checkpoint: Path
    load: Callable[[], torch.nn.Module]
    velocity: Velocity

    def fingerprint(self) -> str:
        """The first digits of the checkpoint's SHA-256: results of other weights are other results."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()[:12]


def _dit() -> Bed:
    from demo_model import MODEL_FILE, load_model

    def velocity(model: torch.nn.Module, images: Tensor, sigma: float, labels: Tensor) -> Tensor:
        timestep = torch.full((len(images),), sigma * 1000.0)
        out: Tensor = model(images, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return out

    return Bed("dit", "DiT (12 blocks, 64 tokens)", MODEL_FILE, load_model, velocity)


def _flux() -> Bed:
    from flux_model import FLUX_FILE, load_flux_model
    from flux_model import velocity as flux_velocity

    def velocity(model: torch.nn.Module, images: Tensor, sigma: float, labels: Tensor) -> Tensor:
        return flux_velocity(model, images, torch.full((len(images),), sigma), labels)

    return Bed("flux", "Flux-like (3 + 8 blocks, 64 + 4 tokens)", FLUX_FILE, load_flux_model, velocity)


BEDS: dict[str, Callable[[], Bed]] = {"dit": _dit, "flux": _flux}
