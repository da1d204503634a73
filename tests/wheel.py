"""A package that pip can install without an index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["build"]


def build(directory: Path) -> Path:
    """Return a wheel with the module ``rsx_extra``, built below a directory."""
    package = directory / "rsx_extra"
    package.mkdir()
    (package / "rsx_extra.py").write_text("NAME = 'installed by pip'\n")
    (package / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\n"
        'build-backend = "setuptools.build_meta"\n'
        '[project]\nname = "rsx-extra"\nversion = "1.0"\n'
        '[tool.setuptools]\npy-modules = ["rsx_extra"]\n'
    )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "-w", str(directory), str(package)]
    subprocess.run(command, check=True)
    return next(directory.glob("rsx_extra-*.whl"))
