"""What one profiled run has told of a model, as a file: how far its residual moves from step to step."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CacheDitError
from .texts import text

if TYPE_CHECKING:
    from .graph_report import RegionReport
    from .runtime.observers import CallRecord

FORMAT = 1
"""Raised where other versions would read a calibration wrongly."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The profile of a model's run: made by `calibrate`, used by the option ``calibration``.

    Attributes:
        model: class of the model; for people, nothing depends on it.
        structure: digests of the cached regions, each of its blocks and those around them; it is used for no others.
        num_steps: steps of the run; it is used for runs of no other length.
        clock: how far the residual has moved before each step and at the end, from 0 to 1; num_steps + 1 numbers.
        format: version of this format.
    """

    model: str
    structure: tuple[str, ...]
    num_steps: int
    clock: tuple[float, ...]
    format: int = FORMAT

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.as_data(), indent=1) + "\n", encoding="utf-8")

    def as_data(self) -> dict[str, Any]:
        """The fields as JSON has them; `parse` is the way back."""
        return asdict(self)


def read_calibration(value: object) -> Calibration:
    """A calibration from itself, from the path of a file that `Calibration.save` wrote, or from what such a file holds.

    Raises:
        TypeError: it is none of these.
        ValueError: the file cannot be read, or holds no calibration of this format.
    """
    if isinstance(value, Calibration):
        return value
    if isinstance(value, (str, os.PathLike)):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(str(error)) from None
    if not isinstance(value, Mapping):
        raise TypeError(type(value).__name__)
    return _parsed(value)


def _parsed(data: Mapping[str, Any]) -> Calibration:
    if data.get("format") != FORMAT:
        raise ValueError("format")
    try:
        clock = tuple(map(float, data["clock"]))
        found = Calibration(str(data["model"]), tuple(map(str, data["structure"])), int(data["num_steps"]), clock)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(repr(error)) from None
    rises = all(math.isfinite(a) and a <= b for a, b in zip(clock, (*clock[1:], 1.0), strict=True))
    if found.num_steps < 1 or len(clock) != found.num_steps + 1 or not rises or clock[0] != 0.0 or clock[-1] != 1.0:
        raise ValueError("clock")
    return found


def structure_of(region: RegionReport) -> str:
    """The digest of what a calibration is bound to: the blocks of a region by path, and those around it."""
    parts = [region.lists, region.front, region.cached, region.back]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def calibrate(model: Any, run: Callable[[], object], **options: Any) -> Calibration:
    """Profile one ordinary run: how much the cached blocks' residual changes from each step to the next.

    The calibration can be given to `enable_cache` as ``calibration=``, itself or as the file that ``save`` wrote; the
    adaptive strategy with a ``target_speedup`` then places the computed steps by the measured change instead of by the
    noise levels and steps. A static clock, as SmoothCache (arXiv 2411.10510, 2024) has thresholds from one.

    Args:
        model: an ``nn.Module``, or a diffusers pipeline of one denoiser, without caching; it is as before afterwards.
        run: makes one sampling with the model under `torch.no_grad`, such as ``lambda: pipe(prompt, num_inference_steps=28)``.
        options: those of `enable_cache` that say what is cached (``front_blocks``, ``region``, ``inner``, …).

    Raises:
        CacheDitError: caching is on already, several denoisers, no blocks, a run of fewer than three steps or more than one.
    """
    from .api import disable_cache, enable_cache, explain
    from .integrations.targets import denoisers_of
    from .runtime.registry import session_of_module

    language = options.get("language")
    modules = denoisers_of(model, language)
    if len(modules) != 1:
        raise CacheDitError(text("calibrate_one", language))
    session = session_of_module(modules[0])
    if session is not None and session.enabled:
        raise CacheDitError(text("already_enabled", language))
    wanted = {"forecast": "reuse", "noise_scale": 0.0, "correction": False, "schedule": "1"}
    enable_cache(model, **{**options, **wanted})
    try:
        session = session_of_module(modules[0])
        assert session is not None
        session.observer = changes = _Changes()
        run()
        # what the last step measured is read when the run ends
        session.end_run()
        structures = {structure_of(graph.region) for graph in explain(model).graphs if graph.region is not None}
        if not structures:
            raise CacheDitError(text("calibrate_nothing", language))
        clock = changes.clock(language)
        return Calibration(type(modules[0]).__name__, tuple(sorted(structures)), len(clock) - 1, clock)
    finally:
        disable_cache(model)


class _Changes:
    """Hears how far plain reuse of the last residual would have been off at each step: that is how much it changed."""

    def __init__(self) -> None:
        self._runs: set[int] = set()
        self._steps = 0
        self._errors: dict[int, list[float]] = {}

    def compiling(self, reason: str | None) -> None:
        """Nothing to note."""

    def called(self, call: CallRecord) -> None:
        """A step of a run."""
        if call.tick is not None:
            self._runs.add(call.tick.run)
            self._steps = max(self._steps, call.tick.step)

    def measured(self, step: int, error: float) -> None:
        """The relative change of the residual; every context of a step says its own."""
        self._errors.setdefault(step, []).append(error)

    def clock(self, language: str | None) -> tuple[float, ...]:
        """The way behind before each step and at the end, from 0 to 1. Behind the last step the last change stands again."""
        steps = range(2, self._steps + 1)
        if len(self._runs) != 1 or len(steps) < 2 or any(step not in self._errors for step in steps):
            raise CacheDitError(text("calibrate_run", language, runs=len(self._runs), steps=self._steps))
        changes = [_mean(self._errors[step]) for step in steps]
        whole = sum(changes) + changes[-1]
        if not math.isfinite(whole) or whole <= 0.0:
            raise CacheDitError(text("calibrate_still", language))
        clock = [0.0]
        for change in changes:
            clock.append(min(1.0, clock[-1] + change / whole))
        return (*clock, 1.0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
