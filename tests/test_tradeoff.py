"""The measure of speed against fidelity: its ways, its table and its plot, with an inner compiler that costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tradeoff(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import tradeoff

    # two ways of each kind, and short runs
    monkeypatch.setattr(tradeoff, "RATIOS", (2.0, 4.0))
    monkeypatch.setattr(tradeoff, "SETTING", tradeoff.Setting(samples=1, steps=12))
    yield tradeoff
    for name in ("tradeoff", "speed_report"):
        sys.modules.pop(name, None)


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
