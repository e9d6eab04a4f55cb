"""Caching written by hand in eager PyTorch: what compiled caching is compared with. Knows nothing of the package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class EagerCache:
    """Takes over the blocks [front, N - back) of a model: they compute, or add what they added when they last computed.

    Args:
        blocks: all blocks in execution order.
        streams: the arguments of a block that carry hidden states, in the order in which it returns them.
        front, back: blocks that always compute.

    Before each call of the model the caller sets ``skip``, and ``context`` where there are several.
    ``residuals[context]`` holds what was added to each stream.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], streams: Sequence[str] = ("hidden_states",), front: int = 1, back: int = 0
    ) -> None:
        self.skip = False
        self.context: Hashable = 0
        self.residuals: dict[Hashable, list[Tensor | None]] = {}
        self._streams = tuple(streams)
        self._entered: list[Tensor] = []
        chain = list(blocks)
        region = chain[front : len(chain) - back]
        self._first, self._last = region[0], region[-1]
        for block in region:
            block.forward = functools.partial(self._run, block, block.forward)  # type: ignore[method-assign]

    def _run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(forward).bind(*args, **kwargs).arguments
        streams: list[Tensor] = [given[name] for name in self._streams]
        if block is self._first:
            self._entered = streams
        made: Sequence[Tensor | None] = streams
        if not self.skip:
            result = forward(*args, **kwargs)
            made = (result,) if isinstance(result, Tensor) else result
            if block is self._last:
                added = [None if out is None else out - x for out, x in zip(made, self._entered, strict=True)]
                self.residuals[self.context] = added
        elif block is self._last:
            stored = self.residuals[self.context]
            made = [None if added is None else x + added for x, added in zip(streams, stored, strict=True)]
        return made[0] if len(self._streams) == 1 else tuple(made)


def rms(values: Tensor) -> float:
    """The root mean square."""
    return float(torch.linalg.vector_norm(values.double()) / values.numel() ** 0.5)
