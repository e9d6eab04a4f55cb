"""Which session belongs to which model. Nothing here keeps a model alive."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..options import CacheOptions
from .session import Session

_of_module: Any = WeakIdKeyDictionary()
_of_parameter: Any = WeakIdKeyDictionary()
# a dictionary may not grow while another thread goes through it
_lock = threading.RLock()


def model_name(model: object) -> str:
    """Class and id of a model, as the statistics print it."""
    return f"{type(model).__name__}_{id(model)}"


def session_of_module(module: torch.nn.Module) -> Session | None:
    """The session that `enable_cache` made for this module, in force or not."""
    found: Session | None = _of_module.get(module)
    return found


def register_module(module: torch.nn.Module, session: Session) -> None:
    """Remember the session of a module as long as the module lives."""
    with _lock:
        _of_module[module] = session


def register_holder(holder: object, session: Session) -> None:
    """Remember a session as long as the object lives that an integration keeps it in."""
    with _lock:
        _of_module[holder] = session


def session_of_parameter(parameter: torch.Tensor, options: CacheOptions) -> Session:
    """The session of the model that holds this parameter, under bare ``torch.compile``; made at its first call.

    A graph does not say which module it was traced from: the session gets the model's name when somebody asks with it.
    """
    # held throughout: two threads that call a model for the first time must not make two sessions
    with _lock:
        sessions: list[Session] = _of_parameter.setdefault(parameter, [])
        for session in sessions:
            if session.options is options:
                return session
        sessions.append(Session(options, f"Module_{id(parameter)}", owns_calls=False))
        return sessions[-1]


def sessions_of(module: torch.nn.Module) -> list[Session]:
    """Every session of a module: that of `enable_cache`, or those that bare ``torch.compile`` made for its parameters."""
    own = session_of_module(module)
    if own is not None:
        return [own]
    found: dict[int, Session] = {}
    if len(_of_parameter):
        for parameter in module.parameters():
            for session in _of_parameter.get(parameter) or ():
                session.name = model_name(module)
                found[id(session)] = session
    return list(found.values())


def all_sessions() -> list[Session]:
    """Every session whose model lives."""
    with _lock:
        bare = [session for sessions in _of_parameter.values() for session in sessions]
        return [*_of_module.values(), *bare]
