"""Measure what each caching rule does to the pictures of two trained models, through `enable_cache` and its graphs.

    python benchmarks/quality.py                 # the named part: all rules and ratios at 28 shifted Euler steps, every
                                                 # other factor one at a time for the three best
    python benchmarks/quality.py --lengths       # runs of other lengths, for a mean that no one placement decides
    python benchmarks/quality.py --full          # the whole crossing of factors; resumable
    python benchmarks/quality.py --ci            # a slice of minutes
    python benchmarks/quality.py --report        # table and plots of what has been measured so far

A cell is one rule at one ratio in one setting of one model. Each is measured once and appended to OUT/cells.jsonl under a
key that holds the hashes of the checkpoint and of the rule's code: a later call measures what is missing. Models are
shared out over worker processes of one thread each. Distances are against the uncached run with the same noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beds import BEDS, Bed
from judge import judge
from processes import FOLDER, peers_python
from quality_report import write_report
from rules import BY_NAME, RULES, SHIPPED, Rule, computed_steps, digest
from sampling import SAMPLES_OF_LENGTHS, Sampler, Setting, labels_of, shifted_sigmas
from torch import Tensor

import cache_dit

MAIN = Setting()
RATIOS = (2.0, 3.0, 4.0)
BEYOND = (5.0, 7.0)
# Of the rules in the named part these are varied in every other factor: the default, its nearest rival, the best known rule.
BEST = ("adaptive", "sigma_line_retro", "taylor2")
SEARCHES = 7
# Where a step lies by chance is worth some decibels: the mean over runs of several lengths says more than any of them.
LENGTHS = (20, 24, 28, 32, 36)
# Measured first: what the default is compared with before anything else.
TELLING = ("adaptive", "taylor2", "teacache_taylor", "sigma_line_retro", "reuse", "first_block_taylor")
VARIED = (
    replace(MAIN, shift=1.0),
    replace(MAIN, steps=20),
    replace(MAIN, steps=50),
    replace(MAIN, guidance=2.0),
    replace(MAIN, guidance=2.0, separate=True),
    replace(MAIN, solver="heun"),
    replace(MAIN, solver="dpm++2m"),
    replace(MAIN, solver="sde"),
    replace(MAIN, solver="unipc"),
    replace(MAIN, known=False),
    replace(MAIN, seed=777),
)


@dataclass(frozen=True)
class Cell:
    """One rule at one ratio in one setting of one bed."""

    bed: str
    setting: Setting
    rule: str
    ratio: float

    def key(self, fingerprint: str) -> str:
        return json.dumps([self.bed, fingerprint, asdict(self.setting), self.rule, self.ratio, digest(self.rule)])


def planned(arguments: argparse.Namespace) -> list[Cell]:
    """The cells of the part asked for, those that matter most first."""
    if arguments.ci:
        small = replace(MAIN, samples=16)
        rules = ("reuse", "taylor2", "sigma_line", "adaptive_plain", "adaptive")
        return [Cell("dit", small, rule, 3.0) for rule in rules]
    beds = arguments.beds
    if arguments.lengths:
        few = replace(MAIN, samples=SAMPLES_OF_LENGTHS)
        runs = [replace(few, steps=steps, shift=shift) for shift in (3.0, 1.0) for steps in LENGTHS]
        return [Cell(b, s, rule, ratio) for s in runs for rule in (*BEST, "fewer") for ratio in RATIOS for b in beds]
    settings = (MAIN, replace(MAIN, shift=1.0))
    later = [rule.name for rule in RULES if rule.name not in TELLING and rule.name != SHIPPED]
    tiers = (TELLING, later)
    # the ratios of a rule together: its programs are compiled then, and what its search has found serves all of them
    named = [Cell(b, s, rule, ratio) for tier in tiers for s in settings for rule in tier for ratio in RATIOS for b in beds]
    named += [Cell(b, s, SHIPPED, 1.0) for s in settings for b in beds]
    if arguments.goals:
        return named
    named += [Cell(bed, MAIN, rule, ratio) for ratio in BEYOND for rule in BEST for bed in beds]
    named += [Cell(bed, s, rule, ratio) for s in VARIED for rule in BEST for ratio in RATIOS for bed in beds]
    if not arguments.full:
        return list(dict.fromkeys(named))
    factors = itertools.product(
        (28, 20, 50),
        (3.0, 1.0),
        ((1.0, False), (2.0, False), (2.0, True)),
        ("euler", "heun", "dpm++2m", "sde", "unipc"),
        RATIOS,
    )
    whole = [
        Cell(bed, replace(MAIN, steps=n, shift=shift, guidance=g, separate=apart, solver=solver), rule.name, ratio)
        for n, shift, (g, apart), solver, ratio in factors
        for rule in RULES
        if rule.name != SHIPPED
        for bed in beds
    ]
    return list(dict.fromkeys([*named, *whole]))


def asked(arguments: argparse.Namespace) -> list[Cell]:
    """The planned cells of the rules that were named, or of all."""
    return [cell for cell in planned(arguments) if not arguments.rules or cell.rule in arguments.rules]


class Runner:
    """Measures the cells of one bed in this process."""

    def __init__(self, bed: Bed, out: Path, inner: str) -> None:
        self.bed, self.out, self.inner = bed, out, inner
        self.model = bed.load()
        self.references: dict[Setting, Tensor] = {}
        # of each rule with a threshold, by setting: the thresholds tried, and what came of them
        self.curves: dict[tuple[str, Setting], dict[float, tuple[Tensor, dict[str, Any]]]] = {}

    def reference(self, setting: Setting) -> Tensor:
        """The uncached samples of a setting: those of the setting itself, whatever the cache is told of it."""
        setting = replace(setting, known=True)
        if setting not in self.references:
            self.references[setting] = Sampler(self.bed, setting).run(self.model)
        return self.references[setting]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything that is written down of a cell."""
        rule, setting = BY_NAME[cell.rule], cell.setting
        count = computed_steps(setting.steps, cell.ratio)
        started = time.perf_counter()
        if rule.fewer_steps:
            found: dict[str, Any] = {"computed": count, "steps": setting.steps}
            images = Sampler(self.bed, replace(setting, steps=count, solver="ab2")).run(self.model)
        elif rule.name == SHIPPED:
            images, found = self.shipped(setting)
        elif rule.threshold is None:
            images, found = self.cached(rule, setting, count, {})
        else:
            images, found = self.search(rule, setting, count)
        found["seconds"] = time.perf_counter() - started
        found.update(judge(images, self.reference(setting), labels_of(setting)).as_dict())
        return found

    def cached(self, rule: Rule, setting: Setting, count: int, more: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One sampling through the product, and what it counted."""
        if rule.peer:
            images, found = self.peer(setting, {**rule.options(setting, count), **more})
            return images, {**found, **more}
        options = {"inner": self.inner, "noise_scale": 0.0, "language": "en", "enable_stats": False}
        cache_dit.enable_cache(self.model, **{**options, **rule.options(setting, count), **more})
        try:
            images = Sampler(self.bed, setting, cached=True).run(self.model)
            stats = cache_dit.get_stats(self.model)
        finally:
            cache_dit.disable_cache(self.model)
        share = 1.0 - stats.hits / stats.calls
        return images, {"computed": round(share * stats.steps), "steps": stats.steps, **more}

    def peer(self, setting: Setting, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One sampling with the other library, in its environment."""
        path = self.out / f"peer_{self.bed.name}.npy"
        command = [
            peers_python(),
            FOLDER / "peer_sampling.py",
            self.bed.name,
            json.dumps(asdict(setting)),
            json.dumps(options),
            path,
        ]
        printed = subprocess.run(list(map(str, command)), env=_environment(), check=True, capture_output=True, text=True).stdout
        images = torch.from_numpy(np.load(path))
        path.unlink()
        return images, json.loads(printed.splitlines()[-1])

    def shipped(self, setting: Setting) -> tuple[Tensor, dict[str, Any]]:
        """The other library with its own defaults, and beside it the default rule at as many block calls."""
        images, found = self.peer(setting, BY_NAME[SHIPPED].options(setting, 0))
        # each step calls the front block, a computed one the others too
        count = round((found["work"] * found["blocks"] - 1) * setting.steps / (found["blocks"] - 1))
        ours, of_ours = self.cached(BY_NAME["adaptive"], setting, count, {})
        work = (of_ours["computed"] * (found["blocks"] - 1) + setting.steps) / (found["blocks"] * setting.steps)
        of_ours = {**of_ours, "work": work, "psnr": judge_psnr(ours, self.reference(setting))}
        return images, {**found, "at_equal_work": of_ours}

    def search(self, rule: Rule, setting: Setting, count: int) -> tuple[Tensor, dict[str, Any]]:
        """Halve the threshold's range (in its logarithm) until as many steps compute as wanted, or as nearly as it gets."""
        assert rule.threshold is not None
        known = self.curves.setdefault((rule.name, setting), {})
        wanted = count * (2 if setting.solver == "heun" else 1)

        def off(threshold: float) -> int:
            computed: int = known[threshold][1]["computed"]
            return computed - wanted

        for _ in range(SEARCHES):
            if any(off(tried) == 0 for tried in known):
                break
            low = max((tried for tried in known if off(tried) > 0), default=1e-3)
            high = min((tried for tried in known if off(tried) < 0), default=10.0)
            middle = (low * high) ** 0.5
            known[middle] = self.cached(rule, setting, count, {rule.threshold: middle})
        best = min(sorted(known), key=lambda tried: abs(off(tried)))
        reference = self.reference(setting)
        points = [[t, f["computed"] / f["steps"], judge_psnr(i, reference)] for t, (i, f) in sorted(known.items())]
        return known[best][0], {**known[best][1], "points": points}


def judge_psnr(images: Tensor, reference: Tensor) -> float:
    """PSNR alone, for the points of a threshold's curve."""
    from judge import psnr

    return psnr(images, reference)


def work(arguments: argparse.Namespace) -> None:
    """Measure one bed's missing cells, in the order of the plan, until the time is over."""
    torch.set_num_threads(1)
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    bed = BEDS[arguments.worker]()
    runner = Runner(bed, arguments.out, arguments.inner)
    fingerprint = bed.fingerprint()
    # settings together: an uncached run serves all rules of a setting, and shapes change as rarely as can be
    cells = [cell for cell in missing(arguments) if cell.bed == arguments.worker]
    with (arguments.out / f"cells_{arguments.worker}.jsonl").open("a", encoding="utf-8") as file:
        for cell in cells:
            if time.time() > arguments.until:
                return
            found = runner.measure(cell)
            line = {"key": cell.key(fingerprint), "bed": cell.bed, "setting": asdict(cell.setting), "rule": cell.rule}
            file.write(json.dumps({**line, "ratio": cell.ratio, **found}) + "\n")
            file.flush()
            words = f"{cell.bed}, {cell.setting.key()}: {cell.rule} at {cell.ratio:g}x"
            print(f"{words}: {found['psnr']:.2f} dB, {found['computed']} of {found['steps']}", flush=True)


def measured(out: Path) -> list[dict[str, Any]]:
    """Every cell that has been measured."""
    lines: list[dict[str, Any]] = []
    for path in sorted(out.glob("cells_*.jsonl")):
        lines.extend(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return lines


def is_current(line: dict[str, Any], fingerprint: str) -> bool:
    """Whether a cell was measured with the checkpoint and the rules that are there."""
    if line["rule"] not in BY_NAME:
        return False
    return line["key"] == Cell(line["bed"], Setting(**line["setting"]), line["rule"], line["ratio"]).key(fingerprint)


def missing(arguments: argparse.Namespace) -> list[Cell]:
    """The planned cells that have not been measured with the checkpoints that are there."""
    done = {line["key"] for line in measured(arguments.out)}
    marks = {name: BEDS[name]().fingerprint() for name in {cell.bed for cell in asked(arguments)}}
    return [cell for cell in asked(arguments) if cell.key(marks[cell.bed]) not in done]


def run_workers(arguments: argparse.Namespace) -> None:
    """A process for each bed, as many at a time as asked for."""
    arguments.until = time.time() + 60.0 * arguments.minutes
    waiting = list(dict.fromkeys(cell.bed for cell in missing(arguments)))
    running: list[subprocess.Popen[bytes]] = []
    failed = []
    while waiting or running:
        while waiting and len(running) < arguments.workers:
            running.append(subprocess.Popen(_worker_command(waiting.pop(0), arguments), env=_environment()))
        running[0].wait()
        failed += [process for process in running[:1] if process.returncode]
        running = running[1:]
    if failed:
        raise SystemExit(f"{len(failed)} worker(s) failed")


def _worker_command(bed: str, arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--worker", bed, "--until", str(arguments.until), "--out", str(arguments.out)]
    command += ["--inner", arguments.inner, "--beds", *arguments.beds]
    command += ["--rules", *arguments.rules]
    command += ["--ci"] * arguments.ci + ["--full"] * arguments.full
    return command + ["--goals"] * arguments.goals + ["--lengths"] * arguments.lengths


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def samples_along(bed: Bed, inner: str) -> Iterator[tuple[str, list[Tensor]]]:
    """The state along a run of ten digits at 4x: uncached, the best known rule, and the default."""
    setting = replace(MAIN, samples=10, guidance=2.0)
    model = bed.load()
    count = computed_steps(setting.steps, 4.0)
    for title, name in (("uncached", None), ("TaylorSeer 2", "taylor2"), ("adaptive", "adaptive")):
        states: list[Tensor] = []
        if name is not None:
            options = {"inner": inner, "noise_scale": 0.0, "language": "en"}
            cache_dit.enable_cache(model, **options, **BY_NAME[name].options(setting, count))

        def keep(step: int, x: Tensor, states: list[Tensor] = states) -> None:
            states.append(x.clone())

        Sampler(bed, setting, cached=name is not None).run(model, keep)
        if name is not None:
            cache_dit.disable_cache(model)
        yield title, states


def main() -> None:
    """Measure what is asked for and write the report."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        work(arguments)
        return
    if not arguments.report:
        run_workers(arguments)
    left = len(missing(arguments))
    marks = {name: BEDS[name]().fingerprint() for name in BEDS}
    current = [line for line in measured(arguments.out) if is_current(line, marks[line["bed"]])]
    torch.set_num_threads(1)
    strips = {} if arguments.ci else {name: dict(samples_along(BEDS[name](), arguments.inner)) for name in arguments.beds}
    write_report(arguments.out, current, {name: BEDS[name]().title for name in BEDS}, shifted_sigmas, strips)
    if left:
        print(f"{left} cells are left: the same command goes on with them")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole crossing of factors")
    parser.add_argument("--ci", action="store_true", help="a slice of a few minutes")
    parser.add_argument("--goals", action="store_true", help="28 Euler steps alone, shifted and linear")
    parser.add_argument("--lengths", action="store_true", help="20 to 36 Euler steps, shifted and linear, for a mean")
    parser.add_argument("--report", action="store_true", help="measure nothing, write table and plots")
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--rules", nargs="*", default=[], choices=sorted(BY_NAME), help="these rules alone")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long (default 28, --full: no end)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--inner", default="eager", help="inner compiler of the cached graphs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = 1e6 if arguments.full else 28.0
    if arguments.out is None:
        arguments.out = Path("out/quality-ci" if arguments.ci else "out/quality")
    return arguments


if __name__ == "__main__":
    main()
