"""Residuals in host memory: their copies to the device begin with the call and pass beside what it computes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..passes.from_host import is_offloaded, leave_word, take_back


class Offload:
    """Begins copies on a stream of its own.

    Host memory is written to by the programs that compute, whose copies to it make the host wait: none of those is under way
    when a call begins. Such a program also waits on the host for what it has taken, before it writes to the same memory.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def under_way(self, kept: Sequence[torch.Tensor], device: torch.device, *, written: bool) -> Iterator[None]:
        """Within it the program that takes these tensors finds them on their way to the device.

        ``written``: the program writes to some of them.
        """
        taken = [each for each in kept if is_offloaded(each.device, device)]
        stream = self._stream(device)
        try:
            with torch.cuda.stream(stream):
                for each in taken:
                    copy = each.to(device, non_blocking=True, copy=True)
                    leave_word(each, _arrival(copy, stream.record_event(), device, written))
            yield
        finally:
            for each in taken:
                take_back(each)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        made: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        if device not in self._streams:
            self._streams[device] = made(device)
        return self._streams[device]


def _arrival(
    copy: torch.Tensor, passed: torch.cuda.Event, device: torch.device, written: bool
) -> Callable[[], torch.Tensor]:
    def arrive() -> torch.Tensor:
        if written:
            passed.synchronize()
        current = torch.cuda.current_stream(device)
        current.wait_event(passed)
        # made on the other stream: its memory must not be given out again before this one is done with it
        copy.record_stream(current)
        return copy

    return arrive
