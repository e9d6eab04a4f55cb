"""What a cached model gives, in eager and as plainly as can be. Knows nothing of the package."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Staged(Protocol):
    """A model that can be run piece by piece."""

    depth: int

    def before(self, x: Tensor, t: Tensor) -> State: ...
    def block(self, place: int, state: State, entered: list[State], t: Tensor) -> State: ...
    def after(self, state: State, t: Tensor) -> Tensor: ...


class Interpreter:
    """Runs the blocks [front, depth - back), or adds what they added when they last ran, as the fixed strategy says.

    ``whole``: gives what they gave, and adds nothing.
    """

    def __init__(
        self, model: Staged, front: int, back: int, warmup: int, interval: int, most: int, schedule: str | None, whole: bool
    ) -> None:
        self.model, self.cached, self.schedule = model, range(front, model.depth - back), schedule
        self.whole = whole
        self.warmup, self.interval, self.most = warmup, interval, most
        self.begin_run()

    def begin_run(self) -> None:
        self.step, self.row, self.added = 0, 0, None
        self.times: list[float] = []

    def forget(self) -> None:
        """What is stored is not valid any more."""
        self.added: Any = None

    def is_due(self) -> bool:
        if self.step == 1:
            return False
        if self.schedule is not None:
            return self.step <= len(self.schedule) and self.schedule[self.step - 1] == "0"
        return self.step > self.warmup and self.step % self.interval == 0 and self.row < self.most

    def __call__(self, x: Tensor, t: Tensor) -> tuple[bool, Tensor]:
        """Whether the blocks were skipped, and the output."""
        time = float(t.max())
        if len(self.times) > 1 and (time - self.times[-1]) * (self.times[1] - self.times[0]) < 0:
            self.begin_run()
        self.times, self.step = [*self.times, time], self.step + 1
        due = self.is_due()
        self.row = self.row + 1 if due else 0
        skips = due and self.added is not None
        state, entered = self.model.before(x, t), list[State]()
        for place in range(self.model.depth):
            if place == self.cached.start:
                base = tuple(map(torch.zeros_like, state)) if self.whole else state
            if place in self.cached and skips:
                state = tuple(b + a for b, a in zip(base, self.added, strict=True))
            else:
                state = self.model.block(place, state, entered, t)
            if place in self.cached and place == self.cached.stop - 1 and not skips:
                self.added = tuple(s - b for s, b in zip(state, base, strict=True))
        return skips, self.model.after(state, t)


def run(model: Interpreter, x: Tensor, t: Tensor) -> tuple[bool, Tensor]:
    with torch.no_grad():
        return model(x, t)
