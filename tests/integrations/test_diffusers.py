"""Models and pipelines of diffusers: contexts and runs as they name them, hooks, copies, one compiled block a graph."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from cache_dit.runtime.operands import CacheOperands
from cache_dit.runtime.registry import sessions_of

from .. import models
from ..reference import EagerCache

diffusers = pytest.importorskip("diffusers")

from diffusers.hooks.hooks import HookRegistry, ModelHook  # noqa: E402

EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1 if weight.dim() < 2 else weight.shape[-1] ** -0.5)
    return model.eval()


def flux_transformer() -> nn.Module:
    return _random(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    )


def flux_pipeline(transformer: nn.Module) -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, steps: int = 8, guided: bool = True, **more: Any) -> Tensor:
    """The latents of one run from the same noise; guided runs call the model twice a step."""
    latents: Tensor = pipeline(
        prompt_embeds=torch.ones(1, 3, 8),
        pooled_prompt_embeds=torch.ones(1, 8),
        negative_prompt_embeds=-torch.ones(1, 3, 8),
        negative_pooled_prompt_embeds=-torch.ones(1, 8),
        true_cfg_scale=4.0 if guided else 1.0,
        num_inference_steps=steps,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images
    return latents


def inputs_of(model: Any, time: float = 0.5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(1000 * time))
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.ones(1, 3, 8),
        "pooled_projections": torch.ones(1, 8),
        "timestep": torch.full((1,), time),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }


@pytest.fixture
def pipeline() -> Any:
    return flux_pipeline(flux_transformer())


def with_eager_cache(pipeline: Any, skipped: set[int], contexts: int) -> Any:
    """The pipeline around a copy of its transformer that skips these steps of its first run, written in eager."""
    transformer = copy.deepcopy(pipeline.transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    eager = EagerCache(blocks, ("encoder_hidden_states", "hidden_states"))
    calls = iter(range(1000))

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = next(calls)
        eager.skip, eager.context = call // contexts + 1 in skipped, call % contexts

    transformer.register_forward_pre_hook(tell, with_kwargs=True)
    return flux_pipeline(transformer)


# Pipelines.


@pytest.mark.parametrize("guided", [True, False])
def test_a_pipeline_is_cached_with_its_own_contexts_and_runs(pipeline: Any, guided: bool) -> None:
    contexts = 2 if guided else 1
    reference = with_eager_cache(pipeline, {4, 6, 8}, contexts)
    plain = sample(pipeline, guided=guided)
    assert cache_dit.enable_cache(pipeline, **EXACT) is pipeline
    wanted = sample(reference, guided=guided)
    for run in range(2):
        torch.testing.assert_close(sample(pipeline, guided=guided), wanted, rtol=1e-5, atol=1e-6)
        stats = cache_dit.get_stats(pipeline)
        assert (stats.runs, stats.steps) == (run + 1, 8 * (run + 1))
        assert (stats.calls, stats.hits) == (8 * contexts * (run + 1), 3 * contexts * (run + 1))
    assert not torch.allclose(wanted, plain, rtol=1e-4, atol=1e-4)
    (session,) = sessions_of(pipeline.transformer)
    assert list(session.contexts) == ["cond", "uncond"][:contexts]
    assert session.counters.refused == {}
    assert cache_dit.summary(pipeline) == cache_dit.summary(pipeline.transformer)
    cache_dit.disable_cache(pipeline)
    assert torch.equal(sample(pipeline, guided=guided), plain)


def test_the_number_of_steps_comes_from_the_scheduler(pipeline: Any) -> None:
    cache_dit.enable_cache(pipeline, end_percent=0.8, start_percent=0.4, **EXACT)
    for steps, skipped in ((8, 1), (20, 4), (6, 1)):
        before = cache_dit.get_stats(pipeline).hits
        with warnings.catch_warnings():
            warnings.simplefilter("error", CacheDitWarning)
            sample(pipeline, steps)
        assert (cache_dit.get_stats(pipeline).hits - before) == 2 * skipped


def test_the_levels_of_the_run_come_from_the_scheduler(pipeline: Any) -> None:
    cache_dit.enable_cache(pipeline, strategy="adaptive", target_speedup=2.0, **EXACT)
    (session,) = sessions_of(pipeline.transformer)
    seen = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(session.clock.sigmas)
        return kwargs

    sample(pipeline, 12, callback_on_step_end=look)
    assert set(seen) == {tuple(pipeline.scheduler.sigmas.tolist())}


def test_runs_of_one_step_are_runs(pipeline: Any) -> None:
    """Their timesteps never change: only the scheduler and the pipeline's end tell them apart."""
    cache_dit.enable_cache(pipeline, skip_interval=1, warmup_steps=0, **EXACT)
    plain = sample(with_eager_cache(pipeline, set(), 1), 1, guided=False)
    for _ in range(3):
        assert torch.equal(sample(pipeline, 1, guided=False), plain)
    stats = cache_dit.get_stats(pipeline)
    assert (stats.calls, stats.hits, stats.runs) == (3, 0, 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_run_behind_one_that_was_broken_off_is_right(pipeline: Any, error: type[BaseException]) -> None:
    def stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise error("stop")
        return kwargs

    wanted = sample(with_eager_cache(pipeline, {4, 6, 8}, 2))
    cache_dit.enable_cache(pipeline, **EXACT)
    with pytest.raises(error, match="stop"):
        sample(pipeline, callback_on_step_end=stop)
    torch.testing.assert_close(sample(pipeline), wanted, rtol=1e-5, atol=1e-6)
    assert cache_dit.get_stats(pipeline).runs == 2


def test_a_transformer_enabled_by_itself_hears_its_pipeline(pipeline: Any) -> None:
    wanted = sample(with_eager_cache(pipeline, {4, 6, 8}, 2))
    cache_dit.enable_cache(pipeline.transformer, **EXACT)
    for _ in range(2):
        torch.testing.assert_close(sample(pipeline), wanted, rtol=1e-5, atol=1e-6)
    assert list(sessions_of(pipeline.transformer)[0].contexts) == ["cond", "uncond"]
    assert cache_dit.get_stats(pipeline).hits == 12


def test_another_pipelines_end_waits_for_the_call_under_way(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pipelines may share a transformer: one that is done in its thread empties no store that a call is reading."""
    transformer = pipeline.transformer
    cache_dit.enable_cache(pipeline, **EXACT)
    wanted = sample(pipeline)
    make, others = CacheOperands.make, []

    def end_meanwhile(self: CacheOperands, *args: Any, skip: bool, **kwargs: Any) -> Any:
        if skip and not others:
            others.append(threading.Thread(target=transformer._diffusers_hook.reset_stateful_hooks, daemon=True))
            others[0].start()
            others[0].join(0.2)
            assert others[0].is_alive()
        return make(self, *args, skip=skip, **kwargs)

    monkeypatch.setattr(CacheOperands, "make", end_meanwhile)
    found = sample(pipeline)
    others[0].join(60)
    assert not others[0].is_alive() and torch.isfinite(found).all() and found.shape == wanted.shape
    assert torch.equal(sample(pipeline), wanted)


def test_a_compiled_transformer_in_a_pipeline_is_cached(pipeline: Any) -> None:
    wanted = sample(with_eager_cache(pipeline, {4, 6, 8}, 2))
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    cache_dit.enable_cache(pipeline, **EXACT)
    torch.testing.assert_close(sample(pipeline), wanted, rtol=1e-5, atol=1e-6)
    assert cache_dit.get_stats(pipeline).hits == 6


def wan_pipeline() -> Any:
    def transformer() -> nn.Module:
        return _random(
            lambda: diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=8,
                freq_dim=16,
                ffn_dim=16,
                num_layers=2,
                rope_max_seq_len=32,
            )
        )

    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=0.5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_two_experts_are_two_models_and_their_statistics_one_sum() -> None:
    pipeline = wan_pipeline()
    cache_dit.enable_cache(pipeline, **EXACT)
    for _ in range(2):
        pipeline(
            prompt_embeds=torch.ones(1, 3, 8),
            negative_prompt_embeds=-torch.ones(1, 3, 8),
            guidance_scale=4.0,
            num_inference_steps=12,
            height=32,
            width=32,
            num_frames=5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    first, second = cache_dit.get_stats(pipeline.transformer), cache_dit.get_stats(pipeline.transformer_2)
    # nine steps above the boundary, three below: each expert counts its own
    assert (first.calls, first.hits, first.steps, first.runs) == (36, 12, 18, 2)
    assert (second.calls, second.hits, second.steps, second.runs) == (12, 0, 6, 2)
    both = cache_dit.get_stats(pipeline)
    assert (both.calls, both.hits, both.steps) == (48, 12, 24)
    assert cache_dit.summary(pipeline).splitlines()[1:4] == [
        "Total Forward calls: 48",
        "Cache hits: 12",
        "Cache hit rate: 25.0%",
    ]
    cache_dit.disable_cache(pipeline)
    for module in (pipeline.transformer, pipeline.transformer_2):
        assert "_compiled_call_impl" not in vars(module)
        assert not cache_dit.get_stats(module).enabled


def test_a_pipeline_is_enabled_once(pipeline: Any) -> None:
    cache_dit.enable_cache(pipeline, **EXACT)
    with pytest.warns(CacheDitWarning, match="cached already"):
        assert cache_dit.enable_cache(pipeline, **EXACT) is pipeline
    with pytest.warns(CacheDitWarning, match="cached already"):
        cache_dit.enable_cache(pipeline.transformer, **EXACT)
    cache_dit.disable_cache(pipeline.transformer)
    with pytest.warns(CacheDitWarning, match="disable_cache"):
        cache_dit.disable_cache(pipeline)


class Parts:
    """As much of a pipeline as is asked for."""

    def __init__(self, components: dict[str, Any]) -> None:
        self.components = components


def test_control_networks_and_encoders_are_no_denoisers() -> None:
    transformer = flux_transformer()
    parts = {
        "transformer": transformer,
        "controlnet": flux_transformer(),
        "text_encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False),
        "tokenizer": object(),
        "safety_checker": None,
    }
    pipeline = Parts(parts)
    cache_dit.enable_cache(pipeline, **EXACT)
    cached = [name for name, part in parts.items() if isinstance(part, nn.Module) and "_compiled_call_impl" in vars(part)]
    assert cached == ["transformer"]
    del parts["transformer"]
    with pytest.raises(cache_dit.CacheDitError, match="No transformer component found"):
        cache_dit.enable_cache(pipeline, language="en")


# Hooks.


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return tuple(2.0 * value for value in output)


def registry_state(model: nn.Module) -> Any:
    registry = vars(model).get("_diffusers_hook")
    return registry and (registry, dict(registry.hooks), list(registry._hook_order), list(registry._fn_refs))


def _untouched(model: Any) -> None:
    pass


def _used_by_a_pipeline(model: Any) -> None:
    with torch.no_grad(), model.cache_context("cond"):
        model(**inputs_of(model))


def _hooked(model: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Doubling(), "doubling")


@pytest.mark.parametrize("prepare", [_untouched, _used_by_a_pipeline, _hooked])
def test_disabling_leaves_the_hook_registry_as_it_was(prepare: Callable[[Any], None]) -> None:
    model = flux_transformer()
    prepare(model)
    before, state, forward = dict(vars(model)), registry_state(model), model.forward
    with torch.no_grad():
        wanted = model(**inputs_of(model))[0]
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad(), model.cache_context("cond"):
        torch.testing.assert_close(model(**inputs_of(model))[0], wanted, rtol=1e-6, atol=1e-6)
    assert list(sessions_of(model)[0].contexts) == ["cond"]
    cache_dit.disable_cache(model)
    assert dict(vars(model)) == before
    assert registry_state(model) == state
    assert model.forward == forward
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(model))[0], wanted)


def test_a_hook_that_comes_and_goes_while_caching_is_on() -> None:
    model = flux_transformer()
    with torch.no_grad():
        wanted = model(**inputs_of(model))[0]
    cache_dit.enable_cache(model, **EXACT)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Doubling(), "doubling")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(model))[0], 2.0 * wanted, rtol=1e-6, atol=1e-6)
    cache_dit.disable_cache(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(model))[0], 2.0 * wanted, rtol=1e-6, atol=1e-6)
    registry.remove_hook("doubling")
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(model))[0], wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_enabled_model_are_uncached_and_do_not_speak_for_it(duplicate: Callable[[Any], Any]) -> None:
    model = flux_transformer()
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad():
        model(**inputs_of(model))
        copied = duplicate(model)
        assert copied._compiled_call_impl is None
        calls = cache_dit.get_stats(model).calls
        with copied.cache_context("other"):
            copied(**inputs_of(model))
            model(**inputs_of(model, 0.4))
        assert cache_dit.get_stats(model).calls == calls + 1
    assert list(sessions_of(model)[0].contexts) == [1]
    cache_dit.enable_cache(copied, **EXACT)
    with torch.no_grad(), copied.cache_context("other"):
        copied(**inputs_of(model))
    assert list(sessions_of(copied)[0].contexts) == ["other"]
    assert list(sessions_of(model)[0].contexts) == [1]


def test_a_context_of_ours_goes_before_the_pipelines() -> None:
    model = flux_transformer()
    cache_dit.enable_cache(model, **EXACT)
    with torch.no_grad(), model.cache_context("cond"):
        with cache_dit.context(model, "request 1"):
            model(**inputs_of(model))
        model(**inputs_of(model))
    assert list(sessions_of(model)[0].contexts) == ["request 1", "cond"]


# One block a graph.


def test_compiling_repeated_blocks_runs_uncached_and_names_the_remedy_once() -> None:
    model = flux_transformer()
    with torch.no_grad():
        wanted = [model(**inputs_of(model, 0.9 - 0.1 * step))[0] for step in range(6)]
    model.compile_repeated_blocks(backend="cache_dit", options=EXACT)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        # as Python shows them: the same words from the same place once
        warnings.simplefilter("default")
        for step in range(6):
            output = model(**inputs_of(model, 0.9 - 0.1 * step))[0]
            torch.testing.assert_close(output, wanted[step], rtol=1e-5, atol=1e-6)
    told = [str(each.message) for each in said if issubclass(each.category, CacheDitWarning)]
    assert len(told) == 1
    assert "compile the whole model" in told[0]
    assert "enable_cache" in cache_dit.summary(model)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_timestep_of_a_flow_model_on_a_device_is_the_schedulers_level(name: str) -> None:
    """To read it would wait for the device; here that has no data at all."""
    from cache_dit.integrations.diffusers import PipelineRuns

    class Pipeline:
        scheduler = getattr(diffusers, name)(
            **({} if name.startswith("Flow") else {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
        )

    pipeline, model = Pipeline(), models.TinyDiT()
    cache_dit.enable_cache(model, **EXACT)
    call, session = vars(model)["_compiled_call_impl"], sessions_of(model)[0]
    session.runs, session.runs_whole_schedule = PipelineRuns(pipeline), True
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    levels = []
    for timestep in scheduler.timesteps:
        call._arguments = ((torch.ones(1), timestep.to("meta").reshape(1)), {})
        levels.append(call._time())
        scheduler.step(torch.zeros(1, 4), timestep, torch.ones(1, 4))
    assert levels == pytest.approx(scheduler.sigmas[:4].tolist())
    # behind the run nothing of the pipeline is under way
    assert session.runs.time() is None


@pytest.mark.parametrize("given", [{}, {"prediction_type": "v_prediction"}])
def test_timesteps_that_are_no_levels_are_read(given: dict[str, Any]) -> None:
    from cache_dit.integrations.diffusers import PipelineRuns

    class Pipeline:
        scheduler = diffusers.EulerDiscreteScheduler(**given)

    pipeline = Pipeline()
    pipeline.scheduler.set_timesteps(4)
    assert PipelineRuns(pipeline).time() is None
