"""From a fresh process to the first skipped step: compiled with empty caches, with torch's caches filled, and from an artifact.

    python benchmarks/startup.py --repeat 3

Each figure is a process of its own that imports what it needs, gets the demo model ready and makes three calls (computed,
computed, skipped) with 20 samples. The artifact is exported once before. The three kinds take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("compiled, caches empty", "compiled, caches filled", "artifact")
SAMPLES, STEPS = 20, 3
OPTIONS: dict[str, Any] = {"schedule": "110", "forecast": "reuse", "noise_scale": 0.0}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(_once(arguments.once, arguments.file)))
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.pt2"
        seconds = _export(file)
        for _ in range(arguments.repeat):
            with tempfile.TemporaryDirectory() as cache:
                for kind in KINDS:
                    found[kind].append(_process(kind, file, cache))
                    print(f"{kind}: {found[kind][-1]}", flush=True)
        size = file.stat().st_size
    print(f"\nThe file has {size / 1e6:.1f} MB; exporting it took {seconds:.0f} s, once.\n")
    print("| start | ready to be called, s | three calls, s | process, s |\n|---|---|---|---|")
    for kind, values in found.items():
        cells = [statistics.median(value[name] for value in values) for name in ("ready", "calls", "process")]
        print(f"| {kind} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def _process(kind: str, file: Path, cache: str) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--once", kind, "--file", str(file)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - start}


def _once(kind: str, file: str) -> dict[str, float]:
    start = time.perf_counter()
    import torch

    import cache_dit

    torch.set_num_threads(1)
    model = cache_dit.load(file) if kind == "artifact" else cache_dit.enable_cache(_demo(), **OPTIONS)
    ready = time.perf_counter()
    with torch.no_grad():
        for step in range(STEPS):
            model(**_inputs(step))
    calls = time.perf_counter()
    if cache_dit.get_stats(model).hits != OPTIONS["schedule"].count("0"):
        raise SystemExit(f"{kind}: nothing was skipped")
    return {"ready": ready - start, "calls": calls - ready}


def _export(file: Path) -> float:
    import torch

    import cache_dit

    start = time.perf_counter()
    with torch.no_grad():
        cache_dit.export(_demo(), _inputs(0), file, **OPTIONS)
    return time.perf_counter() - start


def _demo() -> Any:
    sys.path.append(str(ROOT / "examples"))
    from demo_model import load_model

    return load_model()


def _inputs(step: int) -> dict[str, Any]:
    import torch

    noise = torch.randn(SAMPLES, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    return {
        "hidden_states": noise,
        "timestep": torch.full((SAMPLES,), 1000.0 - step),
        "class_labels": torch.arange(SAMPLES) % 10,
    }


if __name__ == "__main__":
    main()
