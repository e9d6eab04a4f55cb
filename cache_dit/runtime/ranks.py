"""Processes that run one model together: what they must have in common, and how they come to the same decision.

Where a forward holds collectives, a rank that skips while another computes leaves that one waiting for ever. So all
decisions are made from the same numbers: what the host knows is the same on all ranks, and what a rank measured is
exchanged in one small message a step, sent when the step has been computed and read when the next one is decided. Every
rank then takes the same mean of the same numbers, in the same order.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch

from ..errors import CacheDitError
from ..options import CacheOptions
from ..texts import text
from ..torch_internals import default_store, group_named, time_limit

# What each finder says of a module: the ranks that compute its forward together; () where there are none.
FINDERS: list[Callable[[torch.nn.Module], Collection[int]]] = []
# Options that ranks may have each its own of.
_OWN = ("debug", "enable_stats", "language", "group", "inner_options", "residual_device")

# how often each set of ranks has met
_meetings: Counter[tuple[int, ...]] = Counter()


def is_parallel() -> bool:
    """Whether this process is one of several of ``torch.distributed``."""
    distributed = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def tensor_ranks(module: torch.nn.Module) -> Collection[int]:
    """The ranks over which weights are spread as ``DTensor``: FSDP2 and tensor parallelism."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return ()
    spread = [weight for weight in module.parameters() if isinstance(weight, tensors.DTensor)]
    return {rank for weight in spread for rank in weight.device_mesh.mesh.flatten().tolist()}


FINDERS.append(tensor_ranks)


def gathers_by_hooks(module: torch.nn.Module) -> bool:
    """Whether parts of the module gather their weights in hooks of their own, as ``fully_shard`` has them do."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules() if part is not module)


def ranks_of_groups(names: Collection[str]) -> set[int]:
    """The members of the process groups that collectives in a graph name."""
    return {rank for name in names for rank in torch.distributed.get_process_group_ranks(group_named(name))}


def find_members(module: torch.nn.Module | None, option: Any, groups: Collection[str] = ()) -> list[int]:
    """The ranks that must decide alike, as the option ``group`` says; [] where this process decides by itself."""
    if option is False or not is_parallel():
        return []
    if option == "world":
        return list(range(torch.distributed.get_world_size()))
    if option != "auto":
        return sorted(torch.distributed.get_process_group_ranks(option))
    found: set[int] = ranks_of_groups(groups) if groups else set()
    for finder in FINDERS if module is not None else ():
        found.update(finder(module))  # type: ignore[arg-type]
    return sorted(found) if len(found) > 1 else []


@dataclass(slots=True)
class _Message:
    """What all ranks measured at one step, on its way."""

    work: Any
    gathered: list[torch.Tensor]
    received: list[list[float]] | None = None


class Ranks:
    """The ranks that decide alike with this one.

    Made at the first call of a model, on all of them: each waits until every other has come, and compares its options.

    Raises:
        CacheDitError: a rank did not come within the time limit of the process group, or has other options.
    """

    def __init__(self, members: Sequence[int], options: CacheOptions, kind: str) -> None:
        self.members, self._language = list(members), options.language
        self.rank = torch.distributed.get_rank()
        self.limit = time_limit()
        self.messages = 0
        given = self._exchange({"seed": torch.initial_seed() & 0x7FFFFFFF, **_comparable(options), "weights": kind})
        self.seed: int = given[self.members[0]].pop("seed")
        self._compare(given)
        self._group: Any = torch.distributed.new_group(
            self.members,
            timeout=timedelta(seconds=self.limit),
            use_local_synchronization=True,
            group_desc="cache_dit",
        )

    def _exchange(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """What each rank has to say, by way of the store that they met at: it knows who is missing."""
        store, place = default_store(), tuple(self.members)
        prefix = f"cache_dit/{'-'.join(map(str, place))}/{_meetings[place]}"
        _meetings[place] += 1
        store.set(f"{prefix}/{self.rank}", json.dumps(own))
        keys = {rank: f"{prefix}/{rank}" for rank in self.members}
        try:
            store.wait(list(keys.values()), timedelta(seconds=self.limit))
        except RuntimeError as error:
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            raise CacheDitError(text("ranks_missing", self._language, ranks=missing, seconds=self.limit)) from error
        return {rank: json.loads(store.get(key)) for rank, key in keys.items()}

    def _compare(self, given: dict[int, dict[str, Any]]) -> None:
        first = given[self.members[0]]
        for rank, theirs in given.items():
            theirs.pop("seed", None)
            differ = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
            if differ:
                shown = ", ".join(f"{name}={first.get(name)!r} / {theirs.get(name)!r}" for name in differ)
                raise CacheDitError(text("ranks_differ", self._language, a=self.members[0], b=rank, what=shown))

    def share(self, measured: Sequence[torch.Tensor]) -> list[Callable[[], list[float]]]:
        """Send what this rank measured at a step; for each of the tensors a function that waits for the mean over ranks."""
        flat = torch.cat([value.detach().to(torch.float32).reshape(-1) for value in measured])
        gathered = [torch.empty_like(flat) for _ in self.members]
        work = torch.distributed.all_gather(gathered, flat, group=self._group, async_op=True)
        self.messages += 1
        message = _Message(work, gathered)
        ends = list(itertools.accumulate(value.numel() for value in measured))
        starts = [0, *ends[:-1]]
        return [lambda a=a, b=b: self._mean(message, a, b) for a, b in zip(starts, ends, strict=True)]  # type: ignore[misc]

    def _mean(self, message: _Message, start: int, end: int) -> list[float]:
        if message.received is None:
            try:
                message.work.wait()
            except RuntimeError as error:
                why = str(error).strip().splitlines()[0] if str(error).strip() else ""
                raise CacheDitError(text("ranks_late", self._language, seconds=self.limit, why=why)) from error
            message.received = [each.tolist() for each in message.gathered]
        return [_mean([row[i] for row in message.received]) for i in range(start, end)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _comparable(options: CacheOptions) -> dict[str, Any]:
    known = {each.name: getattr(options, each.name) for each in fields(options) if each.name not in _OWN}
    return {**{name: repr(value) for name, value in known.items()}, "torch": torch.__version__}


def measures(options: CacheOptions) -> bool:
    """Whether what is done at a step depends on what was measured at earlier ones, and so has to be exchanged."""
    adapts = options.schedule is None and options.strategy not in ("fixed", "dynamic")
    return adapts or options.forecast == "auto"
