"""The processes that hold what is measured, and the environment of the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
PEERS = ROOT / "build" / "peers"
# glibc's allocator gives memory back at every step and takes it anew, or does not, by how the process happened to begin: some
# percent of a large step (docs/tried.md). Here it keeps what it has, in every process that is measured.
KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}


class Worker:
    """A process that runs `worker.py`: one variant of one subject.

    Raises:
        RuntimeError: it ended without an answer.
    """

    def __init__(self, subject: str, variant: str, python: Path, cache: str, options: Sequence[str], log: Path) -> None:
        environment = {**os.environ, **KEEPS_MEMORY, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        self._log = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(FOLDER / "worker.py"), subject, variant, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.first = self._answer()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a line and read one."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made on first use: one of them has our import name.

    It sees the packages that we run with, so that all are measured on the same torch and diffusers. Its own come first,
    and Python reads the file that makes an editable package known in an environment's own folder alone.
    """
    python = PEERS / "bin" / "python"
    stamp = PEERS / "installed"
    wanted = (FOLDER / "peers.txt").read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing the peers into {PEERS}, once", flush=True)
        venv.create(PEERS, with_pip=True, clear=True)
        ours = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
        home = next((PEERS / "lib").glob("python*/site-packages"), PEERS / "Lib" / "site-packages")
        (home / "ours.pth").write_text("\n".join(ours), encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-r", str(FOLDER / "peers.txt")], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def own_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)
