"""How calls are timed: by the host's clock, or by events of a device that queues work, here one that the test drives."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from cache_dit.runtime.timing import CallTimer
from cache_dit.statistics import Counters


class HostClock:
    """Stands still until it is moved on."""

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """A device: what is recorded passes when the test lets it, at a time that the test says."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, device: object, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self, device)


class Event:
    def __init__(self, queue: Queue, device: object) -> None:
        self._queue, self.device, self.passed_at = queue, device, None

    passed_at: float | None

    def record(self) -> None:
        self._queue.events.append(self)

    def query(self) -> bool:
        return self.passed_at is not None

    def elapsed_time(self, end: Event) -> float:
        """In milliseconds."""
        assert self.passed_at is not None and end.passed_at is not None
        return end.passed_at - self.passed_at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HostClock:
    clock = HostClock()
    monkeypatch.setattr("cache_dit.runtime.timing.perf_counter", clock)
    return clock


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(torch, "Event", queue.event)
    return queue


def of(counters: Counters) -> tuple[int, float, int, float]:
    return (
        counters.compute_calls_timed,
        counters.compute_seconds,
        counters.reuse_calls_timed,
        counters.reuse_seconds,
    )


def test_on_a_cpu_the_hosts_clock_is_the_measure(clock: HostClock, queue: Queue) -> None:
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    booked: list[float] = []
    timer.booked = booked.append
    timer.watch(torch.device("cpu"))
    for seconds, reused in ((2.0, False), (0.5, True), (4.0, False), (0.25, True)):
        timer.start()
        clock.now += seconds
        assert timer.elapsed() == seconds
        timer.book(reused)
    assert of(counters) == (2, 6.0, 2, 0.75)
    assert booked == [2.0, 0.5, 4.0, 0.25]
    assert queue.events == []


def test_on_a_device_calls_are_booked_once_their_events_have_passed_and_in_their_order(clock: HostClock, queue: Queue) -> None:
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    booked: list[float] = []
    timer.booked = booked.append
    device = torch.device("cuda", 1)
    timer.watch(device)
    for reused in (False, True, False):
        timer.start()
        # each graph names the device anew
        timer.watch(torch.device("cuda", 1))
        clock.now += 50.0
        timer.book(reused)
    assert [event.device for event in queue.events] == [device] * 6
    assert of(counters) == (0, 0.0, 0, 0.0)
    # the third has passed, the second has begun: nobody waits, and nothing is booked before its turn
    for event, time in zip(queue.events, (1000.0, 3000.0, 3000.0, None, 7000.0, 7500.0), strict=True):
        event.passed_at = time
    timer.collect()
    assert of(counters) == (1, 2.0, 0, 0.0)
    queue.events[3].passed_at = 3250.0
    timer.collect()
    assert of(counters) == (2, 2.5, 1, 0.25)
    assert booked == [2.0, 0.25, 0.5]
    timer.collect()
    assert of(counters) == (2, 2.5, 1, 0.25)


def test_a_booked_call_collects_those_before_it(clock: HostClock, queue: Queue) -> None:
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    timer.watch(torch.device("cuda", 0))
    timer.start()
    timer.book(False)
    queue.events[0].passed_at, queue.events[1].passed_at = 0.0, 1000.0
    timer.start()
    timer.book(True)
    assert of(counters) == (1, 1.0, 0, 0.0)


def test_a_model_that_moves_is_timed_where_it_is(clock: HostClock, queue: Queue) -> None:
    """By the host's clock in the call that finds it elsewhere: events of two devices have no time between them."""
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    first, second, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    timed = []
    for device in (first, first, second, second, cpu, cpu, first):
        before = len(queue.events)
        timer.start()
        # where a model runs is seen when its graph is
        timer.watch(device)
        clock.now += 1.0
        timer.book(False)
        timed.append([event.device for event in queue.events[before:]])
    # the events of a call in which it moved are begun and not used
    assert timed == [[], [first, first], [first], [second, second], [second], [], []]
    assert (counters.compute_calls_timed, counters.compute_seconds) == (5, 5.0)
    for event, time in zip(queue.events, (0.0, 2000.0, None, 0.0, 4000.0, None), strict=True):
        event.passed_at = time
    timer.collect()
    assert (counters.compute_calls_timed, counters.compute_seconds) == (7, 11.0)


@pytest.mark.parametrize("other", ["collect", "reset"])
def test_another_thread_may_collect_or_forget_while_a_call_is_booked(
    clock: HostClock, queue: Queue, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Statistics are read and set to zero at any time: here between the question whether an event has passed and its use."""
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    timer.watch(torch.device("cuda", 0))
    threads: list[threading.Thread] = []

    def query(event: Event) -> bool:
        if not threads:
            threads.append(threading.Thread(target=getattr(timer, other), daemon=True))
            threads[0].start()
            threads[0].join(0.2)
        return True

    monkeypatch.setattr(Event, "query", query)
    monkeypatch.setattr(Event, "elapsed_time", lambda begin, end: 1000.0)
    timer.start()
    timer.book(False)
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert of(counters) == (1, 1.0, 0, 0.0)


def test_a_call_forgotten_while_its_end_is_recorded_fails_nothing(
    clock: HostClock, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    timer.watch(torch.device("cuda", 0))
    timer.start()
    record = Event.record

    def forgetting(event: Event) -> None:
        timer.reset()
        record(event)

    monkeypatch.setattr(Event, "record", forgetting)
    timer.book(True)
    for event in queue.events:
        event.passed_at = 1000.0
    timer.collect()
    assert counters.reuse_calls_timed == 1


@pytest.mark.parametrize("end", ["discard", "reset"])
def test_a_call_that_is_discarded_is_not_booked(clock: HostClock, queue: Queue, end: str) -> None:
    counters = Counters(timed=True)
    timer = CallTimer(counters)
    timer.watch(torch.device("cuda", 0))
    timer.start()
    timer.book(False)
    timer.start()
    getattr(timer, end)()
    # what is booked behind it is what the host's clock says: no event of the discarded call is taken for its beginning
    clock.now += 3.0
    timer.book(True)
    for event in queue.events:
        event.passed_at = 1000.0
    timer.collect()
    assert of(counters) == ((1, 0.0, 1, 3.0) if end == "discard" else (0, 0.0, 1, 3.0))


def test_times_are_kept_in_the_counters_that_were_given(clock: HostClock) -> None:
    first: Any = Counters(timed=True)
    timer = CallTimer(first)
    timer.start()
    clock.now += 1.0
    timer.book(False)
    first.reset()
    assert of(first) == (0, 0.0, 0, 0.0)
    timer.start()
    clock.now += 2.0
    timer.book(False)
    assert of(first) == (1, 2.0, 0, 0.0)
