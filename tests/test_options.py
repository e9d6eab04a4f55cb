"""The options: their defaults, ranges and messages, the global configuration, and what enters the program."""

import copy
import dataclasses
import decimal
import fractions
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_dit import options as module
from cache_dit.calibration import Calibration
from cache_dit.options import (
    DEFAULT_TOLERANCE,
    FORECASTS,
    FOREIGN_OPTIONS,
    RESIDUAL_DTYPES,
    CacheOptions,
    GlobalConfig,
    ProgramOptions,
    global_config,
    reset_global_config,
    resolve_options,
    set_global_config,
)
from cache_dit.texts import TEXTS

CALIBRATION = Calibration("Model", ("0123456789abcdef",), 3, (0.0, 0.5, 0.75, 1.0))
NAMES = [field.name for field in dataclasses.fields(CacheOptions)]


@pytest.fixture(autouse=True)
def _table_defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CACHE_DIT_LANG", raising=False)
    reset_global_config()
    yield
    reset_global_config()


def values_of(options: CacheOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in NAMES}


def test_defaults_are_those_of_the_table() -> None:
    expected = {
        "skip_interval": 2,
        "warmup_steps": 3,
        "strategy": "fixed",
        "noise_scale": 0.001,
        "enable_stats": True,
        "debug": False,
        "front_blocks": 1,
        "back_blocks": 0,
        "residual_dtype": None,
        "residual_device": None,
        "schedule": None,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "region": None,
        "forecast": "auto",
        "order": 1,
        "tolerance": DEFAULT_TOLERANCE,
        "target_speedup": None,
        "calibration": None,
        "correction": "auto",
        "max_consecutive_hits": None,
        "control_refresh": None,
        "lowering": "auto",
        "inner": "inductor",
        "inner_options": None,
        "group": "auto",
        "strict": False,
        "language": None,
    }
    assert values_of(resolve_options()) == expected
    assert resolve_options({}) == resolve_options(None) == CacheOptions()
    assert resolve_options(dict.fromkeys(NAMES)) == CacheOptions()


def test_every_option_has_a_rule() -> None:
    assert list(module._RULES) == NAMES


def inner_compiler(graph: object, example_inputs: object) -> object:
    return graph


ACCEPTED: list[tuple[str, object, object]] = [
    ("skip_interval", 1, 1),
    ("skip_interval", np.int64(5), 5),
    ("warmup_steps", 0, 0),
    ("strategy", "dynamic", "dynamic"),
    ("noise_scale", 0, 0.0),
    ("noise_scale", 1, 1.0),
    ("noise_scale", np.float32(0.5), 0.5),
    ("enable_stats", False, False),
    ("debug", np.bool_(True), True),
    ("front_blocks", 0, 0),
    ("back_blocks", 7, 7),
    ("residual_dtype", torch.bfloat16, torch.bfloat16),
    ("residual_dtype", "float16", torch.float16),
    ("residual_dtype", "torch.float8_e4m3fn", torch.float8_e4m3fn),
    ("residual_dtype", torch.int8, torch.int8),
    ("residual_dtype", "int8", torch.int8),
    ("residual_device", "cpu", torch.device("cpu")),
    ("residual_device", torch.device("cuda", 1), torch.device("cuda:1")),
    ("schedule", "1101", (True, True, False, True)),
    ("schedule", [True, False], (True, False)),
    ("schedule", (1, 0, np.int64(1), np.bool_(False)), (True, False, True, False)),
    ("schedule", np.array([True, False]), (True, False)),
    ("region", "transformer_blocks", "transformer_blocks"),
    (
        "region",
        ["transformer_blocks.1", "single_transformer_blocks.7"],
        ("transformer_blocks.1", "single_transformer_blocks.7"),
    ),
    ("order", 3, 3),
    ("tolerance", 1e-6, 1e-6),
    ("tolerance", fractions.Fraction(1, 4), 0.25),
    ("target_speedup", 1, 1.0),
    ("calibration", CALIBRATION, CALIBRATION),
    ("calibration", CALIBRATION.as_data(), CALIBRATION),
    ("correction", "auto", "auto"),
    ("correction", True, True),
    ("max_consecutive_hits", 1, 1),
    ("control_refresh", True, 0.1),
    ("control_refresh", False, None),
    ("control_refresh", 0.25, 0.25),
    ("lowering", "pieces", "pieces"),
    ("inner", "eager", "eager"),
    ("inner", inner_compiler, inner_compiler),
    ("inner_options", {"max_autotune": True}, {"max_autotune": True}),
    ("group", "world", "world"),
    ("group", False, False),
    ("strict", True, True),
    ("language", "en", "en"),
    *[("forecast", forecast, forecast) for forecast in FORECASTS],
]


@pytest.mark.parametrize(("name", "given_value", "kept"), ACCEPTED)
def test_accepted_values(name: str, given_value: object, kept: object) -> None:
    value = getattr(resolve_options({name: given_value}), name)
    assert value == kept
    assert type(value) is type(kept)


REFUSED: list[tuple[str, object, type[Exception]]] = [
    ("skip_interval", 0, ValueError),
    ("skip_interval", True, TypeError),
    ("skip_interval", 2.0, TypeError),
    ("skip_interval", "2", TypeError),
    ("warmup_steps", -1, ValueError),
    ("strategy", "Fixed", ValueError),
    ("strategy", "", ValueError),
    ("strategy", 1, TypeError),
    ("noise_scale", 1.01, ValueError),
    ("noise_scale", -0.001, ValueError),
    ("noise_scale", float("nan"), ValueError),
    ("noise_scale", float("inf"), ValueError),
    ("noise_scale", 10**400, ValueError),
    ("noise_scale", True, TypeError),
    ("noise_scale", 1j, TypeError),
    ("noise_scale", decimal.Decimal("0.1"), TypeError),
    ("enable_stats", 1, TypeError),
    ("debug", "yes", TypeError),
    ("front_blocks", -1, ValueError),
    ("back_blocks", 1.5, TypeError),
    ("residual_dtype", torch.uint8, ValueError),
    ("residual_dtype", torch.complex64, ValueError),
    ("residual_dtype", "nn", ValueError),
    ("residual_dtype", float, TypeError),
    ("residual_device", "gpu", ValueError),
    ("residual_device", "meta", ValueError),
    ("residual_device", 0, TypeError),
    ("schedule", "", ValueError),
    ("schedule", "10x", ValueError),
    ("schedule", [], ValueError),
    ("schedule", [1, 2], ValueError),
    ("schedule", [1.0], TypeError),
    ("schedule", b"11", TypeError),
    ("schedule", 3, TypeError),
    ("schedule", np.array(True), TypeError),
    ("start_percent", 1.5, ValueError),
    ("end_percent", -0.5, ValueError),
    ("region", "", ValueError),
    ("region", ("a", ""), ValueError),
    ("region", ("a", "b", "c"), ValueError),
    ("region", ("a", 1), TypeError),
    ("region", 3, TypeError),
    ("forecast", "linear", ValueError),
    ("order", 0, ValueError),
    ("order", 4, ValueError),
    ("tolerance", 0, ValueError),
    ("target_speedup", 0.99, ValueError),
    ("calibration", "no/such/file.json", ValueError),
    ("calibration", {}, ValueError),
    ("calibration", {**CALIBRATION.as_data(), "format": 2}, ValueError),
    ("calibration", {**CALIBRATION.as_data(), "clock": [0.0, 0.7, 0.5, 1.0]}, ValueError),
    ("calibration", {**CALIBRATION.as_data(), "num_steps": 7}, ValueError),
    ("calibration", {**CALIBRATION.as_data(), "clock": [0.0, float("nan"), 0.5, 1.0]}, ValueError),
    ("calibration", 3, TypeError),
    ("correction", "on", ValueError),
    ("correction", 1, TypeError),
    ("max_consecutive_hits", 0, ValueError),
    ("control_refresh", 0.0, ValueError),
    ("control_refresh", "auto", TypeError),
    ("group", "mine", ValueError),
    ("group", True, TypeError),
    ("group", 0, TypeError),
    ("lowering", "whole", ValueError),
    ("inner", " ", ValueError),
    ("inner", "cache_dit", ValueError),
    ("inner", 3, TypeError),
    ("inner_options", [("max_autotune", True)], TypeError),
    ("inner_options", {1: True}, TypeError),
    ("strict", None.__class__, TypeError),
    ("language", "fr", ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), REFUSED)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_refused_values_are_named_with_what_is_allowed(
    name: str, value: object, error: type[Exception], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIT_LANG", language)
    with pytest.raises(error) as caught:
        resolve_options({name: value})
    assert type(caught.value) is error
    message = str(caught.value)
    assert name in message
    assert module._RULES[name].allowed in message
    assert {"zh": "允许", "en": "allowed"}[language] in message


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"skip_interval": 0}, "选项 skip_interval: 不能是 0；允许: int >= 1"),
        (
            {"strategy": "fast", "language": "en"},
            "option strategy: it cannot be 'fast'; allowed: 'fixed' | 'dynamic' | 'adaptive'",
        ),
        ({"order": "1", "language": "en"}, "option order: '1' is of type str; allowed: 1 <= int <= 3"),
        ({"region": 3}, "选项 region: 3 的类型是 int；允许: str, tuple[str, str]; not empty"),
    ],
)
def test_messages(given_options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        resolve_options(given_options)
    assert str(caught.value) == message


def test_a_value_without_repr_is_refused_like_any_other() -> None:
    with pytest.raises(ValueError, match="选项 order: 不能是 <int>"):
        resolve_options({"order": HUGE})
    with pytest.raises(TypeError, match="选项 debug: <int> 的类型是 int"):
        resolve_options({"debug": HUGE})


def test_the_part_of_the_run_must_not_end_before_it_starts() -> None:
    assert resolve_options({"start_percent": 0.5, "end_percent": 0.5}).start_percent == 0.5
    with pytest.raises(ValueError, match=r"start_percent.*0\.6.*start_percent <= end_percent \(= 0\.4\)"):
        resolve_options({"start_percent": 0.6, "end_percent": 0.4})


def test_the_adaptive_strategy_chooses_its_warm_up_where_none_is_given() -> None:
    assert resolve_options({"strategy": "adaptive"}).warmup_steps is None
    assert resolve_options({"strategy": "adaptive", "warmup_steps": None}).warmup_steps is None
    assert resolve_options({"strategy": "adaptive", "warmup_steps": 5}).warmup_steps == 5
    set_global_config(default_warmup_steps=4)
    assert resolve_options({"strategy": "adaptive"}).warmup_steps == 4
    set_global_config(default_warmup_steps=None, default_strategy="adaptive")
    assert resolve_options({}).warmup_steps is None
    assert resolve_options({"strategy": "dynamic"}).warmup_steps == 3


# Names.


def test_unknown_options_are_refused_with_the_closest_names() -> None:
    with pytest.raises(TypeError, match=r"unknown option warmup_step \(given as 3\); the closest options: warmup_steps"):
        resolve_options({"warmup_step": 3, "language": "en"})
    with pytest.raises(TypeError, match=r"未知选项 Strategy.*最接近的选项: strategy"):
        resolve_options({"Strategy": "fixed"})
    with pytest.raises(TypeError, match="最接近的选项: warmup_steps"):
        resolve_options({"WARMUP_STEPS": 3})
    with pytest.raises(TypeError, match="允许的选项: skip_interval, warmup_steps, strategy"):
        resolve_options({"qqqqqqqq": 1})
    with pytest.raises(TypeError, match="7"):
        resolve_options({7: 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="options"):
        resolve_options(["debug"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FOREIGN_OPTIONS)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_names_of_other_projects_are_refused_with_their_counterpart(name: str, language: str) -> None:
    foreign = FOREIGN_OPTIONS[name]
    assert name not in NAMES
    assert bool(foreign.use) != bool(foreign.why)
    with pytest.raises(TypeError) as caught:
        resolve_options({name: 1, "language": language})
    message = str(caught.value)
    assert name in message and foreign.project in message
    if foreign.use:
        assert foreign.use in message
    else:
        assert TEXTS[foreign.why][("zh", "en").index(language)] in message


@pytest.mark.parametrize(
    ("name", "counterpart"),
    [
        ("Fn_compute_blocks", "front_blocks"),
        ("Bn_compute_blocks", "back_blocks"),
        ("residual_diff_threshold", "strategy='adaptive', tolerance=..."),
        ("max_warmup_steps", "warmup_steps"),
        ("max_continuous_cached_steps", "max_consecutive_hits"),
        ("steps_computation_mask", "schedule"),
        ("num_inference_steps", "cache_dit.new_run(model, num_steps=...)"),
        ("cache_config", "enable_cache(model, front_blocks=..., strategy=..., ...)"),
        ("taylorseer_order", "order"),
        ("rel_l1_thresh", "strategy='adaptive', tolerance=..."),
        ("reuse_threshold", "strategy='adaptive', tolerance=..."),
        ("cache_device", "residual_device"),
    ],
)
def test_counterparts(name: str, counterpart: str) -> None:
    assert FOREIGN_OPTIONS[name].use == counterpart


def test_counterparts_name_options_that_exist() -> None:
    for foreign in FOREIGN_OPTIONS.values():
        plain = foreign.use.split("=")[0].split(",")[0].split(" ")[0]
        assert plain in NAMES or "(" in plain or not plain, foreign


# Any value.

HUGE = 10**5000
"""An int that has no `repr`."""

anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.text(),
        st.binary(),
        st.decimals(),
        st.fractions(),
        st.sampled_from(
            [
                *NAMES,
                *RESIDUAL_DTYPES,
                "auto",
                "fixed",
                "adaptive",
                "cuda:0",
                "cpu:99999999999999999999",
                "mps",
                "0110",
                "zh",
                object(),
                object,
                len,
                ...,
                NotImplemented,
                torch.float32,
                torch.int64,
                torch.device("cpu"),
                torch.device("meta"),
                torch.zeros(2),
                torch.zeros(2, device="meta"),
                np.zeros(3),
                np.zeros((0,)),
                np.ones(3, dtype=bool),
                np.float16("nan"),
                np.uint8(3),
                np.bool_(True),
                np.str_("fixed"),
                range(2),
                10**400,
            ]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(), inner)),
    max_leaves=4,
)


@settings(deadline=None)
@given(name=st.sampled_from(NAMES), value=anything)
def test_any_value_is_taken_or_refused_with_one_of_two_errors(name: str, value: object) -> None:
    try:
        options = resolve_options({name: value})
    except (TypeError, ValueError) as error:
        assert type(error) in (TypeError, ValueError)
        assert name in str(error)
        return
    assert resolve_options(values_of(options)) == options
    hash(options.program())


@settings(deadline=None)
@given(given_options=st.dictionaries(st.one_of(st.text(), st.sampled_from(NAMES)), anything))
def test_any_options_are_taken_or_refused_with_one_of_two_errors(given_options: dict[str, object]) -> None:
    try:
        options = resolve_options(given_options)
    except (TypeError, ValueError) as error:
        assert type(error) in (TypeError, ValueError)
        return
    assert set(given_options) <= set(NAMES)
    assert resolve_options(values_of(options)) == options


percents = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
good_options = st.fixed_dictionaries(
    {},
    optional={
        "skip_interval": st.integers(1, 100),
        "warmup_steps": st.integers(0, 100),
        "strategy": st.sampled_from(module.STRATEGIES),
        "noise_scale": st.floats(0, 1),
        "enable_stats": st.booleans(),
        "debug": st.booleans(),
        "front_blocks": st.integers(0, 100),
        "back_blocks": st.integers(0, 100),
        "residual_dtype": st.sampled_from([getattr(torch, name) for name in RESIDUAL_DTYPES]),
        "residual_device": st.sampled_from([torch.device("cpu"), torch.device("cuda", 0)]),
        "schedule": st.lists(st.booleans(), min_size=1).map(tuple),
        "region": st.one_of(st.just("blocks"), st.just(("blocks.1", "blocks.5"))),
        "forecast": st.sampled_from(FORECASTS),
        "order": st.integers(1, 3),
        "tolerance": st.floats(0, 10, exclude_min=True),
        "target_speedup": st.floats(1, 100),
        "calibration": st.one_of(st.none(), st.just(CALIBRATION)),
        "correction": st.sampled_from(["auto", True, False]),
        "max_consecutive_hits": st.integers(1, 100),
        "control_refresh": st.one_of(st.none(), st.floats(0, 10, exclude_min=True)),
        "lowering": st.sampled_from(module.LOWERINGS),
        "inner": st.sampled_from(["inductor", "aot_eager", "eager", "other", inner_compiler]),
        "inner_options": st.dictionaries(st.text(), st.integers()),
        "group": st.sampled_from(["auto", "world", False]),
        "strict": st.booleans(),
        "language": st.sampled_from(["zh", "en"]),
    },
)


@settings(deadline=None)
@given(good=good_options, percent=percents)
def test_good_values_are_kept_as_they_are(good: dict[str, object], percent: list[float]) -> None:
    good = good | {"start_percent": percent[0], "end_percent": percent[1]}
    options = resolve_options(good)
    assert {name: getattr(options, name) for name in good} == good
    assert resolve_options(values_of(options)) == options
    assert options.program() == resolve_options(good).program()
    assert hash(options.program()) == hash(resolve_options(good).program())


def test_options_are_frozen_and_can_be_copied() -> None:
    options = resolve_options({"residual_dtype": "bfloat16", "residual_device": "cpu", "inner_options": {"a": 1}})
    assert copy.deepcopy(options) == options and pickle.loads(pickle.dumps(options)) == options
    assert pickle.loads(pickle.dumps(options.program())) == options.program()
    mine = {"a": 1}
    options = resolve_options({"inner_options": mine})
    mine["a"] = 2
    assert options.inner_options == {"a": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.order = 2  # type: ignore[misc]


# The global configuration.


def test_the_global_configuration_fills_in_what_is_not_given() -> None:
    set_global_config(default_skip_interval=3, default_strategy="adaptive", global_debug=True)
    options = resolve_options({"skip_interval": None})
    assert (options.skip_interval, options.strategy, options.debug) == (3, "adaptive", True)
    options = resolve_options({"skip_interval": 4, "strategy": "fixed", "debug": False})
    assert (options.skip_interval, options.strategy, options.debug, options.warmup_steps) == (4, "fixed", False, 3)


def test_none_sets_back_to_the_table_and_other_names_stay() -> None:
    set_global_config(default_skip_interval=3, default_warmup_steps=0)
    set_global_config(default_skip_interval=None)
    assert global_config() == GlobalConfig(default_warmup_steps=0)
    assert (resolve_options({}).skip_interval, resolve_options({}).warmup_steps) == (2, 0)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"default_skip_interval": 0}, ValueError, r"default_skip_interval.*int >= 1"),
        ({"default_warmup_steps": True}, TypeError, "default_warmup_steps.*int >= 0"),
        ({"default_strategy": "fast"}, ValueError, "default_strategy.*'adaptive'"),
        ({"global_debug": 1}, TypeError, "global_debug.*bool"),
        ({"default_skip_intervall": 3}, TypeError, "default_skip_intervall.*default_skip_interval"),
        ({"skip_interval": 3}, TypeError, "default_skip_interval"),
    ],
)
def test_a_refused_configuration_changes_nothing(config: dict[str, object], error: type[Exception], message: str) -> None:
    set_global_config(default_strategy="dynamic")
    before = global_config()
    with pytest.raises(error, match=message):
        set_global_config(**{"default_skip_interval": 9, "default_warmup_steps": 9, **config})
    assert global_config() is before


@settings(deadline=None)
@given(config=st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(GlobalConfig)]), anything))
def test_any_configuration_is_taken_whole_or_not_at_all(config: dict[str, object]) -> None:
    reset_global_config()
    try:
        set_global_config(**config)
    except (TypeError, ValueError):
        assert global_config() == GlobalConfig()
    else:
        assert set(config) >= {f.name for f in dataclasses.fields(GlobalConfig) if getattr(global_config(), f.name) is not None}
        resolve_options({})


def test_the_view_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        global_config().default_strategy = "dynamic"  # type: ignore[misc]


# What enters the program.

CHANGES_THE_PROGRAM: dict[str, object] = {
    "front_blocks": 2,
    "back_blocks": 1,
    "residual_dtype": "float16",
    "residual_device": "cpu",
    "region": "blocks",
    "forecast": "reuse",
    "order": 2,
    "noise_scale": 0.0,
    "strategy": "adaptive",
    "lowering": "cond",
    "inner": "eager",
    "inner_options": {"max_autotune": True},
    "strict": True,
}
LEAVES_THE_PROGRAM: dict[str, object] = {
    "skip_interval": 3,
    "warmup_steps": 5,
    "noise_scale": 0.01,
    "enable_stats": False,
    "debug": True,
    "schedule": "110",
    "start_percent": 0.1,
    "end_percent": 0.9,
    "forecast": "lagrange",
    "strategy": "dynamic",
    "tolerance": 0.7,
    "target_speedup": 3.0,
    "calibration": CALIBRATION,
    "correction": False,
    "max_consecutive_hits": 2,
    "control_refresh": 0.5,
    "group": "world",
    "language": "en",
}


def test_the_two_lists_name_every_option() -> None:
    assert {*CHANGES_THE_PROGRAM, *LEAVES_THE_PROGRAM} == set(NAMES)


@pytest.mark.parametrize("name", CHANGES_THE_PROGRAM)
def test_options_that_change_the_program(name: str) -> None:
    assert resolve_options({name: CHANGES_THE_PROGRAM[name]}).program() != CacheOptions().program()


@pytest.mark.parametrize("name", LEAVES_THE_PROGRAM)
def test_options_that_leave_the_program_as_it_is(name: str) -> None:
    program = resolve_options({name: LEAVES_THE_PROGRAM[name]}).program()
    assert program == CacheOptions().program()
    assert hash(program) == hash(CacheOptions().program())


def test_what_the_program_is_told() -> None:
    program = resolve_options(
        {"order": 2, "strategy": "adaptive", "residual_device": "cuda:0", "inner_options": {"b": [1], "a": {"x": 2}}}
    ).program()
    assert (program.history, program.noise, program.front_clock) == (3, True, True)
    assert program.residual_device == "cuda:0"
    assert program.inner_options == (("a", {"x": 2}), ("b", [1]))
    assert resolve_options({"forecast": "reuse", "order": 3}).program().history == 1
    assert not resolve_options({"strategy": "adaptive", "schedule": "10"}).program().front_clock
    assert CacheOptions().program().inner_options == ()
    assert CacheOptions().program() != "program"


def test_callables_are_compared_by_identity() -> None:
    class Compiler:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        def __repr__(self) -> str:
            return "compiler"

        def __call__(self, *args: object) -> object:
            return args

    def program(inner: Callable[..., object], partitioner: Callable[..., object]) -> ProgramOptions:
        return resolve_options({"inner": inner, "inner_options": {"nested": [partitioner]}}).program()

    first, second = Compiler(), Compiler()
    assert program(first, second) == program(first, second)
    assert hash(program(first, second)) == hash(program(first, second))
    assert program(first, second) != program(second, second)
    assert program(first, second) != program(first, first)
