"""The documents: every example runs, and what they list is what the code has."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit import passes
from cache_dit.forecasts import FORECASTS
from cache_dit.lowering import DEEP, LOWERINGS
from cache_dit.messages import CacheDitWarning
from cache_dit.options import FOREIGN_OPTIONS, CacheOptions, reset_global_config
from cache_dit.strategies import STRATEGIES, Reason
from cache_dit.texts import LANGUAGE_VARIABLE, TEXTS, text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "README.zh.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TRANSLATIONS = [("README.md", "README.zh.md"), ("docs/api.md", "docs/api.zh.md")]
MOST_NOT_EXECUTED = 1
"""Blocks of one document that may be marked as not executed."""

DOCUMENTED_EXAMPLES = """
import cache_dit
---
cache_dit.enable_cache(model)
cache_dit.enable_cache(model, skip_interval=3, warmup_steps=5, strategy='adaptive', noise_scale=0.002, debug=True)
---
cache_dit.disable_cache(model)
---
stats = cache_dit.summary(model)
print(stats)
---
cache_dit.set_global_config(default_skip_interval=3, default_strategy='adaptive', global_debug=True)
---
stats = cache_dit.get_global_stats()
print(f"总缓存命中: {stats['total_cache_hits']}")
print(f"活跃模型数: {stats['active_models']}")
---
cache_dit.reset_cache_stats()
---
cache_dit.enable_cache(model, strategy='fixed', skip_interval=2)
---
cache_dit.enable_cache(model, strategy='dynamic', skip_interval=2)
---
cache_dit.enable_cache(model, strategy='adaptive', skip_interval=2)
---
cache_dit.enable_cache(model)
---
cache_dit.enable_cache(model, strategy='adaptive', skip_interval=2, warmup_steps=5, noise_scale=0.001)
---
cache_dit.enable_cache(model, debug=True, enable_stats=True)
---
cache_dit.enable_cache(model, strategy='dynamic', skip_interval=3, warmup_steps=2)
---
cache_dit.enable_cache(model, debug=True)
---
stats = cache_dit.get_global_stats()
print(stats)
"""
"""The examples that the API was asked for with, each of which the API pages have to show."""


# ---- what the examples are given -------------------------------------------------------------------------------------


class Block(nn.Module):
    """h + mlp(norm(h) * (1 + temb))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h) * (1 + temb[:, None]))


class TinyDiT(nn.Module):
    """Four blocks between an embedding and a head: (x [batch, tokens, 4], t [batch]) -> [batch, tokens, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, temb = self.embed(x), self.time(t[:, None])
        for block in self.blocks:
            h = block(h, temb)
        return self.head(h)


def new_model() -> TinyDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyDiT().eval()


def noise() -> Tensor:
    return torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))


def denoise(model: Callable[..., Tensor], steps: int = 20) -> Tensor:
    """Euler steps from 1 to 0."""
    x, sigmas = noise(), torch.linspace(1.0, 0.0, steps + 1)
    with torch.no_grad():
        for i in range(steps):
            x = x + (sigmas[i + 1] - sigmas[i]) * model(x, sigmas[i : i + 1])
    return x


def new_pipeline() -> Any:
    """A FLUX pipeline of four tiny blocks with random weights, whose prompts are all the same."""
    import diffusers

    class TinyFlux(diffusers.FluxPipeline):  # type: ignore[misc]
        def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            return torch.zeros(1, 4, 8), torch.zeros(1, 8), torch.zeros(4, 3)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **{"height": 16, "width": 16, **kwargs})

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = TinyFlux(scheduler, vae.eval(), None, None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the examples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One ```python block: its place, what it has to print (None: not said) and the marks before it."""

    line: int
    code: str
    output: str | None
    not_executed: str | None
    warns: str | None


_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
_MARK = re.compile(r"^\s*<!-- (not executed|warns): (.+?) -->\s*$")
_TURNS_ON = re.compile(r"\b(enable_cache|enable|cached|compile)\((model|pipe)\b")


def blocks_of(name: str) -> Iterator[tuple[int, str, str, list[str]]]:
    """(line, language, text, the lines since the last block) of each fenced block."""
    between: list[str] = []
    inside: list[str] | None = None
    indent, language, start = "", "", 0
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is None and fence is None:
            between.append(line)
        elif inside is None and fence is not None:
            inside, indent, language, start = [], fence[1], fence[2], number
        elif inside is not None and fence is not None and not fence[2]:
            yield start, language, "\n".join(inside) + "\n", between
            inside, between = None, []
        elif inside is not None:
            inside.append(line.removeprefix(indent))
    assert inside is None, f"{name}:{start}: the block does not end"


def examples_of(name: str) -> list[Example]:
    """The python blocks of a document; a text block that follows directly is what one prints."""
    found: list[Example] = []
    for line, language, body, between in blocks_of(name):
        if language == "text" and found and not any(part.strip() for part in between):
            last = found.pop()
            found.append(Example(last.line, last.code, body, last.not_executed, last.warns))
        if language == "python":
            marks = dict(match.groups() for match in map(_MARK.match, between[-2:]) if match)
            found.append(Example(line, body, None, marks.get("not executed"), marks.get("warns")))
    return found


def run_example(name: str, example: Example, names: dict[str, Any], language: str) -> None:
    """Run one block; a model that it turned caching on for and did not call is then sampled from."""
    turned_on = _TURNS_ON.search(example.code)
    if turned_on is not None:
        names[turned_on[2]] = new_model() if turned_on[2] == "model" else new_pipeline()
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always", CacheDitWarning)
        exec(compile("\n" * example.line + example.code, str(ROOT / name), "exec"), names)
        if turned_on is not None and turned_on[2] == "model":
            check_sampling(names["model"])
    ours = [str(each.message) for each in caught if issubclass(each.category, CacheDitWarning)]
    wanted = [] if example.warns is None else [text(key, language) for key in example.warns.split(", ")]
    assert ours == wanted, f"{name}:{example.line}: {ours}"
    if example.output is not None:
        assert matches(example.output, printed.getvalue()), f"{name}:{example.line} printed:\n{printed.getvalue()}"


def check_sampling(model: Callable[..., Tensor]) -> None:
    """A model that an example turned caching on for, and did not call, gives finite numbers and has hits."""
    try:
        stats = cache_dit.get_stats(model)
    except cache_dit.CacheDitError:  # the example shows how an option is refused
        return
    if stats.enabled and stats.calls == 0:
        assert denoise(model).isfinite().all()
        assert cache_dit.get_stats(model).hits > 0


def matches(wanted: str, printed: str) -> bool:
    """Whether the text is what was printed; an ellipsis stands for anything within a line."""
    pattern = ".*".join(map(re.escape, wanted.strip().split("…")))
    return re.fullmatch(pattern, printed.strip()) is not None


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """What one document compiled serves the next: only the first to use some options pays for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def as_documented(monkeypatch: pytest.MonkeyPatch, shared_programs: None) -> Iterator[pytest.MonkeyPatch]:
    """The default inner compiler is the eager one: examples run in seconds, without a C++ toolchain."""
    monkeypatch.setitem(CacheOptions.__init__.__kwdefaults__, "inner", "eager")
    yield monkeypatch
    reset_global_config()


def language_of(name: str) -> str:
    return "zh" if name.endswith(".zh.md") else "en"


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_run(name: str, as_documented: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # some write files
    as_documented.chdir(tmp_path)
    language = language_of(name)
    as_documented.setenv(LANGUAGE_VARIABLE, language)
    names: dict[str, Any] = {"__name__": "example", "denoise": denoise, "x": noise(), "model": new_model()}
    examples = examples_of(name)
    for example in examples:
        if example.not_executed is None:
            run_example(name, example, names, language)
    assert sum(example.not_executed is not None for example in examples) <= MOST_NOT_EXECUTED


@pytest.mark.slow
def test_real_model_runs(as_documented: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("real_model", ROOT / "examples" / "real_model.py")
    assert spec is not None and spec.loader is not None
    real_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_model)
    assert real_model.MODEL == "black-forest-labs/FLUX.1-dev"
    as_documented.setattr(real_model, "load_pipeline", lambda model, device: new_pipeline())
    sizes = ["--height", "16", "--width", "16", "--steps", "12"]
    assert real_model.main([*sizes, "--inner", "eager", "--language", "en", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plain.png", "cached.png"}
    printed = capsys.readouterr().out
    assert "Total Forward calls: " in printed and "measured" in printed


# ---- what the documents list -----------------------------------------------------------------------------------------


class _Normal(ast.NodeTransformer):
    """Texts inside f-strings are translated; all else is the same in both languages."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        node.values = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        return node


def normal(code: str) -> str:
    """Code without comments, line breaks and translated texts."""
    return ast.unparse(_Normal().visit(ast.parse(code)))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows_of(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = read(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#") and line.lstrip("# ").startswith(heading))
    rows: list[list[str]] = []
    for line in lines[start + 1 :]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows or line.startswith("#"):
            break
    return rows[2:]


def coded(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def missing(names: Iterable[str], document: str) -> list[str]:
    """The names that a document has nowhere in backticks."""
    held = set(coded(re.sub(r"```.*?```", "", read(document), flags=re.S)))
    return sorted(set(names) - held)


@pytest.mark.parametrize("name", ["docs/api.md", "docs/api.zh.md"])
def test_documented_examples_are_shown_and_executed(name: str) -> None:
    executed = [normal(example.code) for example in examples_of(name) if example.not_executed is None]
    for wanted in DOCUMENTED_EXAMPLES.split("---"):
        assert normal(wanted) in executed, wanted


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS)
def test_translations_are_in_step(english: str, chinese: str) -> None:
    first, second = examples_of(english), examples_of(chinese)
    assert [normal(each.code) for each in first] == [normal(each.code) for each in second]
    assert [each.output is None for each in first] == [each.output is None for each in second]
    levels = [
        [line.split(" ")[0] for line in re.sub(r"```.*?```", "", read(name), flags=re.S).splitlines() if line.startswith("#")]
        for name in (english, chinese)
    ]
    assert levels[0] == levels[1]
    assert read(english).count("\n|") == read(chinese).count("\n|")


@pytest.mark.parametrize("name", ["docs/api.md", "docs/api.zh.md"])
def test_api_page_names_everything(name: str) -> None:
    assert not [each for each in cache_dit.__all__ if not re.search(rf"`(cache_dit\.)?{each}\b", read(name))]
    records = (cache_dit.CacheStats, cache_dit.Explanation)
    assert not missing([each.name for record in records for each in fields(record)], name)
    assert not missing(get_args(Reason), name)
    assert not missing([key.split("_", 1)[1] for key in TEXTS if key.startswith(("refusal_", "count_"))], name)
    assert not missing([repr(each) for each in (*FORECASTS, *STRATEGIES, *LOWERINGS)], name)
    assert re.search(rf" ?{DEEP - 1} (个 )?block", read(name))


@pytest.mark.parametrize(("name", "heading"), [("docs/api.md", "Options"), ("docs/api.zh.md", "选项")])
def test_option_table_is_the_code_s(name: str, heading: str) -> None:
    shown = {option: coded(row[2])[0] for row in rows_of(name, heading) for option in coded(row[0])}
    defaults = {each.name: CacheOptions.__init__.__kwdefaults__[each.name] for each in fields(CacheOptions)}
    assert shown == {option: repr(default) for option, default in defaults.items()}


def test_names_table_is_the_code_s() -> None:
    shown = {coded(row[1])[0]: (row[0], row[2]) for row in rows_of("docs/names.md", "Options")}
    assert set(shown) == set(FOREIGN_OPTIONS)
    for name, foreign in FOREIGN_OPTIONS.items():
        project, use = shown[name]
        assert project == foreign.project, name
        assert use == (f"`{foreign.use}`" if foreign.use else text(foreign.why, "en")), name


def test_design_page_names_passes_and_files() -> None:
    assert not missing([each.__name__ for each in passes.PASSES], "docs/design.md")
    paths = {each for each in coded(read("docs/design.md")) if re.fullmatch(r"[\w/]+/(\w+\.py)?", each)}
    assert paths
    assert not sorted(path for path in paths if not (ROOT / path).exists())


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    prose = re.sub(r"```.*?```", "", read(name), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", path):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_documents_are_plain() -> None:
    """No placeholder of a machine, no character that an editor shows differently."""
    for name in [*DOCUMENTS, "CHANGELOG.md"]:
        assert "\t" not in read(name), name
        assert not re.search(r"/work/|/home/|/root/|C:\\\\", read(name)), name
