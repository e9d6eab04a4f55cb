"""One model in one process, ready to be asked for steps: lines of JSON in, lines of JSON out.

The first line that it writes tells how long its first calls took (which compile; getting ready counts as part of the first,
since some variants import the compiler then and others in it) and how far its results are from the eager
model's; after that ``{"step": 30}`` runs a step and answers with its seconds, ``{"facts": true}`` tells what was compiled and
cached. Processes of different environments can so be asked in turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from subjects import Subject, subject
from torch.profiler import ProfilerActivity, profile
from variants import VARIANTS, Options, Prepared

# the steps whose results are compared with the eager model's; the first three of them compile
COMPARED = 6
COMPILING = 3


def main() -> None:
    """Prepare the variant that the command line names and answer until the input ends."""
    options, arguments = _arguments()
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        for line in _answers(options, arguments):
            print(json.dumps(line), file=answers, flush=True)


def _answers(options: Options, arguments: argparse.Namespace) -> Any:
    measured = subject(arguments.subject)
    measured.model.to(options.device)
    steps = [_level(i, options) for i in range(COMPARED)]
    wanted = [_tensor(measured.model(**_moved(measured.inputs(step), options))).double() for step in steps]
    torch._dynamo.utils.counters.clear()
    try:
        start = time.perf_counter()
        prepared = VARIANTS[arguments.variant].prepare(measured, options)
        prepared.begin()
        ready = time.perf_counter() - start
        if arguments.dynamic and measured.grown:  # a second size makes the sizes dynamic
            _call(prepared, _moved(measured.grown(0), options), options)
            prepared.begin()
        calls = [_call(prepared, _moved(measured.inputs(step), options), options) for step in steps]
    except Exception as error:
        told = str(error).strip().splitlines() or [""]
        yield {"failed": f"{type(error).__name__}: {told[0][:300]}"}
        return
    errors = [_error(out, right) for (_, out), right in zip(calls, wanted, strict=True)]
    first = [seconds for seconds, _ in calls[:COMPILING]]
    yield {"first_calls": [ready + first[0], *first[1:]], "errors": errors}
    begun = COMPARED
    for line in sys.stdin:
        asked = json.loads(line)
        if "facts" in asked:
            counters = torch._dynamo.utils.counters
            yield {
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
                "peak_bytes": _peak(options),
                "step_bytes": max(
                    memory_of_a_step(partial(_step, prepared, measured, options, begun + i), options) for i in (0, 1)
                ),
                **prepared.facts(),
            }
            continue
        place = begun % options.run_length
        begun += 1
        given = _moved(measured.inputs(_level(place, options)), options)
        start = time.perf_counter()
        if place == 0:
            prepared.begin()
        seconds, _ = _call(prepared, given, options)
        yield {"seconds": time.perf_counter() - start if place == 0 else seconds, "place": place}


def _call(prepared: Prepared, inputs: dict[str, Any], options: Options) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    with prepared.around():
        out = _tensor(prepared.call(**inputs))
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def _step(prepared: Prepared, measured: Subject, options: Options, number: int) -> None:
    if number % options.run_length == 0:
        prepared.begin()
    _call(prepared, _moved(measured.inputs(_level(number % options.run_length, options)), options), options)


def memory_of_a_step(step: Callable[[], Any], options: Options) -> int:
    """The most bytes of tensors that are held at one time within a step, beyond those held before it."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))


def _tensor(result: Any) -> torch.Tensor:
    first = result[0]
    return first if isinstance(first, torch.Tensor) else first[0]


def _error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted).abs().max() / wanted.abs().max())


def _level(place: int, options: Options) -> int:
    return round(1000 * place / options.run_length)


def _moved(inputs: dict[str, Any], options: Options) -> dict[str, Any]:
    return {name: value.to(options.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _peak(options: Options) -> int:
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run-length", type=int, default=28)
    parser.add_argument("--dynamic", action="store_true")
    given = parser.parse_args()
    return Options(given.inner, given.run_length, given.device), given


if __name__ == "__main__":
    main()
