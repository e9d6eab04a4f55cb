"""The public functions, on plain modules: on and off, runs and contexts, statistics, any order of calls."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.options import reset_global_config
from cache_dit.runtime.registry import sessions_of
from cache_dit.statistics import format_details

from . import models

EAGER: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0}
# Every other step from the fourth on.
FIXED_HITS = [False, False, False, True, False, True, False, True]

ALREADY_ENABLED = "⚠ 模型已经应用过缓存"


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


def inputs_at(step: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Other numbers at each step, at falling timesteps."""
    x, t = models.example(seed=step, **more)
    return x, t - 0.08 * step


def run(model: nn.Module, steps: int = 8) -> list[bool]:
    """One sampling; which of its calls were hits."""
    hits = []
    with torch.no_grad():
        for step in range(steps):
            before = cache_dit.get_stats(model).hits
            model(*inputs_at(step))
            hits.append(cache_dit.get_stats(model).hits > before)
    return hits


def options_of(model: nn.Module) -> cache_dit.CacheOptions:
    (session,) = sessions_of(model)
    return session.options


# On and off.


def test_every_option_is_a_keyword_that_may_be_left_out() -> None:
    parameters = dict(inspect.signature(cache_dit.enable_cache).parameters)
    assert parameters.pop("model").kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters.pop("unknown").kind is inspect.Parameter.VAR_KEYWORD
    assert list(parameters)[:6] == ["skip_interval", "warmup_steps", "strategy", "noise_scale", "enable_stats", "debug"]
    assert set(parameters) == {each.name for each in fields(cache_dit.CacheOptions)}
    for parameter in parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is None


def test_short_names_are_the_same_functions() -> None:
    assert cache_dit.enable is cache_dit.enable_cache
    assert cache_dit.disable is cache_dit.disable_cache
    assert cache_dit.stats is cache_dit.summary


def test_enabling_works_in_place_and_gives_the_model_back(model: nn.Module) -> None:
    assert cache_dit.enable_cache(model, **EAGER) is model
    assert run(model) == FIXED_HITS
    assert cache_dit.disable_cache(model) is model


@pytest.mark.parametrize(("language", "words"), [(None, ALREADY_ENABLED), ("en", "The model is cached already")])
def test_a_second_time_warns_and_changes_nothing(model: nn.Module, language: str | None, words: str) -> None:
    cache_dit.enable_cache(model, skip_interval=3, **EAGER)
    (session,) = sessions_of(model)
    with pytest.warns(CacheDitWarning, match=words) as said:
        assert cache_dit.enable_cache(model, skip_interval=2, language=language, **EAGER) is model
    assert len(said) == 1
    assert "disable_cache()" in str(said[0].message)
    assert sessions_of(model) == [session]
    assert run(model) == [False, False, False, False, False, True, False, False]


def test_off_and_on_again_takes_the_new_settings(model: nn.Module) -> None:
    cache_dit.enable_cache(model, skip_interval=3, **EAGER)
    run(model)
    cache_dit.disable_cache(model)
    cache_dit.enable_cache(model, **EAGER)
    assert run(model) == FIXED_HITS
    assert cache_dit.get_stats(model).calls == 8


RECOMMENDED: dict[str, dict[str, Any]] = {
    "prototype": {},
    "production": {"strategy": "adaptive", "skip_interval": 2, "warmup_steps": 5, "noise_scale": 0.001},
    "debugging": {"debug": True, "enable_stats": True},
    "batch": {"strategy": "dynamic", "skip_interval": 3, "warmup_steps": 2},
}


@pytest.mark.parametrize("setting", RECOMMENDED)
def test_recommended_settings_work_as_written(model: nn.Module, setting: str) -> None:
    cache_dit.enable_cache(model, inner="eager", **RECOMMENDED[setting])
    x, _ = models.example()
    with torch.no_grad():
        for step in range(20):
            output = model(x * (1 + 0.002 * step), torch.full((models.BATCH,), 0.9 - 0.01 * step))
            assert output.isfinite().all()
    assert cache_dit.get_stats(model).calls == 20
    assert cache_dit.get_stats(model).hits >= 6


# No trace.


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything on the modules of a model that caching could have changed, by identity."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = dict(value) if isinstance(value, dict) else value
        found[f"{path} class"] = type(module)
        found[f"{path} forward"] = module.forward.__func__ if inspect.ismethod(module.forward) else module.forward
    found["weights"] = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    return found


def _as_it_is(model: nn.Module) -> None:
    pass


def _compiled_by_the_user(model: nn.Module) -> None:
    model.compile(backend="eager")


def _with_hooks(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, output: output * 1.0)
    model.get_submodule("blocks.1").register_forward_pre_hook(lambda module, args: None)


def _with_a_forward_of_its_own(model: nn.Module) -> None:
    model.forward = model.forward


@pytest.mark.parametrize("prepare", [_as_it_is, _compiled_by_the_user, _with_hooks, _with_a_forward_of_its_own])
def test_disabling_leaves_no_trace(model: nn.Module, prepare: Callable[[nn.Module], None]) -> None:
    prepare(model)
    plain = copy.deepcopy(model)
    before = state_of(model)
    for _ in range(2):
        cache_dit.enable_cache(model, **EAGER)
        assert run(model) == FIXED_HITS
        cache_dit.disable_cache(model)
        assert state_of(model) == before
    calls = cache_dit.get_stats(model).calls
    with torch.no_grad():
        for step in range(4):
            torch.testing.assert_close(model(*inputs_at(step)), plain(*inputs_at(step)), rtol=1e-6, atol=1e-6)
    assert cache_dit.get_stats(model).calls == calls


def test_a_users_own_compiled_call_is_what_runs_again(model: nn.Module) -> None:
    compiled = []

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    model.compile(backend=backend)
    with cache_dit.cached(model, **EAGER):
        run(model)
        assert compiled == []
    with torch.no_grad():
        model(*inputs_at(0))
    assert len(compiled) == 1


def test_compiling_anew_by_the_user_ends_caching_and_stays(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    model.compile(backend="eager")
    own = model._compiled_call_impl
    cache_dit.disable_cache(model)
    assert model._compiled_call_impl is own
    cache_dit.enable_cache(model, **EAGER)
    assert run(model) == FIXED_HITS
    cache_dit.disable_cache(model)
    assert model._compiled_call_impl is own


def test_nothing_of_the_model_changes_while_caching_is_on(model: nn.Module) -> None:
    before = state_of(model)
    keys = list(model.state_dict())
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    after = state_of(model)
    assert after.keys() - before.keys() == {"._compiled_call_impl"}
    assert {name: value for name, value in after.items() if name in before} == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_enabled_model_are_whole_and_uncached(
    model: nn.Module, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model, 4)
    copied = duplicate(model)
    assert copied._compiled_call_impl is None
    assert cache_dit.summary(copied).startswith("该模型从未启用缓存")
    calls = cache_dit.get_stats(model).calls
    with torch.no_grad():
        for step in range(8):
            assert torch.equal(copied(*inputs_at(step)), model.forward(*inputs_at(step)))
    assert cache_dit.get_stats(model).calls == calls
    assert run(model) == FIXED_HITS
    cache_dit.enable_cache(copied, **EAGER)
    assert run(copied) == FIXED_HITS


# Settings for all models, and for a while.


def test_the_global_configuration_is_what_a_later_model_gets(model: nn.Module) -> None:
    other, third = models.seeded(models.TinyDiT), models.seeded(models.TinyDiT)
    cache_dit.enable_cache(other, **EAGER)
    cache_dit.set_global_config(default_skip_interval=3, default_warmup_steps=0, default_strategy="dynamic", global_debug=True)
    cache_dit.enable_cache(model, **EAGER)
    cache_dit.enable_cache(third, skip_interval=2, debug=False, strategy="fixed", warmup_steps=3, **EAGER)
    got = options_of(model)
    assert (got.skip_interval, got.warmup_steps, got.strategy, got.debug) == (3, 0, "dynamic", True)
    assert run(model, 9) == [n % 3 == 0 for n in range(1, 10)]
    assert run(other) == run(third) == FIXED_HITS
    cache_dit.disable_cache(model)
    cache_dit.set_global_config(default_skip_interval=None, default_warmup_steps=None, default_strategy=None)
    cache_dit.enable_cache(model, **EAGER)
    assert run(model) == FIXED_HITS
    assert options_of(model).debug


def test_the_global_configuration_reaches_bare_compiling(model: nn.Module) -> None:
    cache_dit.set_global_config(default_skip_interval=4, default_warmup_steps=0)
    caller = torch.compile(model, backend="cache_dit", options=EAGER)
    with torch.no_grad():
        for step in range(8):
            caller(*inputs_at(step))
    assert cache_dit.get_stats(model).hits == 2


def test_cached_turns_caching_on_and_off_again(model: nn.Module) -> None:
    with cache_dit.cached(model, **EAGER) as same:
        assert same is model
        assert run(model) == FIXED_HITS
    assert "_compiled_call_impl" not in vars(model)
    with pytest.raises(ZeroDivisionError), cache_dit.cached(model, **EAGER):
        raise ZeroDivisionError
    assert "_compiled_call_impl" not in vars(model)
    with pytest.raises(ValueError, match="skip_interval"), cache_dit.cached(model, skip_interval=0):
        pass
    assert "_compiled_call_impl" not in vars(model)


def test_cached_leaves_a_model_on_that_was_on(model: nn.Module) -> None:
    cache_dit.enable_cache(model, skip_interval=3, **EAGER)
    with pytest.warns(CacheDitWarning, match=ALREADY_ENABLED), cache_dit.cached(model, **EAGER):
        pass
    assert run(model) == [False, False, False, False, False, True, False, False]


# Statistics.


def test_summary_has_the_documents_lines_with_what_was_counted(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    run(model)
    run(model, 4)
    lines = cache_dit.summary(model).splitlines()
    stats = cache_dit.get_stats(model)
    assert lines[:4] == ["缓存统计信息:", "总 Forward 调用: 20", "缓存命中: 7", "缓存命中率: 35.0%"]
    assert lines[4] == f"平均计算时间: {stats.average_compute_time:.3f}秒"
    assert lines[5] == f"预期加速比: {stats.expected_speedup:.1f}x"
    assert len(lines) == 6


def test_the_figures_agree_with_each_other(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    for _ in range(3):
        run(model)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.computed, stats.steps, stats.runs) == (24, 9, 15, 24, 3)
    assert stats.hit_rate == 37.5
    # the calls that compiled are no measure of anything
    assert stats.compute_calls_timed + stats.compile_calls == stats.computed
    assert stats.reuse_calls_timed == stats.hits
    assert stats.reuse_seconds > 0.0
    assert stats.average_compute_time == pytest.approx(stats.compute_seconds / stats.compute_calls_timed)
    timed = stats.compute_calls_timed + stats.reuse_calls_timed
    spent = stats.compute_seconds + stats.reuse_seconds
    assert stats.expected_speedup == pytest.approx(timed * stats.average_compute_time / spent)
    everything = cache_dit.get_global_stats()
    assert everything["model_details"][stats.name] == {
        "calls": 24,
        "hits": 9,
        "hit_rate": 37.5,
        "avg_time": stats.average_compute_time,
        "strategy": "fixed",
        "enabled": True,
    }
    details = everything["model_details"].values()
    assert everything["total_calls"] == sum(each["calls"] for each in details)
    assert everything["total_cache_hits"] == sum(each["hits"] for each in details)
    assert everything["active_models"] == sum(each["enabled"] for each in details)
    assert everything["global_hit_rate"] == pytest.approx(
        100.0 * everything["total_cache_hits"] / everything["total_calls"]
    )
    assert stats.name == f"TinyDiT_{id(model)}"


class Compiled(models.TinyDiT):
    """A class of its own: its first call in this module compiles."""


def test_the_first_call_compiles_and_is_not_timed(model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    model = models.seeded(Compiled)
    cache_dit.enable_cache(model, **EAGER)
    run(model, 1)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.compile_calls, stats.compiles) == (1, 1, 1)
    assert stats.compile_seconds > 0.0
    assert stats.average_compute_time is None
    said = capfd.readouterr().err
    assert said.count("正在编译，仅首次调用需要等待") == 1
    run(model, 3)
    assert capfd.readouterr().err == ""
    assert cache_dit.get_stats(model).compute_calls_timed == 3


def test_there_is_no_speedup_before_both_kinds_of_call_were_timed(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model, 3)
    assert cache_dit.get_stats(model).expected_speedup is None
    assert cache_dit.summary(model).splitlines()[-1] == "预期加速比: 未测量"
    run(model, 4)
    assert cache_dit.get_stats(model).expected_speedup > 0.0
    assert re.fullmatch(r"预期加速比: \d+\.\dx", cache_dit.summary(model).splitlines()[-1])


def test_without_statistics_calls_and_hits_are_counted_alone(model: nn.Module) -> None:
    cache_dit.enable_cache(model, enable_stats=False, **EAGER)
    assert run(model) == FIXED_HITS
    assert cache_dit.summary(model) == (
        "缓存统计信息:\n总 Forward 调用: 8\n缓存命中: 3\n缓存命中率: 37.5%\n平均计算时间: 未统计\n预期加速比: 未统计"
    )


def test_resetting_sets_every_figure_to_zero_and_caching_goes_on() -> None:
    model = models.seeded(Compiled)
    cache_dit.enable_cache(model, **EAGER, front_blocks=2)
    run(model, 5)
    assert cache_dit.get_stats(model).compile_calls == 1
    cache_dit.reset_cache_stats()
    stats = cache_dit.get_stats(model)
    for name in ("calls", "hits", "steps", "runs", "compiles", "compile_calls", "nonfinite", "forecast_errors"):
        assert getattr(stats, name) == 0, name
    assert (stats.compute_seconds, stats.reuse_seconds, stats.compile_seconds, stats.refused) == (0.0, 0.0, 0.0, {})
    # in the middle of the run: what is stored is still there
    with torch.no_grad():
        model(*inputs_at(5))
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.compile_calls, stats.reuse_calls_timed) == (1, 1, 0, 1)
    run(model)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.compute_calls_timed, stats.reuse_calls_timed) == (9, 4, 5, 4)
    assert cache_dit.get_global_stats()["model_details"][stats.name]["calls"] == 9


def test_statistics_stay_readable_once_caching_is_off(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    text = cache_dit.summary(model)
    cache_dit.disable_cache(model)
    assert cache_dit.summary(model) == text
    stats = cache_dit.get_stats(model)
    assert not stats.enabled
    details = format_details([stats])
    assert "    状态: 禁用" in details.splitlines()
    assert "  活跃模型数: 0" in details.splitlines()
    assert f"  模型 TinyDiT_{str(id(model))[:6]}...:" in details.splitlines()
    assert cache_dit.get_global_stats()["model_details"][stats.name]["enabled"] is False


def test_models_that_are_gone_are_not_counted(model: nn.Module) -> None:
    cache_dit.enable_cache(model, **EAGER)
    run(model)
    name = cache_dit.get_stats(model).name
    assert name in cache_dit.get_global_stats()["model_details"]
    del model
    gc.collect()
    # the fixture holds the model: another one goes instead
    other = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(other, **EAGER)
    gone = cache_dit.get_stats(other).name
    del other
    gc.collect()
    assert gone not in cache_dit.get_global_stats()["model_details"]


@pytest.mark.parametrize(("variable", "option", "title"), [("en", None, "Cache"), ("en", "zh", "缓存"), ("", "en", "Cache")])
def test_language(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, variable: str, option: str | None, title: str
) -> None:
    monkeypatch.setenv("CACHE_DIT_LANG", variable)
    cache_dit.enable_cache(model, language=option, **EAGER)
    run(model)
    assert cache_dit.summary(model).startswith(title)
    english = title == "Cache"
    assert ("graph breaks: 0" in str(cache_dit.explain(model))) == english


# Runs and contexts.


def test_a_named_run_tells_steps_and_levels(model: nn.Module) -> None:
    cache_dit.enable_cache(model, end_percent=0.5, **EAGER)
    cache_dit.new_run(model, num_steps=8, solver="euler", prediction="flow")
    assert run(model) == [False, False, False, True, False, False, False, False]
    cache_dit.new_run(model, sigmas=[1.0 - n / 12 for n in range(13)])
    assert [n for n, hit in enumerate(run(model, 8), 1) if hit] == [4, 6]


def test_a_timestep_that_jumps_back_as_listed_goes_on_in_the_run(model: nn.Module) -> None:
    """Samplers that restart go back up: no new run where the run's own list says so."""
    times = [0.9, 0.8, 0.7, 0.6, 0.8, 0.7, 0.6, 0.5]
    cache_dit.enable_cache(model, **EAGER)

    def steps() -> int:
        with torch.no_grad():
            for time in times:
                model(inputs_at(0)[0], torch.full((models.BATCH,), time))
        return cache_dit.get_stats(model).runs

    cache_dit.new_run(model, sigmas=[*times, 0.0])
    assert steps() == 1
    assert steps() == 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_context_ends_with_its_block(model: nn.Module, error: type[BaseException]) -> None:
    cache_dit.enable_cache(model, **EAGER)
    with torch.no_grad():
        with pytest.raises(error), cache_dit.context(model, "positive"):
            model(*inputs_at(0))
            with cache_dit.context(model, "negative"):
                model(*inputs_at(0))
            raise error
        model(*inputs_at(0))
    (session,) = sessions_of(model)
    assert list(session.contexts) == ["positive", "negative", 1]


def test_contexts_of_two_models_are_their_own(model: nn.Module) -> None:
    other = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EAGER)
    cache_dit.enable_cache(other, **EAGER)
    with torch.no_grad(), cache_dit.context(model, "positive"):
        model(*inputs_at(0))
        other(*inputs_at(0))
    assert list(sessions_of(model)[0].contexts) == ["positive"]
    assert list(sessions_of(other)[0].contexts) == [1]


# Any order.


class Driver:
    """A model that is called and asked in any order, beside a copy that is never cached."""

    def __init__(self) -> None:
        self.model = models.seeded(models.TinyDiT)
        self.step = 0

    def call(self, batch: int = 2) -> None:
        inputs = inputs_at(self.step % 9, batch=batch)
        self.step += 1
        hits = self.hits()
        with torch.no_grad():
            output, wanted = self.model(*inputs), self.model.forward(*inputs)
        assert output.shape == wanted.shape
        assert output.isfinite().all()
        if self.hits() == hits:
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)

    def hits(self) -> int:
        try:
            return cache_dit.get_stats(self.model).hits
        except cache_dit.CacheDitError:
            return 0

    def call_in_grad_mode(self) -> None:
        inputs = inputs_at(self.step % 9)
        torch.testing.assert_close(self.model(*inputs), self.model.forward(*inputs), rtol=1e-5, atol=1e-5)

    def call_in_context(self, name: Any) -> None:
        with cache_dit.context(self.model, name):
            self.call()

    def call_wrongly(self) -> None:
        with pytest.raises(TypeError):
            self.model(no_such_argument=1)

    def call_cached(self) -> None:
        with cache_dit.cached(self.model, inner="eager", skip_interval=1, warmup_steps=0):
            self.call()
            self.call()

    def change_weights(self) -> None:
        with torch.no_grad():
            self.model.get_submodule("blocks.1.mlp").weight.add_(0.01)


ACTIONS: list[Callable[[Driver], object]] = [
    Driver.call,
    Driver.call,
    Driver.call,
    lambda d: d.call(batch=3),
    Driver.call_in_grad_mode,
    Driver.call_wrongly,
    Driver.call_cached,
    Driver.change_weights,
    lambda d: d.call_in_context("positive"),
    lambda d: d.call_in_context("negative"),
    lambda d: d.call_in_context(3),
    lambda d: cache_dit.enable_cache(d.model, inner="eager", skip_interval=1, warmup_steps=0),
    lambda d: cache_dit.enable_cache(d.model, inner="eager"),
    lambda d: cache_dit.enable_cache(d.model, inner="eager", strategy="adaptive", noise_scale=0.0),
    lambda d: cache_dit.enable_cache(d.model, skip_interval=-1),
    lambda d: cache_dit.enable_cache(d.model, no_such_option=1),
    lambda d: cache_dit.disable_cache(d.model),
    lambda d: cache_dit.new_run(d.model),
    lambda d: cache_dit.new_run(d.model, num_steps=2, sigmas=[1.0, 0.5, 0.0]),
    lambda d: cache_dit.new_run(d.model, num_steps=-1),
    lambda d: cache_dit.summary(d.model),
    lambda d: cache_dit.get_stats(d.model),
    lambda d: cache_dit.get_global_stats(),
    lambda d: cache_dit.reset_cache_stats(),
    lambda d: str(cache_dit.explain(d.model)),
    lambda d: copy.deepcopy(d.model)(*inputs_at(0)),
]


@given(st.lists(st.sampled_from(range(len(ACTIONS))), min_size=4, max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_calls_ends_in_our_errors_or_in_right_results(actions: list[int]) -> None:
    driver = Driver()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        for action in actions:
            with contextlib.suppress(cache_dit.CacheDitError, ValueError, TypeError):
                ACTIONS[action](driver)
        for _ in range(3):
            driver.call()
