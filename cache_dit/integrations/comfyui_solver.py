"""Which solver a sampling of ComfyUI is, where its state is a linear recurrence in what the model gives.

Asked of the real objects, as they are patched for this sampling: the sampler's function, the guider, and by a trial what
``model_sampling`` makes of the model's output. Whatever may stand between is looked for, and where something does, or
anything is not known, the answer is None: skipped steps then stay as they are. (ComfyUI 0.3.75 to 0.30.0.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..runtime.solvers import denoised

# Functions of `comfy.k_diffusion.sampling` that are solvers of `runtime.solvers`. DDIM is Euler's method there too.
_FUNCTIONS = {"sample_euler": "euler", "sample_dpmpp_2m": "dpmpp_2m"}
_PREDICTIONS = ("epsilon", "v")
# What may make something else of the conditions' outputs than their weighted sum, or of the state between the steps.
_REPLACED = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "denoise_mask_function",
    "model_function_wrapper",
)
_WRAPPED = ("sampler_sample", "predict_noise", "calc_cond_batch")


def solver_of(guider: Any, sampler: Any, levels: Sequence[float] | None, own_key: str) -> tuple[str, str] | tuple[None, None]:
    """Solver and prediction type of a sampling, by their names for `new_run`; twice None where they are not known.

    Args:
        guider: what combines the conditions' outputs, with the patcher that it samples.
        sampler: ComfyUI's sampler object.
        levels: the noise levels of the sampling.
        own_key: the key of our own wrappers, which change nothing.
    """
    solver = _solver(sampler, levels)
    if solver is None or levels is None or not _combines_linearly(guider, own_key):
        return None, None
    prediction = _prediction(guider, levels)
    return (None, None) if prediction is None else (solver, prediction)


def _solver(sampler: Any, levels: Sequence[float] | None) -> str | None:
    function = getattr(sampler, "sampler_function", None)
    if getattr(function, "__module__", None) != "comfy.k_diffusion.sampling":
        return None
    solver = _FUNCTIONS.get(getattr(function, "__name__", ""))
    if (getattr(sampler, "extra_options", None) or {}).get("s_churn"):
        return None
    # the last step is of first order only where it ends at 0; in short runs the recurrence takes it for one in any case
    if solver == "dpmpp_2m" and (not levels or levels[-1] != 0.0):
        return None
    return solver


def _combines_linearly(guider: Any, own_key: str) -> bool:
    """Whether the sampler gets a weighted sum of the conditions' outputs, as ComfyUI itself makes it."""
    if getattr(getattr(type(guider), "predict_noise", None), "__module__", None) != "comfy.samplers":
        return False
    options = getattr(guider, "model_options", None)
    if not isinstance(options, Mapping) or any(options.get(name) for name in _REPLACED):
        return False
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return not any(_keys_in_force(wrappers.get(kind, {})) - {own_key} for kind in _WRAPPED)


def _keys_in_force(wrappers: Mapping[Any, Iterable[Any]]) -> set[Any]:
    return {key for key, given in wrappers.items() if given}


def _prediction(guider: Any, levels: Sequence[float]) -> str | None:
    """What the model predicts, by how its output and its input enter the denoised sample at these levels.

    ComfyUI's flow models count as ``'epsilon'``: with σ for the share of noise the denoised sample is x − σ v too, and its
    solvers take λ = −log σ for all models.
    """
    sampling = guider.model_patcher.get_model_object("model_sampling")
    tried = [level for level in (levels[0], levels[len(levels) // 2]) if level > 0.0]
    try:
        found = [_shares(sampling, level) for level in tried]
    # third-party code may ask for anything
    except Exception:
        return None
    for prediction in _PREDICTIONS:
        wanted = [denoised(level, prediction) for level in tried]
        if wanted and all(
            math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
            for had, want in zip(found, wanted, strict=True)
            for a, b in zip(had, want, strict=True)
        ):
            return prediction
    return None


def _shares(sampling: Any, level: float) -> tuple[float, float]:
    """p and q of the denoised sample p x + q v at a noise level, from two trials on the host."""
    sigma, one, zero = torch.full((1,), level), torch.ones(1, 1), torch.zeros(1, 1)
    return (
        float(sampling.calculate_denoised(sigma, zero, one)),
        float(sampling.calculate_denoised(sigma, one, zero)),
    )
