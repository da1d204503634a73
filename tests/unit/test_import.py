"""``import raysandbox`` costs a driver nothing that it does not use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import raysandbox

HEAVY = ("ray", "pydantic", "typer", "rich", "numpy", "pyarrow", "cgroupspy", "asyncio")


def python(code: str, *options: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    """Neither Ray nor anything that validates, prints or computes."""
    shown = python("import sys, raysandbox; print(*sys.modules)")
    loaded = {module.partition(".")[0] for module in shown.split()}
    assert "raysandbox" in loaded
    assert not loaded & set(HEAVY)


def test_errors_load_nothing_heavy_either() -> None:
    """``except raysandbox.TaskOutOfMemory`` is no reason to import a validator."""
    code = "import sys, raysandbox; raysandbox.TaskOutOfMemory; print(*sys.modules)"
    loaded = {module.partition(".")[0] for module in python(code).split()}
    assert not loaded & set(HEAVY)


def test_the_zygotes_modules_stay_slim() -> None:
    """What every jail is forked from: each module there is paid for by every task."""
    parent = os.path.dirname(os.path.dirname(raysandbox.__file__))
    code = f"import sys; sys.path[:0] = [{parent!r}]; import raysandbox.jail.zygote; "
    shown = python(f"{code} print(*sys.modules)", "-I", "-S")
    loaded = {module.partition(".")[0] for module in shown.split()}
    assert not loaded & set(HEAVY)
    assert not {"subprocess", "typing_extensions", "tomllib"} & loaded


def test_import_is_quick() -> None:
    """A few milliseconds of CPU over the interpreter's own start."""
    code = (
        "import time; a = time.process_time(); import raysandbox; "
        "print(time.process_time() - a)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.05


@pytest.mark.parametrize("name", raysandbox.__all__)
def test_every_public_name_is_there(name) -> None:
    """``__all__`` promises nothing that is missing."""
    if name == "worker_hook":
        return  # patches nothing on import, but needs Ray: tests/ray
    assert getattr(raysandbox, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """And not an import of whatever has that name."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = raysandbox.nothing
    assert not hasattr(raysandbox, "os")
