"""One sampling of ComfyUI: which evaluation of which run a call of the model is, told by the sampler's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch

from ..runtime.clock import ContextKey, StepClock, Tick


class SamplerClock(StepClock):
    """Counts what the sampler says: which run, and which of its evaluations. Nothing is guessed from timesteps."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.evaluation = 0
        self._seen: set[str] = set()

    def begin(self) -> None:
        """A sampling begins; `announce` says which."""
        self.run += 1
        self.evaluation = 0
        self._seen.clear()

    def end_run(self) -> None:
        """What is stored may not be used again; the sampler itself may go on."""
        self._seen.clear()

    def forget_context(self, name: ContextKey) -> None:
        """The next call in this context finds nothing stored."""
        self._seen.discard(str(name))

    @property
    def running(self) -> bool:
        """Whether a call was counted since the run began."""
        return bool(self._seen)

    def tick(self, time: float | None, name: str | None = None) -> Tick:
        """One call of the model."""
        key = name or "model"
        fresh = key not in self._seen
        self._seen.add(key)
        return Tick(self.run, key, max(1, self.evaluation), fresh, False)


@dataclass(slots=True)
class Pace:
    """How a sampler evaluates: evaluations of a run of ``steps`` steps, and whether each is at a listed noise level."""

    steps: int
    evaluations: int
    listed: bool

    def evaluations_of(self, steps: int) -> int:
        """Evaluations of a run of so many steps: a sampler with two a step makes one or none less in all."""
        each = -(-self.evaluations // self.steps)
        return each * steps - (each * self.steps - self.evaluations)


_paces: dict[object, Pace] = {}


class Sampling:
    """One sampling under way: its noise levels, its evaluations, and the conditions that each of them has seen.

    The noise level of an evaluation is read where that costs nothing. On other devices it is taken from the list once
    the sampler has been seen to evaluate at listed levels alone, so that the host never waits for the device.
    """

    def __init__(self, sampler: Any, sigmas: Any) -> None:
        self.sigmas = _levels(sigmas)
        self.steps = len(self.sigmas) - 1 if self.sigmas is not None else None
        self.evaluations = 0
        # calls of the model, and those of them that reached the compiled function
        self.applied = 0
        self.calls = 0
        self.sigma: float | None = None
        # whether every evaluation so far has asked for the same conditions
        self.uniform = True
        self.kind: type | None = None
        self._sampler = _sampler_key(sampler)
        self._next = 0
        self._since_callback = 0
        self._unlisted = False
        self._names: dict[object, str] = {}
        self._seen: dict[object, int] = {}
        self._asked: dict[object, int] | None = None
        self._frozen: dict[int, list[torch.Tensor]] = {}

    def counting(self, callback: Any) -> Callable[..., Any]:
        """The sampler's callback, which says how many of the steps are done."""

        def counted(step: Any, *args: Any, **kwargs: Any) -> Any:
            self._next = int(step) + 1
            self._since_callback = 0
            return callback(step, *args, **kwargs) if callback is not None else None

        return counted

    def evaluate(self, timestep: Any) -> None:
        """The sampler evaluates the model."""
        self.evaluations += 1
        self._since_callback += 1
        if self._seen:
            self.uniform &= self._asked is None or self._asked == self._seen
            self._asked = self._seen
        self._seen = {}
        self.sigma = self._sigma_of(timestep)

    def listed_sigma(self) -> float | None:
        """The noise level that the list has for the step under way."""
        levels = self.sigmas
        return levels[self._next] if levels is not None and self._next < len(levels) else None

    def _sigma_of(self, timestep: Any) -> float | None:
        listed, pace = self.listed_sigma(), _paces.get(self._sampler)
        if not isinstance(timestep, torch.Tensor):
            return listed
        if listed is not None and pace is not None and pace.listed and timestep.device.type != "cpu":
            return listed
        sigma = float(timestep.max())
        self._unlisted |= listed is None or not isclose(sigma, listed, rel_tol=1e-4, abs_tol=1e-6)
        return sigma

    def expected_evaluations(self) -> int | None:
        """The evaluations of the whole run: as many as steps, unless the sampler is known to make, or makes, more."""
        if self.steps is None:
            return None
        pace = _paces.get(self._sampler)
        if pace is not None:
            return max(self.evaluations, pace.evaluations_of(self.steps))
        if self.evaluations > self._next + 1:
            return max(self.evaluations, 2 * self.steps - (self.sigmas is not None and self.sigmas[-1] == 0.0))
        return max(self.evaluations, self.steps)

    def listed_sigmas(self) -> tuple[float, ...] | None:
        """The noise levels of the evaluations, where there is one for each step."""
        return self.sigmas if self.expected_evaluations() == self.steps else None

    def freeze(self, module: torch.nn.Module) -> None:
        """Let no weight ask for gradients while the run lasts: those that a LoRA has patched do not, and the tracer tells
        the two kinds apart, so that each LoRA would be traced once more."""
        if id(module) not in self._frozen:
            asking = self._frozen[id(module)] = [weight for weight in module.parameters() if weight.requires_grad]
            for weight in asking:
                weight.requires_grad_(False)

    def thaw(self) -> None:
        """The weights are as they were."""
        for weights in self._frozen.values():
            for weight in weights:
                weight.requires_grad_(True)
        self._frozen.clear()

    def learn(self) -> None:
        """Remember the sampler's way, where the run went to its end."""
        if self.steps and self._next >= self.steps and self.evaluations >= self.steps:
            if len(_paces) >= _MAX_PACES:
                _paces.clear()
            _paces[self._sampler] = Pace(self.steps, self.evaluations, not self._unlisted)

    def context(self, options: Mapping[str, Any]) -> str:
        """The name of a call: what it is for, by the order in which the run first saw such calls.

        Conditions are known by ComfyUI's ``uuids``; the same ones come again in a step where windows or several passes of
        a guider ask for it, and are then told apart by the window, else by their order.
        """
        kinds = tuple(options.get("cond_or_uncond") or ())
        window = getattr(options.get("context_window"), "index_list", None)
        key = kinds, tuple(options.get("uuids") or ()), None if window is None else tuple(window)
        turn = self._seen.get(key, 0)
        self._seen[key] = turn + 1
        name = self._names.get((key, turn))
        if name is None:
            what = "+".join(_KINDS.get(kind, str(kind)) for kind in kinds) or "model"
            name = self._names[key, turn] = f"{what} {len(self._names) + 1}"
        return name


_KINDS = {0: "cond", 1: "uncond"}
_MAX_PACES = 64


def _levels(sigmas: Any) -> tuple[float, ...] | None:
    if not isinstance(sigmas, torch.Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
        return None
    return tuple(sigmas.tolist())


def _sampler_key(sampler: Any) -> object:
    function = getattr(sampler, "sampler_function", None)
    named = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
    extra = getattr(sampler, "extra_options", None) or {}
    return named, tuple(sorted((name, repr(value)) for name, value in extra.items()))
