"""Whole pipelines of diffusers, from a text prompt to a picture: contexts, runs, hits, pictures, and what they leave behind."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.registry import sessions_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from . import tiny_pipelines as tiny  # noqa: E402

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cached_parts(pipeline: Any) -> list[str]:
    parts = pipeline.components.items()
    return [name for name, part in parts if isinstance(part, nn.Module) and "_compiled_call_impl" in vars(part)]


def without_warnings(family: tiny.Family, pipeline: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        return family.sample(pipeline)


# Every family, with the defaults.


@dataclasses.dataclass
class Observed:
    """What runs of one family gave: pictures, the state of the global generator behind each, and what was counted."""

    family: tiny.Family
    pictures: dict[str, Tensor]
    generators: dict[str, Tensor]
    stats: list[cache_dit.CacheStats]
    contexts: dict[str, list[Any]]
    refused: dict[str, Mapping[str, int]]
    cached: list[str]
    left: list[str]


def observe(family: tiny.Family) -> Observed:
    pipeline = family.build()
    pictures, generators, stats = {}, {}, []

    def run(name: str, of: Any) -> None:
        torch.manual_seed(1)
        pictures[name] = without_warnings(family, of)
        generators[name] = torch.get_rng_state()

    run("plain", pipeline)
    run("by hand", family.cached_by_hand(pipeline))
    cache_dit.enable_cache(pipeline, **EXACT)
    for name in ("first", "second"):
        run(name, pipeline)
        stats.append(cache_dit.get_stats(pipeline))
    cached = cached_parts(pipeline)
    sessions = {name: sessions_of(getattr(pipeline, name))[0] for name in family.steps}
    contexts = {name: list(session.contexts) for name, session in sessions.items()}
    refused = {name: dict(session.counters.refused) for name, session in sessions.items()}
    cache_dit.disable_cache(pipeline)
    run("disabled", pipeline)
    left = cached_parts(pipeline)
    cache_dit.enable_cache(pipeline, schedule="1" * 8, **EXACT)
    run("computed", pipeline)
    stats.append(cache_dit.get_stats(pipeline))
    return Observed(family, pictures, generators, stats, contexts, refused, cached, left)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def observed(request: pytest.FixtureRequest, _one_thread: None) -> Iterator[Observed]:
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        yield observe(tiny.FAMILIES[request.param])
    torch._dynamo.reset()


def test_denoisers_alone_are_cached(observed: Observed) -> None:
    assert observed.cached == list(observed.family.steps)


def test_calls_hits_steps_and_runs(observed: Observed) -> None:
    family = observed.family
    steps, denoisers = sum(family.steps.values()), len(family.steps)
    for run, stats in enumerate(observed.stats[:2], 1):
        assert (stats.runs, stats.steps) == (denoisers * run, steps * run)
        assert (stats.calls, stats.hits) == (steps * len(family.contexts) * run, family.hits() * run)


def test_contexts_as_the_pipeline_names_them_or_by_turns(observed: Observed) -> None:
    for name in observed.family.steps:
        assert observed.contexts[name] == list(observed.family.contexts)
        assert observed.refused[name] == {}


def test_steps_that_compute_give_the_same_picture(observed: Observed) -> None:
    assert torch.equal(observed.pictures["computed"], observed.pictures["plain"])
    assert observed.stats[2].hits == 0


def test_skipped_steps_give_the_picture_of_caching_by_hand(observed: Observed) -> None:
    pictures = observed.pictures
    assert torch.isfinite(pictures["first"]).all()
    torch.testing.assert_close(pictures["first"], pictures["by hand"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pictures["first"], pictures["plain"], rtol=1e-4, atol=1e-4)
    assert torch.equal(pictures["second"], pictures["first"])


def test_disabling_leaves_nothing(observed: Observed) -> None:
    assert torch.equal(observed.pictures["disabled"], observed.pictures["plain"])
    assert observed.left == []


def test_the_global_generator_is_left_alone(observed: Observed) -> None:
    for state in observed.generators.values():
        assert torch.equal(state, observed.generators["plain"])


# A pipeline of Flux or SD3, and what else comes with it.


@pytest.fixture(scope="module")
def _compiled_for_flux() -> Iterator[None]:
    """The tests of Flux share what is compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def flux(_compiled_for_flux: None) -> Any:
    return tiny.FLUX.build()


def variant(kind: str, pipeline: Any, **parts: Any) -> Any:
    """Another pipeline around the same components."""
    shared = {name: part for name, part in pipeline.components.items() if part is not None}
    return getattr(diffusers, kind)(**shared, **parts)


def counts(pipeline: Any) -> tuple[int, int, int, int]:
    """Runs, steps, calls, hits."""
    stats = cache_dit.get_stats(pipeline)
    return stats.runs, stats.steps, stats.calls, stats.hits


PICTURE = torch.linspace(0.0, 1.0, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
# from a picture, half of the schedule
HALF = {**tiny.FLUX.call, "image": PICTURE, "strength": 0.5, "steps": 16}
FROM_A_PICTURE = {"FluxImg2ImgPipeline": HALF, "FluxInpaintPipeline": {**HALF, "mask_image": MASK}}


@pytest.mark.parametrize("kind", FROM_A_PICTURE)
def test_a_run_from_a_picture_skips_among_the_steps_it_makes(flux: Any, kind: str) -> None:
    family = dataclasses.replace(tiny.FLUX, call=FROM_A_PICTURE[kind], contexts=(1, 2))
    pipeline = variant(kind, flux)
    wanted = family.sample(family.cached_by_hand(pipeline))
    cache_dit.enable_cache(pipeline, **EXACT)
    for run in (1, 2):
        torch.testing.assert_close(without_warnings(family, pipeline), wanted, rtol=1e-5, atol=1e-6)
        assert counts(pipeline) == (run, 8 * run, 16 * run, 6 * run)
    (session,) = sessions_of(pipeline.transformer)
    assert (list(session.contexts), session.counters.refused) == ([1, 2], {})


def test_a_run_from_a_picture_has_the_steps_and_the_levels_it_makes(flux: Any) -> None:
    pipeline = variant("FluxImg2ImgPipeline", flux)
    cache_dit.enable_cache(pipeline, start_percent=0.6, **EXACT)
    (session,) = sessions_of(pipeline.transformer)
    seen = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((session.clock.num_steps, session.clock.sigmas))
        return kwargs

    tiny.sample(pipeline, **HALF, callback_on_step_end=look)
    assert set(seen) == {(8, tuple(pipeline.scheduler.sigmas[8:].tolist()))}
    # behind 60 % of eight steps: the sixth and the eighth
    assert cache_dit.get_stats(pipeline).hits == 4


def test_two_pipelines_share_a_cached_transformer(flux: Any) -> None:
    from_picture = variant("FluxImg2ImgPipeline", flux)
    text, picture = tiny.FLUX, dataclasses.replace(tiny.FLUX, call=HALF, contexts=(1, 2))
    wanted = [text.sample(text.cached_by_hand(flux)), picture.sample(picture.cached_by_hand(from_picture))]
    cache_dit.enable_cache(flux, **EXACT)
    for run in (1, 2):
        torch.testing.assert_close(text.sample(flux), wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(picture.sample(from_picture), wanted[1], rtol=1e-5, atol=1e-6)
        assert counts(flux) == counts(from_picture) == (2 * run, 16 * run, 32 * run, 12 * run)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
def test_a_copy_of_a_whole_pipeline_is_uncached_and_can_be_enabled(flux: Any, duplicate: Callable[[Any], Any]) -> None:
    """Also where it is taken in the middle of a generation, as a server's worker may."""
    plain, by_hand = tiny.FLUX.sample(flux), tiny.FLUX.sample(tiny.FLUX.cached_by_hand(flux))
    cache_dit.enable_cache(flux, **EXACT)
    copies = []

    def taken(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            copies.append(duplicate(pipeline))
        return values

    family = dataclasses.replace(tiny.FLUX, call={**tiny.FLUX.call, "callback_on_step_end": taken})
    torch.testing.assert_close(family.sample(flux), by_hand, rtol=1e-5, atol=1e-6)
    (copied,) = copies
    assert cached_parts(copied) == [] and cached_parts(flux) == ["transformer"]
    before = counts(flux)
    assert torch.equal(tiny.FLUX.sample(copied), plain)
    assert counts(flux) == before
    cache_dit.enable_cache(copied, **EXACT)
    for pipeline in (copied, flux):
        torch.testing.assert_close(tiny.FLUX.sample(pipeline), by_hand, rtol=1e-5, atol=1e-6)
    assert counts(copied) == before
    cache_dit.disable_cache(flux)
    torch.testing.assert_close(tiny.FLUX.sample(copied), by_hand, rtol=1e-5, atol=1e-6)
    assert torch.equal(tiny.FLUX.sample(flux), plain)


@pytest.mark.parametrize(("steps", "hits"), [(1, 0), (2, 0), (3, 0), (4, 1)])
def test_models_of_few_steps(flux: Any, steps: int, hits: int) -> None:
    """The fourth step is the first that the defaults skip."""
    family = dataclasses.replace(tiny.FLUX, call={**tiny.FLUX.call, "steps": steps})
    plain, by_hand = family.sample(flux), family.sample(family.cached_by_hand(flux))
    cache_dit.enable_cache(flux, **EXACT)
    told = "and will skip these: 4" if hits else "all within the warm-up of 3"
    with pytest.warns(CacheDitWarning, match=f"the run has {steps} steps, {told}"):
        made = [family.sample(flux)]
    made.append(without_warnings(family, flux))
    for picture in made:
        torch.testing.assert_close(picture, by_hand, rtol=1e-5, atol=1e-6)
        assert torch.equal(picture, plain) is (hits == 0)
    assert counts(flux) == (2, 2 * steps, 4 * steps, 4 * hits)


def test_a_control_network_is_not_cached_and_is_heard(flux: Any) -> None:
    pipeline = variant("FluxControlNetPipeline", flux, controlnet=tiny.flux_controlnet())
    family = dataclasses.replace(tiny.FLUX, call={**tiny.FLUX.call, "control_image": PICTURE}, contexts=(1, 2))
    plain, uncontrolled = family.sample(pipeline), tiny.FLUX.sample(flux)
    assert not torch.allclose(plain, uncontrolled, rtol=1e-3, atol=1e-3)
    cache_dit.enable_cache(pipeline, **EXACT)
    assert cached_parts(pipeline) == ["transformer"]
    calls = []
    pipeline.controlnet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(CacheDitWarning, match=r"from outside .* moved by \d+\.\d %"):
        made = [family.sample(pipeline)]
    made.append(without_warnings(family, pipeline))
    assert torch.equal(*made)
    assert torch.isfinite(made[0]).all()
    assert not torch.allclose(made[0], plain, rtol=1e-4, atol=1e-4)
    assert counts(pipeline) == (2, 16, 32, 12)
    assert len(calls) == 16
    assert list(sessions_of(pipeline.transformer)[0].contexts) == [1, 2]
    cache_dit.disable_cache(pipeline)
    cache_dit.enable_cache(pipeline, schedule="1" * 8, **EXACT)
    torch.testing.assert_close(family.sample(pipeline), plain, rtol=1e-6, atol=1e-6)
    assert cache_dit.get_stats(pipeline).hits == 0
    cache_dit.disable_cache(pipeline)
    cache_dit.enable_cache(pipeline, control_refresh=1e-6, **EXACT)
    torch.testing.assert_close(without_warnings(family, pipeline), plain, rtol=1e-6, atol=1e-6)
    stats = cache_dit.get_stats(pipeline)
    assert (stats.hits, stats.refused) == (0, {"control_moved": 6})


def test_a_sampler_that_evaluates_twice_makes_two_steps(fresh_dynamo: None) -> None:
    pipeline = tiny.SD3.build()
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    wanted = tiny.SD3.sample(tiny.SD3.cached_by_hand(pipeline))
    cache_dit.enable_cache(pipeline, **EXACT)
    for run in (1, 2):
        torch.testing.assert_close(without_warnings(tiny.SD3, pipeline), wanted, rtol=1e-5, atol=1e-6)
        # the last of eight steps is evaluated once
        assert counts(pipeline) == (run, 15 * run, 15 * run, 6 * run)
    (session,) = sessions_of(pipeline.transformer)
    assert (list(session.contexts), session.counters.refused) == ([1], {})


# Hooks of others.


def _aligned(pipeline: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(pipeline.transformer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


def _offloaded(pipeline: Any) -> None:
    pytest.importorskip("accelerate")
    pipeline.enable_model_cpu_offload(device="cpu")


HOOKED = tiny.SD3_OF_TWO_BLOCKS


@pytest.mark.parametrize(
    ("hook", "before", "family"), [(_aligned, True, HOOKED), (_aligned, False, HOOKED), (_offloaded, True, tiny.FLUX)]
)
def test_hooks_that_move_the_whole_model(
    fresh_dynamo: None, hook: Callable[[Any], None], before: bool, family: tiny.Family
) -> None:
    pipeline = family.build()
    plain, wanted = family.sample(pipeline), family.sample(family.cached_by_hand(pipeline))
    if before:
        hook(pipeline)
    cache_dit.enable_cache(pipeline, **EXACT)
    if not before:
        hook(pipeline)
    calls = 8 * len(family.contexts)
    for run in (1, 2):
        torch.testing.assert_close(without_warnings(family, pipeline), wanted, rtol=1e-5, atol=1e-6)
        assert counts(pipeline) == (run, 8 * run, calls * run, family.hits() * run)
    # an offloaded pipeline sets its hooks anew behind each run
    assert cache_dit.get_stats(pipeline).compile_calls == 1
    cache_dit.disable_cache(pipeline)
    assert torch.equal(family.sample(pipeline), plain)
    assert cached_parts(pipeline) == []


def test_blocks_whose_weights_are_loaded_at_every_call(fresh_dynamo: None) -> None:
    """As with sequential offload: between calls a block has placeholders, new ones behind each call."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipeline = HOOKED.build()
    wanted = HOOKED.sample(HOOKED.cached_by_hand(pipeline))
    for block in pipeline.transformer.transformer_blocks:
        loads = hooks.AlignDevicesHook(execution_device="cpu", offload=True, io_same_device=True, place_submodules=True)
        hooks.add_hook_to_module(block, loads)
    cache_dit.enable_cache(pipeline, **EXACT)
    for _ in range(2):
        torch.testing.assert_close(HOOKED.sample(pipeline), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}])
def test_group_offload_is_cached_block_by_block_at_once(fresh_dynamo: None, groups: dict[str, Any]) -> None:
    """Its hooks break every graph, so nothing is traced in vain."""
    pipeline = HOOKED.build()
    wanted = HOOKED.sample(HOOKED.cached_by_hand(pipeline))
    device = torch.device("cpu")
    pipeline.transformer.enable_group_offload(onload_device=device, offload_device=device, **groups)
    cache_dit.enable_cache(pipeline, **EXACT)
    for run in (1, 2):
        torch.testing.assert_close(without_warnings(HOOKED, pipeline), wanted, rtol=1e-4, atol=1e-5)
        assert counts(pipeline) == (run, 8 * run, 8 * run, 3 * run)
    assert cache_dit.get_stats(pipeline).compile_calls == 1
    assert sessions_of(pipeline.transformer)[0].counters.refused == {}


# one layer of the second block alone: each hook is a graph break, which takes long to trace
STORED_AS_BFLOAT16: dict[str, Any] = {
    "storage_dtype": torch.bfloat16,
    "compute_dtype": torch.float32,
    "skip_modules_pattern": ("attn", "embed", "norm", "^proj", r"blocks\.0", r"net\.0"),
}


@pytest.fixture(scope="module")
def _compiled_for_casting() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [True, False])
def test_layerwise_casting(_compiled_for_casting: None, before: bool) -> None:
    pipeline, by_hand = HOOKED.build(), HOOKED.cached_by_hand(HOOKED.build())
    by_hand.transformer.enable_layerwise_casting(**STORED_AS_BFLOAT16)
    wanted = HOOKED.sample(by_hand)
    if before:
        pipeline.transformer.enable_layerwise_casting(**STORED_AS_BFLOAT16)
    cache_dit.enable_cache(pipeline, **EXACT)
    if not before:
        pipeline.transformer.enable_layerwise_casting(**STORED_AS_BFLOAT16)
    for run in (1, 2):
        torch.testing.assert_close(HOOKED.sample(pipeline), wanted, rtol=1e-5, atol=1e-6)
        runs, _, calls, hits = counts(pipeline)
        assert (runs, calls, hits) == (run, 8 * run, 3 * run)
    assert pipeline.transformer.transformer_blocks[1].ff.net[2].weight.dtype is torch.bfloat16
    cache_dit.disable_cache(pipeline)
    assert cached_parts(pipeline) == []
    cast = HOOKED.build()
    cast.transformer.enable_layerwise_casting(**STORED_AS_BFLOAT16)
    assert torch.equal(HOOKED.sample(pipeline), HOOKED.sample(cast))


# Adapters.

def with_ip_adapter(pipeline: Any) -> Any:
    """The tiny Flux with an IP-Adapter of random weights, in its double blocks."""
    transformer = pipeline.transformer
    width, text, count = transformer.inner_dim, transformer.config.joint_attention_dim, transformer.config.num_layers
    draw = torch.Generator().manual_seed(3)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw)

    layers = {f"{i}.to_{kind}_ip.weight": random(width, text) for i in range(count) for kind in "kv"}
    layers |= {f"{i}.to_{kind}_ip.bias": random(width) for i in range(count) for kind in "kv"}
    projection = {"proj.weight": random(4 * text, 6), "proj.bias": random(4 * text)}
    projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    transformer._load_ip_adapter_weights({"ip_adapter": layers, "image_proj": projection}, low_cpu_mem_usage=False)
    return pipeline


def test_an_ip_adapter(fresh_dynamo: None) -> None:
    """Its image enters the blocks beside the hidden states; pictures are those of caching by hand, of each image its own."""
    family = tiny.FLUX
    pipeline = with_ip_adapter(family.build())
    by_hand = [family.cached_by_hand(pipeline) for _ in range(2)]
    cache_dit.enable_cache(pipeline, **EXACT)
    images = [torch.full((1, 1, 6), value) for value in (0.5, -2.0)]
    pictures = []
    for image, plain in zip(images, by_hand, strict=True):
        call = {**family.call, "ip_adapter_image_embeds": [image], "negative_ip_adapter_image_embeds": [image * 0.0]}
        made = tiny.sample(pipeline, **call)
        torch.testing.assert_close(made, tiny.sample(plain, **call), rtol=1e-5, atol=1e-5)
        pictures.append(made)
    assert cache_dit.get_stats(pipeline).hits == 2 * family.hits()
    assert not torch.allclose(*pictures, atol=1e-3)


def test_an_adapter_between_runs(fresh_dynamo: None) -> None:
    """Loaded, scaled, taken away: the picture is that of an uncached pipeline in the same state."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def load(transformer: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            transformer.add_adapter(config, adapter_name="style")

    def scale(transformer: Any) -> None:
        transformer.set_adapters("style", weights=0.3)

    def unload(transformer: Any) -> None:
        transformer.delete_adapters("style")

    pipeline, plain = HOOKED.build(), HOOKED.build()
    cache_dit.enable_cache(pipeline, **EXACT)
    pictures = [HOOKED.sample(pipeline)]
    for change in (load, scale, unload):
        change(pipeline.transformer)
        change(plain.transformer)
        made = HOOKED.sample(pipeline)
        pictures.append(made)
        assert cache_dit.get_stats(pipeline).hits == 3 * len(pictures)
        with cache_dit.cached(plain, schedule="11101010", **EXACT):
            torch.testing.assert_close(made, HOOKED.sample(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pictures[1], pictures[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(pictures[2], pictures[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(pictures[3], pictures[0])


# Attention.


@pytest.mark.parametrize("backend", ["_native_math", pytest.param("flex", marks=pytest.mark.slow)])
def test_an_attention_backend_chosen_between_runs(fresh_dynamo: None, request: pytest.FixtureRequest, backend: str) -> None:
    """The model is compiled once for each; the picture is that of skipping by hand with the same one."""
    pipeline = tiny.FLUX.build()
    used: list[str] = []
    cache_dit.enable_cache(pipeline, **EXACT)
    # diffusers makes it the default of models built later, too
    request.addfinalizer(lambda: pipeline.transformer.set_attention_backend("native"))
    for name in ("native", backend):
        pipeline.transformer.set_attention_backend(name)
        by_hand = tiny.FLUX.cached_by_hand(_copied_uncached(pipeline))
        torch.testing.assert_close(without_warnings(tiny.FLUX, pipeline), tiny.FLUX.sample(by_hand), rtol=1e-4, atol=1e-5)
        used.append(str(pipeline.transformer.transformer_blocks[1].attn.processor._attention_backend))
        assert cache_dit.get_stats(pipeline).hits == tiny.FLUX.hits() * len(used)
    assert len(set(used)) == 2
    assert cache_dit.get_stats(pipeline).compile_calls == 2


def _copied_uncached(pipeline: Any) -> Any:
    """A pipeline with a copy of the denoiser: copies are uncached."""
    parts = {**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)}
    return type(pipeline)(**parts)
