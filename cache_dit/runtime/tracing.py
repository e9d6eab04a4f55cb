"""How one model is traced, what its graphs turned out to be, and which of its contexts are not worth compiling."""

from __future__ import annotations

from enum import Enum

from ..graph_report import GraphReport
from ..messages import announce
from ..texts import text
from .program import Cacheable, UncachedGraph

# Refusals that tracing more in one graph may mend: the blocks may have come apart.
CAPTURE_MAY_HELP = frozenset({"no_blocks", "nothing_left"})
# Calls of a context in a row that each compiled, after which it is no longer compiled: a change of shape takes one or two.
MAX_COMPILES_IN_A_ROW = 4


class Capture(Enum):
    """How a model is traced: as torch does by default; with host reads captured too; block by block since neither helped;
    by default again, since nothing did."""

    DEFAULT = "default"
    MORE = "more"
    BLOCKS = "blocks"
    IN_VAIN = "in vain"


class Tracing:
    """The graphs of one model, and the way of tracing that made them."""

    def __init__(self, language: str | None) -> None:
        self.capture = Capture.DEFAULT
        self.cached: dict[Cacheable, None] = {}
        self.uncached: dict[UncachedGraph, None] = {}
        # the path of the longest list of the model's modules, where the model is known
        self.main_list: str | None = None
        # whether there are blocks that could each cache its own part
        self.blocks_may_help = False
        # why torch could not begin to compile, if so
        self.no_folder = ""
        # set where the same way of tracing has to begin anew
        self.must_begin_anew = False
        self._language = language
        # graph breaks of the ways of tracing that were given up
        self._earlier_breaks: list[str] = []
        # contexts that run in eager since compiling them does harm, and how often each of the others compiled in a row
        self._eager: set[str] = set()
        self._compiled_in_a_row: dict[str, int] = {}

    def begin_anew(self) -> None:
        """The model is about to be traced anew: what is known of its graphs so far does not hold for it."""
        self.must_begin_anew = False
        self._earlier_breaks = self.breaks()
        self.uncached.clear()
        self.cached.clear()

    # ---- the blocks ---------------------------------------------------------------------------------------------

    def reports(self) -> list[GraphReport]:
        """What was found in each graph, those with a cached region first."""
        return [graph.report for graph in self.cached] + [graph.report for graph in self.uncached]

    def breaks(self) -> list[str]:
        """The reason and the user's line of every graph break seen so far."""
        found = (report.break_reason for report in self.reports())
        return list(dict.fromkeys([*self._earlier_breaks, *(reason for reason in found if reason is not None)]))

    def holds_main_list(self) -> bool:
        """Whether the model's longest list of modules is among what is cached."""
        regions = [graph.report.region for graph in self.cached]
        return self.main_list is not None and any(r is not None and r.holds(self.main_list) for r in regions)

    def main_list_came_apart(self) -> bool:
        """Whether blocks are cached, and none of the model's longest list among them."""
        several = len(self.cached) + len(self.uncached) > 1
        return self.main_list is not None and several and not self.holds_main_list()

    def side_lists(self) -> list[str]:
        """The lists of modules of which blocks are cached."""
        return list(dict.fromkeys(name for report in self.reports() if report.region for name in report.region.lists))

    def tries_another_way(self) -> bool:
        """Where the blocks came apart into several graphs, trace in another way; True if that is to come.

        Graph breaks are no sign of it: where Dynamo gives a frame up and compiles the blocks one by one it counts none.
        """
        if self.capture is not Capture.DEFAULT:
            return self.was_in_vain()
        if not any(report.reason in CAPTURE_MAY_HELP for report in self.reports()):
            return False
        self.capture = Capture.MORE
        announce(text("capturing_more", self._language))
        return True

    def was_in_vain(self) -> bool:
        """This way of tracing did not help: go on to the next one. Whether there is one left that may."""
        if self.capture is Capture.MORE and self.blocks_may_help:
            self.capture = Capture.BLOCKS
            announce(text("blockwise", self._language))
            return True
        self.capture = Capture.IN_VAIN
        return False

    # ---- contexts -----------------------------------------------------------------------------------------------

    def is_eager(self, context: str | None) -> bool:
        """Whether a context is not worth compiling."""
        return context in self._eager

    def leave(self, context: str) -> None:
        """From now on this context runs as it is."""
        self._eager.add(context)

    def compiles_for_ever(self, context: str) -> bool:
        """A call of this context compiled: whether it does so at every call, since something it holds is made anew."""
        self._compiled_in_a_row[context] = self._compiled_in_a_row.get(context, 0) + 1
        return self._compiled_in_a_row[context] >= MAX_COMPILES_IN_A_ROW

    def compiled_nothing(self, context: str) -> None:
        """A call of this context compiled nothing."""
        self._compiled_in_a_row.pop(context, None)
