"""What a model's module tree says before anything is traced."""

from __future__ import annotations

from collections import Counter

import torch


def may_have_blocks(model: torch.nn.Module) -> bool:
    """Whether some module holds two children of one class that are made of parts themselves: candidates for blocks.

    A model that calls plain Python objects may still have blocks, so only models whose modules all lack such children are
    turned away before the first call.
    """
    for module in model.modules():
        composite = Counter(type(child) for child in module.children() if next(child.children(), None) is not None)
        if any(count >= 2 for count in composite.values()):
            return True
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) and _has_equal_children(module):
            return True
    return False


def _has_equal_children(module: torch.nn.Module) -> bool:
    return any(count >= 2 for count in Counter(type(child) for child in module.children()).values())
