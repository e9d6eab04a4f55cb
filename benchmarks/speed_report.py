"""Tables and plots of what `run.py` measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tradeoff
from subjects import subject

# a step whose result is farther from the eager model's is a skipped one; rounding stays far below
SKIPPED = 1e-4
Found = Mapping[str, Any]


def marks(found: Found) -> str:
    """What the compared steps did, as 1 (computed) and 0 (skipped), read off their results."""
    return "".join("0" if error > SKIPPED else "1" for error in found["errors"])


def kinds(found: Found) -> dict[str, list[float]]:
    """Seconds of the computed and of the skipped steps, where they can be told apart.

    Ours skip at odd places of a run. Others may change turns from run to run, so theirs are told by their time: a step is
    computed where it takes longer than halfway between the first and the last decile.
    """
    seen, steps = marks(found), found["steps"]
    if set(seen) == {"1"}:
        return {"computed": [each["seconds"] for each in steps]}
    if seen == "1" + "0" * (len(seen) - 1):
        return {"skipped": [each["seconds"] for each in steps]}
    if seen != "10" * (len(seen) // 2):
        return {}
    if "lowering" in found:
        is_computed = [each["place"] % 2 == 0 for each in steps]
    else:
        deciles = statistics.quantiles((each["seconds"] for each in steps), n=10)
        is_computed = [2 * each["seconds"] > deciles[0] + deciles[-1] for each in steps]
    both = list(zip(steps, is_computed, strict=True))
    return {
        "computed": [each["seconds"] for each, computed in both if computed],
        "skipped": [each["seconds"] for each, computed in both if not computed],
    }


def medians(found: Found) -> dict[str, float]:
    """Median seconds of computed and of skipped steps, where they can be told apart, and the mean of all."""
    mean = statistics.fmean(each["seconds"] for each in found["steps"])
    return {"all": mean} | {kind: statistics.median(seconds) for kind, seconds in kinds(found).items()}


def spread(found: Found) -> str:
    """The first and the last decile of the computed steps, in milliseconds."""
    deciles = statistics.quantiles(kinds(found)["computed"], n=10)
    return f"{deciles[0] * 1e3:.2f} to {deciles[-1] * 1e3:.2f}"


def _ratio(value: float | None, by: float | None) -> str:
    return "–" if value is None or by is None else f"{value / by:.3f}"


def _saved(own: Mapping[str, float], best: float) -> str:
    """Of a computed and a skipped step, what the best possible pair takes."""
    pair = own["computed"] + own["skipped"] if {"computed", "skipped"} <= own.keys() else None
    return "–" if pair is None else _ratio(best, pair)


def steps_table(measured: Mapping[str, Found]) -> list[str]:
    """One row a variant."""
    plain = medians(measured["plain"])["computed"]
    # what must run also runs where blocks are left out: its own results differ from the model's
    floor = statistics.median(each["seconds"] for each in measured["floor"]["steps"])
    lines = [
        "| variant | graphs / breaks | steps | computed / plain | skipped / plain | skipped / floor | saved of what could be"
        " | computed ms (10 % to 90 %) | kept, MB | beyond, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        if "failed" in found:
            lines.append(f"| {name} | does not run: {found['failed'][:160]} |" + " |" * 8)
            continue
        if name == "floor":
            cells = ["", "", f"{floor / plain:.3f}", "1.000", "", f"{floor * 1e3:.2f}"]
        else:
            own = medians(found)
            computed, skipped = own.get("computed"), own.get("skipped")
            cells = [
                marks(found),
                _ratio(computed, plain),
                _ratio(skipped, plain),
                _ratio(skipped, floor),
                _saved(own, plain + floor),
                f"{computed * 1e3:.2f} ({spread(found)})" if computed is not None else f"all {own['all'] * 1e3:.2f}",
            ]
        kept = f"{found['cached_bytes'] / 1e6:.2f}" if "cached_bytes" in found else ""
        beyond = ""
        if name != "plain" and "step_bytes" in found:
            beyond = f"{(found['step_bytes'] - measured['plain']['step_bytes']) / 1e6:.2f}"
        lines.append(f"| {name} | {found['graphs']} / {found['breaks']} | " + " | ".join([*cells, kept, beyond]) + " |")
    return lines


def compile_table(measured: Mapping[str, Mapping[str, Found]]) -> list[str]:
    """One row a subject and state, one column a variant: seconds, and the ratio to plain."""
    names = list(dict.fromkeys(name for found in measured.values() for name in found))
    lines = ["| model | state | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for label, found in sorted(measured.items(), key=lambda each: _depth(each[0])):
        for state in ("cold", "warm"):
            plain = sum(found["plain"][state]["first_calls"])
            cells = []
            for name in names:
                if name not in found:
                    cells.append("not measured")
                    continue
                first = found[name][state]
                total = sum(first["first_calls"]) if "first_calls" in first else None
                cells.append("does not run" if total is None else f"{total:.1f} s ({total / plain:.2f})")
            lines.append(f"| {subject(label).title} | {state} | " + " | ".join(cells) + " |")
    return lines


def depth_table(measured: Mapping[str, Mapping[str, Found]]) -> list[str]:
    """The steps of models that are there for their depth, in each lowering: one row a model."""
    names = [name for name in next(iter(measured.values())) if name not in ("plain", "floor")]
    told = ("computed / plain", "skipped / plain", "saved of what could be")
    columns = [f"{name}, {what}" for what in told for name in names]
    lines = [f"| model | plain, ms | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for label, found in sorted(measured.items(), key=lambda each: _depth(each[0])):
        own = {name: {} if "failed" in found[name] else medians(found[name]) for name in names}
        plain = medians(found["plain"])["computed"]
        best = plain + statistics.median(each["seconds"] for each in found["floor"]["steps"])
        cells = [_ratio(own[name].get(kind), plain) for kind in ("computed", "skipped") for name in names]
        cells += [_saved(own[name], best) for name in names]
        lines.append(f"| {subject(label).title} | {plain * 1e3:.2f} | {' | '.join(cells)} |")
    return lines


def _depth(label: str) -> int:
    """The number of blocks in the name of a subject that is there for its depth; 0 for others."""
    return int(label.rpartition("-")[2]) if "-deep-" in label else 0


def _file_name(label: str) -> str:
    """A subject's name, which may be a shape, as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", label)


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """results.md and, where matplotlib is there, the plots into a folder."""
    machine = results["machine"]
    plots: list[Callable[[], None]] = []
    lines = [
        f"{machine['platform']}, {machine['device']}, {machine['cpus']} CPUs, {machine['threads']} threads, torch "
        f"{machine['torch']}, inner compiler {machine['inner']}; peers: {machine['peers']}, diffusers "
        f"{machine.get('diffusers', '')}. Medians of {machine['rounds']} steps in turns.",
        "",
    ]
    deep = {label: measured for label, measured in results["steps"].items() if _depth(label)}
    for label, measured in results["steps"].items():
        if label in deep:
            continue
        dynamic = ", sizes dynamic" if label.endswith("dynamic") else ""
        lines += [f"### {subject(label.split()[0]).title}{dynamic}", "", *steps_table(measured), ""]
        plots.append(partial(plot_run, measured, out / f"run-{_file_name(label)}.png", label))
    if results["compile"]:
        lines += ["### Seconds of the first three calls (ratio to plain)", ""]
        lines += [*compile_table(results["compile"]), ""]
        plots.append(partial(plot_depth, results["compile"], out / "compile-depth.png"))
    if deep:
        lines += ["### Steps over the number of blocks", "", *depth_table(deep), ""]
    for points in results["tradeoff"].values():
        lines += ["### Speed against fidelity: whole runs of the demo model", "", *tradeoff.table(points), ""]
        plots.append(partial(plot_tradeoff, points, out / "speed-fidelity.png"))
    for label, measured in results["host"].items():
        added = ", ".join(f"{name} {value:.0f} µs" for name, value in measured.items() if name.endswith("adds"))
        title = subject(label).title
        weights = f"; of that, comparing the weights takes {measured['comparing the weights takes']:.0f} µs"
        told = f"plain {measured['plain']:.0f} µs; {added}{weights}"
        lines += [f"### Host time a call, without kernels: {title}", "", told, ""]
    (out / "results.md").write_text("\n".join(lines), encoding="utf-8")
    if plots and find_spec("matplotlib") is None:
        print("no plots: they need matplotlib; with it the same command draws them from what was measured", flush=True)
        return
    for plot in plots:
        plot()


def plot_run(measured: Mapping[str, Found], file: Path, title: str) -> None:
    """Milliseconds of each step along one run, one line a variant that skips or is a measure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    shown = ("plain", "floor", "specialize", "pieces", "adaptive", "diffusers TaylorSeerCache", "DBCache")
    for name in shown:
        found = measured.get(name, {})
        if "steps" not in found:
            continue
        run = _one_run(found["steps"])
        places, values = [each["place"] for each in run], [each["seconds"] * 1e3 for each in run]
        axes.plot(places, values, marker="o", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="step of the run", ylabel="milliseconds", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, file)


def _one_run(steps: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The first run that was measured from its first step; no medians over runs, since some change turns between them."""
    starts = [i for i, each in enumerate(steps) if each["place"] == 0]
    return steps[starts[0] : starts[1]] if len(starts) > 1 else steps[: len({each["place"] for each in steps})]


def plot_tradeoff(points: list[dict[str, Any]], file: Path) -> None:
    """PSNR over a run's time, one line for each way of saving it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, found in tradeoff.by_line(points).items():
        axes.plot([point["time"] for point in found], [point["psnr"] for point in found], marker="o", label=name)
    axes.set(xlabel="time of a run / plain compiled run", ylabel="PSNR against the uncached pictures, dB")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def plot_depth(measured: Mapping[str, Mapping[str, Found]], file: Path) -> None:
    """Seconds of the first calls over the number of blocks, cold and warm."""
    from matplotlib import pyplot

    measured = {label: measured[label] for label in sorted(measured, key=_depth) if _depth(label)}
    if not measured:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    depths = [_depth(label) for label in measured]
    for axes, state in zip(panels, ("cold", "warm"), strict=True):
        for name in dict.fromkeys(name for found in measured.values() for name in found):
            values: Sequence[float] = [
                sum(found.get(name, {}).get(state, {}).get("first_calls", [float("nan")])) for found in measured.values()
            ]
            axes.plot(depths, values, marker="o", label=name)
        axes.set(xlabel="blocks", ylabel="seconds of the first three calls", title=state)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
