"""How the package speaks to the user: announcements, warnings, and things that are said once."""

from __future__ import annotations

import logging
import sys
import warnings

from .texts import text

logger = logging.getLogger(__package__)


class CacheDitWarning(UserWarning):
    """Something the user asked for could not be done, or does not do what it seems to."""


def announce(message: str) -> None:
    """Tell the user something that needs no action: to the log, else to stderr where the log would swallow it.

    Logging is left as the user configured it; a level set on our logger is obeyed.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", message)
    elif logger.level == logging.NOTSET:
        print(f"[cache_dit] {message}", file=sys.stderr, flush=True)


def warn(key: str, language: str | None = None, *, stacklevel: int = 3, **values: object) -> None:
    """Warn with a text of :mod:`cache_dit.texts`."""
    warnings.warn(text(key, language, **values), CacheDitWarning, stacklevel=stacklevel)


class SaidOnce:
    """Warnings that are given once for each model."""

    __slots__ = ("_language", "_said")

    def __init__(self, language: str | None) -> None:
        self._language = language
        self._said: set[str] = set()

    def warn(self, key: str, **values: object) -> None:
        """Warn unless this was said before."""
        if key not in self._said:
            self._said.add(key)
            warn(key, self._language, stacklevel=4, **values)
