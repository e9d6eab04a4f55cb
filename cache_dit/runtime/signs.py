"""Signs that a call belongs to another generation than the last call of its context, where no name says which it is.

Two generations that take turns on one model, or a run that was cut off and begun anew, may keep to the pattern by which
unnamed contexts are told. Their callers and their prompts are other objects all the same.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable, Sequence

import torch

Steady = tuple[int, "weakref.ref[torch.Tensor]"]
# Arguments of former runs that are remembered.
MAX_FORMER = 64


class Former:
    """What former runs were called with throughout: an argument's place and the tensor that stood there."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        # by place and id, which tells in one look-up that a tensor is none of them
        self._kept: dict[tuple[int, int], weakref.ref[torch.Tensor]] = {}

    def extend(self, steady: Iterable[Steady]) -> None:
        """Remember these, and forget the oldest beyond a bound."""
        for place, reference in steady:
            tensor = reference()
            if tensor is not None:
                self._kept.pop((place, id(tensor)), None)
                self._kept[place, id(tensor)] = reference
        while len(self._kept) > MAX_FORMER:
            del self._kept[next(iter(self._kept))]

    def holds_one_of(self, tensors: Sequence[torch.Tensor], same: Sequence[bool]) -> bool:
        """Whether one of these arguments was theirs, and is not ``same`` as that of the last call."""
        if not self._kept:
            return False
        for place, known in enumerate(same):
            if not known:
                reference = self._kept.get((place, id(tensors[place])))
                # a tensor that is gone leaves its id to others
                if reference is not None and reference() is tensors[place]:
                    return True
        return False


class Signs:
    """Who made the last call of a context, and with what."""

    __slots__ = ("_caller", "_given", "_steady", "_step")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next call may come from anyone."""
        self._caller: weakref.ref[object] | None = None
        self._given: list[weakref.ref[torch.Tensor]] = []
        # which arguments were the same object at every call; None before the second one
        self._steady: list[bool] | None = None
        self._step = 0

    def note(self, step: int, caller: object, tensors: Sequence[torch.Tensor], same: list[bool] | None = None) -> None:
        """Remember a call. ``same``: what `same` says of its arguments, where the caller has asked."""
        known = self.same(tensors) if same is None else same
        given = self._given
        if self._step:
            if self._steady is None:
                self._steady = known
            elif self._steady != known:
                self._steady = [a and b for a, b in zip(self._steady, known, strict=False)]
        if self._caller is None or self._caller() is not caller:
            self._caller = weakref.ref(caller)
        if len(given) == len(tensors) == len(known):
            for place, unchanged in enumerate(known):
                if not unchanged:
                    given[place] = weakref.ref(tensors[place])
        else:
            self._given = [weakref.ref(tensor) for tensor in tensors]
        self._step = step

    def has_other_caller(self, caller: object) -> bool:
        """Whether the call comes from another thread or task than the last one."""
        return self._caller is not None and self._caller() is not caller

    def same(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """Which of these arguments are the objects that the last call had."""
        return [reference() is tensor for reference, tensor in zip(self._given, tensors, strict=False)]

    def differ(self, same: list[bool]) -> bool:
        """Whether an argument that was the same object at every call so far is another one."""
        steady = self._steady
        if steady is None or steady == same:
            return False
        return any(a and not b for a, b in zip(steady, same, strict=False))

    def belong_to(self, others: Iterable[Signs], tensors: Sequence[torch.Tensor], same: Sequence[bool]) -> bool:
        """Whether an argument is the one that another context had in this context's last step, and this one had not."""
        theirs = [each.same(tensors) for each in others if each._step == self._step]
        return any(b and not a for their in theirs for a, b in zip(same, their, strict=False))

    def steady(self) -> list[Steady]:
        """The arguments that were the same object at every call, by their places."""
        steady = self._steady or ()
        return [(place, reference) for place, reference in enumerate(self._given[: len(steady)]) if steady[place]]


def current_caller() -> object:
    """The asyncio task that is running, else the thread."""
    # asked first, since `current_task` raises where no loop runs
    if asyncio._get_running_loop() is None:
        return threading.current_thread()
    return asyncio.current_task() or threading.current_thread()
