"""Interpreters of the operator's: what is looked at before a node starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysandbox.errors import ProfileError
from raysandbox.node import interpreters
from raysandbox.policy import Policy


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that the policy's owner alone can write."""
    tmp_path.chmod(0o755)
    return tmp_path


def script(directory: Path, prints: str) -> str:
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{prints}\n")
    path.chmod(0o755)
    return str(path)


def test_one_with_the_node_s_versions_is_taken():
    """What belongs to it is what its worker must see."""
    (found,) = look(os.path.abspath(sys.executable))
    assert any(Path(sys.executable).is_relative_to(root) for root in found.roots)
    assert any(Path(os.__file__).is_relative_to(root) for root in found.roots)


def look(*paths: str, **more: Any) -> list[interpreters.Found]:
    interpreters._look.cache_clear()
    table = {"py_executable": paths, **more, "why": "a test"}
    return interpreters.look(Policy.model_validate({"runtime_env": table}))


OLD = '{"ray": "2.0.0", "raysandbox": "0", "python": "3", "roots": []}'


@pytest.mark.parametrize(
    ("prints", "says"),
    [
        ("echo no module named ray >&2; exit 1", "can't use ray and raysandbox: no"),
        ("echo hello", "is no Python that starts"),
        (f"echo '{OLD}'", "has ray 2.0.0, and the node has"),
    ],
)
def test_what_it_lacks_is_named(directory, prints, says):
    """With key and path; a worker that can't start would be tried for ever."""
    path = script(directory, prints)
    with pytest.raises(ProfileError) as caught:
        look(path)
    assert f"runtime_env.py_executable = '{path}': " in str(caught.value).replace(
        '"', "'"
    )
    assert says in str(caught.value)


def test_one_that_others_can_write_is_refused(directory):
    """It would run in the worker, which has Ray's credentials."""
    path = script(directory, "exit 0")
    os.chmod(path, 0o777)
    with pytest.raises(ProfileError, match="group or others can write it"):
        look(path)
    with pytest.raises(ProfileError, match=r"runtime_env\.conda\.x .*does not exist"):
        look(conda={"x": f"{directory}/none"})


def test_what_a_profiler_needs_is_there(directory):
    """It would fail in each worker; what starts Python elsewhere is seen itself."""
    path = script(directory, f'echo started; exec {sys.executable} "$@"')
    nsight = {"program": path, "write": (f"{directory}/reports",)}
    with pytest.raises(ProfileError, match="reports, which does not exist"):
        look(nsight=nsight)
    (directory / "reports").mkdir()
    (found,) = look(nsight=nsight)
    assert path in found.roots


def image(root: Path, prints: str) -> dict[str, Any]:
    """An image with nothing in it but a shell script."""
    root.mkdir()
    (root / "py").mkdir()
    script(root / "py", prints)
    return {"docker.example/x": {"root": str(root), "python": "/py/python"}}


@pytest.mark.root
def test_an_image_without_a_python_is_named(directory):
    """With the path on the host, and how to say where it is."""
    images = image(directory / "root", "exit 0")
    with pytest.raises(ProfileError, match=r"root/py/python.*is no Python that starts"):
        look(image_uri=images)
    (directory / "root" / "py" / "python").unlink()
    with pytest.raises(ProfileError, match=r"python = PATH says where it is"):
        look(image_uri=images)


def test_an_image_s_interpreter_is_nobody_else_s(directory):
    """Links are followed inside it, as its workers will."""
    images = image(directory / "root", "exit 0")
    python = directory / "root" / "py" / "python"
    python.rename(directory / "root" / "py" / "python3")
    python.symlink_to("/py/python3")
    (directory / "root" / "py" / "python3").chmod(0o777)
    with pytest.raises(ProfileError, match="group or others can write it"):
        look(image_uri=images)
    python.unlink()
    python.symlink_to("/bin/sh")  # the host's, which the image has not
    with pytest.raises(ProfileError, match="does not exist"):
        look(image_uri=images)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory to which everybody gets, as none of pytest's is."""
    with tempfile.TemporaryDirectory(prefix="rsn-", dir="/srv") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.root
def test_modules_of_an_image_are_nobody_else_s(open_directory):
    """They run in the worker, which has Ray's credentials; a closed way is enough."""
    import ray

    import raysandbox

    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    words = f"{ray.__version__}", raysandbox.__version__, python
    says = f"echo '{json.dumps(dict(zip(('ray', 'raysandbox', 'python'), words)))}'"
    says = says.replace("}", ', "roots": ["/py"], "script": "/py/worker.py"}')
    images = image(open_directory / "root", says)
    libraries = _libraries_of_a_shell(open_directory / "root")
    assert libraries
    (found,) = look(image_uri=images)
    assert (found.roots, found.script) == (["/py"], "/py/worker.py")
    module = open_directory / "root" / "py" / "module.py"
    module.write_text("")
    module.chmod(0o666)
    with pytest.raises(ProfileError, match=r"others can change: .*/module\.py, mode"):
        look(image_uri=images)
    # Where a link among the modules may lead.
    module.unlink()
    elsewhere = open_directory / "root" / "srv" / "module.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text("")
    elsewhere.chmod(0o666)
    with pytest.raises(ProfileError, match=r"others can change: .*/srv/module\.py"):
        look(image_uri=images)
    open_directory.chmod(0o700)
    assert look(image_uri=images)


def _libraries_of_a_shell(root: Path) -> list[str]:
    """Put /bin/sh and what it is linked with into an image."""
    (root / "bin").mkdir()
    shutil.copy("/bin/sh", root / "bin" / "sh")
    said = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True).stdout
    found = re.findall(r"(/\S+) \(0x", said)
    for library in found:
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    return found
