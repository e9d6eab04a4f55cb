"""Numbers between host and device, without making the host wait for what is queued on the device.

A plain read, or a plain copy to the device, waits for everything queued before it. Copies through pinned memory are queued
like the rest; what is read waits for an event of its own, and by the time it is needed that has mostly passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..torch_internals import outside_inference_mode

Read = Callable[[], list[float]]


def queues_copies(device: torch.device) -> bool:
    """Whether copies from and to pinned memory are queued there."""
    return device.type == "cuda"


def begin_read(values: torch.Tensor) -> Read | None:
    """Begin to bring numbers to the host; what is returned waits for them. None where a plain read waits for nothing."""
    if not queues_copies(values.device):
        return None
    with outside_inference_mode():
        host = _pinned(values.shape, values.dtype)
        host.copy_(values, non_blocking=True)
    arrived = torch.Event(values.device)
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return read


def send(content: float | int | bool | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these numbers on a device; the copy there is queued."""
    if not queues_copies(device):
        return torch.tensor(content, dtype=dtype, device=device)
    made = torch.tensor(content, dtype=dtype)
    host = _pinned(made.shape, dtype)
    host.copy_(made)
    return host.to(device, non_blocking=True)


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that a device may copy from and to by itself. torch gives none out again before a copy has passed."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
