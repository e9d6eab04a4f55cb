"""What the integration knows of a sampling and of a model's code, without ComfyUI: tests/comfy runs the real thing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_dit.integrations import comfyui_sampling
from cache_dit.integrations.comfyui import PatcherCache
from cache_dit.integrations.comfyui_models import Mentions, wraps_itself
from cache_dit.integrations.comfyui_sampling import Pace, SamplerClock, Sampling
from cache_dit.integrations.comfyui_solver import solver_of
from cache_dit.integrations.timeline import Timeline
from cache_dit.messages import CacheDitWarning
from cache_dit.options import resolve_options
from cache_dit.runtime.clock import Tick
from cache_dit.runtime.observers import CallRecord
from cache_dit.runtime.session import Session


@pytest.fixture(autouse=True)
def no_paces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui_sampling, "_paces", {})


class Sampler:
    """As ComfyUI's KSAMPLER: a function, and options for it."""

    def __init__(self, name: str, **extra: Any) -> None:
        self.sampler_function = types.SimpleNamespace(__module__="samplers", __qualname__=name)
        self.extra_options = extra


def sampled(name: str, evaluations_a_step: int, steps: int, *, device: str = "cpu", between: bool = False) -> Sampling:
    """A whole run of a sampler that evaluates at listed levels, or with ``between`` at others too."""
    levels = torch.linspace(1.0, 0.0, steps + 1)
    run = Sampling(Sampler(name), levels)
    callback = run.counting(None)
    for i in range(steps):
        run.evaluate(levels[i].reshape(1).to(device))
        callback(i, None, None, steps)
        for _ in range(evaluations_a_step - 1 if i + 1 < steps else 0):
            level = (levels[i] + levels[i + 1]) / 2 if between else levels[i + 1]
            run.evaluate(level.reshape(1).to(device))
    run.learn()
    return run


@pytest.mark.parametrize(("each", "expected"), ((1, 20), (2, 39)))
def test_the_length_of_a_run_is_known_from_the_sampler(each: int, expected: int) -> None:
    sampled("some", each, 8)
    run = Sampling(Sampler("some"), torch.linspace(1, 0, 21))
    assert run.expected_evaluations() == expected
    assert (run.listed_sigmas() is not None) == (each == 1)


def test_an_unknown_sampler_with_two_evaluations_is_noticed_in_its_first_run() -> None:
    run = Sampling(Sampler("some"), torch.linspace(1, 0, 11))
    callback = run.counting(None)
    assert run.expected_evaluations() == 10
    run.evaluate(torch.ones(1))
    callback(0, None, None, 10)
    for _ in range(2):
        run.evaluate(torch.ones(1))
    assert run.expected_evaluations() == 19


def test_options_of_a_sampler_make_another_one() -> None:
    sampled("some", 2, 8)
    assert Sampling(Sampler("some", s_churn=1.0), torch.linspace(1, 0, 9)).expected_evaluations() == 8


def test_levels_are_not_read_from_a_device_once_the_sampler_is_known() -> None:
    sampled("some", 1, 8)
    # a tensor without data: reading it raises
    run = sampled("some", 1, 8, device="meta")
    assert run.sigma == pytest.approx(0.125)


def test_levels_between_the_listed_ones_are_read() -> None:
    sampled("some", 2, 8, between=True)
    with pytest.raises(RuntimeError):
        sampled("some", 2, 8, device="meta", between=True)


def test_a_run_that_was_broken_off_teaches_nothing() -> None:
    run = Sampling(Sampler("some"), torch.linspace(1, 0, 9))
    run.evaluate(torch.ones(1))
    run.learn()
    assert comfyui_sampling._paces == {}
    assert Pace(8, 15, True).evaluations_of(4) == 7


def test_conditions_are_told_apart_by_their_ids_and_windows() -> None:
    run = Sampling(Sampler("some"), torch.linspace(1, 0, 9))

    def name(kinds: list[int], ids: list[str], **more: Any) -> str:
        return run.context({"cond_or_uncond": kinds, "uuids": ids, **more})

    run.evaluate(torch.ones(1))
    first = [name([1, 0], ["a", "b"]), name([0], ["c"]), name([0], ["c"])]
    windows = [types.SimpleNamespace(index_list=[0, 1]), types.SimpleNamespace(index_list=[1, 2])]
    first += [name([0], ["c"], context_window=window) for window in windows]
    assert len(set(first)) == 5
    run.evaluate(torch.ones(1))
    # in another order, and the same conditions twice in the order of the step before
    second = [name([0], ["c"], context_window=windows[1]), name([0], ["c"]), name([0], ["c"]), name([1, 0], ["a", "b"])]
    assert second == [first[4], first[1], first[2], first[0]]
    again = Sampling(Sampler("some"), torch.linspace(1, 0, 9))
    again.evaluate(torch.ones(1))
    # the noise depends on the name: another run with new ids has the same names
    assert again.context({"cond_or_uncond": [1, 0], "uuids": ["x", "y"]}) == first[0]


def test_weights_ask_for_no_gradients_while_a_run_lasts() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    run = Sampling(Sampler("some"), torch.linspace(1, 0, 9))
    run.freeze(module)
    assert not module.weight.requires_grad
    run.thaw()
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_the_clock_counts_what_the_sampler_says() -> None:
    clock = SamplerClock()
    clock.begin()
    clock.evaluation = 1
    assert clock.tick(1.0, "a") == Tick(1, "a", 1, True, False)
    clock.evaluation = 3
    assert clock.tick(0.5, "a") == Tick(1, "a", 3, False, False)
    # a condition that comes late is at the step of all the others
    assert clock.tick(0.5, "b") == Tick(1, "b", 3, True, False)
    clock.begin()
    clock.evaluation = 1
    assert clock.tick(1.0, "a") == Tick(2, "a", 1, True, False)


def test_a_model_that_goes_through_the_wrappers_is_known_by_its_code() -> None:
    class Direct(torch.nn.Module):
        def forward(self, x: Any, wrappers: Any) -> Any:
            return wrappers.DIFFUSION_MODEL(x)

    class Named(Direct):
        def forward(self, x: Any, wrappers: Any) -> Any:
            return self.run(x, wrappers)

        def run(self, x: Any, wrappers: Any) -> Any:
            return (lambda: wrappers.DIFFUSION_MODEL)()(x)

    class Without(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    assert [wraps_itself(kind) for kind in (Direct, Named, Without)] == [True, True, False]


def test_a_model_gets_the_options_that_its_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_model.py").write_text(
        "import torch\n\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x, transformer_options):\n"
        "        return x * transformer_options['sigmas'] if 'own_entry' in transformer_options else x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import some_model  # type: ignore[import-not-found]

    reads = Mentions(some_model.Model())
    options = {
        "wrappers": {"a": 1}, "uuids": [1], "sigmas": 1.0, "sample_sigmas": 2.0, "cond_or_uncond": [0], "own_entry": 3,
        "of_another_pack": 4,
    }  # fmt: skip
    assert reads.trimmed(options) == {"sigmas": 1.0, "own_entry": 3}
    # a function of another pack inside the model may read anything
    patched = reads.trimmed({**options, "patches_replace": {"dit": {}}})
    assert set(patched) == {"sigmas", "sample_sigmas", "cond_or_uncond", "own_entry", "of_another_pack", "patches_replace"}
    del sys.modules["some_model"]


def test_a_timeline_puts_times_and_errors_to_their_steps() -> None:
    timeline = Timeline()
    timeline.begin(3)

    def called(step: int, skipped: bool, timed: bool = True) -> None:
        timeline.called(CallRecord(None, skipped, "interval", False, timed), step)

    called(1, False, timed=False)
    called(2, False)
    called(2, False)
    called(3, True)
    # on a device the times come later, in the order of the calls
    for seconds in (1.0, 2.0, 0.5):
        timeline.timed(seconds)
    timeline.measured(2, 0.1)
    timeline.measured(2, 0.3)
    assert [(step.seconds, step.error, step.skipped) for step in timeline.steps] == [
        (None, None, False),
        (3.0, 0.3, False),
        (0.5, None, True),
    ]
    assert (timeline.steps_done(), timeline.steps_skipped()) == (3, 1)


def flow_denoised(sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """As `comfy.model_sampling.CONST` and `EPS` have it."""
    return given - output * sigma.reshape(-1, *[1] * (output.ndim - 1))


def v_denoised(sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return given / (sigma**2 + 1.0) - output * sigma / (sigma**2 + 1.0) ** 0.5


def edm_denoised(sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return given / (sigma**2 + 1.0) + output * sigma / (sigma**2 + 1.0) ** 0.5


def guider(denoised: Any = flow_denoised, module: str = "comfy.samplers", **options: Any) -> Any:
    """As ComfyUI's `CFGGuider`."""

    def predict_noise(self: Any) -> None: ...

    predict_noise.__module__ = module
    sampling = types.SimpleNamespace(calculate_denoised=denoised)
    patcher = types.SimpleNamespace(get_model_object={"model_sampling": sampling}.__getitem__)
    kind = type("Guider", (), {"predict_noise": predict_noise, "model_patcher": patcher, "model_options": options})
    return kind()


def ksampler(name: str, module: str = "comfy.k_diffusion.sampling", **extra: Any) -> Any:
    function = types.SimpleNamespace(__module__=module, __name__=name)
    return types.SimpleNamespace(sampler_function=function, extra_options=extra)


LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.mark.parametrize(("name", "solver"), (("sample_euler", "euler"), ("sample_dpmpp_2m", "dpmpp_2m")))
@pytest.mark.parametrize(("denoised", "prediction"), ((flow_denoised, "epsilon"), (v_denoised, "v")))
def test_a_solver_is_known_by_its_function_and_what_it_makes_of_the_output(
    name: str, solver: str, denoised: Any, prediction: str
) -> None:
    own = {"transformer_options": {"wrappers": {"predict_noise": {"ours": [len]}, "sampler_sample": {"theirs": []}}}}
    assert solver_of(guider(denoised, **own), ksampler(name), LEVELS, "ours") == (solver, prediction)


def failing(*given: Any) -> Any:
    raise RuntimeError("asks for more")


@pytest.mark.parametrize(
    ("guide", "sampler", "levels"),
    (
        (guider(), ksampler("sample_heun"), LEVELS),
        (guider(), ksampler("sample_euler", module="other.pack"), LEVELS),
        (guider(), ksampler("sample_euler", s_churn=1.0), LEVELS),
        (guider(), types.SimpleNamespace(), LEVELS),
        (guider(), ksampler("sample_euler"), None),
        # ends above 0: the last step would be of second order
        (guider(), ksampler("sample_dpmpp_2m"), LEVELS[:-1]),
        (guider(edm_denoised), ksampler("sample_euler"), LEVELS),
        (guider(failing), ksampler("sample_euler"), LEVELS),
        (guider(module="other.pack"), ksampler("sample_euler"), LEVELS),
        (guider(sampler_cfg_function=len), ksampler("sample_euler"), LEVELS),
        (guider(sampler_post_cfg_function=[len]), ksampler("sample_euler"), LEVELS),
        (guider(sampler_pre_cfg_function=[len]), ksampler("sample_euler"), LEVELS),
        (guider(sampler_calc_cond_batch_function=len), ksampler("sample_euler"), LEVELS),
        (guider(denoise_mask_function=len), ksampler("sample_euler"), LEVELS),
        (guider(model_function_wrapper=len), ksampler("sample_euler"), LEVELS),
        *(
            (guider(transformer_options={"wrappers": {kind: {"theirs": [len]}}}), ksampler("sample_euler"), LEVELS)
            for kind in ("sampler_sample", "predict_noise", "calc_cond_batch")
        ),
    ),
)
def test_no_solver_where_anything_else_may_stand_between(guide: Any, sampler: Any, levels: tuple[float, ...] | None) -> None:
    assert solver_of(guide, sampler, levels, "ours") == (None, None)


def test_conditions_that_come_or_go_are_noticed() -> None:
    def run(*evaluations: tuple[str, ...]) -> bool:
        sampling = Sampling(Sampler("some"), torch.linspace(1, 0, 9))
        for asked in evaluations:
            sampling.evaluate(torch.ones(1))
            for each in asked:
                sampling.context({"cond_or_uncond": [0], "uuids": [each]})
        sampling.evaluate(torch.ones(1))
        return sampling.uniform

    assert run(("a", "b"), ("b", "a"), ("a", "b"))
    assert not run(("a", "b"), ("a",))
    assert not run(("a",), ("a", "a"))


def test_a_run_that_is_no_longer_known_is_corrected_no_further() -> None:
    options = resolve_options({"strategy": "adaptive", "target_speedup": 2.0})
    session = Session(options, "model", owns_calls=True)
    session.new_run(4, LEVELS, "euler", "flow")
    session._corrector.begin_run(session.clock, sees_whole_calls=True)
    assert session._corrector.applies(2)
    session.stop_correcting()
    assert not session._corrector.applies(2)


def test_an_evaluation_with_other_conditions_ends_the_correction() -> None:
    class Patcher:
        model = types.SimpleNamespace(diffusion_model=torch.nn.Identity())

    options = resolve_options({"strategy": "adaptive", "target_speedup": 2.0})
    cache = PatcherCache(options, patcher := Patcher())
    assert cache.owner() is patcher
    cache._run = run = Sampling(Sampler("some"), torch.tensor(LEVELS))
    cache.clock.begin()
    cache.clock.announce(4, LEVELS, "euler", "epsilon")
    cache.session._corrector.begin_run(cache.clock, sees_whole_calls=True)
    for asked in ("a", "a", "b"):
        cache.predict_noise(lambda *given: None, None, torch.ones(1))
        assert cache.session._corrector.applies(2)
        run.context({"cond_or_uncond": [0], "uuids": [asked]})
    cache.predict_noise(lambda *given: None, None, torch.ones(1))
    assert not cache.session._corrector.applies(2)


def test_what_the_session_says_reaches_the_node() -> None:
    heard: list[str] = []
    class Patcher:
        model = types.SimpleNamespace(diffusion_model=torch.nn.Identity())

    cache = PatcherCache(resolve_options({"correction": True, "language": "en"}), patcher := Patcher())
    assert cache.owner() is patcher
    cache.display = types.SimpleNamespace(said=heard.append)  # type: ignore[assignment]
    with pytest.warns(CacheDitWarning, match="euler, ddim and dpmpp_2m"):
        cache.session._corrector.begin_run(cache.clock, sees_whole_calls=True)
    assert len(heard) == 1
