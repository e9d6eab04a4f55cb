"""Numbers: computed steps are the plain model's, skipped ones those of caching written in eager; and who is skipped when."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cache_dit

from . import models
from .reference import EagerCache, rms

# Every other step from the fourth on.
FIXED_HITS = [False, False, False, True, False, True, False, True]
EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "correction": False, "noise_scale": 0.0, "language": "en"}


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


class Case(NamedTuple):
    """A model class of diffusers: how to build it, its inputs at (timestep, batch, size), its blocks and their streams."""

    build: Callable[[], nn.Module]
    inputs: Callable[[float, int, int], dict[str, Any]]
    lists: tuple[str, ...]
    streams: tuple[str, ...]


def _image(generator: torch.Generator, batch: int, size: int) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=generator)


def _seeded(time: float) -> torch.Generator:
    return torch.Generator().manual_seed(int(time))


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, patch_size=2
    )


def _dit_inputs(time: float, batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": _image(_seeded(time), batch, size),
        "timestep": torch.full((batch,), int(time)),
        "class_labels": torch.arange(batch),
    }


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


def _flux_inputs(time: float, batch: int, size: int) -> dict[str, Any]:
    generator, tokens = _seeded(time), size * size // 4
    return {
        "hidden_states": torch.randn(batch, tokens, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 3, 8, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), time / 1000),
        "img_ids": torch.rand(tokens, 3, generator=generator),
        "txt_ids": torch.zeros(3, 3),
    }


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )


def _sd3_inputs(time: float, batch: int, size: int) -> dict[str, Any]:
    generator = _seeded(time)
    return {
        "hidden_states": _image(generator, batch, size),
        "encoder_hidden_states": torch.randn(batch, 3, 8, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), time),
    }


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=8,
    )


def _pixart_inputs(time: float, batch: int, size: int) -> dict[str, Any]:
    generator = _seeded(time)
    return {
        "hidden_states": _image(generator, batch, size),
        "encoder_hidden_states": torch.randn(batch, 3, 8, generator=generator),
        "timestep": torch.full((batch,), int(time)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


DIFFUSERS = {
    "dit": Case(_dit, _dit_inputs, ("transformer_blocks",), ("hidden_states",)),
    "flux": Case(
        _flux,
        _flux_inputs,
        ("transformer_blocks", "single_transformer_blocks"),
        ("encoder_hidden_states", "hidden_states"),
    ),
    "sd3": Case(_sd3, _sd3_inputs, ("transformer_blocks",), ("encoder_hidden_states", "hidden_states")),
    "pixart": Case(_pixart, _pixart_inputs, ("transformer_blocks",), ("hidden_states",)),
}


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model none of whose weights is the zero that some of them begin as."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1 if weight.dim() < 2 else weight.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with floating-point tensors in ``dtype``, timesteps aside."""

    def cast(name: str, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.is_floating_point() and name != "timestep"
        return value.to(dtype) if fits else value

    return {name: cast(name, value) for name, value in inputs.items()}


def hits_of(model: object, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether a call was answered from the cache, and what it gave."""
    before = cache_dit.get_stats(model).hits
    result = call()
    return cache_dit.get_stats(model).hits > before, result


# Every pair of the first three properties is there.
COMBINATIONS = [
    ("dit", torch.float32, torch.no_grad, "specialize", False),
    ("dit", torch.bfloat16, torch.inference_mode, "cond", False),
    ("flux", torch.float32, torch.inference_mode, "specialize", False),
    ("flux", torch.bfloat16, torch.no_grad, "cond", False),
    ("sd3", torch.float32, torch.no_grad, "cond", False),
    ("sd3", torch.bfloat16, torch.inference_mode, "specialize", False),
    ("pixart", torch.float32, torch.inference_mode, "cond", False),
    ("pixart", torch.bfloat16, torch.no_grad, "specialize", False),
    ("dit", torch.bfloat16, torch.no_grad, "pieces", False),
    ("flux", torch.float32, torch.inference_mode, "pieces", False),
    # tracing these for dynamic shapes takes torch half a minute each
    pytest.param("dit", torch.bfloat16, torch.inference_mode, "cond", True, marks=pytest.mark.slow),
    pytest.param("flux", torch.float32, torch.inference_mode, "specialize", True, marks=pytest.mark.slow),
    pytest.param("flux", torch.float32, torch.no_grad, "pieces", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dtype", "mode", "lowering", "moving"), COMBINATIONS)
def test_diffusers_models_agree_with_caching_written_in_eager(
    name: str, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]], lowering: str, moving: bool
) -> None:
    """``moving``: each run has another batch and another resolution, as a model compiled for dynamic shapes meets them."""
    case = DIFFUSERS[name]
    model = random_weights(case.build, dtype)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    eager = EagerCache([block for path in case.lists for block in getattr(reference, path)], case.streams)
    cache_dit.enable_cache(model, lowering=lowering, strict=True, **EXACT)
    sizes = [(2, 8), (3, 12), (4, 16)] if moving else [(2, 8)] * 2
    found = []
    for batch, size in sizes:
        for step, time in enumerate(range(900, 100, -100)):
            inputs = in_dtype(case.inputs(time, batch, size), dtype)
            eager.skip = FIXED_HITS[step]
            with mode():
                hit, (output,) = hits_of(model, lambda inputs=inputs: model(**inputs, return_dict=False))
                expected = (reference if eager.skip else plain)(**inputs, return_dict=False)[0]
                reference(**inputs)
            found.append(hit)
            assert output.dtype == dtype
            if eager.skip:
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(output, expected)
    assert found == FIXED_HITS * len(sizes)
    assert cache_dit.get_stats(model).refused.keys() <= {"first_call"}


# Who is skipped when.


def due(steps: int, interval: Callable[[int], int], warmup: int, longest: int) -> list[bool]:
    """The document's rule: step n is skipped when n > warmup and n % interval == 0; never the first one of a run."""
    hits: list[bool] = []
    for n in range(1, steps + 1):
        in_a_row = len(hits) > longest - 1 and all(hits[-longest:])
        hits.append(n > max(warmup, 1) and n % interval(n) == 0 and not in_a_row)
    return hits


def run_of(model: nn.Module, steps: int, **more: Any) -> list[bool]:
    """One sampling of a model of `models`; which of its calls were hits."""
    found = []
    with torch.no_grad():
        for step in range(steps):
            x, t, *rest = models.example(seed=step, **more)
            inputs = (x, t - step / steps, *rest)
            found.append(hits_of(model, lambda inputs=inputs: model(*inputs))[0])
    return found


INTERVALS: list[tuple[dict[str, Any], Callable[[int], int], int, int]] = [
    ({}, lambda n: 2, 3, 4),
    ({"skip_interval": 3, "warmup_steps": 0}, lambda n: 3, 0, 4),
    ({"skip_interval": 5, "warmup_steps": 7}, lambda n: 5, 7, 4),
    ({"skip_interval": 1, "warmup_steps": 0}, lambda n: 1, 0, 4),
    ({"skip_interval": 1, "warmup_steps": 2, "max_consecutive_hits": 1}, lambda n: 1, 2, 1),
    ({"skip_interval": 1, "warmup_steps": 2, "max_consecutive_hits": 7}, lambda n: 1, 2, 7),
    ({"skip_interval": 50}, lambda n: 50, 3, 4),
    ({"strategy": "dynamic"}, lambda n: max(1, 2 - (n - 3) // 10), 3, 4),
    ({"strategy": "dynamic", "skip_interval": 3, "warmup_steps": 2}, lambda n: max(1, 3 - (n - 2) // 10), 2, 4),
    (
        {"strategy": "dynamic", "skip_interval": 4, "warmup_steps": 0, "max_consecutive_hits": 2},
        lambda n: max(1, 4 - n // 10),
        0,
        2,
    ),
]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A model to turn caching on and off for: its programs are compiled once for all tests that use the same options."""
    return models.seeded(models.TinyDiT)


@pytest.mark.parametrize(("options", "interval", "warmup", "longest"), INTERVALS)
def test_steps_are_skipped_exactly_where_the_strategy_says(
    tiny: nn.Module, options: dict[str, Any], interval: Callable[[int], int], warmup: int, longest: int
) -> None:
    with cache_dit.cached(tiny, **EXACT, **options):
        for steps in (45, 7, 45):
            assert run_of(tiny, steps) == due(steps, interval, warmup, longest)


SCHEDULES: list[tuple[Any, dict[str, Any], list[int]]] = [
    ("110100111", {}, [3, 5, 6]),
    ([True, True, False, False, True], {"warmup_steps": 9}, [3, 4]),
    (np.array([1, 0, 0, 0, 0, 0, 0, 1]), {"max_consecutive_hits": 2, "strategy": "adaptive"}, [2, 3, 4, 5, 6, 7]),
    ("0010", {}, [2, 4]),
    ("1111", {}, []),
]


@pytest.mark.parametrize(("schedule", "options", "skipped"), SCHEDULES)
def test_a_schedule_overrides_the_strategy_and_computes_past_its_end(
    tiny: nn.Module, schedule: Any, options: dict[str, Any], skipped: list[int]
) -> None:
    with cache_dit.cached(tiny, **EXACT, schedule=schedule, **options):
        for _ in range(2):
            assert [n for n, hit in enumerate(run_of(tiny, 12), 1) if hit] == skipped


def test_a_schedule_that_skips_the_first_step_is_counted(tiny: nn.Module) -> None:
    with cache_dit.cached(tiny, **EXACT, schedule="0010"):
        run_of(tiny, 6)
        run_of(tiny, 6)
        assert cache_dit.get_stats(tiny).refused == {"first_call": 2}


def test_part_of_a_run_whose_length_is_known(tiny: nn.Module) -> None:
    with cache_dit.cached(tiny, **EXACT, start_percent=0.5, end_percent=0.8):
        cache_dit.new_run(tiny, num_steps=20)
        assert [n for n, hit in enumerate(run_of(tiny, 20), 1) if hit] == [12, 14, 16]
        with pytest.warns(UserWarning, match="start_percent"):
            assert run_of(tiny, 8) == FIXED_HITS


# Numbers on plain models.


def compare(
    model: nn.Module, eager: EagerCache, reference: nn.Module, inputs: Sequence[tuple[Any, ...]], hits: Sequence[bool]
) -> None:
    """Call both models on the inputs of a run, and compare the results and who was skipped."""
    with torch.no_grad():
        for call, hit in zip(inputs, hits, strict=True):
            eager.skip = hit
            found, output = hits_of(model, lambda call=call: model(*call))
            assert found == hit
            torch.testing.assert_close(output, reference(*call), rtol=1e-6, atol=1e-6)


def inputs_of_run(steps: int = 8, **more: Any) -> list[tuple[Any, ...]]:
    """Other numbers at each step, at falling timesteps."""
    found = []
    for step in range(steps):
        x, t, *rest = models.example(seed=step, **more)
        found.append((x, t - 0.08 * step, *rest))
    return found


@pytest.mark.parametrize(("front", "back"), [(0, 0), (2, 0), (1, 1), (0, 3)])
def test_front_and_back_blocks_always_compute(front: int, back: int) -> None:
    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    eager = EagerCache(reference.blocks, ("x",), front, back)
    cache_dit.enable_cache(model, front_blocks=front, back_blocks=back, **EXACT)
    compare(model, eager, reference, inputs_of_run(), FIXED_HITS)


@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_two_streams_each_have_their_residual(lowering: str) -> None:
    model = models.seeded(lambda: models.JointDiT(4, 0))
    reference = copy.deepcopy(model)
    eager = EagerCache(reference.double_blocks, ("x", "context"))
    cache_dit.enable_cache(model, lowering=lowering, **EXACT)
    compare(model, eager, reference, inputs_of_run(context=True), FIXED_HITS)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "callable"])
@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_inner_compilers_agree(inner: Any, lowering: str) -> None:
    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    eager = EagerCache(reference.blocks, ("x",))
    if inner == "callable":

        def inner(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            return gm.forward

    cache_dit.enable_cache(model, lowering=lowering, **{**EXACT, "inner": inner})
    compare(model, eager, reference, inputs_of_run(), FIXED_HITS)


@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
@pytest.mark.parametrize(
    ("dtype", "row", "tolerance"),
    [
        ("bfloat16", 2 * models.WIDTH, 2e-2),
        ("int8", models.WIDTH + 4, 2e-2),
        ("float8_e4m3fn", models.WIDTH + 4, 1e-1),
        ("float8_e5m2", models.WIDTH + 4, 2e-1),
    ],
)
def test_residuals_kept_smaller_are_rounded_and_take_less(
    lowering: str, dtype: str, row: int, tolerance: float
) -> None:
    """``row``: bytes of a token, its scale among them."""
    model = models.seeded(models.TinyDiT)
    exact = copy.deepcopy(model)
    cache_dit.enable_cache(model, residual_dtype=dtype, lowering=lowering, **EXACT)
    cache_dit.enable_cache(exact, residual_device="cpu", **EXACT)
    with torch.no_grad():
        for hit, call in zip(FIXED_HITS, inputs_of_run(), strict=True):
            output, wanted = model(*call), exact(*call)
            assert torch.equal(output, wanted) == (not hit)
            torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    stats, wanted = cache_dit.get_stats(model), cache_dit.get_stats(exact)
    assert stats.cache_bytes * 4 * models.WIDTH == wanted.cache_bytes * row > 0
    assert (stats.hits, stats.calls, stats.nonfinite) == (wanted.hits, wanted.calls, 0)


class Falling(nn.Module):
    """A block whose residual is linear in the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(models.WIDTH))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + self.offset * temb[:, None, :1]


class FallingDiT(models.TinyDiT):
    def __init__(self) -> None:
        super().__init__(4, Falling)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, t[:, None])
        return self.head(h)


@pytest.mark.parametrize("forecast", ["lagrange", "taylor", "auto"])
def test_a_forecast_of_order_1_follows_a_straight_line(forecast: str) -> None:
    model = models.seeded(FallingDiT)
    plain, late = copy.deepcopy(model), copy.deepcopy(model)
    cache_dit.enable_cache(model, **{**EXACT, "forecast": forecast})
    cache_dit.enable_cache(late, **EXACT)
    with torch.no_grad():
        for hit, call in zip(FIXED_HITS, inputs_of_run(), strict=True):
            found, output = hits_of(model, lambda call=call: model(*call))
            reused, wanted = late(*call), plain(*call)
            assert found == hit
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
            assert torch.allclose(reused, wanted, rtol=1e-4, atol=1e-5) == (not hit)
    # what a straight line missed of residuals that lie on one, and what repeating the last one misses
    assert (cache_dit.get_stats(model).forecast_error or 0.0) < 1e-4
    assert (cache_dit.get_stats(late).forecast_error or 0.0) > 1e-2


def test_adaptive_skips_what_hardly_changes_and_computes_what_does() -> None:
    model = models.seeded(models.TinyDiT)
    with torch.no_grad(), cache_dit.cached(model, **EXACT, strategy="adaptive", tolerance=0.1):
        x, t = models.example()
        for step in range(12):
            model(x * (1 + 0.01 * step), t - 0.01 * step)
        calm = cache_dit.get_stats(model).hits
        for step in range(12):
            model(*models.example(seed=step)[:1], t - 0.05 * step)
    assert calm >= 6
    assert cache_dit.get_stats(model).hits == calm


# Noise.


class Bare(models.TinyDiT):
    """The output is the last block's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()


NOISE = 0.01


def noise_added(model: nn.Module, lowering: str = "specialize") -> tuple[list[Tensor], list[float]]:
    """What the noise adds at the skipped steps of one run with a large input, and its size as the document has it."""
    reference = copy.deepcopy(model)
    eager = EagerCache(reference.blocks, ("x",))
    found, sizes = [], []
    options = {**EXACT, "noise_scale": NOISE, "lowering": lowering}
    with torch.no_grad(), cache_dit.cached(model, **options, schedule="11010011"):
        for n, call in enumerate(inputs_of_run(batch=4, tokens=400), 1):
            eager.skip = n in (3, 5, 6)
            difference = model(*call) - reference(*call)
            if not eager.skip:
                assert not difference.any()
                continue
            (residual,) = eager.residuals[0]
            found.append(difference)
            sizes.append(NOISE * rms(residual))
    return found, sizes


@pytest.mark.parametrize("lowering", ["specialize", "pieces", "cond"])
def test_noise_has_the_size_that_was_asked_for(lowering: str) -> None:
    found, sizes = noise_added(models.seeded(Bare), lowering)
    assert len(found) == 3
    for noise, size in zip(found, sizes, strict=True):
        assert rms(noise) == pytest.approx(size, rel=0.03)
        assert abs(float(noise.mean())) < 0.05 * size
        # normal: 68.3 % lie within one deviation, 4.6 % beyond two
        assert float((noise.abs() < size).float().mean()) == pytest.approx(0.683, abs=0.02)
        assert float((noise.abs() > 2 * size).float().mean()) == pytest.approx(0.0455, abs=0.01)


def test_noise_repeats_with_the_run_and_changes_with_the_step() -> None:
    first, _ = noise_added(models.seeded(Bare))
    again, _ = noise_added(models.seeded(Bare))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for i, a in enumerate(first):
        for b in first[:i]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(float(correlation)) < 0.05


def test_noise_follows_the_users_seed() -> None:
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(noise_added(models.seeded(Bare))[0][0])
    assert torch.equal(found[0], found[2])
    correlation = torch.corrcoef(torch.stack([found[0].flatten(), found[1].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_noise_repeats_in_the_next_run_of_one_model_and_differs_between_contexts() -> None:
    model = models.seeded(Bare)
    outputs: list[list[Tensor]] = []
    with torch.no_grad(), cache_dit.cached(model, **{**EXACT, "noise_scale": NOISE}, schedule="110"):
        for _ in range(2):
            outputs.append([model(x, t) for x, t in inputs_of_run(3) for _ in ("positive", "negative")])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    positive, negative = outputs[0][4:]
    assert not torch.equal(positive, negative)
    torch.testing.assert_close(positive, negative, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("forecast", ["reuse", "auto"])
def test_random_state_of_the_user_is_left_alone(forecast: str) -> None:
    model = models.seeded(models.TinyDiT)
    plain = copy.deepcopy(model)

    def draws(call: Callable[..., Tensor]) -> list[Any]:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        found: list[Any] = []
        with torch.no_grad():
            for step in range(8):
                x = torch.randn(2, models.TOKENS, models.CHANNELS)
                call(x, torch.full((2,), 0.9 - 0.1 * step))
                found += [torch.rand(()).item(), np.random.rand(), random.random()]
        return found

    # compiling included: the first call of the cached model is among those
    cache_dit.enable_cache(model, inner="eager", noise_scale=0.01, forecast=forecast)
    assert draws(model) == draws(plain) == draws(model)
    assert cache_dit.get_stats(model).hits == 6


# Contexts.


def guided_run(model: nn.Module, eager: EagerCache, reference: nn.Module, contexts: int, named: bool) -> list[list[bool]]:
    found: list[list[bool]] = [[] for _ in range(contexts)]
    with torch.no_grad():
        for step in range(8):
            for context in range(contexts):
                x, t = models.example(seed=10 * step + context)
                inputs = (x, t - 0.08 * step)
                eager.skip, eager.context = FIXED_HITS[step], context
                if named:
                    with cache_dit.context(model, f"part {context}"):
                        hit, output = hits_of(model, lambda inputs=inputs: model(*inputs))
                else:
                    hit, output = hits_of(model, lambda inputs=inputs: model(*inputs))
                found[context].append(hit)
                torch.testing.assert_close(output, reference(*inputs), rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("contexts", [2, 3])
def test_separate_guidance_calls_each_have_their_own_residual(contexts: int, named: bool) -> None:
    model = models.seeded(models.TinyDiT)
    reference = copy.deepcopy(model)
    eager = EagerCache(reference.blocks, ("x",))
    cache_dit.enable_cache(model, **EXACT)
    for _ in range(3):
        assert guided_run(model, eager, reference, contexts, named) == [FIXED_HITS] * contexts
    stats = cache_dit.get_stats(model)
    assert (stats.calls, stats.steps, stats.runs) == (3 * 8 * contexts, 24, 3)
    assert stats.hits == 9 * contexts
    assert "pattern_broken" not in stats.refused


def test_named_contexts_may_come_in_any_order() -> None:
    """Two generations whose calls come in no pattern: names are what tells them apart."""
    model = models.seeded(models.TinyDiT)
    references = {name: copy.deepcopy(model) for name in ("first", "second")}
    eager = {name: EagerCache(reference.blocks, ("x",)) for name, reference in references.items()}
    cache_dit.enable_cache(model, **EXACT)
    order = ["first"] * 3 + ["second", "first"] * 4 + ["second"] * 4 + ["first"]
    step = dict.fromkeys(references, 0)
    with torch.no_grad():
        for name in order:
            x, t = models.example(seed=step[name])
            x = x if name == "first" else -x
            eager[name].skip = FIXED_HITS[step[name]]
            inputs = (x, t - 0.08 * step[name])
            with cache_dit.context(model, name):
                hit, output = hits_of(model, lambda inputs=inputs: model(*inputs))
            assert hit == eager[name].skip
            torch.testing.assert_close(output, references[name](*inputs), rtol=1e-6, atol=1e-6)
            step[name] += 1
    assert step == {"first": 8, "second": 8}


# With the compiler that users have.


@pytest.mark.slow
def test_inductor_computes_what_plain_compiling_does(fresh_dynamo: None) -> None:
    model = models.seeded(lambda: models.TinyDiT(3))
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    eager = EagerCache(reference.blocks, ("x",))
    cache_dit.enable_cache(model, lowering="specialize", **{**EXACT, "inner": "inductor"})
    plain.compile()
    with torch.no_grad():
        for hit, call in zip(FIXED_HITS, inputs_of_run(), strict=True):
            eager.skip = hit
            found, output = hits_of(model, lambda call=call: model(*call))
            wanted = reference(*call)
            assert found == hit
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
            if not hit:
                torch.testing.assert_close(output, plain(*call), rtol=1e-6, atol=1e-6)
