"""From an artifact to something that is called like the model it was made of, with the usual runtime around it."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CacheDitError
from ..graph_report import GraphReport
from ..options import CacheOptions, GlobalConfig, global_config, resolve_options
from ..passes.insert_cache_branch import CacheInputs
from ..passes.residual_math import statistics_length
from ..runtime.buffers import Dynamic, Sizes
from ..runtime.program import FlatCall, Programs, read_time
from ..runtime.ranks import find_members, is_parallel
from ..runtime.registry import model_name, register_module
from ..runtime.session import Session
from ..texts import text
from ..torch_internals import load_programs, outside_inference_mode, pytree
from . import manifest as manifests
from .manifest import Input, Manifest
from .sizes import Size, evaluate, is_linear, solve

# Combinations of sizes whose check is remembered.
MAX_SHAPES = 256


def load(path: str | os.PathLike[str], **options: Any) -> Artifact:
    """A model from the file that `export` wrote, ready to be called as the model was.

    Nothing is traced or compiled, and neither the model's class nor its library is imported.

    Args:
        path: the file.
        options: options of `enable_cache` in the place of those kept in the file. Those that change the programs
            (such as ``front_blocks``, or a higher ``order``) were settled by `export`.

    Raises:
        CacheDitError: the file is damaged or no artifact, or was made for another version of torch, another device or
            processor.
        ValueError, TypeError: a wrong option, or one that the programs were not made for.
    """
    language = options.get("language") if options.get("language") in ("zh", "en") else None
    file = Path(path)
    with _refusing_damage(file, language), zipfile.ZipFile(file) as archive:
        content = _read(archive)
    _check_machine(content, language)
    resolved = _options(content, options, language)
    with _refusing_damage(file, language), zipfile.ZipFile(file) as archive:
        names = manifests.COMPUTE_PROGRAM, manifests.REUSE_PROGRAM
        (compute, reuse), weights = load_programs(file, names, archive)
    return Artifact(_Loaded(content, compute, reuse, weights), resolved)


@contextmanager
def _refusing_damage(path: Path, language: str | None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CacheDitError(text("artifact_corrupt", language, path=str(path), why=_first_line(error))) from error


def _read(archive: zipfile.ZipFile) -> Manifest:
    """The manifest, once all but the weights, which are checked as they are read, was compared with its checksums."""
    names = archive.namelist()
    for name in names:
        if "/data/weights/" not in name:
            archive.read(name)
    [place] = [name for name in names if name.endswith(f"/extra/{manifests.MANIFEST_NAME}")]
    content = manifests.loads(archive.read(place).decode())
    content.cache_inputs()
    return content


def _check_machine(content: Manifest, language: str | None) -> None:
    if content.torch != torch.__version__:
        raise CacheDitError(text("artifact_torch", language, made=content.torch, here=torch.__version__))
    if content.device != "cpu" and not torch.get_device_module(content.device).is_available():
        raise CacheDitError(text("artifact_device", language, made=content.device))
    differ = manifests.differences(content.machine, manifests.machine_of(content.device))
    if differ:
        raise CacheDitError(text("artifact_machine", language, what="; ".join(differ)))


def _options(content: Manifest, given: Mapping[str, Any], language: str | None) -> CacheOptions:
    # what was in force at the export is in the file: of this process's configuration only how much is said
    config = GlobalConfig(global_debug=global_config().global_debug)
    wanted = resolve_options({**content.options, **given}, config)
    made, asked = resolve_options(content.options, config).program(), wanted.program()
    baked = [
        name
        for name in ("front_blocks", "back_blocks", "residual_dtype", "residual_device", "region", "lowering", "inner")
        if getattr(made, name) != getattr(asked, name)
    ]
    if given.get("inner_options"):
        baked.append("inner_options")
    if asked.history > content.history:
        baked.append(f"order, forecast, correction ({asked.history} > {content.history})")
    if asked.noise and not made.noise:
        baked.append("noise_scale")
    if asked.front_clock and (not made.front_clock or asked.front_anchored != made.front_anchored):
        baked.append("strategy")
    if baked:
        raise ValueError(text("artifact_options", language, names=", ".join(baked)))
    return wanted


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """Programs and weights of one file; shared by every `Artifact` that was cloned from one."""

    manifest: Manifest
    compute: Callable[[list[Any]], list[Any]]
    reuse: Callable[[list[Any]], list[Any]]
    weights: list[torch.Tensor]


class Artifact(torch.nn.Module):
    """A cached model that was compiled ahead of time. Called as the model was; `cache_dit.summary`, `new_run`, `context`
    and the others take it as they take a model.

    Results that were records of the model's library come as dictionaries with attributes.
    """

    def __init__(self, loaded: _Loaded, options: CacheOptions) -> None:
        super().__init__()
        self._loaded, self._options = loaded, options
        self._graph = _ArtifactGraph(loaded)
        self._session = Session(options, model_name(self), owns_calls=True)
        self._session.tracing.cached[self._graph] = None
        self._session.in_slot = False
        register_module(self, self._session)

    @property
    def manifest(self) -> Manifest:
        """What the file says of itself."""
        return self._loaded.manifest

    def clone(self) -> Artifact:
        """Another one of the same programs and weights, with a clock, stored residuals and statistics of its own.

        For requests that run at the same time: one each.
        """
        return Artifact(self._loaded, self._options)

    def __deepcopy__(self, memo: object) -> Artifact:
        return self.clone()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            TypeError, ValueError: arguments that the programs were not made for.
            CacheDitError: gradients are asked for; or another rank of its ``group`` did not come or has other options.
        """
        session = self._session
        tensors = self._graph.bind(args, kwargs, session.options.language)
        if session.ranks is None and is_parallel():
            # outside the lock: it waits for the other ranks
            session.join(find_members(self, session.options.group), "artifact")
        with session.lock, torch.no_grad():
            if not session.enabled:
                results = self._graph.plain(tensors)
            else:
                session.begin()
                try:
                    results = session.run(self._graph, tensors)
                except BaseException:
                    session.abort()
                    raise
                session.end()
        return _packed(self._loaded.manifest.output, results)


class Record(OrderedDict[str, Any]):
    """A result with named parts: ``result.sample``, ``result["sample"]`` and ``result[0]`` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The parts in order."""
        return tuple(super(Record, self).__getitem__(name) for name in self)


def _packed(structure: Any, tensors: Sequence[Any]) -> Any:
    [(kind, content)] = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "constant":
        return content
    if kind in ("tuple", "list"):
        entries = [_packed(each, tensors) for each in content]
        return tuple(entries) if kind == "tuple" else entries
    pairs = [(name, _packed(each, tensors)) for name, each in content]
    return dict(pairs) if kind == "dict" else Record(pairs)


class _ArtifactGraph:
    """The programs as the runtime calls them; holds no state of any run."""

    def __init__(self, loaded: _Loaded) -> None:
        self._manifest = content = loaded.manifest
        # the programs run on the weights' memory
        self._loaded = loaded
        self.inputs: CacheInputs = content.cache_inputs()
        self.programs = Programs(
            _picking(loaded.compute, content.programs[manifests.COMPUTE_PROGRAM]),
            _picking(loaded.reuse, content.programs[manifests.REUSE_PROGRAM]),
        )
        self.outputs = content.outputs
        self.report = GraphReport(content.nodes, None, None, region=content.region, lowering="specialize", booked=True)
        self.frame: object = self
        self.controls = content.controls
        self.repeats = content.repeats
        self._arguments = _Arguments(content)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], language: str | None) -> list[torch.Tensor]:
        """The tensors among the arguments of a call, as the programs take them."""
        return self._arguments.bind(args, kwargs, language)

    def time(self, args: Sequence[Any]) -> float | None:
        """The timestep among the tensors; None where there is none."""
        return None if self._manifest.time is None else read_time(args[self._manifest.time])

    def dynamic_sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The values of the symbols."""
        return self._arguments.symbols(args)

    def sizes(self, dynamic: Dynamic) -> Sizes:
        """Sizes of the buffers for what `dynamic_sizes` gave."""
        symbols = {symbol: int(size) for symbol, size in zip(self._manifest.symbols, dynamic, strict=True)}
        front = self._manifest.front
        buffers = (*self._manifest.stored, *([] if front is None else [front]))
        return tuple(tuple(int(evaluate(size, symbols)) for size in buffer.sizes) for buffer in buffers)

    def watched(self, args: Sequence[Any]) -> Sequence[torch.Tensor]:
        """The weights cannot change."""
        return ()

    def given(self, args: Sequence[Any]) -> Sequence[torch.Tensor]:
        """All of them: the weights are not among the arguments."""
        return args

    def plain(self, args: Sequence[Any]) -> Sequence[Any]:
        """Without the cache: the computing program with buffers that are thrown away."""
        inputs, sizes = self.inputs, self.sizes(self.dynamic_sizes(args))
        with outside_inference_mode():
            measured = torch.zeros(
                len(inputs.residuals) * statistics_length(inputs.history), dtype=inputs.accumulate, device=inputs.device
            )
            control = torch.zeros(inputs.history + 1, dtype=inputs.accumulate, device=inputs.device)
            flags = [torch.ones((), dtype=dtype, device=inputs.device) for dtype in (torch.bool, torch.int64)]
            buffers = [] if inputs.front is None else [inputs.front]
            spare = [torch.zeros(sizes[-1], dtype=each.dtype, device=each.device) for each in buffers]
            for buffer, size in zip(inputs.stored, sizes, strict=False):
                spare += [torch.zeros(size, dtype=buffer.dtype, device=buffer.device) for _ in range(inputs.history)]
        flat = (*args, flags[0], control, flags[1], measured, *spare)
        return self.programs.compute(flat)[: self.outputs]


def _picking(run: Callable[[list[Any]], list[Any]], places: tuple[int, ...]) -> FlatCall:
    return lambda flat: run([flat[place] for place in places])


class _Arguments:
    """Checks the arguments of a call against what the programs were made for, and reads the sizes."""

    def __init__(self, content: Manifest) -> None:
        self._content = content
        self._spec = pytree.treespec_loads(content.spec)
        self._tensors = content.tensors
        self._readers = {symbol: self._reader(symbol) for symbol in content.symbols}
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def _reader(self, symbol: str) -> tuple[int, int, Size]:
        """An input, an axis and a size from which the symbol follows."""
        for i, each in enumerate(self._tensors):
            for axis, size in enumerate(each.sizes):
                if is_linear(size, symbol):
                    return i, axis, size
        raise AssertionError(f"no input carries the size {symbol}")

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], language: str | None) -> list[torch.Tensor]:
        values = self._by_name(args, kwargs, language)
        leaves, spec = pytree.tree_flatten([values[name] for name in self._content.names])
        if spec != self._spec:
            raise TypeError(text("artifact_structure", language, names=", ".join(self._content.names)))
        tensors = []
        for each, value in zip(self._content.inputs, leaves, strict=True):
            if each.dtype is None:
                if type(value) is not type(each.value) or value != each.value:
                    raise ValueError(text("artifact_constant", language, name=each.path, value=value, made=each.value))
                continue
            tensors.append(self._checked(each, value, language))
        self._check_sizes(tensors, language)
        return tensors

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any], language: str | None) -> dict[str, Any]:
        content = self._content
        values = dict(zip(content.parameters, args, strict=False))
        twice = values.keys() & kwargs.keys()
        values.update(kwargs)
        if len(args) > len(content.parameters) or twice or values.keys() != set(content.names):
            given = ", ".join([*(map(str, values)), *(["…"] if len(args) > len(content.parameters) else [])])
            raise TypeError(text("artifact_arguments", language, given=given, names=", ".join(content.names)))
        return values

    def _checked(self, each: Input, value: Any, language: str | None) -> torch.Tensor:
        device = self._content.device
        if not isinstance(value, torch.Tensor):
            raise TypeError(text("artifact_tensor", language, name=each.path, kind=type(value).__name__))
        if manifests.dtype_name(value.dtype) != each.dtype or value.device.type != device or value.dim() != len(each.sizes):
            shown = f"{manifests.dtype_name(value.dtype)}{list(value.shape)} {value.device.type}"
            made = f"{each.dtype}[{', '.join(map(_shown, each.sizes))}] {device}"
            raise ValueError(text("artifact_input", language, name=each.path, value=shown, made=made))
        if value.requires_grad and torch.is_grad_enabled():
            raise CacheDitError(text("artifact_grad", language, name=each.path))
        # programs read memory in the order of the example, which `export` made dense
        return value.contiguous()

    def _check_sizes(self, tensors: Sequence[torch.Tensor], language: str | None) -> None:
        shapes = tuple(value.shape for value in tensors)
        if shapes in self._known:
            return
        symbols: dict[str, int] = {}
        for symbol, (i, axis, size) in self._readers.items():
            found = solve(size, symbol, shapes[i][axis])
            low, high = self._content.symbols[symbol]
            if found is None or found < low or (high is not None and found > high):
                allowed = f"{_at(size, symbol, low)} … {'∞' if high is None else _at(size, symbol, high)}"
                self._refuse(i, axis, shapes, allowed if size == symbol else f"{_shown(size)}: {allowed}", language)
            symbols[symbol] = found
        for i, each in enumerate(self._tensors):
            for axis, size in enumerate(each.sizes):
                wanted = evaluate(size, symbols)
                if shapes[i][axis] != wanted:
                    self._refuse(i, axis, shapes, str(wanted), language)
        for guard in self._content.guards:
            if not evaluate(guard, symbols):
                raise ValueError(text("artifact_guard", language, guard=_shown(guard), sizes=symbols))
        if len(self._known) >= MAX_SHAPES:
            self._known.clear()
        self._known[shapes] = tuple(symbols.values())

    def _refuse(self, i: int, axis: int, shapes: Sequence[torch.Size], allowed: str, language: str | None) -> NoReturn:
        name, shape = self._tensors[i].path, list(shapes[i])
        raise ValueError(
            text("artifact_range", language, name=name, shape=shape, axis=axis, value=shape[axis], allowed=allowed)
        )

    def symbols(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        shapes = tuple(value.shape for value in tensors)
        return self._known[shapes]


def _at(size: Size, symbol: str, value: int) -> object:
    return evaluate(size, {symbol: value})


def _shown(size: Size) -> str:
    """``["*", 2, "s"]`` -> ``(2 * s)``."""
    if not isinstance(size, list):
        return str(size)
    operator, *arguments = size
    if len(arguments) == 2:
        return f"({_shown(arguments[0])} {operator} {_shown(arguments[1])})"
    return f"{operator}({', '.join(map(_shown, arguments))})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
