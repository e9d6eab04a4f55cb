"""The call of an enabled model: what stands in the ``compile`` slot of an ``nn.Module``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..backend import OwnedBackend, owned_backend
from ..structure import chain_of_blocks, loads_parts_by_hooks, main_list
from ..texts import text
from ..torch_internals import (
    COMPILE_SLOT,
    compile_limits,
    frames_are_compiled,
    is_tracing_failure,
    makes_cuda_graphs,
    trace_again,
    traced_with,
    transform_under_way,
    uncompiled_call,
)
from .hooks import HookWatch
from .program import read_time, time_names
from .ranks import find_members, gathers_by_hooks, is_parallel, tensor_ranks
from .session import Session, active_session
from .tracing import Capture

if TYPE_CHECKING:
    from ..blockwise import Blockwise

_ABSENT: Any = object()


class CachedCall:
    """Calls the compiled model with its session in force, and brackets the call for the clock and the statistics."""

    def __init__(
        self,
        module: torch.nn.Module,
        session: Session,
        backend: OwnedBackend,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.session = session
        self._module, self._backend = module, backend
        # what is compiled: the module's call, hooks included, or the part of it that an integration names
        self._function: Callable[..., Any] = uncompiled_call(module) if function is None else function
        session.tracing.main_list = main_list(module)
        self._chain = chain_of_blocks(module)
        program = backend.program
        session.tracing.blocks_may_help = len(self._chain) > program.front_blocks + program.back_blocks
        self._replaced: Any = _ABSENT
        self._compiled: Callable[..., Any] | None = None
        self._blockwise: Blockwise | None = None
        self._capture = session.tracing.capture
        self._hooks = HookWatch()
        self._time_arguments = _time_arguments(module)
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        compiler: Any = torch.compiler
        # Dynamo answers the question by itself where it can, in torch 2.11 with True whatever it traces for
        compiler.assume_constant_result(_is_exporting)
        # a compiler around the model must not trace into the runtime; under fullgraph=True it prints the reason
        self._call: Callable[..., Any] = compiler.disable(
            self._bracketed, reason=text("compiles_itself", session.options.language)
        )

    def install(self) -> None:
        """Take the module's ``compile`` slot."""
        self._replaced = vars(self._module).get(COMPILE_SLOT, _ABSENT)
        setattr(self._module, COMPILE_SLOT, self)

    def remove(self) -> None:
        """Put back what was in the slot, and in those of the blocks where they were taken."""
        self._leave_blocks()
        if vars(self._module).get(COMPILE_SLOT) is not self:
            return
        if self._replaced is _ABSENT:
            delattr(self._module, COMPILE_SLOT)
        else:
            setattr(self._module, COMPILE_SLOT, self._replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_exporting():
            # what is exported is the model; `export` keeps the cache
            return self._function(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling() or frames_are_compiled():
            return self._call(args, kwargs)
        return self._bracketed(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model is uncached, also where its class copies attributes that ``nn.Module`` leaves out."""
        return type(None), ()

    def _bracketed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self.session
        if active_session.get() is session and session.is_under_way:
            # the model calls itself, from code that Dynamo does not trace: a part of the call under way
            return self._function(*args, **kwargs)
        transform = transform_under_way(args, kwargs)
        if transform is not None:
            # nothing can be read on the host, nor stored
            session.note_transform(transform)
            return self._function(*args, **kwargs)
        if self._compiled is None:
            # outside the lock: it may wait for other ranks
            self.join_ranks()
        result: Any = None
        with session.lock:
            if not self._hooks.is_current and self._hooks_changed():
                self._compiled = None
            compiled = self._compiled
            if compiled is None:
                self._skip_tracing_in_vain()
                self._compiled = self._compile()
                compiled = self._compiled or self._function
            outer = active_session.get()
            # an interrupt may come between any two lines: what it leaves behind must not be taken for a call under way
            try:
                active_session.set(session)
                self._arguments = (args, kwargs)
                # not for longer than the call: the session must not keep the module alive
                session.call_time = self._time
                session.begin()
                result = (self._function if session.runs_eager else compiled)(*args, **kwargs)
                session.see(result)
                session.end()
            except BaseException as error:
                session.abort()
                if not (session.tracing.capture is Capture.MORE and is_tracing_failure(error)):
                    raise
                session.tracing.was_in_vain()
            finally:
                active_session.set(outer)
                self._arguments = ((), {})
                session.call_time = None
            if session.began_anew and self._hooks_changed():
                # they came with a module: what has just run did not hear them
                self._compiled = None
                session.abort()
                return self._bracketed(args, kwargs)
            if session.tracing.must_begin_anew or session.tracing.capture is not self._capture:
                self._capture = session.tracing.capture
                session.trace_again()
                trace_again(self._module.forward)
                trace_again(self._function)
                self._compiled = self._compile()
                return result if result is not None else self._bracketed(args, kwargs)
        return result

    def join_ranks(self) -> None:
        """Find the processes that compute this model together, where there are several: when caching is turned on, or at the
        first call where the model was sharded in between. Stages of a pipeline could not wait for each other in a call."""
        session = self.session
        if is_parallel() and session.ranks is None:
            spread = bool(tensor_ranks(self._module))
            session.join(find_members(self._module, session.options.group), "DTensor" if spread else "Tensor")
            if gathers_by_hooks(self._module) and session.tracing.blocks_may_help:
                # hooks that gather weights break every graph between the blocks
                session.tracing.capture = self._capture = Capture.BLOCKS

    def _skip_tracing_in_vain(self) -> None:
        """Begin block by block where nothing else would come of it."""
        tracing = self.session.tracing
        if tracing.capture is Capture.DEFAULT and tracing.blocks_may_help and loads_parts_by_hooks(self._module):
            tracing.capture = self._capture = Capture.BLOCKS

    def _compile(self) -> Callable[..., Any] | None:
        """The model compiled in the way that the session says; None where torch has no place for what it compiles."""
        tracing = self.session.tracing
        try:
            compiled = self._compiled_as(tracing.capture)
        except OSError as error:
            # `torch.compile` makes the folder of its caches before anything else (seen in 2.13): the next call tries again
            tracing.no_folder = f"{type(error).__name__}: {error}"
            return None
        except Exception:
            if not tracing.no_folder:
                raise
            # torch gave up in the middle of an import, and cannot do it again
            return self._function
        tracing.no_folder = ""
        return compiled

    def _compiled_as(self, way: Capture) -> Callable[..., Any]:
        backend = self._backend
        self._leave_blocks()
        self.session.replays = _may_replay(backend)
        if way is Capture.BLOCKS:
            # not before it is needed: it imports the backend's half of the package
            from ..blockwise import Blockwise

            self._blockwise = Blockwise(self._module, self.session, backend.program, self._chain, self._function)
            self._blockwise.install()
            return self._blockwise
        more, hooks = way is Capture.MORE, self._hooks.any
        backend = owned_backend(backend.program, backend.mode, more, hooks)
        backend.prepare(next((each.device for each in self._module.parameters()), None))
        compiled = torch.compile(self._function, backend=backend, **compile_limits())
        return traced_with(compiled, more=more, hooks=hooks)

    def _hooks_changed(self) -> bool:
        """Look at the model's hooks; whether it must be compiled in another way. What caches block by block minds them."""
        return self._hooks.look(self._module) and self._blockwise is None

    def _leave_blocks(self) -> None:
        if self._blockwise is not None:
            self._blockwise.remove()
            self._blockwise = None

    def _time(self) -> float | None:
        """The timestep among the arguments of this call, by the name it has in the model's signature."""
        args, kwargs = self._arguments
        for name, place in self._time_arguments:
            value = kwargs.get(name)
            if value is None and place is not None and place < len(args):
                value = args[place]
            if value is not None:
                known = self._announced_time() if isinstance(value, torch.Tensor) and not value.is_cpu else None
                return read_time(value) if known is None else known
        return None

    def _announced_time(self) -> float | None:
        """The noise level that the pipeline's scheduler has for this step: to read the timestep would wait for the device."""
        session = self.session
        return session.runs.time() if session.runs is not None and session.runs_whole_schedule else None


def _may_replay(backend: OwnedBackend) -> bool:
    """Whether CUDA graphs may be made of the programs."""
    program = backend.program
    return torch.cuda.is_available() and makes_cuda_graphs(program.inner, backend.mode, dict(program.inner_options))


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _time_arguments(module: torch.nn.Module) -> list[tuple[str, int | None]]:
    """Names and places of what may be the timestep in the signature of ``forward``, the best first."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    places = {p.name: i for i, p in enumerate(parameters) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [(name, places.get(name)) for name in time_names([*places, *keyword_only])]
