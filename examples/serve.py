"""A small server for a model that `cache_dit.export` compiled: digits on demand, with statistics at /metrics.

    python examples/serve.py --export digits.pt2          compiles the demo model once (minutes); needs diffusers
    python examples/serve.py digits.pt2 --port 8000       serves it; needs torch, cache_dit and prometheus-client
    curl -d '{"prompt": "3 1 4", "steps": 20, "seed": 7}' localhost:8000/generate
    python examples/serve.py digits.pt2 --load 500        500 requests of mixed sizes, each compared with its single run
    python examples/serve.py digits.pt2 --ray             the same behind Ray Serve: pip install 'ray[serve]'

One thread runs the model. Requests in flight take turns step by step, and each has a clone of the model: the programs and
weights are shared, the clock, the stored residuals and the statistics are its own.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import random
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

import cache_dit

NO_LABEL, GUIDANCE = 10, 2.0
MAX_IMAGES, MAX_STEPS = 8, 50
TIMEOUT = 300.0
"""Seconds that an answer may take."""

Predict = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def predict_digits(model: Any, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The demo model's velocity."""
    velocity: Tensor = model(x, timestep=sigma * 1000.0, class_labels=labels).sample
    return velocity


@dataclass(frozen=True)
class Request:
    """What to draw: a digit an image."""

    digits: tuple[int, ...]
    steps: int = 20
    seed: int = 0

    @classmethod
    def of(cls, given: Any) -> Request:
        """The request in a JSON object.

        Raises:
            ValueError: it asks for something else than this server draws.
        """
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise ValueError("a JSON object with a prompt of digits is wanted, such as {'prompt': '3 1 4'}")
        words = given["prompt"].replace(",", " ").split()
        if not all(word.isdecimal() and len(word) == 1 for word in words) or not 1 <= len(words) <= MAX_IMAGES:
            raise ValueError(f"prompt={given['prompt']!r}: 1 to {MAX_IMAGES} single digits are wanted")
        steps, seed = given.get("steps", 20), given.get("seed", 0)
        if type(steps) is not int or not 2 <= steps <= MAX_STEPS:
            raise ValueError(f"steps={steps!r}: an int from 2 to {MAX_STEPS} is wanted")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r}: an int from 0 is wanted")
        return cls(tuple(map(int, words)), steps, seed)


@dataclass(frozen=True)
class Answer:
    """What was drawn, and what the cache did for it. `seconds` count this request's own steps."""

    images: Tensor
    steps: int
    skipped: int
    seconds: float

    def as_data(self) -> dict[str, Any]:
        """For JSON: images are float32, little-endian, in base64."""
        raw = base64.b64encode(self.images.contiguous().numpy().tobytes()).decode()
        return {
            "images": raw,
            "shape": list(self.images.shape),
            "steps": self.steps,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


def load_model(artifact: str) -> Any:
    """The model without noise, whose numbers follow the process's seed: an answer depends on its request alone."""
    return cache_dit.load(artifact, noise_scale=0.0)


def sampling(model: Any, request: Request, shape: tuple[int, ...], predict: Predict) -> Iterator[Tensor]:
    """Draw with guidance by Euler steps; gives the state behind each of them."""
    generator = torch.Generator().manual_seed(request.seed)
    x = torch.randn(len(request.digits), *shape, generator=generator)
    ramp = torch.linspace(1.0, 0.0, request.steps + 1)
    sigmas = 3.0 * ramp / (1.0 + 2.0 * ramp)
    labels = torch.tensor([*request.digits, *([NO_LABEL] * len(request.digits))])
    cache_dit.new_run(model, request.steps, sigmas.tolist(), "euler", "flow")
    for i in range(request.steps):
        velocity = predict(model, torch.cat([x, x]), sigmas[i].expand(len(labels)), labels)
        positive, negative = velocity.chunk(2)
        x = x + (sigmas[i + 1] - sigmas[i]) * (negative + GUIDANCE * (positive - negative))
        yield x


def single_run(model: Any, request: Request, shape: tuple[int, ...], predict: Predict) -> Tensor:
    """What a request gets where nothing else runs."""
    with torch.no_grad():
        *_, images = sampling(model.clone(), request, shape, predict)
    return images


@dataclass
class _Running:
    request: Request
    future: Future[Answer]
    model: Any
    states: Iterator[Tensor]
    hits_before: int
    done: int = 0
    seconds: float = 0.0


@dataclass
class Metrics:
    """What /metrics shows."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        to = self.registry
        self.requests = Counter("cache_dit_requests", "Requests by outcome", ["outcome"], registry=to)
        self.steps = Counter("cache_dit_steps", "Steps by decision", ["decision"], registry=to)
        self.in_flight = Gauge("cache_dit_requests_in_flight", "Requests whose steps are being run", registry=to)
        self.seconds = Histogram("cache_dit_request_seconds", "Time of a request's own steps", registry=to)
        self.skipped = Histogram(
            "cache_dit_request_skipped_share",
            "Share of a request's steps that were skipped",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            registry=to,
        )
        self.cache_bytes = Gauge("cache_dit_cache_bytes", "Memory of the residuals of all clones", registry=to)


class Engine:
    """Runs requests, up to `concurrent` at a time, one step of each in turn."""

    def __init__(
        self, model: Any, *, shape: tuple[int, ...], concurrent: int = 4, predict: Predict = predict_digits
    ) -> None:
        self.metrics = Metrics()
        self.shape, self.predict = shape, predict
        self._idle = [model.clone() for _ in range(concurrent)]
        self._clones = tuple(self._idle)
        self._waiting: queue.Queue[tuple[Request, Future[Answer]] | None] = queue.Queue()
        self._running: deque[_Running] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request."""
        future: Future[Answer] = Future()
        self._waiting.put((request, future))
        return future

    def close(self) -> None:
        """Finish what runs, and stop."""
        self._waiting.put(None)
        self._thread.join(TIMEOUT)

    def _run(self) -> None:
        closing = False
        with torch.no_grad():
            while not closing or self._running:
                closing = self._admit(closing) or closing
                if self._running:
                    self._step(self._running.popleft())

    def _admit(self, closing: bool) -> bool:
        """Start waiting requests while there are clones; True where the engine is to stop."""
        while self._idle and not closing:
            try:
                given = self._waiting.get(block=not self._running)
            except queue.Empty:
                return False
            if given is None:
                return True
            request, future = given
            model = self._idle.pop()
            states = sampling(model, request, self.shape, self.predict)
            self._running.append(_Running(request, future, model, states, cache_dit.get_stats(model).hits))
            self.metrics.in_flight.set(len(self._running))
        return False

    def _step(self, each: _Running) -> None:
        start = time.perf_counter()
        try:
            images = next(each.states)
            each.seconds += time.perf_counter() - start
            each.done += 1
        except Exception as error:
            self.metrics.requests.labels("failed").inc()
            self._finish(each)
            each.future.set_exception(error)
            return
        if each.done < each.request.steps:
            self._running.append(each)
            return
        skipped = cache_dit.get_stats(each.model).hits - each.hits_before
        answer = Answer(images, each.request.steps, skipped, each.seconds)
        self._book(answer)
        self._finish(each)
        each.future.set_result(answer)

    def _book(self, answer: Answer) -> None:
        metrics = self.metrics
        metrics.requests.labels("answered").inc()
        metrics.steps.labels("skipped").inc(answer.skipped)
        metrics.steps.labels("computed").inc(answer.steps - answer.skipped)
        metrics.seconds.observe(answer.seconds)
        metrics.skipped.observe(answer.skipped / answer.steps)
        metrics.cache_bytes.set(sum(cache_dit.get_stats(model).cache_bytes for model in self._clones))

    def _finish(self, each: _Running) -> None:
        self._idle.append(each.model)
        self.metrics.in_flight.set(len(self._running))


class Server(ThreadingHTTPServer):
    """POST /generate and GET /metrics."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, engine: Engine, port: int, host: str = "127.0.0.1") -> None:
        self.engine = engine
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/metrics":
            self._send(404, b"not found", "text/plain")
            return
        self._send(200, generate_latest(self.server.engine.metrics.registry), "text/plain; version=0.0.4")

    def do_POST(self) -> None:
        if self.path != "/generate":
            self._send(404, b"not found", "text/plain")
            return
        try:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 65536))
            request = Request.of(json.loads(body))
        except ValueError as error:
            self.server.engine.metrics.requests.labels("refused").inc()
            self._send_data(400, {"error": str(error)})
            return
        try:
            self._send_data(200, self.server.engine.submit(request).result(TIMEOUT).as_data())
        except Exception as error:
            self._send_data(500, {"error": f"{type(error).__name__}: {error}"})

    def _send_data(self, code: int, data: dict[str, Any]) -> None:
        self._send(code, json.dumps(data).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Metrics say how many there were."""


def ask(port: int, data: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Send a request; the answer and its images."""
    body = json.dumps(data).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/generate", body, timeout=TIMEOUT) as reply:
        answer = json.load(reply)
    images = torch.frombuffer(bytearray(base64.b64decode(answer["images"])), dtype=torch.float32)
    return answer, images.reshape(answer["shape"])


def mixed_requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of all sizes: 1 to `MAX_IMAGES` images, 6 to 20 steps."""
    choose = random.Random(seed)
    return [
        {
            "prompt": " ".join(str(choose.randrange(10)) for _ in range(choose.randint(1, MAX_IMAGES))),
            "steps": choose.randint(6, 20),
            "seed": number,
        }
        for number in range(count)
    ]


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[int]:
    """A server of its own on a free port."""
    engine = Engine(model, **settings)
    server = Server(engine, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        engine.close()


@contextmanager
def serving_with_ray(artifact: str, port: int, **settings: Any) -> Iterator[int]:
    """The same two addresses behind Ray Serve: a replica loads the artifact, and requests in flight take turns in it."""
    import asyncio

    # a busy machine may take longer than the five seconds that Ray gives its proxy
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    import ray
    from ray import serve
    from starlette.requests import Request as Asked
    from starlette.responses import JSONResponse, Response

    class Digits:
        def __init__(self) -> None:
            self.engine = Engine(load_model(artifact), **settings)

        async def __call__(self, asked: Asked) -> Response:
            if asked.url.path == "/metrics":
                return Response(generate_latest(self.engine.metrics.registry), media_type="text/plain")
            try:
                request = Request.of(json.loads(await asked.body()))
            except ValueError as error:
                self.engine.metrics.requests.labels("refused").inc()
                return JSONResponse({"error": str(error)}, status_code=400)
            answer = await asyncio.wait_for(asyncio.wrap_future(self.engine.submit(request)), TIMEOUT)
            return JSONResponse(answer.as_data())

    ray.init(include_dashboard=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment = serve.deployment(max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})(Digits)
        serve.run(deployment.bind(), route_prefix="/")
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def load_test(model: Any, count: int, port: int, shape: tuple[int, ...], predict: Predict = predict_digits) -> tuple[int, str]:
    """Send mixed requests from several clients; how many answers differ from their single runs, and the metrics."""
    requests = mixed_requests(count)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda data: ask(port, data), requests))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT) as reply:
        metrics = reply.read().decode()
    differing = sum(
        not torch.equal(images, single_run(model, Request.of(data), shape, predict))
        for data, (_, images) in zip(requests, answers, strict=True)
    )
    return differing, metrics


def export_digits(path: str) -> None:
    """Compile the trained demo model."""
    import demo_model

    model = demo_model.load_model()
    size = demo_model.IMAGE_SIZE
    batch = torch.export.Dim("batch", min=2, max=2 * MAX_IMAGES)
    cache_dit.export(
        model,
        {"hidden_states": torch.randn(4, 1, size, size), "timestep": torch.full((4,), 500.0), "class_labels": torch.arange(4)},
        path,
        dynamic_shapes={"hidden_states": {0: batch}, "timestep": {0: batch}, "class_labels": {0: batch}},
        strategy="adaptive",
        target_speedup=2.0,
    )


def main() -> int:
    """Export, serve or test under load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--export", action="store_true", help="compile the demo model to this file")
    parser.add_argument("--load", type=int, metavar="COUNT", help="send this many requests, and compare the answers")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--concurrent", type=int, default=4, help="requests in flight")
    parser.add_argument("--ray", action="store_true", help="behind Ray Serve")
    given = parser.parse_args()
    if given.export:
        export_digits(given.artifact)
        return 0
    model = load_model(given.artifact)
    settings: dict[str, Any] = {"shape": (1, 24, 24), "concurrent": given.concurrent}
    if given.load is not None:
        start = time.perf_counter()
        artifact = str(Path(given.artifact).resolve())
        with serving_with_ray(artifact, given.port, **settings) if given.ray else serving(model, **settings) as port:
            differing, metrics = load_test(model, given.load, port, settings["shape"])
        print("\n".join(line for line in metrics.splitlines() if not line.startswith("#") and "_created" not in line))
        seconds = time.perf_counter() - start
        print(f"{given.load} requests, {differing} answers unlike their single runs, {seconds:.0f} s in all")
        return int(differing > 0)
    if given.ray:
        with serving_with_ray(str(Path(given.artifact).resolve()), given.port, **settings):
            print(f"http://127.0.0.1:{given.port}/generate and /metrics, until Ctrl-C")
            threading.Event().wait()
    engine = Engine(model, **settings)
    server = Server(engine, given.port)
    print(f"http://127.0.0.1:{given.port}/generate and /metrics")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
