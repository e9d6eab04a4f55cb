"""Makes ``torch.compile(..., backend="cache_dit")`` work in a checkout where nothing is installed.

An installed package has an entry point that torch reads when it first looks a backend up. A checkout offers the same
entry point through a finder of distributions, which costs nothing until someone looks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

BACKEND_NAME = "cache_dit"
GROUP = "torch_dynamo_backends"
DISTRIBUTION = "cache-dit-fx"


class CheckoutDistribution(metadata.Distribution):
    """The distribution that an installation of this checkout would be, as far as entry points go."""

    def __init__(self, package: str, version: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n",
            "entry_points.txt": f"[{GROUP}]\n{BACKEND_NAME} = {package}.backend:cache_dit_backend\n",
        }

    def read_text(self, filename: str) -> str | None:
        """The text of a metadata file; None where there is no such file."""
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        """Where a file of the distribution lies."""
        return Path(__file__).resolve().parents[1] / path


class CheckoutFinder(MetaPathFinder):
    """Offers the distribution to ``importlib.metadata``; finds no modules. An installed one of the same name goes first."""

    def __init__(self, distribution: CheckoutDistribution) -> None:
        self._distribution = distribution

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """No module comes from here."""
        return None

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        """The checkout, where every distribution or ours is asked for."""
        name = getattr(context, "name", None)
        return [self._distribution] if name in (None, DISTRIBUTION) else []


def offer_backend(package: str, version: str) -> None:
    """Let torch find the backend under its name, unless an installation has seen to that."""
    if not any(isinstance(finder, CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.append(CheckoutFinder(CheckoutDistribution(package, version)))
    registry: Any = sys.modules.get("torch._dynamo.backends.registry")
    # torch looks once: where it has looked already, the name is entered as that look would have entered it
    if registry is not None and BACKEND_NAME not in registry._BACKENDS:
        found = metadata.entry_points(group=GROUP, name=BACKEND_NAME)
        for entry_point in found:
            registry._BACKENDS[BACKEND_NAME] = entry_point
