"""What a model's module tree says before anything is traced."""

from __future__ import annotations

from collections import Counter

import torch


def may_have_blocks(model: torch.nn.Module) -> bool:
    """Whether some module holds two children of one class that are made of parts themselves: candidates for blocks.

    Or whether a part of the model holds two children made of parts, as a block that runs again and again does. A model
    that calls plain Python objects may still have blocks, so only models whose modules all lack such children are
    turned away before the first call.
    """
    for module in model.modules():
        composite = Counter(type(child) for child in module.children() if next(child.children(), None) is not None)
        if any(count >= 2 for count in composite.values()) or (module is not model and composite.total() >= 2):
            return True
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) and _has_equal_children(module):
            return True
    return False


def main_list(model: torch.nn.Module) -> str | None:
    """The path of the module list with the most weights; None where the model has no list of two modules or more."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) > 1}
    sizes = {path: sum(weight.numel() for weight in part.parameters()) for path, part in lists.items()}
    return max(sizes, key=lambda path: sizes[path], default=None)


# A list beside the main one with less than this share of its weights is a refiner or an embedder, no part of the chain.
MIN_SHARE_OF_MAIN = 0.25


def chain_of_blocks(model: torch.nn.Module) -> list[str]:
    """Paths of the blocks of the main list and of the lists of about its weight beside it, as the model names them."""
    main = main_list(model)
    if main is None:
        return []
    parent = model.get_submodule(main.rpartition(".")[0])
    beside = [part for part in parent.children() if isinstance(part, torch.nn.ModuleList) and len(part) > 1]
    sizes = {id(part): sum(weight.numel() for weight in part.parameters()) for part in beside}
    least = MIN_SHARE_OF_MAIN * max(sizes.values())
    chain = {id(part) for part in beside if sizes[id(part)] >= least}
    lists = [(path, part) for path, part in model.named_modules() if id(part) in chain]
    return [f"{path}.{name}" for path, part in lists for name, _ in part.named_children()]


def _has_equal_children(module: torch.nn.Module) -> bool:
    return any(count >= 2 for count in Counter(type(child) for child in module.children()).values())
