"""By what two generations on one model are told apart where nobody names them."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cache_dit.runtime.signs import MAX_FORMER, Former, Signs, current_caller


def tensors(count: int) -> list[Tensor]:
    return [torch.ones(1) for _ in range(count)]


def noted(*calls: list[Tensor]) -> Signs:
    signs = Signs()
    for step, given in enumerate(calls, 1):
        signs.note(step, current_caller(), given)
    return signs


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_another_thread_is_another_caller() -> None:
    signs, found = Signs(), list[bool]()
    assert not signs.has_other_caller(current_caller())
    signs.note(1, current_caller(), [])
    assert not signs.has_other_caller(current_caller())
    in_thread(lambda: found.append(signs.has_other_caller(current_caller())))
    assert found == [True]
    signs.forget()
    in_thread(lambda: found.append(signs.has_other_caller(current_caller())))
    assert found == [True, False]


def test_a_thread_that_has_gone_is_another_caller_than_the_next_one() -> None:
    signs = Signs()
    in_thread(lambda: signs.note(1, current_caller(), []))
    gc.collect()
    assert signs.has_other_caller(current_caller())


def test_another_task_of_one_thread_is_another_caller() -> None:
    signs, found = Signs(), list[bool]()

    async def ask() -> None:
        found.append(signs.has_other_caller(current_caller()))

    async def generate() -> None:
        signs.note(1, current_caller(), [])
        await asyncio.sleep(0)
        await ask()
        await asyncio.create_task(ask())

    asyncio.run(generate())
    assert found == [False, True]
    assert signs.has_other_caller(current_caller())


def test_an_argument_is_steady_from_the_second_call_on_until_it_is_another_one() -> None:
    a, b, c, d = tensors(4)
    for calls, steady in (([[a, b]], []), ([[a, b], [a, c]], [0]), ([[a, b], [a, c], [a, c]], [0]), ([[a, b], [d, b]], [1])):
        signs = noted(*calls)
        assert [place for place, reference in signs.steady()] == steady
        assert all(reference() is calls[-1][place] for place, reference in signs.steady())
    assert noted([a, b], [a, c], [d, c]).steady() == []
    # a call with fewer arguments than the last ones, and one with more
    for calls in ([[a, b], [a, b], [a]], [[a, b], [a], [a, b]]):
        assert [(place, reference() is a) for place, reference in noted(*calls).steady()] == [(0, True)]


def test_a_steady_argument_that_is_another_one_differs_and_others_do_not() -> None:
    a, b, c, d = tensors(4)
    once, twice = noted([a, b]), noted([a, b], [a, c])
    assert not any(once.differ(once.same(given)) for given in ([a, b], [c, d]))
    assert [twice.differ(twice.same(given)) for given in ([a, b], [a, d], [d, c], [d, d])] == [False, False, True, True]
    # a call with fewer arguments shows nothing of those it has not
    assert not twice.differ(twice.same([])) and twice.same([]) == []


def test_what_was_forgotten_is_no_sign() -> None:
    a, b = tensors(2)
    signs = noted([a], [a])
    signs.forget()
    assert signs.steady() == [] and signs.same([a]) == [] and not signs.differ(signs.same([b]))
    signs.note(1, current_caller(), [b])
    assert signs.steady() == [] and not signs.differ(signs.same([a]))


def test_a_call_with_the_prompt_of_another_context_at_the_same_step_belongs_there() -> None:
    mine, theirs, x, y = tensors(4)
    signs, other = noted([x, mine], [x, mine]), noted([y, theirs], [y, theirs])
    for given, belongs in (([x, theirs], True), ([y, mine], True), ([x, mine], False), ([torch.ones(1), mine], False)):
        assert signs.belong_to([other], given, signs.same(given)) is belongs
    # what all contexts are given says nothing
    shared = noted([x, theirs], [x, theirs])
    assert not signs.belong_to([shared], [x, mine], signs.same([x, mine]))
    # nor does a context that is a step behind, or before
    for elsewhere in (noted([y, theirs]), noted(*[[y, theirs]] * 3)):
        assert not signs.belong_to([elsewhere], [x, theirs], signs.same([x, theirs]))
    assert signs.belong_to([noted([y, theirs]), other], [x, theirs], signs.same([x, theirs]))
    assert not signs.belong_to([], [x, theirs], signs.same([x, theirs]))
    # a context that is given less
    assert not signs.belong_to([noted([y], [y])], [x, theirs], signs.same([x, theirs]))


def test_contexts_at_the_same_step_are_found_however_many_there_are() -> None:
    mine, theirs = tensors(2)
    signs, other = Signs(), Signs()
    for each, prompt in ((signs, mine), (other, theirs)):
        for step in range(999, 1001):
            each.note(step, current_caller(), [prompt])
    assert signs.belong_to([other], [theirs], signs.same([theirs]))


def former_of(*runs: list[list[Tensor]]) -> Former:
    former = Former()
    for calls in runs:
        former.extend(noted(*calls).steady())
    return former


def test_a_call_with_the_prompt_of_a_former_run_is_of_another_one() -> None:
    mine, theirs, x = tensors(3)
    former = former_of([[x, theirs], [torch.ones(1), theirs]])
    signs = noted([x, mine], [x, mine])
    # one of the same numbers is another one
    numbers = torch.ones(1)
    for given, other in (([x, theirs], True), ([x, mine], False), ([theirs, mine], False), ([x, numbers], False), ([x], False)):
        assert former.holds_one_of(given, signs.same(given)) is other
    assert not former_of([[x, mine, theirs], [numbers, theirs, theirs]]).holds_one_of([x], signs.same([x]))
    # this run has had it too
    again = noted([x, theirs], [x, theirs])
    assert not former.holds_one_of([x, theirs], again.same([x, theirs]))
    assert not Former().holds_one_of([x, theirs], signs.same([x, theirs]))


def test_the_prompts_of_the_last_runs_are_remembered() -> None:
    latents, mine, *prompts = tensors(MAX_FORMER + 3)
    former = former_of(*([[latents, prompt], [mine, prompt]] for prompt in prompts))
    same = noted([latents, mine]).same([latents, mine])
    held = [former.holds_one_of([latents, prompt], [True, False]) for prompt in prompts]
    assert held == [False] + [True] * MAX_FORMER and same == [True, True]
    # one that comes again is remembered as the newest
    former.extend(noted([latents, prompts[1]], [mine, prompts[1]]).steady())
    former.extend(noted([latents, prompts[0]], [mine, prompts[0]]).steady())
    assert [former.holds_one_of([latents, prompts[i]], [True, False]) for i in (0, 1, 2)] == [True, True, False]


def test_a_tensor_where_one_of_a_former_run_was_is_none_of_them() -> None:
    """An id is given again once what had it is gone."""
    former, (latents, prompt) = Former(), tensors(2)
    former.extend(noted([latents, prompt], [latents, prompt]).steady())
    kept = former._kept[1, id(prompt)]
    other = torch.ones(1)
    former._kept[1, id(other)] = kept
    assert not former.holds_one_of([latents, other], [True, False])


def test_no_tensor_is_kept_alive() -> None:
    kept = torch.ones(1)
    signs = noted([kept], [kept])
    ((_, reference),) = signs.steady()
    del kept
    gc.collect()
    assert reference() is None
    assert signs.same(tensors(1)) == [False]
