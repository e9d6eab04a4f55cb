"""Measure speed: what caching costs where it does not hit, how near a skipped step comes to what has to run anyway, and how
long compiling takes, beside plain `torch.compile` and the peers.

    make bench                                            the named part, forty minutes: small subjects, one large one, depths
    make bench ARGS="--full"                              every variant of every subject, dynamic sizes, more depths: hours
    make bench ARGS="--subjects flux-small --no-peers"    one subject, ours alone
    make bench ARGS="--subjects wan:depth=8,heads=4 --depths"    another shape, else as wan-small; no depths
    make bench ARGS="--device cuda"                       on a GPU (peers included)

Every variant is a process of its own, asked for a step in turn (A B C D A B C D …), so that a machine whose speed drifts
disturbs all of them alike; torch's caches on disk are shared by the variants of a subject, so that a kernel that several have
is compiled once. How long compiling takes is measured apart: one process after another, each with an empty cache folder
(cold), then three more with the same folder, in turns (warm, of which the median). Results go to out/bench: results.json,
results.md and plots. It goes on where it was stopped; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tradeoff
from processes import FOLDER, Worker, own_python, peers_python
from speed_report import write_report
from subjects import SUBJECTS, maker
from variants import VARIANTS

# what is measured of each subject where no variants are named: all, or these
FEW = (
    "never hitting",
    "specialize",
    "pieces",
    "adaptive",
    "diffusers FirstBlockCache, never",
    "diffusers TaylorSeerCache",
    "DBCache",
)
NAMED: dict[str, tuple[str, ...]] = {
    "demo": tuple(VARIANTS),
    "flux-small": tuple(VARIANTS),
    "flux-large": FEW,
    "wan-small": FEW,
    "qwen-small": FEW,
    "sd3-small": FEW,
}
DEPTHS, ALL_DEPTHS = (8, 32), (8, 16, 24, 32, 64)
COMPILED = ("plain", "specialize", "pieces", "DBCache")
# the steps of deep models: what the lowerings differ in there
DEEP = ("specialize", "pieces")
# one full collection of Python's garbage more or less is a tenth of a warm start
WARM_STARTS = 3


def main() -> None:
    """Run the measures that the command line asks for, and write them after each."""
    arguments = _arguments()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, Any] = {"steps": {}, "compile": {}, "host": {}, "tradeoff": {}}
    if file.exists() and not arguments.fresh:
        results |= json.loads(file.read_text(encoding="utf-8"))
    machine = _machine(arguments)
    _check_same(results.get("machine", machine), machine, file)
    results["machine"] = machine
    for key, names, options in _parts(arguments):
        for name in names:
            label = f"{name}{' dynamic' if '--dynamic' in options else ''}"
            if label in results[key]:
                print(f"{label}: measured before", flush=True)
                continue
            print(f"\n{label}", flush=True)
            measure = {"steps": _steps, "compile": _compile, "host": _host, "tradeoff": _tradeoff}[key]
            results[key][label] = measure(name, arguments, options, out / "processes.log")
            file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_report(results, out)
    print(f"\n{(out / 'results.md').read_text(encoding='utf-8')}\nwritten to {out}")


def _parts(arguments: argparse.Namespace) -> list[tuple[str, list[str], list[str]]]:
    subjects = list(SUBJECTS if arguments.full else NAMED) if arguments.subjects is None else arguments.subjects
    depths = (ALL_DEPTHS if arguments.full else DEPTHS) if arguments.depths is None else arguments.depths
    demo = [name for name in subjects if name == "demo"]
    parts: list[tuple[str, list[str], list[str]]] = [("host", demo, []), ("steps", subjects, [])]
    if arguments.full:
        parts.append(("steps", [name for name in subjects if name != "demo"], ["--dynamic"]))
    parts += [("tradeoff", demo, []), ("compile", demo, [])]
    deep = [f"flux-deep-{depth}" for depth in depths]
    return [*parts, ("compile", deep, []), ("steps", deep, [])]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="*", type=_subject_name, help=f"of {', '.join(SUBJECTS)}, or a shape")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="plain and floor are always among them")
    parser.add_argument("--full", action="store_true", help="every subject, and dynamic sizes")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without the environment of the peers")
    parser.add_argument("--depths", nargs="*", type=int, help="numbers of blocks whose compilation is timed")
    parser.add_argument("--rounds", type=int, default=56, help="timed steps of each variant, a multiple of the run's length")
    parser.add_argument("--run-length", type=int, default=28)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="out/bench")
    return parser.parse_args()


def _subject_name(name: str) -> str:
    try:
        maker(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "inner": arguments.inner,
        "rounds": arguments.rounds,
        "diffusers": version("diffusers"),
        "peers": (FOLDER / "peers.txt").read_text(encoding="utf-8").splitlines()[-1] if arguments.peers else "none",
    }


def _check_same(before: dict[str, Any], now: dict[str, Any], file: Path) -> None:
    """One report has one heading: what was measured before must have been measured like this."""
    names = [name for name in ("device", "threads", "inner") if before.get(name) != now[name]]
    other = [f"{name} {before.get(name)}, now {now[name]}" for name in names]
    if other:
        raise SystemExit(f"{file} was measured with {'; '.join(other)}: give --fresh, or another --out")


def _options(arguments: argparse.Namespace) -> list[str]:
    names = ("threads", "inner", "device", "run_length")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]


def _chosen(subject: str, arguments: argparse.Namespace) -> list[str]:
    usual = DEEP if subject.startswith("flux-deep-") else VARIANTS if arguments.full else NAMED.get(subject, FEW)
    wanted = arguments.variants or usual
    return [
        name
        for name, variant in VARIANTS.items()
        if name in ("plain", "floor") or (name in wanted and (arguments.peers or not variant.peer))
    ]


def _python(variant: str) -> Path:
    return peers_python() if VARIANTS[variant].peer else own_python()


def _steps(subject: str, arguments: argparse.Namespace, options: list[str], log: Path) -> dict[str, Any]:
    """Every variant's steps in turns, and facts."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name in _chosen(subject, arguments):
            worker = stack.enter_context(Worker(subject, name, _python(name), folder, [*_options(arguments), *options], log))
            found[name] = dict(worker.first)
            if "failed" in worker.first:
                print(f"  {name}: {worker.first['failed']}", flush=True)
                continue
            workers[name] = worker
            print(f"  {name}: first calls {sum(worker.first['first_calls']):.1f} s", flush=True)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for number in range(arguments.rounds + 2):
            for name, worker in workers.items():
                answer = worker.ask({"step": number})
                if number >= 2:
                    seconds[name].append(answer)
        for name, worker in workers.items():
            found[name] |= {"steps": seconds[name], **worker.ask({"facts": True})}
            print(f"  {name}: {statistics.median(each['seconds'] for each in seconds[name]) * 1e3:.2f} ms", flush=True)
    return found


def _compile(subject: str, arguments: argparse.Namespace, options: list[str], log: Path) -> dict[str, Any]:
    """First calls with an empty cache folder, then in further processes with the same one, in turns: of these the median."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        folders = {
            name: stack.enter_context(tempfile.TemporaryDirectory())
            for name in COMPILED
            if arguments.peers or not VARIANTS[name].peer
        }

        def first_calls(name: str, state: str) -> dict[str, Any]:
            with Worker(subject, name, _python(name), folders[name], [*_options(arguments), *options], log) as worker:
                told = worker.first.get("failed") or f"{sum(worker.first['first_calls']):.1f} s"
                print(f"  {name}, {state}: {told}", flush=True)
                return dict(worker.first)

        for name in folders:
            found[name] = {"cold": first_calls(name, "cold")}
        running = [name for name in folders if "failed" not in found[name]["cold"]]
        warm: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(WARM_STARTS):
            for name in running:
                warm[name].append(first_calls(name, "warm"))
        for name in folders:
            starts = sorted(warm.get(name, []), key=lambda first: sum(first.get("first_calls", [0.0])))
            found[name]["warm"] = starts[len(starts) // 2] if starts else found[name]["cold"]
    return found


def _host(subject: str, arguments: argparse.Namespace, options: list[str], log: Path) -> dict[str, Any]:
    """What our runtime adds to a call, in a process of its own."""
    command = [sys.executable, str(FOLDER / "host_time.py"), subject, "--device", arguments.device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {found}", flush=True)
    return found


def _tradeoff(subject: str, arguments: argparse.Namespace, options: list[str], log: Path) -> list[dict[str, Any]]:
    """Whole runs of the trained model, and how far their pictures are from plain's."""
    options = ["--threads", str(arguments.threads), "--inner", arguments.inner, "--device", arguments.device]
    points = tradeoff.measured(with_peers=arguments.peers, options=options)
    for point in points:
        print(f"  {point['line']}, {point['what']}: {point['time']:.3f} of plain", flush=True)
    return points


if __name__ == "__main__":
    main()
