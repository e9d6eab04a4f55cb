"""The correction of one model's runs: whether a run's solver allows it, and what each step of the run needs for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..forecasts import FORECASTS, Point
from ..messages import SaidOnce
from ..options import CacheOptions
from ..passes.graph_values import tensors_in
from ..torch_internals import outside_inference_mode
from .buffers import ResidualStore
from .clock import StepClock
from .correction import FREE_BYTES, bytes_to_keep, correct, note_skipped, output_place
from .operands import CacheOperands
from .program import Cacheable
from .solvers import SOLVERS, SolverStep, TimeCheck, solver_steps


class Corrector:
    """Remembers skipped steps and has them put right. ``steps``: those of the run's solver; None where nothing is corrected."""

    def __init__(self, options: CacheOptions, said: SaidOnce, operands: CacheOperands) -> None:
        self.steps: Sequence[SolverStep] | None = None
        self._options, self._said, self._operands = options, said, operands
        self._time_check: TimeCheck | None = None
        # of a run's first computed step the result that counts as the model's output, until the call shows that it is
        self.unseen: torch.Tensor | None = None
        self._seen = False

    def begin_run(self, clock: StepClock, *, sees_whole_calls: bool) -> None:
        """A run begins: take its solver's steps where skipped ones are to be corrected and can be."""
        self.steps = self._time_check = self.unseen = None
        self._seen = False
        if not self._options.may_correct():
            return
        if not sees_whole_calls:
            # under bare torch.compile nobody says where a call ends, so a graph may be a part of the model
            self._refuse("correction_outputs")
            return
        self.steps = solver_steps(clock.solver, clock.prediction, clock.sigmas, clock.num_steps)
        if self.steps is None:
            self._refuse("correction_unknown")
        elif clock.sigmas is not None and clock.prediction is not None:
            self._time_check = TimeCheck(clock.sigmas, clock.prediction)

    def applies(self, step: int) -> bool:
        """Whether this step of the run is one of its solver's."""
        return self.steps is not None and step <= len(self.steps)

    def keep(self, store: ResidualStore, graph: Cacheable, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """Copies of the inputs of a step that is about to be skipped: the program may write to them. None: it cannot be
        corrected."""
        if not graph.repeats:
            self.end("correction_repeats")
            return None
        weights = graph.watched(args)
        if bytes_to_keep(args, weights) > FREE_BYTES + 2 * store.bytes:
            self.end("correction_memory")
            return None
        return store.past.keep(args, weights)

    def skipped(
        self, store: ResidualStore, kept: tuple[Any, ...], point: Point, noise: int, results: Sequence[Any]
    ) -> Sequence[Any]:
        """A step was skipped, with these inputs: its results, with what a solver with memory still has to make up for."""
        place = self._place(point, results)
        if place is None:
            return results
        assert self.steps is not None
        return _replaced(results, place, note_skipped(store.past, self.steps, point, kept, noise, results[place]))

    def computed(
        self,
        store: ResidualStore,
        graph: Cacheable,
        point: Point,
        before: tuple[Point, ...],
        forecast: str,
        results: Sequence[Any],
    ) -> Sequence[Any]:
        """A step was computed: its results, changed so that the steps skipped before it are put right.

        ``before``: points of the residuals that were stored before this step, for which ``forecast`` would have predicted.
        """
        place = self._place(point, results)
        if place is None:
            return results
        assert self.steps is not None
        inputs = graph.inputs
        if store.front is not None and store.scratch is None:
            with outside_inference_mode():
                store.scratch = torch.zeros_like(store.front)
        front = [] if store.scratch is None else [store.scratch]
        residuals = [buffer for history in store.residuals for buffer in history]

        def rerun(kept: Sequence[Any], weights: tuple[float, ...], key: int) -> Sequence[Any]:
            operands = self._operands.make(inputs, skip=True, weights=weights, key=key, measured=store.measured)
            return graph.programs.reuse((*kept, *operands, *front, *residuals))

        used = FORECASTS[forecast].weights(before, point, self._options.order) if before else ()
        changed = correct(
            store.past, self.steps, store.points, store.measured, inputs.history, used, rerun, place, results[place]
        )
        if not self._seen:
            self.unseen = changed
        return _replaced(results, place, changed)

    def see(self, result: object) -> None:
        """What the call gave: where that is not what was corrected, but made of it by code that was not traced, nothing is
        corrected any more."""
        output, self.unseen, self._seen = self.unseen, None, True
        if self.steps is not None and not any(each is output for each in tensors_in(result)):
            self.end("correction_outputs")

    def end(self, why: str) -> None:
        """Skipped steps stay as they are from here to the end of the run."""
        self.steps = self.unseen = None
        self._refuse(why)

    def _place(self, point: Point, results: Sequence[Any]) -> int | None:
        """Which of the results is the model's output; None where that, or the run, is not what was announced."""
        if self._time_check is not None and not self._time_check.agrees(point.step, point.time):
            self.end("correction_times")
            return None
        place = output_place(results)
        if place is None:
            self.end("correction_outputs")
        return place

    def _refuse(self, key: str) -> None:
        """Said where the user asked for correction by name, and where what was announced is not true."""
        if self._options.correction is True or key == "correction_times":
            self._said.warn(key, solvers=", ".join(map(repr, SOLVERS)))


def _replaced(results: Sequence[Any], place: int, value: torch.Tensor) -> Sequence[Any]:
    return (*results[:place], value, *results[place + 1 :])
