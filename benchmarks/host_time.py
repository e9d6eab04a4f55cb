"""Host time that our runtime adds to a call: every program is replaced by its first result, so that no kernel runs.

python benchmarks/host_time.py demo
python benchmarks/host_time.py demo --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from subjects import Subject, subject

import cache_dit
from cache_dit.runtime.buffers import WeightMark

CALLS = 600


def remembering(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """An inner compiler whose programs run once."""
    known: list[Any] = []

    def run(*flat: Any) -> Any:
        if not known:
            known.append(gm(*flat))
        return known[0]

    return run


def measure(name: str, device: str = "cpu") -> dict[str, float]:
    """Medians of microseconds a call, plain and ours, computing and skipping, in turns; and what watching the weights takes."""
    measured = subject(name)
    measured.model.to(device)
    plain = torch.compile(copy.deepcopy(measured.model), backend=remembering)
    quiet: dict[str, Any] = {"forecast": "reuse", "noise_scale": 0.0, "correction": False, "inner": remembering}
    ours = {
        "computing": cache_dit.enable_cache(copy.deepcopy(measured.model), schedule="1", **quiet),
        "skipping": cache_dit.enable_cache(copy.deepcopy(measured.model), schedule="11" + "0" * 10 * CALLS, **quiet),
        "alternating": cache_dit.enable_cache(copy.deepcopy(measured.model), schedule="10" * 10 * CALLS, **quiet),
    }
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


def _in_turns(measured: Subject, calls: dict[str, Callable[..., Any]], device: str, first: int = 0) -> dict[str, float]:
    """Medians of microseconds of each of the calls, which take turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    with torch.no_grad():
        for step in range(first, first + CALLS):
            inputs = measured.inputs(step)
            given = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
            # who comes first finds the inputs' memory cold
            order = list(calls)[step % len(calls) :] + list(calls)[: step % len(calls)]
            for kind in order:
                call = calls[kind]
                start = time.perf_counter()
                call(**given)
                seconds[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values[20:]) * 1e6 for kind, values in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.subject, arguments.device)))
