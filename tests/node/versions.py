"""Tries other versions of Ray: `python -m tests.node.versions 2.55.0 2.54.0 …`.

Each is installed into a virtual environment of its own in a temporary directory,
and removed again; says what is missing there, or, where nothing is, whether a node
starts and what became of a task of the strictest profile. The outcome belongs in
`raysandbox.node.seams.VERSIONS`; exits with 1 where it says otherwise.

Needs an index of Python packages, root, and about a minute and 700 MB for each.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.node.nodes import ROOT

_HERE = "--here"
TASK = """
class Counter:
    def __init__(self):
        self.count = 0
    def next(self):
        self.count += 1
        return self.count, os.getpid()

def strict(value):
    return value + 1, os.getpid(), os.path.exists("/run/raysandbox")

counter = ray.remote(Counter).remote()
print([
    ray.get(ray.remote(strict).remote(ray.put(1)), timeout=60),
    ray.get([counter.next.remote() for _ in range(2)], timeout=60),
    ray.get(ray.remote(lambda: os.environ["A"]).options(
        runtime_env={"env_vars": {"A": "1"}}).remote(), timeout=60),
])
"""
EXPECTED = "[(2, 1, False), [(1, 1), (2, 1)], '1']"


def _requirements() -> list[str]:
    """What is to be installed besides Ray: ours, as built, or what it needs."""
    wheels = sorted((ROOT.parent / "wheel").glob("raysandbox-*.whl"))
    if not (ROOT / "raysandbox").exists():
        return [str(wheels[-1])]
    needed = importlib.metadata.requires("raysandbox") or []
    return [e for e in needed if not e.startswith("ray>") and "extra ==" not in e]


def attempt(version: str) -> dict[str, Any]:
    """Install one version, and let it say what it finds.

    Raises:
        CalledProcessError: It can't be installed.
    """
    # Not in /tmp: workers have one of their own.
    where = tempfile.mkdtemp(prefix="rsv-", dir=Path.home())
    try:
        os.chmod(where, 0o755)  # workers are other users
        subprocess.run([sys.executable, "-m", "venv", where], check=True)
        python = f"{where}/bin/python"
        pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, f"ray=={version}", *_requirements()], check=True)
        done = subprocess.run(
            [python, "-m", "tests.node.versions", _HERE],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _last_words(logs: Path) -> str:
    """Return the ends of the logs of raylet and workers."""
    return "".join(
        f"\n{path.name}: {path.read_text(errors='replace')[-1500:]}"
        for pattern in ("raylet.err", "raylet.out", "worker-*", "python-core-worker-*")
        for path in logs.glob(pattern)
    )


def here() -> dict[str, Any]:
    """Say what is missing in the Ray that runs this, or what became of a task."""
    import ray

    from raysandbox.node import seams, store_proxy
    from tests.node.nodes import Node

    found: dict[str, Any] = {
        "version": ray.__version__,
        "python": sys.version.split()[0],
        "missing": seams.missing(),
        "proxy": store_proxy.supported(),
        "tasks": "",
    }
    if found["missing"]:
        return found
    try:
        node = Node()
    except AssertionError as error:
        return {**found, "missing": f"it does not start: {error}"[-1500:]}
    try:
        out = node.drive(TASK).splitlines()[-1]
        found["tasks"] = "ok" if out == EXPECTED else out
    except Exception as error:
        found["tasks"] = str(error)[-1500:] + _last_words(node.session / "logs")
    finally:
        node.close()
    return found


def main() -> int:
    """Try what the command line names; return the exit status."""
    if sys.argv[1:] == [_HERE]:
        print(json.dumps(here()))
        return 0
    from raysandbox.node import seams

    wrong = 0
    for version in sys.argv[1:]:
        found = attempt(version)
        said = seams.VERSIONS.get(seams.minor(version), "not in the table")
        works = not found["missing"] and found["tasks"] == "ok"
        agrees = said == found["missing"] and (works or bool(found["missing"]))
        print(json.dumps({**found, "table": said, "agrees": agrees}), flush=True)
        wrong += not agrees
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("PIP_ROOT_USER_ACTION", "ignore")
    sys.exit(main())
