"""What is stored between steps: the residuals of one region in one context, and what was measured when they were made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import is_

import torch

from ..forecasts import Point
from ..passes.from_host import is_offloaded
from ..passes.insert_cache_branch import CacheInputs, ResidualBuffer
from ..passes.residual_math import statistics_length
from ..torch_internals import outside_inference_mode, write_counters
from .addresses import addresses
from .correction import Past
from .transfers import Read, begin_read

Sizes = tuple[tuple[int, ...], ...]
Dynamic = tuple[float, ...]


@dataclass(slots=True)
class Measurement:
    """Statistics of a computed step, not yet read: reading waits for the device, so it is left to the next decision.

    ``replaced`` are those of the step before, which hold again where this one turns out not to be finite.
    """

    values: torch.Tensor
    replaced: torch.Tensor
    before: tuple[Point, ...]
    target: Point
    # where the values lie on a device: waits for them alone
    arrived: Read | None = None
    # where several ranks decide alike: waits for what all of them measured
    agreed: Read | None = None


@dataclass(slots=True)
class ResidualStore:
    """The residuals of one region in one context. ``points`` says when each was computed, newest first.

    ``residuals[j][k]`` is the k-th newest of ``CacheInputs.stored[j]``, a live-out's residual or its scales; only the first
    ``len(points)`` are valid.
    """

    sizes: Sizes
    dynamic: Dynamic
    residuals: list[list[torch.Tensor]]
    measured: torch.Tensor
    front: torch.Tensor | None
    weights: WeightMark
    points: tuple[Point, ...] = ()
    # steps between the last two computed ones; known where only one residual is kept, too
    gap: int | None = None
    last_step: int = 0
    pending: Measurement | None = None
    change: torch.Tensor | None = None
    # as of a measurement
    arrived_change: Read | None = None
    agreed_change: Read | None = None
    front_known: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    controls: ControlMark | None = None
    past: Past = field(default_factory=Past)
    # where a skipped step that runs again may leave its front
    scratch: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the residuals and the front's output, in bytes."""
        tensors = [tensor for history in self.residuals for tensor in history]
        tensors += [self.front] if self.front is not None else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def held_bytes(self) -> int:
        """Memory of everything held now, in bytes: the buffers, and what correction keeps of skipped steps."""
        held = {id(tensor): tensor for tensor in self.past.tensors()}
        held |= {id(self.scratch): self.scratch} if self.scratch is not None else {}
        return self.bytes + sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def operands(self) -> list[torch.Tensor]:
        """The buffers in the order the programs take them."""
        kept = self.kept()
        return kept if self.front is None else [self.front, *kept]

    def kept(self) -> list[torch.Tensor]:
        """The residuals and their scales among them."""
        return list(chain.from_iterable(self.residuals))

    def moved(self, change: torch.Tensor | None) -> None:
        """Note how far the program found the front to have moved; None: not known, or read."""
        self.change, self.agreed_change = change, None
        self.arrived_change = None if change is None else begin_read(change)

    def read_change(self) -> list[float] | None:
        """The two numbers of it, once; None where there are none. Waits for the device, or for the other ranks."""
        if self.change is None:
            return None
        values = (self.agreed_change or self.arrived_change or self.change.tolist)()
        self.moved(None)
        return values

    def computed(self, point: Point, values: torch.Tensor) -> None:
        """Note that the program has overwritten the oldest residual with that of ``point``. References move, no data."""
        self.pending = Measurement(values, self.measured, self.points, point, begin_read(values))
        self.measured = values
        for history in self.residuals:
            # in one assignment: an interrupt between taking it out and putting it in would lose a buffer
            history[:] = [history[-1], *history[:-1]]
        self.gap = point.step - self.points[0].step if self.points else None
        self.points = (point, *self.points)[: len(self.residuals[0])]

    def forget(self) -> None:
        """Nothing stored is valid any more; the memory is kept."""
        self.points = ()
        self.gap = None
        self.pending = None
        self.weights.forget()
        self.moved(None)
        self.front_known = False
        self.errors.clear()
        self.controls = None
        self.past.forget()

    def drop_newest(self, measured: torch.Tensor) -> None:
        """The newest residual turned out not to be finite: take it out of the forecasts. ``measured`` holds without it."""
        self.measured = measured
        for history in self.residuals:
            history[:] = [*history[1:], history[0]]
        self.points = self.points[1:]
        self.gap = None
        self.errors.clear()


class WeightMark:
    """A model's weights by identity and write counter, to notice that they changed within a run."""

    __slots__ = ("_addresses", "_gone", "_references", "_versions")

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        # an address stands for a tensor as long as that lives, and comparing addresses reads none of their memory
        self._gone: list[weakref.ref[torch.Tensor]] = []
        self._references = [weakref.ref(weight, self._gone.append) for weight in weights]
        self._addresses = addresses(weights)
        self._versions = write_counters(weights)

    def forget(self) -> None:
        """Where nothing is stored nothing is watched: torch does not exchange a tensor's content under a weak reference."""
        self._references.clear()
        # nothing tells of their end any more, so that an address may be another tensor's
        self._addresses = b""

    def matches(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, not written to since."""
        if self._gone or self._addresses != addresses(weights):
            return False
        return self._versions is None or self._versions == write_counters(weights)


class ControlMark:
    """What entered the cached blocks from outside when they were computed last."""

    __slots__ = ("tensors", "versions")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors, self.versions = tensors, write_counters(tensors)

    def same_as(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, not written to since: known without reading them."""
        return all(map(is_, self.tensors, tensors)) and self.versions == write_counters(tensors)

    def moved(self, tensors: Sequence[torch.Tensor]) -> float:
        """How far they moved: the largest mean absolute change relative to the mean size. Waits for the device.

        Infinite where a tensor was written to, so that what it held is lost.
        """
        if self.versions != write_counters(self.tensors):
            return float("inf")
        moves = [_move(before, now) for before, now in zip(self.tensors, tensors, strict=True) if before is not now]
        return float(torch.stack(moves).max()) if moves else 0.0


def _move(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    size = before.abs().mean(dtype=torch.float32)
    change = (now - before).abs().mean(dtype=torch.float32)
    # nothing that stays nothing has not moved; what turns NaN has
    return torch.where(change == 0, torch.zeros_like(change), change / size)


def _zeros(size: Sequence[int], buffer: ResidualBuffer, inputs: CacheInputs) -> torch.Tensor:
    if is_offloaded(buffer.device, inputs.device):
        # pinned: a device copies from and to other host memory by way of such, and makes the host wait
        return torch.zeros(size, dtype=buffer.dtype, pin_memory=True)
    return torch.zeros(size, dtype=buffer.dtype, device=buffer.device)


def allocate(inputs: CacheInputs, sizes: Sizes, dynamic: Dynamic, weights: Sequence[torch.Tensor]) -> ResidualStore:
    """Take the buffers, filled with zeros: a weight of 0 does not exclude a buffer that holds NaN.

    ``sizes`` has one entry for each that is stored, and one for the front's output where the program keeps it; ``dynamic`` are
    the sizes of the graph's inputs, and the model's numbers among them, for which the store is valid.
    """
    with outside_inference_mode():
        residuals = [
            [_zeros(size, buffer, inputs) for _ in range(inputs.history)]
            for size, buffer in zip(sizes, inputs.stored, strict=False)
        ]
        count = len(inputs.residuals) * statistics_length(inputs.history)
        measured = torch.zeros(count, dtype=inputs.accumulate, device=inputs.device)
        front = None
        if inputs.front is not None:
            front = torch.zeros(sizes[-1], dtype=inputs.front.dtype, device=inputs.front.device)
    return ResidualStore(sizes, dynamic, residuals, measured, front, WeightMark(weights))
