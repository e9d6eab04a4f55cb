"""How long a call took: on the host's clock, or on the device's where work is queued."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

import torch

from ..statistics import Counters


class CallTimer:
    """Times calls and books them as computed or reused, never making the host wait for a device.

    On a CPU the host's clock is the measure. On a device that queues work two events bracket the call; they are read
    once they have passed. Calls may be collected or forgotten by another thread than the one that makes them.
    """

    __slots__ = ("_counters", "_device", "_lock", "_open", "_pending", "_start", "_watched", "booked")

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._device: torch.device | None = None
        self._watched: torch.device | None = None
        self._pending: deque[tuple[torch.Event, torch.Event, bool]] = deque()
        self._open: torch.Event | None = None
        self._start = 0.0
        # its own, and held for nothing that waits: statistics are read while a call is under way
        self._lock = threading.RLock()
        # told of the seconds of each call, in the order of the calls
        self.booked: Callable[[float], None] | None = None

    def watch(self, device: torch.device) -> None:
        """Say where the model runs. The call in which it is found elsewhere than before is timed on the host's clock."""
        if device is self._watched:
            return
        self._watched = device
        wanted = None if device.type == "cpu" else device
        if wanted != self._device:
            # events of two devices have no time between them
            self._device, self._open = wanted, None

    def start(self) -> None:
        """Begin a call."""
        self._start = perf_counter()
        if self._device is not None:
            begin = torch.Event(self._device, enable_timing=True)
            begin.record()
            self._open = begin

    def elapsed(self) -> float:
        """Seconds since the call began, on the host's clock."""
        return perf_counter() - self._start

    def book(self, reused: bool) -> None:
        """End a call."""
        # taken out at once: another thread may forget it at any time
        begin, self._open = self._open, None
        if begin is None:
            self._add(perf_counter() - self._start, reused)
            return
        end = torch.Event(self._device, enable_timing=True)
        end.record()
        self._pending.append((begin, end, reused))
        self.collect()

    def discard(self) -> None:
        """End a call that is not to be counted."""
        self._open = None

    def reset(self) -> None:
        """Forget every call that has not been booked yet."""
        self._open = None
        with self._lock:
            self._pending.clear()

    def collect(self) -> None:
        """Book the calls whose events have passed."""
        with self._lock:
            while self._pending and self._pending[0][1].query():
                begin, end, reused = self._pending.popleft()
                self._add(begin.elapsed_time(end) / 1e3, reused)

    def _add(self, seconds: float, reused: bool) -> None:
        with self._lock:
            if self.booked is not None:
                self.booked(seconds)
            if reused:
                self._counters.reuse_calls_timed += 1
                self._counters.reuse_seconds += seconds
            else:
                self._counters.compute_calls_timed += 1
                self._counters.compute_seconds += seconds
