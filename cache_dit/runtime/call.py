"""The call of an enabled model: what stands in the ``compile`` slot of an ``nn.Module``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..backend import OwnedBackend, owned_backend
from ..torch_internals import capturing_more, compile_limits, is_tracing_failure, trace_again
from .program import TIME_NAMES, read_time
from .session import Capture, Session, active_session

_SLOT = "_compiled_call_impl"
_ABSENT: Any = object()


class CachedCall:
    """Calls the compiled model with its session in force, and brackets the call for the clock and the statistics."""

    def __init__(self, module: torch.nn.Module, session: Session, backend: OwnedBackend) -> None:
        self.session = session
        self._module, self._backend = module, backend
        self._replaced = vars(module).get(_SLOT, _ABSENT)
        self._compiled: Callable[..., Any] | None = None
        self._call: Callable[..., Any] | None = None
        self._capture = session.capture
        self._time_name, self._time_place = _time_argument(module)
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def install(self) -> None:
        """Take the module's ``compile`` slot."""
        setattr(self._module, _SLOT, self)

    def remove(self) -> None:
        """Put back what was in the slot."""
        if self._replaced is _ABSENT:
            delattr(self._module, _SLOT)
        else:
            setattr(self._module, _SLOT, self._replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            # a compiler around the model must not trace into the runtime
            disable: Any = torch.compiler.disable
            self._call = disable(self._bracketed)
        return self._call(*args, **kwargs)

    def _bracketed(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        compiled = self._compiled
        if compiled is None:
            compiled = self._compiled = self._compile(capture=False)
        result: Any = None
        with session.lock:
            token = active_session.set(session)
            self._arguments = (args, kwargs)
            # not for longer than the call: the session must not keep the module alive
            session.call_time = self._time
            session.begin()
            try:
                result = compiled(*args, **kwargs)
            except BaseException as error:
                session.abort()
                if not (session.capture is Capture.MORE and is_tracing_failure(error)):
                    raise
                session.capture = Capture.IN_VAIN
            else:
                session.end()
            finally:
                self._arguments = ((), {})
                session.call_time = None
                active_session.reset(token)
            if session.capture is not self._capture:
                self._capture = session.capture
                session.uncached_graphs.clear()
                trace_again(self._module.forward)
                self._compiled = self._compile(capture=session.capture is Capture.MORE)
                return result if result is not None else self._bracketed(*args, **kwargs)
        return result

    def _compile(self, capture: bool) -> Callable[..., Any]:
        """The compiled model; ``capture`` lets the tracer take in reads of tensors and sizes that depend on data."""
        backend = owned_backend(self._backend.program, self._backend.mode, capture) if capture else self._backend
        compiled: Callable[..., Any] = torch.compile(self._module._call_impl, backend=backend, **compile_limits())
        return capturing_more(compiled) if capture else compiled

    def _time(self) -> float | None:
        """The timestep among the arguments of this call, by the name it has in the model's signature."""
        name = self._time_name
        if name is None:
            return None
        args, kwargs = self._arguments
        value = kwargs.get(name)
        if value is None and self._time_place is not None and self._time_place < len(args):
            value = args[self._time_place]
        return read_time(value)


def _time_argument(module: torch.nn.Module) -> tuple[str | None, int | None]:
    """Name and place of the timestep in the signature of ``forward``; (None, None) where no name fits."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None, None
    places = {p.name: i for i, p in enumerate(parameters) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
    keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in TIME_NAMES:
        if name in places or name in keyword_only:
            return name, places.get(name)
    return None, None
