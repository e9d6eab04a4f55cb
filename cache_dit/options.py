"""Every option of caching: its type, range, default and message, and the global configuration.

`resolve_options` turns what a user gave, to `enable_cache` or as `options=` of `torch.compile`, into a `CacheOptions`.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final

from .calibration import Calibration, read_calibration
from .texts import LANGUAGES, text

if TYPE_CHECKING:
    import torch

    from .passes import BranchOptions

STRATEGIES: Final = ("fixed", "dynamic", "adaptive")
RULES: Final = ("front_clock", "teacache", "first_block", "sigma")
"""Rules that `strategy` takes as well, for comparison: thresholds are `tolerance`, `sigma` goes by `target_speedup`."""
FORECASTS: Final = ("auto", "reuse", "taylor", "lagrange", "hermite", "adams_bashforth")
LOWERINGS: Final = ("auto", "specialize", "pieces", "cond")
MAX_ORDER: Final = 3
DEFAULT_SKIP_INTERVAL: Final = 2
DEFAULT_WARMUP_STEPS: Final = 3
DEFAULT_TOLERANCE: Final = 0.1
DEFAULT_CONTROL_REFRESH: Final = 0.1
"""What `control_refresh=True` means."""
DEFAULT_MAX_CONSECUTIVE_HITS: Final = 4
"""What `max_consecutive_hits=None` means under the strategies fixed and dynamic."""
RESIDUAL_DTYPES: Final = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "int8",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The options in force for one model, every value valid: made by `resolve_options`, which checks them.

    The defaults are those of the table in the documentation. A None stays where the choice is made later, by what the
    comment behind it names.
    """

    skip_interval: int | None = DEFAULT_SKIP_INTERVAL  # None: the placement for a target speed-up
    warmup_steps: int | None = DEFAULT_WARMUP_STEPS  # None: the adaptive strategy
    strategy: str = "fixed"
    noise_scale: float = 0.001
    enable_stats: bool = True
    debug: bool = False
    front_blocks: int = 1
    back_blocks: int = 0
    residual_dtype: torch.dtype | None = None  # None: the model's own
    residual_device: torch.device | None = None  # None: the model's own
    schedule: tuple[bool, ...] | None = None  # by step within the run, True = compute; None: the strategy
    start_percent: float = 0.0
    end_percent: float = 1.0
    region: str | tuple[str, str] | None = None  # None: the finder
    forecast: str = "auto"
    order: int = 1
    tolerance: float = DEFAULT_TOLERANCE
    target_speedup: float | None = None  # None: `tolerance` rules alone
    calibration: Calibration | None = None  # None: computed steps are placed by the noise levels
    correction: bool | str = "auto"
    max_consecutive_hits: int | None = None  # None: the strategy
    control_refresh: float | None = None  # None: what enters the cached blocks from outside is not watched
    lowering: str = "auto"
    inner: str | Callable[..., Any] = "inductor"
    inner_options: dict[str, Any] | None = None
    group: Any = "auto"  # a name, False, or a process group of torch.distributed
    strict: bool = False
    language: str | None = None  # None: CACHE_DIT_LANG where a text is made

    def may_correct(self) -> bool:
        """Whether skipped steps are corrected where the run's solver allows it."""
        return self.correction is True or (self.correction == "auto" and self.strategy == "adaptive" and self.schedule is None)

    def where_nothing_is_corrected(self) -> CacheOptions:
        """These options where no solver is ever known: `correction='auto'` would keep residuals that nothing asks for."""
        return replace(self, correction=False) if self.correction == "auto" else self

    def history(self) -> int:
        """Residuals kept: as many as the forecast needs, and three at least to interpolate by where steps are corrected."""
        return max(1 if self.forecast == "reuse" else self.order + 1, 3 if self.may_correct() else 1)

    def program(self) -> ProgramOptions:
        """Return the part of the options that changes the compiled program."""
        return ProgramOptions(
            front_blocks=self.front_blocks,
            back_blocks=self.back_blocks,
            residual_dtype=self.residual_dtype,
            residual_device=None if self.residual_device is None else str(self.residual_device),
            region=self.region,
            history=self.history(),
            noise=self.noise_scale > 0.0,
            front_clock=self.strategy in ("adaptive", *RULES) and self.strategy != "sigma" and self.schedule is None,
            front_anchored=self.strategy == "first_block" and self.schedule is None,
            lowering=self.lowering,
            inner=self.inner,
            inner_options=tuple(sorted((self.inner_options or {}).items(), key=lambda item: item[0])),
            strict=self.strict,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProgramOptions:
    """What of the options changes the compiled program; equal and hash-equal where the program would be the same.

    Values of `inner_options` are compared by their `repr`, callables by identity.
    """

    front_blocks: int
    back_blocks: int
    residual_dtype: torch.dtype | None
    residual_device: str | None
    region: str | tuple[str, str] | None
    history: int
    """Residuals kept for each live-out: see `CacheOptions.history`."""
    noise: bool
    front_clock: bool
    """Whether the program measures the change of the front's output for the adaptive strategy."""
    front_anchored: bool
    """Whether that change is measured against the last computed step instead of the last one."""
    lowering: str
    inner: str | Callable[..., Any]
    inner_options: tuple[tuple[str, Any], ...]
    """Sorted by name; `dict()` of it gives the options back."""
    strict: bool
    _identity: Hashable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = (getattr(self, each.name) for each in fields(self) if each.init)
        object.__setattr__(self, "_identity", tuple(_identity_of(value) for value in values))

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, ProgramOptions) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def branch(self) -> BranchOptions:
        """What of these the cache branch is built from."""
        # here, so that options can be checked without torch
        from .passes import BranchOptions

        return BranchOptions(
            history=self.history,
            noise=self.noise,
            front_clock=self.front_clock,
            residual_dtype=self.residual_dtype,
            residual_device=self.residual_device,
            front_anchored=self.front_anchored,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalConfig:
    """What `enable_cache` uses where an option is not given; None: the table's default."""

    default_skip_interval: int | None = None
    default_warmup_steps: int | None = None
    default_strategy: str | None = None
    global_debug: bool | None = None


_GLOBAL_NAME_OF: Final = {
    "skip_interval": "default_skip_interval",
    "warmup_steps": "default_warmup_steps",
    "strategy": "default_strategy",
    "debug": "global_debug",
}
_global_config = GlobalConfig()


def resolve_options(given: Mapping[str, object] | None = None, config: GlobalConfig | None = None) -> CacheOptions:
    """Return `given`, checked, with what it leaves out or gives as None filled in.

    What is left out comes from the global configuration (`config`; None: the one in force), else from the table's
    defaults; `warmup_steps` stays None under the adaptive strategy, which then chooses.

    Raises:
        TypeError: an unknown option, or a value of a wrong type.
        ValueError: a value that is not allowed.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(_refusal("option_type", "options", given, None, allowed="dict[str, object] | None"))
    language = _language_among(given)
    for name, value in given.items():
        if name not in _RULES:
            raise TypeError(_unknown_option(name, value, language))
    chosen = {name: _checked(name, value, _RULES[name], language) for name, value in given.items() if value is not None}
    filled = _values_of(_global_config if config is None else config) | chosen
    if filled.get("strategy") in ("adaptive", *RULES):
        filled.setdefault("warmup_steps", None)
        if filled.get("target_speedup") is not None:
            filled.setdefault("skip_interval", None)
    options = CacheOptions(**filled)
    if options.start_percent > options.end_percent:
        allowed = f"start_percent <= end_percent (= {options.end_percent!r})"
        raise ValueError(_refusal("option_value", "start_percent", options.start_percent, language, allowed=allowed))
    return options


def set_global_config(**config: object) -> None:
    """Set what a later `enable_cache` uses where an option is not given; all of `config`, or on an error nothing.

    Names: `default_skip_interval` (int), `default_warmup_steps` (int), `default_strategy` (str), `global_debug`
    (bool). None sets a name back to the table's default.

    Raises:
        TypeError: an unknown name, or a value of a wrong type.
        ValueError: a value that is not allowed.
    """
    global _global_config
    names = [each.name for each in fields(GlobalConfig)]
    for name, value in config.items():
        if name not in names:
            raise TypeError(_unknown_name(name, value, names, None))
    rules = {global_name: _RULES[name] for name, global_name in _GLOBAL_NAME_OF.items()}
    checked = {name: None if value is None else _checked(name, value, rules[name], None) for name, value in config.items()}
    _global_config = replace(_global_config, **checked)


def global_config() -> GlobalConfig:
    """Return the global configuration in force."""
    return _global_config


def reset_global_config() -> None:
    """Set the whole global configuration back to the table's defaults."""
    global _global_config
    _global_config = GlobalConfig()


def chosen_names(given: Mapping[str, object]) -> set[str]:
    """The options that `given` or the global configuration in force sets; the others take the table's defaults."""
    return {name for name, value in given.items() if value is not None} | set(_values_of(_global_config))


def _values_of(config: GlobalConfig) -> dict[str, Any]:
    values = {name: getattr(config, global_name) for name, global_name in _GLOBAL_NAME_OF.items()}
    return {name: value for name, value in values.items() if value is not None}


# The rule of each option.


@dataclass(frozen=True, slots=True)
class _Rule:
    allowed: str
    """What is allowed, in the same notation for every language."""
    accept: Callable[[object], Any]
    """The value as it is kept; raises a bare `TypeError` or `ValueError` where it is not allowed."""


def _checked(name: str, value: object, rule: _Rule, language: str | None) -> Any:
    try:
        return rule.accept(value)
    except TypeError:
        raise TypeError(_refusal("option_type", name, value, language, allowed=rule.allowed)) from None
    except (ValueError, OverflowError):
        raise ValueError(_refusal("option_value", name, value, language, allowed=rule.allowed)) from None


def _is_bool(value: object) -> bool:
    # NumPy's bool is no subclass of Python's and registered with no abstract class.
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def _accept_bool(value: object) -> bool:
    if not _is_bool(value):
        raise TypeError
    return bool(value)


def _accept_integer(value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError
    return int(value)


def _accept_number(value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _accept_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise ValueError
    return str(value)


def _integer(low: int, high: int | None = None) -> _Rule:
    def accept(value: object) -> int:
        number = _accept_integer(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    return _Rule(f"int >= {low}" if high is None else f"{low} <= int <= {high}", accept)


def _number(low: int, high: int | None = None) -> _Rule:
    def accept(value: object) -> float:
        number = _accept_number(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    return _Rule(f"float >= {low}" if high is None else f"{low} <= float <= {high}", accept)


def _accept_positive(value: object) -> float:
    number = _accept_number(value)
    if number <= 0.0:
        raise ValueError
    return number


def _one_of(names: Sequence[str]) -> _Rule:
    def accept(value: object) -> str:
        name = _accept_text(value)
        if name not in names:
            raise ValueError
        return name

    return _Rule(" | ".join(map(repr, names)), accept)


def _accept_correction(value: object) -> bool | str:
    if not isinstance(value, str):
        return _accept_bool(value)
    if value != "auto":
        raise ValueError
    return "auto"


def _accept_control_refresh(value: object) -> float | None:
    if _is_bool(value):
        return DEFAULT_CONTROL_REFRESH if value else None
    return _accept_positive(value)


def _accept_schedule(value: object) -> tuple[bool, ...]:
    if isinstance(value, str):
        if not value or not set(value) <= set("01"):
            raise ValueError
        return tuple(digit == "1" for digit in value)
    entries = value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value
    if not isinstance(entries, Sequence) or isinstance(entries, (bytes, bytearray, memoryview)):
        raise TypeError
    if not entries:
        raise ValueError
    return tuple(_accept_schedule_entry(entry) for entry in entries)


def _accept_schedule_entry(value: object) -> bool:
    if _is_bool(value):
        return bool(value)
    number = _accept_integer(value)
    if number not in (0, 1):
        raise ValueError
    return number == 1


def _accept_region(value: object) -> str | tuple[str, str]:
    if isinstance(value, str):
        return _accept_text(value)
    if not isinstance(value, (tuple, list)):
        raise TypeError
    if len(value) != 2:
        raise ValueError
    return _accept_text(value[0]), _accept_text(value[1])


def _accept_residual_dtype(value: object) -> torch.dtype:
    import torch


    if not isinstance(value, (str, torch.dtype)):
        raise TypeError
    for name in RESIDUAL_DTYPES:
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and value in (dtype, name, f"torch.{name}"):
            return dtype
    raise ValueError


def _accept_residual_device(value: object) -> torch.device:
    import torch


    if isinstance(value, torch.device):
        device = value
    elif isinstance(value, str):
        try:
            device = torch.device(value)
        except RuntimeError:
            raise ValueError from None
    else:
        raise TypeError
    if device.type == "meta":  # holds no data
        raise ValueError
    return device


def _accept_inner(value: object) -> str | Callable[..., Any]:
    if isinstance(value, str):
        name = _accept_text(value)
        if name == "cache_dit":  # would call itself without end
            raise ValueError
        return name
    if not callable(value):
        raise TypeError
    return value


def _accept_group(value: object) -> Any:
    # by name: torch may lack its distributed package
    if value is False or any(base.__name__ == "ProcessGroup" for base in type(value).__mro__):
        return value
    if not isinstance(value, str):
        raise TypeError
    if value not in ("auto", "world"):
        raise ValueError
    return value


def _accept_inner_options(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return dict(value)


_BOOL: Final = _Rule("bool", _accept_bool)
_RULES: Final[dict[str, _Rule]] = {
    "skip_interval": _integer(1),
    "warmup_steps": _integer(0),
    # the rules for comparison are no recommendation: a wrong name is answered with the strategies
    "strategy": _Rule(_one_of(STRATEGIES).allowed, _one_of((*STRATEGIES, *RULES)).accept),
    "noise_scale": _number(0, 1),
    "enable_stats": _BOOL,
    "debug": _BOOL,
    "front_blocks": _integer(0),
    "back_blocks": _integer(0),
    "residual_dtype": _Rule(" | ".join(f"torch.{name}" for name in RESIDUAL_DTYPES), _accept_residual_dtype),
    "residual_device": _Rule("torch.device | str, e.g. 'cpu'", _accept_residual_device),
    "schedule": _Rule("str of '0' and '1', Sequence[bool] (1 = compute); not empty", _accept_schedule),
    "start_percent": _number(0, 1),
    "end_percent": _number(0, 1),
    "region": _Rule("str, tuple[str, str]; not empty", _accept_region),
    "forecast": _one_of(FORECASTS),
    "order": _integer(1, MAX_ORDER),
    "tolerance": _Rule("float > 0", _accept_positive),
    "target_speedup": _number(1),
    "calibration": _Rule("Calibration | str | os.PathLike (a file written by Calibration.save)", read_calibration),
    "correction": _Rule("'auto' | bool", _accept_correction),
    "max_consecutive_hits": _integer(1),
    "control_refresh": _Rule("bool | float > 0", _accept_control_refresh),
    "lowering": _one_of(LOWERINGS),
    "inner": _Rule("'inductor' | 'aot_eager' | 'eager' | str (a torch.compile backend) | callable", _accept_inner),
    "inner_options": _Rule("dict[str, object]", _accept_inner_options),
    "group": _Rule("'auto' | 'world' | False | torch.distributed.ProcessGroup", _accept_group),
    "strict": _BOOL,
    "language": _one_of(LANGUAGES),
}


def _identity_of(value: object) -> Hashable:
    if isinstance(value, Mapping):
        return "mapping", tuple(sorted((repr(key), _identity_of(entry)) for key, entry in value.items()))
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_identity_of(entry) for entry in value)
    if callable(value):
        return "callable", id(value)  # stays its own: the options hold the object
    return type(value).__qualname__, repr(value)


# What is said about a refused option.


@dataclass(frozen=True, slots=True)
class ForeignOption:
    """The counterpart here of a name of another project."""

    project: str
    use: str = ""
    """What to write instead; empty where nothing is needed."""
    why: str = ""
    """Where nothing is needed: the key in `texts.TEXTS` of the reason."""


_ADAPTIVE: Final = "strategy='adaptive', tolerance=..."
_CONTEXTS: Final = "foreign_contexts"
_ELSEWHERE: Final = "foreign_elsewhere"

_CACHE_DIT: Final[dict[str, str]] = {
    "cache_config": "enable_cache(model, front_blocks=..., strategy=..., ...)",
    "DBCacheConfig": "enable_cache(model, front_blocks=..., strategy=..., ...)",
    "BasicCacheConfig": "enable_cache(model, front_blocks=..., strategy=..., ...)",
    "cache_type": "strategy",
    "Fn_compute_blocks": "front_blocks",
    "Bn_compute_blocks": "back_blocks",
    "residual_diff_threshold": _ADAPTIVE,
    "rdt": _ADAPTIVE,
    "max_accumulated_residual_diff_threshold": _ADAPTIVE,
    "max_warmup_steps": "warmup_steps",
    "warmup_interval": "schedule",
    "max_cached_steps": "schedule, end_percent",
    "max_continuous_cached_steps": "max_consecutive_hits",
    "num_inference_steps": "cache_dit.new_run(model, num_steps=...)",
    "steps_computation_mask": "schedule",
    "steps_computation_policy": "schedule ('static'), strategy='adaptive' ('dynamic')",
    "force_refresh_step_hint": "cache_dit.new_run(model)",
    "force_refresh_step_policy": "cache_dit.new_run(model)",
    "params_modifiers": "enable_cache(denoiser, ...)",
    "pipe_or_adapter": "enable_cache(model, region=...)",
    "BlockAdapter": "enable_cache(model, region=...)",
    "block_adapter": "enable_cache(model, region=...)",
    "calibrator_config": "forecast='taylor', order=...",
    "TaylorSeerCalibratorConfig": "forecast='taylor', order=...",
    "FoCaCalibratorConfig": "forecast, order",
    "calibrator_type": "forecast",
    "enable_calibrator": "forecast",
    "enable_encoder_calibrator": "forecast",
    "calibrator_kwargs": "order",
    "enable_taylorseer": "forecast='taylor'",
    "enable_encoder_taylorseer": "forecast='taylor'",
    "taylorseer_order": "order",
}
_CACHE_DIT_UNNEEDED: Final[dict[str, str]] = {
    "enable_separate_cfg": _CONTEXTS,
    "cfg_compute_first": _CONTEXTS,
    "cfg_diff_compute_separate": _CONTEXTS,
    "taylorseer_cache_type": "foreign_residuals",
    "calibrator_cache_type": "foreign_residuals",
    "parallelism_config": _ELSEWHERE,
    "attention_backend": _ELSEWHERE,
    "quantize_config": _ELSEWHERE,
}
_TEACACHE: Final[dict[str, str]] = {
    "rel_l1_thresh": _ADAPTIVE,
    "enable_teacache": "enable_cache(model)",
    "num_steps": "cache_dit.new_run(model, num_steps=...)",
    "cache_device": "residual_device",
    "max_skip_steps": "max_consecutive_hits",
    "use_ret_steps": "warmup_steps",
    "ret_steps": "warmup_steps",
}
_TEACACHE_UNNEEDED: Final[dict[str, str]] = {
    "coefficients": "foreign_calibration",
    "model_type": "foreign_calibration",
}
_EASYCACHE: Final[dict[str, str]] = {
    "reuse_threshold": _ADAPTIVE,
    "verbose": "debug",
    "offload_cache_diff": "residual_device='cpu'",
}

FOREIGN_OPTIONS: Final[dict[str, ForeignOption]] = {
    **{name: ForeignOption("cache-dit", use=use) for name, use in _CACHE_DIT.items()},
    **{name: ForeignOption("cache-dit", why=why) for name, why in _CACHE_DIT_UNNEEDED.items()},
    **{name: ForeignOption("TeaCache", use=use) for name, use in _TEACACHE.items()},
    **{name: ForeignOption("TeaCache", why=why) for name, why in _TEACACHE_UNNEEDED.items()},
    **{name: ForeignOption("EasyCache", use=use) for name, use in _EASYCACHE.items()},
}
"""Names of the projects cache-dit, TeaCache and EasyCache, which are refused with their counterpart here."""


def _language_among(given: Mapping[str, object]) -> str | None:
    language = given.get("language")
    return language if isinstance(language, str) and language in LANGUAGES else None


def _refusal(key: str, name: object, value: object, language: str | None, **more: str) -> str:
    shown_name = name if isinstance(name, str) else _shown(name)
    return text(key, language, name=shown_name, value=_shown(value), type=type(value).__name__, **more)


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of thousands of digits has no repr
        return f"<{type(value).__name__}>"


def _unknown_option(name: object, value: object, language: str | None) -> str:
    foreign = FOREIGN_OPTIONS.get(name) if isinstance(name, str) else None
    if foreign is None:
        return _unknown_name(name, value, list(_RULES), language)
    if foreign.use:
        return _refusal("option_foreign", name, value, language, project=foreign.project, use=foreign.use)
    why = text(foreign.why, language)
    return _refusal("option_foreign_unneeded", name, value, language, project=foreign.project, why=why)


def _unknown_name(name: object, value: object, known: Sequence[str], language: str | None) -> str:
    closest = difflib.get_close_matches(name.lower(), known, cutoff=0.5) if isinstance(name, str) else []
    key = "option_unknown" if closest else "option_unknown_far"
    return _refusal(key, name, value, language, names=", ".join(closest or known))
