"""Servers for the tests that need one: `make test-comfy` says where ComfyUI lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from server import Server

HOME = os.environ.get("CACHE_DIT_COMFY_HOME")
# what needs no server runs in the project's own environment
collect_ignore = ["test_nodes.py"] if HOME else []
VERSIONS = os.environ.get("CACHE_DIT_COMFY_VERSIONS", "0.3.75,0.30.0").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfy_version" in metafunc.fixturenames:
        metafunc.parametrize("comfy_version", VERSIONS, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, each version has a worker of its own, and so one server."""
    for item in items:
        version = getattr(item, "callspec", None) and item.callspec.params.get("comfy_version")  # type: ignore[attr-defined]
        if version:
            item.add_marker(pytest.mark.xdist_group(version))


@pytest.fixture(scope="session")
def comfy_version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tree(comfy_version: str) -> Path:
    """The sources of that version."""
    if HOME is None:
        pytest.skip("make test-comfy sets ComfyUI up")
    return Path(HOME) / f"comfy-{comfy_version}"


@pytest.fixture(scope="session")
def server(tree: Path, comfy_version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of a version."""
    from server import running

    with running(tree, tmp_path_factory.mktemp(f"comfy-{comfy_version}"), CACHE_DIT_LANG="en") as found:
        yield found


@pytest.fixture(scope="session")
def undecided(tree: Path, comfy_version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that was not told a language."""
    from server import running

    with running(tree, tmp_path_factory.mktemp(f"undecided-{comfy_version}"), CACHE_DIT_LANG="") as found:
        yield found
