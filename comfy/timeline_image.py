"""The timeline of a run as an image: a bar for each step, its milliseconds, and the measured forecast error.

The image holds digits and Latin letters alone: ComfyUI ships no font with Chinese characters.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..integrations.comfyui import PatcherCache
    from ..integrations.timeline import StepRecord

SIZE = (960, 360)
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 70, 56, 56
_BACKGROUND, _INK, _GRID = (28, 30, 34), (225, 228, 232), (64, 68, 74)
_COMPUTED, _SKIPPED, _COMPILED, _ERROR = (86, 139, 214), (240, 172, 74), (120, 124, 132), (222, 98, 98)


def draw(cache: PatcherCache | None) -> Any:
    """The last run of a cache; without one, an image that says so."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", SIZE, _BACKGROUND)
    canvas = ImageDraw.Draw(image)
    try:
        font: Any = ImageFont.load_default(size=14)
    except TypeError:
        # Pillow before 10.1 has its default font in one size
        font = ImageFont.load_default()
    steps = cache.timeline.steps if cache is not None else []
    if cache is None or not steps:
        canvas.text((_LEFT, _TOP), "no sampling yet", fill=_INK, font=font)
        return image
    _Chart(canvas, font, steps).draw(_title(cache))
    return image


def _title(cache: PatcherCache) -> str:
    from ..statistics import format_speedup

    timeline = cache.timeline
    speedup = format_speedup(cache.run_statistics(), "en")
    return (
        f"{cache.session.options.strategy}: {timeline.steps_done()} steps, {timeline.steps_skipped()} skipped, "
        f"measured speed-up {speedup}"
    )


class _Chart:
    def __init__(self, canvas: Any, font: Any, steps: Sequence[StepRecord]) -> None:
        self._canvas, self._font, self._steps = canvas, font, steps
        self._width = (SIZE[0] - _LEFT - _RIGHT) / len(steps)
        self._floor = SIZE[1] - _BOTTOM
        # a step that compiled is no measure for the others
        times = [step.seconds for step in steps if step.seconds is not None]
        self._longest = max(times, default=0.0)
        self._largest = max((step.error for step in steps if step.error is not None), default=0.0)

    def draw(self, title: str) -> None:
        self._text((_LEFT, 16), title)
        self._axis()
        for index, step in enumerate(self._steps):
            self._bar(index, step)
        self._errors()
        self._legend()

    def _text(self, place: tuple[float, float], words: str, color: tuple[int, int, int] = _INK) -> None:
        self._canvas.text(place, words, fill=color, font=self._font)

    def _axis(self) -> None:
        for part in (0.0, 0.5, 1.0):
            y = self._floor - part * (self._floor - _TOP)
            self._canvas.line((_LEFT, y, SIZE[0] - _RIGHT, y), fill=_GRID)
            if self._longest:
                self._text((8, y - 8), f"{1e3 * part * self._longest:.4g} ms")
            if self._largest:
                self._text((SIZE[0] - _RIGHT + 8, y - 8), f"{part * self._largest:.2g}", _ERROR)

    def _bar(self, index: int, step: StepRecord) -> None:
        left = _LEFT + index * self._width
        color = _SKIPPED if step.skipped else _COMPUTED
        share = step.seconds / self._longest if step.seconds is not None and self._longest else 1.0
        if step.compiled:
            color, share = _COMPILED, 1.0
        top = self._floor - max(0.02, share) * (self._floor - _TOP)
        self._canvas.rectangle((left + 1, top, left + max(2.0, self._width - 2), self._floor), fill=color)
        every = max(1, -(-len(self._steps) // 20))
        if index % every == 0:
            self._text((left + 2, self._floor + 4), str(step.step))

    def _errors(self) -> None:
        points = [
            (_LEFT + (index + 0.5) * self._width, self._floor - step.error / self._largest * (self._floor - _TOP))
            for index, step in enumerate(self._steps)
            if step.error is not None and self._largest > 0.0
        ]
        if len(points) > 1:
            self._canvas.line(points, fill=_ERROR, width=2)
        for x, y in points:
            self._canvas.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_ERROR)

    def _legend(self) -> None:
        entries = [("computed", _COMPUTED), ("skipped", _SKIPPED), ("measured forecast error", _ERROR)]
        if any(step.compiled for step in self._steps):
            entries.append(("compiled (not timed)", _COMPILED))
        x = float(_LEFT)
        for words, color in entries:
            self._canvas.rectangle((x, SIZE[1] - 24, x + 12, SIZE[1] - 12), fill=color)
            self._text((x + 18, SIZE[1] - 27), words)
            x += 40 + 7.5 * len(words)


def as_tensor(image: Any) -> torch.Tensor:
    """An image as ComfyUI passes them on: 1 x height x width x 3, float32 from 0 to 1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def save_preview(image: Any) -> dict[str, str]:
    """Write the image where the browser can fetch it, and say where."""
    import folder_paths

    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    name = f"cache_dit_timeline_{uuid.uuid4().hex[:12]}.png"
    image.save(os.path.join(folder, name), compress_level=1)
    return {"filename": name, "subfolder": "", "type": "temp"}
