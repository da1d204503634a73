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
# One line that Python executes when it starts. Errors in such a line are printed and
# forgotten, and Ray would run without its walls: so they end the process.
AUTOSTART = (
    "import os; os.environ.get('RAYSANDBOX', '0') not in ('', '0') and exec("
    '"try:\\n import raysandbox.node.autostart\\n'
    "except BaseException as error:\\n os.write(2, b'raysandbox: RAYSANDBOX is set "
    "and the launcher can not be put in front of Ray: ' + repr(error).encode() + "
    "b'\\\\n')\\n os._exit(1)\")\n"
)


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
        (Path(self.build_lib) / "raysandbox.pth").write_text(AUTOSTART)


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
