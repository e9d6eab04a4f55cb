"""Every private name of torch that we touch; no other module touches one (but for `registration`, which may not import torch).

`PRIVATE_NAMES` lists them, `check_internals` fails with one clear error where one has moved, and tests/reliability checks
each under the versions in `TESTED_VERSIONS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import json
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from .errors import CacheDitError
from .texts import text

# Nested arguments and results, flat and back.
pytree = _pytree
# Asked at every call.
_torch_c: Any = torch._C
_is_exporting = torch.compiler.is_exporting
RECOMPILE_LIMIT = 64
# Attributes that Dynamo sets on the module it hands to a backend, and that AOT autograd reads from it.
_DYNAMO_ATTRIBUTES = ("meta", "_param_name_to_source", "compile_subgraph_reason", "_backend_id")
# Files of torch on the stack between the compiled function that the user called and the frame being compiled.
_EVAL_FRAME, _CONVERT_FRAME, _MODULE_CALL = (
    os.path.join("torch", *path)
    for path in (("_dynamo", "eval_frame.py"), ("_dynamo", "convert_frame.py"), ("nn", "modules", "module.py"))
)


TESTED_VERSIONS = ("2.11", "2.13", "2.14")
# module: what of it is used. The error names those that are gone.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "torch._C": ("_get_tracing_state", "_len_torch_dispatch_stack"),
    "torch._C._dynamo.eval_frame": ("get_eval_frame_callback", "reset_code"),
    "torch._C._functorch": ("get_unwrapped", "is_functorch_wrapped_tensor", "peek_interpreter_stack"),
    "torch._dynamo.backends.registry": ("_BACKENDS", "lookup_backend"),
    "torch._dynamo.config": (
        "capture_dynamic_output_shape_ops",
        "capture_scalar_outputs",
        "recompile_limit",
        "skip_nnmodule_hook_guards",
    ),
    "torch._dynamo.exc": ("BackendCompilerFailed", "InvalidBackend", "TorchDynamoException"),
    "torch._dynamo.utils": ("counters", "get_metrics_context"),
    "torch._logging._internal": ("trace_structured",),
    "torch._ops": ("HigherOrderOperator", "OpOverload"),
    "torch._subclasses": ("FakeTensor", "FakeTensorMode"),
    "torch.utils._python_dispatch": ("is_traceable_wrapper_subclass",),
    "torch.utils.hooks.RemovableHandle": ("next_id",),
    "torch.nn.Module": ("_call_impl", "_compiled_call_impl", "_wrapped_call_impl"),
    "torch.Tensor": ("_version",),
    "torch.ops.higher_order": ("cond",),
}
# The same for `export` and `load` alone.
ARTIFACT_NAMES: dict[str, tuple[str, ...]] = {
    "torch._C._aoti": ("AOTIModelPackageLoader",),
    "torch.export._trace": ("_export_to_torch_ir",),
    "torch.export.pt2_archive._package": ("package_pt2",),
    "torch.utils._pytree": ("tree_flatten", "tree_flatten_with_path", "tree_unflatten", "treespec_dumps", "treespec_loads"),
}
# The slot of ``nn.Module.compile``, and where an ``OptimizedModule`` keeps its module.
COMPILE_SLOT = "_compiled_call_impl"
_ORIGINAL = "_orig_mod"


@functools.cache
def check_internals() -> None:
    """Raise one clear error where a name that we rest on is not in this torch.

    Raises:
        CacheDitError: it names them, and the versions that were tested.
    """
    gone = missing_names()
    if gone:
        tested = ", ".join(TESTED_VERSIONS)
        raise CacheDitError(text("torch_moved", None, version=torch.__version__, names=", ".join(gone), tested=tested))


def missing_names(wanted: Mapping[str, tuple[str, ...]] = PRIVATE_NAMES) -> list[str]:
    """Those of a list of private names that this torch does not have."""
    return [f"{place}.{name}" for place, names in wanted.items() for name in names if not _has(place, name)]


def _has(place: str, name: str) -> bool:
    try:
        holder: Any = importlib.import_module(place)
    except ImportError:
        try:
            holder = attrgetter(place.partition(".")[2])(torch)
        except AttributeError:
            return False
    return hasattr(holder, name)


def original_of(module: Any) -> Any:
    """The module inside what ``torch.compile(module)`` returned; anything else is itself."""
    return getattr(module, _ORIGINAL, module)


def uncompiled_call(module: torch.nn.Module) -> Callable[..., Any]:
    """What calls a module, hooks included, whatever is in its compile slot."""
    call: Callable[..., Any] = module._call_impl
    return call


def in_compile_slot(module: torch.nn.Module) -> Any:
    """What is called in the module's place."""
    return module._compiled_call_impl


def write_counter(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def without_source(node: fx.Node) -> fx.Node:
    """Mark a graph input as ours: AOT autograd asserts that each has a source or none."""
    node._dynamo_source = None
    return node


def hint_of(size: Any) -> Any:
    """The value that a symbolic number had when it was traced; a plain one stays itself."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def memory_of(tensor: torch.Tensor) -> int:
    """The same number for tensors that share their memory; fake tensors and those under a transform (vmap) too."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return id(tensor) if parts_of(tensor) is not None else int(tensor.untyped_storage()._cdata)


def shows_memory(tensor: torch.Tensor) -> bool:
    """Whether views of a tensor can be told by its memory, and new ones made like it: not under a transform (vmap)."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009
    return parts_of(tensor) is None and not functorch.is_functorch_wrapped_tensor(tensor)


def parts_of(tensor: torch.Tensor) -> tuple[str, list[torch.Tensor]] | None:
    """For a tensor made of others (quantised, distributed): what it is beside them, as text, and them; else None."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, context = tensor.__tensor_flatten__()
    return repr(context), [getattr(tensor, name) for name in names]


def is_mutable_overload(target: object) -> bool | None:
    """Whether an operator writes to its arguments by its schema; None for what is no overload of one."""
    return bool(target._schema.is_mutable) if isinstance(target, torch._ops.OpOverload) else None


def is_higher_order(target: object) -> bool:
    """Whether an operator takes graphs."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph module that can be rewritten; Dynamo goes on reading the placeholders of its own.

    Keeps each node's meta, each placeholder's ``_dynamo_source`` and what AOT autograd needs on the module.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    graph.output(output)
    copied = graph_module_like(gm, gm, graph)
    keep_dynamo_attributes(gm, copied)
    return copied


def graph_module_like(
    gm: fx.GraphModule, root: torch.nn.Module | dict[str, Any], graph: fx.Graph
) -> fx.GraphModule:
    """A graph module of the same kind: Dynamo's make their code when it is first read, and compilers read the graph alone."""
    # each has a class of its own, below that of its kind
    kind: type[fx.GraphModule] = next(each for each in type(gm).__mro__ if not each.__qualname__.endswith("GraphModuleImpl"))
    return kind(root, graph)


def fill_examples(gm: fx.GraphModule) -> None:
    """Give the nodes that a pass has added the example values that the tracer gave to the others.

    Without them AOT autograd takes its on-disk cache for unsafe and compiles anew in every process. Where one cannot be
    had, nothing else is lost.
    """
    from torch._subclasses import FakeTensor

    def example(node: fx.Node) -> Any:
        return node.meta["example_value"]

    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        return
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op not in ("call_function", "call_method") or "example_value" in node.meta:
                continue
            try:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), example)
                call = node.target if node.op == "call_function" else getattr(type(args[0]), str(node.target))
                node.meta["example_value"] = call(*args, **kwargs)
            except (KeyError, RuntimeError, TypeError, AttributeError, AssertionError):
                return


def keep_dynamo_attributes(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Carry over the attributes by which AOT autograd knows a graph as Dynamo's (its cache keys rest on them)."""
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(source, name):
            value = getattr(source, name)
            setattr(target, name, dict(value) if name == "meta" else value)


def source_name(placeholder: fx.Node) -> str:
    """Where a graph input comes from in the user's frame, such as ``L['timestep']``; '' where it has no source."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name) if source is not None else ""


def frame_id(gm: fx.GraphModule) -> object:
    """Identifies the Python frame a graph was traced from: the same for recompilations, another behind a graph break."""
    compile_id = gm.meta.get("dynamo_compile_id")
    return getattr(compile_id, "frame_id", None)


def break_reason(gm: fx.GraphModule) -> str | None:
    """Why the graph ended before the frame did, with the user's line; None where the frame was traced to its end."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    where = f" ({reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno})" if reason.user_stack else ""
    return f"{str(reason.reason).strip().splitlines()[0]}{where}"


def recompile_reason() -> str | None:
    """What made Dynamo trace the current frame again; None at a first trace. Only inside a backend call."""
    try:
        from torch._dynamo.utils import get_metrics_context

        reason = get_metrics_context()._metrics.get("recompile_reason")
    except (ImportError, AttributeError):
        return None
    # the same code under other options, or of another class, is a first compilation to the user
    if not reason or "BACKEND_MATCH" in str(reason) or "___check_type_id(self" in str(reason):
        return None
    return str(reason).split(": ", 1)[-1].splitlines()[0]


def starts_compiled_call() -> bool:
    """Whether the frame being compiled is the one the user called, and not one behind a graph break. Only inside a backend.

    True as well where the stack cannot be read.
    """
    frame: FrameType | None = sys._getframe(1)
    files: list[str] = []
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith(_EVAL_FRAME):
            break
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    while files and not files[-1].endswith(_CONVERT_FRAME):
        if not files.pop().endswith(_MODULE_CALL):
            return frame is None
    return True


def record_rewrite(name: str, count: int, graph: fx.GraphModule) -> None:
    """Count a pass in Dynamo's counters under ``cache_dit``, and show its graph to ``tlparse``."""
    from torch._dynamo.utils import counters
    from torch._logging._internal import trace_structured

    counters["cache_dit"][name] += count
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"cache_dit_{name}", "encoding": "string"},
        payload_fn=lambda: graph.print_readable(print_output=False, include_stride=True, include_device=True),
    )


def symbol_of(size: object) -> Any:
    """The sympy expression of a SymInt; an int stays itself."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_unbacked(expression: Any) -> bool:
    """Whether a size depends on data: it cannot be known before the program has run."""
    return any(str(symbol).startswith(("u", "zuf")) for symbol in getattr(expression, "free_symbols", ()))


def backend_failure(error: Exception) -> Exception:
    """Torch's own error for a failed backend, with ``error`` as its ``__cause__``.

    Torch raises its error ``from None`` (seen in 2.13), which clears the cause on the object: here it is read from the
    inner exception instead, so that the user's mistake stays in the traceback.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    class CacheDitBackendFailed(BackendCompilerFailed):
        """The backend refused the model or its options; ``__cause__`` says why."""

        @property
        def __cause__(self) -> BaseException | None:
            return self.inner_exception

        @__cause__.setter
        def __cause__(self, cause: BaseException | None) -> None:
            """Torch clears the cause; it stays what it is."""

    def cache_dit() -> None:
        """Names the backend in torch's message."""

    return CacheDitBackendFailed(cache_dit, error, None)


def inner_compiler(inner: str | Callable[..., Any], mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The function (graph module, example inputs) -> callable of an inner compiler named as ``torch.compile`` names it.

    Raises
    ------
    CacheDitError
        torch knows no backend of that name, or no such mode.
    """
    if callable(inner):
        return lambda gm, examples: inner(gm, examples, **({"options": options} if options else {}))
    if inner == "inductor":
        return _inductor(mode, options)
    if inner == "eager":
        return lambda gm, examples: forward_of(gm)
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        compiler = lookup_backend(inner)
    except InvalidBackend as error:
        raise CacheDitError(f"inner={inner!r}: {error}") from error
    return lambda gm, examples: compiler(gm, examples, **({"options": options} if options else {}))


def taking_a_list(compiled: Callable[..., Any]) -> Callable[[list[Any]], Sequence[Any]] | None:
    """A compiled program as it takes its inputs in a list and empties it, so that they are gone once it has read them.

    Inductor's programs take lists inside. Around them is what takes arguments, which holds all of them until it returns, and
    what keeps Dynamo away, which it is already where a compiled graph runs. None for what is made otherwise (seen in 2.13).
    """
    forward: Any = getattr(compiled, "_torchdynamo_orig_callable", None)
    if getattr(forward, "__qualname__", None) == "aot_module_simplified.<locals>.forward":
        held = inspect.getclosurevars(forward).nonlocals
        if held.get("params_buffers_flat") == [] and callable(held.get("compiled_fn")):
            inside: Callable[[list[Any]], Sequence[Any]] = held["compiled_fn"]
            return inside
    return None


def makes_cuda_graphs(inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether an inner compiler, so asked, records CUDA graphs where it compiles for a GPU."""
    if inner == "cudagraphs":
        return True
    if inner != "inductor":
        return False
    from torch._inductor import config

    return bool(_patches(mode, options).get("triton.cudagraphs", config.triton.cudagraphs))


def begin_replayed_step() -> None:
    """Tell CUDA graphs that a call begins: what former calls gave may be written over from here on."""
    mark: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
    mark()


def at_fixed_address(node: fx.Node) -> fx.Node:
    """Mark a graph input as a tensor that stays where it is, as ``torch._dynamo.mark_static_address`` does for a user's:
    CUDA graphs may write to it, and do not copy it. One that comes with another address is recorded anew (seen in 2.13)."""
    node.meta["tensor_dict"] = {**(node.meta.get("tensor_dict") or {}), "_dynamo_static_input_type": "unguarded"}
    return node


def forward_of(gm: fx.GraphModule) -> Callable[..., Any]:
    """What runs a graph module, its code made: a lazy one's ``forward`` would look for it at every call."""
    if not gm.code:
        raise AssertionError("a graph without code")
    run: Callable[..., Any] = gm.forward
    return run


def hooks_planted() -> int:
    """Counts the hooks that were ever planted on any module or tensor of this process."""
    return RemovableHandle.next_id


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a hook is planted on a module or on one inside of it."""
    return any(
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks
        for each in module.modules()
    )


def traced_with(compiled: Callable[..., Any], *, more: bool = False, hooks: bool = True) -> Callable[..., Any]:
    """A compiled function whose compilations go by some of Dynamo's flags, set during the calls alone.

    ``hooks``: one that is planted on one of the model's modules later is heard. Dynamo leaves its guards on them out by
    default, which are several for each module. ``more``: trace through host reads of tensors and data-dependent sizes.
    That is no safe default: some models compile without it only.
    """
    from torch._dynamo import config

    flags: dict[str, Any] = {"skip_nnmodule_hook_guards": False} if hooks else {}
    if more:
        flags.update(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    if not compile_limits():
        # torch 2.11: ``torch.compile`` does not take it
        flags["recompile_limit"] = RECOMPILE_LIMIT
    if not flags:
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        # not by `config.patch`: each of those leaves a context variable behind that is never freed (2.13)
        before = {name: getattr(config, name) for name in flags}
        try:
            for name, value in flags.items():
                setattr(config, name, value)
            return compiled(*args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    return call


def frames_are_compiled() -> bool:
    """Whether Dynamo looks at the frames that are called now: a compiled function around runs outside of its graphs."""
    return get_eval_frame_callback() is not None


def transform_under_way(args: Sequence[object], kwargs: Mapping[str, object]) -> str | None:
    """What torch does with the calls of a moment instead of computing them: tracing, transforming, sizes without data.

    Takes the arguments of the call. None where it computes as ever.
    """
    if _is_exporting():
        return "torch.export"
    if _torch_c._get_tracing_state() is not None:
        return "torch.jit.trace"
    if _torch_c._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    if _torch_c._len_torch_dispatch_stack() > 0:
        # those that only look on, too: Dynamo gives up code that it first meets under one, for good (2.13)
        return "TorchDispatchMode"
    for values in (args, kwargs.values()):
        for value in values:
            # plain tensors first: most are
            if type(value) is torch.Tensor:
                if value.is_meta:
                    return "device='meta'"
            elif isinstance(value, torch.Tensor):
                if _is_fake(value):
                    return "FakeTensor"
                if value.is_meta:
                    return "device='meta'"
    return None


def _is_fake(value: torch.Tensor) -> bool:
    from torch._subclasses import FakeTensor

    return isinstance(value, FakeTensor)


def trace_again(function: Callable[..., Any]) -> None:
    """Let Dynamo look anew at a function it gave up: it marks such code to be skipped, whoever compiles it next."""
    from torch._C._dynamo.eval_frame import reset_code

    current: Any = function
    while current is not None:
        code = getattr(getattr(current, "__func__", current), "__code__", None)
        if code is not None:
            reset_code(code)
        current = getattr(current, "__wrapped__", None)


def is_tracing_failure(error: BaseException) -> bool:
    """Whether an exception is Dynamo's or the backend's, and not the model's own."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def is_tracer_signal(error: Exception) -> bool:
    """Whether an exception is Dynamo's own way of asking for something (to restart, to skip), and no failure."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    return isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)


def _patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options: those of the mode, which may stand among them, and over them those that are named."""
    import torch._inductor

    named = dict(options)
    mode = named.pop("mode", mode)
    try:
        return {**(torch._inductor.list_mode_options(mode) if mode else {}), **named}
    except RuntimeError as error:
        raise CacheDitError(f"inner_options: {error}") from error


def _inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    patches = _patches(mode, options)
    return lambda gm, examples: compile_fx(gm, examples, config_patches=patches or None)


@functools.cache
def prepare_cpp() -> None:
    """Begin what inductor does once a process before its first C++ kernel, in a thread beside what goes on here.

    It compiles and loads a probe for each kind of vector instruction that the processor has, and looks at the header that all
    kernels share: seconds in which it would wait for one compiler after the other. What fails there is left to fail again
    where the kernels are compiled. Nothing where inductor compiles in one thread, or does not look as known.
    """
    # imported here: two threads that import one another's modules may see them half made
    import torch._inductor.compile_fx
    import torch.utils._filelock  # noqa: F401
    from torch._inductor import async_compile, codecache

    threads = getattr(async_compile, "get_compile_threads", None)
    load = getattr(getattr(codecache, "CppPythonBindingsCodeCache", None), "load_pybinding_async", None)
    if threads is None or load is None or threads() < 2:
        return

    def prepare() -> None:
        # waiting for files and processes, this thread gives way at every turn: not for the usual 5 ms each
        interval = sys.getswitchinterval()
        sys.setswitchinterval(interval / 20)
        shorter = sys.getswitchinterval()
        try:
            # all but the compiling of this kernel, which would begin where the result is asked for
            with suppress(Exception):
                load([], 'extern "C" void kernel() {}')
        finally:
            # unless someone has set it to another time since
            if sys.getswitchinterval() == shorter:
                sys.setswitchinterval(interval)

    # flags of torch are set by context
    threading.Thread(target=copy_context().run, args=(prepare,), name="cache_dit_prepare_cpp", daemon=True).start()


# What waits for C++ kernels that are under way, where waiting was put off.
_put_off: ContextVar[list[Callable[[], None]] | None] = ContextVar("cache_dit_put_off", default=None)
_putting_off = threading.Lock()
_wait_users = 0


@contextmanager
def kernels_at_once() -> Iterator[Callable[[], None]]:
    """What inductor compiles here does not wait for its C++ kernels, which are compiled while Python goes on.

    Gives a function that waits for all of them and raises what their compiler said. A kernel that is called before waits by
    itself, and so do all that are left where that function is not called.
    """
    waits: list[Callable[[], None]] = []

    def wait_for_all() -> None:
        while waits:
            waits.pop(0)()

    with _wait_replaced():
        token = _put_off.set(waits)
        try:
            yield wait_for_all
        finally:
            _put_off.reset(token)


@contextmanager
def _wait_replaced() -> Iterator[None]:
    """The method by which a generated module waits for its kernels, replaced by one that asks `_put_off` first."""
    global _wait_users
    module: Any = sys.modules.get("torch._inductor.async_compile")
    owner: Any = getattr(module, "AsyncCompile", None)
    if not hasattr(owner, "wait") or not hasattr(module, "LambdaFuture") or not hasattr(module, "CodeCacheFuture"):
        yield
        return
    with _putting_off:
        if _wait_users == 0:
            owner.wait = _wait_later(owner.wait, module.LambdaFuture, (module.CodeCacheFuture, module.Future))
        _wait_users += 1
    try:
        yield
    finally:
        with _putting_off:
            _wait_users -= 1
            if _wait_users == 0:
                owner.wait = owner.wait.__wrapped__


def _wait_later(wait: Callable[..., None], cpp: type, pending: tuple[type, ...]) -> Callable[..., None]:
    """``AsyncCompile.wait``, put off where that was asked for and all that is under way are C++ kernels.

    ``cpp``: the class of what stands for such a kernel until it is compiled. That of a Triton kernel has a future of another
    process besides, and inductor reads those kernels as soon as it has waited.
    """

    @functools.wraps(wait)
    def wait_later(self: Any, scope: dict[str, Any]) -> None:
        waits = _put_off.get()
        kernels = {name: value for name, value in scope.items() if isinstance(value, pending)}
        if waits is None or not all(type(each) is cpp and getattr(each, "future", self) is None for each in kernels.values()):
            wait(self, scope)
            return
        for name, kernel in kernels.items():
            scope[name] = _called_when_ready(scope, name, kernel)

        def wait_now() -> None:
            wait(self, kernels)
            scope.update(kernels)

        waits.append(wait_now)

    return wait_later


def _called_when_ready(scope: dict[str, Any], name: str, kernel: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        scope[name] = kernel.result()
        return scope[name](*args)

    return call


def has_backend(name: str) -> bool:
    """Whether torch's registry holds a backend of this name already (importing nothing)."""
    import sys

    registry = sys.modules.get("torch._dynamo.backends.registry")
    return registry is not None and name in registry._BACKENDS


def compile_limits() -> dict[str, Any]:
    """Keyword arguments for ``torch.compile`` that let more shapes and configurations of one class stay compiled."""
    import inspect

    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in known else {}


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Buffers made here are ordinary tensors: they may be written to under no_grad and inference_mode alike."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def fake_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors without data, of the same sizes, strides, dtypes and devices: what the tracer gives to a backend."""
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    return [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in tensors]


def trace_for_export(
    module: torch.nn.Module, arguments: dict[str, Any], dynamic_shapes: dict[str, Any] | None
) -> fx.GraphModule:
    """A module's whole call as one graph of torch's functions, weights as attributes: what ``torch.export`` starts from.

    Nodes keep the paths of the modules that they come from, and placeholders are the leaves of the arguments.
    """
    from torch.export._trace import _export_to_torch_ir

    slot = vars(module).pop("_compiled_call_impl", None)
    try:
        return _export_to_torch_ir(module, (), arguments, dynamic_shapes, _log_export_usage=False)
    finally:
        if slot is not None:
            module._compiled_call_impl = slot


def aot_compile(gm: fx.GraphModule, options: dict[str, Any]) -> list[Any]:
    """The files of a program that AOTInductor compiles of a rewritten graph; its weights stay outside of the library."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch.fx.experimental import _config

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        # where AOTInductor looks for the sizes
        node.meta["val"] = node.meta["example_value"]
    examples = [node.meta["val"] for node in placeholders]
    outputs: Any = next(iter(reversed(gm.graph.nodes))).args[0]
    shapes: Any = _config
    # where either of two codes is right for all sizes, no size is assumed
    with shapes.patch(backed_size_oblivious=True):
        files: Any = compile_fx_aot(
            gm,
            examples,
            config_patches={
                **_patches(None, options),
                "aot_inductor.package": True,
                "aot_inductor.package_constants_in_so": False,
                "aot_inductor.package_constants_on_disk_format": "pickle_weights",
                "aot_inductor.serialized_in_spec": pytree.treespec_dumps(pytree.tree_structure((tuple(examples), {}))),
                "aot_inductor.serialized_out_spec": pytree.treespec_dumps(pytree.tree_structure(tuple(range(len(outputs))))),
            },
        )
    return list(files)


def write_package(path: Path, programs: dict[str, list[Any]], extra: dict[str, str]) -> None:
    """One archive of compiled programs; weights that they share are in it once."""
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(str(path), aoti_files=programs, extra_files=extra)


def load_programs(
    path: Path, names: Sequence[str], archive: zipfile.ZipFile
) -> tuple[list[Callable[[list[torch.Tensor]], list[torch.Tensor]]], list[torch.Tensor]]:
    """The programs of an archive, and the weights that they share, which must be kept.

    What ``load_pt2`` does, without importing torch's compiler, which takes seconds and is not needed to run.
    """
    from torch._C._aoti import AOTIModelPackageLoader

    root = archive.namelist()[0].partition("/")[0]
    weights: dict[str, torch.Tensor] = {}
    programs = []
    for name in names:
        places = json.loads(archive.read(f"{root}/data/aotinductor/{name}/weights_config.json"))
        for file, *_ in places.values():
            if file not in weights:
                # reading compares each record with its checksum
                content = archive.read(f"{root}/data/weights/{file}")
                weights[file] = torch.load(io.BytesIO(content), weights_only=True)
        constants = {key: weights[file].as_strided(*place) for key, (file, *place) in places.items()}
        loader: Any = AOTIModelPackageLoader(str(path), name, False, 1, -1)
        loader.load_constants(constants, False, True, True, False)
        programs.append(loader.boxed_run)
    return programs, list(weights.values())


def ranges_of(placeholders: Sequence[fx.Node]) -> dict[str, tuple[int, int | None]]:
    """The smallest and the largest value of each symbol in the sizes of these graph inputs; None: no bound."""
    env, symbols = _environment(placeholders)
    found: dict[str, tuple[int, int | None]] = {}
    for symbol in symbols:
        allowed = env.var_to_range[symbol]
        bounded = bool(allowed.upper.is_finite) and int(allowed.upper) < sys.maxsize - 1
        found[str(symbol)] = int(allowed.lower), int(allowed.upper) if bounded else None
    return found


def guards_of(placeholders: Sequence[fx.Node]) -> list[Any]:
    """What tracing and compiling assumed of these symbols, as expressions that must hold."""
    env, symbols = _environment(placeholders)
    if env is None:
        return []
    guards = [env.replace(guard.expr) for guard in env.guards]
    return [guard for guard in guards if guard.free_symbols and guard.free_symbols <= set(symbols)]


def _environment(placeholders: Sequence[fx.Node]) -> tuple[Any, list[Any]]:
    sizes = [
        size.node
        for node in placeholders
        for size in getattr(node.meta.get("example_value"), "shape", ())
        if isinstance(size, torch.SymInt)
    ]
    symbols = {symbol for size in sizes for symbol in size.expr.free_symbols}
    return (sizes[0].shape_env if sizes else None), sorted(symbols, key=str)


def default_store() -> Any:
    """The store at which the processes of ``torch.distributed`` met."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def time_limit() -> float:
    """Seconds after which the default process group gives a wait up: what the user gave ``init_process_group``."""
    from torch.distributed.distributed_c10d import _get_default_group

    group: Any = _get_default_group()
    for device in group._device_types:
        timeout = getattr(group._get_backend(device).options, "_timeout", None)
        if timeout is not None:
            return float(timeout.total_seconds())
    return 600.0


def collective_groups(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the process groups whose collectives a graph holds."""
    found: dict[str, None] = {}
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            namespace = getattr(node.target, "namespace", None) or str(getattr(node.target, "_qualified_op_name", ""))
            if str(namespace).startswith(("_c10d_functional", "c10d_functional")):
                found.update({value: None for value in (*node.args, *node.kwargs.values()) if _is_group(value)})
    return tuple(found)


def is_distributed(value: object) -> bool:
    """Whether a value is a ``DTensor``: one tensor over several processes."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def _is_group(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        group_named(value)
    except (RuntimeError, ValueError, LookupError):
        return False
    return True


def group_named(name: str) -> Any:
    """The process group that functional collectives call by this name."""
    from torch.distributed import distributed_c10d

    return getattr(distributed_c10d, "_resolve_process_group")(name)  # noqa: B009


_version = attrgetter("_version")


def write_counters(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """How often each tensor was written to; None where some are inference tensors, which do not count."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return None
