"""From a model to an artifact: traced as a whole, rewritten by the same passes as ever, compiled ahead of time."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import passes
from ..backend import rewrite_graph
from ..errors import CacheDitError
from ..graph_report import GraphReport, describe_region
from ..integrations.targets import denoisers_of
from ..lowering.specialize import specialized_graph
from ..messages import announce
from ..options import CacheOptions, ProgramOptions, chosen_names, resolve_options
from ..passes.graph_values import example_of, repeats
from ..runtime.program import time_names
from ..texts import text
from ..torch_internals import (
    aot_compile,
    copy_dynamo_graph,
    guards_of,
    is_unbacked,
    pytree,
    ranges_of,
    symbol_of,
    trace_for_export,
    write_package,
)
from . import manifest as manifests
from .manifest import Buffer, Input, Manifest
from .sizes import UnknownExpression, as_data, is_linear


def export(
    model: object,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    **options: Any,
) -> Path:
    """Compile a model with its cache ahead of time into one ``.pt2`` file, which `load` runs without the model's code.

    The model is left as it is. The programs are compiled by AOTInductor for this version of torch and this kind of device.

    Args:
        model: an ``nn.Module``, or a diffusers pipeline with one denoiser.
        example_inputs: arguments of a call, in order or by name. Those that are no tensors are compiled in.
        path: where to write; ends in ``.pt2``. Written at once when everything is compiled.
        dynamic_shapes: as ``torch.export.export`` takes it, by argument: ``{"x": {2: torch.export.Dim("height", min=8,
            max=64)}}``. What is not named stays as in the example.
        options: those of `enable_cache`. They are kept in the file; `load` may change those that no program depends on.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: a wrong option or argument.
        CacheDitError: the model cannot be traced as one graph, or nothing in it could be cached.
    """
    resolved, chosen = resolve_options(options), chosen_names(options)
    language = resolved.language
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(text("export_path", language, path=str(target)))
    if resolved.inner != "inductor" or resolved.lowering not in ("auto", "specialize"):
        raise ValueError(text("export_inner", language, inner=repr(resolved.inner), lowering=repr(resolved.lowering)))
    modules = denoisers_of(model, language)
    if len(modules) != 1:
        raise CacheDitError(text("export_several", language, count=len(modules)))
    module = modules[0]
    arguments = _arguments(module, example_inputs, language)
    shapes = _shapes_by_name(arguments, dynamic_shapes, module)
    announce(text("exporting", language))
    with torch.no_grad():
        try:
            traced = trace_for_export(module, arguments.values, shapes)
        except Exception as error:
            raise CacheDitError(text("export_untraced", language, why=_first_line(error))) from error
        files, content = _compile(traced, arguments, module, resolved, chosen)
    _write(target, files, content)
    return target


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The example's arguments by name, and the names that may be given by place."""

    values: dict[str, Any]
    parameters: tuple[str, ...]


def _arguments(
    module: torch.nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], language: str | None
) -> _Arguments:
    kinds = inspect.Parameter
    found = inspect.signature(module.forward).parameters.values()
    places = tuple(p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD))
    if isinstance(example_inputs, Mapping):
        values = dict(example_inputs)
    elif isinstance(example_inputs, Sequence):
        if len(example_inputs) > len(places):
            raise TypeError(text("export_arguments", language, given=len(example_inputs), names=", ".join(places)))
        values = dict(zip(places, example_inputs, strict=False))
    else:
        raise TypeError(text("export_arguments", language, given=repr(type(example_inputs)), names=", ".join(places)))
    # programs are compiled for one layout; the loader brings its inputs into it
    contiguous: Callable[[torch.Tensor], torch.Tensor] = lambda value: value.detach().contiguous()  # noqa: E731
    return _Arguments(pytree.tree_map_only(torch.Tensor, contiguous, values), places)


def _shapes_by_name(
    arguments: _Arguments, given: Mapping[str, Any] | Sequence[Any] | None, module: torch.nn.Module
) -> dict[str, Any] | None:
    if given is None:
        return None
    named = dict(given) if isinstance(given, Mapping) else dict(zip(arguments.parameters, given, strict=False))
    unknown = [name for name in named if name not in arguments.values]
    if unknown:
        raise ValueError(text("export_shapes", None, names=", ".join(unknown), known=", ".join(arguments.values)))
    return {
        name: named.get(name) if name in named else pytree.tree_map(lambda _: None, value)
        for name, value in arguments.values.items()
    }


def _compile(
    traced: fx.GraphModule, arguments: _Arguments, module: torch.nn.Module, options: CacheOptions, chosen: Collection[str]
) -> tuple[dict[str, list[Any]], Manifest]:
    """Both programs and the manifest of a traced model."""
    language, program = options.language, options.program()
    structure, plain = _with_tensor_outputs(traced)
    report = GraphReport.of(plain, None, None)
    # a compiled library knows no operations of ours
    rewritten = rewrite_graph(plain, program, _sizes_known, fetches=False)
    if isinstance(rewritten, passes.Refusal):
        report.reason, report.detail = rewritten.key, rewritten.detail
        raise CacheDitError(text("no_region", language, details=report.refusal_text(language)))
    graph, region, inputs, controls = rewritten.graph, rewritten.region, rewritten.inputs, rewritten.controls
    leaves, _ = pytree.tree_flatten_with_path(arguments.values)
    placeholders = [node for node in plain.graph.nodes if node.op == "placeholder"]
    tensors = [i for i, (_, value) in enumerate(leaves) if isinstance(value, torch.Tensor)]
    if len(placeholders) != len(leaves):
        raise AssertionError(f"{len(placeholders)} inputs in the graph, {len(leaves)} given")
    _check_constants(placeholders, leaves, tensors, language)
    place_of = {i: place for place, i in enumerate(tensors)}
    cache_places = {len(leaves) + k: len(tensors) + k for k in range(_count_of(graph) - len(leaves))}
    files, kept = {}, {}
    for name, compute in ((manifests.REUSE_PROGRAM, False), (manifests.COMPUTE_PROGRAM, True)):
        files[name], used = _program(graph, compute, program, language)
        kept[name] = tuple({**place_of, **cache_places}[i] for i in used)
    names = [_name_of(path) for path, _ in leaves]
    try:
        content = Manifest(
            torch=torch.__version__,
            device=inputs.device.type,
            machine=manifests.machine_of(inputs.device.type),
            options=manifests.options_as_data(options, chosen),
            parameters=arguments.parameters,
            names=tuple(arguments.values),
            spec=pytree.treespec_dumps(pytree.tree_structure(list(arguments.values.values()))),
            inputs=tuple(_input(name, value, node) for name, (_, value), node in zip(names, leaves, placeholders, strict=True)),
            symbols=ranges_of(placeholders),
            guards=tuple(as_data(guard) for guard in guards_of(placeholders)),
            output=structure,
            outputs=len(_outputs_of(plain)),
            time=_time_among([names[i] for i in tensors], [leaves[i][1] for i in tensors]),
            controls=tuple(place_of[i] for i in controls),
            repeats=repeats(plain),
            history=inputs.history,
            accumulate=manifests.dtype_name(inputs.accumulate),
            residuals=tuple(map(_buffer, inputs.residuals)),
            front=None if inputs.front is None else _buffer(inputs.front),
            programs=kept,
            region=describe_region(region, inputs),
            nodes=report.nodes,
            model=type(module).__name__,
            cache_dit=_own_version(),
        )
    except UnknownExpression as error:
        raise CacheDitError(text("export_shapes_unknown", language, what=str(error))) from error
    _check_symbols(content, language)
    return files, content


def _sizes_known(inputs: passes.CacheInputs, placeholders: Sequence[fx.Node]) -> bool:
    """Whether no size depends on data. That each symbol can be read from some input is checked once there is a manifest."""
    buffers = [*inputs.residuals, *([] if inputs.front is None else [inputs.front])]
    return not any(is_unbacked(symbol_of(size)) for buffer in buffers for size in buffer.sizes)


def _with_tensor_outputs(traced: fx.GraphModule) -> tuple[Any, fx.GraphModule]:
    """The structure of the result, and the graph with a flat tuple of tensors in its place."""
    out_spec = traced.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    plain = copy_dynamo_graph(traced)
    output = next(iter(reversed(plain.graph.nodes)))
    flat = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    tensors = [value for value in flat if isinstance(value, fx.Node)]
    output.args = (tuple(tensors),)
    numbers = iter(range(len(tensors)))
    entries = [_Leaf(next(numbers)) if isinstance(value, fx.Node) else value for value in flat]
    structure = _described(pytree.tree_unflatten(entries, out_spec))
    plain.graph.lint()
    plain.recompile()
    return structure, plain


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Stands for a tensor of the result."""

    number: int


def _described(value: Any) -> Any:
    """A result as plain data: tensors by number, tuples, lists, dictionaries, constants. Records become dictionaries
    with attributes: their class is the model's library's, which a loader does not have."""
    if isinstance(value, _Leaf):
        return {"tensor": value.number}
    if isinstance(value, Mapping):
        kind = "dict" if type(value) is dict else "record"
        return {kind: [[str(key), _described(each)] for key, each in value.items()]}
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        if names is not None:
            return {"record": [[name, _described(each)] for name, each in zip(names, value, strict=True)]}
        return {"tuple" if isinstance(value, tuple) else "list": [_described(each) for each in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"constant": value}
    raise CacheDitError(text("export_output", None, kind=type(value).__name__))


def _outputs_of(graph: fx.GraphModule) -> Sequence[Any]:
    found: Any = next(iter(reversed(graph.graph.nodes))).args[0]
    outputs: Sequence[Any] = found
    return outputs


def _count_of(graph: fx.GraphModule) -> int:
    return sum(node.op == "placeholder" for node in graph.graph.nodes)


def _check_constants(
    placeholders: Sequence[fx.Node], leaves: Sequence[tuple[Any, Any]], tensors: Sequence[int], language: str | None
) -> None:
    for i, (node, (path, value)) in enumerate(zip(placeholders, leaves, strict=True)):
        if i in tensors:
            continue
        simple = value is None or isinstance(value, (bool, int, float, str))
        if node.users or not simple:
            raise CacheDitError(text("export_constant", language, name=_name_of(path), kind=type(value).__name__))


def _program(
    graph: fx.GraphModule, compute: bool, program: ProgramOptions, language: str | None
) -> tuple[list[Any], list[int]]:
    specialized, kept = specialized_graph(graph, compute=compute)
    try:
        return aot_compile(specialized, dict(program.inner_options)), kept
    except Exception as error:
        raise CacheDitError(text("inner_failed", language, inner="AOTInductor", why=_first_line(error))) from error


def _input(name: str, value: Any, node: fx.Node) -> Input:
    if not isinstance(value, torch.Tensor):
        return Input(name, value=value)
    example = example_of(node)
    assert isinstance(example, torch.Tensor)
    return Input(name, manifests.dtype_name(value.dtype), tuple(as_data(symbol_of(size)) for size in example.shape))


def _buffer(buffer: passes.ResidualBuffer) -> Buffer:
    sizes = tuple(as_data(symbol_of(size)) for size in buffer.sizes)
    scale = None if buffer.scale is None else manifests.dtype_name(buffer.scale)
    return Buffer(sizes, manifests.dtype_name(buffer.dtype), buffer.device.type, scale)


def _check_symbols(content: Manifest, language: str | None) -> None:
    """Every symbol must be readable from some size of an input."""
    sizes = [size for each in content.tensors for size in each.sizes]
    for symbol in content.symbols:
        if not any(is_linear(size, symbol) for size in sizes):
            raise CacheDitError(text("export_shapes_unknown", language, what=symbol))


def _time_among(names: Sequence[str], values: Sequence[torch.Tensor]) -> int | None:
    """As `find_time`, of the arguments of a call."""
    wanted = time_names(names)
    if wanted:
        return list(names).index(wanted[0])
    small = [i for i, value in enumerate(values) if value.is_floating_point() and value.dim() <= 1]
    return small[0] if len(small) == 1 else None


def _name_of(path: Sequence[Any]) -> str:
    """``(MappingKey('added'), MappingKey('ids'))`` -> ``added.ids``."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _own_version() -> str:
    from .. import __version__

    return __version__


def _write(target: Path, files: dict[str, list[Any]], content: Manifest) -> None:
    """Whole or not at all: under another name first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export_") as folder:
        made = Path(folder) / target.name
        write_package(made, files, {manifests.MANIFEST_NAME: content.dumps()})
        os.replace(made, target)
