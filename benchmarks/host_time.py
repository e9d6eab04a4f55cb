"""Host time that our runtime adds to a call: every program is replaced by its first result, so that no kernel runs.

python benchmarks/host_time.py demo
python benchmarks/host_time.py demo --device cuda
python benchmarks/host_time.py demo --parts          where it goes: microseconds that each part takes by itself
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from subjects import Subject, subject

import cache_dit
from cache_dit.runtime.buffers import ResidualStore, WeightMark
from cache_dit.runtime.call import CachedCall
from cache_dit.runtime.clock import StepClock
from cache_dit.runtime.operands import CacheOperands
from cache_dit.runtime.program import CachedGraph
from cache_dit.runtime.session import Session
from cache_dit.runtime.signs import Signs
from cache_dit.runtime.timing import CallTimer

CALLS = 600
# The first calls, which compile and allocate.
SETTLED = 20
# Schedules: every step computes; all but the first two are skipped.
COMPUTES, SKIPS = "1", "11" + "0" * 10 * CALLS
# What a call goes through, by the functions whose time is that of the part.
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "brackets of the call": ((CachedCall, "_bracketed"), (Session, "begin"), (Session, "end"), (CachedGraph, "__call__")),
    "its time": ((CallTimer, "start"), (CallTimer, "book"), (CallTimer, "watch")),
    "timestep": ((CachedCall, "_time"),),
    "clock": ((StepClock, "tick"),),
    "signs of other generations": ((Signs, "same"), (Signs, "note"), (Session, "_is_of_another")),
    "run, context, step": ((Session, "_run"), (Session, "_enter"), (Session, "_enter_step"), (Session, "_store_of")),
    "comparing the weights": ((WeightMark, "matches"),),
    "decision": ((Session, "_decide"), (Session, "_decision_of")),
    "what the last step measured": ((Session, "_read"),),
    "arguments of the program": (
        (Session, "_step"),
        (Session, "_cache_operands"),
        (CacheOperands, "make"),
        (ResidualStore, "operands"),
    ),
    "residuals take turns": ((ResidualStore, "computed"),),
}


def remembering(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler whose programs run once."""
    known: list[Any] = []

    def run(*flat: Any) -> Any:
        if not known:
            known.append(gm(*flat))
        return known[0]

    return run


def _plain(measured: Subject) -> Callable[..., Any]:
    return torch.compile(copy.deepcopy(measured.model), backend=remembering)


def _cached(measured: Subject, schedule: str) -> Any:
    """The model cached by a schedule, with nothing that a step need not do."""
    quiet: dict[str, Any] = {"forecast": "reuse", "noise_scale": 0.0, "correction": False, "inner": remembering}
    return cache_dit.enable_cache(copy.deepcopy(measured.model), schedule=schedule, **quiet)


def measure(name: str, device: str = "cpu") -> dict[str, float]:
    """Medians of microseconds a call, plain and ours, computing and skipping, in turns; and what watching the weights takes."""
    measured = subject(name)
    measured.model.to(device)
    plain = _plain(measured)
    schedules = {"computing": COMPUTES, "skipping": SKIPS, "alternating": "10" * 10 * CALLS}
    ours = {kind: _cached(measured, schedule) for kind, schedule in schedules.items()}
    calls = {"plain": plain, **ours}
    medians = _in_turns(measured, calls, device)
    added = {f"{kind} adds": medians[kind] - medians["plain"] for kind in ours}
    # with a clock around the comparison: by itself, again and again, it would find everything in the processor's caches
    comparing: list[float] = []
    matches = WeightMark.matches

    def timed(mark: WeightMark, weights: Sequence[torch.Tensor]) -> bool:
        start = time.perf_counter()
        same = matches(mark, weights)
        comparing.append(time.perf_counter() - start)
        return same

    with mock.patch.object(WeightMark, "matches", timed):
        _in_turns(measured, {"plain": plain, "skipping": ours["skipping"]}, device, first=CALLS)
    return {**medians, **added, "comparing the weights takes": statistics.median(comparing) * 1e6}


class Parts:
    """Clocks around the functions of `PARTS`, in place while it is entered: each counts what it takes without those within.

    What a clock takes is measured first and left out.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        # of the functions under way: seconds and number of those that they have called
        self._within: list[list[float]] = []
        self._stack = ExitStack()
        self._own, self._around = 0.0, 0.0
        self._calibrate()

    def __enter__(self) -> Parts:
        for part, functions in PARTS.items():
            for owner, name in functions:
                self._stack.enter_context(mock.patch.object(owner, name, self.clocked(part, getattr(owner, name))))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def clocked(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a clock that books its time on a part."""
        within, spent, clock = self._within, self._spent, time.perf_counter

        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            within.append([0.0, 0])
            try:
                return function(*args, **kwargs)
            finally:
                seconds, calls = within.pop()
                taken = clock() - start
                spent[part] = spent.get(part, 0.0) + taken - seconds - calls * self._around - self._own
                if within:
                    within[-1][0] += taken
                    within[-1][1] += 1

        return call

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading."""
        now = {part: self._spent[part] for part in PARTS}
        self._spent.clear()
        self._spent.update(dict.fromkeys(PARTS, 0.0))
        return now

    def _calibrate(self, calls: int = 20_000) -> None:
        def nothing() -> None:
            pass

        def often(function: Callable[[], None]) -> None:
            for _ in range(calls):
                function()

        plain, inner = self.clocked("plain", often), self.clocked("inner", nothing)
        outer = self.clocked("outer", often)
        plain(nothing)
        outer(inner)
        bare = self._spent["plain"] / calls
        self._own = max(self._spent["inner"] / calls - bare, 0.0)
        self._around = max(self._spent["outer"] / calls - bare, 0.0)
        self.read()


def parts_of(name: str, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Medians of microseconds a call by part, of calls that skip and calls that compute, in turns with plain."""
    measured = subject(name)
    measured.model.to(device)
    models = {"computing": _cached(measured, COMPUTES), "skipping": _cached(measured, SKIPS)}
    plain = _plain(measured)
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in models}
    with torch.no_grad(), Parts() as parts:
        for step in range(CALLS):
            given = _moved(measured.inputs(step), device)
            plain(**given)
            for kind, model in models.items():
                call = model._compiled_call_impl
                model(**given)
                if step < SETTLED:
                    if step == SETTLED - 1:
                        # Dynamo's frame, its guards and the graph's wrapper are plain's as well
                        call._compiled = parts.clocked("Dynamo", call._compiled)
                    parts.read()
                    continue
                taken[kind].append(parts.read())
    return {
        kind: {part: round(statistics.median(each[part] for each in calls) * 1e6, 1) for part in PARTS}
        for kind, calls in taken.items()
    }


def _in_turns(measured: Subject, calls: dict[str, Callable[..., Any]], device: str, first: int = 0) -> dict[str, float]:
    """Medians of microseconds of each of the calls, which take turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    with torch.no_grad():
        for step in range(first, first + CALLS):
            given = _moved(measured.inputs(step), device)
            # who comes first finds the inputs' memory cold
            order = list(calls)[step % len(calls) :] + list(calls)[: step % len(calls)]
            for kind in order:
                call = calls[kind]
                start = time.perf_counter()
                call(**given)
                seconds[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values[SETTLED:]) * 1e6 for kind, values in seconds.items()}


def _moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    if arguments.parts:
        print(json.dumps(parts_of(arguments.subject, arguments.device), indent=1))
    else:
        print(json.dumps(measure(arguments.subject, arguments.device)))
