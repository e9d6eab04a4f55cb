"""What a tiny model is: a class of diffusers by name, its configuration, and the inputs of each step of a run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CLASS = re.compile(r"^class (\w+)\(([^)]*)\):", re.MULTILINE)
_NAME = re.compile(r"Transformer|DiT|DiffuserModel")


@functools.lru_cache(maxsize=1)
def discovered() -> dict[str, str]:
    """Name of each transformer class of the installed diffusers -> the module that defines it.

    These are the models (``ModelMixin``) of ``diffusers.models.transformers``, those defined elsewhere with
    "Transformer", "DiT" or "DiffuserModel" in their names, and modules named "Transformer…Model". Read from the
    sources: importing every pipeline takes minutes.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    found = {}
    folders = ("models", "pipelines", "modular_pipelines")
    for path in sorted(path for folder in folders for path in root.glob(f"{folder}/**/*.py")):
        place = path.relative_to(root).with_suffix("").parts
        if "autoencoders" in place:
            continue
        for name, bases in _CLASS.findall(path.read_text()):
            is_model = "ModelMixin" in bases and (place[:2] == ("models", "transformers") or _NAME.search(name))
            if is_model or (re.fullmatch(r"\w*Transformer\w*Model", name) and "nn.Module" in bases):
                found[name] = ".".join(("diffusers", *place))
    return found


class Draw:
    """Random inputs from a generator of their own, so that the global one stays untouched."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator)


@contextmanager
def _memory_filled() -> Iterator[None]:
    """New tensors hold NaN where nothing was written to them: a class that leaves weights as memory comes is noticed."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A class of diffusers in a size that runs in milliseconds.

    Args:
        name: the class.
        config: its configuration.
        inputs: the inputs of a call, drawn once for a run.
        time: the input that is the timestep; None where the class takes none.
        moves: the inputs that change a little from step to step.
        variant: tells several configurations of one class apart.
        streams: whether all the blocks take their streams from the block before, so that bypassing them one by one in
            eager is the same as leaving the whole part out.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    time: str | None = "timestep"
    moves: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    variant: str = ""
    streams: bool = True

    @property
    def label(self) -> str:
        """The class, and the variant where there are several."""
        return f"{self.name}+{self.variant}" if self.variant else self.name

    def build(self) -> nn.Module:
        """The model with random weights: also where the class begins with zeros, or with memory as it comes."""
        module = importlib.import_module(discovered()[self.name])
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            with _memory_filled():
                model: nn.Module = getattr(module, self.name)(**self.config).eval()
            for parameter in model.parameters():
                size = float(parameter.double().abs().mean())
                if not 1e-4 < size < 10.0:
                    parameter.normal_(std=0.2)
        return model

    def run(self, steps: int, seed: int = 0) -> list[dict[str, Any]]:
        """The inputs of each step: the timestep falls, what is named in ``moves`` drifts."""
        return [self._at(step, steps, seed) for step in range(steps)]

    def _at(self, step: int, steps: int, seed: int) -> dict[str, Any]:
        given, drift = self.inputs(Draw(seed)), Draw(seed + 1)
        for name in self.moves:
            if name in given:
                given[name] = _moved(given[name], drift, 0.1 * step)
        if self.time is not None:
            given[self.time] = _earlier(given[self.time], step, steps)
        return given


def _moved(value: Any, drift: Draw, size: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, drift, size) for part in value)
    return value + size * drift(*value.shape) if isinstance(value, Tensor) and value.is_floating_point() else value


def _earlier(time: Any, step: int, steps: int) -> Any:
    if isinstance(time, Tensor) and not time.is_floating_point():
        return time * (steps - step) // steps
    return time * (steps - step) / steps if isinstance(time, Tensor) else int(time * (steps - step) / steps)
