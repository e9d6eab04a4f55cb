"""Measure what caching costs where it does not hit, and how close a skipped step comes to what has to run anyway.

    python benchmarks/run.py                      # both models, all measures
    python benchmarks/run.py --models demo --steps 20 --no-compile-times

Every measure is a ratio of medians over interleaved calls (A B C D A B C D …) in one process, so that a machine whose
speed drifts disturbs all of them alike. Compile times are whole processes, each with a cache folder of its own (cold) and
once more with the same folder (warm). Results go to out/bench as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from subjects import SUBJECTS, Subject

import cache_dit

NEVER = "1"
ALWAYS = "11" + "0" * 100_000


def main() -> None:
    """Run the measures that the command line asks for."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.compile_only:
        print(json.dumps(_compile_once(SUBJECTS[arguments.models[0]](), arguments.compile_only)))
        return
    results: dict[str, Any] = {"machine": _machine(arguments), "models": {}}
    for name in arguments.models:
        subject = SUBJECTS[name]()
        print(f"\n{subject.name}", flush=True)
        measured = _steps(subject, arguments)
        if arguments.compile_times:
            measured["compile"] = _compile_times(name, arguments)
        results["models"][subject.name] = measured
    _write(results, Path(arguments.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--steps", type=int, default=40, help="timed calls of each subject")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--out", default="out/bench")
    parser.add_argument("--no-compile-times", dest="compile_times", action="store_false")
    parser.add_argument("--compile-only", choices=["plain", "cached"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "inner": arguments.inner,
        "steps": arguments.steps,
    }


def _variants(subject: Subject, inner: str) -> dict[str, torch.nn.Module]:
    """Copies of one model, each compiled in its own way."""
    plain = copy.deepcopy(subject.model)
    plain.compile(backend=inner)
    floor = subject.floor()
    floor.compile(backend=inner)
    quiet = {"inner": inner, "noise_scale": 0.0}
    options: dict[str, dict[str, Any]] = {
        "never": {**quiet, "schedule": NEVER},
        "reuse": {**quiet, "schedule": ALWAYS, "forecast": "reuse"},
        "line": {**quiet, "schedule": ALWAYS, "forecast": "lagrange"},
        "noisy": {"inner": inner, "schedule": ALWAYS},
    }
    cached = {name: cache_dit.enable_cache(copy.deepcopy(subject.model), **given) for name, given in options.items()}
    return {"plain": plain, "floor": floor, **cached}


def _steps(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    variants = _variants(subject, arguments.inner)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for name, model in variants.items():
            start = time.perf_counter()
            for step in range(4):
                model(**subject.inputs(step))
            print(f"  {name}: compiled and warm after {time.perf_counter() - start:.1f} s", flush=True)
        for step in range(4, 4 + arguments.steps):
            for name, model in variants.items():
                given = subject.inputs(step)
                start = time.perf_counter()
                model(**given)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    _check_hits(variants, arguments.steps)
    ratios = {
        "never hitting / plain": medians["never"] / medians["plain"],
        "skipped step (reuse) / floor": medians["reuse"] / medians["floor"],
        "skipped step (line through 2) / floor": medians["line"] / medians["floor"],
        "skipped step (defaults, with noise) / floor": medians["noisy"] / medians["floor"],
        "skipped step (reuse) / plain": medians["reuse"] / medians["plain"],
        "floor / plain": medians["floor"] / medians["plain"],
    }
    spread = {name: statistics.quantiles(values, n=10) for name, values in seconds.items()}
    for name, value in medians.items():
        low, high = spread[name][0], spread[name][-1]
        print(f"  {name:8s} {value * 1e3:9.3f} ms  (10 % to 90 %: {low * 1e3:.3f} to {high * 1e3:.3f})")
    for name, value in ratios.items():
        print(f"  {name:45s} {value:6.3f}")
    return {"median_seconds": medians, "ratios": ratios, "deciles": spread}


def _check_hits(variants: dict[str, torch.nn.Module], steps: int) -> None:
    """A subject that did not do what its name says would make the table a lie."""
    for name, model in variants.items():
        if name in ("plain", "floor"):
            continue
        hits = cache_dit.get_stats(model).hits
        wanted = 0 if name == "never" else steps
        if (hits > 0) if name == "never" else (hits < wanted):
            raise SystemExit(f"{name}: {hits} hits in {steps} timed calls\n{cache_dit.explain(model)}")


def _compile_once(subject: Subject, kind: str) -> dict[str, float]:
    """Seconds of the first calls in this process: plain, or ours up to the first skipped step."""
    model = subject.model
    if kind == "plain":
        model.compile()
    else:
        cache_dit.enable_cache(model, schedule="110")
    start = time.perf_counter()
    with torch.no_grad():
        for step in range(3):
            model(**subject.inputs(step))
    return {"seconds": time.perf_counter() - start}


def _compile_times(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("plain", "cached"):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                found[f"{kind} {state}"] = _in_fresh_process(name, kind, folder, arguments)
                print(f"  compile {kind} {state}: {found[f'{kind} {state}']:.1f} s", flush=True)
    found["cached / plain, cold"] = found["cached cold"] / found["plain cold"]
    found["cached / plain, warm"] = found["cached warm"] / found["plain warm"]
    return found


def _in_fresh_process(name: str, kind: str, folder: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--models", name, "--compile-only", kind, "--threads", str(arguments.threads)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def _write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    table = _markdown(results)
    (folder / "results.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten to {folder}")


def _markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"torch {machine['torch']}, {machine['cpus']} CPUs, {machine['threads']} threads, inner compiler "
        f"{machine['inner']}, medians of {machine['steps']} interleaved calls",
        "",
        "| measure | " + " | ".join(results["models"]) + " |",
        "|---|" + "---|" * len(results["models"]),
    ]
    for title, read in _rows(next(iter(results["models"].values()))):
        lines.append(f"| {title} | " + " | ".join(read(model) for model in results["models"].values()) + " |")
    return "\n".join(lines) + "\n"


def _rows(example: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = []
    for name in example["median_seconds"]:
        rows.append((f"{name}, ms", lambda model, name=name: f"{model['median_seconds'][name] * 1e3:.2f}"))
    for name in example["ratios"]:
        rows.append((name, lambda model, name=name: f"{model['ratios'][name]:.3f}"))
    for name in example.get("compile", {}):
        unit = "" if "/" in name else " s"
        rows.append((f"compile: {name}", lambda model, name=name, unit=unit: f"{model['compile'][name]:.2f}{unit}"))
    return rows


if __name__ == "__main__":
    main()
