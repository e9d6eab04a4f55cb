"""The measured cells as JSON, Markdown tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rules import RULES, SHIPPED
from sampling import SAMPLES_OF_LENGTHS, Setting
from torch import Tensor

Line = dict[str, Any]
_COLOURS = {"published": "tab:gray", "parts": "tab:blue", "ours": "tab:red", "no cache": "tab:green", "peer": "tab:orange"}


def write_report(
    out: Path,
    lines: Sequence[Line],
    titles: Mapping[str, str],
    sigmas: Callable[[int, float], list[float]],
    strips: Mapping[str, Mapping[str, Sequence[Tensor]]],
) -> None:
    """Write results.json, results.md, a plot of PSNR over the computed share for each bed and setting, and the strips."""
    (out / "results.json").write_text(json.dumps(list(lines), indent=1), encoding="utf-8")
    table = markdown(lines, titles)
    (out / "results.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten to {out}")
    _plot(out, lines, titles)
    for bed, states in strips.items():
        if states:
            _write_strip(out / f"strip_{bed}.png", states)


def markdown(lines: Sequence[Line], titles: Mapping[str, str]) -> str:
    """A table of PSNR for each bed and setting that has all rules; one of the varied factors; one of the other measures."""
    parts = []
    for bed in dict.fromkeys(line["bed"] for line in lines):
        whole = [line for line in lines if line["bed"] == bed]
        of_bed = [line for line in whole if _setting(line).samples != SAMPLES_OF_LENGTHS]
        parts.append(f"### {titles[bed]}\n")
        settings = list(dict.fromkeys(_setting(line) for line in of_bed))
        wide = [s for s in settings if len({line["rule"] for line in of_bed if _setting(line) == s}) > 4]
        parts.append(_psnr_table(of_bed, wide))
        parts.append(_shipped_table(of_bed, settings))
        rest = [s for s in settings if s not in wide]
        if rest:
            parts.append(_factor_table(of_bed, rest))
        parts.append(_measures_table(of_bed, wide[:1]))
        parts.append(_lengths_table([line for line in whole if _setting(line).samples == SAMPLES_OF_LENGTHS]))
    return "\n".join(parts)


def _setting(line: Line) -> Setting:
    return Setting(**line["setting"])


def _cell(lines: Sequence[Line], setting: Setting, rule: str, ratio: float) -> Line | None:
    found = [li for li in lines if li["rule"] == rule and li["ratio"] == ratio and _setting(li) == setting]
    return found[-1] if found else None


def _shown(lines: Sequence[Line], setting: Setting, rule: str, measure: str = "psnr", digits: int = 1) -> str:
    ratios = sorted({line["ratio"] for line in lines if _setting(line) == setting and 1.0 < line["ratio"] <= 4.0})
    found = [_cell(lines, setting, rule, ratio) for ratio in ratios]
    if not any(found):
        return ""
    return " / ".join("-" if line is None else f"{line[measure]:.{digits}f}{_off(line)}" for line in found)


def _off(line: Line) -> str:
    """A mark where not the wanted number of steps computed, as by a threshold that cannot be brought to it: how many did."""
    return "" if line["computed"] == round(line["steps"] / line["ratio"]) else f" ({line['computed']})"


def _psnr_table(lines: Sequence[Line], settings: Sequence[Setting]) -> str:
    rows = ["PSNR in dB at 2x / 3x / 4x fewer block computations:\n"]
    rows.append("| rule | " + " | ".join(setting.key() for setting in settings) + " |")
    rows.append("|---|" + "---|" * len(settings))
    for rule in RULES:
        if rule.name == SHIPPED:
            continue
        cells = [_shown(lines, setting, rule.name) for setting in settings]
        if any(cells):
            rows.append(f"| {rule.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _shipped_table(lines: Sequence[Line], settings: Sequence[Setting]) -> str:
    """The other library with its own defaults, and the default rule beside it at as many block calls."""
    rows = []
    for setting in settings:
        found = _cell(lines, setting, SHIPPED, 1.0)
        if found is None:
            continue
        ours = found["at_equal_work"]
        rows.append(
            f"- {setting.key()}: DBCache with TaylorSeer as it ships computes {found['computed']} of {found['steps']} steps, "
            f"{found['work']:.2f} of all block calls, {found['psnr']:.1f} dB; "
            f"adaptive at {ours['work']:.2f}: {ours['psnr']:.1f} dB"
        )
    return "\n".join(rows) + "\n"


def _factor_table(lines: Sequence[Line], settings: Sequence[Setting]) -> str:
    names = [rule for rule in RULES if rule.name != SHIPPED and any(_shown(lines, setting, rule.name) for setting in settings)]
    rows = ["One factor at a time:\n", "| setting | " + " | ".join(rule.title for rule in names) + " |"]
    rows.append("|---|" + "---|" * len(names))
    for setting in settings:
        rows.append(f"| {setting.key()} | " + " | ".join(_shown(lines, setting, rule.name) for rule in names) + " |")
    return "\n".join(rows) + "\n"


def _lengths_table(lines: Sequence[Line]) -> str:
    """The mean PSNR over runs of all the lengths that have been measured."""
    if not lines:
        return ""
    shifts = sorted({_setting(line).shift for line in lines}, reverse=True)
    settings = {shift: sorted({s for s in map(_setting, lines) if s.shift == shift}, key=lambda s: s.steps) for shift in shifts}
    lengths = ", ".join(str(setting.steps) for setting in settings[shifts[0]])
    rows = [f"Means over runs of {lengths} steps, PSNR in dB at 2x / 3x / 4x:\n"]
    rows.append("| rule | " + " | ".join("linear" if shift == 1.0 else f"shift {shift:g}" for shift in shifts) + " |")
    rows.append("|---|" + "---|" * len(shifts))
    for rule in RULES:
        shown = []
        for shift in shifts:
            means = []
            for ratio in sorted({line["ratio"] for line in lines}):
                found = [_cell(lines, setting, rule.name, ratio) for setting in settings[shift]]
                whole = [line["psnr"] for line in found if line is not None]
                means.append(f"{sum(whole) / len(whole):.1f}" if len(whole) == len(found) else "-")
            shown.append(" / ".join(means))
        if any(set(each) - set("- /") for each in shown):
            rows.append(f"| {rule.title} | " + " | ".join(shown) + " |")
    return "\n".join(rows) + "\n"


def _measures_table(lines: Sequence[Line], settings: Sequence[Setting]) -> str:
    rows = []
    for setting in settings:
        rows += [f"Other measures, {setting.key()}:\n", "| rule | perceptual | Fréchet | class accuracy |", "|---|---|---|---|"]
        for rule in RULES:
            cells = [
                _shown(lines, setting, rule.name, name, digits)
                for name, digits in (("perceptual", 4), ("frechet", 1), ("accuracy", 2))
            ]
            if any(cells):
                rows.append(f"| {rule.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _plot(out: Path, lines: Sequence[Line], titles: Mapping[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for bed in dict.fromkeys(line["bed"] for line in lines):
        settings = list(dict.fromkeys(_setting(line) for line in lines if line["bed"] == bed))
        for number, setting in enumerate(settings[:2]):
            figure, axes = plt.subplots(figsize=(8, 6))
            for rule in RULES:
                points = sorted(
                    (line["computed"] / line["steps"], line["psnr"])
                    for line in lines
                    if line["bed"] == bed and _setting(line) == setting and line["rule"] == rule.name
                )
                if points:
                    x, y = zip(*points, strict=True)
                    bold = 2.5 if rule.group == "ours" else 1.0
                    axes.plot(x, y, marker="o", label=rule.title, linewidth=bold, alpha=0.9 if bold > 1 else 0.6)
            axes.set_xlabel("computed share of the steps")
            axes.set_ylabel("PSNR against the uncached run, dB")
            axes.set_title(f"{titles[bed]}: {setting.key()}")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6, ncol=2)
            figure.tight_layout()
            figure.savefig(out / f"psnr_{bed}_{number}.png", dpi=110)
            plt.close(figure)


def _write_strip(path: Path, states: Mapping[str, Sequence[Tensor]], columns: int = 10, zoom: int = 3) -> None:
    """One row for each way of sampling: the first picture at evenly spaced steps along its run."""
    from PIL import Image

    rows = []
    for along in states.values():
        picked = [along[round(k * (len(along) - 1) / (columns - 1))] for k in range(columns)]
        rows.append(torch.cat([image[0, 0] for image in picked], dim=1))
    sheet = ((torch.cat(rows) + 1) / 2).clamp(0, 1)
    pixels = (sheet * 255).round().byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(pixels.numpy()).save(path)
