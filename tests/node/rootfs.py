"""A root file system as an operator would unpack one: Python, Ray and raysandbox."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import ray

import raysandbox

__all__ = ["PYTHON", "make"]

#: Its interpreter, as seen inside.
PYTHON = "/opt/py/bin/python3"
_LEFT_OUT = ("test", "tests", "__pycache__", "*.pyi", "*.a", "idlelib", "tkinter")


def make(root: Path, words: str) -> None:
    """Fill a directory with what a worker needs and this host has, and no more.

    Args:
        root: It is made.
        words: What only this file system has, as a module ``only_there``.
    """
    prefix, packages = Path(sys.base_prefix), Path(ray.__file__).parents[1]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    inside = root / "opt" / "py"
    (inside / "bin").mkdir(parents=True)
    shutil.copy(os.path.realpath(sys.executable), inside / "bin" / version)
    (inside / "bin" / "python3").symlink_to(f"/opt/py/bin/{version}")
    own = inside / "lib" / version
    _copy(prefix / "lib" / version, own, "site-packages")
    _copy(packages, own / "site-packages", "mypy", "ruff", "pip", "raysandbox*")
    _copy(Path(raysandbox.__file__).parent, own / "site-packages" / "raysandbox")
    (own / "site-packages" / "only_there.py").write_text(f"WORDS = {words!r}\n")
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for program in ("bin/sh", "sbin/ldconfig"):
        place = root / "usr" / program
        place.parent.mkdir(parents=True)
        shutil.copy(f"/{program}", place)
    for directory in ("etc", "proc", "srv/data", "tmp", "usr/lib", "usr/lib64"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "srv" / "data" / "words").write_text(words)
    # What would show the host's own if links were followed there.
    (root / "etc" / "mime.types").symlink_to("/etc/passwd")
    (root / "srv" / "host").symlink_to("/etc")
    programs = [*root.rglob("*.so"), *root.rglob("*.so.*")]
    for library in _libraries([inside / "bin" / version, *programs, Path("/bin/sh")]):
        _put(library, root)
    (seccomp,) = set(re.findall(r"libseccomp\S* .* => (\S+)", _cache()))
    _put(seccomp, root)
    subprocess.run(["/sbin/ldconfig", "-r", str(root)], check=True)


def _copy(source: Path, target: Path, *left_out: str) -> None:
    ignored = shutil.ignore_patterns(*_LEFT_OUT, *left_out)
    shutil.copytree(
        source, target, symlinks=False, ignore=ignored, copy_function=_link,
        dirs_exist_ok=True, ignore_dangling_symlinks=True,
    )  # fmt: skip


def _link(source: str, target: str) -> None:
    """A hard link where that can be: what is in it is the host's, and large."""
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError:
        assert not os.path.lexists(target), target  # it could be a link to the host's
        shutil.copy2(source, target)


def _cache() -> str:
    return subprocess.run(
        ["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True
    ).stdout


def _libraries(programs: Iterable[Path]) -> set[str]:
    said = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False
    ).stdout
    return set(re.findall(r"(/\S+\.so\S*) \(0x", said))


def _put(library: str, root: Path) -> None:
    if Path(library).is_relative_to(root):
        return
    directory, _, name = library.rpartition("/")
    # As the image's own links have it: /lib is usr/lib there.
    there = re.sub(r"^/(lib|lib64)(?=/|$)", r"/usr/\1", directory)
    place = root / there.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    if not (place / name).exists():
        shutil.copy(os.path.realpath(library), place / name)
