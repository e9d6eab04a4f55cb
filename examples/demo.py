"""Draw digits with and without caching, and show what caching gains and costs: what ``make demo`` runs.

The same starting noise is denoised by the plain ``torch.compile`` model and by cached ones, in turns. Prints a table of
what was measured and writes one picture. Needs no network: model and judge lie in ``checkpoints/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from demo_model import NUM_CLASSES, load_classifier, load_model, sample, shifted_sigmas
from torch import Tensor, nn

import cache_dit
from cache_dit.compare import (
    Contender,
    Measured,
    MissingPackageError,
    OnStep,
    Panel,
    Strip,
    compiled_copy,
    cpp_compiler,
    draw_comparison,
    measure,
    progress_bar,
    result_table,
    steps_to_take,
)
from cache_dit.texts import text

GUIDANCE, SHIFT = 2.0, 3.0
VALUE_RANGE = 2.0
"""Pixels lie in -1 to 1."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fixed (defaults)": {},
    "adaptive, target 2x": {"strategy": "adaptive", "target_speedup": 2.0},
    "adaptive, target 3x": {"strategy": "adaptive", "target_speedup": 3.0},
}
"""The cached rows of the table: name -> options of `enable_cache`."""
SHOWN = 2
"""The row whose digits the picture shows beside the plain ones."""


def labels_for(samples: int) -> Tensor:
    """Classes of the digits to draw, 0 to 9 in turns: int64 ``[samples]``."""
    return torch.arange(samples) % NUM_CLASSES


def announce_run(model: nn.Module, steps: int) -> None:
    """Tell the cache what the sampler is about to do: a placement of steps needs their number and noise levels."""
    cache_dit.new_run(model, num_steps=steps, sigmas=shifted_sigmas(steps, SHIFT).tolist(), solver="euler", prediction="flow")


def draw_digits(model: Callable[..., Any], labels: Tensor, seed: int, steps: int, on_step: OnStep) -> Tensor:
    """One digit per label from the noise of ``seed``: float32 ``[N, 1, 24, 24]``."""
    return sample(
        model, labels, steps=steps, guidance=GUIDANCE, seed=seed, shift=SHIFT, on_step=lambda index, images: on_step()
    )


def plain_contender(model: nn.Module, labels: Tensor, inner: str) -> Contender:
    """The model under plain ``torch.compile``."""
    plain = compiled_copy(model, inner)
    return Contender("torch.compile", lambda seed, steps, on_step: draw_digits(plain, labels, seed, steps, on_step))


def cached_contender(name: str, model: nn.Module, labels: Tensor) -> Contender:
    """A model that has caching on."""

    def run(seed: int, steps: int, on_step: OnStep) -> Tensor:
        announce_run(model, steps)
        return draw_digits(model, labels, seed, steps, on_step)

    return Contender(name, run, lambda: cache_dit.get_stats(model))


def accuracy(measured: Measured, labels: Tensor) -> float:
    """Percent of the digits that the classifier takes for what they were meant to be."""
    with torch.no_grad():
        seen = load_classifier()(measured.outputs).argmax(1)
    return 100.0 * float((seen == labels.repeat(len(measured.runs))).double().mean())


def draw_picture(path: Path, measured: Sequence[Measured], shown: int) -> None:
    """Write the digits of the plain model and of row ``shown``, and the steps that each cached row computed."""
    plain, cached = measured[0], measured[shown]
    panels = [
        Panel(plain.name, _ink(plain), f"{plain.seconds:.1f} s"),
        Panel(cached.name, _ink(cached), f"{cached.seconds:.1f} s, {_figures(cached, plain)}"),
    ]
    named = len(measured) > 2  # a single one has its name above its digits
    strips = [Strip(each.name if named else "", each.runs[0].computed, _figures(each, plain)) for each in measured[1:]]
    draw_comparison(path, panels, strips, columns=min(NUM_CLASSES, len(panels[0].pictures)))


def _ink(measured: Measured) -> Any:
    """The digits of the first run as black on white: float32 ``[N, 24, 24]``."""
    return (0.5 - 0.5 * measured.runs[0].outputs[:, 0]).numpy()


def _figures(measured: Measured, plain: Measured) -> str:
    return f"{measured.speedup_over(plain):.2f}x as fast, {measured.psnr_to(plain, VALUE_RANGE):.1f} dB"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``--quick`` sets small ones where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 digits, 8 steps, one run each, no C++ compiler needed")
    parser.add_argument("--samples", type=int, help="digits in a run (40)")
    parser.add_argument("--steps", type=int, help="denoising steps (28)")
    parser.add_argument("--repeats", type=int, help="timed runs of each model (2)")
    parser.add_argument("--inner", help="compiler behind the cache and of the plain model (inductor)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where to write the picture")
    parser.add_argument("--language", choices=("zh", "en"), help="language of the texts")
    options = parser.parse_args(argv)
    sizes = {"samples": (40, 10), "steps": (28, 8), "repeats": (2, 1)}
    for name, (value, quick_value) in sizes.items():
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"--{name} {given}: 1 at least is wanted")
        if given is None:
            setattr(options, name, quick_value if options.quick else value)
    return options


def choose_inner(options: argparse.Namespace) -> str:
    """The inner compiler: as asked, else inductor where a C++ compiler is found."""
    if options.inner is not None:
        return str(options.inner)
    if not options.quick and cpp_compiler() is None:
        print(text("cli_uses_eager", options.language))
    return "eager" if options.quick or cpp_compiler() is None else "inductor"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    options = parse(argv)
    start, language, inner = perf_counter(), options.language, choose_inner(options)
    labels = labels_for(options.samples)
    model = load_model()
    contenders = [plain_contender(model, labels, inner)]
    models = [compiled_copy(model, inner) for _ in SETTINGS]
    for (name, settings), each in zip(SETTINGS.items(), models, strict=True):
        cache_dit.enable_cache(each, inner=inner, language=language, **settings)
        contenders.append(cached_contender(name, each, labels))
    print(text("cli_demo_does", language, samples=options.samples, steps=options.steps, inner=inner,
               repeats=options.repeats, threads=torch.get_num_threads()))  # fmt: skip
    with progress_bar(steps_to_take(len(contenders), options.repeats, options.steps)) as advance:
        measured = measure(contenders, range(options.repeats), options.steps, advance)
    judged = [f"{accuracy(each, labels):.1f}%" for each in measured]
    print(result_table(measured, VALUE_RANGE, language, {text("cli_column_accuracy", language): judged}))
    print(text("cli_demo_explains", language))
    print(f"\n{contenders[SHOWN].name}:\n{cache_dit.summary(models[SHOWN - 1])}\n")
    try:
        draw_picture(options.out, measured, SHOWN)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 1
    print(text("cli_demo_picture", language, path=options.out, name=contenders[SHOWN].name, seconds=perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
