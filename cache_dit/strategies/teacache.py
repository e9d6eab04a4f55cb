"""TeaCache's threshold, without its polynomial."""

from __future__ import annotations

from .front_clock import ClockStrategy

LOOK_AHEAD = 1.0
"""Increments added to the clock: the one of the step to decide, which is not known yet."""


class TeaCache(ClockStrategy):
    """Skips while the front's accumulated relative change since the last computed step stays within `tolerance`.

    TeaCache accumulates the change of the first block's modulated input, rescaled by a polynomial fitted for each model;
    here it is the change of the front's output as it is, and decided one step ahead, so that nobody waits for it.

    Source: "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108, 2024).
    """

    def __init__(self, skip_interval: int, warmup_steps: int, max_consecutive_hits: int, tolerance: float) -> None:
        super().__init__(skip_interval, warmup_steps, max_consecutive_hits, tolerance, LOOK_AHEAD)
