"""Counters, the figures that follow from them, and the formats of the API document."""

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_dit.statistics import (
    CacheStats,
    Counters,
    format_details,
    format_summary,
    global_stats_dict,
    merge_stats,
    stats_from,
)

FIRST = "ModelPatcher_140234567890128"
SECOND = "ModelPatcher_140235567890128"


@pytest.fixture(autouse=True)
def _no_language_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHE_DIT_LANG", raising=False)


def counted(calls: int, hits: int, average: float, speedup: float = 2.0, **more: object) -> Counters:
    """Counters with these figures, where all calls were timed."""
    compute_seconds = average * (calls - hits)
    return Counters(
        calls=calls,
        hits=hits,
        compute_calls_timed=calls - hits,
        compute_seconds=compute_seconds,
        reuse_calls_timed=hits,
        reuse_seconds=calls * average / speedup - compute_seconds,
        **more,  # type: ignore[arg-type]
    )


def stats_of(counters: Counters, name: str = FIRST, strategy: str = "fixed", enabled: bool = True) -> CacheStats:
    return stats_from(counters, name=name, strategy=strategy, enabled=enabled)


def sample_models() -> list[CacheStats]:
    """The document's two models; its average of 0.145 s follows where four calls of the second one compiled."""
    second = counted(16, 8, 0.155, speedup=2.1)
    second.calls, second.compile_calls = 20, 4
    return [stats_of(counted(30, 12, 0.140, speedup=1.9)), stats_of(second, SECOND, "adaptive")]


SUMMARY_ZH = """\
缓存统计信息:
总 Forward 调用: 20
缓存命中: 8
缓存命中率: 40.0%
平均计算时间: 0.150秒
预期加速比: 2.0x"""

SUMMARY_EN = """\
Cache statistics:
Total Forward calls: 20
Cache hits: 8
Cache hit rate: 40.0%
Average compute time: 0.150 s
Expected speedup: 2.0x"""

DETAILS_ZH = """\
=== CacheDiT 详细统计 ===
全局统计:
  总 Forward 调用: 50
  总缓存命中: 20
  全局命中率: 40.0%
  平均计算时间: 0.145秒
  预期加速比: 2.0x
  活跃模型数: 2

模型详情:
  模型 ModelPatcher_140234...:
    调用次数: 30
    缓存命中: 12
    命中率: 40.0%
    平均耗时: 0.140s
    策略: fixed
    状态: 启用

  模型 ModelPatcher_140235...:
    调用次数: 20
    缓存命中: 8
    命中率: 40.0%
    平均耗时: 0.155s
    策略: adaptive
    状态: 启用"""

DETAILS_EN = """\
=== CacheDiT detailed statistics ===
Global statistics:
  Total Forward calls: 50
  Total cache hits: 20
  Global hit rate: 40.0%
  Average compute time: 0.145 s
  Expected speedup: 2.0x
  Active models: 2

Model details:
  Model ModelPatcher_140234...:
    Calls: 30
    Cache hits: 12
    Hit rate: 40.0%
    Average time: 0.140 s
    Strategy: fixed
    Status: enabled

  Model ModelPatcher_140235...:
    Calls: 20
    Cache hits: 8
    Hit rate: 40.0%
    Average time: 0.155 s
    Strategy: adaptive
    Status: enabled"""


def test_summary_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of(counted(20, 8, 0.150))
    assert format_summary(stats) == SUMMARY_ZH
    assert format_summary(stats, "en") == SUMMARY_EN
    monkeypatch.setenv("CACHE_DIT_LANG", "en")
    assert format_summary(stats) == SUMMARY_EN


def test_details_in_both_languages() -> None:
    assert format_details(sample_models()) == DETAILS_ZH
    assert format_details(sample_models(), "en") == DETAILS_EN


def test_details_without_models_are_the_global_part_alone() -> None:
    assert format_details(sample_models(), show_model_details=False) == DETAILS_ZH.split("\n\n", maxsplit=1)[0]


@pytest.mark.parametrize("show_model_details", [True, False])
def test_no_model_yet(show_model_details: bool) -> None:
    assert format_details([], show_model_details=show_model_details) == "暂无已加速的模型"
    assert format_details([], "en", show_model_details) == "No accelerated models yet"


def test_a_disabled_model_is_shown_and_does_not_count_as_active() -> None:
    models = [*sample_models(), stats_of(counted(10, 4, 0.15), "Flux_1234567", enabled=False)]
    details = format_details(models)
    assert "  活跃模型数: 2\n" in details
    assert "  总 Forward 调用: 60\n" in details
    assert details.endswith("  模型 Flux_123456...:\n" + details.rpartition("...:\n")[2])
    assert details.endswith("    状态: 禁用")
    assert format_details(models, "en").endswith("    Status: disabled")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("Flux_1234567", "Flux_123456..."), ("Flux_123456", "Flux_123456"), ("My_2_Net_12345678", "My_2_Net_123456...")],
)
def test_an_id_is_cut_to_six_digits(name: str, shown: str) -> None:
    assert f"  模型 {shown}:\n" in format_details([stats_of(Counters(), name)])


def test_dictionary() -> None:
    models = [stats_of(counted(30, 12, 0.140)), stats_of(counted(20, 8, 0.155), SECOND, "adaptive", enabled=False)]
    assert global_stats_dict(models) == {
        "total_calls": 50,
        "total_cache_hits": 20,
        "global_hit_rate": 40.0,
        "average_compute_time": pytest.approx(0.146),
        "expected_speedup": pytest.approx(2.0),
        "active_models": 1,
        "model_details": {
            FIRST: {
                "calls": 30,
                "hits": 12,
                "hit_rate": 40.0,
                "avg_time": pytest.approx(0.140),
                "strategy": "fixed",
                "enabled": True,
            },
            SECOND: {
                "calls": 20,
                "hits": 8,
                "hit_rate": 40.0,
                "avg_time": pytest.approx(0.155),
                "strategy": "adaptive",
                "enabled": False,
            },
        },
    }


def test_dictionary_keeps_the_order_of_the_document_and_holds_none_where_nothing_was_measured() -> None:
    empty = global_stats_dict([])
    assert list(empty.items()) == [
        ("total_calls", 0),
        ("total_cache_hits", 0),
        ("global_hit_rate", 0.0),
        ("average_compute_time", None),
        ("expected_speedup", None),
        ("active_models", 0),
        ("model_details", {}),
    ]


def test_times_that_are_not_there_yet_and_times_that_nobody_takes() -> None:
    waiting = format_summary(stats_of(Counters(calls=1, compile_calls=1)))
    assert waiting.endswith("缓存命中率: 0.0%\n平均计算时间: 未测量\n预期加速比: 未测量")
    untimed = stats_of(Counters(timed=False, calls=4, hits=1))
    assert format_summary(untimed).endswith("缓存命中率: 25.0%\n平均计算时间: 未统计\n预期加速比: 未统计")
    assert format_summary(untimed, "en").endswith("Average compute time: not measured\nExpected speedup: not measured")
    assert "    平均耗时: 未统计\n" in format_details([untimed])
    both = format_details([untimed, stats_of(Counters(), SECOND)])
    assert "  平均计算时间: 未测量\n" in both
    assert "    平均耗时: 未测量\n" in both and "    平均耗时: 未统计\n" in both


def test_the_speedup_waits_for_both_kinds_of_call_and_leaves_compiling_calls_out() -> None:
    counters = Counters(calls=3, compile_calls=1, compute_calls_timed=2, compute_seconds=0.4)
    assert stats_of(counters).expected_speedup is None
    assert stats_of(counters).average_compute_time == pytest.approx(0.2)
    counters.calls, counters.hits = 6, 3
    counters.compile_calls, counters.compile_seconds = 2, 60.0
    counters.reuse_calls_timed, counters.reuse_seconds = 2, 0.1
    stats = stats_of(counters)
    assert stats.expected_speedup == pytest.approx(4 * 0.2 / 0.5)
    assert stats.average_reuse_time == pytest.approx(0.05)
    assert (stats.computed, stats.hit_rate, stats.compile_seconds) == (3, 50.0, 60.0)


def test_hits_alone_give_no_speedup() -> None:
    assert stats_of(Counters(calls=2, hits=2, reuse_calls_timed=2, reuse_seconds=0.1)).expected_speedup is None


def test_the_sum_compares_times_so_that_a_slow_model_without_hits_gains_nothing() -> None:
    slow = stats_of(Counters(calls=10, compute_calls_timed=10, compute_seconds=10.0), "Slow_1234567")
    fast = stats_of(counted(20, 10, 0.01, speedup=1.5), "Fast_1234567", "dynamic", enabled=False)
    both = merge_stats([slow, fast], "Pipeline_1234567")
    assert (both.name, both.strategy, both.enabled) == ("Pipeline_1234567", "fixed, dynamic", True)
    assert (both.calls, both.hits, both.computed) == (30, 10, 20)
    assert both.average_compute_time == pytest.approx(10.1 / 20)
    assert both.expected_speedup == pytest.approx(10.2 / (10.0 + 0.2 / 1.5))


def test_the_sum_of_one_and_the_sum_of_sums() -> None:
    first, second = sample_models()
    assert merge_stats([first], FIRST) == first
    stepwise = merge_stats([merge_stats([first, second], "x"), first], "x")
    at_once = merge_stats([first, second, first], "x")
    assert stepwise.expected_speedup == pytest.approx(at_once.expected_speedup)
    assert stepwise.average_compute_time == pytest.approx(at_once.average_compute_time)
    assert merge_stats([], "x").calls == 0 and not merge_stats([], "x").enabled


def test_refusals_and_forecast_errors() -> None:
    counters = Counters()
    for reason in ("first", "first", "grad"):
        counters.refuse(reason)
    for error in (0.1, 0.3):
        counters.record_forecast_error(error)
    stats = stats_of(counters)
    assert stats.refused == {"first": 2, "grad": 1}
    assert stats.forecast_error == 0.3
    assert stats.mean_forecast_error == pytest.approx(0.2)
    other = Counters()
    other.refuse("grad")
    other.record_forecast_error(0.05)
    both = merge_stats([stats, stats_of(other), stats_of(Counters())], "x")
    assert both.refused == {"first": 2, "grad": 2}
    assert both.forecast_error == 0.3
    assert both.mean_forecast_error == pytest.approx(0.45 / 3)


def test_statistics_are_a_snapshot_that_can_be_copied_and_pickled() -> None:
    counters = counted(20, 8, 0.15)
    counters.refuse("first")
    stats = stats_from(counters, name=FIRST, strategy="fixed", enabled=True, cache_bytes=4096)
    counters.refuse("first")
    counters.calls += 1
    assert (stats.calls, stats.refused, stats.cache_bytes) == (20, {"first": 1}, 4096)
    assert copy.deepcopy(stats) == stats and pickle.loads(pickle.dumps(stats)) == stats
    assert dataclasses.asdict(stats)["hit_rate"] == 40.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.calls = 0  # type: ignore[misc]


@pytest.mark.parametrize("timed", [True, False])
def test_reset_sets_everything_to_zero_but_keeps_the_setting(timed: bool) -> None:
    counters = counted(20, 8, 0.15, timed=timed, steps=10, runs=1, nonfinite=2, compiles=2, compile_seconds=9.0)
    counters.refuse("first")
    counters.record_forecast_error(0.1)
    counters.reset()
    assert counters == Counters(timed=timed)
    assert counters.refused is not Counters().refused


times = st.floats(1e-6, 1e3)
counts = st.integers(0, 1000)


@st.composite
def counters_drawn(draw: st.DrawFn) -> Counters:
    computed, reused, compiling = draw(counts), draw(counts), draw(st.integers(0, 3))
    return Counters(
        timed=draw(st.booleans()),
        calls=computed + reused + compiling,
        hits=reused,
        compute_calls_timed=computed,
        compute_seconds=computed * draw(times),
        reuse_calls_timed=reused,
        reuse_seconds=reused * draw(times),
        compile_calls=compiling,
    )


@settings(deadline=None)
@given(st.lists(counters_drawn(), max_size=4))
def test_any_counters_give_finite_figures_and_texts(drawn: list[Counters]) -> None:
    models = [stats_of(counters, f"Model_{index}") for index, counters in enumerate(drawn)]
    total = merge_stats(models, "all")
    assert 0.0 <= total.hit_rate <= 100.0
    assert (total.expected_speedup is None) == (not total.compute_calls_timed or not total.reuse_calls_timed)
    speedups = [stats.expected_speedup for stats in models]
    if models and total.expected_speedup is not None:
        known = [speedup if speedup is not None else 1.0 for speedup in speedups]
        assert min(known) * (1 - 1e-9) <= total.expected_speedup <= max(known) * (1 + 1e-9)
    for language in ("zh", "en"):
        lines = format_details(models, language).splitlines()
        assert len(lines) == (1 if not models else 8 + 2 + 7 * len(models) + len(models) - 1)
        assert len(format_summary(total, language).splitlines()) == 6
