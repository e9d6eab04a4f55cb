"""The command ``python -m cache_dit`` and the demo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache_dit import __main__ as command
from cache_dit import compare, texts
from cache_dit.__main__ import CommandError, euler_loop, falling_time, first_tensor, main

ROOT = Path(__file__).resolve().parents[1]

OWN_MODELS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())

    def forward(self, x):
        return x + 0.3 * self.inner(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, timestep):
        x = x * (1 + timestep[:, None] / 1000)
        for block in self.blocks:
            x = block(x)
        return x

def at_once():
    return Net().eval(), {"x": torch.randn(2, 8), "timestep": torch.full((2,), 1000.0)}

def step_by_step():
    return Net().eval(), lambda step: {"x": torch.ones(2, 8), "timestep": torch.full((2,), 1000.0 - step)}

def fails(): raise RuntimeError("no weights here")
def returns_one(): return Net()
def returns_number(): return Net(), 3
def no_blocks(): return nn.Linear(2, 2), {"input": torch.zeros(1, 2)}
def wrong_inputs(): return Net().eval(), {"y": torch.zeros(1)}
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """A module ``own_models`` that can be imported, English texts, and an empty working directory."""
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    monkeypatch.setenv(texts.LANGUAGE_VARIABLE, "en")
    monkeypatch.chdir(tmp_path)


def run_python(*arguments: str, cwd: Path | None = None, timeout: int = 500) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the tests, which reads and writes UTF-8."""
    return subprocess.run(
        [sys.executable, "-X", "utf8", *arguments], cwd=cwd, capture_output=True, encoding="utf-8", timeout=timeout
    )


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_as_a_command(tmp_path: Path) -> None:
    done = run_python("-m", "cache_dit", "--language", "en", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"torch: {torch.__version__}" in done.stdout
    assert 'torch.compile(backend="cache_dit"): registered' in done.stdout
    assert "usable inner compilers" in done.stdout and "eager" in done.stdout
    assert "Error" not in done.stdout + done.stderr


@pytest.mark.parametrize(("variable", "heading"), [("zh", "C++ 编译器: "), ("en", "C++ compiler: ")])
def test_info_speaks_the_language_of_the_variable(
    variable: str, heading: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(texts.LANGUAGE_VARIABLE, variable)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(command._LOOK_UPS)
    assert any(line.startswith(heading) for line in lines)


def test_info_goes_on_where_a_look_up_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(language: str | None) -> str:
        raise RuntimeError("driver too old")

    monkeypatch.setitem(command._LOOK_UPS, "cuda", fails)
    assert main(["info", "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert "CUDA devices: RuntimeError: driver too old" in out and "the other project" in out


def test_info_names_the_remedy_for_the_other_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cache_dit import other_project

    monkeypatch.setattr(other_project, "other_version", lambda: "1.3.0")
    assert main(["info", "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert "1.3.0 is installed" in out and "pip uninstall cache-dit" in out


def test_info_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "cpp_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info", "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert "C++ compiler: not found; on a CPU use inner='eager'" in out
    assert "usable inner compilers (inner): eager, aot_eager (inductor needs" in out


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nothing", "names nothing here"),
        ("no/such/folder", "names nothing here"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("own_models:missing", "has no attribute 'missing'"),
        ("own_models:fails", "RuntimeError: no weights here"),
        ("own_models:returns_one", "it returned: Net"),
        ("own_models:returns_number", "it returned: (Net, int)"),
        ("own_models:no_blocks", "No transformer component found"),
        ("own_models:wrong_inputs", "unexpected keyword argument 'y'"),
        (".", "neither model_index.json"),
    ],
)
def test_a_wrong_model_gives_one_message_and_2(
    model: str, told: str, own_models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", model]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


def test_a_folder_that_cannot_be_loaded(own_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["inspect", "model"]) == 2
    assert "MODEL 'model' could not be loaded" in capsys.readouterr().err


def test_wrong_options_give_2(own_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "own_models:at_once", "--inner", "eager", "--skip-interval", "0"]) == 2
    assert "option skip_interval: it cannot be 0; allowed: int >= 1" in capsys.readouterr().err
    for wrong in (["compare", "own_models:at_once", "--steps", "0"], ["nonsense"], [], ["info", "--language", "fr"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


def test_traceback_is_shown_where_asked_for(own_models: None) -> None:
    with pytest.raises(CommandError) as caught:
        main(["inspect", "own_models:fails", "--traceback"])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_missing_package_gives_1_and_names_the_extra(
    own_models: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["inspect", "demo"]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["info", "inspect", "compare"])
@pytest.mark.parametrize(("language", "word"), [("zh", "文字的语言"), ("en", "language of the texts")])
def test_help_is_in_the_language_asked_for(name: str, language: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--language", language, "--help"])
    assert word in capsys.readouterr().out


# ---- inspect and compare ---------------------------------------------------------------------------------------------


def test_inspect_prints_what_was_found(own_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "own_models:at_once", "--front-blocks", "2", "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert "cached 2: blocks.2 … blocks.3" in out and "graph breaks: 0" in out


def test_inspect_takes_a_region(own_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "own_models:step_by_step", "--region", "blocks.1,blocks.2"]) == 0
    assert "blocks.1 … blocks.2" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["at_once", "step_by_step"])
def test_compare_measures_both_kinds(model: str, own_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--inner", "eager", "--steps", "10", "--repeats", "2", "--warmup-steps", "2", "--skip-interval", "3"]
    assert main(["compare", f"own_models:{model}", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    (plain,) = [line.split() for line in lines if line.startswith("torch.compile")]
    (cached,) = [line for line in lines if line.startswith("enable_cache(model, skip_interval=3, warmup_steps=2)")]
    assert plain[3:] == ["1.00x", "-", "-"]
    assert "30.0%" in cached and cached.endswith(" dB")
    assert "The outputs are no pictures" in lines[-1]


def test_compare_says_that_it_uses_eager(
    own_models: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "cpp_compiler", lambda: None)
    target = ["--strategy", "adaptive", "--target-speedup", "2"]
    assert main(["compare", "own_models:at_once", "--steps", "12", "--repeats", "1", *target]) == 0
    out = capsys.readouterr().out
    assert "so inner='eager' is used" in out and "50.0%" in out


@pytest.mark.slow
def test_folder_of_a_model(own_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_transformer().save_pretrained(tmp_path / "model")
    assert main(["inspect", "model"]) == 0
    assert "cached 2: transformer_blocks.1 … transformer_blocks.2" in capsys.readouterr().out


@pytest.mark.slow
def test_folder_of_a_pipeline(own_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    diffusers.DiTPipeline(tiny_transformer(), vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    assert main(["inspect", "pipeline"]) == 0
    assert "cached 2: transformer_blocks.1 … transformer_blocks.2" in capsys.readouterr().out
    assert main(["compare", "pipeline", "--inner", "eager", "--steps", "6", "--repeats", "1", "--out", "new/p.png"]) == 0
    out = capsys.readouterr().out
    assert "33.3%" in out and " dB" in out
    assert (tmp_path / "new" / "p.png").stat().st_size > 1000


def test_further_arguments_of_a_pipelines_call(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 6), "red").save(tmp_path / "cat.png")
    given = ["num_frames=17", "scale=4.5", "clean=false", "negative_prompt=a dog", f"last_image={tmp_path / 'cat.png'}"]
    found = command.Request("a cat", call=given).further("en")
    picture = found.pop("last_image")
    assert found == {"num_frames": 17, "scale": 4.5, "clean": False, "negative_prompt": "a dog"}
    assert (picture.size, picture.mode) == ((4, 6), "RGB")


@pytest.mark.parametrize(
    ("given", "told"),
    [("frames", "name=value is wanted"), ("a b=1", "name=value is wanted"), ("image=no.png", "no.png cannot be read")],
)
def test_a_wrong_argument_of_a_call_is_told(given: str, told: str) -> None:
    with pytest.raises(command.CommandError, match=told):
        command.Request("a cat", call=[given]).further("en")


def test_a_pipeline_is_asked_for_what_it_takes() -> None:
    class Pipeline:
        def __call__(self, image: Any, strength: float = 0.5, num_inference_steps: int = 5) -> list[Any]:
            return [image, strength, num_inference_steps]

        def set_progress_bar_config(self, disable: bool) -> None:
            pass

    def called(*call: str) -> Any:
        subject = command.PipelineSubject(Pipeline(), command.Request("a cat", call=call), "en")
        return subject._call(subject.model, 0, 3, "np", lambda: None)

    with pytest.raises(command.CommandError, match="also needs the arguments image; give them as --call"):
        called()
    with pytest.raises(command.CommandError, match="no arguments speed"):
        called("speed=1")


@pytest.mark.slow
def test_a_pipeline_of_another_class_with_a_picture(
    own_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    from tests.integrations import tiny_pipelines

    tiny_pipelines.FAMILIES["Flux"].build().save_pretrained(tmp_path / "flux")
    image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    size = ["--height", "16", "--width", "16", "--call", "max_sequence_length=20"]
    begun = ["--pipeline", "FluxImg2ImgPipeline", "--call", "image=red.png", "--call", "strength=0.5"]
    shown = ["--inner", "eager", "--steps", "12", "--repeats", "1", "--out", "p.png"]
    assert main(["compare", "flux", *size, *begun, *shown]) == 0
    # half of the steps are made; of these the last, one in two behind the warm-up, are skipped
    assert " dB" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_video_is_shown_as_frames_at_equal_distances() -> None:
    frames = torch.arange(2 * 17).reshape(2, 17, 1, 1, 1).expand(2, 17, 4, 4, 3)
    shown = command._stills(frames)
    assert shown.shape == (16, 4, 4, 3)
    assert shown[:, 0, 0, 0].tolist() == [0, 2, 5, 7, 9, 11, 14, 16, 17, 19, 22, 24, 26, 28, 31, 33]
    assert command._stills(frames[:1, :1]).shape == (1, 4, 4, 3)
    # pictures stay as they are, and one channel is grey
    assert command._stills(torch.zeros(3, 4, 4, 1)).shape == (3, 4, 4)


def tiny_transformer() -> Any:
    """A transformer of diffusers with three blocks."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )


def test_timestep_falls_and_the_rest_stays() -> None:
    inputs: Mapping[str, Any] = {"x": torch.ones(1), "timestep": torch.tensor([1000])}
    at = falling_time(inputs)
    assert [at(step, 4)["timestep"].item() for step in range(4)] == [1000, 750, 500, 250]
    assert at(2, 4)["timestep"].dtype == torch.int64 and at(2, 4)["x"] is inputs["x"]
    assert falling_time({"t": 8.0})(1, 4) == {"t": 6.0}
    assert falling_time({"x": 1})(3, 4) == {"x": 1}


def test_euler_loop_moves_the_argument_shaped_as_the_output() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        return (y.expand(2, 2),)

    def inputs(step: int, steps: int) -> Mapping[str, Any]:
        return {"x": torch.ones(2, 2), "y": torch.full((1,), 4.0)}

    steps: list[int] = []
    assert torch.equal(euler_loop(model, inputs, 4, lambda: steps.append(1)), torch.full((2, 2), -3.0))
    assert len(steps) == 4


def test_euler_loop_keeps_all_outputs_where_no_argument_has_their_shape() -> None:
    outputs = euler_loop(lambda x: {"sample": x[:, :1]}, lambda step, steps: {"x": torch.full((2, 3), step)}, 3, bool)
    assert outputs[0, :, 0].tolist() == [0, 1, 2] and outputs.shape == (2, 3, 1)


def test_first_tensor_of_an_output() -> None:
    tensor = torch.ones(1)
    for output in (tensor, (tensor, 1), {"sample": tensor}, SimpleNamespace(sample=tensor), [[tensor]]):
        assert first_tensor(output) is tensor
    with pytest.raises(CommandError, match="NoneType"):
        first_tensor(None)


# ---- the demo --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_quick(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    demo = [str(ROOT / "examples" / "demo.py"), "--quick", "--samples", "10", "--language", "en", "--out", "demo.png"]
    done = run_python(*demo, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("%") and "x " in line]
    assert len(rows) == 4
    assert "Total Forward calls: " in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 5000


@pytest.mark.slow
def test_demo_as_a_model_of_the_command(own_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert main(["inspect", "demo"]) == 0
    assert "cached 11: transformer_blocks.1 … transformer_blocks.11" in capsys.readouterr().out
