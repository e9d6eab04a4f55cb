"""Ideas for better forecasts that are not in the product, measured on the two trained models of the quality bench.

    python benchmarks/ideas.py                            # all of them
    python benchmarks/ideas.py --only whole_steps depth   # some

The cached region is simulated: blocks are wrapped by hand, so that what is kept of them can be anything. 28 Euler steps,
computed where the default places them; PSNR against the uncached run in dB at 2x / 3x / 4x, mean over the samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from beds import BEDS, Bed
from judge import psnr
from sampling import NULL_LABEL, shifted_sigmas
from torch import Tensor

from cache_dit.strategies.part_of_run import PartOfRun
from cache_dit.strategies.placement import PlacementRules, place_steps

STEPS = 28
COUNTS = (14, 9, 7)
Known = list[tuple[float, Tensor]]


class Simulation:
    """A model of the bench whose blocks but the first are cut into segments, each computed or replaced by a residual."""

    def __init__(self, bed: Bed, segments: int = 1) -> None:
        self.bed, self.model = bed, bed.load()
        # of each segment the residual to add instead of computing it, and the one that the last call had
        self.given: list[Tensor | None] = [None] * segments
        self.had: list[Tensor] = [torch.empty(0)] * segments
        model: Any = self.model
        self._joint = hasattr(model, "single_transformer_blocks")
        blocks = [*model.transformer_blocks, *(model.single_transformer_blocks if self._joint else [])]
        cuts = [1 + round((len(blocks) - 1) * k / segments) for k in range(segments + 1)]
        for segment in range(segments):
            for index in range(cuts[segment], cuts[segment + 1]):
                block = blocks[index]
                block.forward = self._wrapped(block.forward, segment, index == cuts[segment], index == cuts[segment + 1] - 1)

    def _wrapped(self, forward: Callable[..., Any], segment: int, first: bool, last: bool) -> Callable[..., Any]:
        entered: list[Tensor] = self.had

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            given = self.given[segment]
            if first:
                entered[segment] = hidden
            if given is not None:
                out = hidden + given if first else hidden
                if last:
                    self.had[segment] = given
                return (kwargs["encoder_hidden_states"], out) if self._joint else out
            out = forward(*args, **kwargs)
            if last:
                self.had[segment] = (out[1] if self._joint else out) - entered[segment]
            return out

        return run

    def ask(self, x: Tensor, sigma: float, labels: Tensor, given: Sequence[Tensor | None] | None = None) -> Tensor:
        """The velocity, with these residuals in place of the segments' blocks."""
        self.given = [None] * len(self.given) if given is None else list(given)
        return self.bed.velocity(self.model, x, sigma, labels)


@dataclass(frozen=True)
class Task:
    """What is sampled: labels, noise and noise levels, and what the uncached model makes of them."""

    labels: Tensor
    noise: Tensor
    sigmas: list[float]
    reference: Tensor

    def placed(self, count: int) -> set[int]:
        """Where the default computes `count` steps, from 0."""
        rules = PlacementRules(STEPS / count, 0, None, None, PartOfRun(0.0, 1.0))
        return {step - 1 for step in place_steps(rules, STEPS, tuple(self.sigmas), corrected=True)}


def weights(times: Sequence[float], at: float) -> list[float]:
    """Lagrange's basis polynomials over the times."""
    found = []
    for j, own in enumerate(times):
        weight = 1.0
        for k, other in enumerate(times):
            if k != j:
                weight *= (at - other) / (own - other)
        found.append(weight)
    return found


def through(known: Known, at: float, points: int) -> Tensor:
    """The polynomial through the newest points."""
    known = known[:points]
    mixed = sum(w * value for w, (_, value) in zip(weights([time for time, _ in known], at), known, strict=True))
    assert isinstance(mixed, Tensor)
    return mixed


def sampled(velocity: Callable[[int, Tensor], Tensor], task: Task) -> Tensor:
    """Euler's method."""
    x = task.noise
    for i in range(STEPS):
        x = x + (task.sigmas[i + 1] - task.sigmas[i]) * velocity(i, x)
    return x


def corrected(
    simulation: Simulation,
    task: Task,
    computed: set[int],
    centre: Sequence[Tensor] | None = None,
    again: Literal["no", "front", "whole"] = "no",
) -> Tensor:
    """As the default does it: a line ahead, a parabola between.

    `centre`: what is taken off the residual of each step. `again`: of a step that computes, what is done once more after the
    state has been put right, from where it goes on: nothing, the front and the head, or the blocks too.
    """
    sigmas, x = task.sigmas, task.noise
    known: Known = []
    skipped: list[tuple[int, Tensor, Tensor]] = []

    def used(at: int, points: int) -> Tensor:
        residual = through(known, sigmas[at], points)
        return residual if centre is None else residual + centre[at]

    for i in range(STEPS):
        step = sigmas[i + 1] - sigmas[i]
        if i not in computed:
            v = simulation.ask(x, sigmas[i], task.labels, [used(i, 2)])
            skipped.append((i, x, v))
            x = x + step * v
            continue
        v = simulation.ask(x, sigmas[i], task.labels)
        residual = simulation.had[0]
        known.insert(0, (sigmas[i], residual if centre is None else residual - centre[i]))
        for m, state, before in skipped:
            better = simulation.ask(state, sigmas[m], task.labels, [used(m, 3)])
            x = x + (sigmas[m + 1] - sigmas[m]) * (better - before)
        if skipped and again != "no":
            v = simulation.ask(x, sigmas[i], task.labels, None if again == "whole" else [residual])
            known[0] = (sigmas[i], simulation.had[0])
        x = x + step * v
        skipped = []
    return x


def whole_steps(simulation: Simulation, task: Task, computed: set[int], denoised: bool) -> Tensor:
    """No block runs at a skipped step: the velocity itself is forecast, or the denoised picture x − σ v; at a computed step
    the way since the last one is gone once more between the known values."""
    sigmas, x = task.sigmas, task.noise
    known: Known = []
    since: list[tuple[int, Tensor]] = []

    def velocity(value: Tensor, state: Tensor, at: int) -> Tensor:
        return (state - value) / sigmas[at] if denoised else value

    for i in range(STEPS):
        if i in computed:
            v = simulation.ask(x, sigmas[i], task.labels)
            known.insert(0, (sigmas[i], x - sigmas[i] * v if denoised else v))
            if since:
                state = since[0][1]
                for m, _ in since:
                    state = state + (sigmas[m + 1] - sigmas[m]) * velocity(through(known, sigmas[m], 3), state, m)
                x, since = state, []
            v = velocity(known[0][1], x, i)
        else:
            since.append((i, x))
            v = velocity(through(known, sigmas[i], 2), x, i)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


def by_segments(simulation: Simulation, task: Task, computed: Sequence[set[int]]) -> Tensor:
    """Each segment computes at steps of its own and continues a line elsewhere; nothing is corrected."""
    known: list[Known] = [[] for _ in computed]

    def velocity(i: int, x: Tensor) -> Tensor:
        given = [None if i in own else through(each, task.sigmas[i], 2) for own, each in zip(computed, known, strict=True)]
        v = simulation.ask(x, task.sigmas[i], task.labels, given)
        for k, own in enumerate(computed):
            if i in own:
                known[k].insert(0, (task.sigmas[i], simulation.had[k]))
        return v

    return sampled(velocity, task)


def per_channel(simulation: Simulation, task: Task, computed: set[int], apart: bool) -> Tensor:
    """A line, or for each channel the line or the last value, whichever erred less at the last computed step (`apart`)."""
    known: Known = []
    share = torch.ones(())

    def velocity(i: int, x: Tensor) -> Tensor:
        nonlocal share
        line = through(known, task.sigmas[i], 2) if known else None
        if line is not None:
            line = known[0][1] + share * (line - known[0][1])
        if i not in computed:
            return simulation.ask(x, task.sigmas[i], task.labels, [line])
        v = simulation.ask(x, task.sigmas[i], task.labels)
        truth = simulation.had[0]
        if apart and len(known) > 1:
            ahead = through(known, task.sigmas[i], 2)
            off_line, off_last = ((truth - each).square().mean(dim=(0, 1)) for each in (ahead, known[0][1]))
            share = (off_line < off_last).to(truth.dtype)
        known.insert(0, (task.sigmas[i], truth))
        return v

    return sampled(velocity, task)


def guided(
    simulation: Simulation, task: Task, computed: tuple[set[int], set[int]], guidance: float, from_cond: bool = False
) -> Tensor:
    """Guidance whose two branches compute at steps of their own; the unconditional one continues its own line, or the last
    value moved by what the conditional residual has moved since (`from_cond`). Nothing is corrected."""
    known: tuple[Known, Known] = ([], [])
    nothing = torch.full_like(task.labels, NULL_LABEL)
    of_cond: dict[float, Tensor] = {}

    def velocity(i: int, x: Tensor) -> Tensor:
        sigma = task.sigmas[i]
        found = []
        for branch, labels in enumerate((task.labels, nothing)):
            given = None
            if i not in computed[branch]:
                given = through(known[branch], sigma, 2)
                if branch and from_cond:
                    last, residual = known[1][0]
                    given = residual + of_cond[sigma] - of_cond[last]
            found.append(simulation.ask(x, sigma, labels, [given]))
            residual = simulation.had[0]
            if branch == 0:
                of_cond[sigma] = residual
            if given is None:
                known[branch].insert(0, (sigma, residual))
        return found[1] + guidance * (found[0] - found[1])

    return sampled(velocity, task)


def task_of(bed: Bed, shift: float, samples: int, seed: int, guidance: float = 1.0) -> Task:
    """Draw the noise and sample without a cache."""
    labels = torch.arange(samples) % 10
    noise = torch.randn(64, 1, 24, 24, generator=torch.Generator().manual_seed(seed))[:samples]
    task = Task(labels, noise, shifted_sigmas(STEPS, shift), noise)
    simulation, everything = Simulation(bed), set(range(STEPS))
    whole = (
        sampled(lambda i, x: simulation.ask(x, task.sigmas[i], labels), task)
        if guidance == 1.0
        else guided(simulation, task, (everything, everything), guidance)
    )
    return Task(labels, noise, task.sigmas, whole)


def profile(bed: Bed, shift: float) -> list[list[Tensor]]:
    """Mean residuals of each step over twelve other samples: for each channel, and for each channel of each token."""
    task = task_of(bed, shift, 12, seed=99)
    simulation = Simulation(bed)
    means: list[list[Tensor]] = [[], []]

    def velocity(i: int, x: Tensor) -> Tensor:
        v = simulation.ask(x, task.sigmas[i], task.labels)
        means[0].append(simulation.had[0].mean(dim=(0, 1), keepdim=True))
        means[1].append(simulation.had[0].mean(dim=0, keepdim=True))
        return v

    sampled(velocity, task)
    return means


Row = tuple[str, Callable[[int], Tensor]]
IDEAS = ("whole_steps", "again", "mean", "depth", "channels", "uncond")


def rows(idea: str, bed: Bed, task: Task, shift: float, guided_task: Callable[[], Task]) -> list[Row]:
    """What is measured of an idea: a name, and what samples with so many computed steps."""
    one = Simulation(bed)
    if idea == "whole_steps":
        return [
            ("residual of the blocks (the default)", lambda n: corrected(one, task, task.placed(n))),
            ("the velocity", lambda n: whole_steps(one, task, task.placed(n), denoised=False)),
            ("the denoised picture", lambda n: whole_steps(one, task, task.placed(n), denoised=True)),
        ]
    if idea == "again":
        return [
            ("front and head again at the corrected state", lambda n: corrected(one, task, task.placed(n), again="front")),
            ("the blocks too, which counts double", lambda n: corrected(one, task, task.placed(n), again="whole")),
        ]
    if idea == "mean":
        means = profile(bed, shift)
        return [
            ("less the profiled mean of each channel", lambda n: corrected(one, task, task.placed(n), means[0])),
            ("and of each token", lambda n: corrected(one, task, task.placed(n), means[1])),
        ]
    if idea == "depth":
        two = Simulation(bed, segments=2)
        return [
            (f"front half {more:+d}, rear half {-more:+d} computed, not corrected", lambda n, more=more: by_segments(
                two, task, (task.placed(n + more), task.placed(n - more))))
            for more in (0, 2, -2)
        ]  # fmt: skip
    if idea == "channels":
        return [
            ("a line, not corrected", lambda n: per_channel(one, task, task.placed(n), apart=False)),
            ("line or last value for each channel", lambda n: per_channel(one, task, task.placed(n), apart=True)),
        ]
    with_guidance = guided_task()

    def branches(n: int, more: int, from_cond: bool) -> Tensor:
        computed = (with_guidance.placed(n + more), with_guidance.placed(n - more))
        return guided(one, with_guidance, computed, 2.0, from_cond)

    return [
        ("guidance 2, both alike, not corrected", lambda n: branches(n, 0, False)),
        ("unconditional 2 fewer, conditional 2 more", lambda n: branches(n, 2, False)),
        ("the same, unconditional from conditional", lambda n: branches(n, 2, True)),
    ]


def main() -> None:
    """Print what the ideas come to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(IDEAS), choices=IDEAS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name, make in BEDS.items():
        for shift in (3.0, 1.0):
            bed = make()
            task = task_of(bed, shift, arguments.samples, arguments.seed)
            guided_task = task_of(bed, shift, arguments.samples, arguments.seed, 2.0) if "uncond" in arguments.only else task
            for idea in arguments.only:
                for title, sample in rows(idea, bed, task, shift, lambda found=guided_task: found):  # type: ignore[misc]
                    reference = (guided_task if idea == "uncond" else task).reference
                    found = " / ".join(f"{psnr(sample(n), reference):.1f}" for n in COUNTS)
                    print(
                        f"{name}, {'linear' if shift == 1.0 else f'shift {shift:g}'}, {idea}: {title}: {found} dB", flush=True
                    )


if __name__ == "__main__":
    main()
