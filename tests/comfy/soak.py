"""Random prompts with interrupts at a real server, for a time: it goes on, its pictures stay right, its memory stays flat.

``ENV/bin/python tests/comfy/soak.py FOLDER [--minutes 10] [--version V] [--seed N]`` with what ``make test-comfy`` has set
up; ``make soak-comfy`` does both. Every tenth prompt is the same one: its latent must be the first one's to the bit, and
nothing may be held behind it. Ends with 1 where that fails, a prompt fails that should not, or memory grows in the second
half of the time by more than the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server import Server, Workflow, running

SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "lcm")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"strategy": "fixed"},
    {"strategy": "dynamic", "skip_interval": 3, "warmup_steps": 1},
    {"strategy": "adaptive", "target_speedup": 2.0},
    {"strategy": "fixed", "forecast": "taylor", "warmup_steps": 1},
    {"strategy": "fixed", "start_percent": 0.2, "end_percent": 0.8, "noise_scale": 0.0},
)
GROWTH_MB = 64.0
"""What the resident memory may grow in the second half: as much as an allocator moves by itself."""


def random_prompt(choose: random.Random) -> dict[str, Any]:
    """Nodes in any order: ours, LoRA, another pack's wrapper, another cache, memory that runs out."""
    flow = Workflow(choose.choice(("flux", "flux", "wan", "sd3")), seed=choose.randrange(3))
    model = flow.model(copy=choose.randrange(3))
    ours = ["accelerate", "config", "control"][choose.randrange(3)]
    nodes = [ours, *choose.sample(["lora", "foreign", "lazy", "again", "memory"], choose.choice((0, 1, 1, 2)))]
    choose.shuffle(nodes)
    for node in nodes:
        model = _behind(flow, model, node, choose)
    more: dict[str, Any] = {}
    if choose.random() < 0.3:
        more["negative"] = flow.prompt(3, 9)
    if choose.random() < 0.2:
        more["latent_image"] = flow.latent(batch=2)
    samples = flow.sample(
        model, steps=choose.randrange(4, 21), sampler=choose.choice(SAMPLERS), cfg=choose.choice((1.0, 3.0)),
        seed=choose.randrange(1 << 30), **more,
    )  # fmt: skip
    flow.digest(samples)
    flow.add("CacheDitStats", "stats", trigger=samples)
    flow.add("CacheDitTimeline", "timeline", trigger=samples)
    return flow.nodes


def _behind(flow: Workflow, model: list[Any], node: str, choose: random.Random) -> list[Any]:
    if node == "config":
        given = {"strategy": "fixed", "skip_interval": 2, "warmup_steps": 3, "noise_scale": 0.001, "enable_debug": False}
        return flow.add("CacheDitConfig", model=model, **{**given, **choose.choice(SETTINGS)})
    if node == "control":
        return flow.add("CacheDitControl", model=model, enable_cache=choose.random() < 0.7)
    if node == "lora":
        return flow.add("TestLora", model=model, strength=choose.random())
    if node == "foreign":
        return flow.add("TestForeignWrapper", model=model, entry=choose.choice("abc"))
    if node == "lazy":
        options = {"reuse_threshold": 1.0, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}
        return flow.add("LazyCache", model=model, **options)
    if node == "memory":
        place = choose.choice(("before", "after"))
        return flow.add("TestOutOfMemory", model=model, evaluation=choose.randrange(1, 12), place=place)
    return flow.add("CacheDitAccelerate", model=model)


def fixed_prompt() -> dict[str, Any]:
    """What is asked for again and again."""
    flow = Workflow("flux", seed=1)
    samples = flow.sample(flow.add("CacheDitAccelerate", model=flow.model(copy=77)))
    flow.digest(samples)
    flow.facts(samples)
    return flow.nodes


class Soak:
    """What has happened so far."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.choose = server, random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.first: str | None = None
        self.began = time.monotonic()

    def go(self, minutes: float) -> None:
        """Prompts until the time is over."""
        self.look()
        while time.monotonic() - self.began < 60 * minutes:
            for _ in range(9):
                self.one()
            if self.choose.random() < 0.3:
                self.server.post("/free", {"unload_models": True, "free_memory": self.choose.random() < 0.5})
                self.ended["freed"] += 1
                time.sleep(1.0)
            self.look()

    def one(self) -> None:
        """One random prompt, interrupted in one case of four."""
        prompt = self.server.queue(random_prompt(self.choose))
        interrupted = self.choose.random() < 0.25
        if interrupted:
            time.sleep(self.choose.uniform(0.0, 2.5))
            self.server.post("/interrupt", {})
        status = self.server.wait(prompt)["status"]
        told = json.dumps(status["messages"])
        if status["status_str"] == "success":
            self.ended["done"] += 1
        elif interrupted and "execution_interrupted" in told:
            self.ended["interrupted"] += 1
        elif "a test has run out of memory" in told:
            self.ended["out of memory"] += 1
        else:
            self.ended["failed"] += 1
            self.wrong.append(told[-2000:])

    def look(self) -> None:
        """The fixed prompt: the same latent, nothing held, and the memory so far."""
        shown = self.server.run(fixed_prompt())
        sha, facts = shown["digest"]["sha"], shown["facts"]
        self.first = self.first or sha
        if sha != self.first:
            self.wrong.append("the fixed prompt gives another latent")
        if facts["held"]:
            self.wrong.append(f"{facts['held']} bytes are held behind a sampling")
        row = {
            "minutes": round((time.monotonic() - self.began) / 60, 2),
            **self.ended,
            "resident_mb": round(facts["resident"] / 1e6, 1),
            "graphs": facts["graphs"],
            "sessions": facts["sessions"],
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def growth(self) -> float:
        """MB between the mean of the third quarter of the looks and that of the last one."""
        sizes = [row["resident_mb"] for row in self.rows]
        quarter = max(1, len(sizes) // 4)
        third, last = sizes[-2 * quarter : -quarter] or sizes[:1], sizes[-quarter:]
        return sum(last) / len(last) - sum(third) / len(third)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--version", default="0.30.0")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        running(options.folder / f"comfy-{options.version}", Path(home), CACHE_DIT_LANG="en") as server,
    ):
        soak = Soak(server, options.seed)
        soak.go(options.minutes)
    growth = soak.growth()
    print(f"memory in the last quarter against the one before: {growth:+.1f} MB; allowed: {GROWTH_MB:.0f}")
    for each in soak.wrong:
        print(f"WRONG: {each}")
    return int(bool(soak.wrong) or growth > GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
