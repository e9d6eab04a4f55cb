"""Every text that a user of the package reads, in Chinese (the default) and in English.

A new text is one entry of `TEXTS`: its key, the Chinese and the English form with the same `str.format` fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

LANGUAGES: Final = ("zh", "en")
LANGUAGE_VARIABLE: Final = "CACHE_DIT_LANG"

TEXTS: Final[dict[str, tuple[str, str]]] = {
    # Errors and warnings that the API document names, each with the remedy it gives.
    "no_transformer": (
        "❌ 未能找到 transformer 组件\n解决方案: 检查模型类型，确保使用支持的模型架构",
        "❌ No transformer component found\nRemedy: check the model's type and use a supported architecture",
    ),
    "already_enabled": (
        "⚠ 模型已经应用过缓存\n解决方案: 先调用 `disable_cache()` 再重新配置（每个模型实例只能应用一次缓存）",
        "⚠ The model is cached already\n"
        "Remedy: call `disable_cache()` first, then configure it anew (one cache per model instance)",
    ),
    "import_failed": (
        "解决方案: 确保插件正确安装到 ComfyUI 的 custom_nodes 目录",
        "Remedy: install the plugin in ComfyUI's custom_nodes folder",
    ),
    # Statistics.
    "summary": (
        "缓存统计信息:\n"
        "总 Forward 调用: {calls}\n"
        "缓存命中: {hits}\n"
        "缓存命中率: {hit_rate:.1f}%\n"
        "平均计算时间: {average}\n"
        "预期加速比: {speedup}",
        "Cache statistics:\n"
        "Total Forward calls: {calls}\n"
        "Cache hits: {hits}\n"
        "Cache hit rate: {hit_rate:.1f}%\n"
        "Average compute time: {average}\n"
        "Expected speedup: {speedup}",
    ),
    "details": (
        "=== CacheDiT 详细统计 ===\n"
        "全局统计:\n"
        "  总 Forward 调用: {calls}\n"
        "  总缓存命中: {hits}\n"
        "  全局命中率: {hit_rate:.1f}%\n"
        "  平均计算时间: {average}\n"
        "  预期加速比: {speedup}\n"
        "  活跃模型数: {active}",
        "=== CacheDiT detailed statistics ===\n"
        "Global statistics:\n"
        "  Total Forward calls: {calls}\n"
        "  Total cache hits: {hits}\n"
        "  Global hit rate: {hit_rate:.1f}%\n"
        "  Average compute time: {average}\n"
        "  Expected speedup: {speedup}\n"
        "  Active models: {active}",
    ),
    "details_models": ("模型详情:", "Model details:"),
    "details_model": (
        "  模型 {name}:\n"
        "    调用次数: {calls}\n"
        "    缓存命中: {hits}\n"
        "    命中率: {hit_rate:.1f}%\n"
        "    平均耗时: {average}\n"
        "    策略: {strategy}\n"
        "    状态: {status}",
        "  Model {name}:\n"
        "    Calls: {calls}\n"
        "    Cache hits: {hits}\n"
        "    Hit rate: {hit_rate:.1f}%\n"
        "    Average time: {average}\n"
        "    Strategy: {strategy}\n"
        "    Status: {status}",
    ),
    "seconds": ("{seconds:.3f}秒", "{seconds:.3f} s"),
    "seconds_short": ("{seconds:.3f}s", "{seconds:.3f} s"),
    "factor": ("{factor:.1f}x", "{factor:.1f}x"),
    "enabled": ("启用", "enabled"),
    "disabled": ("禁用", "disabled"),
    "not_measured": ("未测量", "not measured"),
    "not_tracked": ("未统计", "not measured"),
    "no_models": ("暂无已加速的模型", "No accelerated models yet"),
    "never_enabled": (
        "该模型从未启用缓存，没有统计信息；请先调用 `enable_cache(model)`",
        "Caching was never enabled for this model, so it has no statistics; call `enable_cache(model)` first",
    ),
    "nothing_to_disable": (
        "该模型没有启用缓存，`disable_cache()` 未做任何更改",
        "Caching is not enabled for this model; `disable_cache()` changed nothing",
    ),
    "several_callers": (
        "同一轮采样中未命名的调用来自多个线程或 asyncio 任务，无法区分属于哪次生成；每次换手都会重新计算\n"
        "解决方案: 用 `cache_dit.context(model, 名称)` 为每次生成命名",
        "Unnamed calls of one run came from several threads or asyncio tasks, so it cannot be told which generation each "
        "belongs to: every change of hands computes anew\n"
        "Remedy: name each generation with `cache_dit.context(model, name)`",
    ),
    "torch_moved": (
        "torch {version} 中没有 cache_dit 所依赖的内部名称: {names}\n解决方案: 使用经过测试的 torch 版本: {tested}",
        "torch {version} lacks internal names that cache_dit rests on: {names}\nRemedy: use a version of torch that was "
        "tested: {tested}",
    ),
    "displaced": (
        "`model.compile()` 在 enable_cache 之后被调用并取代了缓存，模型正在无缓存运行\n"
        "解决方案: 再调用一次 `enable_cache(model)`；enable_cache 会自行编译模型，无需再调用 compile",
        "`model.compile()` was called after enable_cache and took its place: the model runs without caching\n"
        "Remedy: call `enable_cache(model)` once more; it compiles the model itself, so no other compile is needed",
    ),
    "compiles_itself": (
        "enable_cache 会自行编译模型；请直接调用模型，不要再在外面加 torch.compile(..., fullgraph=True)",
        "enable_cache compiles the model itself; call the model as it is, without torch.compile(..., fullgraph=True) around it",
    ),
    # Compilation.
    "compiling": ("正在编译，仅首次调用需要等待…", "compiling, first call only…"),
    "capturing_more": (
        "各个块被拆到了不同的图中，将在捕获标量读取和动态大小的情况下重新追踪一次",
        "the blocks came apart into several graphs; tracing once more with scalar reads and data-dependent sizes captured",
    ),
    "blockwise": (
        "各个块无法追踪到同一个图中，改为逐块缓存",
        "the blocks cannot be traced into one graph; each block caches its own part instead",
    ),
    "explain_blockwise": (
        "逐块缓存: 各个块无法追踪到同一个图中，因此每个块各存一份残差，块与块之间以 eager 方式运行。图中断的原因: {breaks}",
        "cached block by block: the blocks cannot be traced into one graph, so each block keeps a residual of its own and what "
        "lies between them runs in eager. Graph breaks: {breaks}",
    ),
    "few_steps": (
        "本次采样只有 {steps} 步，全部落在 {warmup} 步预热之内，因此不会跳过任何一步。"
        "步数很少的模型相邻两步差别很大，跳过往往看得出来；仍要跳过时请设置 warmup_steps=1",
        "the run has {steps} steps, all within the warm-up of {warmup}: nothing is skipped. Models of few steps change much "
        "from one to the next, so skipping shows; to skip all the same set warmup_steps=1",
    ),
    "few_steps_skipped": (
        "本次采样只有 {steps} 步，其中第 {skipped} 步会被跳过。步数很少的模型相邻两步差别很大，跳过往往看得出来\n"
        "解决方案: 请对比有无缓存的图片；不想跳过时请设置 warmup_steps={steps}",
        "the run has {steps} steps, and will skip these: {skipped}. Models of few steps change much from one to the next, "
        "so skipping may show\n"
        "Remedy: compare the pictures with and without; warmup_steps={steps} skips none",
    ),
    "context_recompiles": (
        "上下文 {context} 每次调用都会重新编译（其中有对象每步都被重新创建），之后不再编译和缓存它；其他上下文照常缓存",
        "the context {context} compiles at every call, since something in it is made anew each time: from now on it runs "
        "uncompiled and uncached; the other contexts are cached as before",
    ),
    "context_apart": (
        "上下文 {context} 无法在一张图中编译（例如引导方式临时改变了某些层），之后不编译也不缓存它；其他上下文照常缓存",
        "the context {context} does not compile into one graph (its guidance changes layers for the time of the call): from "
        "now on it runs uncompiled and uncached; the other contexts are cached as before",
    ),
    "side_list": (
        "只有旁支列表 {cached} 被缓存，主要的块列表 {wanted} 被拆到了不同的图中，因此未缓存；图中断的原因: {breaks}",
        "only a side list is cached ({cached}): the blocks of {wanted} came apart into several graphs and are not; "
        "graph breaks: {breaks}",
    ),
    "compiled": ("编译完成，用时 {seconds:.1f} 秒", "compiled in {seconds:.1f} s"),
    "recompiling": ("正在重新编译，发生变化的是: {what}", "recompiling; what changed: {what}"),
    # A call under debug=True.
    "debug_line": (
        "轮次 {run} 步 {step} 上下文 {context}: {decision}（{reason}），{milliseconds:.1f} 毫秒，预测误差 {error}",
        "run {run} step {step} context {context}: {decision} ({reason}), {milliseconds:.1f} ms, forecast error {error}",
    ),
    "skipped": ("跳过", "skipped"),
    "computed": ("计算", "computed"),
    # Said once for each model while it runs.
    "no_region": (
        "❌ 未能找到 transformer 组件；模型照常运行，未使用缓存。原因: {details}\n"
        "解决方案: 检查模型类型，确保使用支持的模型架构",
        "❌ No transformer component found; the model runs as usual, without the cache. Why: {details}\n"
        "Remedy: check the model's type and use a supported architecture, or name the part to cache with region=",
    ),
    "grad_mode": (
        "梯度模式下不使用缓存，所有调用都照常计算\n解决方案: 推理时使用 torch.no_grad() 或 torch.inference_mode()",
        "No caching in grad mode: every call computes\nRemedy: call the model under torch.no_grad() or torch.inference_mode()",
    ),
    "not_compiled": (
        "模型没有被编译，因此未使用缓存\n"
        "解决方案: 可能已达到 torch 的重新编译上限（torch._dynamo.config.recompile_limit）或编译被关闭；"
        "提高该上限或调用 torch._dynamo.reset()",
        "The model was not compiled, so nothing is cached\n"
        "Remedy: torch's recompile limit was probably reached (torch._dynamo.config.recompile_limit), or compiling is "
        "disabled; raise the limit or call torch._dynamo.reset()",
    ),
    "transform": (
        "调用处于 {what} 之中，照常计算，不使用缓存\n解决方案: 结果正确，无需处理；要使用缓存请在其外调用模型",
        "A call under {what} computes as usual, without the cache\n"
        "Remedy: the result is right; call the model outside of it where it is to be cached",
    ),
    "no_timestep": (
        "模型输入中找不到时间步，无法区分各次采样，因此每一步都照常计算\n"
        "解决方案: 每次采样前调用 cache_dit.new_run(model)，正负提示词分开调用时再用 cache_dit.context(model, name)",
        "No timestep among the model's inputs: runs cannot be told apart, so every step computes\n"
        "Remedy: call cache_dit.new_run(model) before each sampling, and cache_dit.context(model, name) around separate "
        "prompt calls",
    ),
    "nonfinite": (
        "缓存区域的结果含有 NaN 或无穷大: 不会存储，也不会用于预测\n解决方案: 检查输入、权重和数据类型（fp16 容易溢出）",
        "The cached blocks gave NaN or infinity: not stored, and never predicted from\n"
        "Remedy: check the inputs, the weights and the dtype (fp16 overflows easily)",
    ),
    "no_folder": (
        "torch.compile 没有可写的位置存放编译结果（{details}）；模型照常运行，未使用缓存\n"
        "解决方案: 腾出磁盘空间，或让环境变量 TORCHINDUCTOR_CACHE_DIR 指向可写的文件夹",
        "torch.compile has no place to write what it compiles to ({details}); the model runs as usual, without the cache\n"
        "Remedy: free the disk, or set the environment variable TORCHINDUCTOR_CACHE_DIR to a folder that can be written to",
    ),
    "out_of_memory": (
        "没有足够的内存存放缓存，本模型照常计算\n"
        "解决方案: 使用 residual_dtype=torch.bfloat16 或 torch.int8、residual_device='cpu' 或 forecast='reuse'"
        "（adaptive 下还需 correction=False）",
        "Not enough memory for the cache: the model computes as usual\n"
        "Remedy: residual_dtype=torch.bfloat16 or torch.int8, residual_device='cpu' or forecast='reuse' (under "
        "adaptive with correction=False)",
    ),
    "control_ignored": (
        "从外部进入被缓存块的输入（例如 ControlNet 的输出）在跳过的步上改变了 {moved:.1f}%，这些步听不到这种变化\n"
        "解决方案: 需要时使用 control_refresh=True: 变化超过 10% 的步会重新计算",
        "What enters the cached blocks from outside (such as a control network's output) moved by {moved:.1f} % at a skipped "
        "step, which does not hear it\n"
        "Remedy: where that matters, control_refresh=True computes the steps at which it moved by more than 10 %",
    ),
    "percent_ignored": (
        "不知道本次采样的总步数，start_percent 和 end_percent 不起作用\n解决方案: 调用 cache_dit.new_run(model, num_steps=...)",
        "The number of steps of this run is not known: start_percent and end_percent are ignored\n"
        "Remedy: cache_dit.new_run(model, num_steps=...)",
    ),
    "lowering_replaced": (
        "lowering='{wanted}' 不适用于此模型: {why}，改用 '{used}'",
        "lowering='{wanted}' does not suit this model: {why}; '{used}' is used instead",
    ),
    "whole_nothing_alike": ("没有两个 block 的计算图相同", "no two of its blocks have the same graph"),
    "whole_no_blocks": ("region 以模块名给出，没有标出 block", "the region was given by module names, so no blocks are marked"),
    "whole_calls_modules": ("图中含有未展开的模块调用", "its graph calls modules that were not traced into"),
    "whole_sizes_unknown": ("block 之间的张量大小取决于数据", "tensors whose sizes depend on data pass between its blocks"),
    "whole_no_example": ("block 之间传递的值类型未知", "values of unknown type pass between its blocks"),
    "whole_distributed": ("图中含有 DTensor", "its graph holds distributed tensors (DTensor)"),
    "whole_blockwise": ("它按 block 逐个缓存，各自编译", "it is cached block by block, each compiled by itself already"),
    "correction_unknown": (
        "本次采样的噪声水平、求解器或预测类型未知（或求解器带随机噪声），已跳过的步骤不会被修正\n"
        "解决方案: 调用 cache_dit.new_run(model, sigmas=..., solver=..., prediction='flow')，求解器可为 {solvers}",
        "Noise levels, solver or prediction type of this run are not known, or its solver draws noise: skipped steps are "
        "not corrected\n"
        "Remedy: cache_dit.new_run(model, sigmas=..., solver=..., prediction='flow'), with one of the solvers {solvers}",
    ),
    "correction_memory": (
        "模型的输入太大，无法保留到下一步，已跳过的步骤不会被修正\n解决方案: 不需要修正时使用 correction=False",
        "The model's inputs are too large to be kept until the next step: skipped steps are not corrected\n"
        "Remedy: correction=False says that none is wanted",
    ),
    "correction_repeats": (
        "模型在缓存的块之外使用随机数，或修改自身的缓冲区，不能为修正再次运行，已跳过的步骤不会被修正\n"
        "解决方案: 不需要修正时使用 correction=False",
        "Outside of its cached blocks the model draws random numbers or writes to its own buffers, so that nothing can be run "
        "once more: skipped steps are not corrected\n"
        "Remedy: correction=False says that none is wanted",
    ),
    "correction_times": (
        "模型的时间步与给出的 sigmas 不一致，本次采样中已跳过的步骤不会被修正\n"
        "解决方案: 向 cache_dit.new_run 传入本次采样实际使用的 sigmas",
        "The model's timesteps do not go with the sigmas that were given: skipped steps of this run are not corrected\n"
        "Remedy: give cache_dit.new_run the sigmas that the run uses",
    ),
    "correction_outputs": (
        "模型的输出不是单个图的单个张量，已跳过的步骤不会被修正\n解决方案: 不需要修正时使用 correction=False",
        "The model's output is not the only tensor of one graph: skipped steps are not corrected\n"
        "Remedy: correction=False says that none is wanted",
    ),
    "inner_failed": (
        "内部编译器 {inner} 失败（{why}）；图将以 eager 方式运行，缓存照常工作\n"
        "解决方案: 安装 C++ 编译器或 Triton，或使用 inner='eager'",
        "The inner compiler {inner} failed ({why}); the graph runs in eager mode, still cached\n"
        "Remedy: install a C++ compiler or Triton, or use inner='eager'",
    ),
    # ComfyUI.
    "comfy_run": (
        "采样完成: 跳过 {skipped}/{steps} 步，实测加速 {speedup}",
        "sampling done: skipped {skipped} of {steps} steps, measured speed-up {speedup}",
    ),
    "comfy_run_off": (
        "采样完成: {steps} 步，缓存已关闭",
        "sampling done: {steps} steps, the cache is off",
    ),
    # The same as without the prefix, with remedies that a workflow has.
    "comfy_control_ignored": (
        "从外部进入被缓存块的输入（例如 ControlNet 的输出）在跳过的步上改变了 {moved:.1f}%，这些步听不到这种变化\n"
        "解决方案: 需要时让这些步照常计算: 用 CacheDit 高级配置 的计划表、开始位置或结束位置",
        "What enters the cached blocks from outside (such as a control network's output) moved by {moved:.1f} % at a skipped "
        "step, which does not hear it\n"
        "Remedy: where that matters, let those steps compute: schedule, start_percent or end_percent of CacheDit Advanced "
        "Config",
    ),
    "comfy_out_of_memory": (
        "没有足够的内存存放缓存，本模型照常计算\n"
        "解决方案: 在 CacheDit 高级配置 中把预测方法设为 reuse（adaptive 下还需把修正设为 off），或减小图片或批量",
        "Not enough memory for the cache: the model computes as usual\n"
        "Remedy: forecast reuse in CacheDit Advanced Config (under adaptive with correction off too), or a smaller picture or "
        "batch",
    ),
    "comfy_forward_replaced": (
        "另一个节点包替换了 {what} 的前向函数，因此本次未使用缓存\n解决方案: 移除该节点，或将其放在 CacheDiT 节点之后",
        "Another node pack has replaced the forward function of {what}, so nothing is cached\n"
        "Remedy: remove that node, or place it behind the CacheDiT node",
    ),
    "comfy_compiled_elsewhere": (
        "工作流中还有另一个 torch.compile 节点。CacheDiT 自己编译模型，因此本次采样不使用该节点的编译结果（不会重复编译）\n"
        "解决方案: 移除该节点；内部编译器由 CacheDit 高级配置 的 inner 选择",
        "Another node of this workflow compiles the model with torch.compile. CacheDiT compiles it itself, so that node's "
        "compilation is left out of this sampling: nothing is compiled twice\n"
        "Remedy: remove that node; inner of CacheDit Advanced Config chooses the compiler",
    ),
    "comfy_correction_unknown": (
        "本次采样中已跳过的步骤不会被修正: 修正适用于采样器 euler、ddim 和 dpmpp_2m（不带 s_churn），且引导未被其他节点改写、"
        "各步使用相同的条件\n解决方案: 改用上述采样器，或将 correction 设为 auto",
        "skipped steps are not corrected in this sampling: that is for the samplers euler, ddim and dpmpp_2m without s_churn, "
        "where no other node changes the guidance and every step has the same conditions\n"
        "Remedy: one of these samplers, or correction: auto",
    ),
    "comfy_not_reached": (
        "{what} 的前向函数没有经过 ComfyUI 的包装器，本次采样未使用缓存；从下一次采样起改用另一种方式",
        "The calls of {what} did not go through ComfyUI's wrappers, so this sampling was not cached; "
        "from the next one on they are reached in another way",
    ),
    "comfy_progress": ("第 {step}/{steps} 步，已跳过 {skipped}", "step {step} of {steps}, skipped {skipped}"),
    "comfy_compiling": (
        "正在编译，仅首次需要等待（{seconds:.0f} 秒）",
        "compiling, first time only ({seconds:.0f} s)",
    ),
    "comfy_recompiling": (
        "正在重新编译（{seconds:.0f} 秒），发生变化的是: {what}",
        "compiling again ({seconds:.0f} s); what changed: {what}",
    ),
    "comfy_ready": ("已启用缓存，等待采样", "caching is on; waiting for a sampling"),
    "comfy_switched_on": ("缓存已开启", "the cache is on"),
    "comfy_switched_off": ("缓存已关闭，本分支照常计算", "the cache is off: this branch computes as usual"),
    "comfy_kept_first": ("前一个节点的设置继续有效", "the settings of the node before it stay in force"),
    "comfy_no_run": ("尚未采样", "no sampling yet"),
    "comfy_sampler_cached": (
        "（采样器的结果来自 ComfyUI 的缓存，数字是上一次采样的）",
        "(the sampler's result came from ComfyUI's cache; the figures are those of the sampling before)",
    ),
    "comfy_reload_failed": (
        "该模型无法在关闭动态显存的情况下重新载入，因此照常使用；如果编译失败，请用 --disable-dynamic-vram 启动 ComfyUI",
        "This model cannot be loaded again without dynamic VRAM, so it is used as it is; if compiling fails, start ComfyUI "
        "with --disable-dynamic-vram",
    ),
    "comfy_timeline": (
        "步数 {steps}，跳过 {skipped}，实测加速 {speedup}",
        "steps {steps}, skipped {skipped}, measured speed-up {speedup}",
    ),
    "target_speedup_unreachable": (
        "max_consecutive_hits 太小，达不到 target_speedup\n解决方案: 调大 max_consecutive_hits 或降低 target_speedup",
        "max_consecutive_hits is too low for target_speedup to be reached\n"
        "Remedy: raise max_consecutive_hits or lower target_speedup",
    ),
    "calibration_unused": (
        "calibration 只在 strategy='adaptive' 且给出 target_speedup 时起作用，目前被忽略",
        "calibration works under strategy='adaptive' with a target_speedup alone and is ignored",
    ),
    "calibration_steps": (
        "calibration 是为 {wanted} 步的采样测量的，本次采样有 {steps} 步，因此按噪声水平放置\n"
        "解决方案: 用同样步数重新 calibrate",
        "calibration was measured for runs of {wanted} steps and this one has {steps}: steps are placed by noise level\n"
        "Remedy: calibrate with as many steps",
    ),
    "calibration_structure": (
        "calibration 是为其他结构测量的（缓存的块不同），因此被忽略\n解决方案: 用相同的模型和选项重新 calibrate",
        "calibration was measured for another structure (other blocks are cached) and is ignored\n"
        "Remedy: calibrate this model with these options",
    ),
    "calibrate_one": (
        "calibrate 需要只有一个去噪模型的对象\n解决方案: 分别传入每个 transformer",
        "calibrate takes one denoiser\nRemedy: give it each transformer by itself",
    ),
    "calibrate_nothing": (
        "没有任何块被缓存，无法 calibrate\n解决方案: cache_dit.explain(model) 说明原因",
        "nothing is cached in this model, so there is nothing to measure\nRemedy: cache_dit.explain(model) says why",
    ),
    "calibrate_run": (
        "calibrate 需要恰好一次至少 3 步的采样，得到 {runs} 次采样、{steps} 步\n"
        "解决方案: run 只做一次采样，使用 torch.no_grad()",
        "calibrate wants one run of at least 3 steps and got {runs} runs, {steps} steps\n"
        "Remedy: let run make one sampling, under torch.no_grad()",
    ),
    "calibrate_still": (
        "缓存的块在整个采样中没有变化，无法 calibrate",
        "what the cached blocks add did not change over the run: there is nothing to go by",
    ),
    "target_speedup_unused": (
        "target_speedup 只在 strategy='adaptive' 下起作用，目前被忽略\n解决方案: 使用 strategy='adaptive'",
        "target_speedup works under strategy='adaptive' alone and is ignored\nRemedy: use strategy='adaptive'",
    ),
    "other_project": (
        "同时安装了另一个项目 cache-dit {version}，它与本项目的导入名相同，只有一个能被导入\n"
        "解决方案: pip uninstall cache-dit，或把两者装在不同的环境中",
        "Another project, cache-dit {version}, is installed too. It has the same import name, so only one can be imported\n"
        "Remedy: pip uninstall cache-dit, or keep the two in different environments",
    ),
    # Why a graph has no cached region: the text behind "Why:" above and in explain.
    "refusal_no_blocks": (
        "图中没有重复的模块（图可能只含一个块，例如使用了 compile_repeated_blocks；请编译整个模型）",
        "the graph holds no repeated modules (or one block alone, as compile_repeated_blocks makes it: "
        "compile the whole model)",
    ),
    "refusal_nothing_left": (
        "front_blocks 和 back_blocks 没有留下可跳过的块（{detail}）；请减小它们",
        "front_blocks and back_blocks leave no block to skip ({detail}); lower them",
    ),
    "refusal_region_not_found": (
        "region 指定的模块 {detail} 不在图中",
        "the module {detail} that region names did not run in this graph",
    ),
    "refusal_region_backwards": (
        "region={detail}: 第二个模块在第一个之前运行",
        "region={detail}: the second module runs before the first",
    ),
    "refusal_random": (
        "这些块使用了随机数（{detail}），跳过会改变您的随机状态；请调用 model.eval()",
        "the blocks draw random numbers ({detail}), and skipping them would move your random state; call model.eval()",
    ),
    "refusal_writes_outside": (
        "这些块原地修改了外部的张量（{detail}），跳过会丢失该修改；请让各块返回新的张量，或用 region= 指定其他部分",
        "the blocks write in place to a tensor that lives outside ({detail}), and skipping them would lose that; let the "
        "blocks return new tensors, or name another part with region=",
    ),
    "refusal_cuts_context": (
        "缓存区域的边界切断了 autocast 等上下文（{detail}）",
        "the border of the region would cut an autocast or vmap context ({detail})",
    ),
    "refusal_not_a_tensor": (
        "有非张量的值离开缓存区域（{detail}）",
        "a value that is no tensor leaves the region ({detail})",
    ),
    "refusal_nothing_leaves": ("缓存区域没有输出", "nothing leaves the region"),
    "refusal_sizes_unknown": (
        "输出的大小取决于数据，调用前无法得知",
        "the sizes of its outputs depend on data and are not known before the call",
    ),
    "refusal_distributed_tensor": (
        "离开缓存区域的 DTensor 与进入时的切分方式不同；解决方案: 让各块保持切分方式，或返回本地张量（use_local_output=True）",
        "a DTensor leaves the region split otherwise than one enters; remedy: let the blocks keep its placements, or return "
        "local tensors (use_local_output=True)",
    ),
    "refusal_grad_mode": ("在梯度模式下追踪", "traced in grad mode"),
    "refusal_other": ("{reason} {detail}", "{reason} {detail}"),
    # Short names of the reasons to compute, for counts.
    "count_first_call": ("本轮首次调用", "first call of a run"),
    "count_nothing_stored": ("没有可用的缓存", "nothing valid stored"),
    "count_shape_changed": ("形状或图改变", "shape or graph changed"),
    "count_control_moved": ("外部控制输入改变", "what enters the blocks from outside moved"),
    "count_eager_context": ("该上下文不编译", "a context that is not compiled"),
    "count_weights_changed": ("权重改变", "weights changed"),
    "count_pattern_broken": ("调用规律被打破", "pattern of calls broken"),
    "count_unconfirmed": ("未命名上下文的规律尚未确认", "pattern of unnamed contexts not confirmed yet"),
    "count_restart": ("噪声水平跳回", "noise levels that jump back"),
    "count_no_timestep": ("没有时间步", "no timestep"),
    "count_out_of_memory": ("内存不足", "out of memory"),
    "count_block_state": (
        "块写入了自己的参数，或返回值不是由输入延续而来",
        "a block writes to what it is given, or gives what does not continue it",
    ),
    "count_no_region": ("没有可缓存的块", "no blocks to cache"),
    "count_grad_mode": ("梯度模式", "grad mode"),
    "count_not_compiled": ("没有被编译", "not compiled"),
    "count_transform": ("处于 torch 的变换或追踪之中", "under a transform or tracing of torch"),
    # explain.
    "explain_title": ("=== CacheDiT: {name}（{status}） ===", "=== CacheDiT: {name} ({status}) ==="),
    "explain_not_called": (
        "模型尚未被调用，还没有编译；请先运行一次",
        "The model has not been called yet, so nothing is compiled; run it once",
    ),
    "explain_graphs": (
        "图: {graphs} 个，图中断: {breaks} 处，编译用时 {seconds:.1f} 秒",
        "graphs: {graphs}, graph breaks: {breaks}, compiled in {seconds:.1f} s",
    ),
    "explain_graph": (
        "图 {number}: {nodes} 个节点，编译用时 {seconds:.1f} 秒",
        "graph {number}: {nodes} nodes, compiled in {seconds:.1f} s",
    ),
    "explain_region": (
        "    块: 共 {total} 个（{lists}）；缓存 {count} 个: {cached}；始终计算: 前 {front}，后 {back}",
        "    blocks: {total} in all ({lists}); cached {count}: {cached}; always computed: front {front}, back {back}",
    ),
    "explain_live_ins": (
        "    输入缓存区域: {values}；权重 {weights} 个",
        "    enters the region: {values}; and {weights} weights",
    ),
    "explain_residual": (
        "    离开缓存区域: {value}，缓存它与 {base} 之差",
        "    leaves the region: {value}, cached as its difference from {base}",
    ),
    "explain_whole": (
        "    离开缓存区域: {value}，整体缓存（它不是在某个输入上累加得到的）",
        "    leaves the region: {value}, cached whole (it is no input with something added)",
    ),
    "explain_buffers": (
        "    缓存占用: 每个上下文 {size}（保存 {history} 步）；编译形式: {lowering}",
        "    the cache takes {size} for each context ({history} steps kept); compiled as: {lowering}",
    ),
    "explain_dynamic": ("取决于形状（动态）", "as much as the shapes of a call ask for (dynamic)"),
    "explain_held": ("当前占用: {size}", "held now: {size}"),
    "explain_refused": (
        "本应跳过却照常计算的次数:",
        "steps that computed though they were due to be skipped, or for lack of a cache:",
    ),
    "explain_break": ("图中断: {reason}", "graph break: {reason}"),
    # Options.
    "option_type": (
        "选项 {name}: {value} 的类型是 {type}；允许: {allowed}",
        "option {name}: {value} is of type {type}; allowed: {allowed}",
    ),
    "option_value": (
        "选项 {name}: 不能是 {value}；允许: {allowed}",
        "option {name}: it cannot be {value}; allowed: {allowed}",
    ),
    "option_unknown": (
        "未知选项 {name}（给定值 {value}）；最接近的选项: {names}",
        "unknown option {name} (given as {value}); the closest options: {names}",
    ),
    "option_unknown_far": (
        "未知选项 {name}（给定值 {value}）；允许的选项: {names}",
        "unknown option {name} (given as {value}); allowed options: {names}",
    ),
    "option_foreign": (
        "未知选项 {name}（给定值 {value}）；它属于另一个项目 {project}，这里对应的是: {use}",
        "unknown option {name} (given as {value}); it belongs to another project, {project}; use here: {use}",
    ),
    "option_foreign_unneeded": (
        "未知选项 {name}（给定值 {value}）；它属于另一个项目 {project}，这里不需要: {why}",
        "unknown option {name} (given as {value}); it belongs to another project, {project}; not needed here: {why}",
    ),
    "foreign_contexts": (
        "正负提示词自动区分，也可以用 cache_dit.context(model, name) 指明",
        "positive and negative prompts are told apart by themselves, or named with cache_dit.context(model, name)",
    ),
    "foreign_residuals": ("缓存的总是残差", "residuals are what is cached, always"),
    "foreign_calibration": (
        "模型结构自动识别，没有按模型标定的系数",
        "the model is recognised by itself, and there are no coefficients per model",
    ),
    "foreign_elsewhere": (
        "与缓存无关，请在 enable_cache 之前自行设置",
        "it is no matter of caching; set it up before enable_cache",
    ),
    # The command `python -m cache_dit` and the demo.
    "cli_about": (
        "cache_dit: 扩散 transformer 的编译期缓存加速",
        "cache_dit: caching for diffusion transformers as a compiler pass",
    ),
    "cli_about_info": ("版本，以及本机可用的功能", "versions, and what is usable on this machine"),
    "cli_about_inspect": ("显示编译器在模型中找到的内容", "show what the compiler finds in a model"),
    "cli_about_compare": (
        "比较有无缓存的速度和结果，并保存图片",
        "compare speed and results with and without caching, and write the pictures",
    ),
    "cli_help_language": ("文字的语言", "language of the texts"),
    "cli_help_model": (
        "package.module:function（返回 (model, inputs)，inputs 是关键字参数字典，或 步 -> 字典 的函数）、"
        "diffusers 管线或模型的文件夹，或 demo",
        "package.module:function (returns (model, inputs); inputs: a dictionary of keyword arguments, or a function "
        "step -> dictionary), the folder of a diffusers pipeline or model, or demo",
    ),
    "cli_help_prompt": ("管线的提示词", "prompt for a pipeline"),
    "cli_help_pipeline": (
        "用 diffusers 的哪个类载入管线文件夹（默认为 model_index.json 中的类）",
        "class of diffusers to load a pipeline's folder as (default: the one that model_index.json names)",
    ),
    "cli_help_call": (
        "管线调用的其他参数，例如 num_frames=17、image=cat.png，可多次给出",
        "another argument of the pipeline's call, such as num_frames=17 or image=cat.png; may be given several times",
    ),
    "cli_wrong_call": ("--call {given}: 应为 名称=值", "--call {given}: name=value is wanted"),
    "cli_unknown_call": ("该管线的调用没有参数 {names}", "the call of this pipeline has no arguments {names}"),
    "cli_unread_picture": ("无法读取图片 {path}（{error}）", "the picture {path} cannot be read ({error})"),
    "cli_help_size": ("管线图片的尺寸（像素）", "size of a pipeline's pictures, in pixels"),
    "cli_help_device": (
        "载入文件夹时使用的设备，例如 cuda（默认: 有 GPU 时为 GPU）",
        "device for what is loaded from a folder, such as cuda (default: a GPU where there is one)",
    ),
    "cli_help_dtype": ("载入文件夹时使用的数据类型", "dtype for what is loaded from a folder"),
    "cli_help_region": ("缓存部分的模块路径", "module path, or two, of the part to cache"),
    "cli_help_inner": ("内部编译器（默认 {default}）", "inner compiler (default {default})"),
    "cli_help_steps": ("每次采样的步数（默认 28）", "steps of a run (default 28)"),
    "cli_help_repeats": ("每种方式计时的次数（默认 3）", "timed runs of each kind (default 3)"),
    "cli_help_option": ("同 enable_cache 的选项", "as the option of enable_cache"),
    "cli_help_out": ("图片保存位置（默认 out/compare.png）", "where to write the pictures (default out/compare.png)"),
    "cli_help_traceback": ("出错时显示 Python 调用栈", "show Python's traceback of an error"),
    "cli_info_cache_dit": ("cache_dit", "cache_dit"),
    "cli_info_python": ("Python", "Python"),
    "cli_info_torch": ("torch", "torch"),
    "cli_info_numpy": ("numpy", "numpy"),
    "cli_info_diffusers": ("diffusers", "diffusers"),
    "cli_info_compiler": ("C++ 编译器", "C++ compiler"),
    "cli_info_cuda": ("CUDA 设备", "CUDA devices"),
    "cli_info_triton": ("Triton", "Triton"),
    "cli_info_inner": ("可用的内部编译器（inner）", "usable inner compilers (inner)"),
    "cli_info_entry_point": ('torch.compile(backend="cache_dit")', 'torch.compile(backend="cache_dit")'),
    "cli_info_other": ("另一个项目 cache-dit", "the other project, cache-dit"),
    "cli_not_installed": ("未安装", "not installed"),
    "cli_none": ("无", "none"),
    "cli_no_compiler": (
        "未找到；在 CPU 上请使用 inner='eager'，或安装 g++（macOS: clang++，Windows: MSVC 的 cl）",
        "not found; on a CPU use inner='eager', or install g++ (macOS: clang++, Windows: cl of MSVC)",
    ),
    "cli_without_inductor": (
        "{usable}（inductor 在 CPU 上需要 C++ 编译器，在 GPU 上需要 Triton）",
        "{usable} (inductor needs a C++ compiler on a CPU, Triton on a GPU)",
    ),
    "cli_registered": ("已注册", "registered"),
    "cli_not_registered": (
        "未注册；请在克隆的目录中安装本包（pip install -e .），或先 import cache_dit",
        "not registered; install the package (pip install -e . in the clone), or import cache_dit first",
    ),
    "cli_no_other": ("未安装，没有冲突", "not installed, no conflict"),
    "cli_other_found": (
        "已安装 {version}，它的导入名也是 cache_dit，二者会互相遮盖；解决方案: pip uninstall cache-dit，"
        "然后在克隆的目录中 pip install --force-reinstall --no-deps -e .",
        "{version} is installed under the same import name cache_dit, and one hides the other; remedy: "
        "pip uninstall cache-dit, then pip install --force-reinstall --no-deps -e . in the clone",
    ),
    "cli_missing_package": (
        "缺少软件包 {package}\n解决方案: 在克隆的目录中 pip install -e '.[demo]'",
        "the package {package} is not installed\nRemedy: pip install -e '.[demo]' in the clone",
    ),
    "cli_model_unknown": (
        "无法识别 MODEL '{model}'；允许: package.module:function、diffusers 管线或模型的文件夹（须存在）、demo",
        "MODEL '{model}' names nothing here; allowed: package.module:function, an existing folder of a diffusers pipeline or "
        "model, demo",
    ),
    "cli_no_demo": (
        "{folder} 中没有演示程序；demo 只能在源码目录中使用",
        "no demo in {folder}; the name demo works in a checkout of the sources",
    ),
    "cli_no_model_in_folder": (
        "文件夹 {folder} 中既没有 model_index.json（管线）也没有 config.json（模型）",
        "the folder {folder} holds neither model_index.json (a pipeline) nor config.json (a model)",
    ),
    "cli_not_loaded": ("无法载入 MODEL '{model}': {error}", "MODEL '{model}' could not be loaded: {error}"),
    "cli_failed": ("MODEL '{model}' 运行失败: {error}", "MODEL '{model}' failed when it ran: {error}"),
    "cli_wrong_return": (
        "'{model}' 应返回 (model, inputs): 一个模型，以及关键字参数字典或 步 -> 字典 的函数；实际返回: {kinds}",
        "'{model}' has to return (model, inputs): a model, and a dictionary of keyword arguments or a function step -> "
        "dictionary; it returned: {kinds}",
    ),
    "cli_pipeline_needs": (
        "该管线还需要参数 {names}；请用 --call 名称=值 给出，或改用 package.module:function",
        "this pipeline also needs the arguments {names}; give them as --call name=value, or write a package.module:function",
    ),
    "cli_no_inputs": (
        "无法为 {model} 推测输入（{error}）；请改用返回 (model, inputs) 的 package.module:function",
        "no inputs could be guessed for {model} ({error}); write a package.module:function that returns (model, inputs)",
    ),
    "cli_uses_eager": (
        "未找到编译工具链（CPU: C++ 编译器，GPU: Triton），因此使用 inner='eager'；装好后速度会更快",
        "No toolchain was found (CPU: a C++ compiler, GPU: Triton), so inner='eager' is used; with one it runs faster",
    ),
    "cli_compares": (
        "每种方式从相同的种子交替运行 {repeats} 次，每次 {steps} 步，inner='{inner}'；计时前各运行两次，不计入时间",
        "Each kind runs {repeats} times from the same seeds, in turns, {steps} steps a run, inner='{inner}'; two runs of each "
        "before that are not timed",
    ),
    "cli_column_name": ("方式", "kind"),
    "cli_column_compile": ("编译（秒）", "compile (s)"),
    "cli_column_seconds": ("每次运行（秒）", "a run (s)"),
    "cli_column_speedup": ("实测加速", "speed-up"),
    "cli_column_hits": ("命中率", "hit rate"),
    "cli_column_psnr": ("PSNR", "PSNR"),
    "cli_column_accuracy": ("分类正确率", "class accuracy"),
    "cli_identical": ("完全相同", "identical"),
    "cli_compared_module": (
        "比较的内容: 若某个输入与输出形状相同，则它在每次调用后减去 输出/步数（简单的 Euler 循环），比较其最终值；"
        "否则比较每次调用的输出。PSNR 的量程是无缓存结果的取值范围",
        "Compared: where an input has the output's shape, it moves by -output/steps after each call (a toy Euler loop), and "
        "its last value is compared; else the outputs of all calls. The PSNR's range is that of the uncached values",
    ),
    "cli_compared_pipeline": (
        "比较的内容: 管线输出的图片（量程 1）；时间是整个管线调用，含文本编码和解码",
        "Compared: the pipeline's pictures (range 1); the time is that of a whole call, text encoding and decoding included",
    ),
    "cli_compared_demo": (
        "比较的内容: 40 个手写数字的图片（量程 2）",
        "Compared: the pictures of 40 handwritten digits (range 2)",
    ),
    "cli_picture": ("图片: {path}", "Pictures: {path}"),
    "cli_no_picture": ("输出不是图片，因此没有保存图片", "The outputs are no pictures, so none was written"),
    "cli_demo_does": (
        "从相同的噪声出发，用 {steps} 步画 {samples} 个手写数字: 先用普通的 torch.compile，再用三种缓存设置，"
        "交替运行各 {repeats} 次（inner='{inner}'，{threads} 线程）。首次编译在两核 CPU 上需要几分钟。",
        "Draws {samples} handwritten digits in {steps} steps from the same noise: with plain torch.compile and with three "
        "settings of the cache, {repeats} runs of each in turns (inner='{inner}', {threads} threads). "
        "Compiling for the first time takes minutes on two cores.",
    ),
    "cli_demo_explains": (
        "时间和加速比取各次运行的中位数，不含编译；PSNR 以不缓存的结果为准（量程 2，对样本取平均）；正确率由分类器判断。\n"
        "两种 adaptive 设置共用同一个编译结果，因此后者几乎不用编译。",
        "Times and speed-ups are medians over the runs, without compiling; the PSNR is against the uncached samples (range 2, "
        "mean over samples); a classifier judged the accuracy.\n"
        "The two adaptive settings share one compiled program, so the second hardly compiles.",
    ),
    "cli_demo_picture": (
        "图片: {path}（左: torch.compile；右: {name}；下: 各设置计算与跳过的步）。共用时 {seconds:.0f} 秒",
        "Picture: {path} (left: torch.compile; right: {name}; below: the steps computed and skipped). {seconds:.0f} s in all",
    ),
    # Several processes.
    "explain_ranks": (
        "与 {count} 个进程共同决策（本进程: {rank}）；上面的内存为本进程的；已交换测量 {sent} 次",
        "decides alike with {count} ranks (this one: {rank}); memory above is this rank's; measurements exchanged {sent} times",
    ),
    "ranks_missing": (
        "进程 {ranks} 在 {seconds:.0f} 秒内没有就绪\n"
        "解决方案: 检查这些进程是否已退出，以及是否对同一模型以同样方式（都切分或都不切分）启用了缓存",
        "Ranks {ranks} have not come within {seconds:.0f} s\n"
        "Remedy: see whether they live, and whether they turned caching on for the same model, sharded in the same way",
    ),
    "ranks_differ": (
        "进程 {a} 与进程 {b} 的设置不同: {what}\n解决方案: 在所有进程上使用相同的选项与切分方式",
        "Ranks {a} and {b} differ: {what}\nRemedy: give all ranks the same options and the same sharding",
    ),
    "ranks_late": (
        "其他进程的测量值在 {seconds:.0f} 秒内没有到达: {why}\n解决方案: 检查其他进程是否已退出或停滞；本次生成已中止",
        "What the other ranks measured has not come within {seconds:.0f} s: {why}\n"
        "Remedy: see whether one of them died or hangs; this generation has been given up",
    ),
    "ranks_memory": (
        "本进程没有足够的内存存放残差，而其他进程会继续跳步\n解决方案: 使用 residual_device='cpu' 或较小的 residual_dtype",
        "This rank has no memory for the residuals, and the others would go on skipping\n"
        "Remedy: residual_device='cpu' or a smaller residual_dtype",
    ),
    "ranks_control": (
        "多个进程共同决策时不能使用 control_refresh: 它依据各进程自己的输入\n解决方案: 去掉该选项，或设 group=False",
        "control_refresh cannot be had where ranks decide alike: it goes by the inputs of each\n"
        "Remedy: leave it out, or set group=False",
    ),
    # Artifacts.
    "exporting": (
        "正在把模型连同缓存编译成文件（在 CPU 上可能需要几分钟）",
        "Compiling the model and its cache into a file (may take minutes on a CPU)",
    ),
    "export_path": ("path={path!r}: 文件名必须以 .pt2 结尾", "path={path!r}: the name has to end in .pt2"),
    "export_inner": (
        "inner={inner}, lowering={lowering}: export 只支持 inner='inductor' 以及 lowering='auto' 或 'specialize'",
        "inner={inner}, lowering={lowering}: export takes inner='inductor' and lowering='auto' or 'specialize' only",
    ),
    "export_several": (
        "该 pipeline 有 {count} 个去噪模型；请分别导出: export(pipe.transformer, …)",
        "The pipeline has {count} denoisers; export each by itself: export(pipe.transformer, …)",
    ),
    "export_untraced": (
        "模型无法整体追踪成一张图: {why}\n解决方案: 改用 enable_cache；或按 torch.export 的说明修改模型或 dynamic_shapes",
        "The model cannot be traced as one graph: {why}\n"
        "Remedy: use enable_cache instead; or change the model or dynamic_shapes as torch.export's message says",
    ),
    "export_arguments": (
        "example_inputs={given}: 应为按顺序的参数序列，或按名称的字典；forward 的参数: {names}",
        "example_inputs={given}: a sequence of arguments in order, or a mapping by name, is wanted; forward takes {names}",
    ),
    "export_shapes": (
        "dynamic_shapes 中的 {names} 不是样例中的参数；样例中有: {known}",
        "{names} in dynamic_shapes is no argument of the example, which has {known}",
    ),
    "export_shapes_unknown": (
        "无法从输入的尺寸得到动态尺寸 {what}\n解决方案: 让该尺寸保持静态，或为它的一个因子指定 torch.export.Dim",
        "The dynamic size {what} cannot be told from the sizes of the inputs\n"
        "Remedy: leave it static, or give torch.export.Dim for one of its factors",
    ),
    "export_output": (
        "模型返回了 {kind}；只能导出张量、元组、列表、字典和简单常量",
        "The model returns a {kind}; only tensors, tuples, lists, dictionaries and plain constants can be exported",
    ),
    "export_constant": (
        "参数 {name}（{kind}）既不是张量也不是编译时的常量\n解决方案: 以张量形式传入",
        "The argument {name} ({kind}) is neither a tensor nor a constant at compile time\nRemedy: pass it as a tensor",
    ),
    "artifact_corrupt": (
        "{path} 已损坏或不是 cache_dit 导出的文件: {why}\n解决方案: 重新用 cache_dit.export 导出",
        "{path} is damaged or was not written by cache_dit.export: {why}\nRemedy: export it again",
    ),
    "artifact_torch": (
        "该文件由 torch {made} 编译，而这里是 torch {here}\n解决方案: 安装 torch {made}，或在这里重新导出",
        "The file was compiled by torch {made}, and this is torch {here}\n"
        "Remedy: install torch {made}, or export it again here",
    ),
    "artifact_device": (
        "该文件为 {made} 设备编译，而这里没有这种设备\n解决方案: 在这里的设备上重新导出",
        "The file was compiled for {made}, and there is no such device here\nRemedy: export it again on the device at hand",
    ),
    "artifact_machine": (
        "该文件为另一种机器编译: {what}\n解决方案: 在这里重新导出",
        "The file was compiled for another machine: {what}\nRemedy: export it again here",
    ),
    "artifact_options": (
        "{names}: 已在导出时编译进程序，不能在加载时更改\n解决方案: 用这些选项重新导出",
        "{names}: compiled into the programs, so it cannot be changed by load\nRemedy: export again with these options",
    ),
    "artifact_structure": (
        "参数的结构与导出时不同（{names}）",
        "The arguments are built otherwise than in the export ({names})",
    ),
    "artifact_constant": (
        "{name}={value!r}: 导出时的值 {made!r} 已编译进程序\n解决方案: 使用该值，或用新值重新导出",
        "{name}={value!r}: {made!r} was compiled in\nRemedy: pass that value, or export again with the new one",
    ),
    "artifact_arguments": (
        "给出的参数: {given}；导出时的参数: {names}\n解决方案: 恰好给出这些参数，各一次",
        "Arguments given: {given}; of the export: {names}\nRemedy: give exactly these, each once",
    ),
    "artifact_tensor": ("{name} 应为张量，却是 {kind}", "{name} is a {kind}: a tensor is wanted"),
    "artifact_input": (
        "{name} 为 {value}，而程序为 {made} 编译\n解决方案: 转换该输入，或重新导出",
        "{name} is {value}, and the programs were compiled for {made}\nRemedy: convert it, or export again",
    ),
    "artifact_grad": (
        "{name} 需要梯度，而导出的程序没有反向传播\n解决方案: 在 torch.no_grad() 中调用",
        "{name} asks for gradients, and compiled programs have none\nRemedy: call it under torch.no_grad()",
    ),
    "artifact_range": (
        "{name} 的形状为 {shape}: 第 {axis} 维是 {value}，允许 {allowed}\n解决方案: 以更大的 dynamic_shapes 范围重新导出",
        "{name} has the shape {shape}: dimension {axis} is {value}, allowed: {allowed}\n"
        "Remedy: export again with wider dynamic_shapes",
    ),
    "artifact_guard": (
        "输入的尺寸 {sizes} 不满足编译时的条件 {guard}",
        "The sizes {sizes} of the inputs do not meet what was assumed in compiling: {guard}",
    ),
}


_preferred: Callable[[], str | None] = lambda: None  # noqa: E731


def prefer_language(ask: Callable[[], str | None]) -> None:
    """Let the program around this package say its user's language: `ask` gives it at each text, or None."""
    global _preferred
    _preferred = ask


def resolve_language(language: str | None = None) -> str:
    """Return `'zh'` or `'en'`: `language`, else the variable `CACHE_DIT_LANG`, else what the program around us prefers
    (`prefer_language`), else `'zh'`.

    Raises:
        ValueError: `language` is neither None nor one of `LANGUAGES`. Other values of the variable say nothing.
    """
    if language is None:
        wanted = os.environ.get(LANGUAGE_VARIABLE, "").strip().lower()
        return wanted if wanted in LANGUAGES else _preferred() or LANGUAGES[0]
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}; allowed: {', '.join(map(repr, LANGUAGES))} or None")
    return language


def text(key: str, language: str | None = None, **values: object) -> str:
    """Return the text `key` of `TEXTS` with `values` filled in.

    Raises:
        KeyError: there is no such text, or a field of it is missing among `values`.
        ValueError: as `resolve_language`.
    """
    return TEXTS[key][LANGUAGES.index(resolve_language(language))].format(**values)
