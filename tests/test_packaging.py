"""The project as others meet it: installed, imported, or cloned into ComfyUI's folder of custom nodes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

import cache_dit

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cache_dit": "cache_dit", "passes": "cache_dit/passes", "comfy": "cache_dit/comfy"}

LOAD_ROOT = """
import importlib.util, json, logging, sys
logging.basicConfig(format="%(message)s")
sys.path += PATH
before = list(sys.path)
spec = importlib.util.spec_from_file_location(NAME, ROOT + "/__init__.py", submodule_search_locations=[ROOT])
pack = importlib.util.module_from_spec(spec)
sys.modules[NAME] = pack
spec.loader.exec_module(pack)
assert sys.path == before, sys.path
import cache_dit
ours = sys.modules.get("cache_dit_fx", cache_dit)
print(json.dumps({
    "cache_dit": cache_dit.__file__,
    "ours": ours.__file__,
    "version": getattr(cache_dit, "__version__", None),
    "nodes": pack.NODE_CLASS_MAPPINGS is sys.modules[ours.__name__ + ".comfy"].NODE_CLASS_MAPPINGS,
    "names": [name for name in vars(pack) if name.isupper() and not name.startswith("_")],
    "comfy": "comfy" in sys.modules,
}))
"""


def run_python(code: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def load_root(tmp_path: Path, name: str, *extra_path: str) -> tuple[dict[str, Any], str]:
    """Load the root as ComfyUI does, in an interpreter that finds nothing of ours; the facts and the log."""
    path = [*extra_path, sysconfig.get_path("purelib")]
    code = f"PATH, NAME, ROOT = {path!r}, {name!r}, {str(ROOT)!r}\n{LOAD_ROOT}"
    # -S: no .pth file is read, so an editable install is not seen.
    done = run_python(code, tmp_path, "-I", "-S")
    return json.loads(done.stdout), done.stderr


def test_metadata_names_the_backend_and_the_version() -> None:
    assert importlib.metadata.version("cache-dit-fx") == cache_dit.__version__
    (backend,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="cache_dit")
    assert backend.value == "cache_dit.backend:cache_dit_backend"
    assert callable(backend.load())


def test_run_time_dependencies_are_torch_and_numpy_alone() -> None:
    needed = importlib.metadata.requires("cache-dit-fx") or []
    assert sorted(line for line in needed if "extra ==" not in line) == ["numpy", "torch>=2.11"]


def test_wheel_holds_every_module_under_its_name(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for file in ("pyproject.toml", "setup.cfg", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=300)
    (wheel,) = tmp_path.glob("cache_dit_fx-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("py.typed")]
    }
    missing = sorted(expected - held)
    assert not missing, f"does a folder lack its __init__.py? Not in the wheel: {missing}"


@pytest.mark.parametrize("name", ["custom_nodes.cache-dit-fx", "/srv/ComfyUI/custom_nodes/cache-dit-fx_x_1"])
def test_root_makes_the_package_importable(tmp_path: Path, name: str) -> None:
    seen, log = load_root(tmp_path, name)
    assert seen["cache_dit"] == seen["ours"] == str(ROOT / "cache_dit" / "__init__.py")
    assert seen["version"] == cache_dit.__version__
    assert seen["nodes"] is True
    assert {"NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"} <= set(seen["names"])
    assert ("WEB_DIRECTORY" in seen["names"]) == (ROOT / "comfy" / "web").is_dir()
    assert seen["comfy"] is False
    assert log == ""


def test_root_leaves_another_cache_dit_alone(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "cache_dit" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("enable_cache = None\n")
    seen, log = load_root(tmp_path, "custom_nodes.cache-dit-fx", str(other.parents[1]))
    assert seen["cache_dit"] == str(other)
    assert seen["ours"] == str(ROOT / "cache_dit" / "__init__.py")
    assert seen["nodes"] is True
    assert log.count("Another project") == 1 and str(other.parent) in log


def test_root_takes_a_mere_folder_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "cache_dit").mkdir(parents=True)
    seen, log = load_root(tmp_path, "custom_nodes.cache-dit-fx", str(tmp_path / "elsewhere"))
    assert seen["cache_dit"] == str(ROOT / "cache_dit" / "__init__.py")
    assert log == ""


@pytest.mark.parametrize("name", ["__init__", ROOT.name])
def test_root_does_nothing_for_a_test_runner(tmp_path: Path, name: str) -> None:
    code = f"""
import runpy, sys
names = runpy.run_path({str(ROOT / "__init__.py")!r}, run_name={name!r})
assert "NODE_CLASS_MAPPINGS" not in names and "cache_dit" not in sys.modules
"""
    run_python(code, tmp_path)


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import cache_dit
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not {"torch", "diffusers", "transformers", "comfy", "numpy"} & new, new
print(*(name for name in ("torch._dynamo", "torch._inductor", "diffusers", "comfy") if name in sys.modules))
"""
    assert run_python(code, tmp_path).stdout.strip() == ""


def test_folders_have_their_installed_names(tmp_path: Path) -> None:
    code = "import cache_dit.comfy, cache_dit.passes; print(cache_dit.passes.__file__, cache_dit.comfy.__file__)"
    files = [Path(file) for file in run_python(code, tmp_path).stdout.split()]
    assert [file.parent.name for file in files] == ["passes", "comfy"]


def test_root_is_not_on_the_path() -> None:
    assert ROOT not in [Path(entry or os.curdir).resolve() for entry in sys.path]
