"""Ranks that decide alike, each a thread of this process: what they compare, exchange and say.

The processes themselves are in tests/distributed; here the store is a real one, and the collective is one over threads.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_dit.errors import CacheDitError
from cache_dit.options import CacheOptions, resolve_options
from cache_dit.runtime import ranks
from cache_dit.runtime.ranks import Ranks, find_members, measures

LIMIT = 0.5
_rank = threading.local()


class World:
    """Several ranks: a store that they met at, and what they gather."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = torch.distributed.HashStore()
        self.groups: list[tuple[tuple[int, ...], float, dict[str, Any]]] = []
        self.gathers = 0
        # what the next gathering ends in, where that is an error
        self.fault: Exception | None = None
        self._sent: dict[tuple[int, int], Tensor] = {}
        self._count: dict[int, int] = {}
        self._all = threading.Condition()

    def rank(self) -> int:
        return int(_rank.value)

    def new_group(self, members: Sequence[int], timeout: timedelta, **more: Any) -> tuple[int, ...]:
        self.groups.append((tuple(members), timeout.total_seconds(), more))
        return tuple(members)

    def all_gather(self, gathered: list[Tensor], value: Tensor, group: tuple[int, ...], async_op: bool) -> Any:
        assert async_op and len(gathered) == len(group)
        with self._all:
            n = self._count[self.rank()] = self._count.get(self.rank(), -1) + 1
            self._sent[self.rank(), n] = value.clone()
            self._all.notify_all()

        def wait() -> None:
            self.gathers += 1
            if self.fault is not None:
                raise self.fault
            with self._all:
                assert self._all.wait_for(lambda: all((rank, n) in self._sent for rank in group), 30)
            for place, rank in zip(gathered, group, strict=True):
                place.copy_(self._sent[rank, n])

        return SimpleNamespace(wait=wait)


class Meetings:
    """How often each rank has met each set of others: each is a process of its own otherwise."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, tuple[int, ...]]] = Counter()

    def __getitem__(self, members: tuple[int, ...]) -> int:
        return self._counts[_rank.value, members]

    def __setitem__(self, members: tuple[int, ...], count: int) -> None:
        self._counts[_rank.value, members] = count


@pytest.fixture
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(getattr(request, "param", 2))
    monkeypatch.setattr(ranks, "_meetings", Meetings())
    monkeypatch.setattr(ranks, "default_store", lambda: made.store)
    monkeypatch.setattr(ranks, "time_limit", lambda: LIMIT)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.distributed, name, lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: made.size)
    monkeypatch.setattr(torch.distributed, "get_rank", made.rank)
    monkeypatch.setattr(torch.distributed, "new_group", made.new_group)
    monkeypatch.setattr(torch.distributed, "all_gather", made.all_gather)
    return made


def on_each(members: Sequence[int], work: Callable[[int], Any]) -> list[Any]:
    """What the work gives on each of these ranks: its result, or its error."""
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        _rank.value = rank
        try:
            found[rank] = work(rank)
        except CacheDitError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in members]


def options(**given: Any) -> CacheOptions:
    return resolve_options({"language": "en", **given})


def met(members: Sequence[int], of: Callable[[int], CacheOptions] = lambda rank: options(), kind: str = "Tensor") -> list[Any]:
    """These ranks, having met; where they could not, the error of each."""
    return on_each(members, lambda rank: Ranks(members, of(rank), kind))


# Who decides alike.


def test_one_process_by_itself_has_no_members(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.is_parallel()
    world.size = 1
    assert not ranks.is_parallel() and find_members(None, "world") == []
    world.size = 2
    for name in ("is_available", "is_initialized"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, name, lambda: False)
            assert not ranks.is_parallel() and find_members(None, "world") == []


@pytest.mark.parametrize("world", [4], indirect=True)
def test_members_are_those_that_the_option_names_else_those_that_are_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"tp": [3, 1], "cp": [1, 2], "alone": [2]}
    monkeypatch.setattr(ranks, "group_named", groups.__getitem__)
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: group)
    monkeypatch.setattr(ranks, "FINDERS", [lambda module: (), lambda module: {0, 3}, lambda module: [2]])
    module = nn.Linear(2, 2)
    assert find_members(module, False) == [] == find_members(module, False, ["tp"])
    # strings that are read from a file are other objects
    assert find_members(module, "world") == find_members(module, "".join(("wor", "ld"))) == [0, 1, 2, 3]
    # a process group itself
    assert find_members(module, [3, 0]) == [0, 3]
    assert find_members(None, "auto") == [] == find_members(None, "auto", ["alone"])
    assert find_members(None, "auto", ["tp", "cp"]) == [1, 2, 3]
    assert find_members(module, "auto") == find_members(module, "".join(("au", "to"))) == [0, 2, 3]
    assert find_members(module, "auto", ["tp"]) == [0, 1, 2, 3]


def test_ranks_of_sharded_weights_are_those_of_their_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(nn.Parameter):
        device_mesh = SimpleNamespace(mesh=torch.tensor([[0, 2], [4, 6]]))

    module = nn.Module()
    module.plain = nn.Parameter(torch.zeros(1))
    monkeypatch.setitem(ranks.sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=Sharded))
    assert set(ranks.tensor_ranks(module)) == set()
    module.sharded = Sharded(torch.zeros(1))
    assert set(ranks.tensor_ranks(module)) == {0, 2, 4, 6}
    assert ranks.tensor_ranks in ranks.FINDERS
    monkeypatch.delitem(ranks.sys.modules, "torch.distributed.tensor")
    assert ranks.tensor_ranks(module) == ()


def test_parts_that_gather_their_weights_are_told_from_the_module_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gathering(nn.Module):
        pass

    monkeypatch.setitem(ranks.sys.modules, "torch.distributed.fsdp", SimpleNamespace(FSDPModule=Gathering))
    assert not ranks.gathers_by_hooks(Gathering())
    assert not ranks.gathers_by_hooks(nn.Sequential(nn.Linear(2, 2)))
    assert ranks.gathers_by_hooks(nn.Sequential(nn.Linear(2, 2), Gathering()))
    monkeypatch.delitem(ranks.sys.modules, "torch.distributed.fsdp")
    assert not ranks.gathers_by_hooks(nn.Sequential(Gathering()))


# Meeting.


@pytest.mark.parametrize("world", [4], indirect=True)
def test_ranks_that_have_met_have_the_seed_of_the_first_and_a_group_of_their_own(world: World) -> None:
    torch.manual_seed(2**31 + 5)
    found = met([1, 3])
    assert [each.seed for each in found] == [5, 5]
    assert [each.rank for each in found] == [1, 3] and all(each.members == [1, 3] for each in found)
    assert [each.messages for each in found] == [0, 0] and found[0].limit == LIMIT
    more = {"use_local_synchronization": True, "group_desc": "cache_dit"}
    assert world.groups == [((1, 3), LIMIT, more)] * 2


def test_each_meeting_is_another_one(world: World) -> None:
    """What was said at the last one is not heard at the next."""
    assert all(isinstance(each, Ranks) for each in met([0, 1], lambda rank: options(skip_interval=2)))
    assert all(isinstance(each, Ranks) for each in met([0, 1], lambda rank: options(skip_interval=3)))
    found = met([0, 1], lambda rank: options(skip_interval=4 + rank))
    assert all(isinstance(each, CacheDitError) for each in found)


def test_ranks_with_other_options_are_told_which_and_of_whom(world: World) -> None:
    found = met([0, 1], lambda rank: options(skip_interval=2 + rank, warmup_steps=rank))
    assert [type(each) for each in found] == [CacheDitError] * 2
    assert all("Ranks 0 and 1 differ: skip_interval=2 / 3, warmup_steps=0 / 1" in str(each).replace("'", "") for each in found)


def test_ranks_whose_weights_are_of_other_kinds_differ(world: World) -> None:
    found = on_each([0, 1], lambda rank: Ranks([0, 1], options(), ("Tensor", "DTensor")[rank]))
    assert all("weights='Tensor' / 'DTensor'" in str(each) for each in found)


def test_a_rank_of_another_version_which_knows_other_options_differs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ranks._comparable
    monkeypatch.setattr(ranks, "_comparable", lambda given: {**known(given), **({"later": "1"} if world.rank() else {})})
    assert all("later=None / '1'" in str(each) for each in met([0, 1]))


def test_what_each_rank_may_have_of_its_own_is_not_compared(world: World) -> None:
    own: list[dict[str, Any]] = [
        {},
        {
            "debug": True,
            "enable_stats": False,
            "group": "world",
            "inner_options": {"max_autotune": True},
            "residual_device": "cpu",
            "language": "zh",
        },
    ]
    torch.manual_seed(3)
    assert all(isinstance(each, Ranks) for each in met([0, 1], lambda rank: options(**own[rank])))


@pytest.mark.parametrize("world", [3], indirect=True)
def test_a_rank_that_does_not_come_is_named(world: World) -> None:
    members = [0, 1, 2]
    found = on_each([0, 2], lambda rank: Ranks(members, options(), ""))
    assert all(isinstance(each, CacheDitError) and "Ranks [1] have not come within" in str(each) for each in found)
    assert all(isinstance(each.__cause__, RuntimeError) for each in found)


# What was measured.


@pytest.mark.parametrize("world", [3], indirect=True)
def test_every_rank_reads_the_mean_of_what_all_measured_tensor_by_tensor(world: World) -> None:
    members = [0, 1, 2]
    found = met(members)

    def work(rank: int) -> list[list[float]]:
        given = [torch.tensor([1.0, 2.0]) * (rank + 1), torch.tensor([[10.0, 0.5], [0.25, 7.0 * rank]], dtype=torch.float64)]
        readers = found[rank].share(given)
        before = world.gathers
        assert before in range(3)
        return [read() for read in (*readers, readers[0])]

    wanted = [[2.0, 4.0], [10.0, 0.5, 0.25, 7.0], [2.0, 4.0]]
    assert on_each(members, work) == [wanted] * 3
    # each waited once, and only when asked
    assert world.gathers == 3
    assert [each.messages for each in found] == [1, 1, 1]


def test_nothing_is_waited_for_before_it_is_read(world: World) -> None:
    found = met([0, 1])
    (readers,) = on_each([0], lambda rank: found[0].share([torch.ones(1)]))
    assert world.gathers == 0 and found[0].messages == 1 and len(readers) == 1
    on_each([1], lambda rank: found[1].share([torch.full((1,), 3.0)]))
    assert readers[0]() == [2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_on_one_rank_is_nan_on_all(world: World, value: float) -> None:
    found = met([0, 1])

    def work(rank: int) -> list[float]:
        (read,) = found[rank].share([torch.tensor([value if rank else 1.0, 2.0])])
        return list(read())

    for first, second in on_each([0, 1], work):
        assert math.isnan(first) and second == 2.0


@pytest.mark.parametrize(("said", "why"), [("connection closed\nby peer", "connection closed"), ("  ", "")])
def test_ranks_that_do_not_answer_are_an_error_of_ours(world: World, said: str, why: str) -> None:
    found = met([0, 1])
    world.fault = RuntimeError(said)

    def work(rank: int) -> None:
        found[rank].share([torch.ones(1)])[0]()

    for error in on_each([0, 1], work):
        assert isinstance(error, CacheDitError) and error.__cause__ is world.fault
        first = str(error).splitlines()[0]
        assert first.endswith(f": {why}") and "by peer" not in str(error)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({"strategy": "fixed", "forecast": "reuse"}, False),
        ({"strategy": "dynamic", "forecast": "taylor"}, False),
        ({"strategy": "fixed", "forecast": "auto"}, True),
        ({"strategy": "adaptive", "forecast": "reuse"}, True),
        ({"strategy": "adaptive", "forecast": "reuse", "schedule": "1010"}, False),
        ({"strategy": "adaptive", "forecast": "auto", "schedule": "1010"}, True),
    ],
)
def test_what_is_measured_is_exchanged_where_a_decision_or_a_forecast_goes_by_it(given: dict[str, Any], shares: bool) -> None:
    assert measures(options(**given)) is shares
