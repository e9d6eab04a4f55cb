"""What a form raises where it cannot take a graph, or gains nothing by it."""

from __future__ import annotations


class Unsuited(Exception):
    """The graph is better compiled in another form; the argument says why, as a stable key."""
