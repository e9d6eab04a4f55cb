"""The small tensors that a cached program takes beside its inputs and its buffers."""

from __future__ import annotations

from typing import Any

import torch

from ..passes import CacheInputs
from ..torch_internals import outside_inference_mode
from .transfers import send

# Tensors kept: a run has a few dozen distinct ones, and the next run has the same.
MAX_KEPT = 512


class CacheOperands:
    """Makes them, each once for its value: every run needs the same ones again, and making one costs a copy to the device."""

    def __init__(self, noise_scale: float) -> None:
        self._noise_scale = noise_scale
        self._kept: dict[tuple[object, ...], torch.Tensor] = {}
        self._sets: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    def make(
        self, inputs: CacheInputs, *, skip: bool, weights: tuple[float, ...], key: int, measured: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The predicate, the forecast's weights (newest first) with the noise scale, the noise's key, the last statistics."""
        wanted = (skip, weights, key, inputs.history, inputs.accumulate, inputs.device)
        made = self._sets.get(wanted)
        if made is None:
            if len(self._sets) >= MAX_KEPT:
                self._sets.clear()
            padded = (*weights, *([0.0] * (inputs.history - len(weights))), self._noise_scale)
            made = self._sets[wanted] = (
                self._constant((not skip,), torch.bool, inputs.device),
                self._constant(padded, inputs.accumulate, inputs.device),
                self._constant((key,), torch.int64, inputs.device),
            )
        return (*made, measured)

    def clear(self) -> None:
        """Free them."""
        self._kept.clear()
        self._sets.clear()

    def _constant(self, values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        name = (values, dtype, device)
        found = self._kept.get(name)
        if found is None:
            if len(self._kept) >= MAX_KEPT:
                self.clear()
            with outside_inference_mode():
                content = values[0] if dtype in (torch.bool, torch.int64) else values
                found = send(content, dtype, device)
            self._kept[name] = found
        return found
