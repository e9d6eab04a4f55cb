"""diffusers: which modules of a pipeline denoise, and what a pipeline tells about contexts, runs and steps.

Nothing of diffusers is imported or patched. A pipeline names the context of a call through ``cache_context``, which
reaches every stateful hook in the model's hook registry: one entry there, without a forward of its own, listens.
(Registry as of diffusers 0.37 to 0.42.)
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..runtime.program import time_names
from ..runtime.ranks import FINDERS
from ..torch_internals import original_of

if TYPE_CHECKING:
    from ..runtime.session import Session

LISTENER_NAME = "cache_dit"
_REGISTRY = "_diffusers_hook"


def context_parallel_ranks(module: torch.nn.Module) -> Collection[int]:
    """The ranks among which diffusers splits the sequence of this model (``enable_parallelism``)."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_mesh", None)
    return () if mesh is None else mesh.mesh.flatten().tolist()


FINDERS.append(context_parallel_ranks)


def is_pipeline(model: object) -> bool:
    """Whether ``model`` is a pipeline: no module itself, with named components."""
    return not isinstance(model, (torch.nn.Module, type)) and isinstance(getattr(model, "components", None), Mapping)


def denoisers(pipeline: Any) -> list[torch.nn.Module]:
    """The components that take a timestep and hidden states: the modules a sampler calls at every step.

    Control networks are left out: their output enters the denoiser.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and "control" not in name and _takes_time(component):
            found[id(component)] = component
    return list(found.values())


def _takes_time(module: torch.nn.Module) -> bool:
    original = original_of(module)
    try:
        names = inspect.signature(original.forward).parameters
    except (TypeError, ValueError):
        return False
    return bool(time_names(names))


class _Listener:
    """An entry of a hook registry that hears the context of each call and the end of each run.

    A copy of the model (``copy.deepcopy``, ``pickle``) is uncached, so the copy of its listener hears nothing.
    """

    _is_stateful = True
    owns_registry = False

    def __init__(self, session: Session | None, manager_class: type | None) -> None:
        self.session = weakref.ref(session) if session is not None else None
        self.states = _contexts_class(manager_class)(self.session) if manager_class is not None else None

    def __reduce__(self) -> tuple[type[_Listener], tuple[None, None]]:
        return _Listener, (None, None)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """The pipeline is done with the model."""
        session = self.session() if self.session is not None else None
        if session is not None:
            session.end_run()
        return module

    def deinitalize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """The registry's own spelling; nothing was changed on the module."""
        return module


@functools.cache
def _contexts_class(manager_class: type) -> Any:
    class Contexts(manager_class):  # type: ignore[misc]
        """A state manager that hands every context to the session."""

        def __init__(self, session: weakref.ref[Session]) -> None:
            super().__init__(object)
            self._session = session

        def set_context(self, context: Any) -> None:
            target = self._session()
            if target is not None:
                target.named_context = None if context is None else str(context.name)

    return Contexts


def follow_module(module: torch.nn.Module, session: Session) -> None:
    """Hear the contexts that pipelines name for this module; nothing where it knows no ``cache_context``."""
    hooks = sys.modules.get("diffusers.hooks.hooks")
    if not hasattr(module, "cache_context"):
        return
    if hooks is None:
        hooks = importlib.import_module("diffusers.hooks.hooks")
    leave_module(module)
    had_registry = _REGISTRY in vars(module)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    # hooks and function references are parallel lists; the listener wraps no forward
    listener, reference = _Listener(session, hooks.StateManager), hooks.HookFunctionReference()
    listener.owns_registry = not had_registry
    registry.hooks[LISTENER_NAME] = listener
    # one after the other with no call between: an interrupt may not come here
    registry._hook_order[:0], registry._fn_refs[:0] = [LISTENER_NAME], [reference]


def leave_module(module: torch.nn.Module) -> None:
    """Take the listener out again, and the registry too where it was made for the listener and holds nothing else."""
    registry = vars(module).get(_REGISTRY)
    if registry is None or LISTENER_NAME not in registry.hooks:
        return
    if LISTENER_NAME in registry._hook_order:
        place = registry._hook_order.index(LISTENER_NAME)
        del registry._hook_order[place], registry._fn_refs[place]
    listener = registry.hooks.pop(LISTENER_NAME)
    if listener.owns_registry and not registry.hooks:
        delattr(module, _REGISTRY)


class _Kind(NamedTuple):
    """What a scheduler does, as long as its configuration is as `needs` says: name, and the values allowed."""

    solver: str
    prediction: str | None
    needs: tuple[tuple[str, tuple[object, ...]], ...] = ()


_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}
# Schedulers whose steps are those of a solver in `runtime.solvers` (diffusers 0.37 to 0.42). Others may draw noise.
_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": _Kind("euler", "flow", (("stochastic_sampling", (False, None)),)),
    "EulerDiscreteScheduler": _Kind("euler", None, (("final_sigmas_type", ("zero", None)),)),
    "DPMSolverMultistepScheduler": _Kind(
        "dpmpp_2m",
        None,
        (
            ("algorithm_type", ("dpmsolver++",)),
            ("solver_order", (2,)),
            ("solver_type", ("midpoint",)),
            ("thresholding", (False,)),
            ("euler_at_final", (False,)),
            ("lower_order_final", (True,)),
            ("prediction_type", ("epsilon", "flow_prediction")),
        ),
    ),
}


class PipelineRuns:
    """What a pipeline's scheduler and guider tell about the run: its start, number of steps, noise levels and contexts."""

    def __init__(self, pipeline: Any) -> None:
        try:
            self._pipeline: Callable[[], Any] = weakref.ref(pipeline)
        except TypeError:
            self._pipeline = lambda: pipeline
        self._last_index: int | None = None

    def starts_run(self) -> bool:
        """Whether the scheduler has not taken a step yet, though it had when it was last looked at."""
        scheduler = self._scheduler()
        index = getattr(scheduler, "_step_index", None)
        before, self._last_index = self._last_index, index
        return before is not None and index is None and hasattr(scheduler, "_step_index")

    def schedule(self) -> tuple[int | None, tuple[float, ...] | None]:
        """Number of steps and noise levels of the run that begins; None where the scheduler does not say.

        A run from a picture begins in the middle of the schedule.
        """
        scheduler = self._scheduler()
        timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
        begin = getattr(scheduler, "_begin_index", None) or 0
        steps = len(timesteps) - begin if isinstance(timesteps, torch.Tensor) else None
        if not isinstance(sigmas, torch.Tensor) or sigmas.device.type != "cpu" or sigmas.dim() != 1:
            return steps, None
        levels = tuple(sigmas[begin:].tolist())
        return steps, levels if steps is not None and len(levels) == steps + 1 else None

    def solver(self) -> tuple[str | None, str | None]:
        """Solver and prediction type of the run that begins, by their names for `new_run`; None where they are not known."""
        scheduler = self._scheduler()
        config = getattr(scheduler, "config", None)
        kind = _SCHEDULERS.get(type(scheduler).__name__)
        if kind is None or not isinstance(config, Mapping):
            return None, None
        if any(config.get(key) not in allowed for key, allowed in kind.needs):
            return None, None
        return kind.solver, kind.prediction or _PREDICTIONS.get(str(config.get("prediction_type")))

    def time(self) -> float | None:
        """The noise level of the step under way, from the scheduler's list on the host; None where it has none there.

        Of flow models alone, whose timesteps are their noise levels in another unit.
        """
        scheduler = self._scheduler()
        config, kind = getattr(scheduler, "config", None), _SCHEDULERS.get(type(scheduler).__name__)
        predicts = config.get("prediction_type") if isinstance(config, Mapping) else None
        if predicts != "flow_prediction" and (kind is None or kind.prediction != "flow"):
            return None
        timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
        if not isinstance(timesteps, torch.Tensor) or not isinstance(sigmas, torch.Tensor):
            return None
        index = getattr(scheduler, "_step_index", None)
        if index is None:
            index = getattr(scheduler, "_begin_index", None) or 0
        # past the end nothing is under way: such a call is none of the pipeline's
        if sigmas.device.type != "cpu" or sigmas.dim() != 1 or not 0 <= index < min(len(timesteps), len(sigmas)):
            return None
        return float(sigmas[index])

    def context(self) -> str | None:
        """Which of the predictions that a guider combines is being made: it counts those of a step."""
        count = getattr(getattr(self._pipeline(), "guider", None), "_count_prepared", 0)
        return f"guidance {count}" if count else None

    def _scheduler(self) -> Any:
        return getattr(self._pipeline(), "scheduler", None)


def follow_pipeline(pipeline: Any, sessions: Sequence[Session]) -> None:
    """Hear contexts at each denoiser; take steps and noise levels from the scheduler where one denoiser runs them all."""
    for module, session in zip(denoisers(pipeline), sessions, strict=True):
        follow_module(original_of(module), session)
        session.runs = PipelineRuns(pipeline)
        session.runs_whole_schedule = len(sessions) == 1
