"""Runs a file that `cache_dit.export` wrote with torch alone: no cache_dit, no model class, no diffusers.

    python examples/plain_artifact.py model.pt2 inputs.pt result.pt --steps 20 --every 2

`inputs.pt` holds the model's tensors in the order of the manifest, as `torch.save` writes a list of them; the first one
is denoised by Euler steps from 1 to 0, and the timestep among them is set at each step. Every second step behind the
third one is skipped: the residual that the last computed step stored is added again.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from typing import Any

import torch
from torch.export.pt2_archive._package import load_pt2


class PlainArtifact:
    """The two programs of an artifact, and the buffers between them.

    Both take the model's tensors, then what the cache adds, in this order: pred (bool), control (forecast weights, newest
    first, then the noise scale), key of the noise (int64), measured (statistics of the last computed step), the front's
    last output (where the manifest has one), and the residuals of each live-out, newest first. Each takes the part of
    these that the manifest lists under its name. Both give the model's outputs, then measured; the computing one
    overwrites the oldest residual of each live-out.
    """

    def __init__(self, path: str) -> None:
        # torch._inductor.aoti_load_package(path) gives the first program alone; its load_constants takes the weights
        package = load_pt2(path, load_weights_from_disk=True)
        self.programs = package.aoti_runners
        self.manifest: dict[str, Any] = json.loads(package.extra_files["cache_dit.json"])

    def allocate(self, sizes: dict[str, int]) -> None:
        """Make the buffers, for these values of the manifest's symbols."""
        manifest, device = self.manifest, self.manifest["device"]
        accumulate = getattr(torch, manifest["accumulate"])
        history = manifest["history"]
        self.measured = torch.zeros(len(manifest["residuals"]) * (2 + history * (history + 1) // 2), dtype=accumulate)
        self.measured = self.measured.to(device)
        self.front = [] if manifest["front"] is None else [zeros_like(manifest["front"], sizes)]
        self.residuals = [[zeros_like(each, sizes) for _ in range(history)] for each in manifest["residuals"]]

    def __call__(self, tensors: list[torch.Tensor], *, skip: bool) -> list[torch.Tensor]:
        """One step of the model."""
        manifest = self.manifest
        name = "reuse" if skip else "model"
        control = torch.zeros(manifest["history"] + 1, dtype=self.measured.dtype, device=manifest["device"])
        control[0] = 1.0
        pred = torch.tensor(not skip, device=manifest["device"])
        key = torch.tensor(0, device=manifest["device"])
        stored = [buffer for history in self.residuals for buffer in history]
        given = [*tensors, pred, control, key, self.measured, *self.front, *stored]
        outputs = self.programs[name](*(given[place] for place in manifest["programs"][name]))
        if not skip:
            self.measured = outputs[manifest["outputs"]]
            for history in self.residuals:
                history.insert(0, history.pop())
        return list(outputs[: manifest["outputs"]])


def zeros_like(buffer: dict[str, Any], sizes: dict[str, int]) -> torch.Tensor:
    """A buffer of the manifest; sizes that are sums or products of symbols are lists, [operator, argument, …]."""

    def value(size: Any) -> int:
        if not isinstance(size, list):
            return sizes[size] if isinstance(size, str) else size
        operator, *arguments = size
        numbers = [value(argument) for argument in arguments]
        if operator == "+":
            return sum(numbers)
        if operator == "//":
            return numbers[0] // numbers[1]
        if operator != "*":
            raise ValueError(f"operator {operator!r}")
        return int(torch.tensor(numbers).prod())

    shape = [value(size) for size in buffer["sizes"]]
    return torch.zeros(shape, dtype=getattr(torch, buffer["dtype"]), device=buffer["device"])


def symbols_of(manifest: dict[str, Any], tensors: list[torch.Tensor]) -> dict[str, int]:
    """The symbols' values, from the dimensions that are a symbol, or a multiple of one."""
    found: dict[str, int] = {}
    declared = [each for each in manifest["inputs"] if each["dtype"] is not None]
    for each, tensor in zip(declared, tensors, strict=True):
        for size, actual in zip(each["sizes"], tensor.shape, strict=True):
            if isinstance(size, str):
                found[size] = actual
            elif isinstance(size, list) and size[0] == "*" and isinstance(size[1], int) and isinstance(size[2], str):
                found[size[2]] = actual // size[1]
    for name, (low, high) in manifest["symbols"].items():
        if not low <= found[name] <= (found[name] if high is None else high):
            raise ValueError(f"{name} = {found[name]}: {low} to {high} were exported")
    return found


def main() -> None:
    """Denoise the first of the tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("inputs")
    parser.add_argument("result")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="of this many steps one is skipped")
    given = parser.parse_args()
    artifact, tensors = PlainArtifact(given.artifact), torch.load(given.inputs)
    artifact.allocate(symbols_of(artifact.manifest, tensors))
    sigmas = torch.linspace(1.0, 0.0, given.steps + 1).tolist()
    place = artifact.manifest["time"]
    with torch.no_grad():
        for step, (sigma, following) in enumerate(pairwise(sigmas), 1):
            tensors[place] = torch.full_like(tensors[place], sigma)
            [velocity] = artifact(tensors, skip=step > 3 and step % given.every == 0)
            tensors[0] = tensors[0] + (following - sigma) * velocity
    torch.save(tensors[0], given.result)


if __name__ == "__main__":
    main()
