"""The distribution ``cache-dit`` is another project with the same import name; where both are installed one hides the other."""

from __future__ import annotations

from importlib import metadata

from .messages import warn

OTHER_DISTRIBUTION = "cache-dit"


def other_version() -> str | None:
    """The version of the other project where it is installed."""
    try:
        return metadata.version(OTHER_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def warn_of_other_project() -> None:
    """Say that the other project is installed too, and what to do."""
    version = other_version()
    if version is not None:
        warn("other_project", stacklevel=3, version=version)
