"""Sizes and guards as plain data."""

import json

import pytest
import sympy

from cache_dit.artifact.sizes import UnknownExpression, as_data, evaluate, is_linear, solve, symbols_in

H, W = sympy.symbols("h w", integer=True, positive=True)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (7, 7),
        (H, 6),
        (2 * H * W, 48),
        (H * W + 3, 27),
        (H**2, 36),
        (sympy.Mod(H * 5, W), 2),
        (sympy.Max(H, W), 6),
        (sympy.Rational(1, 2) * H, 3),
        (sympy.Eq(H, W), False),
        (sympy.Ne(H, W), True),
        (sympy.And(H > W, W >= 4), True),
        (sympy.Or(H < W, W <= 3), False),
        (sympy.true, True),
    ],
)
def test_expressions_survive_json(expression: object, value: object) -> None:
    data = json.loads(json.dumps(as_data(expression)))
    assert evaluate(data, {"h": 6, "w": 4}) == value


def test_torch_s_own_divisions_are_known() -> None:
    from torch.utils._sympy.functions import CleanDiv, FloorDiv, PythonMod

    for kind, value in ((FloorDiv, 3), (CleanDiv, 3), (PythonMod, 1)):
        assert evaluate(as_data(kind(H, 2)), {"h": 7 if kind is not CleanDiv else 6}) == value


def test_other_functions_are_refused() -> None:
    with pytest.raises(UnknownExpression, match="sin"):
        as_data(sympy.sin(H))


@pytest.mark.parametrize(("size", "value", "found"), [("h", 5, 5), (["*", 2, "h"], 6, 3), (["*", 2, "h"], 7, None)])
def test_symbols_are_read_from_linear_sizes(size: object, value: int, found: int | None) -> None:
    assert is_linear(size, "h")
    assert solve(size, "h", value) == found


@pytest.mark.parametrize("size", [["*", "h", "w"], ["**", "h", 2], ["//", "h", 2], 4, "w", ["*", 0, "h"]])
def test_other_sizes_tell_no_symbol(size: object) -> None:
    assert not is_linear(size, "h")


def test_symbols_in_a_size() -> None:
    assert symbols_in(["+", ["*", "h", "w"], 3]) == {"h", "w"}
    assert symbols_in(8) == set()
