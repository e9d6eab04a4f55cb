"""Where the time of a skipped step goes, of its floor and of a computed one, layer by layer, in one process: plain, floor and
ours take turns, so that each runs behind the kernels of the others, as a step does in a run.

    python benchmarks/layers.py flux-small --rounds 80
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from subjects import subject
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._inductor.compile_fx import compile_fx
from variants import ALTERNATE

import cache_dit


class Layers:
    """Milliseconds of each layer by name; of nested calls the last one's."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.found: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time noted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.last[name] = (time.perf_counter() - start) * 1e3
            return result

        return call

    def note(self, **values: float) -> None:
        """One more round's values."""
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    def table(self) -> list[str]:
        """A line for each layer: the median, and the fastest tenth."""
        rows = [(name, statistics.median(v), statistics.quantiles(v, n=10)[0]) for name, v in self.found.items()]
        return [
            "| layer | ms | fastest tenth, ms |\n|---|---|---|",
            *(f"| {name.replace('_', ' ')} | {middle:.3f} | {fast:.3f} |" for name, middle, fast in rows),
        ]


def measure(name: str, rounds: int) -> Layers:
    """Take turns and note the layers of the skipped steps and of the floor's calls before them."""
    layers, measured = Layers(), subject(name)

    def whole(kind: str, model: Callable[..., Any], given: dict[str, Any]) -> float:
        layers.timed(kind, model)(**given)
        return layers.last[kind]

    def inner(kind: str) -> Callable[..., Any]:
        return lambda gm, examples: layers.timed(f"{kind} kernels", compile_fx(gm, examples))

    plain = torch.compile(copy.deepcopy(measured.model), backend=inner("plain"))
    floor = torch.compile(measured.floor(), backend=inner("floor"))
    ours: Any = measured.model
    cache_dit.enable_cache(ours, schedule=ALTERNATE, forecast="reuse", noise_scale=0.0, correction=False)
    for step in range(2):
        for model in (plain, floor, ours):
            model(**measured.inputs(step))
    call = ours._compiled_call_impl
    programs = next(iter(call.session.tracing.cached)).programs
    programs.reuse, programs.compute = layers.timed("reuse", programs.reuse), layers.timed("compute", programs.compute)
    call.session.run = layers.timed("run", call.session.run)
    call._compiled = layers.timed("compiled", call._compiled)
    guards = _guards(ours, measured.inputs(1))
    for step in range(2, 2 + 2 * rounds, 2):
        whole("computed", ours, measured.inputs(step))
        layers.note(computed=layers.last["computed"], computed_kernels=layers.last["compute"])
        given = measured.inputs(step + 1)
        whole("plain", plain, given)
        layers.note(plain=layers.last["plain"], plain_kernels=layers.last["plain kernels"])
        whole("floor", floor, given)
        layers.note(floor=layers.last["floor"], floor_kernels=layers.last["floor kernels"])
        whole("plain", plain, given)
        total = whole("skipped", ours, given)
        reuse, run, compiled = (layers.last[key] for key in ("reuse", "run", "compiled"))
        layers.note(skipped=total, skipped_kernels=reuse, its_guards_and_arguments=compiled - run)
        layers.note(its_session=run - reuse, its_brackets=total - compiled)
        whole("plain", plain, given)
        if guards is not None:
            layers.note(guards_alone_behind_kernels=_milliseconds(guards), guards_alone_again_at_once=_milliseconds(guards))
    if cache_dit.get_stats(ours).hits < rounds:
        raise SystemExit("not every second step was skipped")
    return layers


def _guards(model: torch.nn.Module, given: dict[str, Any]) -> Callable[[], object] | None:
    """Dynamo's check of the guards of this model's frame, by itself; None where the frame is that of a decorator."""
    bound = inspect.signature(model.forward).bind(**given)
    bound.apply_defaults()
    values = {"self": model, **bound.arguments}
    managers = [entry.guard_manager for entry in _debug_get_cache_entry_list(type(model).forward.__code__)]
    manager = next((each for each in managers if each.check(values)), None)
    return None if manager is None else lambda: manager.check(values)


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject")
    parser.add_argument("--rounds", type=int, default=80)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with torch.no_grad():
        print("\n".join(measure(arguments.subject, arguments.rounds).table()))


if __name__ == "__main__":
    main()
