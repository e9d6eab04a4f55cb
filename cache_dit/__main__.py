"""``python -m cache_dit``: what is usable here, what the compiler finds in a model, what caching gains and costs."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CacheDitError
from .messages import CacheDitWarning
from .texts import LANGUAGES, text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .compare import Contender, Measured

Inputs = Callable[[int, int], Mapping[str, Any]]
"""(step, steps) -> the keyword arguments of one call; steps count from 0."""

CACHE_OPTIONS = (
    "strategy",
    "skip_interval",
    "warmup_steps",
    "target_speedup",
    "tolerance",
    "front_blocks",
    "back_blocks",
)
"""Options of the command that go to `enable_cache` as they are, where given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 for a missing package, 2 for a wrong argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = build_parser(_language_among(arguments)).parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    if command is info:
        info(options)
        return 0
    return _run(command, options)


def _run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    from .compare import MissingPackageError

    try:
        command(options)
    except Exception as error:
        if options.traceback:
            raise
        known = isinstance(error, (CommandError, CacheDitError))
        told = str(error) if known else text("cli_failed", options.language, model=options.model, error=_told(error))
        print(told, file=sys.stderr)
        return 1 if isinstance(error, MissingPackageError) else 2
    return 0


# ---- arguments -------------------------------------------------------------------------------------------------------


def _language_among(arguments: Sequence[str]) -> str | None:
    """The language given, before the parser, whose own texts depend on it, exists."""
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    early.add_argument("--language", choices=LANGUAGES)
    try:
        return str(early.parse_known_args(arguments)[0].language or "") or None
    except argparse.ArgumentError:
        return None


def build_parser(language: str | None) -> argparse.ArgumentParser:
    """The parser, with its texts in this language."""
    parser = argparse.ArgumentParser(prog="python -m cache_dit", description=text("cli_about", language))
    common = argparse.ArgumentParser(add_help=False)
    for place, default in ((parser, None), (common, argparse.SUPPRESS)):
        place.add_argument("--language", choices=LANGUAGES, default=default, help=text("cli_help_language", language))
    commands = parser.add_subparsers(required=True, metavar="info | inspect | compare")
    for command, add_arguments in ((info, None), (inspect, _add_inspect), (compare, _add_compare)):
        about = text(f"cli_about_{command.__name__}", language)
        sub = commands.add_parser(command.__name__, help=about, description=about, parents=[common])
        sub.set_defaults(command=command)
        if add_arguments is not None:
            _add_subject(sub, language)
            add_arguments(sub, language)
    return parser


def _add_subject(parser: argparse.ArgumentParser, language: str | None) -> None:
    parser.add_argument("model", metavar="MODEL", help=text("cli_help_model", language))
    parser.add_argument("--prompt", default="a photo of a cat", help=text("cli_help_prompt", language))
    for name in ("--height", "--width"):
        parser.add_argument(name, type=int, metavar="PIXELS", help=text("cli_help_size", language))
    parser.add_argument("--pipeline", metavar="CLASS", help=text("cli_help_pipeline", language))
    call_help = text("cli_help_call", language)
    parser.add_argument("--call", action="append", default=[], metavar="NAME=VALUE", help=call_help)
    parser.add_argument("--device", help=text("cli_help_device", language))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text("cli_help_dtype", language))
    for name in ("--front-blocks", "--back-blocks"):
        parser.add_argument(name, type=int, metavar="N", help=text("cli_help_option", language))
    parser.add_argument("--region", metavar="PATH[,PATH]", help=text("cli_help_region", language))
    parser.add_argument("--traceback", action="store_true", help=text("cli_help_traceback", language))


def _add_inspect(parser: argparse.ArgumentParser, language: str | None) -> None:
    parser.add_argument("--inner", default="eager", help=text("cli_help_inner", language, default="eager"))


def _add_compare(parser: argparse.ArgumentParser, language: str | None) -> None:
    parser.add_argument("--steps", type=_positive, default=28, metavar="N", help=text("cli_help_steps", language))
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help=text("cli_help_repeats", language))
    help_option = text("cli_help_option", language)
    parser.add_argument("--strategy", choices=("fixed", "dynamic", "adaptive"), help=help_option)
    for name in ("--skip-interval", "--warmup-steps"):
        parser.add_argument(name, type=int, metavar="N", help=help_option)
    for name in ("--target-speedup", "--tolerance"):
        parser.add_argument(name, type=float, metavar="X", help=help_option)
    parser.add_argument("--inner", help=text("cli_help_inner", language, default="inductor / eager"))
    parser.add_argument("--out", type=Path, default=Path("out/compare.png"), help=text("cli_help_out", language))


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} < 1")
    return number


def cache_options(options: argparse.Namespace) -> dict[str, Any]:
    """What of the command's options goes to `enable_cache`, where given."""
    given = {name: getattr(options, name, None) for name in CACHE_OPTIONS}
    region = options.region
    if region is not None:
        given["region"] = tuple(region.split(",")) if "," in region else region
    return {name: value for name, value in given.items() if value is not None}


# ---- info ------------------------------------------------------------------------------------------------------------


def info(options: argparse.Namespace) -> None:
    """Print versions and what is usable here. A look-up that fails prints its error."""
    language = options.language
    for name, look_up in _LOOK_UPS.items():
        try:
            value = look_up(language)
        except Exception as error:
            value = f"{type(error).__name__}: {error}"
        print(f"{text(f'cli_info_{name}', language)}: {value}")


def _python(language: str | None) -> str:
    return f"{sys.version.split()[0]} ({sys.platform})"


def _own_version(language: str | None) -> str:
    from . import __version__

    return f"{__version__} ({Path(__file__).resolve().parent})"


def _version_of(distribution: str) -> Callable[[str | None], str]:
    def look_up(language: str | None) -> str:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return text("cli_not_installed", language)

    return look_up


def _compiler(language: str | None) -> str:
    from .compare import cpp_compiler

    return cpp_compiler() or text("cli_no_compiler", language)


def _cuda(language: str | None) -> str:
    import torch

    if not torch.cuda.is_available():
        return text("cli_none", language)
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _inner_compilers(language: str | None) -> str:
    import torch

    from .compare import usable_inner

    device = "cuda" if torch.cuda.is_available() else "cpu"
    usable = ["eager", "aot_eager"]
    if usable_inner(device) == "inductor":
        return ", ".join(["inductor", *usable])
    return text("cli_without_inductor", language, usable=", ".join(usable))


def _entry_point(language: str | None) -> str:
    found = metadata.entry_points(group="torch_dynamo_backends", name="cache_dit")
    return text("cli_registered" if found else "cli_not_registered", language)


def _other_project(language: str | None) -> str:
    from .other_project import other_version

    version = other_version()
    return text("cli_no_other", language) if version is None else text("cli_other_found", language, version=version)


_LOOK_UPS: dict[str, Callable[[str | None], str]] = {
    "cache_dit": _own_version,
    "python": _python,
    "torch": _version_of("torch"),
    "numpy": _version_of("numpy"),
    "diffusers": _version_of("diffusers"),
    "compiler": _compiler,
    "cuda": _cuda,
    "triton": _version_of("triton"),
    "inner": _inner_compilers,
    "entry_point": _entry_point,
    "other": _other_project,
}


# ---- inspect and compare ---------------------------------------------------------------------------------------------


def _subject(options: argparse.Namespace) -> Subject:
    names = ("prompt", "height", "width", "device", "dtype", "pipeline", "call")
    return load_subject(options.model, Request(**{name: getattr(options, name) for name in names}), options.language)


def inspect(options: argparse.Namespace) -> None:
    """Print what the compiler finds in a model."""
    from .api import explain
    from .integrations.targets import denoisers_of

    subject = _subject(options)
    # a call or two, which skip nothing: that is no run of few steps
    _turn_on(subject, options.inner, {**cache_options(options), "schedule": "1"}, options.language)
    subject.forward()
    print("\n\n".join(str(explain(module)) for module in denoisers_of(subject.model, options.language)))


def compare(options: argparse.Namespace) -> None:
    """Print times, hit rate and difference of runs with and without caching, and write the pictures."""
    from .compare import measure, progress_bar, result_table, steps_to_take, usable_inner

    language = options.language
    subject = _subject(options)
    inner = options.inner or usable_inner(subject.device())
    if options.inner is None and inner == "eager":
        print(text("cli_uses_eager", language))
    pair = contenders(subject, inner, cache_options(options), language)
    print(text("cli_compares", language, repeats=options.repeats, steps=options.steps, inner=inner))
    with progress_bar(steps_to_take(len(pair), options.repeats, options.steps)) as advance:
        measured = measure(pair, range(options.repeats), options.steps, advance)
    print(result_table(measured, subject.value_range, language))
    print(text(subject.compared, language))
    drawn = subject.draw(measured, options.out)
    print(text("cli_picture" if drawn else "cli_no_picture", language, path=options.out))


def _turn_on(subject: Subject, inner: str, options: Mapping[str, Any], language: str | None) -> None:
    from .api import enable_cache

    try:
        enable_cache(subject.model, inner=inner, language=language, **options)
    except (ValueError, TypeError) as error:  # these say all: option, value given, values allowed
        raise CommandError(str(error)) from error


def contenders(subject: Subject, inner: str, options: Mapping[str, Any], language: str | None) -> list[Contender]:
    """The model without and, turned on here, with caching."""
    from .api import get_stats
    from .compare import Contender

    plain = subject.plain(inner)
    _turn_on(subject, inner, options, language)

    def run_cached(seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
        subject.announce(steps)
        return subject.run(subject.model, seed, steps, on_step)

    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return [
        Contender("torch.compile", lambda seed, steps, on_step: subject.run(plain, seed, steps, on_step)),
        Contender(f"enable_cache(model{given})", run_cached, lambda: get_stats(subject.model)),
    ]


# ---- what MODEL names ------------------------------------------------------------------------------------------------


class CommandError(Exception):
    """The command cannot do what was asked; the message says why."""


class Subject:
    """A model and a way to run it. This base class runs a module with keyword inputs.

    Attributes:
        model: what `enable_cache` is given: a module or a pipeline.
        compared: key of the text that says what a comparison compares.
        value_range: range of the outputs, for the PSNR; None: that of the uncached outputs.
    """

    compared = "cli_compared_module"
    value_range: float | None = None

    def __init__(self, model: Any, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    def device(self) -> str:
        """Type of the device that the model is on."""
        parameter = next(self.model.parameters(), None)
        return "cpu" if parameter is None else str(parameter.device.type)

    def plain(self, inner: str) -> Any:
        """A copy of the model that shares its weights and is compiled without caching."""
        from .compare import compiled_copy

        return compiled_copy(self.model, inner)

    def announce(self, steps: int) -> None:
        """Say that a run of the cached model begins, where the model's own calls do not tell."""
        from .api import new_run

        new_run(self.model, num_steps=steps)

    def forward(self) -> None:
        """Call the model once, or as few times as its pipeline can."""
        import torch

        with torch.no_grad():
            self.model(**self.inputs(0, 1))

    def run(self, model: Any, seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
        """One run of ``model``, ours or its plain copy: outputs ``[N, ...]``."""
        import torch

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return euler_loop(model, self.inputs, steps, on_step)

    def draw(self, measured: Sequence[Measured], path: Path) -> bool:
        """Write the pictures of a comparison; False where the outputs are no pictures."""
        return False


def euler_loop(model: Any, inputs: Inputs, steps: int, on_step: Callable[[], object]) -> Tensor:
    """Call the model ``steps`` times: the argument shaped as the output moves by -output / steps after each call.

    Returns that argument's last value; where no argument has the output's shape, all outputs, stacked in the second
    dimension.
    """
    import torch

    name, state, outputs = None, None, []
    for step in range(steps):
        arguments = dict(inputs(step, steps))
        if name is not None:
            arguments[name] = state
        output = first_tensor(model(**arguments))
        if step == 0:
            name = _argument_like(output, arguments)
        if name is None:
            outputs.append(output)
        else:
            state = arguments[name] - (output / steps).to(arguments[name].dtype)
        on_step()
    return torch.stack(outputs, 1) if state is None else state


def _argument_like(output: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """The first argument that is a floating tensor of the output's shape."""
    return next((name for name, value in arguments.items() if _is_float(value) and value.shape == output.shape), None)


def _is_float(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output: the output itself, or what a tuple, a dictionary or ``.sample`` holds.

    Raises:
        CommandError: there is none.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "sample"):
        return first_tensor(output.sample)
    parts = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, (list, tuple)) and parts:
        return first_tensor(parts[0])
    raise CommandError(f"the model returned {type(output).__name__}: a tensor is wanted, alone or first in a tuple")


class PipelineSubject(Subject):
    """A diffusers pipeline: a run is one call of it."""

    compared, value_range = "cli_compared_pipeline", 1.0

    def __init__(self, pipeline: Any, request: Request, language: str | None) -> None:
        super().__init__(pipeline, lambda step, steps: {})
        pipeline.set_progress_bar_config(disable=True)
        self._request, self._language = request, language

    def device(self) -> str:
        return str(self.model.device.type)

    def plain(self, inner: str) -> Any:
        from .compare import compiled_copy
        from .integrations.targets import denoisers_of

        pipeline = copy.copy(self.model)
        denoisers = denoisers_of(pipeline, self._language)
        for name, component in self.model.components.items():
            if any(component is denoiser for denoiser in denoisers):
                setattr(pipeline, name, compiled_copy(component, inner))
        pipeline.scheduler = copy.deepcopy(self.model.scheduler)
        return pipeline

    def announce(self, steps: int) -> None:
        """The scheduler tells."""

    def forward(self) -> None:
        self._call(self.model, 0, 2, "latent", lambda: None)

    def run(self, model: Any, seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
        import torch

        result = self._call(model, seed, steps, "np", on_step)
        pictures = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
        return torch.as_tensor(pictures)

    def _call(self, pipeline: Any, seed: int, steps: int, output_type: str, on_step: Callable[[], object]) -> Any:
        import torch

        def after_step(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return values

        given = {
            "num_inference_steps": steps,
            "output_type": output_type,
            "generator": torch.Generator().manual_seed(seed),
            "callback_on_step_end": after_step,
            **self._request.arguments(),
        }
        parameters = signature(type(pipeline).__call__).parameters
        further = self._request.further(self._language)
        unknown = sorted(further.keys() - parameters.keys())
        if unknown:
            raise CommandError(text("cli_unknown_call", self._language, names=", ".join(unknown)))
        given.update(further)
        needed = {name for name, each in parameters.items() if each.default is each.empty and each.kind not in _VARIADIC}
        missing = sorted(needed - {"self", *given})
        if missing:
            raise CommandError(text("cli_pipeline_needs", self._language, names=", ".join(missing)))
        return pipeline(**{name: value for name, value in given.items() if name in parameters})

    def draw(self, measured: Sequence[Measured], path: Path) -> bool:
        from .compare import Panel, Strip, draw_comparison

        panels = [Panel(each.name, _stills(each.runs[0].outputs)) for each in measured]
        strips = [Strip("", each.runs[0].computed, each.name) for each in measured if each.runs[0].computed]
        draw_comparison(path, panels, strips, columns=min(4, len(panels[0].pictures)))
        return True


CONTACT_FRAMES = 8
"""Frames of a video that the picture of a comparison shows."""
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _stills(outputs: Tensor) -> NDArray[np.float32]:
    """Pictures ``[N, H, W, C]`` of pictures, or the contact sheet of videos ``[N, F, H, W, C]``: frames at equal distances."""
    pictures = outputs
    if outputs.dim() == 5:
        frames = outputs.shape[1]
        count = min(frames, CONTACT_FRAMES)
        shown = [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]
        pictures = outputs[:, shown].flatten(0, 1)
    array: NDArray[np.float32] = pictures.float().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


class DemoSubject(Subject):
    """The digits of ``examples/demo.py`` in a checkout."""

    compared, value_range = "cli_compared_demo", 2.0

    def __init__(self, demo: Any) -> None:
        super().__init__(demo.load_model(), lambda step, steps: {})
        self._demo, self._labels = demo, demo.labels_for(40)

    def announce(self, steps: int) -> None:
        self._demo.announce_run(self.model, steps)

    def forward(self) -> None:
        self._demo.draw_digits(self.model, self._labels[:10], 0, 1, lambda: None)

    def run(self, model: Any, seed: int, steps: int, on_step: Callable[[], object]) -> Tensor:
        outputs: Tensor = self._demo.draw_digits(model, self._labels, seed, steps, on_step)
        return outputs

    def draw(self, measured: Sequence[Measured], path: Path) -> bool:
        self._demo.draw_picture(path, measured, shown=1)
        return True


# ---- from its name to the model --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """How to load what lies in a folder, and what to ask a pipeline for; None: as it is there, or as it does itself.

    Attributes:
        prompt: text for pipelines that take one.
        height, width: of the pictures, in pixels.
        device: ``'cuda'``, ...; None: a GPU where there is one.
        dtype: name of a dtype of torch.
        pipeline: class of diffusers to load the folder as.
        call: further arguments of a pipeline's call, each ``name=value``.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    device: str | None = None
    dtype: str | None = None
    pipeline: str | None = None
    call: Sequence[str] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of a pipeline's call by the names that pipelines give them."""
        given = {"prompt": self.prompt, "class_labels": [0, 1], "height": self.height, "width": self.width}
        return {name: value for name, value in given.items() if value is not None}

    def further(self, language: str | None) -> dict[str, Any]:
        """What ``call`` says: values as JSON, else as text; the text behind a name with "image" is a picture's file.

        Raises:
            CommandError: one is not ``name=value``, or names no picture.
        """
        found = {}
        for each in self.call:
            name, equals, value = each.partition("=")
            if not equals or not name.isidentifier():
                raise CommandError(text("cli_wrong_call", language, given=each))
            found[name] = _picture(value, language) if "image" in name.split("_") else _json_or_text(value)
        return found

    def place(self) -> str:
        """The device to run on."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _picture(path: str, language: str | None) -> Any:
    from .compare import require

    try:
        return require("PIL.Image", language).open(path).convert("RGB")
    except OSError as error:
        raise CommandError(text("cli_unread_picture", language, path=path, error=_told(error))) from error


def load_subject(name: str, request: Request, language: str | None) -> Subject:
    """The model that ``name`` stands for: ``demo``, a folder of diffusers, or ``package.module:function``.

    Raises:
        CommandError: there is no such model.
        MissingPackageError: it needs a package that is not installed.
    """
    if name == "demo":
        return DemoSubject(_load_demo(language))
    if Path(name).exists():
        return _load_folder(Path(name), request, language)
    module, colon, function = name.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), function)):
        return _load_function(module, function, name, language)
    raise CommandError(text("cli_model_unknown", language, model=name))


def _load_demo(language: str | None) -> Any:
    from .compare import require

    folder = Path(__file__).resolve().parents[1] / "examples"
    if not (folder / "demo.py").is_file():
        raise CommandError(text("cli_no_demo", language, folder=folder))
    for package in ("diffusers", "safetensors"):
        require(package, language)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("cache_dit_demo", folder / "demo.py")
        if spec is None or spec.loader is None:
            raise AssertionError("a file that exists has a loader")
        demo = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = demo
        spec.loader.exec_module(demo)
    finally:
        sys.path.remove(str(folder))
    return demo


def _load_folder(folder: Path, request: Request, language: str | None) -> Subject:
    from .compare import require

    is_pipeline, is_model = (folder / "model_index.json").is_file(), (folder / "config.json").is_file()
    if not is_pipeline and not is_model:
        raise CommandError(text("cli_no_model_in_folder", language, folder=folder))
    diffusers = require("diffusers", language)
    try:
        if is_pipeline:
            kind = getattr(diffusers, request.pipeline or "DiffusionPipeline")
            pipeline = kind.from_pretrained(str(folder), **_load_arguments(request), **_left_out(folder))
            return PipelineSubject(pipeline.to(request.place()), request, language)
        model = diffusers.AutoModel.from_pretrained(str(folder), **_load_arguments(request)).to(request.place())
    except Exception as error:
        raise CommandError(text("cli_not_loaded", language, model=folder, error=_told(error))) from error
    return Subject(model, falling_time(guess_inputs(model, language)))


def _load_arguments(request: Request) -> dict[str, Any]:
    import torch

    dtype = {} if request.dtype is None else {"torch_dtype": getattr(torch, request.dtype)}
    return {"local_files_only": True, **dtype}


def _left_out(folder: Path) -> dict[str, None]:
    """The components that a pipeline was saved without: diffusers (0.42) wants to be told of them again."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: None for name, kind in index.items() if kind == [None, None]}


def _load_function(module: str, function: str, name: str, language: str | None) -> Subject:
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:
        raise CommandError(text("cli_not_loaded", language, model=name, error=_told(error))) from error
    if not _is_model_with_inputs(made):
        raise CommandError(text("cli_wrong_return", language, model=name, kinds=_kinds(made)))
    model, inputs = made
    return Subject(model, (lambda step, steps: inputs(step)) if callable(inputs) else falling_time(inputs))


def _is_model_with_inputs(made: object) -> bool:
    from torch import nn

    if not isinstance(made, (tuple, list)) or len(made) != 2:
        return False
    return isinstance(made[0], nn.Module) and (callable(made[1]) or isinstance(made[1], Mapping))


def _kinds(made: object) -> str:
    """The class of what was returned; of a tuple, those of its parts."""
    if isinstance(made, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ---- inputs ----------------------------------------------------------------------------------------------------------


def falling_time(inputs: Mapping[str, Any]) -> Inputs:
    """The same inputs at every step, but for the timestep, which falls in equal steps from its value towards 0."""
    from .runtime.program import time_names

    name = next((name for name in time_names(inputs) if inputs.get(name) is not None), None)

    def at(step: int, steps: int) -> dict[str, Any]:
        if name is None or step == 0:
            return dict(inputs)
        time = inputs[name]
        fallen = time * (steps - step) / steps
        return {**inputs, name: fallen.to(time.dtype) if hasattr(time, "dtype") else type(time)(fallen)}

    return at


TEXT_DIMENSIONS = ("joint_attention_dim", "text_dim", "caption_channels", "text_embed_dim", "cross_attention_dim")
TEXT_TOKENS, PICTURE_SIZE = 8, 16


def guess_inputs(model: Any, language: str | None) -> dict[str, Any]:
    """Small random inputs for a transformer of diffusers, by the names in its signature and its configuration.

    Raises:
        CommandError: the model accepts none of them.
    """
    import torch

    names = signature(model.forward).parameters
    error: Exception | None = None
    for latents in _latents(model.config):
        guessed = {name: value for name, value in _values(model.config, latents).items() if name in names}
        inputs = {name: _suited(value, model) for name, value in guessed.items()}
        try:
            with torch.no_grad():
                first_tensor(model(**inputs))
        except Exception as refused:
            error = error or refused
        else:
            return inputs
    told = "-" if error is None else _told(error)
    raise CommandError(text("cli_no_inputs", language, model=type(model).__name__, error=told))


def _suited(value: Any, model: Any) -> Any:
    """A tensor on the model's device and, where floating, in its dtype; anything else as it is."""
    if not hasattr(value, "to"):
        return value
    return value.to(model.device, model.dtype) if _is_float(value) else value.to(model.device)


def _latents(config: Mapping[str, Any]) -> list[Tensor]:
    """Latents as pictures, as video and as tokens."""
    import torch

    channels, size = config.get("in_channels") or 4, config.get("sample_size")
    side = min(size, 32) if isinstance(size, int) else PICTURE_SIZE
    shapes = ((1, channels, side, side), (1, channels, 1, side, side), (1, PICTURE_SIZE, channels))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _values(config: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
    import torch

    width = next((config[name] for name in TEXT_DIMENSIONS if isinstance(config.get(name), int)), None)
    pooled = config.get("pooled_projection_dim")
    values = {
        "hidden_states": latents,
        "timestep": torch.full((1,), 500.0),
        "class_labels": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": None if width is None else torch.randn(1, TEXT_TOKENS, width),
        "pooled_projections": None if pooled is None else torch.randn(1, pooled),
        "img_ids": torch.zeros(latents.shape[1], 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "guidance": torch.ones(1) if config.get("guidance_embeds") else None,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return {name: value for name, value in values.items() if value is not None}


def _show_plainly() -> None:
    """Our warnings without file and line; letters that the terminal cannot show as '?'."""
    default = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        return f"{message}\n" if issubclass(category, CacheDitWarning) else default(message, category, *place, **more)

    warnings.formatwarning = formatted
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    _show_plainly()
    sys.exit(main())
