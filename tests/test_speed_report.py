"""What the speed benchmark measures beside time, and how its tables are ordered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_the_memory_of_a_step_is_what_it_holds_at_one_time() -> None:
    from variants import Options
    from worker import memory_of_a_step

    kept: list[torch.Tensor] = [torch.zeros(1000)]

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    def together() -> None:
        kept.extend(torch.ones(1000) for _ in range(3))

    def in_place_of_what_was_there() -> None:
        kept.clear()
        torch.ones(1000)

    def nothing() -> None:
        pass

    steps = (one_after_the_other, together, in_place_of_what_was_there, nothing)
    assert [memory_of_a_step(step, Options()) for step in steps] == [4000, 12000, 0, 0]


def measured(milliseconds: float, held: int | None = None, **facts: Any) -> dict[str, Any]:
    steps = [{"seconds": milliseconds / 1e3, "place": place} for place in range(10)]
    memory = {} if held is None else {"step_bytes": held}
    return {"graphs": 1, "breaks": 0, "errors": [0.0] * 6, "steps": steps, **memory, **facts}


def test_memory_is_told_beyond_plain_s_where_it_was_measured() -> None:
    from speed_report import steps_table

    found = {"plain": measured(10, 5_000_000), "floor": measured(1, 4_000_000), "never hitting": measured(10, 6_500_000)}
    ends = [line.split("|")[-2].strip() for line in steps_table(found)[2:]]
    assert ends == ["", "-1.00", "1.50"]
    assert [line.split("|")[-2].strip() for line in steps_table({name: measured(5) for name in found})[2:]] == ["", "", ""]


def test_depths_are_ordered_by_their_number() -> None:
    from speed_report import _depth

    names = ["flux-deep-8", "flux-deep-64", "demo", "flux-deep-16"]
    assert sorted(names, key=_depth) == ["demo", "flux-deep-8", "flux-deep-16", "flux-deep-64"]


def test_measured_processes_keep_their_memory(tmp_path: Path) -> None:
    """Whatever glibc's allocator would do by how they happened to begin."""
    from processes import KEEPS_MEMORY, Worker

    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "{\\"threshold\\": \\"$MALLOC_TRIM_THRESHOLD_\\"}"\ncat > /dev/null\n', encoding="utf-8")
    script.chmod(0o755)
    with Worker("demo", "plain", script, str(tmp_path), [], tmp_path / "log") as worker:
        assert worker.first == {"threshold": KEEPS_MEMORY["MALLOC_TRIM_THRESHOLD_"]}
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_steps_over_depth_have_a_row_for_each_model() -> None:
    from speed_report import depth_table

    def turns(computed: float, skipped: float) -> dict[str, Any]:
        found = measured(0.0, errors=[0.0, 1.0] * 3, lowering=["pieces"])
        times = [skipped if place % 2 else computed for place in range(10)]
        return found | {"steps": [{"seconds": time / 1e3, "place": place} for place, time in enumerate(times)]}

    def model() -> dict[str, Any]:
        ways = {"specialize": turns(10, 1), "pieces": turns(11, 2), "DBCache": {"failed": "no"}, "never hitting": measured(10)}
        return {"plain": measured(10), "floor": measured(1), **ways}

    head, _, *rows = depth_table({"flux-deep-16": model(), "flux-deep-8": model()})
    assert head.startswith("| model | plain, ms | specialize, computed / plain | pieces, computed / plain |")
    assert [row.split("|")[1].strip()[:25] for row in rows] == ["Flux-shaped (2 + 6 blocks", "Flux-shaped (4 + 12 block"]
    told = "| 10.00 | 1.000 | 1.100 | – | 1.000 | 0.100 | 0.200 | – | – | 1.000 | 0.846 | – | – |"
    assert all(row.endswith(told) for row in rows)


def test_seconds_of_first_calls_have_a_row_for_each_model_and_state() -> None:
    from speed_report import compile_table

    def started(*seconds: float) -> dict[str, Any]:
        return {"cold": {"first_calls": [*seconds, 1.0]}, "warm": {"first_calls": [1.0]}}

    failed = {"cold": {"failed": "no"}, "warm": {"failed": "no"}}
    ways = {"plain": started(3.0), "pieces": started(1.0)}
    head, _, *rows = compile_table({"flux-deep-16": ways, "flux-deep-8": {**ways, "DBCache": failed}})
    assert head == "| model | state | plain | pieces | DBCache |"
    told = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    assert [row.split("|")[1].strip()[:17] for row in rows] == ["Flux-shaped (2 + "] * 2 + ["Flux-shaped (4 + "] * 2
    assert told == [
        ["cold", "4.0 s (1.00)", "2.0 s (0.50)", "does not run"],
        ["warm", "1.0 s (1.00)", "1.0 s (1.00)", "does not run"],
        ["cold", "4.0 s (1.00)", "2.0 s (0.50)", "not measured"],
        ["warm", "1.0 s (1.00)", "1.0 s (1.00)", "not measured"],
    ]
