"""The profile of the host's time: what belongs to which part, by a clock that the test turns."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def host_time(benchmarks: None) -> ModuleType:
    import host_time

    return host_time


class Clock:
    """Tells the seconds that have been spent."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def spend(self, seconds: float) -> None:
        self.seconds += seconds


def test_a_part_takes_what_is_not_spent_in_another(host_time: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class Call:
        def whole(self) -> str:
            clock.spend(1.0)
            self.weights()
            clock.spend(2.0)
            self.nothing_asked_for()
            self.weights()
            return "given"

        def weights(self) -> None:
            clock.spend(8.0)

        def nothing_asked_for(self) -> None:
            clock.spend(16.0)

    before = dict(vars(Call))
    monkeypatch.setattr(host_time.time, "perf_counter", clock)
    monkeypatch.setattr(host_time, "PARTS", {"brackets": ((Call, "whole"),), "weights": ((Call, "weights"),)})
    with host_time.Parts() as parts:
        assert Call().whole() == "given"
        assert parts.read() == {"brackets": 19.0, "weights": 16.0}
        assert parts.read() == {"brackets": 0.0, "weights": 0.0}
        # what an error leaves is counted too
        monkeypatch.setattr(Call, "nothing_asked_for", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Call().whole()
        assert parts.read() == {"brackets": 3.0, "weights": 8.0}
    assert vars(Call)["whole"] is before["whole"] and vars(Call)["weights"] is before["weights"]


@pytest.mark.slow
def test_every_part_of_a_call_is_found(host_time: ModuleType, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """Renamed functions of the runtime would fail here; what only one kind of call goes through is 0 in the other."""
    monkeypatch.setattr(host_time, "CALLS", host_time.SETTLED + 10)
    found = host_time.parts_of("demo")
    assert list(found) == ["computing", "skipping"]
    for parts in found.values():
        assert list(parts) == list(host_time.PARTS)
    zero = {part for part, microseconds in found["skipping"].items() if microseconds == 0.0}
    assert zero == {"what the last step measured", "residuals take turns"}
    assert all(microseconds > 0.0 for microseconds in found["computing"].values())
