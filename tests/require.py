"""What a test needs from the machine, as a skip or as a failure.

A test names what it needs::

    from tests.require import require

    def test_bomb():
        require("cgroup:memory", "root")

On a machine without it the test is skipped, with the reason. On a machine that
is *meant* to have it a skip would hide a broken wall, so what is listed in
``RAYSANDBOX_TEST_REQUIRE`` (separated by commas or blanks) fails instead::

    RAYSANDBOX_TEST_REQUIRE="cgroup1 landlock:4, userns" make test
    RAYSANDBOX_TEST_REQUIRE=all make test

Needs, and what each asks for:

======================  =======================================================
``root``                effective uid 0
``user``                effective uid other than 0
``cgroup``              at least one controller in which we can make groups
``cgroup1``             at least one of those from version 1
``cgroup2``             at least one of those from version 2
``cgroup:NAME``         the controller memory, pids, cpu or io, any version
``landlock:N``          Landlock ABI N or later (``landlock`` is ``landlock:1``)
``userns``              an unprivileged process may make a user namespace
``seccomp``             seccomp filters
``program:NAME``        an executable of that name on PATH
``module:NAME``         a Python module that can be found
``kernel``              QEMU and the second kernel that ``make setup`` fetches
======================  =======================================================

A listed entry covers what it implies: ``landlock:4`` makes ``landlock:1`` to
``landlock:4`` mandatory, ``cgroup`` every ``cgroup:NAME``, ``module`` every
module, and ``all`` everything. An entry that is no known need is an error, so
that a typing mistake can't turn the check off.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable

import pytest

__all__ = ["lacks", "require"]

ENV = "RAYSANDBOX_TEST_REQUIRE"


def _root(_: str) -> str:
    return "" if os.geteuid() == 0 else f"effective uid is {os.geteuid()}, not 0"


def _user(_: str) -> str:
    return "" if os.geteuid() != 0 else "effective uid is 0"


def _cgroup(controller: str, version: int | None = None) -> str:
    from raysandbox.kernel import cgroup

    with cgroup.discover() as groups:
        if controller:
            for missing in groups.missing:
                if missing.controller == controller:
                    return f"cgroup {controller}: {missing.have}"
            return "" if controller in groups.versions else f"no {controller} cgroups"
        if version is None:
            return "" if groups.versions else "no cgroup controller within reach"
        if version in groups.versions.values():
            return ""
        return f"no controller of cgroup version {version} within reach"


def _landlock(abi: str) -> str:
    # LANDLOCK_CREATE_RULESET_VERSION; the number is the same on every 64-bit ABI.
    libc = ctypes.CDLL(None, use_errno=True)
    have = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    need = int(abi or 1)
    return "" if have >= need else f"Landlock ABI is {max(have, 0)}, need {need}"


def _userns(_: str) -> str:
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        os._exit(0 if libc.unshare(0x10000000) == 0 else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "" if status == 0 else "unprivileged user namespaces are not allowed"


def _seccomp(_: str) -> str:
    path = "/proc/sys/kernel/seccomp/actions_avail"
    return "" if os.path.exists(path) else "the kernel has no seccomp filters"


def _program(name: str) -> str:
    return "" if shutil.which(name) else f"no program {name} on PATH"


def _module(name: str) -> str:
    return "" if importlib.util.find_spec(name) else f"no Python module {name}"


def _kernel(_: str) -> str:
    from tests.qemu import run

    return run.lacks()


_NEEDS: dict[str, Callable[[str], str]] = {
    "root": _root,
    "user": _user,
    "cgroup": _cgroup,
    "cgroup1": lambda _: _cgroup("", 1),
    "cgroup2": lambda _: _cgroup("", 2),
    "landlock": _landlock,
    "userns": _userns,
    "seccomp": _seccomp,
    "program": _program,
    "module": _module,
    "kernel": _kernel,
}


def _split(need: str) -> tuple[str, str]:
    name, _, argument = need.partition(":")
    if name not in _NEEDS:
        raise ValueError(f"unknown need {need!r}; known: {', '.join(sorted(_NEEDS))}")
    return name, argument


@functools.cache
def lacks(need: str) -> str:
    """Say why this machine does not have ``need``, or ``""`` if it has it."""
    name, argument = _split(need)
    return _NEEDS[name](argument)


def _mandatory(need: str) -> bool:
    name, argument = _split(need)
    for entry in re.split(r"[,\s]+", os.environ.get(ENV, "").strip()):
        if not entry:
            continue
        if entry == "all" or entry == need:
            return True
        listed, bound = _split(entry)
        if listed != name:
            continue
        if name == "landlock" and int(bound or 1) >= int(argument or 1):
            return True
        if not bound:
            return True
    return False


def require(*needs: str) -> None:
    """Skip the running test unless the machine has every one of ``needs``.

    Fails instead of skipping for what ``RAYSANDBOX_TEST_REQUIRE`` covers.
    """
    for need in needs:
        why = lacks(need)
        if not why:
            continue
        if _mandatory(need):
            pytest.fail(f"{ENV} demands {need!r}: {why}", pytrace=False)
        pytest.skip(f"needs {need}: {why}")
