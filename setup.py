"""The list of packages: no settings file can find packages in one folder and name them as part of another."""

from setuptools import find_packages, setup

beside = find_packages(include=["comfy", "comfy.*", "passes", "passes.*"])
setup(packages=[*find_packages(include=["cache_dit", "cache_dit.*"]), *(f"cache_dit.{name}" for name in beside)])
