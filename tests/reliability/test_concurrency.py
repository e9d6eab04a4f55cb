"""Threads, tasks, processes, and a server whose requests may be cancelled."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_dit
from cache_dit.messages import CacheDitWarning

from .generations import EXACT, Plan, Prompted, calls_of, enabled, falling, generate, hits_of, prompted, same

WARM: dict[str, Any] = {**EXACT, "warmup_steps": 1}


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def alone(plan: Plan) -> list[Tensor]:
    return generate(plan, enabled(WARM))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(work) for work in works]]


# Threads.


def test_two_threads_on_two_models_are_as_if_alone() -> None:
    plans = [Plan(10 * n, falling(8 + n)) for n in range(1, 5)]
    wanted = [alone(plan) for plan in plans]
    every = [enabled(WARM) for _ in plans]
    for _ in range(3):
        found = in_threads(*(lambda m=model, p=plan: generate(p, m) for model, plan in zip(every, plans, strict=True)))
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_threads_on_one_model_are_serialised_and_with_names_as_if_alone() -> None:
    model = enabled(WARM)
    plans = [Plan(10 * n, falling(8 + n)) for n in range(1, 5)]

    def work(name: str, plan: Plan) -> list[Tensor]:
        with cache_dit.context(model, name):
            return generate(plan, model)

    for _ in range(3):
        found = in_threads(*(lambda n=n, p=p: work(f"request {n}", p) for n, p in enumerate(plans)))
        for n, (outputs, plan) in enumerate(zip(found, plans, strict=True)):
            fresh = enabled(WARM)
            with cache_dit.context(fresh, f"request {n}"):
                assert same(outputs, generate(plan, fresh))


def test_threads_on_one_model_without_names_cost_speed_and_no_picture() -> None:
    """Even with one prompt for all: what tells them apart is the thread. Said once."""
    prompt = Plan(1, falling(9)).parts()[1]
    outcomes = []
    for other in (10, 20):
        model = enabled({**EXACT, "warmup_steps": 0, "skip_interval": 1})
        turns = [threading.Event(), threading.Event()]
        turns[0].set()
        found: list[list[Tensor]] = [[], []]

        def work(place: int, seed: int, model: Prompted = model, turns: Any = turns, found: Any = found) -> None:
            noise = Plan(seed, falling(9)).parts()[0]
            for step in range(9):
                assert turns[place].wait(60)
                turns[place].clear()
                with torch.no_grad():
                    found[place].append(model(noise + step, torch.full((2,), 1.0 - step / 9), prompt))
                    if step == 4 and place == 0:
                        # out of turn
                        found[place].append(model(noise - step, torch.full((2,), 0.5), prompt))
                turns[1 - place].set()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheDitWarning)
            in_threads(lambda: work(0, 5), lambda seed=other: work(1, seed))
        outcomes.append(found[0])
    assert same(*outcomes)


def test_a_run_that_changes_threads_computes_anew_and_says_so_once() -> None:
    model, plan = enabled({**EXACT, "warmup_steps": 0, "skip_interval": 1}), Plan(10, falling(8))
    running = calls_of(plan, model)
    with pytest.warns(CacheDitWarning, match="several threads") as said, torch.no_grad():
        for step in range(8):
            before = hits_of(model)
            in_threads(lambda: torch.no_grad()(next)(running))
            assert hits_of(model) == before, step
    assert len(said) == 1


def test_statistics_are_read_and_caching_is_turned_off_while_another_thread_generates() -> None:
    model, stop, errors = enabled(WARM), threading.Event(), []

    def watch() -> None:
        try:
            while not stop.is_set():
                cache_dit.get_stats(model)
                cache_dit.get_global_stats()
                cache_dit.summary(model)
                str(cache_dit.explain(model))
        except Exception as error:
            errors.append(error)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for n in range(30):
        with cache_dit.context(model, f"request {n}"):
            generate(Plan(n, falling(4)), model)
        enabled(WARM)
    cache_dit.reset_cache_stats()
    stopper = threading.Timer(0.05, cache_dit.disable_cache, (model,))
    stopper.start()
    for n in range(20):
        generate(Plan(n, falling(5)), model)
    stopper.join()
    stop.set()
    for watcher in watchers:
        watcher.join(60)
    assert errors == []
    assert same(generate(Plan(3, falling(5)), model), generate(Plan(3, falling(5)), prompted()))


# asyncio.


async def stepping(plan: Plan, model: Callable[..., Tensor]) -> list[Tensor]:
    """A generation that lets others go on behind each call."""
    outputs = []
    running = calls_of(plan, model)
    while True:
        with torch.no_grad():
            output = next(running, None)
        if output is None:
            return outputs
        outputs.append(output)
        await asyncio.sleep(0)


def test_tasks_without_names_cost_speed_and_no_picture() -> None:
    async def both(model: Prompted, other: int) -> list[Tensor]:
        first, _ = await asyncio.gather(stepping(Plan(5, falling(7)), model), stepping(Plan(other, falling(9)), model))
        return first

    options = {**EXACT, "warmup_steps": 0, "skip_interval": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        assert same(*(asyncio.run(both(enabled(options), seed)) for seed in (10, 20)))


def test_tasks_with_names_are_as_if_alone() -> None:
    model = enabled(WARM)
    plans = [Plan(5, falling(7)), Plan(15, falling(9)), Plan(25, falling(8), "heun")]

    async def named(n: int, plan: Plan) -> list[Tensor]:
        with cache_dit.context(model, f"request {n}"):
            return await stepping(plan, model)

    async def every() -> list[list[Tensor]]:
        return await asyncio.gather(*(named(n, plan) for n, plan in enumerate(plans)))

    for n, (found, plan) in enumerate(zip(asyncio.run(every()), plans, strict=True)):
        fresh = enabled(WARM)
        with cache_dit.context(fresh, f"request {n}"):
            assert same(found, generate(plan, fresh))


# A server.

REQUESTS, CANCELLED = 200, 5


def test_a_server_answers_two_hundred_requests_some_of_which_are_cancelled() -> None:
    """aiohttp on loopback, generating in threads, each request under its own name, several at once."""
    aiohttp = pytest.importorskip("aiohttp")
    from aiohttp import web

    model = enabled(WARM)
    plans = {n: Plan(10 * (n % 12), falling(5 + n % 3)) for n in range(REQUESTS)}
    gate = threading.Semaphore(4)
    cancelled = 0

    def answer(n: int, stop: threading.Event) -> list[float]:
        with gate, cache_dit.context(model, f"request {n}"), torch.no_grad():
            torch.manual_seed(0)
            output = torch.zeros(0)
            for made in calls_of(plans[n], model):
                output = made
                if stop.is_set():
                    raise asyncio.CancelledError
        return output.flatten().tolist()

    async def handle(request: Any) -> Any:
        stop = threading.Event()
        try:
            result = await asyncio.to_thread(answer, int(request.query["n"]), stop)
        except asyncio.CancelledError:
            stop.set()
            raise
        return web.json_response(result)

    async def ask(session: Any, url: str, n: int) -> list[float] | None:
        nonlocal cancelled
        if n % CANCELLED == 4:
            try:
                async with session.get(url, params={"n": n}, timeout=aiohttp.ClientTimeout(total=0.004)) as response:
                    await response.json()
            except (asyncio.TimeoutError, aiohttp.ClientError):
                cancelled += 1
            return None
        async with session.get(url, params={"n": n}) as response:
            found: list[float] = await response.json()
            return found

    async def serve() -> list[list[float] | None]:
        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as session:
                return await asyncio.wait_for(asyncio.gather(*(ask(session, url, n) for n in range(REQUESTS))), 240)
        finally:
            await runner.cleanup()

    answers = asyncio.run(serve())
    wanted: dict[Plan, list[float]] = {}
    for n, found in enumerate(answers):
        if found is None:
            continue
        if plans[n] not in wanted:
            fresh = enabled(WARM)
            with cache_dit.context(fresh, "request"):
                wanted[plans[n]] = generate(plans[n], fresh)[-1].flatten().tolist()
        assert found == wanted[plans[n]], n
    assert cancelled > REQUESTS // CANCELLED // 2
    assert hits_of(model) >= REQUESTS
    # names of requests come and go: what they stored does not pile up
    assert len(model._compiled_call_impl.session.contexts) <= 64


# Processes.

WORKERS = """
import multiprocessing, sys, types, warnings
tests = {tests!r}
for name, path in (("t", tests), ("t.reliability", tests + "/reliability")):
    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [path]
import torch
torch.set_num_threads(1)
from t.reliability.generations import EXACT, Plan, enabled, falling, generate, hits_of

def work(model, queue, place):
    torch.set_num_threads(1)
    import cache_dit
    if not isinstance(model._compiled_call_impl, object) or model._compiled_call_impl is None:
        # a model that was sent to another process is a copy: uncached
        cache_dit.enable_cache(model, **EXACT)
    outputs = generate(Plan(10 * place, falling(6)), model)
    queue.put((place, hits_of(model), [o.flatten().tolist() for o in outputs]))

if __name__ == "__main__":
    how = sys.argv[1]
    context = multiprocessing.get_context(how)
    model = enabled(EXACT)
    generate(Plan(10, falling(6)), model)
    queue = context.Queue()
    workers = [context.Process(target=work, args=(model, queue, place)) for place in ((1, 2) if how == "fork" else (1,))]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0, worker.exitcode
    for place, hits, outputs in results:
        wanted = generate(Plan(10 * place, falling(6)), enabled(EXACT))
        assert outputs == [o.flatten().tolist() for o in wanted], place
        assert hits in (2, 4), hits
    # the parent goes on as before
    assert hits_of(model) == 2
    generate(Plan(10, falling(6)), model)
    assert hits_of(model) == 4
    print("right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers(tmp_path: Any, how: str) -> None:
    """fork: the child goes on with what it had; spawn: the model arrives uncached, weights shared, and is enabled there."""
    from pathlib import Path

    script = tmp_path / "workers.py"
    script.write_text(WORKERS.format(tests=str(Path(__file__).resolve().parents[1])))
    done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "right"
