"""Sizes and guards of a program with dynamic shapes as plain data, so that a loader needs no tracer to check them.

A size is an int, the name of a symbol, or ``[operator, argument, …]``; a guard is such a list that gives a truth value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from operator import add, eq, ge, gt, le, lt, mul, ne
from typing import Any

Size = Any
"""int, str or a list as above: what JSON holds."""

_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": lambda *terms: reduce(add, terms),
    "*": lambda *factors: reduce(mul, factors),
    "**": lambda base, exponent: base ** int(exponent),
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "ratio": Fraction,
    "max": max,
    "min": min,
    "==": eq,
    "!=": ne,
    "<": lt,
    "<=": le,
    ">": gt,
    ">=": ge,
    "and": lambda *terms: all(terms),
    "or": lambda *terms: any(terms),
    "not": lambda term: not term,
}
# The names of sympy's classes and of those that torch derives from them (seen in torch 2.13).
_NAME_OF_CLASS = {
    "Add": "+",
    "Mul": "*",
    "Pow": "**",
    "PowByNatural": "**",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "IntTrueDiv": "ratio",
    "Mod": "%",
    "PythonMod": "%",
    "Max": "max",
    "Min": "min",
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
    "And": "and",
    "Or": "or",
    "Not": "not",
}


class UnknownExpression(ValueError):
    """An expression that this form cannot hold."""


def as_data(expression: Any) -> Size:
    """A sympy expression, an int or a bool as plain data.

    Raises:
        UnknownExpression: it holds something else than integer arithmetic and comparisons of symbols.
    """
    if isinstance(expression, (int, bool)):
        return expression
    name = type(expression).__name__
    if name in ("BooleanTrue", "BooleanFalse"):
        return name == "BooleanTrue"
    if expression.is_Symbol:
        return str(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return ["ratio", int(expression.p), int(expression.q)]
    if name not in _NAME_OF_CLASS:
        raise UnknownExpression(str(expression))
    return [_NAME_OF_CLASS[name], *map(as_data, expression.args)]


def evaluate(size: Size, symbols: Mapping[str, int]) -> Any:
    """The value of a size (int) or of a guard (bool) for these values of the symbols."""
    value = _evaluated(size, symbols)
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else value


def _evaluated(size: Size, symbols: Mapping[str, int]) -> Any:
    if isinstance(size, str):
        return symbols[size]
    if not isinstance(size, list):
        return size
    operator, *arguments = size
    return _OPERATORS[operator](*(_evaluated(argument, symbols) for argument in arguments))


def symbols_in(size: Size) -> set[str]:
    """The names of the symbols in a size."""
    if isinstance(size, str):
        return {size}
    return set().union(*map(symbols_in, size[1:])) if isinstance(size, list) else set()


def solve(size: Size, symbol: str, value: int) -> int | None:
    """The value of ``symbol`` for which a size that is linear in it alone is ``value``; None where there is none."""
    if symbols_in(size) != {symbol}:
        return None
    at_zero, at_one, at_two = (evaluate(size, {symbol: each}) for each in range(3))
    slope = at_one - at_zero
    if slope == 0 or at_two - at_one != slope:
        return None
    found = Fraction(value - at_zero) / slope
    return int(found) if found.denominator == 1 else None


def is_linear(size: Size, symbol: str) -> bool:
    """Whether `solve` can find the symbol from this size."""
    if symbols_in(size) != {symbol}:
        return False
    try:
        values = [evaluate(size, {symbol: each}) for each in range(4)]
    except ZeroDivisionError:
        return False
    steps = {b - a for a, b in pairwise(values)}
    return len(steps) == 1 and 0 not in steps
