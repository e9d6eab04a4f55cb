"""How one model is traced: when another way is tried, which lists are cached, which contexts are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cache_dit.graph_report import GraphReport, RegionReport
from cache_dit.runtime.tracing import MAX_COMPILES_IN_A_ROW, Capture, Tracing


def region(*lists: str, cached: tuple[str, ...] = ()) -> RegionReport:
    return RegionReport(lists, (), cached, (), 1, (), (), 1, 1, 4)


class Graph:
    def __init__(self, report: GraphReport) -> None:
        self.report = report


def graph(region: RegionReport | None = None, reason: str | None = None, broke: str | None = None) -> Any:
    return Graph(GraphReport(1, broke, None, region, reason))


def traced(cached: list[Any], uncached: Sequence[Any] = (), main: str | None = "blocks") -> Tracing:
    tracing = Tracing("en")
    tracing.main_list = main
    tracing.cached.update(dict.fromkeys(cached))
    tracing.uncached.update(dict.fromkeys(uncached))
    return tracing


def test_a_model_begins_as_torch_traces_it() -> None:
    tracing = Tracing("en")
    assert tracing.capture is Capture.DEFAULT
    assert not (tracing.blocks_may_help or tracing.must_begin_anew or tracing.no_folder)
    assert tracing.main_list is None and not tracing.cached and not tracing.uncached


def test_the_main_list_is_held_where_blocks_of_it_are_cached() -> None:
    assert traced([graph(region("side")), graph(region("blocks"))]).holds_main_list()
    assert not traced([graph(region("side"))]).holds_main_list()
    assert not traced([graph(None)]).holds_main_list()
    assert not traced([], [graph(region("blocks"))]).holds_main_list()
    assert not traced([graph(region("blocks"))], main=None).holds_main_list()


def test_the_main_list_came_apart_where_there_are_several_graphs_and_none_holds_it() -> None:
    side, main, other = graph(region("side")), graph(region("blocks")), graph(None, "no_blocks")
    assert traced([side], [other]).main_list_came_apart()
    assert traced([side, graph(region("sides"))]).main_list_came_apart()
    # one graph alone is the whole model
    assert not traced([side]).main_list_came_apart() and not traced([]).main_list_came_apart()
    assert not traced([side, main]).main_list_came_apart()
    assert not traced([side], [other], main=None).main_list_came_apart()


def test_reports_and_lists_are_those_of_the_graphs() -> None:
    tracing = traced([graph(region("side", "more")), graph(region("side"))], [graph(None, "no_blocks")])
    assert [report.reason for report in tracing.reports()] == [None, None, "no_blocks"]
    assert tracing.side_lists() == ["side", "more"]


def test_graph_breaks_are_told_once_each_those_of_earlier_ways_first() -> None:
    tracing = traced([graph(broke="print"), graph(broke="item")], [graph(), graph(broke="print")])
    assert tracing.breaks() == ["print", "item"]
    tracing.must_begin_anew = True
    tracing.begin_anew()
    assert not tracing.cached and not tracing.uncached and not tracing.must_begin_anew
    assert tracing.breaks() == ["print", "item"]
    tracing.uncached[graph(broke="numpy")] = None
    assert tracing.breaks() == ["print", "item", "numpy"]


@pytest.mark.parametrize(
    ("reason", "helps"), [("no_blocks", True), ("nothing_left", True), ("random", False), ("grad_mode", False), (None, False)]
)
def test_another_way_is_tried_where_the_blocks_may_have_come_apart(
    capfd: pytest.CaptureFixture[str], reason: str | None, helps: bool
) -> None:
    tracing = traced([], [graph(None, "random"), graph(None, reason)])
    assert tracing.tries_another_way() is helps
    assert tracing.capture is (Capture.MORE if helps else Capture.DEFAULT)
    assert bool(capfd.readouterr().err) is helps


@pytest.mark.parametrize("blocks_may_help", [False, True])
def test_ways_of_tracing_are_tried_in_their_order_and_none_twice(
    capfd: pytest.CaptureFixture[str], blocks_may_help: bool
) -> None:
    tracing = traced([], [graph(None, "no_blocks")])
    tracing.blocks_may_help = blocks_may_help
    ways, tried = [], []
    for _ in range(4):
        tried.append(tracing.tries_another_way())
        ways.append(tracing.capture)
    last = [Capture.IN_VAIN] * 2
    assert ways == ([Capture.MORE, Capture.BLOCKS, *last] if blocks_may_help else [Capture.MORE, Capture.IN_VAIN, *last])
    assert tried == [True, blocks_may_help, False, False]
    assert len(capfd.readouterr().err.splitlines()) == sum(tried)


def test_what_was_in_vain_by_default_is_not_tried_block_by_block() -> None:
    tracing = traced([])
    tracing.blocks_may_help = True
    assert not tracing.was_in_vain() and tracing.capture is Capture.IN_VAIN


def test_a_context_that_compiles_at_every_call_is_found_by_their_number_in_a_row() -> None:
    tracing = Tracing("en")
    assert [tracing.compiles_for_ever("a") for _ in range(MAX_COMPILES_IN_A_ROW - 1)] == [False] * (MAX_COMPILES_IN_A_ROW - 1)
    # a call of it that compiled nothing ends the row; another context has its own
    tracing.compiled_nothing("a")
    tracing.compiled_nothing("b")
    row = [*[False] * (MAX_COMPILES_IN_A_ROW - 1), True, True]
    assert [tracing.compiles_for_ever("a") for _ in row] == row
    assert not tracing.compiles_for_ever("b")
    # counted, not decided: who asks leaves the context
    assert not tracing.is_eager("a")
    tracing.leave("a")
    assert tracing.is_eager("a") and not tracing.is_eager("b") and not tracing.is_eager(None)
