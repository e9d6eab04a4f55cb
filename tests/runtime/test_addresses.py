"""Where objects lie, told at once or one by one."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from cache_dit.runtime import addresses as module
from cache_dit.runtime.addresses import addresses

OBJECTS = [object() for _ in range(8)]


@given(st.lists(st.sampled_from(range(8)), max_size=40), st.lists(st.sampled_from(range(8)), max_size=40))
def test_equal_where_the_objects_are_the_same_ones_in_this_order(a: list[int], b: list[int]) -> None:
    one, other = [OBJECTS[i] for i in a], [OBJECTS[i] for i in b]
    assert (addresses(one) == addresses(other)) is (a == b)
    assert addresses(one) == addresses(tuple(one)) == module._one_by_one(one)


def test_this_interpreter_tells_them_at_once() -> None:
    assert module.addresses is module._at_once and module._lies_as_expected()


def test_one_that_lays_tuples_out_otherwise_is_asked_one_by_one() -> None:
    header = module._HEADER
    try:
        module._HEADER = header + 8
        assert not module._lies_as_expected()
    finally:
        module._HEADER = header
