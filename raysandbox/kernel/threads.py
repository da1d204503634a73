"""Walls around every thread of this process, through libraysandbox.so.

For a process that has threads already, where Landlock, capabilities and
no_new_privs would hold for the calling thread alone: ``native/threads.c`` has
each thread restrict itself, and proves of each that it is.
"""

from __future__ import annotations

import ctypes

from raysandbox.errors import SetupError
from raysandbox.native import library_path

__all__ = ["restrict_threads"]

_REPORT_BYTES = 256


def restrict_threads(
    ruleset_fd: int, canary: str, program: bytes, *, timeout_s: float
) -> int:
    """Restrict every thread of this process, and all that it ever starts.

    Takes all capabilities, sets no_new_privs, applies the Landlock ruleset,
    makes the process undumpable and installs the filter. There is no way back.

    Args:
        ruleset_fd: Landlock ruleset; see ``landlock.create_ruleset``.
        canary: A file that can be opened now, and not under the ruleset.
        program: Array of ``struct sock_filter``; empty for no filter.
        timeout_s: In which every thread must have answered.

    Returns:
        How many threads there were.

    Raises:
        SetupError: A step failed (``threads``). Some threads may be restricted
            and others not: this process must not run anybody's code, and end.
    """
    library = ctypes.CDLL(library_path())
    counted, report = ctypes.c_int(0), ctypes.create_string_buffer(_REPORT_BYTES)
    code = library.rs_restrict_threads(
        ctypes.c_int(ruleset_fd),
        ctypes.c_char_p(canary.encode()),
        ctypes.c_char_p(program),
        ctypes.c_size_t(len(program)),
        ctypes.c_int(int(timeout_s * 1000)),
        ctypes.byref(counted),
        report,
        ctypes.c_size_t(_REPORT_BYTES),
    )
    if code != 0:
        detail = report.value.decode("utf-8", "replace")
        raise SetupError(step="threads", errno=code, detail=detail)
    return counted.value
