"""The bench of pictures: its plan, its distances, and that it goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")


@pytest.fixture
def quality(benchmarks: None) -> ModuleType:
    """benchmarks/quality.py as a module."""
    import quality

    return quality


def asked(out: Path, **more: object) -> argparse.Namespace:
    known = {"full": False, "ci": False, "goals": False, "lengths": False, "beds": ["dit", "flux"], "rules": [], "out": out}
    return argparse.Namespace(**{**known, **more})


def test_the_plan_has_each_rule_at_each_ratio_and_each_cell_once(quality: ModuleType, tmp_path: Path) -> None:
    goals = quality.planned(asked(tmp_path, goals=True))
    assert len(goals) == len(set(goals)) == 2 * 2 * (3 * (len(quality.RULES) - 1) + 1)
    named = quality.planned(asked(tmp_path))
    assert set(goals) < set(named)
    assert {cell.setting.solver for cell in named} == {"euler", "heun", "dpm++2m", "sde", "unipc"}
    assert set(named) < set(quality.planned(asked(tmp_path, full=True)))
    assert all(cell.setting.samples >= 64 for cell in named)


def test_what_was_measured_is_not_measured_again(quality: ModuleType, tmp_path: Path) -> None:
    arguments = asked(tmp_path, goals=True, beds=["dit"], rules=["adaptive"])
    cells = quality.missing(arguments)
    assert len(cells) == 6
    mark = quality.BEDS["dit"]().fingerprint()
    line = {"key": cells[0].key(mark), "bed": "dit", "setting": asdict(cells[0].setting), "rule": "adaptive", "ratio": 2.0}
    # the last line was cut off when the run was stopped
    (tmp_path / "cells_dit.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:40], encoding="utf-8")
    assert quality.missing(arguments) == cells[1:]
    stale = {**line, "key": cells[1].key("another checkpoint")}
    (tmp_path / "cells_dit.jsonl").write_text(json.dumps(stale) + "\n", encoding="utf-8")
    assert quality.missing(arguments) == cells


def test_options_of_every_rule_are_options(quality: ModuleType) -> None:
    from cache_dit.options import resolve_options

    setting = quality.MAIN
    for rule in quality.RULES:
        if rule.peer:
            continue
        given = rule.options(setting, quality.computed_steps(setting.steps, 3.0))
        options = resolve_options({**given, **({rule.threshold: 0.1} if rule.threshold else {})})
        if options.schedule is not None:
            assert sum(options.schedule) == 9
            assert len(options.schedule) == setting.steps


def test_distances(quality: ModuleType) -> None:
    from judge import perceptual, psnr

    reference = torch.rand(3, 1, 24, 24) * 2 - 1
    assert psnr(reference, reference) == pytest.approx(150.0)
    assert psnr(reference + 0.02, reference) == pytest.approx(40.0, abs=1e-3)
    with torch.no_grad():
        assert perceptual(reference, reference) == 0.0
        assert perceptual(reference + 0.1, reference) > perceptual(reference + 0.01, reference) > 0.0


def test_the_table_shows_what_a_threshold_could_not_reach(quality: ModuleType) -> None:
    from quality_report import markdown

    lines = [
        {"bed": "dit", "setting": asdict(quality.MAIN), "rule": "teacache", "ratio": ratio, "computed": computed, "steps": 28}
        | {"psnr": 40.04, "perceptual": 0.01, "frechet": 30.0, "accuracy": 1.0}
        for ratio, computed in ((2.0, 14), (4.0, 12))
    ]
    table = markdown(lines, {"dit": "DiT"})
    assert "teacache" not in table
    assert "40.0 / 40.0 (12)" in table


def test_runs_of_several_lengths_are_shown_by_their_mean(quality: ModuleType, tmp_path: Path) -> None:
    from quality_report import markdown

    cells = [c for c in quality.planned(asked(tmp_path, lengths=True)) if c.bed == "dit" and c.rule in ("adaptive", "taylor2")]
    assert {cell.setting.steps for cell in cells} == set(quality.LENGTHS)
    lines = [
        {"bed": "dit", "setting": asdict(c.setting), "rule": c.rule, "ratio": c.ratio, "computed": 1, "steps": c.setting.steps}
        | {"psnr": 30.0 + c.setting.steps / 2 - 2 * c.ratio, "perceptual": 0.01, "frechet": 30.0, "accuracy": 1.0}
        for c in cells
        if c.rule == "adaptive" or c.setting.steps != 36
    ]
    table = markdown(lines, {"dit": "DiT"})
    assert "Means over runs of 20, 24, 28, 32, 36 steps" in table and "| rule | shift 3 | linear |" in table
    assert table.count("| 40.0 / 38.0 / 36.0 | 40.0 / 38.0 / 36.0 |") == 1
    assert "TaylorSeer" not in table
