"""Seconds per prompt inside ComfyUI: plain, its own compile node, EasyCache at equal fidelity, and our nodes.

``make bench-comfy``, or ``ENV/bin/python benchmarks/comfyui.py FOLDER [--version V] [--out FILE]``.

Three parts. *quality* samples the demo's trained digits and compares times at a like distance from the plain picture. *wait*
samples models of random weights at several depths and says after how many pictures inductor has paid for its compilation.
*overhead* is what our wrappers cost an evaluation while the cache is off. Contenders take turns: A B A B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/comfy"))

from server import Server, Workflow, running

STEPS = 28
# of the thresholds of other caches
RESOLUTION = 0.002
DEPTHS = "2+2,4+8,8+16"
Apply = Callable[[Workflow, list[Any]], list[Any]]
CONFIG = {"strategy": "fixed", "skip_interval": 2, "warmup_steps": 3, "noise_scale": 0.001, "enable_debug": False}


def plain(flow: Workflow, model: list[Any]) -> list[Any]:
    return model


def compiled(flow: Workflow, model: list[Any]) -> list[Any]:
    return flow.add("TorchCompileModel", model=model, backend="inductor")


def ours(inner: str) -> Apply:
    return lambda flow, model: flow.add("CacheDitConfig", model=model, **CONFIG, inner=inner)


def easy(name: str, threshold: float) -> Apply:
    options = {"reuse_threshold": threshold, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    return lambda flow, model: flow.add(name, model=model, **options)


def timed(server: Server, nodes: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    begin = time.perf_counter()
    shown = server.run(nodes, 3600)
    return time.perf_counter() - begin, shown


def digits(apply: Apply, seed: int) -> dict[str, Any]:
    """A prompt that draws ten digits, and one without anything beside it to compare with."""
    flow = Workflow()
    labels = flow.add("TestDigitsLabels", labels="0 1 2 3 4 5 6 7 8 9")
    none = flow.add("TestDigitsLabels", labels=" ".join(["10"] * 10))
    latent = flow.add("TestDigitsLatent", batch=10)
    common = {"positive": labels, "negative": none, "latent_image": latent, "steps": STEPS, "cfg": 2.0, "seed": seed}
    loader = flow.add("TestDigitsModel")
    flow.digest(flow.sample(apply(flow, loader), **common))
    return flow.nodes


def distance(server: Server, apply: Apply) -> float:
    """The PSNR against the plain picture, in dB."""
    flow = Workflow()
    flow.nodes = digits(plain, 1)
    samples = [name for name, node in flow.nodes.items() if node["class_type"] == "KSampler"]
    inputs = flow.nodes[samples[0]]["inputs"]
    other = flow.add("KSampler", "other", **{**inputs, "model": apply(flow, inputs["model"])})
    flow.add("TestPsnr", "psnr", a=other, b=[samples[0], 0], range=2.0)
    return float(server.run(flow.nodes)["psnr"]["psnr"])


def quality(server: Server, repeats: int) -> list[dict[str, Any]]:
    """Each contender's first prompt, the median of the later ones, and its distance."""
    contenders: dict[str, Apply] = {
        "plain": plain,
        "TorchCompileModel": compiled,
        "CacheDit, eager": ours("eager"),
        "CacheDit, inductor": ours("inductor"),
    }
    # before anything of theirs has been compiled; the first prompt of all is the server's own
    timed(server, digits(plain, 99))
    first = {name: timed(server, digits(apply, 100))[0] for name, apply in contenders.items()}
    wanted = distance(server, contenders["CacheDit, eager"])
    for name in ("EasyCache", "LazyCache"):
        for threshold in nearest(server, name, wanted):
            contenders[f"{name} {threshold:.4f}"] = easy(name, threshold)
    later: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats):
        for name, apply in contenders.items():
            later[name].append(timed(server, digits(apply, 101 + i))[0])
    rows = []
    for name, apply in contenders.items():
        psnr = None if apply is plain else distance(server, apply)
        rows.append({"name": name, "first_s": first.get(name), "later_s": statistics.median(later[name]), "psnr_db": psnr})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def nearest(server: Server, name: str, wanted: float) -> tuple[float, ...]:
    """The largest threshold at which another cache stays at least as near to the plain picture, and the next one above."""
    low, high = 0.0, 3.0
    if distance(server, easy(name, high)) >= wanted:
        return (high,)
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        if distance(server, easy(name, middle)) >= wanted:
            low = middle
        else:
            high = middle
    return low, high


def flux(apply: Apply, depth: str, width: int, seed: int) -> dict[str, Any]:
    flow = Workflow()
    double, single = map(int, depth.split("+"))
    model = flow.add("TestFlux", depth=double, depth_single=single, width=width, copy=0)
    flow.digest(flow.sample(apply(flow, model), steps=20, cfg=1.0, seed=seed, latent_image=flow.latent(256)))
    return flow.nodes


def wait(server: Server, repeats: int, width: int, depths: str) -> list[dict[str, Any]]:
    """The first prompt's wait and the later ones' seconds for both compilers; after how many pictures inductor pays."""
    rows = []
    for depth in depths.split(","):
        row: dict[str, Any] = {"depth": depth, "width": width}
        # the model is made and the server has warmed up: that is nobody's wait
        timed(server, flux(plain, depth, width, 9))
        for inner in ("eager", "inductor"):
            row[f"{inner}_first_s"], _ = timed(server, flux(ours(inner), depth, width, 10))
        ways = {"plain": plain, "eager": ours("eager"), "inductor": ours("inductor")}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(repeats):
            for name, apply in ways.items():
                times[name].append(timed(server, flux(apply, depth, width, 11 + i))[0])
        row.update({f"{name}_later_s": statistics.median(found) for name, found in times.items()})
        gain = row["eager_later_s"] - row["inductor_later_s"]
        more = row["inductor_first_s"] - row["eager_first_s"]
        row["inductor_pays_after"] = round(more / gain) if gain > 0 else None
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def overhead(server: Server) -> dict[str, Any]:
    """Microseconds an evaluation, with and without a cache that is off."""
    flow = Workflow()
    idle = flow.add("CacheDitControl", model=flow.add("CacheDitAccelerate", model=flow.model()), enable_cache=False)
    flow.add("TestOverhead", "overhead", plain=flow.model(), idle=idle, evaluations=50)
    row: dict[str, Any] = server.run(flow.nodes)["overhead"]
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="0.30.0")
    parser.add_argument("--part", choices=("quality", "wait", "overhead", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depths", default=DEPTHS, help="double and single blocks of each model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        # compilers find nothing stored: the first prompt's wait is that of a fresh installation
        running(
            options.folder / f"comfy-{options.version}",
            Path(home),
            CACHE_DIT_LANG="en",
            TORCHINDUCTOR_CACHE_DIR=f"{home}/inductor",
        ) as server,
    ):
        rows: dict[str, Any] = {}
        if options.part in ("overhead", "all"):
            rows["overhead"] = overhead(server)
        if options.part in ("quality", "all"):
            rows["quality"] = quality(server, options.repeats)
        if options.part in ("wait", "all"):
            rows["wait"] = wait(server, options.repeats, options.width, options.depths)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
