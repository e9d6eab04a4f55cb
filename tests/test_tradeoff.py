"""The measure of speed against fidelity: its ways, its table and its plot, with an inner compiler that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def tradeoff(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import tradeoff

    # two ways of each kind, and short runs
    monkeypatch.setattr(tradeoff, "RATIOS", (2.0, 4.0))
    monkeypatch.setattr(tradeoff, "SETTING", tradeoff.Setting(samples=1, steps=12))
    return tradeoff


@pytest.mark.slow
def test_every_way_has_a_time_and_a_distance_from_plain(tradeoff: ModuleType, fresh_dynamo: None, tmp_path: Path) -> None:
    from speed_report import plot_tradeoff

    points = tradeoff.measure("ours", inner="eager", rounds=1)
    assert [point["what"] for point in points] == ["12 steps", "6 steps", "3 steps", *["2x", "4x"] * 2]
    assert points[0]["psnr"] is None and points[0]["time"] == 1.0
    assert all(10.0 < point["psnr"] < 60.0 and point["time"] > 0.0 for point in points[1:])
    # more computed steps are nearer
    distance = {(point["line"], point["what"]): point["psnr"] for point in points[1:]}
    for line in tradeoff.by_line(points):
        near, far = ("6 steps", "3 steps") if line.startswith("fewer") else ("2x", "4x")
        assert distance[line, near] > distance[line, far]
    assert "plain" not in tradeoff.by_line(points)
    assert len(tradeoff.by_line(points)) == 3
    rows = tradeoff.table(points)
    assert len(rows) == 2 + len(points) and rows[2].startswith("| plain | 12 steps | 1.000 | \u2013 |")
    pytest.importorskip("matplotlib")
    plot_tradeoff(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


MACHINE = {"platform": "here", "device": "cpu", "cpus": 2, "threads": 1, "torch": "2", "inner": "eager", "peers": "-"}
POINTS = [
    {"line": "plain", "what": "12 steps", "time": 1.0, "psnr": None},
    {"line": "cache_dit, adaptive", "what": "2x", "time": 0.5, "psnr": 40.0},
]


def test_the_pictures_are_made_on_the_device_that_was_asked_for(tradeoff: ModuleType) -> None:
    """The meta device computes nothing, and refuses what lies on the CPU."""
    model = tradeoff.bed_on("meta").load()
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    for way in tradeoff.fewer_steps(model, "meta"):
        assert way.run().device.type == "meta"
    drawn = tradeoff.sampler_on("meta", tradeoff.SETTING).run(model)
    assert drawn.device.type == "meta" and drawn.shape == (1, 1, 24, 24)
    with pytest.raises(RuntimeError, match="meta"):
        tradeoff.Sampler(tradeoff.BEDS["dit"](), tradeoff.SETTING).run(model)


def test_every_part_is_measured_on_the_device_that_the_report_names(
    tradeoff: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import run

    commands: list[list[str]] = []

    def answered(command: list[str], **given: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=json.dumps(POINTS if "tradeoff" in command[1] else {}))

    monkeypatch.setattr(subprocess, "run", answered)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--no-peers"])
    arguments = run._arguments()
    run._host("demo", arguments, [], tmp_path)
    run._tradeoff("demo", arguments, [], tmp_path)
    assert [Path(command[1]).name for command in commands] == ["host_time.py", "tradeoff.py"]
    assert all(command[command.index("--device") + 1] == "cuda" for command in commands)
    assert run._options(arguments)[4:6] == ["--device", "cuda"]


def test_results_of_another_device_do_not_come_under_one_heading(tradeoff: ModuleType, tmp_path: Path) -> None:
    import run

    run._check_same(MACHINE, MACHINE | {"platform": "there"}, tmp_path)
    with pytest.raises(SystemExit, match="device cpu, now cuda: give --fresh"):
        run._check_same(MACHINE, MACHINE | {"device": "cuda"}, tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_without_matplotlib_there_are_tables_and_a_word_about_plots(
    tradeoff: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    import speed_report

    if there:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = {"machine": MACHINE | {"rounds": 1}, "steps": {}, "compile": {}, "host": {}, "tradeoff": {"demo": POINTS}}
    speed_report.write_report(results, tmp_path)
    assert "| cache_dit, adaptive | 2x | 0.500 | 40.0 |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "speed-fidelity.png").exists() == there
    assert ("they need matplotlib" in capsys.readouterr().out) != there
