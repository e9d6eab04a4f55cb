"""What an artifact says of itself: a JSON file in its package, and the conditions under which it may run."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..calibration import Calibration
from ..graph_report import RegionReport, ValueReport
from ..options import CacheOptions
from ..passes.insert_cache_branch import CacheInputs, ResidualBuffer
from .sizes import Size

FORMAT = 3
"""Raised where older loaders would read an artifact wrongly."""
MANIFEST_NAME = "cache_dit.json"
COMPUTE_PROGRAM, REUSE_PROGRAM = "model", "reuse"
"""Names of the programs in the package; the first is the one that ``aoti_load_package`` takes by default."""


@dataclass(frozen=True, slots=True)
class Input:
    """One leaf of the arguments. A tensor has dtype and sizes; anything else is a constant that was compiled in."""

    path: str
    dtype: str | None = None
    sizes: tuple[Size, ...] = ()
    value: Any = None


@dataclass(frozen=True, slots=True)
class Buffer:
    """One cache buffer. ``scale``: dtype of the scales of its rows, where it has any."""

    sizes: tuple[Size, ...]
    dtype: str
    device: str
    scale: str | None = None

    @property
    def scales(self) -> Buffer | None:
        """The buffer of the scales."""
        return None if self.scale is None else Buffer((*self.sizes[:-1], 1), self.scale, self.device)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of it.

    Attributes:
        torch: version of torch that compiled the programs.
        device, machine: type of the device, and what torch says of it (instruction set, compute capability).
        options: options of the export, without what is None and without defaults that follow from other options.
        parameters: names of the model's parameters in order, as far as they can be given by place.
        names, spec: names of the arguments, and the structure of their values.
        inputs: leaves of the arguments.
        symbols: smallest and largest value of each dynamic size.
        guards: what must hold of them besides.
        output: structure of the result, with numbers for its tensors.
        outputs: how many tensors the model returns.
        time: place of the timestep among the tensors.
        controls: places among the tensors of what enters the cached blocks from outside.
        repeats: whether the program that predicts may be run once more.
        programs: for each program which of the tensors, followed by the cache inputs, it takes.
    """

    torch: str
    device: str
    machine: dict[str, str]
    options: dict[str, Any]
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    spec: str
    inputs: tuple[Input, ...]
    symbols: dict[str, tuple[int, int | None]]
    guards: tuple[Size, ...]
    output: Any
    outputs: int
    time: int | None
    controls: tuple[int, ...]
    repeats: bool
    history: int
    accumulate: str
    residuals: tuple[Buffer, ...]
    front: Buffer | None
    programs: dict[str, tuple[int, ...]]
    region: RegionReport
    nodes: int
    model: str
    cache_dit: str
    format: int = FORMAT

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @property
    def tensors(self) -> list[Input]:
        """The leaves that are tensors: what the programs take, in order."""
        return [each for each in self.inputs if each.dtype is not None]

    @property
    def stored(self) -> list[Buffer]:
        """As `CacheInputs.stored`."""
        return [buffer for residual in self.residuals for buffer in (residual, residual.scales) if buffer is not None]

    def cache_inputs(self) -> CacheInputs:
        """What the programs take behind the tensors. Sizes are left to `Sizes`: the runtime asks for them at each call."""

        def buffer(each: Buffer) -> ResidualBuffer:
            known = tuple(size if isinstance(size, int) else -1 for size in each.sizes)
            scale = None if each.scale is None else dtype_of(each.scale)
            return ResidualBuffer(known, dtype_of(each.dtype), torch.device(each.device), scale)

        return CacheInputs(
            tuple(map(buffer, self.residuals)),
            self.history,
            None if self.front is None else buffer(self.front),
            dtype_of(self.accumulate),
            torch.device(self.device),
        )


def loads(content: str) -> Manifest:
    """The manifest from its JSON.

    Raises:
        ValueError, TypeError, KeyError: it is none, or one of another format.
    """
    data = json.loads(content)
    if data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format')!r}, known: {FORMAT}")
    known = {each.name for each in fields(Manifest)}
    if set(data) != known:
        raise ValueError(f"fields {sorted(set(data) ^ known)}")
    region = data["region"]
    for name in ("live_ins", "live_outs"):
        region[name] = tuple(
            ValueReport(each["name"], tuple(each["sizes"]), each["dtype"], each["base"]) for each in region[name]
        )
    for name in ("lists", "front", "cached", "back"):
        region[name] = tuple(region[name])
    return Manifest(
        **{
            **data,
            "parameters": tuple(data["parameters"]),
            "names": tuple(data["names"]),
            "inputs": tuple(Input(**{**each, "sizes": tuple(each["sizes"])}) for each in data["inputs"]),
            "symbols": {name: (int(low), high) for name, (low, high) in data["symbols"].items()},
            "guards": tuple(data["guards"]),
            "controls": tuple(data["controls"]),
            "residuals": tuple(map(_buffer, data["residuals"])),
            "front": None if data["front"] is None else _buffer(data["front"]),
            "programs": {name: tuple(places) for name, places in data["programs"].items()},
            "region": RegionReport(**region),
        }
    )


def _buffer(data: Mapping[str, Any]) -> Buffer:
    return Buffer(tuple(data["sizes"]), data["dtype"], data["device"], data["scale"])


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``float32`` -> ``torch.float32``.

    Raises:
        ValueError: there is no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r}")
    return found


# Compiled into the programs, or of no use to a loader.
_NOT_KEPT = ("inner_options", "language", "debug", "strict", "group")
# Their defaults follow from other options, which a loader may change: kept where they were chosen.
_KEPT_IF_CHOSEN = ("skip_interval", "warmup_steps")


def options_as_data(options: CacheOptions, chosen: Collection[str]) -> dict[str, Any]:
    """The options that an artifact remembers, in the form in which they can be given again.

    ``chosen``: names of those that the user set; what is not among them is a default.
    """
    found: dict[str, Any] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        if value is None or each.name in _NOT_KEPT or (each.name in _KEPT_IF_CHOSEN and each.name not in chosen):
            continue
        if isinstance(value, torch.dtype):
            value = dtype_name(value)
        elif isinstance(value, torch.device):
            value = str(value)
        elif isinstance(value, Calibration):
            value = value.as_data()
        elif isinstance(value, tuple):
            value = list(value)
        found[each.name] = value
    return found


_RANK = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
"""Instruction sets of which a later one runs what was compiled for an earlier one."""


def machine_of(device: str) -> dict[str, str]:
    """What compiled programs depend on beside torch. Asked of torch without its compiler, which a loader does not need."""
    found = {
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def differences(made: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What of the machine does not suit programs that were compiled on another one."""
    return [f"{key}: {value} -> {here.get(key)}" for key, value in made.items() if not _suits(value, here.get(key))]


def _suits(made: str, here: str | None) -> bool:
    return made == here or (made in _RANK and here in _RANK and _RANK[made] <= _RANK[here])
