"""When nothing may be skipped, and what a call leaves behind that went wrong."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cache_dit
from cache_dit.messages import CacheDitWarning

from .. import models
from ..reference import EagerCache

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
# Every other step from the fourth on.
FIXED_HITS = [False, False, False, True, False, True, False, True]
# Skips whatever it can.
GREEDY: dict[str, Any] = {**EXACT, "schedule": "1" + "0" * 30}


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def inputs_at(step: int, **more: Any) -> tuple[Any, ...]:
    """Other numbers at each step, at falling timesteps."""
    x, t, *rest = models.example(seed=step, **more)
    return (x, t - 0.04 * step, *rest)


def call(model: nn.Module, *inputs: Any) -> tuple[bool, Tensor]:
    """Whether one call without gradients was answered from the cache, and what it gave."""
    before = cache_dit.get_stats(model).hits
    with torch.no_grad():
        output = model(*inputs)
    return cache_dit.get_stats(model).hits > before, output


def plain(model: nn.Module, *inputs: Any) -> Tensor:
    """What the model gives where nothing is cached or compiled."""
    with torch.no_grad():
        output: Tensor = model.forward(*inputs)
    return output


def assert_runs_as(model: nn.Module, reference: nn.Module, eager: EagerCache, hits: Sequence[bool] = FIXED_HITS) -> None:
    """One run of a model, compared with caching written in eager."""
    for step, hit in enumerate(hits):
        eager.skip = hit
        found, output = call(model, *inputs_at(step))
        assert found == hit, step
        with torch.no_grad():
            torch.testing.assert_close(output, reference(*inputs_at(step)), rtol=1e-6, atol=1e-6)


def with_reference(build: Callable[[], nn.Module] = models.TinyDiT) -> tuple[nn.Module, nn.Module, EagerCache]:
    model = models.seeded(build)
    reference = copy.deepcopy(model)
    return model, reference, EagerCache(reference.blocks, ("x",))


# Runs.


def test_nothing_is_reused_across_runs() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **GREEDY)
    for _ in range(3):
        for step in range(4):
            hit, output = call(model, *inputs_at(step))
            assert hit == (step > 0)
            assert torch.equal(output, plain(model, *inputs_at(step))) == (step == 0)
    assert cache_dit.get_stats(model).runs == 3


def test_new_run_makes_the_next_call_compute() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **GREEDY)
    hits = []
    for step in range(6):
        if step == 4:
            cache_dit.new_run(model)
        hits.append(call(model, *inputs_at(step))[0])
    assert hits == [False, True, True, True, False, True]


class Untimed(models.TinyDiT):
    """No argument has a name or a dtype by which a timestep is known."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return super().forward(x, level.to(x.dtype) / 1000)


def test_without_a_timestep_only_a_named_run_is_cached() -> None:
    model = models.seeded(Untimed)
    cache_dit.enable_cache(model, **GREEDY)
    level = torch.full((models.BATCH,), 900)
    with pytest.warns(CacheDitWarning, match="new_run") as said:
        hits = [call(model, inputs_at(step)[0], level - step)[0] for step in range(4)]
    assert hits == [False] * 4
    assert len(said) == 1
    assert cache_dit.get_stats(model).refused["no_timestep"] == 4
    cache_dit.new_run(model)
    assert [call(model, inputs_at(step)[0], level - step)[0] for step in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("order", [("positive", "negative"), ("negative", "positive")])
def test_a_context_that_was_left_out_computes_when_it_returns(order: tuple[str, str]) -> None:
    """Its residual is as old as the pause, whatever its own calls count; behind that it takes the run's decisions again."""
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **{**EXACT, "schedule": "1101010101"})
    found: dict[str, str] = {"positive": "", "negative": ""}
    for step in range(10):
        for name in order:
            if name == "negative" and step in (2, 3):
                found[name] += "."
                continue
            with cache_dit.context(model, name):
                hit, output = call(model, *inputs_at(step))
            found[name] += "10"[hit]
            if not hit:
                torch.testing.assert_close(output, plain(model, *inputs_at(step)))
    assert found == {"positive": "1101010101", "negative": "11..110101"}


# Gradients.


def test_grad_mode_computes_keeps_gradients_and_says_so_once() -> None:
    model, reference, eager = with_reference()
    cache_dit.enable_cache(model, **EXACT)
    with pytest.warns(CacheDitWarning, match=r"no_grad") as said:
        for step in range(8):
            output = model(*inputs_at(step))
            wanted = reference(*inputs_at(step))
            assert torch.equal(output, wanted)
            output.square().sum().backward()
            wanted.square().sum().backward()
    for weight, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-6, atol=1e-7)
    assert len(said) == 1
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.refused["grad_mode"]) == (8, 0, 8)
    assert_runs_as(model, reference, eager)


# Shapes and dtypes.


def test_a_new_shape_in_mid_run_computes_and_the_old_one_is_forgotten() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **GREEDY)
    sizes = [(2, 6), (2, 6), (3, 6), (3, 6), (3, 9), (3, 9), (2, 6), (2, 6), (4, 7), (4, 7)]
    for step, (batch, tokens) in enumerate(sizes):
        inputs = inputs_at(step, batch=batch, tokens=tokens)
        hit, output = call(model, *inputs)
        changed = step == 0 or sizes[step] != sizes[step - 1]
        assert hit == (not changed), step
        if changed:
            torch.testing.assert_close(output, plain(model, *inputs), rtol=1e-6, atol=1e-6)
    assert cache_dit.get_stats(model).refused["shape_changed"] == 4
    # the next run has one shape: what the others took is free again
    call(model, *inputs_at(0))
    assert cache_dit.get_stats(model).cache_bytes == models.BATCH * models.TOKENS * models.WIDTH * 4


def test_another_length_of_the_text_computes_though_the_image_has_its_old_shape() -> None:
    model = models.seeded(lambda: models.JointDiT(2, 2))
    cache_dit.enable_cache(model, **GREEDY)
    lengths = [3, 5, 5, 4, 4, 6, 6]
    hits = []
    for step, length in enumerate(lengths):
        x, t = inputs_at(step)
        context = torch.randn(models.BATCH, length, models.CHANNELS, generator=torch.Generator().manual_seed(step))
        hits.append(call(model, x, t, context)[0])
    assert hits == [False, False, True, False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_in_mid_run_computes(dtype: torch.dtype) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **GREEDY)
    hits = [call(model, *inputs_at(step))[0] for step in range(3)]
    model.to(dtype)
    for step in range(3, 6):
        inputs = tuple(value.to(dtype) for value in inputs_at(step))
        hit, output = call(model, *inputs)
        hits.append(hit)
        assert output.dtype == dtype
        assert hit or torch.equal(output, plain(model, *inputs))
    assert hits == [False, True, True, False, True, True]


# Weights.


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value + 0.05 for name, value in model.state_dict().items()})


def _write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.2.mlp").weight.add_(0.05)


def _replace(model: nn.Module) -> None:
    layer = model.get_submodule("blocks.3.mlp")
    layer.bias = nn.Parameter(layer.bias.detach() + 0.05)


def _replace_block(model: nn.Module) -> None:
    model.blocks[1] = models.seeded(models.Block)


@pytest.mark.parametrize("change", [_load, _write_in_place, _replace, _replace_block])
def test_weights_that_change_in_mid_run_make_the_next_step_compute(change: Callable[[nn.Module], None]) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    hits = []
    for step in range(8):
        if step == 5:
            change(model)
        hit, output = call(model, *inputs_at(step))
        hits.append(hit)
        assert torch.equal(output, plain(model, *inputs_at(step))) == (not hit)
    assert hits == [False, False, False, True, False, False, False, True]
    assert sum(cache_dit.get_stats(model).refused.values()) == 1


def test_no_weight_of_a_large_model_goes_unwatched() -> None:
    model = models.seeded(lambda: models.TinyDiT(20))
    cache_dit.enable_cache(model, **{**EXACT, "schedule": "10"})
    unnoticed = []
    for name, weight in model.named_parameters():
        call(model, *inputs_at(0))
        with torch.no_grad():
            weight.add_(0.01)
        if call(model, *inputs_at(1))[0]:
            unnoticed.append(name)
    assert unnoticed == []


def test_weights_left_alone_are_not_taken_for_changed() -> None:
    model = models.seeded(lambda: models.TinyDiT(20))
    cache_dit.enable_cache(model, **GREEDY)
    with torch.inference_mode():
        for step in range(6):
            model(*inputs_at(step))
    stats = cache_dit.get_stats(model)
    assert stats.hits == 5
    assert "weights_changed" not in stats.refused


# Exceptions.


class Faulty:
    """An inner compiler whose programs can be made to raise once, before they run or when they have."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.late = False

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.error is not None and not self.late:
                self._raise()
            result = gm.forward(*args)
            if self.error is not None:
                self._raise()
            return result

        return run

    def _raise(self) -> None:
        error, self.error = self.error, None
        assert error is not None
        raise error


@pytest.fixture(scope="module")
def inner() -> Faulty:
    return Faulty()


@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 4, 5])
@pytest.mark.parametrize("kind", [ArithmeticError, KeyboardInterrupt])
def test_the_run_behind_an_exception_is_right(
    inner: Faulty, kind: type[BaseException], failing: int, late: bool, restarts: bool
) -> None:
    """``restarts``: the next run begins at the first timestep; else it goes on behind the one that failed."""
    model, reference, eager = with_reference()
    cache_dit.enable_cache(model, **{**EXACT, "inner": inner})
    for step in range(failing):
        call(model, *inputs_at(step))
    inner.error, inner.late = kind("half-way"), late
    with pytest.raises(kind, match="half-way"):
        call(model, *inputs_at(failing))
    assert inner.error is None
    if restarts:
        assert_runs_as(model, reference, eager)
    else:
        for offset, hit in enumerate(FIXED_HITS):
            eager.skip = hit
            found, output = call(model, *inputs_at(failing + 1 + offset))
            assert found == hit
            with torch.no_grad():
                torch.testing.assert_close(output, reference(*inputs_at(failing + 1 + offset)), rtol=1e-6, atol=1e-6)
    assert cache_dit.get_stats(model).calls == failing + 8


class RaisingTail(models.TinyDiT):
    """Python code behind the blocks raises where it is told to, outside of any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.armed: list[str] = []

    @torch.compiler.disable
    def check(self) -> None:
        if self.armed:
            raise ValueError(self.armed.pop())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        self.check()
        return out * 1.0


@pytest.mark.parametrize("bare", [False, True])
def test_an_exception_behind_the_cached_blocks_ends_the_run(bare: bool) -> None:
    model, reference, eager = with_reference(RaisingTail)
    caller: Any = model
    if bare:
        caller = torch.compile(model, backend="cache_dit", options=dict(EXACT))
    else:
        cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad():
        for step in range(5):
            caller(*inputs_at(step))
        model.armed.append("tail")
        with pytest.raises(ValueError, match="tail"):
            caller(*inputs_at(5))
        before = cache_dit.get_stats(model).hits
        for step, hit in enumerate(FIXED_HITS):
            eager.skip = hit
            torch.testing.assert_close(caller(*inputs_at(step)), reference(*inputs_at(step)), rtol=1e-6, atol=1e-6)
    assert cache_dit.get_stats(model).hits - before == 3


# Values that are not finite.


class PoisonedBlock(models.Block):
    def __init__(self, poison: float) -> None:
        super().__init__()
        self.poison = poison

    def forward(self, x: Tensor, temb: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad, self.poison, super().forward(x, temb))


class Poisoned(models.TinyDiT):
    """All blocks but the first give ``poison`` for inputs that begin with a large number."""

    def __init__(self, poison: float) -> None:
        super().__init__(4, lambda: PoisonedBlock(poison))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb, bad = self.embed(x), self.time(t), x[:, :1, :1] > 50.0
        for i, block in enumerate(self.blocks):
            h = block(h, temb, bad & (i > 0))
        return self.head(h)


def poisoned_at(step: int) -> tuple[Any, ...]:
    x, t = inputs_at(step)
    x = x.clone()
    x[:, 0, 0] = 100.0
    return x, t


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_never_stored_and_is_counted(poison: float) -> None:
    """1e30 is finite, its square in float32 is not: it counts as well."""
    model, reference, eager = with_reference(lambda: Poisoned(poison))
    cache_dit.enable_cache(model, **EXACT)
    hits = [False, False, False, True, False, False, False, True]
    with pytest.warns(CacheDitWarning, match="NaN") as said:
        for run in range(2):
            for step, hit in enumerate(hits):
                inputs = poisoned_at(step) if step == 4 else inputs_at(step)
                eager.skip = hit
                found, output = call(model, *inputs)
                with torch.no_grad():
                    torch.testing.assert_close(output, reference(*inputs), rtol=1e-6, atol=1e-6, equal_nan=True)
                assert found == hit
                assert bool(output.isfinite().all()) == (step != 4 or math.isfinite(poison))
            stats = cache_dit.get_stats(model)
            assert stats.nonfinite == stats.refused["nothing_stored"] == run + 1
    assert len(said) == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    "options",
    [{"order": 1}, {"order": 2, "forecast": "taylor"}, {"forecast": "lagrange"}, {"residual_dtype": "int8"}],
)
@pytest.mark.parametrize("bad", [0, 1, 2, 4])
def test_predictions_stay_finite_behind_a_bad_step(poison: float, options: dict[str, Any], bad: int) -> None:
    """Also from the older residuals that are left, and with noise whose size the bad step measured."""
    model = models.seeded(lambda: Poisoned(poison))
    cache_dit.enable_cache(model, inner="eager", noise_scale=0.01, language="en", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        for step in range(10):
            inputs = poisoned_at(step) if step == bad else inputs_at(step)
            _, output = call(model, *inputs)
            if step != bad:
                assert output.isfinite().all(), step
                assert output.abs().max() < 100.0, step
    assert cache_dit.get_stats(model).nonfinite == 1


def test_a_bad_step_counts_at_once_and_at_the_end_of_a_run() -> None:
    model = models.seeded(lambda: Poisoned(math.nan))
    cache_dit.enable_cache(model, **EXACT)
    with pytest.warns(CacheDitWarning, match="NaN"):
        for step in range(3):
            call(model, *(poisoned_at(step) if step == 2 else inputs_at(step)))
        assert cache_dit.get_stats(model).nonfinite == 1
    with torch.no_grad():
        for step in range(3):
            model(*(poisoned_at(step) if step == 2 else inputs_at(step)))
        # the run ends here: no later step looks at what the third one measured
        for step in range(3):
            model(*inputs_at(step))
    assert cache_dit.get_stats(model).nonfinite == 2


def test_one_context_gone_bad_leaves_the_other_cached() -> None:
    model = models.seeded(lambda: Poisoned(math.nan))
    cache_dit.enable_cache(model, **EXACT)
    found: dict[str, list[bool]] = {"positive": [], "negative": []}
    with pytest.warns(CacheDitWarning, match="NaN"):
        for step in range(6):
            for name, hits in found.items():
                bad = step == 4 and name == "positive"
                with cache_dit.context(model, name):
                    hits.append(call(model, *(poisoned_at(step) if bad else inputs_at(step)))[0])
    assert found == {"positive": [False, False, False, True, False, False], "negative": FIXED_HITS[:6]}


# Memory.


def test_buffers_go_with_the_cache_and_models_are_not_kept_alive() -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    for step in range(5):
        call(model, *inputs_at(step))
    assert cache_dit.get_stats(model).cache_bytes > 0
    cache_dit.disable_cache(model)
    assert cache_dit.get_stats(model).cache_bytes == 0
    cache_dit.enable_cache(model, **EXACT)
    call(model, *inputs_at(0))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_without_memory_for_buffers_the_model_computes_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("cache_dit.runtime.session.allocate", refuse)
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, **EXACT)
    with pytest.warns(CacheDitWarning, match="residual_dtype") as said:
        for step in range(6):
            hit, output = call(model, *inputs_at(step))
            assert not hit
            torch.testing.assert_close(output, plain(model, *inputs_at(step)), rtol=1e-6, atol=1e-6)
    assert len(said) == 1
    assert cache_dit.get_stats(model).refused["out_of_memory"] == 6


# Clocks and lines.


def test_without_statistics_no_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock() -> float:
        raise AssertionError("the clock was read")

    model, reference, eager = with_reference()
    cache_dit.enable_cache(model, enable_stats=False, **EXACT)
    monkeypatch.setattr("cache_dit.runtime.timing.perf_counter", no_clock)
    assert_runs_as(model, reference, eager)
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.hits, stats.compute_calls_timed, stats.reuse_calls_timed) == (8, 3, 0, 0)


@pytest.mark.parametrize("enable_stats", [True, False])
def test_debug_prints_one_line_a_call(capfd: pytest.CaptureFixture[str], enable_stats: bool) -> None:
    model = models.seeded(models.TinyDiT)
    cache_dit.enable_cache(model, debug=True, enable_stats=enable_stats, **EXACT)
    for step in range(6):
        call(model, *inputs_at(step))
    lines = [line for line in capfd.readouterr().err.splitlines() if " step " in line]
    assert len(lines) == 6
    assert [("skipped" in line) for line in lines] == FIXED_HITS[:6]
    for n, line in enumerate(lines, 1):
        assert f"run 1 step {n} context 1" in line
        milliseconds = float(line.split(" ms")[0].rsplit(" ", 1)[1])
        assert 0.0 < milliseconds < 600_000.0
    assert "warmup" in lines[2]
    assert "interval" in lines[3]
    # the error of the last forecast that a computed step could check
    assert lines[1].endswith("-")
    assert float(lines[5].rsplit(" ", 1)[1]) > 0.0


def test_errors_that_only_the_statistics_ask_for_are_worked_out_when_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for bound in (1, 3, 256):
        monkeypatch.setattr("cache_dit.runtime.session.MAX_UNREAD", bound)
        model = cache_dit.enable_cache(
            models.seeded(models.TinyDiT), **{**EXACT, "forecast": "lagrange", "schedule": "1110" * 3}
        )
        with torch.no_grad():
            for step in range(12):
                model(*inputs_at(step))
        stats = cache_dit.get_stats(model)
        found.append((stats.forecast_errors, stats.forecast_error, stats.mean_forecast_error))
    # each of the nine computed steps but the first
    assert found[0][0] == 8 and found[1:] == found[:1] * 2
    with torch.no_grad():
        for step in range(12, 16):
            model(*inputs_at(step))
    cache_dit.reset_cache_stats()
    # what the last step measured has not been read from the device
    assert cache_dit.get_stats(model).forecast_errors == 1
