"""What wrong input gets: a text that names what is wrong and what is allowed, and a model that is as it was."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cache_dit
from cache_dit import other_project
from cache_dit.messages import CacheDitWarning
from cache_dit.options import global_config, reset_global_config

from . import models

EAGER: dict[str, Any] = {"inner": "eager"}
NO_TRANSFORMER = "❌ 未能找到 transformer 组件"


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CACHE_DIT_LANG", raising=False)
    reset_global_config()
    yield
    reset_global_config()


@pytest.fixture
def model() -> nn.Module:
    return models.seeded(models.TinyDiT)


def run(model: Callable[..., Any], steps: int = 6) -> None:
    with torch.no_grad():
        for step in range(steps):
            x, t = models.example(seed=step)
            model(x, t - 0.1 * step)


# Options.

WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("skip_interval", 0, ValueError, "int >= 1"),
    ("skip_interval", -3, ValueError, "int >= 1"),
    ("skip_interval", 2.0, TypeError, "int >= 1"),
    ("skip_interval", True, TypeError, "int >= 1"),
    ("skip_interval", "2", TypeError, "int >= 1"),
    ("warmup_steps", -1, ValueError, "int >= 0"),
    ("warmup_steps", [3], TypeError, "int >= 0"),
    ("strategy", "fast", ValueError, "'fixed' | 'dynamic' | 'adaptive'"),
    ("strategy", "Fixed", ValueError, "'fixed'"),
    ("strategy", 1, TypeError, "'fixed'"),
    ("noise_scale", -0.1, ValueError, "0 <= float <= 1"),
    ("noise_scale", 1.5, ValueError, "0 <= float <= 1"),
    ("noise_scale", math.nan, ValueError, "0 <= float <= 1"),
    ("noise_scale", "little", TypeError, "0 <= float <= 1"),
    ("enable_stats", 1, TypeError, "bool"),
    ("debug", "yes", TypeError, "bool"),
    ("front_blocks", -1, ValueError, "int >= 0"),
    ("back_blocks", 1.5, TypeError, "int >= 0"),
    ("residual_dtype", torch.uint8, ValueError, "torch.bfloat16"),
    ("residual_dtype", 16, TypeError, "torch.bfloat16"),
    ("residual_device", "gpu", ValueError, "torch.device"),
    ("residual_device", 0, TypeError, "torch.device"),
    ("schedule", "1021", ValueError, "'0'"),
    ("schedule", "", ValueError, "'0'"),
    ("schedule", 101, TypeError, "'0'"),
    ("schedule", [True, 2], ValueError, "'0'"),
    ("start_percent", 50, ValueError, "0 <= float <= 1"),
    ("end_percent", math.inf, ValueError, "0 <= float <= 1"),
    ("region", ("a", "b", "c"), ValueError, "tuple[str, str]"),
    ("region", 3, TypeError, "tuple[str, str]"),
    ("forecast", "magic", ValueError, "'taylor'"),
    ("order", 0, ValueError, "1 <= int <= 3"),
    ("order", 4, ValueError, "1 <= int <= 3"),
    ("tolerance", 0.0, ValueError, "float > 0"),
    ("target_speedup", 0.5, ValueError, "float >= 1"),
    ("correction", "always", ValueError, "'auto' | bool"),
    ("max_consecutive_hits", 0, ValueError, "int >= 1"),
    ("lowering", "whole", ValueError, "'specialize'"),
    ("inner", "cache_dit", ValueError, "'eager'"),
    ("inner", "no_such_compiler", ValueError, "'eager'"),
    ("inner", 3, TypeError, "'eager'"),
    ("inner_options", "max_autotune", TypeError, "dict"),
    ("strict", None.__class__, TypeError, "bool"),
    ("language", "fr", ValueError, "'zh' | 'en'"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG)
def test_a_wrong_option_is_refused_at_once_and_named(
    model: nn.Module, name: str, value: Any, error: type[Exception], allowed: str
) -> None:
    before = dict(vars(model))
    with pytest.raises(error) as raised:
        cache_dit.enable_cache(model, **{name: value})
    assert type(raised.value) is error
    message = str(raised.value)
    assert name in message
    assert str(value)[:6] in message or repr(value)[:6] in message
    assert allowed in message
    assert dict(vars(model)) == before
    assert cache_dit.summary(model).startswith("该模型从未启用缓存")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("skip_intervals", ["skip_interval"]),
        ("warmup", ["warmup_steps"]),
        ("cache_config", ["cache-dit", "front_blocks"]),
        ("Fn_compute_blocks", ["cache-dit", "front_blocks"]),
        ("Bn_compute_blocks", ["cache-dit", "back_blocks"]),
        ("max_warmup_steps", ["cache-dit", "warmup_steps"]),
        ("residual_diff_threshold", ["cache-dit", "tolerance"]),
        ("enable_separate_cfg", ["cache-dit", "cache_dit.context"]),
        ("rel_l1_thresh", ["TeaCache", "tolerance"]),
        ("reuse_threshold", ["EasyCache", "tolerance"]),
    ],
)
def test_an_unknown_option_is_answered_with_the_name_it_has_here(model: nn.Module, name: str, words: Sequence[str]) -> None:
    with pytest.raises(TypeError) as raised:
        cache_dit.enable_cache(model, **{name: 1})
    for word in (name, *words):
        assert word in str(raised.value)
    assert "_compiled_call_impl" not in vars(model)


def test_options_that_contradict_each_other_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"start_percent.*0\.8.*0\.4"):
        cache_dit.enable_cache(model, start_percent=0.8, end_percent=0.4)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"default_skip_interval": 0}, ValueError),
        ({"default_skip_interval": "2"}, TypeError),
        ({"default_warmup_steps": -1}, ValueError),
        ({"default_strategy": "fast"}, ValueError),
        ({"global_debug": "no"}, TypeError),
        ({"skip_interval": 2}, TypeError),
    ],
)
def test_a_wrong_global_configuration_changes_nothing(config: dict[str, Any], error: type[Exception]) -> None:
    cache_dit.set_global_config(default_warmup_steps=7)
    before = global_config()
    name, value = next(iter(config.items()))
    with pytest.raises(error, match=f"{name}.*{re.escape(repr(value))}"):
        cache_dit.set_global_config(**{"default_warmup_steps": 1, **config})
    assert global_config() == before


def test_a_positional_setting_is_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="positional"):
        cache_dit.enable_cache(model, 2)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": "20"}, TypeError, "num_steps"),
        ({"num_steps": 2.5}, TypeError, "num_steps"),
        ({"sigmas": [1.0]}, ValueError, "sigmas"),
        ({"sigmas": 3}, TypeError, "sigmas"),
        ({"sigmas": "high"}, TypeError, "sigmas"),
        ({"sigmas": "12"}, TypeError, "sigmas"),
        ({"sigmas": b"12"}, TypeError, "sigmas"),
        ({"sigmas": ["1.0", "0.0"]}, TypeError, "sigmas"),
        ({"sigmas": {1.0, 0.0}}, TypeError, "sigmas"),
        ({"sigmas": {1.0: 0, 0.0: 1}}, TypeError, "sigmas"),
        ({"sigmas": [10**400, 0]}, ValueError, "sigmas"),
        ({"sigmas": [10**5000, 0]}, ValueError, "sigmas"),
        ({"num_steps": 20, "sigmas": torch.linspace(1, 0.05, 20)}, ValueError, "num_steps=20 and 20 sigmas: 21 are wanted"),
        ({"num_steps": 20, "sigmas": [1.0, 0.5, 0.0]}, ValueError, "num_steps=20 and 3 sigmas: 21 are wanted"),
        ({"sigmas": [1.0, None]}, TypeError, "sigmas"),
        ({"sigmas": [1.0, math.nan]}, ValueError, "sigmas"),
        ({"solver": 2}, TypeError, "solver"),
        ({"prediction": "noise"}, ValueError, "prediction"),
    ],
)
def test_a_wrong_run_is_refused_and_the_run_goes_on(
    model: nn.Module, arguments: dict[str, Any], error: Any, name: str
) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model, 3)
    with pytest.raises(error, match=name):
        cache_dit.new_run(model, **arguments)
    x, t = models.example(seed=3)
    with torch.no_grad():
        model(x, t - 0.3)
    assert (cache_dit.get_stats(model).hits, cache_dit.get_stats(model).runs) == (1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_steps": np.int64(8)},
        {"sigmas": torch.linspace(1, 0, 9)},
        {"sigmas": np.ones(3)},
        {"num_steps": 8, "sigmas": torch.linspace(1, 0, 9)},
    ],
)
def test_numbers_of_other_libraries_are_numbers(model: nn.Module, arguments: dict[str, Any]) -> None:
    cache_dit.enable_cache(model, **EAGER)
    cache_dit.new_run(model, **arguments)


def test_a_context_has_a_name(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    with pytest.raises(TypeError, match="name=3"), cache_dit.context(model, 3):  # type: ignore[arg-type]
        pass


# Models.


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 4),
        lambda: models.seeded(models.Plain),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        lambda: None,
        lambda: "model",
        lambda: {"transformer": nn.Linear(4, 4)},
        lambda: nn.Linear,
        lambda: torch.zeros(3),
    ],
)
def test_what_holds_no_blocks_is_refused(build: Callable[[], Any]) -> None:
    subject = build()
    with pytest.raises(cache_dit.CacheDitError) as raised:
        cache_dit.enable_cache(subject)
    assert str(raised.value) == f"{NO_TRANSFORMER}\n解决方案: 检查模型类型，确保使用支持的模型架构"
    assert isinstance(raised.value, RuntimeError)
    if isinstance(subject, nn.Module):
        assert "_compiled_call_impl" not in vars(subject)


class Deceptive(nn.Module):
    """Holds what looks like blocks, and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = models.Plain()
        self.blocks = nn.ModuleList(models.Block() for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.plain(x, t)


def test_blocks_that_never_run_are_told_once_at_the_first_call() -> None:
    model = models.seeded(Deceptive)
    plain = copy.deepcopy(model)
    cache_dit.enable_cache(model, **EAGER)
    x, t = models.example()
    with torch.no_grad(), pytest.warns(CacheDitWarning, match=NO_TRANSFORMER) as said:
        for step in range(4):
            assert torch.equal(model(x, t - 0.1 * step), plain(x, t - 0.1 * step))
    assert len(said) == 1
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.refused) == (4, 0, {"no_region": 4})


def test_strict_raises_instead_at_the_first_call() -> None:
    model = models.seeded(Deceptive)
    cache_dit.enable_cache(model, strict=True, **EAGER)
    with pytest.raises(cache_dit.CacheDitError, match=NO_TRANSFORMER):
        run(model)


def test_front_and_back_that_leave_nothing_are_told_with_the_reason(model: nn.Module) -> None:
    cache_dit.enable_cache(model, front_blocks=3, back_blocks=1, language="en", **EAGER)
    with pytest.warns(CacheDitWarning, match="front_blocks and back_blocks leave no block") as said:
        run(model)
    assert len(said) == 1
    assert cache_dit.get_stats(model).hits == 0


def test_a_region_that_names_no_module_is_told_with_its_name(model: nn.Module) -> None:
    cache_dit.enable_cache(model, region="layers.3", language="en", **EAGER)
    with pytest.warns(CacheDitWarning, match=r"layers\.3"):
        run(model)
    cache_dit.disable_cache(model)
    cache_dit.enable_cache(model, region=("blocks.3", "blocks.1"), language="en", **EAGER)
    with pytest.warns(CacheDitWarning, match="runs before the first"):
        run(model)


def test_dropout_in_train_mode_is_not_cached_and_leaves_the_random_state_as_plain() -> None:
    model = models.seeded(lambda: models.TinyDiT(4, DroppingBlock)).train()
    plain = copy.deepcopy(model)
    cache_dit.enable_cache(model, language="en", **EAGER)
    x, t = models.example()
    with torch.no_grad(), pytest.warns(CacheDitWarning, match=r"model\.eval\(\)"):
        for step in range(6):
            torch.manual_seed(step)
            output = model(x, t - 0.1 * step)
            state = torch.get_rng_state()
            torch.manual_seed(step)
            assert torch.equal(output, plain(x, t - 0.1 * step))
            assert torch.equal(torch.get_rng_state(), state)
    assert cache_dit.get_stats(model).hits == 0


class DroppingBlock(models.Block):
    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x, temb), 0.2, self.training)


# Functions that need a cached model.


def test_a_model_that_was_never_cached_gets_a_clear_answer(model: nn.Module) -> None:
    assert "enable_cache" in cache_dit.summary(model)
    before = dict(vars(model))
    with pytest.warns(CacheDitWarning, match="disable_cache"):
        assert cache_dit.disable_cache(model) is model
    assert dict(vars(model)) == before
    for function in (cache_dit.get_stats, cache_dit.explain, cache_dit.new_run):
        with pytest.raises(cache_dit.CacheDitError, match="enable_cache"):
            function(model)
    with pytest.raises(cache_dit.CacheDitError, match="enable_cache"), cache_dit.context(model, "positive"):
        pass


@pytest.mark.parametrize("subject", [None, 3, "model", torch.zeros(2), nn.Linear])
def test_no_function_trips_over_something_that_is_no_model(subject: Any) -> None:
    assert "enable_cache" in cache_dit.summary(subject)
    with pytest.warns(CacheDitWarning):
        cache_dit.disable_cache(subject)
    with pytest.raises(cache_dit.CacheDitError):
        cache_dit.get_stats(subject)


def test_turning_off_twice_warns_the_second_time(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_dit.disable_cache(model)
    with pytest.warns(CacheDitWarning, match="disable_cache"):
        cache_dit.disable_cache(model)
    assert cache_dit.get_stats(model).calls == 6


# Calls.


def test_wrong_arguments_of_a_call_are_the_models_own_error(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model, 4)
    x, t = models.example()
    with torch.no_grad():
        with pytest.raises(TypeError, match="no_such_argument"):
            model(x, t, no_such_argument=1)
        with pytest.raises(Exception, match=r"shape|size|mat1"):
            model(x[..., :3], t)
    run(model, 6)
    assert cache_dit.get_stats(model).hits == 1 + 2


def test_the_other_project_is_named_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_project.metadata, "version", lambda name: {"cache-dit": "1.2.3"}[name])
    with pytest.warns(CacheDitWarning, match=r"cache-dit 1\.2\.3") as said:
        other_project.warn_of_other_project()
    assert "pip uninstall cache-dit" in str(said[0].message)


# Runs of few steps.


def test_a_run_within_its_warm_up_is_spoken_of_once(model: nn.Module) -> None:
    cache_dit.enable_cache(model, language="en", **EAGER)
    with pytest.warns(CacheDitWarning, match="the run has 3 steps") as said:
        for _ in range(2):
            cache_dit.new_run(model, num_steps=3)
            run(model, 3)
    assert len(said) == 1
    assert cache_dit.get_stats(model).hits == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        cache_dit.new_run(model, num_steps=6)
        run(model, 6)
    assert cache_dit.get_stats(model).hits == 2
