"""What a driver prints first, last and alone: its answers, and nothing of Ray's.

A thread of Ray's prints what it hears of workers into ``sys.stdout``, and may do so
in the middle of a line.
"""

from __future__ import annotations

__all__ = ["ALONE"]

#: At the start of a driver's source: `print` has the standard output to itself.
ALONE = """
import builtins, functools, os, sys
builtins.print = functools.partial(
    print, file=os.fdopen(os.dup(1), "w", buffering=1), flush=True
)
sys.stdout = sys.stderr
"""
