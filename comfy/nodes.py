"""The nodes: one definition of each, from which both dialects and the files of texts are made."""

from __future__ import annotations

from dataclasses import replace

from .behaviour import (
    DEFAULT_INNER,
    accelerate,
    configure,
    control,
    show_details,
    show_statistics,
    show_timeline,
)
from .definitions import Input, Node, Output

BASIC, ADVANCED = "CacheDit/基础节点", "CacheDit/高级节点"
CATEGORY_NAMES = {"CacheDit": "CacheDit", "基础节点": "Basic", "高级节点": "Advanced"}


def _model(zh: str, en: str, *, optional: bool = False) -> Input:
    return Input(id="model", type="MODEL", label=("模型", "model"), tooltip=(zh, en), optional=optional)


def _choice(id_: str, label: str, choices: tuple[str, ...], zh: str, en: str) -> Input:
    """One of several names, the first unless told otherwise."""
    return Input(id=id_, type="COMBO", label=(label, id_), tooltip=(zh, en), choices=choices, default=choices[0])


def _number(id_: str, label: str, default: float, low: float, high: float, step: float, zh: str, en: str) -> Input:
    kind = "INT" if isinstance(default, int) else "FLOAT"
    return Input(id=id_, type=kind, label=(label, id_), tooltip=(zh, en), default=default, low=low, high=high, step=step)


def _switch(id_: str, label: str, default: bool, zh: str, en: str) -> Input:
    return Input(id=id_, type="BOOLEAN", label=(label, id_), tooltip=(zh, en), default=default)


def _further(each: Input) -> Input:
    """A further option of `enable_cache`, under its name there; left out by workflows that do not know it."""
    return replace(each, optional=True, advanced=True)


def _output(type_: str, zh: str, en: str, tooltip_zh: str, tooltip_en: str) -> Output:
    return Output(id=f"{type_.lower()}_out", type=type_, label=(zh, en), tooltip=(tooltip_zh, tooltip_en))


def _cached_model(zh: str, en: str) -> Output:
    return _output("MODEL", zh, en, "启用了缓存的模型，连接到采样器", "Cached; for the sampler")


def _statistics(zh: str, en: str) -> Output:
    return _output("STRING", zh, en, "统计文本", "The statistics as text")


_LOADED = _model(
    "要加速的模型，接在加载器（及 LoRA）之后；传入的模型不会被更改",
    "The model to accelerate, behind the loader (and LoRA); the model that comes in is never changed",
)
_TRIGGER = Input(
    id="trigger",
    type="*",
    label=("触发器", "trigger"),
    tooltip=(
        "连接采样器的输出（LATENT、IMAGE 等任意类型），使本节点在采样之后运行",
        "Connect what comes from the sampler (LATENT, IMAGE, any type), so that this node runs after it",
    ),
)
_OTHER = _model(
    "可选: 要查看的模型；不连接时显示最近一次采样的模型",
    "Optional: the model to show; left open, the one that sampled last",
    optional=True,
)
_BASIC_OPTIONS = (
    _choice(
        "strategy", "缓存策略", ("fixed", "dynamic", "adaptive"),
        "fixed: 固定间隔，最简单可靠；dynamic: 越往后跳得越多，适合步数多的采样；adaptive: 根据测得的误差自行调整",
        "fixed: at a fixed interval, the simplest and most reliable; dynamic: skips more the further the run, for long "
        "runs; adaptive: adjusts itself to the errors it measures",
    ),
    _number(
        "skip_interval", "跳步间隔", 2, 1, 10, 1,
        "每这么多步跳过一步；2 表示隔一步跳一步", "Of this many steps one is skipped; 2: every other step",
    ),
    _number(
        "warmup_steps", "预热步数", 3, 0, 20, 1,
        "采样开始时始终计算的步数", "Steps at the start of a sampling that always compute",
    ),
    _number(
        "noise_scale", "噪声缩放", 0.001, 0.0, 0.1, 0.001,
        "在重用缓存处加入的噪声（相对残差的比例）；推荐 0.001 到 0.01，0 表示不加",
        "Noise added where a cached result is reused, as a share of it; 0.001 to 0.01 recommended, 0: none",
    ),
    _switch("enable_debug", "调试模式", False, "每次调用在控制台输出一行", "Print one line on the console for each call"),
)  # fmt: skip
_MORE_OPTIONS = tuple(map(_further, (
    _choice(
        "inner", "内部编译器", ("auto", "eager", "inductor", "aot_eager"),
        f"编译改写后的图: auto 即 {DEFAULT_INNER}；eager 几乎不用等待；inductor 首次要等较久，之后每步更快",
        f"Compiles the rewritten graph. auto: {DEFAULT_INNER}; eager: hardly any wait; inductor: a longer first wait, "
        "then faster steps",
    ),
    _number(
        "target_speedup", "目标加速比", 0.0, 0.0, 10.0, 0.1,
        "adaptive: 缓存的块的计算量要减少到几分之一；0 表示由 tolerance 决定",
        "adaptive: by what factor the cached blocks' work is to fall; 0: tolerance decides",
    ),
    _number(
        "tolerance", "容差", 0.1, 0.001, 10.0, 0.01,
        "adaptive: 两次计算之间允许的相对变化；越大越快，误差也越大",
        "adaptive: how far the input of the cached blocks may move, relative to its size, between computed steps",
    ),
    _choice(
        "forecast", "预测方法", ("auto", "reuse", "taylor", "lagrange", "hermite", "adams_bashforth"),
        "被跳过的步如何预测残差；auto: adaptive 下用直线（lagrange），否则选择实测误差最小的方法",
        "How a skipped step predicts what the blocks would add; auto: a line (lagrange) with adaptive, else what erred least",
    ),
    Input(
        id="schedule", type="STRING", label=("计划表", "schedule"), default="",
        tooltip=(
            "由 0 和 1 组成，每步一位，1 表示计算；留空则由策略决定",
            "0s and 1s, one for each step, 1: compute; left empty the strategy decides",
        ),
    ),
    _number(
        "front_blocks", "前部块数", 1, 0, 64, 1,
        "开头始终计算的块数", "Blocks at the start of the model that always compute",
    ),
    _number(
        "back_blocks", "后部块数", 0, 0, 64, 1,
        "末尾始终计算的块数", "Blocks at the end of the model that always compute",
    ),
    _number(
        "start_percent", "开始位置", 0.0, 0.0, 1.0, 0.01,
        "只在采样的这一部分内跳过: 开始（0 到 1）", "Skip only within this part of a sampling: its start (0 to 1)",
    ),
    _number(
        "end_percent", "结束位置", 1.0, 0.0, 1.0, 0.01,
        "只在采样的这一部分内跳过: 结束（0 到 1）", "Skip only within this part of a sampling: its end (0 to 1)",
    ),
    _choice(
        "correction", "修正", ("auto", "on", "off"),
        "下一个计算步之后补正被跳过的步（采样器 euler、ddim、dpmpp_2m）；auto: 仅在 adaptive 策略下",
        "Put skipped steps right once the next step has computed (samplers euler, ddim, dpmpp_2m); auto: with adaptive alone",
    ),
)))  # fmt: skip

NODES = (
    Node(
        id="CacheDitAccelerate",
        name=("CacheDit 模型加速", "CacheDit Model Acceleration"),
        category=BASIC,
        about=(
            "用默认设置为扩散 transformer 启用缓存: 部分采样步直接预测中间块的结果，图片更快完成",
            "Caching with the defaults for diffusion transformers: at some steps the inner blocks are predicted instead of "
            "computed, so the picture is done sooner",
        ),
        inputs=(_LOADED,),
        outputs=(_cached_model("加速模型", "accelerated model"),),
        run=accelerate,
    ),
    Node(
        id="CacheDitStats",
        name=("CacheDit 统计信息", "CacheDit Statistics"),
        category=BASIC,
        about=(
            "显示最近一次采样的缓存统计: 调用、命中、平均计算时间、实测加速比",
            "The statistics of the last sampling: calls, hits, average compute time, measured speed-up",
        ),
        inputs=(_TRIGGER, _OTHER),
        outputs=(_statistics("统计信息", "statistics"),),
        run=show_statistics,
        shows=True,
    ),
    Node(
        id="CacheDitConfig",
        name=("CacheDit 高级配置", "CacheDit Advanced Config"),
        category=ADVANCED,
        about=("用自选的设置为模型启用缓存", "Caching with settings of your choice"),
        inputs=(_LOADED, *_BASIC_OPTIONS, *_MORE_OPTIONS),
        outputs=(_cached_model("配置模型", "configured model"),),
        run=configure,
    ),
    Node(
        id="CacheDitControl",
        name=("CacheDit 缓存控制", "CacheDit Cache Control"),
        category=ADVANCED,
        about=(
            "在工作流中开启或关闭缓存；关闭时保留上游的设置",
            "Turns caching on and off as the workflow runs; when off, the settings upstream are kept",
        ),
        inputs=(
            _model("上游的模型，缓存与否均可", "The model from upstream, cached or not"),
            _switch(
                "enable_cache", "是否启用缓存", True,
                "开: 使用上游的设置，上游没有缓存时使用默认设置；关: 本分支照常计算",
                "On: with the settings upstream, else with the defaults; off: this branch computes as usual",
            ),
        ),
        outputs=(_output("MODEL", "控制模型", "controlled model", "连接到采样器", "For the sampler"),),
        run=control,
    ),
    Node(
        id="CacheDitDetailedStats",
        name=("CacheDit 详细统计", "CacheDit Detailed Statistics"),
        category=ADVANCED,
        about=("显示所有模型的累计统计", "The statistics of all models since the server started"),
        inputs=(
            _TRIGGER,
            _switch(
                "show_model_details", "是否显示模型详情", True,
                "在全局统计之后列出每个模型", "List each model behind the global figures",
            ),
            _OTHER,
        ),
        outputs=(_statistics("详细统计", "detailed statistics"),),
        run=show_details,
        shows=True,
    ),
    Node(
        id="CacheDitTimeline",
        name=("CacheDit 时间线", "CacheDit Timeline"),
        category=ADVANCED,
        about=(
            "把最近一次采样画成图: 每步计算还是跳过、用时（毫秒）、测得的预测误差",
            "Draws the last sampling: which steps computed and which were skipped, their milliseconds, and the measured "
            "forecast error",
        ),
        inputs=(_TRIGGER, _OTHER),
        outputs=(_output("IMAGE", "时间线", "timeline", "时间线图片", "The timeline as an image"),),
        run=show_timeline,
        shows=True,
    ),
)
