"""From what the user hands over to the modules to cache: a module, a compiled module, a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import NoBlocksError
from ..texts import text
from ..torch_internals import original_of
from . import diffusers as diffusers_integration

if TYPE_CHECKING:
    from ..runtime.session import Session


def denoisers_of(model: object, language: str | None, *, required: bool = True) -> list[torch.nn.Module]:
    """The modules to cache in ``model``.

    Raises:
        NoBlocksError: ``required`` and there is none.
    """
    found: list[torch.nn.Module] = []
    if isinstance(model, torch.nn.Module):
        found = [unwrapped(model)]
    elif diffusers_integration.is_pipeline(model):
        found = [unwrapped(module) for module in diffusers_integration.denoisers(model)]
    if not found and required:
        raise NoBlocksError(text("no_transformer", language))
    return found


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside what ``torch.compile(module)`` returned; any other module is itself."""
    original = original_of(module)
    return original if isinstance(original, torch.nn.Module) else module


def follow_integration(model: object, sessions: Sequence[Session]) -> None:
    """Let the sessions take contexts, runs and step counts from the frame that calls the model, where it names them."""
    if isinstance(model, torch.nn.Module):
        diffusers_integration.follow_module(unwrapped(model), sessions[0])
    else:
        diffusers_integration.follow_pipeline(model, sessions)


def leave_integration(model: object) -> None:
    """Undo `follow_integration`."""
    for module in denoisers_of(model, None, required=False):
        diffusers_integration.leave_module(module)
