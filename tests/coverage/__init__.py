"""Tiny configurations of every diffusion transformer class of diffusers, found by introspection."""

from __future__ import annotations

from . import image, others, video
from .tiny import Draw, TinyModel, discovered

TINY_MODELS: dict[str, TinyModel] = {tiny.label: tiny for tiny in (*image.MODELS, *video.MODELS, *others.MODELS)}

__all__ = ["TINY_MODELS", "Draw", "TinyModel", "discovered"]
