"""A real ComfyUI server on loopback, and the client that drives it. Standard library alone, but for the websocket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = Path(__file__).resolve().parent / "pack"
START_SECONDS = 120
# the kind of a websocket message that holds the text of a node
_TEXT = (3).to_bytes(4, "big")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PromptError(Exception):
    """The server refused a prompt; ``details`` is its answer."""

    def __init__(self, details: Any) -> None:
        super().__init__(json.dumps(details)[:2000])
        self.details = details


class Server:
    """One running server. ``home`` holds its data; the node packs are links in its folder ``custom_nodes``."""

    def __init__(self, tree: Path, home: Path, *arguments: str, **environment: str) -> None:
        self.tree, self.home, self.arguments = tree, home, arguments
        self.log = home / "server.log"
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (home / name).mkdir(parents=True, exist_ok=True)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.client = uuid.uuid4().hex

    def link(self, folder: Path, name: str) -> None:
        """Put a node pack into the server's folder."""
        place = self.home / "custom_nodes" / name
        if not place.exists():
            place.symlink_to(folder, target_is_directory=True)

    def start(self) -> None:
        self.port = free_port()
        overlay = self.tree.with_name(self.tree.name + "-frontend")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            **self.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(overlay) * overlay.is_dir(), self.environment.get("PACKAGES")))),
        }
        command = [
            sys.executable, "main.py", "--cpu", "--use-pytorch-cross-attention", "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(self.home), "--disable-auto-launch", "--disable-metadata",
            "--preview-method", "none", "--database-url", f"sqlite:///{self.home}/user/db.sqlite", *self.arguments,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.tree, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def families(self) -> list[str]:
        """The families of models that the tests can build in this server."""
        found: list[str] = self.get("/object_info/TestModel")["TestModel"]["input"]["required"]["family"][0]
        return found

    # ---- requests

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content[:1] in b"{[" else content

    def post(self, path: str, content: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                given = answer.read()
        except urllib.error.HTTPError as error:
            raise PromptError(json.loads(error.read() or b"null")) from None
        return json.loads(given) if given else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Hand a prompt in; its id."""
        return str(self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """What the history says of a prompt once it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id].get("status", {}).get("status_str"):
                found: dict[str, Any] = history[prompt_id]
                return found
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the server died:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not end:\n{self.log.read_text()[-2000:]}")

    def hear(self, prompt: dict[str, Any]) -> list[tuple[str, str]]:
        """Run a prompt; the texts that the websocket carried meanwhile, each with its node."""
        import asyncio

        import aiohttp

        heard: list[tuple[str, str]] = []

        async def listen() -> None:
            address = f"http://127.0.0.1:{self.port}/ws?clientId={self.client}"
            async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
                prompt_id = await asyncio.to_thread(self.queue, prompt)
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.BINARY and message.data[:4] == _TEXT:
                        end = 8 + int.from_bytes(message.data[4:8], "big")
                        heard.append((message.data[8:end].decode(), message.data[end:].decode()))
                    elif message.type is aiohttp.WSMsgType.TEXT:
                        event = message.json()
                        ended = event["type"] in ("execution_success", "execution_error")
                        if ended and event["data"].get("prompt_id") == prompt_id:
                            return

        asyncio.run(asyncio.wait_for(listen(), 300))
        return heard

    def run(self, prompt: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Run a prompt to its end: the texts that its nodes showed, by node."""
        history = self.wait(self.queue(prompt), seconds)
        if history["status"]["status_str"] != "success":
            raise AssertionError(json.dumps(history["status"]["messages"])[-3000:])
        return {node: _text_of(shown) for node, shown in history["outputs"].items()}


def _text_of(shown: dict[str, Any]) -> Any:
    if "text" not in shown:
        return shown
    try:
        return json.loads(shown["text"][0])
    except ValueError:
        return shown["text"][0]


class Workflow:
    """A prompt under construction: each method adds nodes and gives the link to what they make."""

    def __init__(self, family: str = "flux", seed: int = 1) -> None:
        self.family = family
        self.nodes: dict[str, Any] = {}
        self._seed = seed

    def add(self, kind: str, name: str | None = None, **inputs: Any) -> list[Any]:
        key = name or str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": kind, "inputs": inputs}
        return [key, 0]

    def model(self, copy: int = 0, **other: Any) -> list[Any]:
        given = {"family": self.family, "seed": self._seed, "copy": copy, "weights": "float32"}
        return self.add("TestModel", **{**given, **other})

    def prompt(self, seed: int, tokens: int = 16) -> list[Any]:
        return self.add("TestConditioning", family=self.family, tokens=tokens, seed=seed)

    def latent(self, size: int = 128, batch: int = 1) -> list[Any]:
        if self.family == "ltxav":
            video = self.add("EmptyLTXVLatentVideo", width=128, height=128, length=9, batch_size=batch)
            return self.add("LTXVConcatAVLatent", video_latent=video, audio_latent=self.add("TestAudioLatent"))
        if self.family == "wan":
            return self.add("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=batch)
        if self.family == "unet":
            return self.add("EmptyLatentImage", width=size, height=size, batch_size=batch)
        return self.add("EmptySD3LatentImage", width=size, height=size, batch_size=batch)

    def sample(self, model: list[Any], *, steps: int = 8, cfg: float = 3.0, sampler: str = "euler", **more: Any) -> list[Any]:
        given = {
            "seed": 7, "steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0,
            "positive": more.pop("positive", None) or self.prompt(2),
            "negative": more.pop("negative", None) or self.prompt(3),
            "latent_image": more.pop("latent_image", None) or self.latent(),
        }  # fmt: skip
        return self.add("KSampler", model=model, **{**given, **more})

    def digest(self, samples: list[Any], name: str = "digest") -> None:
        self.add("TestDigest", name, samples=samples)

    def facts(self, after: list[Any], name: str = "facts") -> None:
        self.add("TestServer", name, after=after)


@contextlib.contextmanager
def running(tree: Path, home: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server with this repository cloned into its folder, and the tests' pack."""
    server = Server(tree, home, *arguments, **environment)
    server.link(ROOT, "cache-dit-fx")
    server.link(PACK, "cache_dit_tests")
    server.start()
    try:
        yield server
    finally:
        server.stop()
