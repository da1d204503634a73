"""Code on a disk that fills up: a real one, in a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

__all__ = ["run_on_small_disk"]


def run_on_small_disk(disk: Path, kibibytes: int, code: str) -> str:
    """Run Python that finds the disk in ``sys.argv[1]``; return what it prints."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs {disk}"
    out = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", "sh", "-c",
            f'{mount} && exec "$1" -c "$0" {disk}', textwrap.dedent(code),
            sys.executable,
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return out.stdout
