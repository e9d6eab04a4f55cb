"""Sampling with the other library's cache: run in the environment of the peers, since it has our import name.

    python benchmarks/peer_sampling.py dit '{"steps": 28}' '{"Fn_compute_blocks": 8}' out.npy

Writes the images, float32 ``[N, 1, 24, 24]``, and prints one line of JSON: the steps that computed, the blocks of the
model, and the share of all block calls of an uncached run that were made.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import numpy as np
import torch
from beds import BEDS
from sampling import Sampler, Setting

ORDER = "taylorseer_order"
"""Among the options: the order of its forecast; without it residuals are reused."""


def sample(bed_name: str, setting: Setting, options: dict[str, Any], path: str) -> dict[str, Any]:
    """Sample once with DBCache and these options of its `DBCacheConfig` (and `ORDER`); the others are its defaults."""
    import cache_dit as peer
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig  # type: ignore[attr-defined]

    bed = BEDS[bed_name]()
    model: Any = bed.load()
    blocks = [block for name, block in model.named_modules() if name.rpartition(".")[0].endswith("transformer_blocks")]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in blocks:
        block.register_forward_hook(count)
    order = options.pop(ORDER, None)
    config = DBCacheConfig(num_inference_steps=setting.steps, **options)
    calibrator = None if order is None else TaylorSeerCalibratorConfig(taylorseer_order=order)
    peer.enable_cache(model, cache_config=config, calibrator_config=calibrator)  # type: ignore[call-arg]
    images = Sampler(bed, setting).run(model)
    stats = peer.summary(model, logging=False)  # type: ignore[call-arg]
    skipped = len(getattr(stats[0] if isinstance(stats, list) else stats, "cached_steps", []))
    np.save(path, images.numpy())
    work = calls / (len(blocks) * setting.steps)
    return {"computed": setting.steps - skipped, "steps": setting.steps, "blocks": len(blocks), "work": work}


def main(bed: str, setting: str, options: str, path: str) -> None:
    """Sample as the arguments say."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(json.dumps(sample(bed, Setting(**json.loads(setting)), json.loads(options), path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
