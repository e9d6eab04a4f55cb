"""Whether hooks are planted on a model, known without looking at its modules at every call."""

from __future__ import annotations

import torch

from ..torch_internals import has_hooks, hooks_planted


class HookWatch:
    """Tells whether a model has hooks. Without any it is compiled without guards on them, which are several for each module;
    with some the guards are the compiler's.

    A model without hooks is looked at again when one was planted somewhere in the process, and at the start of a run: one may
    also come with a module that is put in the place of another. A model with hooks is looked at at every call.
    """

    __slots__ = ("_planted", "any")

    def __init__(self) -> None:
        self._planted = -1
        self.any = False

    @property
    def is_current(self) -> bool:
        """Whether the last look tells that there are no hooks now."""
        return not self.any and self._planted == hooks_planted()

    def look(self, module: torch.nn.Module) -> bool:
        """Look at all modules; whether hooks came where there were none, or all that there were are gone."""
        before, self._planted = self.any, hooks_planted()
        self.any = has_hooks(module)
        return self.any != before
