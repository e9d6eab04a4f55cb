"""Export and load. One model is compiled, once: a minute on two cores."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import cache_dit
from cache_dit.artifact.load import Artifact, _options
from cache_dit.artifact.manifest import options_as_data
from cache_dit.messages import CacheDitWarning
from cache_dit.options import chosen_names, reset_global_config, resolve_options
from cache_dit.runtime.registry import session_of_module
from cache_dit.texts import TEXTS

ROOT = Path(__file__).resolve().parents[2]
WIDTH, PATCH = 16, 2
# What every run here uses unless it says otherwise.
OPTIONS: dict[str, Any] = {"forecast": "reuse", "order": 1, "noise_scale": 0.0, "language": "en", "correction": True}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.modulation, self.mlp = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        scale, gate = self.modulation(temb)[:, None].chunk(2, dim=-1)
        return h + gate * torch.tanh(self.mlp(self.norm(h) * (1 + scale)))


class Prediction(NamedTuple):
    """A record of a library that a loader does not have."""

    sample: Tensor


class PictureModel(nn.Module):
    """Pictures [batch, 3, height, width] in patches of 2 x 2, a text of any length that passes the first block by."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.text, self.time = nn.Linear(8, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(
        self, picture: Tensor, timestep: Tensor, text: Tensor, scale: float = 1.0, return_dict: bool = True
    ) -> Prediction | tuple[Tensor]:
        height, width = picture.shape[2] // PATCH, picture.shape[3] // PATCH
        h = self.embed(picture).flatten(2).transpose(1, 2)
        temb = self.time(timestep[:, None]) + scale * self.text(text).mean(1)
        for block in self.blocks:
            h = block(h, temb)
        h = self.head(h).unflatten(1, (height, width)).unflatten(-1, (3, PATCH, PATCH))
        sample = h.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return Prediction(sample) if return_dict else (sample,)


def new_model() -> PictureModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PictureModel().eval()


def inputs(height: int = 8, width: int = 12, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(batch, 3, height, width, generator=generator)
    return picture, torch.ones(batch), torch.randn(batch, 5, 8, generator=generator)


def denoise(model: Any, given: tuple[Tensor, Tensor, Tensor], steps: int = 10) -> Tensor:
    """Euler steps from 1 to 0."""
    picture, time, text = given
    sigmas = torch.linspace(1.0, 0.0, steps + 1).tolist()
    with torch.no_grad():
        for i in range(steps):
            velocity = model(picture, torch.full_like(time, sigmas[i]), text).sample
            picture = picture + (sigmas[i + 1] - sigmas[i]) * velocity
    return picture


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the model above, for both strategies that the tests use."""
    target = tmp_path_factory.mktemp("artifact") / "model.pt2"
    dynamic = {
        "picture": {0: Dim("batch", min=2, max=4), 2: 2 * Dim("rows", min=2, max=16), 3: 2 * Dim("columns", min=2, max=16)},
        "timestep": {0: Dim("batch", min=2, max=4)},
        "text": {0: Dim("batch", min=2, max=4)},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options = {**OPTIONS, "noise_scale": 0.001, "strategy": "adaptive"}
        made = cache_dit.export(new_model(), inputs(), target, dynamic_shapes=dynamic, **options)
    assert made == target
    return target


@pytest.fixture
def fixed(path: Path) -> Artifact:
    return cache_dit.load(path, strategy="fixed", skip_interval=2, warmup_steps=3, **OPTIONS)


def reference(**options: Any) -> PictureModel:
    return cache_dit.enable_cache(new_model(), **{**OPTIONS, "inner": "eager", **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "fixed", "skip_interval": 2, "warmup_steps": 3},
        {"strategy": "fixed", "noise_scale": 0.001},
        {"strategy": "adaptive", "target_speedup": 2.0},
        {"strategy": "adaptive", "tolerance": 0.2, "forecast": "auto"},
        {"schedule": "1011010101"},
    ],
)
def test_results_are_those_of_the_compiled_model(path: Path, options: dict[str, Any]) -> None:
    """Same decisions and, for each size, the same pictures up to what another compiler rounds otherwise."""
    artifact, model = cache_dit.load(path, **{**OPTIONS, **options}), reference(**options)
    for height, width, batch in ((8, 12, 2), (4, 4, 3), (20, 32, 2), (8, 12, 2)):
        given = inputs(height, width, batch)
        for each in (artifact, model):
            cache_dit.new_run(each, 10, torch.linspace(1.0, 0.0, 11).tolist(), "euler", "flow")
        torch.testing.assert_close(denoise(artifact, given), denoise(model, given), rtol=1e-4, atol=1e-5)
    ours, theirs = cache_dit.get_stats(artifact), cache_dit.get_stats(model)
    assert (ours.calls, ours.hits, ours.runs) == (theirs.calls, theirs.hits, theirs.runs)
    assert ours.hits > 0
    assert ours.compiles == 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_computed_steps_are_exact(path: Path) -> None:
    artifact = cache_dit.load(path, schedule="1", **OPTIONS)
    given = inputs(16, 8)
    torch.testing.assert_close(denoise(artifact, given), denoise(new_model(), given), rtol=1e-4, atol=1e-5)
    assert cache_dit.get_stats(artifact).hits == 0


@pytest.mark.slow
def test_arguments_come_by_place_or_by_name_and_in_any_layout(fixed: Artifact) -> None:
    picture, time, text = inputs()
    strided = picture.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    with torch.inference_mode():
        first = fixed(picture, time, text)
        assert isinstance(first, dict)
        assert first.sample is first["sample"] and first.sample is first[0]
        assert torch.equal(fixed(text=text, timestep=time, picture=strided).sample, first.sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "key", "said"),
    [
        (lambda p, t, c: (p[:, :, :7], t, c), ValueError, "artifact_range", "dimension 2 is 7"),
        (lambda p, t, c: (torch.zeros(2, 3, 40, 8), t, c), ValueError, "artifact_range", "4 … 32"),
        (lambda p, t, c: (torch.zeros(2, 3, 8, 2), t, c), ValueError, "artifact_range", "dimension 3 is 2"),
        (lambda p, t, c: (torch.zeros(5, 3, 8, 8), torch.ones(5), torch.zeros(5, 5, 8)), ValueError, "artifact_range", "2 … 4"),
        (lambda p, t, c: (p, torch.ones(3), c), ValueError, "artifact_range", "timestep"),
        (lambda p, t, c: (p, t, torch.zeros(2, 6, 8)), ValueError, "artifact_range", "allowed: 5"),
        (lambda p, t, c: (p.double(), t, c), ValueError, "artifact_input", "float64"),
        (lambda p, t, c: (p[0], t, c), ValueError, "artifact_input", "[3, 8, 12]"),
        (lambda p, t, c: (p.to("meta"), t, c), ValueError, "artifact_input", "meta"),
        (lambda p, t, c: (p, 0.5, c), TypeError, "artifact_tensor", "float"),
        (lambda p, t, c: (p, t), TypeError, "artifact_arguments", "text"),
        (lambda p, t, c: (p, t, c, 2.0), TypeError, "artifact_arguments", "scale"),
        (lambda p, t, c: (p, t, c, 1.0, True, 3), TypeError, "artifact_arguments", "…"),
        (lambda p, t, c: (p, t, [c, c]), TypeError, "artifact_structure", "text"),
        (lambda p, t, c: (p.requires_grad_(), t, c), cache_dit.CacheDitError, "artifact_grad", "picture"),
    ],
)
def test_what_was_not_exported_is_refused(
    path: Path, change: Any, error: type[Exception], key: str, said: str
) -> None:
    for language, words in zip(("zh", "en"), TEXTS[key], strict=True):
        artifact = cache_dit.load(path, language=language)
        with pytest.raises(error) as caught:
            artifact(*change(*inputs()))
        # the last fixed words of the text
        assert words.split("}")[-1] in str(caught.value) and (language == "zh" or said in str(caught.value))
        assert cache_dit.get_stats(artifact).calls == 0


@pytest.mark.slow
def test_clones_keep_their_own_clocks(path: Path) -> None:
    """Requests whose steps come in turns get what each gets alone."""
    options = {**OPTIONS, "strategy": "fixed"}
    first = cache_dit.load(path, **options)
    second = first.clone()
    sizes = {first: inputs(8, 12, seed=3), second: inputs(16, 4, seed=4)}
    pictures = {each: given[0] for each, given in sizes.items()}
    sigmas = torch.linspace(1.0, 0.0, 11).tolist()
    with torch.no_grad():
        for i in range(10):
            for each, (_, time, text) in sizes.items():
                velocity = each(pictures[each], torch.full_like(time, sigmas[i]), text).sample
                pictures[each] = pictures[each] + (sigmas[i + 1] - sigmas[i]) * velocity
    for each, given in sizes.items():
        assert torch.equal(pictures[each], denoise(cache_dit.load(path, **options), given))
        assert (cache_dit.get_stats(each).calls, cache_dit.get_stats(each).hits) == (10, 4)


@pytest.mark.slow
def test_it_is_a_model_to_the_rest_of_the_package(fixed: Artifact) -> None:
    assert "blocks.1" in str(cache_dit.explain(fixed))
    denoise(fixed, inputs())
    assert "Cache hits: 4" in cache_dit.summary(fixed)
    assert cache_dit.get_stats(fixed).cache_bytes > 0
    plain = denoise(new_model(), inputs())
    assert not torch.allclose(denoise(fixed, inputs()), plain, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        cache_dit.disable_cache(fixed)
    torch.testing.assert_close(denoise(fixed, inputs()), plain, rtol=1e-4, atol=1e-5)
    assert cache_dit.get_stats(fixed).calls == 20
    with pytest.raises(cache_dit.CacheDitError):
        cache_dit.enable_cache(fixed)


@pytest.mark.slow
def test_weights_are_in_the_file_once(path: Path) -> None:
    model = new_model()
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        places = {
            program: json.loads(archive.read(f"{path.stem}/data/aotinductor/{program}/weights_config.json"))
            for program in ("model", "reuse")
        }
        stored = [torch.load(io.BytesIO(archive.read(f"{path.stem}/{n}"))) for n in names if n.startswith("data/weights/")]
    assert set(places["reuse"]) < set(places["model"]) <= set(model.state_dict())
    assert all(places["model"][name][0] == place[0] for name, place in places["reuse"].items())
    assert len(stored) == len(places["model"])
    # a skipped step needs no weights of the blocks that it skips
    assert not any(name.startswith(("blocks.1", "blocks.2")) for name in places["reuse"])
    for name, (file, *place) in places["model"].items():
        number = int(file.removeprefix("weight_"))
        assert torch.equal(sorted_by_file(stored, names)[number].as_strided(*place), model.state_dict()[name])


def sorted_by_file(stored: list[Tensor], names: list[str]) -> dict[int, Tensor]:
    numbers = [int(name.rpartition("_")[2]) for name in names if name.startswith("data/weights/")]
    return dict(zip(numbers, stored, strict=True))


_ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


def run_alone(code: str, folder: Path, absent: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that cannot import these packages."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CACHE_DIT_LANG": "en"}
    command = [sys.executable, "-c", _ALONE.format(absent=set(absent)) + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_torch_alone_runs_it(path: Path, fixed: Artifact, tmp_path: Path) -> None:
    torch.save(list(inputs()), tmp_path / "inputs.pt")
    shutil.copy(ROOT / "examples" / "plain_artifact.py", tmp_path)
    code = f"""
sys.argv = ["plain_artifact.py", {str(path)!r}, "inputs.pt", "result.pt", "--steps", "10"]
import runpy, torch
runpy.run_path("plain_artifact.py", run_name="__main__")
program = torch._inductor.aoti_load_package({str(path)!r})
assert "embed.weight" in program.get_constant_fqns()
"""
    done = run_alone(code, tmp_path, ("cache_dit", "diffusers", "transformers"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "result.pt"), denoise(fixed, inputs()))


@pytest.mark.slow
def test_the_package_runs_it_without_model_tracer_or_diffusers(path: Path, fixed: Artifact, tmp_path: Path) -> None:
    torch.save(list(inputs()), tmp_path / "inputs.pt")
    code = f"""
import torch, cache_dit
model = cache_dit.load({str(path)!r}, strategy="fixed", forecast="reuse", noise_scale=0.0)
picture, time, text = torch.load("inputs.pt")
sigmas = torch.linspace(1.0, 0.0, 11).tolist()
with torch.no_grad():
    for i in range(10):
        velocity = model(picture, torch.full_like(time, sigmas[i]), text).sample
        picture = picture + (sigmas[i + 1] - sigmas[i]) * velocity
torch.save(picture, "result.pt")
print(cache_dit.get_stats(model).hits, "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""
    done = run_alone(code, tmp_path, ("diffusers", "transformers", "test_artifact", "torch._dynamo"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "False", "False"]
    assert torch.equal(torch.load(tmp_path / "result.pt"), denoise(fixed, inputs()))


@pytest.mark.slow
def test_the_server_gives_each_request_its_single_run(path: Path) -> None:
    """Requests of mixed sizes in flight together; the texts are the labels as numbers."""
    pytest.importorskip("prometheus_client")
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
    assert spec is not None and spec.loader is not None
    serve = sys.modules["serve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)

    def predict(model: Any, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        text = (labels.float()[:, None, None] / 10.0).expand(-1, 5, 8)
        velocity: Tensor = model(x, sigma, text).sample
        return velocity

    serve.MAX_IMAGES = 2
    model = cache_dit.load(path, **{**OPTIONS, "strategy": "adaptive", "target_speedup": 2.0})
    with serve.serving(model, shape=(3, 8, 8), concurrent=3, predict=predict) as port:
        differing, metrics = serve.load_test(model, 12, port, (3, 8, 8), predict)
    assert differing == 0
    assert 'cache_dit_requests_total{outcome="answered"} 12.0' in metrics
    assert "cache_dit_request_skipped_share_count 12.0" in metrics
    skipped = [line for line in metrics.splitlines() if line.startswith('cache_dit_steps_total{decision="skipped"}')]
    assert float(skipped[0].split()[-1]) > 12
    engine = serve.Engine(model, shape=(5, 8, 8), predict=predict)
    with pytest.raises(ValueError):
        engine.submit(serve.Request((1, 2))).result(60)
    assert 'outcome="failed"} 1.0' in serve.generate_latest(engine.metrics.registry).decode()
    engine.close()
    for wrong in ({}, {"prompt": "12"}, {"prompt": "1 2 3"}, {"prompt": "1", "steps": 1}, {"prompt": "1", "seed": "x"}, 3):
        with pytest.raises(ValueError):
            serve.Request.of(wrong)


# ---- files that must not run ---------------------------------------------------------------------------------------


def with_manifest(path: Path, target: Path, change: Any) -> Path:
    """A copy whose manifest was changed."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("cache_dit.json"):
                data = json.loads(content)
                change(data)
                content = json.dumps(data).encode()
            copy.writestr(name, content)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (lambda data: data.update(torch="2.11.0"), "artifact_torch", "2.11.0"),
        (lambda data: data["machine"].update(machine="riscv128"), "artifact_machine", "riscv128"),
        (lambda data: data["machine"].update(cpu="AVX9000"), "artifact_machine", "AVX9000"),
        (lambda data: data.update(format=99), "artifact_corrupt", "99"),
        (lambda data: data.pop("region"), "artifact_corrupt", "region"),
        (lambda data: data["front"].update(dtype="float31"), "artifact_corrupt", "float31"),
    ],
)
def test_files_for_elsewhere_are_refused(path: Path, tmp_path: Path, change: Any, key: str, said: str) -> None:
    other = with_manifest(path, tmp_path / path.name, change)
    for language, words in zip(("zh", "en"), TEXTS[key], strict=True):
        with pytest.raises(cache_dit.CacheDitError) as caught:
            cache_dit.load(other, language=language)
        assert words.split("}")[-1] in str(caught.value) and said in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
def test_files_for_another_device_are_refused(path: Path, tmp_path: Path) -> None:
    other = with_manifest(path, tmp_path / path.name, lambda data: data.update(device="cuda"))
    with pytest.raises(cache_dit.CacheDitError, match="compiled for cuda"):
        cache_dit.load(other, language="en")


@pytest.mark.slow
def test_damaged_files_are_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(path) as archive:
        weight = next(each for each in archive.infolist() if "data/weights/" in each.filename)
        library = next(each for each in archive.infolist() if each.filename.endswith(".so"))
    places = [weight.header_offset + weight.file_size // 2 + 64, library.header_offset + library.file_size // 2]
    for place in places:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(cache_dit.CacheDitError, match="damaged"):
            cache_dit.load(damaged, language="en")
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        damaged.write_bytes(content)
        with pytest.raises(cache_dit.CacheDitError, match="damaged"):
            cache_dit.load(damaged, language="en")
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("something/else", "")
    with pytest.raises(cache_dit.CacheDitError, match="damaged"):
        cache_dit.load(damaged, language="en")
    with pytest.raises(FileNotFoundError):
        cache_dit.load(tmp_path / "absent.pt2")


@pytest.mark.slow
def test_residuals_kept_in_eight_bits_are_those_of_the_compiled_model(tmp_path: Path) -> None:
    options = {**OPTIONS, "strategy": "fixed", "skip_interval": 2, "warmup_steps": 3, "residual_dtype": "int8"}
    dynamic = {"picture": {2: 2 * Dim("rows", min=2, max=16)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        target = cache_dit.export(new_model(), inputs(), tmp_path / "small.pt2", dynamic_shapes=dynamic, **options)
    artifact, model = cache_dit.load(target, language="en"), reference(**options)
    for given in (inputs(), inputs(height=4)):
        found = []
        for each in (artifact, model):
            cache_dit.new_run(each, 10, torch.linspace(1.0, 0.0, 11).tolist(), "euler", "flow")
            picture = denoise(each, given)
            # what correction keeps of the last skipped steps goes with the run
            cache_dit.new_run(each)
            found.append((picture, cache_dit.get_stats(each)))
        (picture, stats), (wanted, others) = found
        torch.testing.assert_close(picture, wanted, rtol=1e-4, atol=1e-4)
        assert (stats.hits, stats.cache_bytes) == (others.hits, others.cache_bytes)
        assert stats.hits > 0
        height, width = given[0].shape[2] // PATCH, given[0].shape[3] // PATCH
        # OPTIONS correct skipped steps, so three residuals are kept
        assert stats.cache_bytes == 3 * 2 * height * width * (WIDTH + 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"front_blocks": 2}, {"order": 3, "forecast": "taylor"}, {"residual_dtype": "bfloat16"}, {"inner": "eager"}],
)
def test_options_that_were_compiled_in_cannot_change(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        cache_dit.load(path, language="en", **options)
    with pytest.raises(TypeError):
        cache_dit.load(path, no_option=1)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"target_speedup": 3.0}, {"strategy": "fixed"}, {"strategy": "adaptive", "warmup_steps": 1}])
def test_loading_with_options_is_exporting_with_them(path: Path, given: dict[str, Any]) -> None:
    wanted = resolve_options({**OPTIONS, "noise_scale": 0.001, "strategy": "adaptive", **given, "language": None})
    session = session_of_module(cache_dit.load(path, **given))
    assert session is not None and session.options == wanted


# ---- what of the options a file keeps: nothing is compiled -----------------------------------------------------------


@pytest.fixture
def defaults() -> Iterator[None]:
    reset_global_config()
    yield
    reset_global_config()


class Kept(NamedTuple):
    """What of a manifest tells the options."""

    options: dict[str, Any]
    history: int = 4


def kept(**options: Any) -> Any:
    return Kept(json.loads(json.dumps(options_as_data(resolve_options(options), chosen_names(options)))))


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("made", [{}, {"skip_interval": 3}, {"warmup_steps": 3, "skip_interval": None}, {"tolerance": 0.3}])
@pytest.mark.parametrize("exported", ["adaptive", "front_clock"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target_speedup": 3.0},
        {"strategy": "adaptive", "target_speedup": 3.0},
        {"strategy": "fixed"},
        {"strategy": "sigma"},
        {"strategy": "dynamic", "skip_interval": 2},
    ],
)
def test_defaults_follow_from_what_is_asked_for_at_load(made: dict[str, Any], exported: str, given: dict[str, Any]) -> None:
    """Not from what was exported: what `enable_cache` would make of all that was given."""
    made = {**made, "strategy": exported}
    assert _options(kept(**made), given, None) == resolve_options({**made, **given})


@pytest.mark.usefixtures("defaults")
def test_the_configuration_of_the_export_holds_and_not_that_of_the_loader() -> None:
    cache_dit.set_global_config(default_skip_interval=5, default_strategy="adaptive")
    file = kept()
    cache_dit.set_global_config(
        default_skip_interval=7, default_warmup_steps=9, default_strategy="fixed", global_debug=True
    )
    loaded = _options(file, {}, None)
    assert (loaded.strategy, loaded.skip_interval, loaded.warmup_steps, loaded.debug) == ("adaptive", 5, None, True)


@pytest.mark.usefixtures("defaults")
def test_files_that_name_every_default_are_read_as_they_were() -> None:
    file: Any = Kept({"strategy": "fixed", "skip_interval": 2, "warmup_steps": 3})
    assert _options(file, {}, None) == resolve_options({})
    assert _options(file, {"warmup_steps": 1}, None) == resolve_options({"warmup_steps": 1})


# ---- models that cannot be exported: nothing is compiled -------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t


class Breaking(PictureModel):
    """Reads a tensor on the host."""

    def forward(self, picture: Tensor, timestep: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(picture if timestep.max().item() > 0.5 else picture + 1, timestep, text)


@pytest.mark.parametrize(
    ("model", "given", "options", "error", "key"),
    [
        (Plain(), (torch.zeros(2, 4), torch.ones(1)), {}, cache_dit.CacheDitError, "no_region"),
        (Breaking(), inputs(), {}, cache_dit.CacheDitError, "export_untraced"),
        (PictureModel(), inputs(), {"inner": "eager"}, ValueError, "export_inner"),
        (PictureModel(), inputs(), {"lowering": "cond"}, ValueError, "export_inner"),
        (PictureModel(), (1, 2, 3, 4, 5, 6), {}, TypeError, "export_arguments"),
        (PictureModel(), 3, {}, TypeError, "export_arguments"),
        (PictureModel(), inputs(), {"dynamic_shapes": {"image": {2: Dim("rows")}}}, ValueError, "export_shapes"),
        (PictureModel(), inputs(), {"front_blocks": 3}, cache_dit.CacheDitError, "no_region"),
    ],
)
def test_models_that_cannot_be_exported(
    model: nn.Module, given: Any, options: dict[str, Any], error: type[Exception], key: str, tmp_path: Path
) -> None:
    for language, words in zip(("zh", "en"), TEXTS[key], strict=True):
        with pytest.raises(error) as caught:
            cache_dit.export(model, given, tmp_path / "model.pt2", language=language, **options)
        if key != "export_shapes":
            assert words.split("}")[-1] in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_file_s_name_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.pt2"):
        cache_dit.export(PictureModel(), inputs(), tmp_path / "model.onnx", language="en")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    cache_dit.reset_cache_stats()
