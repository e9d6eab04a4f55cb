"""The nodes in a real server: pictures, digests, graphs, other nodes beside ours, samplers, bad input, memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from server import Server

pytestmark = pytest.mark.comfy
FAMILIES = ("flux", "wan", "sd3")
IDS = (
    "CacheDitAccelerate",
    "CacheDitStats",
    "CacheDitConfig",
    "CacheDitControl",
    "CacheDitDetailedStats",
    "CacheDitTimeline",
)


def workflow(family: str = "flux", seed: int = 1) -> Any:
    from server import Workflow

    return Workflow(family, seed)


def configured(flow: Any, model: list[Any], **options: Any) -> list[Any]:
    """The advanced node, with a schedule and no noise unless told otherwise."""
    given = {
        "strategy": "fixed", "skip_interval": 2, "warmup_steps": 3, "noise_scale": 0.0, "enable_debug": False,
        "forecast": "reuse",
    }  # fmt: skip
    link: list[Any] = flow.add("CacheDitConfig", model=model, **{**given, **options})
    return link


def compare(server: Server, flow: Any, a: list[Any], b: list[Any]) -> float:
    """The largest difference of two latents."""
    flow.add("TestDifference", "difference", a=a, b=b)
    return float(server.run(flow.nodes)["difference"]["difference"])


def hits(shown: str) -> int:
    found = re.search(r"Cache hits: (\d+)", shown)
    assert found is not None, shown
    return int(found[1])


def calls(shown: str) -> int:
    found = re.search(r"Total Forward calls: (\d+)", shown)
    assert found is not None, shown
    return int(found[1])


# ---- the nodes


def test_the_nodes_are_offered_as_specified(server: Server) -> None:
    offered = server.get("/object_info")
    assert {name for name in offered if name.startswith("CacheDit")} == set(IDS)
    nodes = {name: offered[name] for name in IDS}
    assert [nodes[name]["display_name"] for name in IDS] == [
        "CacheDit 模型加速",
        "CacheDit 统计信息",
        "CacheDit 高级配置",
        "CacheDit 缓存控制",
        "CacheDit 详细统计",
        "CacheDit 时间线",
    ]
    assert {node["category"] for node in nodes.values()} == {"CacheDit/基础节点", "CacheDit/高级节点"}
    config = nodes["CacheDitConfig"]["input"]["required"]
    assert list(config) == ["model", "strategy", "skip_interval", "warmup_steps", "noise_scale", "enable_debug"]
    ranges = {name: [config[name][1][key] for key in ("default", "min", "max", "step")] for name in list(config)[2:5]}
    assert ranges == {
        "skip_interval": [2, 1, 10, 1],
        "warmup_steps": [3, 0, 20, 1],
        "noise_scale": [0.001, 0.0, 0.1, 0.001],
    }
    for node in nodes.values():
        for inputs in (node["input"].get("required", {}), node["input"].get("optional", {})):
            assert all(options[1]["tooltip"] for options in inputs.values())
    shows = [name for name in IDS if nodes[name]["output_node"]]
    assert shows == ["CacheDitStats", "CacheDitDetailedStats", "CacheDitTimeline"]


def test_import_is_quick_and_says_little(server: Server) -> None:
    log = server.log.read_text()
    seconds = re.search(r"([\d.]+) seconds: \S*cache-dit-fx", log)
    assert seconds is not None
    assert float(seconds[1]) <= 0.3
    assert "IMPORT FAILED" not in log


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_never_skips_equals_one_without_the_node(server: Server, family: str) -> None:
    flow = workflow(family)
    cached = flow.sample(configured(flow, flow.model(), schedule="1" * 8))
    plain = flow.sample(flow.model(copy=1))
    flow.add("CacheDitStats", "stats", trigger=cached)
    assert compare(server, flow, cached, plain) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", (16, 9), ids=("batched", "apart"))
def test_skipped_steps_equal_the_eager_reference(server: Server, family: str, tokens: int) -> None:
    """With prompts of one length both conditions come in one call, else in two."""
    flow, schedule = workflow(family), "11101010"
    negative = flow.prompt(3, tokens)
    cached = flow.sample(configured(flow, flow.model(), schedule=schedule), negative=negative)
    reference = flow.add("TestEagerCache", model=flow.model(copy=1), family=family, schedule=schedule)
    by_hand = flow.sample(reference, negative=negative)
    plain = flow.sample(flow.model(copy=2), negative=negative)
    flow.add("TestDifference", "effect", a=cached, b=plain)
    flow.add("CacheDitStats", "stats", trigger=cached)
    flow.add("TestDifference", "difference", a=cached, b=by_hand)
    shown = server.run(flow.nodes)
    each = 1 if tokens == 16 else 2
    assert (calls(shown["stats"]), hits(shown["stats"])) == (8 * each, 3 * each)
    assert shown["difference"]["difference"] <= 1e-4 * shown["difference"]["size"]
    assert shown["effect"]["difference"] > 1e-2


# ---- graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_traced_again_for_steps_lora_or_wrappers(server: Server, family: str) -> None:
    def graphs(**change: Any) -> dict[str, Any]:
        flow = workflow(family)
        model = flow.model()
        if "lora" in change:
            model = flow.add("TestLora", model=model, strength=change["lora"])
        if "before" in change:
            model = flow.add("TestForeignWrapper", model=model, entry=change["before"])
        model = flow.add("CacheDitAccelerate", model=model)
        if "after" in change:
            model = flow.add("TestForeignWrapper", model=model, entry=change["after"])
        if "lora_after" in change:
            model = flow.add("TestLora", model=model, strength=change["lora_after"])
        samples = flow.sample(model, steps=change.get("steps", 6), seed=change.get("seed", 1))
        flow.add("CacheDitStats", "stats", trigger=samples)
        flow.facts(samples)
        shown = server.run(flow.nodes)
        assert hits(shown["stats"]) > 0, change
        found: dict[str, Any] = shown["facts"]
        return found

    first = graphs()
    for change in (
        {"steps": 9},
        {"seed": 5},
        {"lora": 0.5},
        {"lora": 0.9},
        {"lora_after": 0.5},
        {"before": "a"},
        {"after": "b"},
        {"before": "c", "after": "d", "steps": 7, "lora": 0.3},
    ):
        assert graphs(**change)["graphs"] == first["graphs"], change
    assert first["breaks"] == 0


# ---- beside other nodes


@pytest.mark.parametrize("order", ("lora first", "lora last"))
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_applied_on_either_side(server: Server, family: str, order: str) -> None:
    flow = workflow(family)
    schedule = "1" * 8
    plain = flow.sample(flow.add("TestLora", model=flow.model(), strength=0.8))
    model = flow.model(copy=1)
    if order == "lora first":
        model = configured(flow, flow.add("TestLora", model=model, strength=0.8), schedule=schedule)
    else:
        model = flow.add("TestLora", model=configured(flow, model, schedule=schedule), strength=0.8)
    cached = flow.sample(model)
    without = flow.sample(flow.model(copy=2))
    flow.add("TestDifference", "effect", a=plain, b=without)
    flow.add("TestDifference", "difference", a=cached, b=plain)
    shown = server.run(flow.nodes)
    assert shown["difference"]["difference"] == 0.0
    assert shown["effect"]["difference"] > 1e-3


@pytest.mark.parametrize("order", ("ours first", "ours last"))
@pytest.mark.parametrize("name", ("EasyCache", "LazyCache"))
def test_the_servers_own_caches_compose(server: Server, name: str, order: str) -> None:
    options = {"reuse_threshold": 1.5, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    flow = workflow()
    alone = flow.sample(flow.add(name, model=flow.model(), **options), steps=12)
    model = flow.model(copy=1)
    if order == "ours first":
        both = flow.add(name, model=configured(flow, model, schedule="1" * 12), **options)
    else:
        both = configured(flow, flow.add(name, model=model, **options), schedule="1" * 12)
    together = flow.sample(both, steps=12)
    flow.add("CacheDitStats", "stats", trigger=together)
    flow.add("TestDifference", "difference", a=together, b=alone)
    shown = server.run(flow.nodes)
    assert shown["difference"]["difference"] == 0.0
    # what the other cache skips does not reach us
    assert calls(shown["stats"]) < 12


def test_a_compiling_node_is_left_out_and_said(server: Server) -> None:
    flow = workflow(seed=4)
    model = flow.add("TorchCompileModel", model=flow.model(), backend="inductor")
    cached = flow.sample(configured(flow, model, schedule="1" * 6), steps=6)
    plain = flow.sample(flow.model(copy=1), steps=6)
    flow.facts(cached)
    flow.add("TestDifference", "difference", a=cached, b=plain)
    begin = time.monotonic()
    shown = server.run(flow.nodes)
    # inductor would take half a minute, and round otherwise
    assert time.monotonic() - begin < 30
    assert shown["difference"]["difference"] == 0.0
    assert any("nothing is compiled twice" in each for each in shown["facts"]["said"])


@pytest.mark.parametrize("node", ("ModelSamplingFlux", "ModelSamplingSD3", "ModelSamplingAuraFlow"))
@pytest.mark.parametrize("order", ("patch first", "patch last"))
def test_patches_of_the_sampling_compose(server: Server, node: str, order: str) -> None:
    family = "sd3" if node == "ModelSamplingSD3" else "flux"
    flow = workflow(family)
    size = {"max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128}
    options = size if node == "ModelSamplingFlux" else {"shift": 2.0}
    plain = flow.sample(flow.add(node, model=flow.model(), **options))
    model = flow.model(copy=1)
    if order == "patch first":
        model = configured(flow, flow.add(node, model=model, **options), schedule="1" * 8)
    else:
        model = flow.add(node, model=configured(flow, model, schedule="1" * 8), **options)
    assert compare(server, flow, flow.sample(model), plain) == 0.0


def test_custom_samplers_and_guiders(server: Server) -> None:
    flow = workflow()
    positive, negative, latent = flow.prompt(2), flow.prompt(3), flow.latent()

    def sampled(model: list[Any]) -> list[Any]:
        guider = flow.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)
        sigmas = flow.add("BasicScheduler", model=model, scheduler="simple", steps=8, denoise=1.0)
        link: list[Any] = flow.add(
            "SamplerCustomAdvanced",
            noise=flow.add("RandomNoise", noise_seed=7),
            guider=guider,
            sampler=flow.add("KSamplerSelect", sampler_name="dpmpp_2m"),
            sigmas=sigmas,
            latent_image=latent,
        )
        return link

    schedule = "11101010"
    cached = sampled(configured(flow, flow.model(), schedule=schedule))
    flow.add("CacheDitStats", "stats", trigger=cached)
    by_hand = sampled(flow.add("TestEagerCache", model=flow.model(copy=1), family="flux", schedule=schedule))
    flow.add("TestDifference", "difference", a=cached, b=by_hand)
    shown = server.run(flow.nodes)
    assert hits(shown["stats"]) == 3
    assert shown["difference"]["difference"] <= 1e-4 * shown["difference"]["size"]


# ---- samplers and runs


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    (
        ("euler", 6), ("euler_ancestral", 6), ("dpmpp_2m", 6), ("dpmpp_3m_sde", 6), ("lcm", 6), ("uni_pc", 6),
        ("heun", 11), ("dpm_2", 11), ("dpmpp_sde", 11), ("dpmpp_2s_ancestral", 11), ("res_multistep", 6),
    ),
)  # fmt: skip
def test_every_evaluation_is_a_step(server: Server, sampler: str, evaluations: int) -> None:
    schedule = "1110" + "10" * 4
    flow = workflow()
    cached = flow.sample(configured(flow, flow.model(), schedule=schedule), steps=6, sampler=sampler)
    flow.add("CacheDitStats", "stats", trigger=cached)
    by_hand = flow.sample(
        flow.add("TestEagerCache", model=flow.model(copy=1), family="flux", schedule=schedule), steps=6, sampler=sampler
    )
    flow.add("TestDifference", "difference", a=cached, b=by_hand)
    shown = server.run(flow.nodes)
    assert calls(shown["stats"]) == evaluations
    assert hits(shown["stats"]) == schedule[:evaluations].count("0")
    assert shown["difference"]["difference"] <= 1e-4 * max(1.0, shown["difference"]["size"])


def test_a_sampling_split_in_two_is_two_runs(server: Server) -> None:
    flow = workflow()
    model = configured(flow, flow.model(), warmup_steps=1)
    common = {
        "noise_seed": 7, "steps": 12, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
        "positive": flow.prompt(2), "negative": flow.prompt(3),
    }  # fmt: skip
    first = flow.add(
        "KSamplerAdvanced", model=model, add_noise="enable", latent_image=flow.latent(), start_at_step=0, end_at_step=6,
        return_with_leftover_noise="enable", **common,
    )  # fmt: skip
    flow.add("CacheDitStats", "first", trigger=first)
    second = flow.add(
        "KSamplerAdvanced", model=model, add_noise="disable", latent_image=first, start_at_step=6, end_at_step=12,
        return_with_leftover_noise="disable", **common,
    )  # fmt: skip
    flow.add("CacheDitStats", "second", trigger=second)
    flow.add("CacheDitDetailedStats", "all", trigger=second, show_model_details=True, model=model)
    shown = server.run(flow.nodes)
    # steps 2, 4, 6 of each: the second does not go on with what the first has stored
    assert hits(shown["second"]) == 3
    assert "Calls: 12" in shown["all"] and "Cache hits: 6" in shown["all"]


def test_two_branches_of_one_loader_keep_their_settings(server: Server) -> None:
    flow = workflow()
    loader = flow.model()
    ways = {"fixed": "11101010", "more": "10001000"}
    for name, schedule in ways.items():
        model = configured(flow, loader, schedule=schedule)
        samples = flow.sample(model)
        flow.add("CacheDitDetailedStats", f"stats {name}", trigger=samples, show_model_details=False, model=model)
        by_hand = flow.add("TestEagerCache", model=flow.model(copy=len(name)), family="flux", schedule=schedule)
        flow.add("TestDifference", f"difference {name}", a=samples, b=flow.sample(by_hand))
    untouched = flow.sample(loader)
    flow.add("TestDifference", "untouched", a=untouched, b=flow.sample(flow.model(copy=9)))
    shown = server.run(flow.nodes)
    for name, schedule in ways.items():
        assert f"Total cache hits: {schedule.count('0')}" in shown[f"stats {name}"]
        assert shown[f"difference {name}"]["difference"] <= 1e-4 * shown[f"difference {name}"]["size"]
    assert shown["untouched"]["difference"] == 0.0


def test_high_and_low_noise_models_take_turns(server: Server) -> None:
    """Wan 2.2: one model for the first half of the noise levels, another one for the rest, each behind a node of ours."""
    ways = {"high": (0, 4, "1100"), "low": (4, 8, "1010")}
    ended: dict[str, list[Any]] = {}
    flow = workflow("wan")
    for kind in ("ours", "by hand"):
        samples = flow.latent()
        for name, (start, end, schedule) in ways.items():
            loader = flow.model(copy=int(kind == "ours"), seed=1 if name == "high" else 2)
            if kind == "ours":
                model = configured(flow, loader, schedule=schedule)
            else:
                model = flow.add("TestEagerCache", model=loader, family="wan", schedule=schedule)
            samples = flow.add(
                "KSamplerAdvanced", model=model, latent_image=samples, start_at_step=start, end_at_step=end, steps=8,
                add_noise="enable" if name == "high" else "disable", noise_seed=7, cfg=3.0, sampler_name="euler",
                return_with_leftover_noise="enable" if name == "high" else "disable", scheduler="simple",
                positive=flow.prompt(2), negative=flow.prompt(3),
            )  # fmt: skip
            if kind == "ours":
                flow.add("CacheDitStats", name, trigger=samples, model=model)
        ended[kind] = samples
    flow.add("TestDifference", "difference", a=ended["ours"], b=ended["by hand"])
    shown = server.run(flow.nodes)
    assert {name: (calls(shown[name]), hits(shown[name])) for name in ways} == {"high": (4, 2), "low": (4, 2)}
    assert shown["difference"]["difference"] <= 1e-4 * shown["difference"]["size"]


def test_a_control_network_is_heard(server: Server) -> None:
    """What it adds enters the cached blocks; a skipped step goes on with what it has, and says so."""
    flow, schedule = workflow(), "11101010"
    control = {
        "positive": flow.prompt(2), "negative": flow.prompt(3), "control_net": flow.add("TestControlNet"), "strength": 0.7,
        "image": flow.add("EmptyImage", width=128, height=128, batch_size=1, color=0x40A0E0), "start_percent": 0.0,
    }  # fmt: skip
    whole = flow.add("ControlNetApplyAdvanced", **control, end_percent=1.0)
    half = flow.add("ControlNetApplyAdvanced", **control, end_percent=0.5)
    both = {"positive": whole, "negative": [whole[0], 1]}
    computed = flow.sample(configured(flow, flow.model(), schedule="1" * 8), **dict(both))
    plain = flow.sample(flow.model(copy=1), **dict(both))
    flow.add("TestDifference", "computed", a=computed, b=plain)
    flow.add("TestDifference", "effect", a=plain, b=flow.sample(flow.model(copy=1)))
    cached = flow.sample(configured(flow, flow.model(), schedule=schedule), **dict(both))
    by_hand = flow.add("TestEagerCache", model=flow.model(copy=1), family="flux", schedule=schedule)
    flow.add("TestDifference", "cached", a=cached, b=flow.sample(by_hand, **dict(both)))
    flow.add("CacheDitStats", "stats", trigger=cached)
    flow.facts(cached)
    # a network that leaves in the middle of the run leaves another graph behind
    in_part = {"positive": half, "negative": [half[0], 1]}
    never = flow.sample(configured(flow, flow.model(), schedule="1" * 8), **dict(in_part))
    flow.add("TestDifference", "in part", a=never, b=flow.sample(flow.model(copy=1), **dict(in_part)))
    shown = server.run(flow.nodes)
    assert shown["computed"]["difference"] == shown["in part"]["difference"] == 0.0
    assert shown["effect"]["difference"] > 1e-2
    assert hits(shown["stats"]) == 3
    assert shown["cached"]["difference"] <= 1e-4 * shown["cached"]["size"]
    # with a remedy that a workflow has
    assert any("does not hear it" in each and "CacheDit Advanced Config" in each for each in shown["facts"]["said"])


def test_video_with_sound_is_cached(server: Server) -> None:
    """LTX-2's latent is a list of two, and its blocks write to both streams in place."""
    if "ltxav" not in server.families():
        pytest.skip("this server has no model whose latent is a list")
    flow, schedule = workflow("ltxav"), "11101010"
    latent = {"latent_image": flow.latent()}
    plain = flow.sample(flow.model(copy=1), **dict(latent))
    never = flow.sample(configured(flow, flow.model(), schedule="1" * 8), **dict(latent))
    flow.add("TestDifference", "never", a=never, b=plain)
    cached = flow.sample(configured(flow, flow.model(), schedule=schedule), **dict(latent))
    flow.add("CacheDitStats", "stats", trigger=cached)
    by_hand = flow.add("TestEagerCache", model=flow.model(copy=2), family="ltxav", schedule=schedule)
    flow.add("TestDifference", "cached", a=cached, b=flow.sample(by_hand, **dict(latent)))
    flow.add("TestDifference", "effect", a=cached, b=plain)
    shown = server.run(flow.nodes)
    assert shown["never"]["difference"] == 0.0
    assert (calls(shown["stats"]), hits(shown["stats"])) == (8, 3)
    assert shown["cached"]["difference"] <= 1e-4 * shown["cached"]["size"]
    assert shown["effect"]["difference"] > 1e-2


@pytest.mark.parametrize("weights", ("float8_e4m3fn", "float8_e5m2"))
def test_weights_of_eight_bits_are_cached(server: Server, weights: str) -> None:
    """What the loader's weight_dtype chooses: weights are cast where they are used."""
    flow, schedule = workflow(), "11101010"
    loaders = [flow.model(copy, weights=weights) for copy in range(2)]
    cached = flow.sample(configured(flow, loaders[0], schedule=schedule))
    flow.add("CacheDitStats", "stats", trigger=cached)
    by_hand = flow.add("TestEagerCache", model=loaders[1], family="flux", schedule=schedule)
    flow.add("TestDifference", "cached", a=cached, b=flow.sample(by_hand))
    never = flow.sample(configured(flow, loaders[0], schedule="1" * 8))
    flow.add("TestDifference", "never", a=never, b=flow.sample(loaders[1]))
    flow.add("TestDifference", "effect", a=never, b=flow.sample(flow.model()))
    shown = server.run(flow.nodes)
    assert shown["never"]["difference"] == 0.0
    assert hits(shown["stats"]) == 3
    assert shown["cached"]["difference"] <= 1e-4 * shown["cached"]["size"]
    assert shown["effect"]["difference"] > 1e-3


def test_weights_that_stay_behind_are_patched_at_each_use(server: Server) -> None:
    """What --lowvram does: the model is loaded in part, and a LoRA is added to each weight as it is cast.

    Where that writes in place the blocks cannot be cached; the picture is right all the same.
    """
    flow = workflow(seed=21)
    partly, whole = flow.add("TestPartlyLoaded", model=flow.model()), flow.model(copy=1)
    for strength in (0.8, 0.3):
        model = flow.add("TestLora", model=configured(flow, partly, schedule="1" * 8), strength=strength)
        cached = flow.sample(model)
        plain = flow.sample(flow.add("TestLora", model=whole, strength=strength))
        flow.add("TestDifference", f"difference {strength}", a=cached, b=plain)
    flow.add("TestDifference", "effect", a=cached, b=flow.sample(whole))
    flow.facts(cached)
    shown = server.run(flow.nodes)
    for strength in (0.8, 0.3):
        difference = shown[f"difference {strength}"]
        assert difference["difference"] <= 1e-4 * difference["size"], strength
    assert shown["effect"]["difference"] > 1e-3
    assert shown["facts"]["partly_loaded"]
    assert shown["facts"]["held"] == 0


@pytest.mark.parametrize("case", ("img2img", "batch", "regions", "masks", "cfg 1", "two prompts"))
def test_other_ways_to_sample(server: Server, case: str) -> None:
    flow, schedule = workflow(), "11101010"
    more: dict[str, Any] = {}
    if case == "img2img":
        more = {"denoise": 0.6, "latent_image": flow.sample(flow.model(copy=5), steps=2)}
    elif case == "batch":
        more = {"latent_image": flow.latent(batch=2)}
    elif case == "cfg 1":
        more = {"cfg": 1.0}
    else:
        whole, part = flow.prompt(2), flow.prompt(6, tokens=11 if case == "two prompts" else 16)
        if case == "regions":
            part = flow.add(
                "ConditioningSetArea", conditioning=part, width=64, height=128, x=64, y=0, strength=1.0
            )
        elif case == "masks":
            mask = flow.add("SolidMask", value=0.5, width=128, height=128)
            part, third = (
                flow.add("ConditioningSetMask", conditioning=each, mask=mask, strength=strength, set_cond_area="default")
                for each, strength in ((part, 1.0), (flow.prompt(8), 0.4))
            )
            part = flow.add("ConditioningCombine", conditioning_1=part, conditioning_2=third)
        more = {"positive": flow.add("ConditioningCombine", conditioning_1=whole, conditioning_2=part)}
    cached = flow.sample(configured(flow, flow.model(), schedule=schedule), **dict(more))
    by_hand = flow.sample(
        flow.add("TestEagerCache", model=flow.model(copy=1), family="flux", schedule=schedule), **dict(more)
    )
    flow.add("CacheDitStats", "stats", trigger=cached)
    flow.add("TestDifference", "difference", a=cached, b=by_hand)
    shown = server.run(flow.nodes)
    assert hits(shown["stats"]) * 8 == calls(shown["stats"]) * 3
    assert shown["difference"]["difference"] <= 1e-4 * shown["difference"]["size"]


@pytest.mark.parametrize(("sampler", "evaluations"), (("euler", 12), ("heun", 23)))
def test_strategies_know_the_length_of_the_run(server: Server, sampler: str, evaluations: int) -> None:
    flow = workflow()
    options = {"strategy": "adaptive", "warmup_steps": 1, "target_speedup": 2.0, "end_percent": 0.5}
    cached = flow.sample(configured(flow, flow.model(), **options), steps=12, sampler=sampler)
    flow.add("CacheDitStats", "stats", trigger=cached)
    flow.facts(cached)
    shown = server.run(flow.nodes)
    assert shown["facts"]["num_steps"] == evaluations
    # where each evaluation has a noise level of its own, the strategy gets the list
    assert (shown["facts"]["sigmas"] is not None) == (evaluations == 12)
    assert 0 < hits(shown["stats"]) <= evaluations // 2
    assert not any("number of steps" in each for each in shown["facts"]["said"])


def test_the_same_run_gives_the_same_picture_with_noise(server: Server) -> None:
    flow = workflow()
    for name in ("a", "b"):
        model = configured(flow, flow.model(copy=len(flow.nodes)), noise_scale=0.01)
        flow.digest(flow.sample(model), name)
    shown = server.run(flow.nodes)
    assert shown["a"]["sha"] == shown["b"]["sha"]


def test_a_trained_model_draws_the_same_picture(server: Server) -> None:
    """The demo's digits: cached, each is within a few grey levels of what it is without."""
    flow = workflow()
    positive, latent = flow.add("TestDigitsLabels", labels="0 1 2 3 4 5 6 7 8 9"), flow.add("TestDigitsLatent", batch=10)
    negative = flow.add("TestDigitsLabels", labels="10 10 10 10 10 10 10 10 10 10")
    common = {"positive": positive, "negative": negative, "latent_image": latent, "steps": 28, "cfg": 2.0}
    loader = flow.add("TestDigitsModel")
    plain = flow.sample(loader, **common)
    cached = flow.sample(flow.add("CacheDitAccelerate", model=loader), **common)
    flow.add("CacheDitStats", "stats", trigger=cached)
    flow.add("TestPsnr", "psnr", a=cached, b=plain, range=2.0)
    rows = [flow.add("TestDigitsImage", samples=samples) for samples in (plain, cached)]
    stitch = {"direction": "down", "match_image_size": True, "spacing_width": 8, "spacing_color": "white"}
    flow.add("SaveImage", images=flow.add("ImageStitch", image1=rows[0], image2=rows[1], **stitch), filename_prefix="digits")
    shown = server.run(flow.nodes)
    assert hits(shown["stats"]) == 13
    assert shown["psnr"]["psnr"] > 30.0
    assert list((server.home / "output").glob("digits*.png"))


@pytest.mark.parametrize("sampler", ("euler", "dpmpp_2m"))
def test_skipped_steps_are_put_right(server: Server, sampler: str) -> None:
    """With the sampler's own solver known, positive and negative prompt each by itself; otherwise not."""
    flow = workflow()
    latent = flow.add("TestDigitsLatent", batch=10)
    labels = ("0 1 2 3 4 5 6 7 8 9", " ".join(["10"] * 10))
    positive, negative = (flow.add("TestDigitsLabels", labels=each) for each in labels)
    common = {"positive": positive, "negative": negative, "latent_image": latent, "steps": 28, "cfg": 2.0}
    loader = flow.add("TestDigitsModel")

    def adaptive(model: list[Any], **more: Any) -> list[Any]:
        options = {"strategy": "adaptive", "skip_interval": 1, "warmup_steps": 0, "target_speedup": 2.0}
        return configured(flow, model, **{**options, "forecast": "auto", **more})

    def sampled(model: list[Any], name: str = "") -> list[Any]:
        made = flow.sample(model, sampler=sampler, **common)
        if name:
            flow.facts(made, name)
        return made

    plain = sampled(loader)
    ways = {"corrected": adaptive(loader), "not": adaptive(loader, correction="off")}
    for name, model in ways.items():
        flow.add("TestPsnr", name, a=sampled(model, f"{name} facts"), b=plain, range=2.0)
    shown = server.run(flow.nodes)
    assert shown["corrected facts"]["solver"] == sampler
    assert shown["corrected"]["psnr"] > shown["not"]["psnr"] + 2.0


SOLVERS = """
import os, runpy, sys

import comfy.options
sys.argv = ["main.py", "--cpu"]
comfy.options.enable_args_parsing()
import comfy.k_diffusion.sampling as samplers
import torch

# by its file: our root has a folder of ComfyUI's name
own = runpy.run_path(os.environ["SOLVERS_FILE"])
SOLVERS, denoised = own["SOLVERS"], own["denoised"]

for name, levels in (("euler", (14.0, 6.0, 2.0, 0.7, 0.0)), ("dpmpp_2m", (14.0, 6.0, 2.0, 0.7, 0.0)),
                     ("euler", (1.0, 0.9, 0.6, 0.3, 0.0)), ("dpmpp_2m", (1.0, 0.9, 0.6, 0.3, 0.0))):
    outputs = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "v"):
        given = iter(outputs)
        shares = {sigma: denoised(sigma, prediction) for sigma in levels[:-1]}

        def model(x, sigma, **more):
            p, q = shares[float(sigma[0])]
            return p * x + q * next(given)

        start = torch.ones(1, 3, dtype=torch.float64)
        sigmas = torch.tensor(levels, dtype=torch.float64)
        theirs = getattr(samplers, f"sample_{name}")(model, start, sigmas, disable=True)
        state, before = start, torch.zeros_like(start)
        for step, output in zip(SOLVERS[name](levels, prediction), outputs):
            now = step.p * state + step.q * output
            state, before = step.a * state + step.b * now + step.c * before, now
        torch.testing.assert_close(state, theirs, rtol=1e-12, atol=1e-12)
print("equal")
"""


def test_solvers_are_comfyuis_samplers(tree: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "cache_dit/runtime/solvers.py"
    environment = {**os.environ, "PYTHONPATH": str(tree), "SOLVERS_FILE": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", SOLVERS], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr


@pytest.mark.parametrize("case", ("guidance", "sampler", "prediction"))
def test_what_is_no_linear_recurrence_is_not_corrected(server: Server, case: str) -> None:
    flow = workflow()
    model = flow.model()
    if case == "guidance":
        model = flow.add("RescaleCFG", model=model, multiplier=0.7)
    if case == "prediction":
        model = flow.add("ModelSamplingContinuousEDM", model=model, sampling="edm", sigma_max=20.0, sigma_min=0.01)
    options = {"strategy": "adaptive", "warmup_steps": 0, "target_speedup": 2.0, "correction": "on"}
    sampler = "lcm" if case == "sampler" else "euler"
    corrected = flow.sample(configured(flow, model, **options), sampler=sampler)
    flow.facts(corrected)
    without = flow.sample(configured(flow, model, **{**options, "correction": "off"}), sampler=sampler)
    flow.add("TestDifference", "difference", a=corrected, b=without)
    flow.add("CacheDitStats", "stats", trigger=without)
    shown = server.run(flow.nodes)
    assert shown["facts"]["solver"] is None
    assert hits(shown["stats"]) > 0
    assert shown["difference"]["difference"] == 0.0


# ---- on and off


def test_control_turns_the_cache_off_and_on(server: Server) -> None:
    def run(on: bool, upstream: bool) -> dict[str, Any]:
        flow = workflow(seed=3)
        model = flow.model()
        if upstream:
            model = configured(flow, model, schedule="11100000")
        samples = flow.sample(flow.add("CacheDitControl", model=model, enable_cache=on))
        flow.add("CacheDitStats", "stats", trigger=samples)
        flow.add("CacheDitDetailedStats", "all", trigger=samples, show_model_details=True)
        flow.digest(samples)
        return server.run(flow.nodes)

    flow = workflow(seed=3)
    flow.digest(flow.sample(flow.model()))
    plain = server.run(flow.nodes)["digest"]["sha"]
    off = run(False, True)
    assert off["digest"]["sha"] == plain
    assert (calls(off["stats"]), hits(off["stats"])) == (8, 0)
    assert "Status: disabled" in off["all"]
    on = run(True, True)
    assert hits(on["stats"]) == 5
    assert run(False, True)["digest"]["sha"] == plain
    assert run(True, True)["digest"]["sha"] == on["digest"]["sha"]
    assert hits(run(True, False)["stats"]) == 3
    assert run(False, False)["digest"]["sha"] == plain


def test_two_nodes_in_series_keep_the_first_settings(server: Server) -> None:
    flow = workflow(seed=6)
    first = configured(flow, flow.model(), schedule="11100000")
    samples = flow.sample(flow.add("CacheDitAccelerate", model=first))
    flow.add("CacheDitStats", "stats", trigger=samples)
    assert hits(server.run(flow.nodes)["stats"]) == 5
    assert "The model is cached already" in server.log.read_text()


# ---- bad input


def test_values_out_of_range_are_named_by_the_server(server: Server) -> None:
    from server import PromptError

    flow = workflow()
    flow.digest(flow.sample(configured(flow, flow.model(), skip_interval=99)))
    with pytest.raises(PromptError) as refused:
        server.run(flow.nodes)
    assert "skip_interval" in str(refused.value.details) and "10" in str(refused.value.details)


@pytest.mark.parametrize(
    ("inputs", "name"),
    (
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"warmup_steps": "three"}, "warmup_steps"),
        ({"warmup_steps": 21}, "warmup_steps"),
        ({"skip_interval": 0}, "skip_interval"),
        ({"start_percent": 1.5}, "start_percent"),
        ({"front_blocks": -1}, "front_blocks"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_of_the_wrong_kind_are_named_by_the_server(server: Server, inputs: dict[str, Any], name: str) -> None:
    from server import PromptError

    flow = workflow()
    model = configured(flow, flow.model(), **inputs)
    flow.digest(flow.sample(model))
    with pytest.raises(PromptError) as refused:
        server.queue(flow.nodes)
    found = refused.value.details["node_errors"][model[0]]["errors"]
    assert [each["extra_info"]["input_name"] for each in found] == [name]


def test_a_name_that_is_no_choice_is_said(server: Server) -> None:
    """By the server, or where it lets the name pass, by the node, and the prompt finishes."""
    from server import PromptError

    flow = workflow(seed=8)
    flow.digest(flow.sample(configured(flow, flow.model(), strategy="best"), steps=3))
    try:
        server.run(flow.nodes)
    except PromptError as refused:
        assert "best" in str(refused.details)
    else:
        assert "option strategy: it cannot be 'best'" in server.log.read_text()


def test_inputs_that_no_node_has_are_no_obstacle(server: Server) -> None:
    """A workflow of a later version, or of a pack with nodes of these ids."""
    flow = workflow(seed=8)
    given = {"model_type": "Auto", "print_summary": True, "schedule": 1110}
    cached = flow.sample(configured(flow, flow.model(), **given), steps=4)
    flow.add("CacheDitStats", "stats", trigger=cached, colour="red")
    assert hits(server.run(flow.nodes)["stats"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    (
        # passes the server's comparisons with the ends of the range
        ({"noise_scale": float("nan")}, "noise_scale"),
        ({"schedule": "10x"}, "schedule"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent"),
        ({"target_speedup": 0.5}, "target_speedup"),
    ),
)
def test_wrong_settings_are_said_and_the_prompt_finishes(server: Server, options: dict[str, Any], message: str) -> None:
    flow = workflow(seed=8)
    wrong = flow.sample(configured(flow, flow.model(), **options), steps=3)
    plain = flow.sample(flow.model(copy=1), steps=3)
    assert compare(server, flow, wrong, plain) == 0.0
    assert f"option {message}" in server.log.read_text()


def test_a_model_without_a_chain_of_blocks_runs_as_it_is(server: Server) -> None:
    flow = workflow("unet")
    samples = flow.sample(flow.add("CacheDitAccelerate", model=flow.model()), steps=6)
    plain = flow.sample(flow.model(copy=1), steps=6)
    flow.add("TestDifference", "difference", a=samples, b=plain)
    flow.add("CacheDitStats", "stats", trigger=samples)
    flow.facts(samples)
    shown = server.run(flow.nodes)
    if hits(shown["stats"]) == 0:
        assert shown["difference"]["difference"] <= 1e-5 * shown["difference"]["size"]
        assert any("No transformer component found" in each for each in shown["facts"]["said"])


def test_a_workflow_of_the_documents_plugin_runs(server: Server) -> None:
    """It has our ids, and none of the inputs that came later."""
    flow = workflow()
    model = flow.add(
        "CacheDitConfig", model=flow.model(), strategy="dynamic", skip_interval=3, warmup_steps=2, noise_scale=0.001,
        enable_debug=False,
    )  # fmt: skip
    samples = flow.sample(model, steps=9)
    flow.add("CacheDitStats", "stats", trigger=samples)
    flow.add("CacheDitDetailedStats", "all", trigger=samples, show_model_details=False)
    shown = server.run(flow.nodes)
    assert hits(shown["stats"]) > 0
    assert "Model details" not in shown["all"]


# ---- the life of a server


def test_an_interrupt_leaves_a_working_server(server: Server) -> None:
    def run(steps: int, seed: int) -> dict[str, Any]:
        flow = workflow(seed=2)
        samples = flow.sample(configured(flow, flow.model(), schedule="1110" * 50), steps=steps, seed=seed)
        flow.digest(samples)
        flow.facts(samples)
        flow.add("CacheDitStats", "stats", trigger=samples)
        return flow.nodes

    before = server.run(run(8, 1))
    for wait in (0.3, 1.0):
        prompt = server.queue(run(200, int(wait * 10)))
        time.sleep(wait)
        server.post("/interrupt", {})
        ended = server.wait(prompt)
        assert ended["status"]["status_str"] == "error"
        assert any(kind == "execution_interrupted" for kind, _ in ended["status"]["messages"])
    after = server.run({**run(8, 1)})
    assert after["digest"]["sha"] == before["digest"]["sha"]
    assert after["facts"]["held"] == 0


@pytest.mark.parametrize("place", ("before", "after"))
def test_after_running_out_of_memory_the_next_run_is_right(server: Server, place: str) -> None:
    def nodes(fails: bool) -> dict[str, Any]:
        flow = workflow(seed=2)
        model = configured(flow, flow.model(), schedule="11101010")
        if fails:
            model = flow.add("TestOutOfMemory", model=model, evaluation=5, place=place)
        samples = flow.sample(model)
        flow.digest(samples)
        flow.facts(samples)
        flow.add("CacheDitStats", "stats", trigger=samples)
        return flow.nodes

    before = server.run(nodes(False))
    failed = server.wait(server.queue(nodes(True)))
    assert failed["status"]["status_str"] == "error"
    assert "a test has run out of memory" in str(failed["status"]["messages"])
    server.post("/free", {"free_memory": True})
    time.sleep(1.5)
    after = server.run(nodes(False))
    assert after["digest"]["sha"] == before["digest"]["sha"]
    assert (calls(after["stats"]), hits(after["stats"])) == (8, 3)
    assert after["facts"]["held"] == 0
    assert after["facts"]["graphs"] == before["facts"]["graphs"]


def test_freeing_models_keeps_results_and_releases_caches(server: Server) -> None:
    def run() -> dict[str, Any]:
        flow = workflow(seed=2)
        samples = flow.sample(configured(flow, flow.model()))
        flow.digest(samples)
        flow.facts(samples)
        return server.run(flow.nodes)

    before = run()
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    after = run()
    assert after["digest"]["sha"] == before["digest"]["sha"]
    assert after["facts"]["held"] == 0
    assert after["facts"]["graphs"] == before["facts"]["graphs"]


def test_statistics_are_never_stale(server: Server) -> None:
    flow = workflow(seed=5)
    samples = flow.sample(flow.add("CacheDitAccelerate", model=flow.model()))
    flow.add("CacheDitStats", "stats", trigger=samples)
    flow.add("CacheDitTimeline", "timeline", trigger=samples)
    first = server.run(flow.nodes)
    again = server.run(flow.nodes)
    assert first["stats"] == again["stats"]
    picture = again["timeline"]["images"][0]
    assert server.get(f"/view?filename={picture['filename']}&type=temp")[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_line_a_sampling_on_the_console(server: Server) -> None:
    flow = workflow(seed=12)
    flow.digest(flow.sample(flow.add("CacheDitAccelerate", model=flow.model())))
    before = len(server.log.read_text())
    server.run(flow.nodes)
    new = server.log.read_text()[before:]
    assert len(re.findall(r"skipped 3 of 8 steps, measured speed-up [\d.]+x", new)) == 1, new


def test_progress_is_shown_on_the_node(server: Server) -> None:
    """What the browser hears while a picture is made: the steps on the node that applied the cache, then one line."""
    flow = workflow(seed=13)
    model = flow.add("CacheDitAccelerate", "ours", model=flow.model())
    flow.digest(flow.sample(model, steps=40))
    heard = server.hear(flow.nodes)
    texts = [text for node, text in heard if node == "ours"]
    assert texts[0] == "caching is on; waiting for a sampling"
    assert any(re.fullmatch(r"step \d+ of 40, skipped \d+", text) for text in texts)
    assert texts[-1].startswith("sampling done: skipped 19 of 40 steps")


def test_the_old_dialect_beside_the_other_project(tree: Path, comfy_version: str, tmp_path: Path) -> None:
    """Another package called cache_dit is installed: its import stays as it is, and the nodes work all the same.

    So they do without a compiler: inductor gives way to eager, with one message.
    """
    from server import running

    other = tmp_path / "other/cache_dit"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("mine = 'the other project'\n")
    environment = {"CACHE_DIT_LANG": "en", "CACHE_DIT_COMFY_NODES": "v1", "PACKAGES": str(other.parent), "CXX": "/no/compiler"}
    with running(tree, tmp_path / "home", **environment) as old:
        flow = workflow("sd3")
        samples = flow.sample(configured(flow, flow.model(), schedule="1110", inner="inductor"), steps=4)
        flow.add("CacheDitStats", "stats", trigger=samples)
        flow.add("CacheDitTimeline", "timeline", trigger=samples)
        flow.add("TestImport", "import", after=samples, module="cache_dit")
        by_hand = flow.add("TestEagerCache", model=flow.model(copy=1), family="sd3", schedule="1110")
        flow.add("TestDifference", "difference", a=samples, b=flow.sample(by_hand, steps=4))
        shown = old.run(flow.nodes)
        assert hits(shown["stats"]) == 1
        assert shown["difference"]["difference"] <= 1e-4 * shown["difference"]["size"]
        assert shown["timeline"]["images"]
        assert shown["import"] == {"mine": "the other project"}
        log = old.log.read_text()
        assert log.count("Another project provides the module cache_dit") == 1
        assert log.count("install a C++ compiler or Triton") == 1
