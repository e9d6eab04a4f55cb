"""Correction: once a step has computed, the steps skipped before it are put right.

At a computed step the residuals of the skipped steps before it can be interpolated instead of extrapolated. The reuse
program, called again with those steps' inputs, says what the model would then have given. What the sampler's state has
missed by that is known from the solver's recurrence (`solvers`) and rides on the output of the computed step: with e
the state's deviation, e' = a e + b dD + c dD₋₁ and dD = p e + q δ, the output changes so that e is 0 behind this step.
It is Adams and Moulton's corrector to the forecast's predictor. For solvers of one step the correction is whole at
once; a solver with memory also keeps the changed output for its next step, which is made up for there.

A skipped step's output is changed by no more than `BOUND` times what the forecast was measured to err by, relative to
the output's size; so a forecast that was exact changes nothing, and a residual that is not finite corrects nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..forecasts import Point, forecast
from ..passes.residual_math import accumulation_dtype, statistics_length
from ..torch_internals import write_counter
from .solvers import SolverStep
from .transfers import send

BOUND = 2.0
"""Largest change of a skipped step's output: so many times the forecast's relative error, of the output's size."""

FREE_BYTES = 2**26
"""Inputs of a skipped step up to this size are kept in any case; beyond it no more than twice what the residuals take."""

Rerun = Callable[[Sequence[Any], tuple[float, ...], int], Sequence[Any]]


@dataclass(slots=True)
class _Skipped:
    """A skipped step that may yet be corrected: its inputs and the output that the sampler was given."""

    index: int
    point: Point
    args: tuple[Any, ...]
    noise: int
    output: torch.Tensor


@dataclass(slots=True)
class Past:
    """What one region's correction remembers of its run."""

    skipped: list[_Skipped] = field(default_factory=list)
    # dD of the step before the next one, and of the step before the first skipped one
    deviation: torch.Tensor | None = None
    before_skipped: torch.Tensor | None = None
    copies: dict[int, tuple[weakref.ref[torch.Tensor], int | None, torch.Tensor]] = field(default_factory=dict)

    def forget(self) -> None:
        """Nothing remembered holds any more."""
        self.skipped.clear()
        self.copies.clear()
        self.deviation = self.before_skipped = None

    def tensors(self) -> list[torch.Tensor]:
        """What it holds of its own: copied inputs, outputs, deviations. Weights among the inputs are the model's."""
        # copies of the lists: another thread may be in the middle of a call
        copied, skipped = dict(self.copies), list(self.skipped)
        held = [copy for _, _, copy in copied.values()]
        held += [each.args[place] for each in skipped for place in copied] + [each.output for each in skipped]
        return held + [each for each in (self.deviation, self.before_skipped) if each is not None]

    def keep(self, args: Sequence[Any], weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """The inputs as they are now: the caller may write to them before they are needed. Weights are watched elsewhere."""
        watched = set(map(id, weights))
        return tuple(
            self._copy(i, value) if isinstance(value, torch.Tensor) and id(value) not in watched else value
            for i, value in enumerate(args)
        )

    def _copy(self, place: int, value: torch.Tensor) -> torch.Tensor:
        """A copy, or the last one where the same tensor comes again unwritten (a prompt's embedding, positions)."""
        version = None if value.is_inference() else write_counter(value)
        known = self.copies.get(place)
        if known is not None and version is not None and known[0]() is value and known[1] == version:
            return known[2]
        copy = _copy_of(value)
        self.copies[place] = (weakref.ref(value), version, copy)
        return copy


def _span(value: torch.Tensor) -> int:
    """The elements from a tensor's first to its last in memory; fewer than it has where it is expanded."""
    if value.numel() == 0 or value.layout is not torch.strided:
        return value.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


def _copy_of(value: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as the tensor does, expanded or with gaps: compiled programs rely on it."""
    copy = value.clone()
    if copy.stride() == value.stride() or type(value) is not torch.Tensor:
        return copy
    span = value.as_strided((_span(value),), (1,), value.storage_offset())
    return span.clone().as_strided(value.shape, value.stride())


def bytes_to_keep(args: Sequence[Any], weights: Sequence[torch.Tensor]) -> int:
    """Memory that the inputs of one skipped step take, weights left out."""
    watched = set(map(id, weights))
    kept = [value for value in args if isinstance(value, torch.Tensor) and id(value) not in watched]
    return sum(_span(value) * value.element_size() for value in kept)


def output_place(outputs: Sequence[Any]) -> int | None:
    """Which of a graph's results is the model's output: the only floating-point tensor among them, or None."""
    places = [i for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and out.is_floating_point()]
    return places[0] if len(places) == 1 else None


def note_skipped(
    past: Past, steps: Sequence[SolverStep], point: Point, args: tuple[Any, ...], noise: int, output: torch.Tensor
) -> torch.Tensor:
    """A step was skipped: remember it. Returns its output, with what a solver with memory still has to make up for."""
    index = point.step - 1
    if not past.skipped:
        past.before_skipped = past.deviation
    output, past.deviation = _settled(output, steps[index], None, past.deviation)
    past.skipped.append(_Skipped(index, point, args, noise, output.clone()))
    return output


def correct(
    past: Past,
    steps: Sequence[SolverStep],
    stored: Sequence[Point],
    measured: torch.Tensor,
    history: int,
    weights_used: tuple[float, ...],
    rerun: Rerun,
    place: int,
    output: torch.Tensor,
) -> torch.Tensor:
    """A step was computed: its output, changed so that the state behind it is as if the skipped steps had known better.

    Args:
        past: what is remembered; the skipped steps in it are done with afterwards.
        steps: the solver's steps.
        stored: points of the stored residuals, the one just computed first.
        measured: the statistics of the computed step, on the device.
        history: residuals that the program holds.
        weights_used: the weights that the forecast would have had at this step, over the residuals before it.
        rerun: runs the reuse program with other inputs, weights and key of the noise.
        place: which of its results is the output.
        output: the model's output at this step.
    """
    index = stored[0].step - 1
    pending = past.skipped
    current = bool(pending) and pending[-1].index == index - 1
    if not current:
        past.skipped = []
        output, past.deviation = _settled(output, steps[index], None, past.deviation)
        return output
    # programs that replay into the same memory would overwrite it
    output = output.clone()
    error = _relative_error(measured, history, weights_used)
    state: torch.Tensor | None = None
    before = past.before_skipped
    degree, through = _degree(stored), forecast("lagrange")
    for each in pending:
        step = steps[each.index]
        weights = through.weights(stored, each.point, degree)
        better = rerun(each.args, weights, each.noise)[place]
        change = _bounded(_wide(better) - _wide(each.output), each.output, error)
        deviation = step.q * change if state is None else step.p * state + step.q * change
        moved = step.b * deviation
        if state is not None:
            moved = moved + step.a * state
        if before is not None and step.c:
            moved = moved + step.c * before
        state, before = moved, deviation
    past.skipped = []
    output, past.deviation = _settled(output, steps[index], state, before)
    return output


def _degree(stored: Sequence[Point]) -> int:
    """Of the polynomial that residuals are interpolated by: 2 through three of them, but for a third that lies less than half
    as far behind the second as the newest lies ahead of it: there the parabola swings out, and a line serves better."""
    if len(stored) < 3:
        return 1
    newest, second, third = [point.time for point in stored[:3]]
    if newest is None or second is None or third is None:
        newest, second, third = [float(point.step) for point in stored[:3]]
    return 2 if abs(second - third) >= 0.5 * abs(newest - second) else 1


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(accumulation_dtype(value.dtype))


def _settled(
    output: torch.Tensor, step: SolverStep, state: torch.Tensor | None, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output changed so that the state's deviation is 0 behind this step, and the deviation of D that this leaves."""
    owed: Any = None
    if state is not None:
        owed = step.a * state
    if before is not None and step.c:
        owed = step.c * before if owed is None else owed + step.c * before
    if owed is None or step.gain == 0.0:
        return output, None
    deviation = -owed / step.b
    change = deviation if state is None else deviation - step.p * state
    return (_wide(output) - change / step.q).to(output.dtype), deviation


def _relative_error(measured: torch.Tensor, history: int, weights: tuple[float, ...]) -> torch.Tensor:
    """The relative RMS error of a forecast with these weights, on the device: nobody waits for it. The largest over the
    live-outs; 0 where anything is not finite, so that nothing is corrected."""
    tails = [sum(weights[k:]) for k in range(len(weights))]
    tails[0] = 1.0
    length = statistics_length(history)
    factors = [0.0, 0.0]
    for a in range(history):
        for b in range(a, history):
            known = b < len(tails)
            factors.append((1.0 if a == b else 2.0) * tails[a] * tails[b] if known else 0.0)
    rows = measured.reshape(-1, length)
    square = (rows * send(factors, rows.dtype, rows.device)).sum(dim=1).clamp(min=0.0)
    error = torch.sqrt(square / rows[:, 1].clamp(min=torch.finfo(rows.dtype).tiny))
    fine = (rows[:, 0] == 0).all() & torch.isfinite(rows).all()
    return torch.where(fine, error.max(), torch.zeros_like(error[0]))


def _bounded(change: torch.Tensor, output: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """`change`, made smaller where it exceeds what the measured error allows; 0 where it is not finite."""
    allowed = BOUND * error.to(output.device) * _wide(output).square().mean().sqrt()
    size = change.square().mean().sqrt()
    scale = torch.where(size > allowed, allowed / size, torch.ones_like(size))
    scale = torch.where(torch.isfinite(size), scale, torch.zeros_like(size))
    return torch.where(scale > 0, change, torch.zeros_like(change)) * scale
