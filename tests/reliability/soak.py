"""Hammers one model with thousands of calls and random events, comparing each call with the same model without a cache.

    python tests/reliability/soak.py --calls 10000 --seed 0

Computed calls must be the plain model's, skipped ones those of caching by hand: the residual of the context's last computed
call, kept beside. Events: other prompts, shapes, numbers of steps, weights written to, replaced and loaded, an adapter's
scale, off and on again with other options, exceptions, calls with gradients, inference mode, named contexts, threads,
statistics read, runs cut off. Memory must be flat behind the first fifth.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# run as a script: the tests beside it are modules of a package that is made here
_TESTS = Path(__file__).resolve().parents[1]
for _name, _path in (("soaked", _TESTS), ("soaked.reliability", _TESTS / "reliability")):
    sys.modules.setdefault(_name, types.ModuleType(_name)).__path__ = [str(_path)]

import cache_dit  # noqa: E402
from cache_dit.messages import CacheDitWarning  # noqa: E402


def resident_kilobytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


class Soak:
    """One model with caching, its twin without, and the residuals kept by hand."""

    def __init__(self, seed: int) -> None:
        from soaked import models
        from soaked.reliability.generations import Prompted

        class Scaled(models.Block):
            scale = 1.0

            def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
                return x + self.scale * (super().forward(x, temb) - x)

        class Model(Prompted):
            def __init__(self) -> None:
                super().__init__(4, Scaled)

        self.models, self.random = models, random.Random(seed)
        self.model, self.twin = models.seeded(Model), models.seeded(Model)
        self.counted: Counter[str] = Counter()
        self.kept: dict[str, torch.Tensor] = {}
        self.calls = self.hits = 0
        self.worst = 0.0
        self.enable()

    def enable(self) -> None:
        cache_dit.enable_cache(
            self.model,
            inner="eager",
            forecast="reuse",
            noise_scale=0.0,
            language="en",
            skip_interval=self.random.choice([1, 2, 3]),
            warmup_steps=self.random.choice([0, 1, 3]),
            strategy=self.random.choice(["fixed", "fixed", "dynamic"]),
        )

    def on_both(self, change: Any) -> None:
        for model in (self.model, self.twin):
            with torch.no_grad():
                change(model)

    def call(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, name: str) -> None:
        """One call, compared."""
        before = cache_dit.get_stats(self.model).hits
        output = self.model(x, t, prompt)
        skipped = cache_dit.get_stats(self.model).hits > before
        twin = self.twin
        h, temb = twin.embed(x), twin.time(t) + prompt
        entered = twin.blocks[0](h, temb)
        if skipped:
            kept = self.kept.get(name)
            if kept is None or kept.shape != entered.shape:
                raise AssertionError(f"call {self.calls}: skipped, and nothing of {name} is stored that it could use")
            wanted = twin.head(entered + kept)
        else:
            left = entered
            for block in twin.blocks[1:]:
                left = block(left, temb)
            self.kept[name] = (left - entered).detach().clone()
            wanted = twin.head(left)
        error = float((output - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))
        self.worst = max(self.worst, error)
        if not error < 1e-4:
            raise AssertionError(f"call {self.calls} of {name}, {'skipped' if skipped else 'computed'}: off by {error:.2e}")
        self.calls += 1
        self.hits += skipped

    def event(self) -> None:
        """Something happens between two calls."""
        kind = self.random.choice(
            ["weights", "replaced", "loaded", "scale", "again", "error", "gradients", "statistics", "new run", "other model"]
        )
        self.counted[kind] += 1
        if kind == "weights":
            self.on_both(lambda model: model.blocks[2].mlp.weight.mul_(1.001))
        elif kind == "replaced":
            weight = self.twin.blocks[1].mlp.weight.detach() * 0.999
            self.on_both(lambda model: setattr(model.blocks[1].mlp, "weight", torch.nn.Parameter(weight.clone())))
        elif kind == "loaded":
            state = {name: value.clone() for name, value in self.twin.state_dict().items()}
            self.on_both(lambda model: model.load_state_dict(state))
        elif kind == "scale":
            scale = self.random.choice([0.5, 0.8, 1.0])
            self.on_both(lambda model: [setattr(block, "scale", scale) for block in model.blocks])
        elif kind == "again":
            cache_dit.disable_cache(self.model)
            self.enable()
            self.kept.clear()
        elif kind == "error":
            try:
                self.model(no_such_argument=1)
            except TypeError:
                self.kept.clear()
        elif kind == "gradients":
            with torch.enable_grad():
                x = torch.zeros(1, 3, self.models.CHANNELS)
                self.model(x, torch.ones(1), torch.zeros(1, self.models.WIDTH)).sum().backward()
            self.on_both(lambda model: model.zero_grad())
            cache_dit.new_run(self.model)
            self.kept.clear()
        elif kind == "statistics":
            cache_dit.summary(self.model), cache_dit.get_global_stats(), str(cache_dit.explain(self.model))
        elif kind == "new run":
            cache_dit.new_run(self.model)
            self.kept.clear()
        else:
            other = self.models.seeded(type(self.twin))
            cache_dit.enable_cache(other, inner="eager", language="en")
            with torch.no_grad():
                other(torch.zeros(1, 3, self.models.CHANNELS), torch.ones(1), torch.zeros(1, self.models.WIDTH))

    def generation(self) -> None:
        """One sampling, perhaps cut off, perhaps in a thread of its own."""
        choose = self.random
        steps, batch, tokens = choose.randint(3, 20), choose.choice([1, 1, 2]), choose.choice([6, 6, 9])
        parts = choose.choice([("",), ("",), ("positive", "negative")])
        cut = choose.randint(1, steps) if choose.random() < 0.2 else steps
        generator = torch.Generator().manual_seed(choose.randrange(10**9))
        prompts = {part: torch.randn(batch, self.models.WIDTH, generator=generator) for part in parts}
        infer = torch.inference_mode if choose.random() < 0.2 else torch.no_grad

        def run() -> None:
            with infer():
                for step in range(cut):
                    x = torch.randn(batch, tokens, self.models.CHANNELS, generator=generator)
                    t = torch.full((batch,), 1.0 - step / steps)
                    for part in parts:
                        if part:
                            with cache_dit.context(self.model, part):
                                self.call(x, t, prompts[part], part)
                        else:
                            self.call(x, t, prompts[part], part)
                    if choose.random() < 0.05:
                        with torch.inference_mode(False):
                            self.event()

        if choose.random() < 0.1:
            failed: list[BaseException] = []

            def guarded() -> None:
                try:
                    run()
                except BaseException as error:
                    failed.append(error)

            thread = threading.Thread(target=guarded)
            thread.start()
            thread.join()
            if failed:
                raise failed[0]
        else:
            run()
        # a run that was cut off, or one of other parts, is told by its first timestep or by its name
        cache_dit.new_run(self.model)
        self.kept.clear()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    warnings.simplefilter("ignore", CacheDitWarning)
    soak, start, marks = Soak(given.seed), time.monotonic(), []
    while soak.calls < given.calls:
        soak.generation()
        if soak.calls >= (len(marks) + 1) * given.calls // 5:
            gc.collect()
            marks.append(resident_kilobytes())
            spent = time.monotonic() - start
            print(f"{soak.calls} calls, {soak.hits} hits, {marks[-1] / 1024:.0f} MiB, {spent:.0f} s", flush=True)
    growth = marks[-1] - marks[0]
    print(f"{soak.calls} calls, {soak.hits} hits, largest relative error {soak.worst:.1e}, seed {given.seed}")
    print("events: " + ", ".join(f"{kind} {count}" for kind, count in sorted(soak.counted.items())))
    print(f"memory from the first fifth to the end: {growth / 1024:+.1f} MiB")
    return int(growth > 64 * 1024)


if __name__ == "__main__":
    raise SystemExit(main())
