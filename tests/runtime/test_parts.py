"""The small parts of the runtime, each by itself: buffers, marks of weights and control inputs, bounds of a correction."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from cache_dit.passes.insert_cache_branch import CacheInputs, ResidualBuffer
from cache_dit.passes.residual_math import statistics_length

from cache_dit.forecasts import Point
from cache_dit.messages import CacheDitWarning, SaidOnce
from cache_dit.options import resolve_options
from cache_dit.runtime.buffers import ControlMark, WeightMark, allocate
from cache_dit.runtime.clock import StepClock
from cache_dit.runtime.correction import Past, _bounded, _relative_error, _settled, bytes_to_keep
from cache_dit.runtime.corrector import Corrector, _replaced
from cache_dit.runtime.operands import CacheOperands
from cache_dit.runtime.signs import Signs
from cache_dit.runtime.solvers import SolverStep, TimeCheck, solver_steps

CPU = torch.device("cpu")


def buffer(dtype: torch.dtype = torch.float32) -> ResidualBuffer:
    return ResidualBuffer((2, 3), dtype, CPU)


@pytest.mark.parametrize("front", [None, buffer(torch.float16)])
def test_buffers_have_a_place_for_each_live_out_step_and_statistic(front: ResidualBuffer | None) -> None:
    inputs = CacheInputs((buffer(), buffer(torch.float64), buffer()), 2, front, torch.float64, CPU)
    sizes = ((2, 3), (2, 3), (4, 3), *(((5, 7),) if front is not None else ()))
    store = allocate(inputs, sizes, (), ())
    assert [[(tuple(r.shape), r.dtype) for r in history] for history in store.residuals] == [
        [((2, 3), torch.float32)] * 2,
        [((2, 3), torch.float64)] * 2,
        [((4, 3), torch.float32)] * 2,
    ]
    assert store.measured.shape == (3 * statistics_length(2),) and store.measured.dtype == torch.float64
    assert store.bytes == 2 * (6 * 4 + 6 * 8 + 12 * 4) + (35 * 2 if front is not None else 0)
    assert len(store.operands()) == 6 + (front is not None)
    if front is not None:
        assert store.front is not None and store.operands()[0] is store.front
        assert (tuple(store.front.shape), store.front.dtype) == ((5, 7), torch.float16)


def test_a_computed_step_takes_the_place_of_the_oldest_and_leaves_what_it_measured_unread() -> None:
    store = allocate(CacheInputs((buffer(), buffer()), 3, None, torch.float32, CPU), ((2, 3), (2, 3)), (), ())
    first, empty = [list(history) for history in store.residuals], store.measured
    seen = []
    for step in (1, 4, 6, 13):
        values = torch.full((1,), float(step))
        store.computed(Point(step, 0.5), values)
        assert store.pending is not None and store.pending.values is store.measured is values
        seen.append(([point.step for point in store.points], store.gap, [point.step for point in store.pending.before]))
    assert seen == [([1], None, []), ([4, 1], 3, [1]), ([6, 4, 1], 2, [4, 1]), ([13, 6, 4], 7, [6, 4, 1])]
    # four times round three places
    for history, (a, b, c) in zip(store.residuals, first, strict=True):
        assert [id(tensor) for tensor in history] == [id(c), id(a), id(b)]
    store.drop_newest(empty)
    assert [point.step for point in store.points] == [6, 4] and store.gap is None and store.measured is empty
    store.forget()
    assert store.points == () and store.pending is None


class Signal(BaseException):
    pass


@pytest.mark.parametrize("what", ["computed", "drop_newest"])
def test_an_interrupt_at_any_instruction_loses_no_buffer(what: str) -> None:
    """What an interrupt leaves is emptied, but the programs take all of its buffers."""
    store = allocate(CacheInputs((buffer(), buffer()), 3, None, torch.float32, CPU), ((2, 3), (2, 3)), (), ())
    buffers = [{id(tensor) for tensor in history} for history in store.residuals]
    left = interrupted = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_name != what:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Signal
        return trace

    for at in range(1, 500):
        left = at
        sys.settrace(trace)
        try:
            if what == "computed":
                store.computed(Point(at, 0.5), torch.zeros(1))
            else:
                store.drop_newest(torch.zeros(1))
            break
        except Signal:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert [{id(tensor) for tensor in history} for history in store.residuals] == buffers
        assert [len(history) for history in store.residuals] == [3, 3]
    assert 20 < interrupted < 499


def test_weights_match_where_they_are_the_same_tensors_unwritten() -> None:
    weights = [torch.ones(2), torch.ones(2)]
    mark = WeightMark(weights)
    assert mark.matches(weights)
    assert not mark.matches(weights[:1]) and not mark.matches([*weights, torch.ones(2)]) and not mark.matches(weights[::-1])
    # whichever was made later
    assert not any(WeightMark([weights[i]]).matches([weights[1 - i]]) for i in range(2))
    weights[1].add_(1)
    assert not mark.matches(weights)
    # nothing counts the writes to inference tensors; that they are the same is known
    with torch.inference_mode():
        unseen = [torch.ones(2)]
        mark = WeightMark(unseen)
        unseen[0].add_(1)
        assert mark.matches(unseen)


def test_control_inputs_move_by_their_mean_change_relative_to_their_size() -> None:
    first, second = torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0])
    mark = ControlMark([first, second])
    assert mark.same_as([first, second]) and not mark.same_as([first, second.clone()])
    assert mark.moved([first, second]) == 0.0
    # the largest of a quarter and three times
    assert mark.moved([torch.tensor([2.5, -2.5]), second]) == 0.25
    assert mark.moved([torch.tensor([2.5, -2.5]), torch.tensor([4.0, -2.0])]) == 3.0
    # from nothing to nothing is no move, from nothing to something is one without end
    nothing = ControlMark([torch.zeros(2)])
    assert nothing.moved([torch.zeros(2)]) == 0.0 and nothing.moved([torch.ones(2)]) == math.inf
    assert math.isnan(mark.moved([first, torch.full((2,), math.nan)]))
    first.add_(1)
    assert not mark.same_as([first, second]) and mark.moved([first, second]) == math.inf


def test_the_inputs_of_a_skipped_step_are_copied_and_counted_without_weights() -> None:
    weight, steady, moving = torch.ones(7), torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float16)
    assert bytes_to_keep([weight, steady, 3, moving], [weight]) == 3 * 8 + 5 * 2
    past = Past()
    kept = past.keep([weight, steady, 3], [weight])
    assert kept[0] is weight and kept[1] is not steady and torch.equal(kept[1], steady) and kept[2] == 3
    again = past.keep([weight, steady, 3], [weight])
    assert again[1] is kept[1]
    steady.add_(1)
    written = past.keep([weight, steady, 3], [weight])
    assert written[1] is not kept[1] and torch.equal(written[1], steady) and torch.equal(kept[1], torch.ones_like(steady))


def test_a_forecasts_error_is_the_largest_over_the_live_outs_and_nothing_where_one_is_not_finite() -> None:
    rows = torch.tensor([0.0, 4.0, 1.0, 0.0, 1.0, 4.0])
    assert float(_relative_error(rows, 1, (1.0,))) == 2.0
    rows[0] = 1.0
    assert float(_relative_error(rows, 1, (1.0,))) == 0.0
    assert float(_relative_error(torch.tensor([0.0, 4.0, math.inf]), 1, (1.0,))) == 0.0


def test_a_change_is_bounded_by_the_error_and_nothing_where_it_is_not_finite() -> None:
    output, change = torch.full((4,), 2.0), torch.full((4,), 3.0)
    torch.testing.assert_close(_bounded(change, output, torch.tensor(1.0)), change)
    # no more than twice the error, of the output's size
    torch.testing.assert_close(_bounded(change, output, torch.tensor(0.25)), torch.full((4,), 1.0))
    assert torch.equal(_bounded(change, output, torch.tensor(0.0)), torch.zeros(4))
    assert torch.equal(_bounded(torch.zeros(4), output, torch.tensor(0.0)), torch.zeros(4))
    for value in (math.inf, math.nan):
        change[1] = value
        assert torch.equal(_bounded(change, output, torch.tensor(1.0)), torch.zeros(4))


@pytest.mark.parametrize("q", [2.0, -2.0, 0.0])
def test_a_step_whose_output_does_not_reach_the_state_settles_nothing(q: float) -> None:
    """Else the output takes what the state deviates by, whichever sign the step gives it."""
    step, output, state = SolverStep(a=1.0, b=4.0, c=0.0, p=1.0, q=q), torch.full((2,), 3.0), torch.full((2,), 8.0)
    found, deviation = _settled(output, step, state, None)
    if q == 0.0:
        assert found is output and deviation is None
        return
    # b · deviation = −a · state, where deviation = p · state + q · change of the output
    assert deviation is not None and torch.equal(deviation, torch.full((2,), -2.0))
    torch.testing.assert_close(found, output - (deviation - step.p * state) / q)
    assert _settled(output, step, None, None) == (output, None)


def test_only_flow_models_have_timesteps_that_go_with_their_levels() -> None:
    for prediction in ("epsilon", "v"):
        check = TimeCheck([0.9, 0.5, 0.1], prediction)
        assert all(check.agrees(step, 7.0) for step in (1, 2, 3))


def test_levels_below_nothing_are_no_run_of_a_solver() -> None:
    assert solver_steps("euler", "epsilon", [1.0, 0.5, -0.1], 2) is None
    assert solver_steps("euler", "epsilon", [1.0, 0.5, 0.0], 2) is not None


def test_signs_tell_a_prompt_that_stays_from_one_that_is_another() -> None:
    prompt, other = torch.ones(2), torch.ones(2)
    signs, here = Signs(), threading.current_thread()
    assert not signs.has_other_caller(here) and signs.steady() == []
    signs.note(1, here, [torch.ones(1), prompt])
    assert not signs.differ(signs.same([torch.ones(1), other]))
    signs.note(2, here, [torch.ones(1), prompt])
    assert signs.differ(signs.same([torch.ones(1), other])) and not signs.differ(signs.same([torch.ones(1), prompt]))
    assert [(place, reference() is prompt) for place, reference in signs.steady()] == [(1, True)]
    # what differed once is not steady any more
    signs.note(3, here, [torch.ones(1), other])
    assert signs.steady() == [] and not signs.differ(signs.same([torch.ones(1), prompt]))


def test_a_correction_replaces_one_result_and_leaves_the_others() -> None:
    changed = torch.ones(1)
    for place in range(4):
        found = _replaced(("a", "b", "c", "d"), place, changed)
        assert found == tuple(changed if i == place else name for i, name in enumerate("abcd"))


def test_operands_are_made_once_for_a_value_and_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_dit.runtime.operands.MAX_KEPT", 6)
    inputs, measured = CacheInputs((buffer(),), 3, None, torch.float32, CPU), torch.zeros(8)
    operands = CacheOperands(0.25)

    def made(key: int) -> tuple[torch.Tensor, ...]:
        return operands.make(inputs, skip=True, weights=(2.0, -1.0), key=key, measured=measured)

    pred, control, key, last = made(7)
    assert (pred.item(), control.tolist(), key.item()) == (False, [2.0, -1.0, 0.0, 0.25], 7) and last is measured
    assert [found is before for found, before in zip(made(7), (pred, control, key, last), strict=True)] == [True] * 4
    # three are kept, and three more may be: then all of them go
    assert all(made(other)[0] is pred for other in (8, 9, 10))
    assert made(11)[0] is pred and made(12)[0] is not pred
    monkeypatch.setattr("cache_dit.runtime.operands.MAX_KEPT", 300)
    assert max(len(operands._kept) for key in range(400) if made(key)) == 300


@pytest.mark.parametrize(("history", "weights"), [(1, ()), (1, (1.0,)), (2, (1.0,)), (3, (2.0, -1.0)), (4, (3.0, -3.0, 1.0))])
def test_weights_fill_the_place_of_every_residual(history: int, weights: tuple[float, ...]) -> None:
    inputs = CacheInputs((buffer(),), history, None, torch.float64, CPU)
    pred, control, _, _ = CacheOperands(0.25).make(inputs, skip=not weights, weights=weights, key=0, measured=torch.zeros(1))
    assert bool(pred) is bool(weights)
    assert control.dtype == torch.float64 and control.tolist() == [*weights, *[0.0] * (history - len(weights)), 0.25]


def corrector(monkeypatch: pytest.MonkeyPatch, **options: object) -> Corrector:
    """Of a run by Euler's method in four steps, with room for a hundred bytes."""
    monkeypatch.setattr("cache_dit.runtime.corrector.FREE_BYTES", 100)
    found = Corrector(resolve_options({"language": "en", **options}), SaidOnce("en"), CacheOperands(0.0))
    clock = StepClock()
    clock.new_run(sigmas=[1.0, 0.8, 0.5, 0.1, 0.0], solver="euler", prediction="flow")
    found.begin_run(clock, sees_whole_calls=True)
    return found


@pytest.mark.parametrize("size", [30, 31])
def test_inputs_are_kept_for_a_correction_where_they_take_little(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A hundred bytes, and twice the ten that the residuals take."""
    correcting = corrector(monkeypatch, correction=True)
    store: Any = SimpleNamespace(bytes=10, past=Past())
    graph: Any = SimpleNamespace(watched=lambda args: (), repeats=True)
    inputs, output = [torch.ones(size)], torch.ones(3)

    if size == 30:
        kept = correcting.keep(store, graph, inputs)
        assert kept is not None
        found = correcting.skipped(store, kept, Point(2, 0.8), 0, [output, 3])
        assert found[1] == 3 and torch.equal(found[0], output)
        assert correcting.applies(4) and not correcting.applies(5) and len(store.past.skipped) == 1
        return
    with pytest.warns(CacheDitWarning):
        assert correcting.keep(store, graph, inputs) is None
    assert not correcting.applies(1) and store.past.skipped == []


def test_what_cannot_be_run_once_more_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correcting = corrector(monkeypatch, correction=True)
    graph: Any = SimpleNamespace(watched=lambda args: (), repeats=False)
    with pytest.warns(CacheDitWarning, match="random numbers"):
        assert correcting.keep(SimpleNamespace(bytes=10, past=Past()), graph, []) is None  # type: ignore[arg-type]
    assert not correcting.applies(1)


@pytest.mark.parametrize("made", ("expanded", "sliced", "transposed", "part of a transposed", "empty", "whole"))
def test_copies_of_inputs_lie_in_memory_as_the_inputs_do(made: str) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        "expanded": torch.tensor(3.0).expand(5),
        "sliced": base[:, 1:, :3],
        "transposed": base.transpose(0, 2),
        "part of a transposed": base.transpose(0, 2)[1:],
        "empty": base[:0],
        "whole": base,
    }[made]
    (copy,) = Past().keep([value], ())
    assert copy.stride() == value.stride() and torch.equal(copy, value)
    wanted = value.clone()
    base.zero_()
    assert torch.equal(copy, wanted)


@pytest.mark.parametrize("result", ("same", "in a tuple", "in a mapping", "in a dataclass", "made of it", "nothing"))
def test_only_what_the_call_gives_is_corrected(monkeypatch: pytest.MonkeyPatch, result: str) -> None:
    @dataclass
    class Output:
        sample: torch.Tensor

    correcting, output = corrector(monkeypatch, strategy="adaptive"), torch.ones(3)
    correcting.unseen = output
    given = {
        "same": output, "in a tuple": (1, [output]), "in a mapping": {"sample": output}, "in a dataclass": Output(output),
        "made of it": output + 0.0, "nothing": None,
    }  # fmt: skip
    correcting.see(given[result])
    assert correcting.applies(1) == (result not in ("made of it", "nothing")) and correcting.unseen is None


@pytest.mark.parametrize("asked", (True, "auto"))
def test_a_run_whose_timesteps_are_not_those_announced_is_not_corrected(
    monkeypatch: pytest.MonkeyPatch, asked: bool | str
) -> None:
    """And that is said in any case: what was announced is not true."""
    correcting = corrector(monkeypatch, correction=asked, strategy="adaptive")
    store: Any = SimpleNamespace(bytes=10, past=Past())
    for step, time in ((1, 1.0), (2, 0.8)):
        correcting.skipped(store, (torch.ones(1),), Point(step, time), 0, [torch.ones(3)])
    assert correcting.applies(3)
    with pytest.warns(CacheDitWarning):
        correcting.skipped(store, (torch.ones(1),), Point(3, 0.1), 0, [torch.ones(3)])
    assert not correcting.applies(3)


def test_what_is_corrected_by_default_alone_says_nothing_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    correcting = corrector(monkeypatch, strategy="adaptive")
    assert correcting.applies(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        correcting.end("correction_outputs")
    assert not correcting.applies(1)
