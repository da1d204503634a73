"""Builds what setuptools alone does not: the C launcher, the shipped profiles.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPackage(build_py):
    """Adds raysandbox/_bin and raysandbox/_profiles to the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            raise SystemExit(
                "an editable install has no launcher: run `make native` and work "
                "in the source tree, or install the wheel"
            )
        package = Path(self.build_lib).resolve() / "raysandbox"
        binaries = package / "_bin"
        shutil.rmtree(binaries, ignore_errors=True)
        native = str(ROOT / "native")
        subprocess.run(["make", "-C", native, f"OUT={binaries}"], check=True)
        profiles = package / "_profiles"
        shutil.rmtree(profiles, ignore_errors=True)
        profiles.mkdir(parents=True)
        for source in sorted((ROOT / "profiles").glob("*.toml")):
            shutil.copyfile(source, profiles / source.name)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform: the C code does not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """Goes to platlib, though there is no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildPackage, "bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
)
