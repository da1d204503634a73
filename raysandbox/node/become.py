"""How a changed process of Ray's goes on as what it was started for."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

__all__ = ["become"]


def become(command: Sequence[str]) -> None:
    """Run a script or a module in this process, as Python itself would.

    Args:
        command: ``SCRIPT ARGS…`` or ``-m MODULE ARGS…``.
    """
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(command)
    # Scripts of Ray's import their siblings by their bare names.
    sys.path.insert(0, command[0].rpartition("/")[0])
    runpy.run_path(command[0], run_name="__main__")
