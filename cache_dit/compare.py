"""The same runs with and without caching: times, hit rates and differences, and the picture of them.

A `Contender` is one way to run a model. `measure` runs all of them from the same seeds, in turns, so that whatever else
the machine does meets each of them alike. Needs torch and numpy; the picture also needs matplotlib.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
import os
import shutil
import statistics
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CacheDitError
from .messages import logger
from .statistics import CacheStats
from .texts import text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

WARM_UP_STEPS = 6
"""Steps of the two runs before the timed ones: enough for every strategy to compute and to skip."""
PICTURE_INCHES = 12.4
COMPUTED_COLOUR, SKIPPED_COLOUR, MUTED_COLOUR = "#2b5c8a", "#f0b860", "#5f6872"

OnStep = Callable[[], object]
Advance = Callable[[str, int], object]
"""(what is running, steps done since the last call) -> anything."""


class MissingPackageError(CacheDitError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(package: str, language: str | None = None) -> Any:
    """Import an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise MissingPackageError(text("cli_missing_package", language, package=missing)) from error


def is_installed(package: str) -> bool:
    """Whether a top-level package can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that inductor would use on a CPU; None where there is none."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or default)


def usable_inner(device: str) -> str:
    """``'inductor'`` where its toolchain for this type of device is found, else ``'eager'``."""
    found = cpp_compiler() is not None if device == "cpu" else is_installed("triton")
    return "inductor" if found else "eager"


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: how tables call it.
        run: (seed, steps, on_step) -> outputs ``[N, ...]`` on any device; calls ``on_step()`` after each step where it can.
        stats: reads the statistics of its model; None where nothing is cached.
    """

    name: str
    run: Callable[[int, int, OnStep], Tensor]
    stats: Callable[[], CacheStats] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What one timed run gave.

    Attributes:
        seconds: from the call to the outputs in host memory.
        outputs: ``[N, ...]``, on the CPU.
        calls, hits: forward calls of the model, and those answered from the cache; 0 where nothing is cached.
        computed: for each step whether the cached blocks computed; empty where nothing is cached or no step is told.
    """

    seconds: float
    outputs: Tensor
    calls: int
    hits: int
    computed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """The timed runs of one contender. ``compile_seconds``: how much longer its first run took than the second."""

    name: str
    compile_seconds: float
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        """Median time of a run."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def outputs(self) -> Tensor:
        """Outputs of all runs, ``[runs * N, ...]``."""
        return torch.cat([run.outputs for run in self.runs])

    @property
    def hit_rate(self) -> float | None:
        """Percent of the forward calls answered from the cache; None where nothing is cached."""
        calls = sum(run.calls for run in self.runs)
        return 100.0 * sum(run.hits for run in self.runs) / calls if calls else None

    def speedup_over(self, other: Measured) -> float:
        """How many times faster than the other: the ratio of the medians."""
        return other.seconds / self.seconds

    def psnr_to(self, reference: Measured, value_range: float | None = None) -> float:
        """Mean PSNR in dB over the samples that differ, infinite where none does; range None: that of the reference."""
        wanted = reference.outputs
        value_range = float(wanted.max() - wanted.min()) if value_range is None else value_range
        decibels = psnr(wanted, self.outputs, value_range)
        differing = decibels[decibels != math.inf]
        return float(differing.mean()) if len(differing) else math.inf


class StepWatch:
    """Notes after each step of a run whether the cached blocks computed in it: a skipped step adds to the hits."""

    def __init__(self, stats: Callable[[], CacheStats] | None, then: OnStep) -> None:
        self._stats, self._then = stats, then
        self._hits = stats().hits if stats is not None else 0
        self.computed: list[bool] = []
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        if self._stats is not None:
            hits = self._stats().hits
            self.computed.append(hits == self._hits)
            self._hits = hits
        self._then()


def measure(
    contenders: Sequence[Contender], seeds: Sequence[int], steps: int, advance: Advance = lambda name, done: None
) -> list[Measured]:
    """Run every contender from every seed, in turns: A B C A B C.

    Each first runs twice for a few steps, so that no timed run compiles. ``advance`` is called with the contender's
    name at the start of each run, after its steps and at its end.
    """
    compile_seconds = [_prepare(contender, seeds[0], min(steps, WARM_UP_STEPS), advance) for contender in contenders]
    runs: list[list[Run]] = [[] for _ in contenders]
    for seed in seeds:
        for contender, kept in zip(contenders, runs, strict=True):
            kept.append(_timed(contender, seed, steps, advance))
    return [
        Measured(contender.name, seconds, tuple(kept))
        for contender, seconds, kept in zip(contenders, compile_seconds, runs, strict=True)
    ]


def steps_to_take(contenders: int, runs: int, steps: int) -> int:
    """Steps that `measure` takes in all."""
    return contenders * (runs * steps + 2 * min(steps, WARM_UP_STEPS))


def _prepare(contender: Contender, seed: int, steps: int, advance: Advance) -> float:
    first, second = (_timed(contender, seed, steps, advance).seconds for _ in range(2))
    return max(0.0, first - second)


def _timed(contender: Contender, seed: int, steps: int, advance: Advance) -> Run:
    before = contender.stats() if contender.stats is not None else None
    watch = StepWatch(contender.stats, lambda: advance(contender.name, 1))
    advance(contender.name, 0)
    start = perf_counter()
    outputs = contender.run(seed, steps, watch).cpu()
    seconds = perf_counter() - start
    advance(contender.name, steps - watch.steps)
    if contender.stats is None or before is None:
        return Run(seconds, outputs, 0, 0, ())
    after = contender.stats()
    return Run(seconds, outputs, after.calls - before.calls, after.hits - before.hits, tuple(watch.computed))


def psnr(reference: Tensor, outputs: Tensor, value_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB: ``[N, ...]`` twice to float64 ``[N]``; inf where equal.

    ``20 log10(value_range / rms(outputs - reference))``, unclipped, in float64.

    Raises:
        ValueError: the shapes differ, or the range is not positive.
    """
    if reference.shape != outputs.shape:
        raise ValueError(f"shapes differ: {list(reference.shape)} and {list(outputs.shape)}")
    if not value_range > 0.0:
        raise ValueError(f"value_range={value_range!r}: a positive number is wanted")
    difference = (outputs.double() - reference.double()).flatten(1)
    return 20.0 * math.log10(value_range) - 10.0 * difference.square().mean(1).log10()


def compiled_copy(module: nn.Module, backend: str | Callable[..., Any]) -> nn.Module:
    """A copy of the module that shares its parameters and is compiled by ``backend`` alone."""
    shared = {id(parameter): parameter for parameter in module.parameters()}
    plain = copy.deepcopy(module, shared)
    plain.compile(backend=backend)
    return plain


# ---- text ------------------------------------------------------------------------------------------------------------


_COLUMNS = ("name", "compile", "seconds", "speedup", "hits", "psnr")


def result_table(
    measured: Sequence[Measured],
    value_range: float | None,
    language: str | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The table of all contenders, the first of them the reference; ``more`` adds columns (heading -> cells)."""
    heading = [text(f"cli_column_{name}", language) for name in _COLUMNS]
    more = more or {}
    rows = [
        [*_row(each, measured[0], value_range, language), *(cells[index] for cells in more.values())]
        for index, each in enumerate(measured)
    ]
    return format_table([[*heading, *more], *rows])


def _row(measured: Measured, reference: Measured, value_range: float | None, language: str | None) -> list[str]:
    cells = [measured.name, f"{measured.compile_seconds:.1f}", f"{measured.seconds:.2f}"]
    if measured is reference:
        return [*cells, "1.00x", "-", "-"]
    rate = "-" if measured.hit_rate is None else f"{measured.hit_rate:.1f}%"
    ratio = measured.psnr_to(reference, value_range)
    shown = text("cli_identical", language) if ratio == math.inf else f"{ratio:.1f} dB"
    return [*cells, f"{measured.speedup_over(reference):.2f}x", rate, shown]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines with a rule under the first; the first column to the left, the others right."""
    widths = [max(display_width(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(_padded(cell, widths[place], place) for place, cell in enumerate(row)) for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _padded(cell: str, width: int, place: int) -> str:
    space = " " * (width - display_width(cell))
    return cell + space if place == 0 else space + cell


def display_width(line: str) -> int:
    """Columns that a line takes in a terminal, where Chinese letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


@contextmanager
def progress_bar(total: int) -> Iterator[Advance]:
    """A bar of ``total`` steps on stderr, of tqdm where it is installed, else a line each time another kind runs.

    Our own announcements are held back meanwhile, unless the user has set a level for them.
    """
    level = logger.level
    if level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
    try:
        yield from _bar(total)
    finally:
        logger.setLevel(level)


def _bar(total: int) -> Iterator[Advance]:
    if not is_installed("tqdm"):
        yield _Lines(total)
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="step", file=sys.stderr, leave=False, dynamic_ncols=True) as bar:

        def advance(name: str, done: int) -> None:
            bar.set_description(name, refresh=done == 0)
            bar.update(done)

        yield advance


class _Lines:
    """Progress in lines, for terminals without a bar."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._name = total, 0, ""

    def __call__(self, name: str, done: int) -> None:
        if name != self._name:
            print(f"{self._done}/{self._total} {name}", file=sys.stderr, flush=True)
            self._name = name
        self._done += done


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """Pictures under a title and a note: float ``[N, H, W]`` (grey) or ``[N, H, W, 3]``, 0 to 1, 0 = black."""

    title: str
    pictures: NDArray[np.float32]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """The steps of one run, by whether the cached blocks computed, with a title and a note."""

    title: str
    computed: tuple[bool, ...]
    note: str = ""


def draw_comparison(path: Path, panels: Sequence[Panel], strips: Sequence[Strip], columns: int) -> None:
    """Write one picture: the panels side by side, ``columns`` pictures a row, and below them a row of cells per strip.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure_class = require("matplotlib.figure").Figure
    mosaics = [mosaic(panel.pictures, columns) for panel in panels]
    height, width = mosaics[0].shape[:2]
    inches = [PICTURE_INCHES / len(panels) * min(1.2, height / width) + 0.6]
    if strips:
        inches.append(0.4 * len(strips) + 0.75)
    figure = figure_class(figsize=(PICTURE_INCHES, sum(inches)), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    parts = figure.subfigures(len(inches), 1, height_ratios=inches, squeeze=False)[:, 0]
    for axes, panel, tiles in zip(parts[0].subplots(1, len(panels), squeeze=False)[0], panels, mosaics, strict=True):
        _draw_panel(axes, panel, tiles)
    if strips:
        _draw_strips(parts[1].subplots(), strips)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def mosaic(pictures: NDArray[np.float32], columns: int, gap: int | None = None) -> NDArray[np.float32]:
    """Tile ``[N, H, W]`` or ``[N, H, W, 3]`` into one picture, row by row, with white gaps (in pixels) between."""
    import numpy

    count, height, width = pictures.shape[:3]
    gap = max(1, width // 24) if gap is None else gap
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *pictures.shape[3:])
    tiled = numpy.ones(shape, dtype=numpy.float32)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        tiled[top : top + height, left : left + width] = picture
    return tiled


def _draw_panel(axes: Axes, panel: Panel, tiles: NDArray[np.float32]) -> None:
    axes.imshow(tiles.clip(0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(f"{panel.title}\n" if panel.note else panel.title, loc="left", fontsize=11)
    axes.annotate(
        panel.note, (0.0, 1.0), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9,
        color=MUTED_COLOUR,
    )  # fmt: skip
    axes.set_axis_off()


def _draw_strips(axes: Axes, strips: Sequence[Strip]) -> None:
    from matplotlib.patches import Patch, Rectangle

    steps = max(len(strip.computed) for strip in strips)
    for row, strip in enumerate(strips):
        for step, computed in enumerate(strip.computed):
            colour = COMPUTED_COLOUR if computed else SKIPPED_COLOUR
            axes.add_patch(Rectangle((step + 0.54, row - 0.36), 0.92, 0.72, facecolor=colour, linewidth=0))
    axes.set(xlim=(0.5, steps + 0.5), ylim=(len(strips) - 0.5, -0.5))
    axes.set_yticks(range(len(strips)), [f"{strip.title}\n{strip.note}".strip() for strip in strips])
    axes.set_xticks([1, *range(5, steps + 1, 5)])
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED_COLOUR)
    axes.tick_params(axis="y", labelcolor="black")
    axes.set_xlabel("step", fontsize=9, color=MUTED_COLOUR)
    for spine in axes.spines.values():
        spine.set_visible(False)
    meanings = {COMPUTED_COLOUR: "blocks computed", SKIPPED_COLOUR: "blocks skipped"}
    axes.legend(
        handles=[Patch(color=colour, label=label) for colour, label in meanings.items()],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9, handlelength=0.9,
        handleheight=0.9, borderaxespad=0.1,
    )  # fmt: skip
