"""The rules that are compared, each as options of `enable_cache`: published ones, our parts of the default, the default.

`share` is the part of a run's steps that compute: 1/2, 1/3, 1/4 for "2x, 3x, 4x". A rule with a threshold is run at
thresholds found by halving until the number of computed steps is the wanted one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import sampling
from sampling import Setting

from cache_dit.forecasts import FORECASTS, auto
from cache_dit.options import resolve_options
from cache_dit.runtime import correction, corrector, solvers
from cache_dit.runtime.session import AUTO_CANDIDATES
from cache_dit.strategies import build_strategy

Options = dict[str, Any]

SHIPPED = "dbcache_shipped"
"""The peer with its own defaults, whatever number of steps that computes."""


@dataclass(frozen=True)
class Rule:
    """One rule. `options` gives what `enable_cache` gets for a number of computed steps; `threshold` names the option
    that is searched for where a rule cannot be told the number. A `peer` is the other library: its own options, run in
    its own environment."""

    name: str
    title: str
    options: Callable[[Setting, int], Options]
    threshold: str | None = None
    group: str = "published"
    fewer_steps: bool = False
    peer: bool = False


def computed_steps(steps: int, ratio: float) -> int:
    """The computed steps of "ratio times fewer block computations"."""
    return max(1, round(steps / ratio))


def _mask(steps: int, indices: list[int]) -> str:
    return "".join("1" if index in indices else "0" for index in range(steps))


def evenly(setting: Setting, count: int) -> list[int]:
    """Every n-th step, as evenly as the count allows."""
    return sorted({index * setting.steps // count for index in range(count)})


def _every(**options: Any) -> Callable[[Setting, int], Options]:
    def build(setting: Setting, count: int) -> Options:
        return {"schedule": _mask(setting.steps, evenly(setting, count)), "correction": False, **options}

    return build


def _in_sigma(**options: Any) -> Callable[[Setting, int], Options]:
    def build(setting: Setting, count: int) -> Options:
        return {"strategy": "sigma", "target_speedup": setting.steps / count, "correction": False, **options}

    return build


def _strategy(name: str, **options: Any) -> Callable[[Setting, int], Options]:
    def build(setting: Setting, count: int) -> Options:
        return {"strategy": name, "max_consecutive_hits": 100, "correction": False, **options}

    return build


def _target(**options: Any) -> Callable[[Setting, int], Options]:
    def build(setting: Setting, count: int) -> Options:
        return {"strategy": "adaptive", "target_speedup": setting.steps / count, **options}

    return build


def _dbcache(**options: Any) -> Callable[[Setting, int], Options]:
    def build(setting: Setting, count: int) -> Options:
        return {"taylorseer_order": 1, **options}

    return build


LINE: Options = {"forecast": "lagrange"}
# one block in front and one computed step first, as all rules here have it
LIKE_OURS: Options = {"Fn_compute_blocks": 1, "max_warmup_steps": 1}

RULES: tuple[Rule, ...] = (
    Rule("reuse", "reuse, every n-th", _every(forecast="reuse")),
    Rule("taylor1", "TaylorSeer order 1, every n-th", _every(forecast="taylor")),
    Rule("taylor2", "TaylorSeer order 2, every n-th", _every(forecast="taylor", order=2)),
    Rule("hermite2", "HiCache order 2, every n-th", _every(forecast="hermite", order=2)),
    Rule("adams", "Adams-Bashforth 2, every n-th", _every(forecast="adams_bashforth")),
    Rule("first_block", "first-block threshold, reuse", _strategy("first_block", forecast="reuse"), "tolerance"),
    Rule("first_block_taylor", "first-block threshold, Taylor 1", _strategy("first_block", forecast="taylor"), "tolerance"),
    Rule("teacache", "TeaCache without polynomial, reuse", _strategy("teacache", forecast="reuse"), "tolerance"),
    Rule("teacache_taylor", "TeaCache without polynomial, Taylor 1", _strategy("teacache", forecast="taylor"), "tolerance"),
    Rule("dbcache", "DBCache with TaylorSeer 1", _dbcache(**LIKE_OURS), "residual_diff_threshold", "peer", peer=True),
    Rule(SHIPPED, "DBCache with TaylorSeer 1, as it ships", _dbcache(), group="peer", peer=True),
    Rule("line", "line in sigma, every n-th", _every(**LINE), group="parts"),
    Rule("sigma_reuse", "reuse, sigma-spaced", _in_sigma(forecast="reuse"), group="parts"),
    Rule("sigma_line", "line in sigma, sigma-spaced", _in_sigma(**LINE), group="parts"),
    Rule("sigma_quadratic", "quadratic in sigma, sigma-spaced", _in_sigma(**LINE, order=2), group="parts"),
    Rule("front_line", "line in sigma, front clock", _strategy("front_clock", **LINE), "tolerance", group="parts"),
    Rule(
        "front_line_retro",
        "line in sigma, front clock, corrected",
        _strategy("front_clock", forecast="lagrange", correction=True),
        "tolerance",
        group="parts",
    ),
    Rule("sigma_reuse_retro", "reuse, sigma-spaced, corrected", _in_sigma(forecast="reuse", correction=True), group="parts"),
    Rule("sigma_line_retro", "line in sigma, sigma-spaced, corrected", _in_sigma(**LINE, correction=True), group="parts"),
    Rule("adaptive", "adaptive, target_speedup (the default rule)", _target(), group="ours"),
    Rule("adaptive_plain", "adaptive, correction off", _target(correction=False), group="ours"),
    Rule("fewer", "fewer solver steps (Adams-Bashforth 2)", lambda setting, count: {}, group="no cache", fewer_steps=True),
)

BY_NAME = {rule.name: rule for rule in RULES}


@functools.cache
def digest(name: str) -> str:
    """The first digits of a hash over the code that a rule consists of: results of other code are other results.

    Comments, docstrings and layout do not count, nor does the rest of the product: there only the rules may change a picture.
    """
    rule = BY_NAME[name]
    given = {**rule.options(Setting(), 9), **({rule.threshold: 0.1} if rule.threshold else {})}
    if rule.fewer_steps or rule.peer:
        modules = {sampling}
    else:
        options = resolve_options(given)
        candidates = AUTO_CANDIDATES if options.forecast == "auto" else (options.forecast,)
        parts: list[object] = [build_strategy(options), *(FORECASTS[each] for each in candidates)]
        modules = {sys.modules[type(part).__module__] for part in parts}
        modules |= {auto} if options.forecast == "auto" else set()
        modules |= (
            {correction, corrector, solvers, sys.modules[type(FORECASTS["lagrange"]).__module__]}
            if options.may_correct()
            else set()
        )
    found = sorted({module.__name__: _code(module) for start in modules for module in _reached(start, set())}.items())
    return hashlib.sha256(repr((given, found)).encode()).hexdigest()[:12]


def _reached(module: ModuleType, seen: set[str]) -> Iterator[ModuleType]:
    """A module and those of strategies and forecasts whose functions and classes it uses."""
    if module.__name__ in seen:
        return
    seen.add(module.__name__)
    yield module
    used = {getattr(value, "__module__", None) for value in vars(module).values()}
    for name in sorted(str(each) for each in used):
        if name.startswith(("cache_dit.strategies.", "cache_dit.forecasts.")):
            yield from _reached(sys.modules[name], seen)


def _code(module: ModuleType) -> str:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]  # type: ignore[attr-defined]
    return ast.dump(tree)
