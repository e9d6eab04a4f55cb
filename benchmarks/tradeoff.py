"""Speed against fidelity: whole runs of a trained model, timed in turns, and how far their pictures are from the uncached ones.

    python benchmarks/tradeoff.py            # ours, plain with fewer solver steps; the peer too, in its own environment
    python benchmarks/tradeoff.py --device cuda
    python benchmarks/tradeoff.py peer       # what the peers' environment runs: the other library beside plain

Each process compiles plain for itself and times it in turns with what is compared, so that only ratios leave it. 28 Euler
steps at shifted noise levels, eight samples of the demo's model, no guidance.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from beds import BEDS, Bed
from sampling import Sampler, Setting
from torch import Tensor

SETTING = Setting(samples=8)
RATIOS = (1.5, 2.0, 3.0, 4.0, 5.0)
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
ROUNDS = 7

Point = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way of making the pictures: the line of the plot it belongs to, what it was set to, and a whole run of it."""

    line: str
    what: str
    run: Callable[[], Tensor]


def bed_on(device: str) -> Bed:
    """The demo's model on a device, and asked there: timesteps are made on the CPU."""
    bed = BEDS["dit"]()

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def velocity(model: Any, images: Tensor, sigma: float, labels: Tensor) -> Tensor:
        def ask(*args: Any, **given: Any) -> Any:
            return model(*map(moved, args), **{name: moved(value) for name, value in given.items()})

        return bed.velocity(ask, images, sigma, labels)  # type: ignore[arg-type]

    return replace(bed, load=lambda: bed.load().to(device), velocity=velocity)


def sampler_on(device: str, setting: Setting, cached: bool = False) -> Sampler:
    """Samples on a device, from the noise that every device gets."""
    sampler = Sampler(bed_on(device), setting, cached)
    sampler.noise, sampler.labels = sampler.noise.to(device), sampler.labels.to(device)
    return sampler


def fewer_steps(model: torch.nn.Module, device: str) -> list[Way]:
    """Plain, with as many solver steps as the cache computes."""
    title = "fewer solver steps (Adams-Bashforth 2)"
    counts = [round(SETTING.steps / ratio) for ratio in RATIOS]
    samplers = [sampler_on(device, replace(SETTING, steps=count, solver="ab2")) for count in counts]
    return [Way(title, f"{each.setting.steps} steps", lambda each=each: each.run(model)) for each in samplers]  # type: ignore[misc]


def ours(inner: str, device: str) -> list[Way]:
    """The default rule at each ratio, and the best known rule by this library's programs."""
    from rules import BY_NAME

    import cache_dit

    ways = []
    for name, title in (("adaptive", "cache_dit, adaptive"), ("taylor2", "cache_dit, TaylorSeer 2")):
        for ratio in RATIOS:
            model = bed_on(device).load()
            options = BY_NAME[name].options(SETTING, round(SETTING.steps / ratio))
            cache_dit.enable_cache(model, inner=inner, noise_scale=0.0, **options)
            sampler = sampler_on(device, SETTING, cached=True)
            ways.append(Way(title, f"{ratio:g}x", lambda sampler=sampler, model=model: sampler.run(model)))  # type: ignore[misc]
    return ways


def peers(inner: str, device: str) -> list[Way]:
    """The other library's DBCache with TaylorSeer: as it ships, and with one front block at several thresholds."""
    import cache_dit as peer
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig  # type: ignore[attr-defined]

    small = {"Fn_compute_blocks": 1, "max_warmup_steps": 1}
    given: list[tuple[str, dict[str, Any]]] = [("as it ships", {})]
    given += [(f"threshold {value:g}", {**small, "residual_diff_threshold": value}) for value in THRESHOLDS]
    ways = []
    for what, options in given:
        model: Any = bed_on(device).load()
        config = DBCacheConfig(num_inference_steps=SETTING.steps, **options)
        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=1)
        peer.enable_cache(model, cache_config=config, calibrator_config=calibrator)  # type: ignore[call-arg]
        compiled, sampler = torch.compile(model, backend=inner), sampler_on(device, SETTING)
        ways.append(Way("DBCache, TaylorSeer 1", what, lambda sampler=sampler, compiled=compiled: sampler.run(compiled)))  # type: ignore[misc]
    return ways


def measure(who: str, inner: str = "inductor", rounds: int = ROUNDS, device: str = "cpu") -> list[Point]:
    """Time every way's whole run in turns with plain's; the first runs compile and are not counted."""
    plain = torch.compile(bed_on(device).load(), backend=inner)
    sampler = sampler_on(device, SETTING)
    ways = [Way("plain", f"{SETTING.steps} steps", lambda: sampler.run(plain))]
    ways += peers(inner, device) if who == "peer" else [*fewer_steps(plain, device), *ours(inner, device)]
    pictures = [way.run().cpu() for way in ways]
    for way in ways:
        way.run()
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, taken in zip(ways, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            way.run()
            _wait(device)
            taken.append(time.perf_counter() - start)
    whole = statistics.median(seconds[0])
    return [
        {"line": way.line, "what": way.what, "time": statistics.median(taken) / whole, "psnr": _psnr(picture, pictures[0])}
        for way, taken, picture in zip(ways, seconds, pictures, strict=True)
    ]


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _psnr(images: Tensor, reference: Tensor) -> float | None:
    from judge import psnr

    return None if images is reference else psnr(images, reference)


def table(points: list[Point]) -> list[str]:
    """One row a way: a run's time as a share of plain's, and PSNR against plain's pictures."""
    lines = ["| way | set to | time / plain | PSNR, dB |", "|---|---|---|---|"]
    for point in points:
        psnr = "–" if point["psnr"] is None else f"{point['psnr']:.1f}"
        lines.append(f"| {point['line']} | {point['what']} | {point['time']:.3f} | {psnr} |")
    return lines


def by_line(points: list[Point]) -> Mapping[str, list[Point]]:
    """The points of each line, in the order of their time; without plain, which has no distance."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        if point["psnr"] is not None:
            lines.setdefault(point["line"], []).append(point)
    return {name: sorted(each, key=lambda point: point["time"]) for name, each in lines.items()}


def measured(with_peers: bool, options: Sequence[str] = ()) -> list[Point]:
    """All points: ours from a process of its own, and the peer's from one in its environment. ``options``: of the command."""
    from processes import FOLDER, own_python, peers_python

    points: list[Point] = []
    for who, python in (("ours", own_python), ("peer", peers_python))[: 2 if with_peers else 1]:
        command = [str(python()), str(FOLDER / "tradeoff.py"), who, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        points += found if not points else [point for point in found if point["line"] != "plain"]
    return points


def main() -> None:
    """Measure in this process and print JSON; without a word in all of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", nargs="?", choices=("ours", "peer"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.who is None:
        options = ["--threads", str(given.threads), "--inner", given.inner, "--device", given.device]
        print("\n".join(table(measured(with_peers=True, options=options))))
        return
    torch.set_num_threads(given.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    print(json.dumps(measure(given.who, given.inner, device=given.device)))


if __name__ == "__main__":
    main()
