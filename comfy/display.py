"""Text on a node in the browser, while it runs and after."""

from __future__ import annotations

import re
import sys
import threading
from time import monotonic
from typing import Any

# Seconds between two texts of a run, and between two counts of a compilation.
PAUSE = 0.2
TICK = 1.0
_INDENTATION, _STAYS = re.compile("^ +", re.MULTILINE), "\u00a0"
_CLAUSE = re.compile("([,，]) ?")


def show_text(node_id: str, message: str) -> None:
    """Show a text on a node; nothing where the server cannot.

    The browser drops spaces at the start of a line: those that indent a text are made to stay.
    """
    server: Any = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    send = getattr(instance, "send_progress_text", None)
    if send is not None:
        send(_INDENTATION.sub(lambda found: len(found[0]) * _STAYS, message), node_id)


class NodeDisplay:
    """Shows on its node how a sampling goes: compiling with its seconds, the step, what came of it, and warnings."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self._last = 0.0
        self._warnings: list[str] = []
        self._stop: threading.Event | None = None

    def began(self, steps: int | None) -> None:
        """A run begins."""
        self._last = 0.0

    def compiling(self, reason: str | None) -> None:
        """Count the seconds until the call has ended; of a recompilation, say what changed."""
        self._stop_counting()
        self._stop = threading.Event()
        threading.Thread(target=self._count, args=(self._stop, reason), name="cache_dit compiling", daemon=True).start()

    def progress(self, step: int, steps: int | None, skipped: int) -> None:
        """A call has ended."""
        self._stop_counting()
        now = monotonic()
        if now - self._last >= PAUSE:
            from ..texts import text

            self._last = now
            show_text(self.node_id, text("comfy_progress", step=step, steps="?" if steps is None else steps, skipped=skipped))

    def ended(self, line: str) -> None:
        """A run has ended."""
        self._stop_counting()
        # a node is narrow, and the browser breaks lines within words
        show_text(self.node_id, "\n".join([_CLAUSE.sub(r"\1\n", line), *self._warnings]))

    def said(self, message: str) -> None:
        """A warning: shown now, and under the result of each run."""
        self._warnings.append(message)
        show_text(self.node_id, message)

    def _stop_counting(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _count(self, stop: threading.Event, reason: str | None) -> None:
        from ..texts import text

        begin = monotonic()
        while not stop.wait(TICK):
            key = "comfy_compiling" if reason is None else "comfy_recompiling"
            show_text(self.node_id, text(key, seconds=monotonic() - begin, what=reason))
