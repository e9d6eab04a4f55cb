"""Solvers as linear recurrences: how a change of the model's output moves the sampler's state.

With D the denoised sample that a solver makes of its state x and the model's output v, a step of each solver here is

    Dₙ = pₙ xₙ + qₙ vₙ,   xₙ₊₁ = aₙ xₙ + bₙ Dₙ + cₙ Dₙ₋₁

with numbers that only the noise levels decide. A solver that draws noise, or evaluates the model twice a step (Heun),
has no such form. A new solver is one function and one line in `SOLVERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

_FEW_STEPS = 15
"""Runs shorter than this end with a step of first order in diffusers' multistep solvers; all do where the last sigma is 0."""


class SolverStep(NamedTuple):
    """One step of the recurrence above. `gain` = bq: how far the state moves for a change of 1 of this step's output."""

    a: float
    b: float
    c: float
    p: float
    q: float

    @property
    def gain(self) -> float:
        return self.b * self.q


Solver = Callable[[Sequence[float], str], tuple[SolverStep, ...]]


def denoised(sigma: float, prediction: str) -> tuple[float, float]:
    """p and q of D = p x + q v. Sigma is the share of noise for flow models, and σ in x = x₀ + σ ε for the others."""
    if prediction == "v":
        return 1.0 / (sigma * sigma + 1.0), -sigma / math.sqrt(sigma * sigma + 1.0)
    return 1.0, -sigma


def euler(sigmas: Sequence[float], prediction: str) -> tuple[SolverStep, ...]:
    """x' = x + (σ' − σ)(x − D) / σ: Euler's method in sigma, flow matching's and the others' (DDIM is the same step).

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, 2022).
    """
    steps = []
    for sigma, following in pairwise(sigmas):
        ratio = following / sigma
        steps.append(SolverStep(ratio, 1.0 - ratio, 0.0, *denoised(sigma, prediction)))
    return tuple(steps)


def _log_snr(sigma: float, prediction: str) -> float:
    """λ = log(signal / noise); infinite at the ends."""
    signal = 1.0 - sigma if prediction == "flow" else 1.0
    if sigma <= 0.0:
        return math.inf
    return math.log(signal / sigma) if signal > 0.0 else -math.inf


def dpmpp_2m(sigmas: Sequence[float], prediction: str) -> tuple[SolverStep, ...]:
    """DPM-Solver++(2M): a second-order step over λ = log(signal / noise) that uses the last step's D too.

    The first step, and the last one where it ends at sigma 0 or in short runs, are of first order, as in diffusers.

    Source: Lu et al., "DPM-Solver++" (arXiv 2211.01095, 2022).
    """
    steps: list[SolverStep] = []
    last = len(sigmas) - 2
    for n, (sigma, following) in enumerate(pairwise(sigmas)):
        here, there = _log_snr(sigma, prediction), _log_snr(following, prediction)
        decay = math.exp(here - there) if math.isfinite(here) else 0.0
        signal = 1.0 - following if prediction == "flow" else 1.0
        weight, ratio = signal * (1.0 - decay), following / sigma
        before = _log_snr(sigmas[n - 1], prediction) if n else -math.inf
        first_order = n == last and (following == 0.0 or last + 1 < _FEW_STEPS)
        share = 0.0
        if not first_order and all(map(math.isfinite, (before, here, there))):
            share = 0.5 * (there - here) / (here - before)
        steps.append(SolverStep(ratio, weight * (1.0 + share), -weight * share, *denoised(sigma, prediction)))
    return tuple(steps)


SOLVERS: dict[str, Solver] = {"euler": euler, "ddim": euler, "dpmpp_2m": dpmpp_2m}
"""The solvers whose states can be put right afterwards, by the names that `new_run` takes."""


TIME_TOLERANCE = 0.02
"""How far the model's timestep may be from where the noise levels put it, as a share of the timesteps passed so far."""
TIME_ROUNDING = 2.0**-8
"""How far it may be off by itself, as a share of it: timesteps come in bfloat16 too."""
FAR = 0.25
"""The share of the way through the noise levels after which timesteps must have moved."""


class TimeCheck:
    """Whether the model's timesteps go with the noise levels that were announced, for flow models: the one is the other
    times a constant and plus one, whatever unit the model takes. Others count their timesteps in their own way.

    Each timestep leaves a range for the constant, as wide as its rounding; the ranges must have something in common.
    """

    def __init__(self, sigmas: Sequence[float], prediction: str) -> None:
        self._sigmas, self._checks = sigmas, prediction == "flow"
        self._first: tuple[int, float] | None = None
        # integers may be rounded to such
        self._whole = True
        self._low, self._high = -math.inf, math.inf

    def agrees(self, step: int, time: float | None) -> bool:
        """Whether this step's timestep (step from 1) fits those before; the first two cannot but fit."""
        if time is None or not self._checks:
            return True
        self._whole &= float(time).is_integer()
        if self._first is None or self._first[0] == step:
            self._first = step, time
            return True
        passed = self._sigmas[step - 1] - self._sigmas[self._first[0] - 1]
        moved, size = time - self._first[1], max(abs(time), abs(self._first[1]))
        rounding = TIME_ROUNDING * size + (1.0 if self._whole else 0.0)
        if abs(passed) > FAR * abs(self._sigmas[0] - self._sigmas[-1]) and abs(moved) <= rounding:
            return False
        off = rounding + TIME_TOLERANCE * abs(moved)
        low, high = sorted(((moved - off) / passed, (moved + off) / passed))
        self._low, self._high = max(self._low, low), min(self._high, high)
        return self._low <= self._high


def solver_steps(
    solver: str | None, prediction: str | None, sigmas: Sequence[float] | None, num_steps: int | None
) -> tuple[SolverStep, ...] | None:
    """The steps of a run, or None where the solver, the prediction or falling noise levels are not known."""
    if solver not in SOLVERS or prediction is None or sigmas is None or num_steps != len(sigmas) - 1:
        return None
    # levels that rise or repeat belong to samplers that add noise again, or do something else in between
    if not all(before > after for before, after in pairwise(sigmas)) or sigmas[-1] < 0.0:
        return None
    if prediction == "flow" and sigmas[0] > 1.0:
        return None
    return SOLVERS[solver](sigmas, prediction)
