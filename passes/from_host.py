"""The operation by which a program takes what is kept in host memory: a copy that may be under way since before the program.

A copy inside of a program begins when its turn comes. To overlap with what the program does first it must begin earlier, so
the host begins it and leaves word here; the program waits for it where it needs it. Without word the operation copies itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# By address what gives the copy that is under way, and makes the device wait for it.
_under_way: dict[int, Callable[[], torch.Tensor]] = {}


def is_offloaded(kept: torch.device, device: torch.device) -> bool:
    """Whether what is kept on one device has to come to the other from host memory."""
    return kept.type == "cpu" and device.type == "cuda"


# not within a recorded CUDA graph: a replay would not ask for the copy
@torch.library.custom_op("cache_dit::from_host", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def from_host(kept: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``kept`` on the device of ``after``, which is there so that compilers put this behind what makes it."""
    arrive = _under_way.pop(kept.data_ptr(), None)
    return kept.to(after.device, copy=True) if arrive is None else arrive()


@from_host.register_fake
def _(kept: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(kept, device=after.device)


def leave_word(kept: torch.Tensor, arrive: Callable[[], torch.Tensor]) -> None:
    """The next program that takes ``kept`` calls this instead of copying."""
    _under_way[kept.data_ptr()] = arrive


def take_back(kept: torch.Tensor) -> None:
    """Nothing is under way for it any more."""
    _under_way.pop(kept.data_ptr(), None)
