"""Runs probes, each in a process of its own, and prints one verdict a line.

A verdict is a JSON object: ``id``, ``outcome`` (``ok``: the attack got through;
an errno's name; ``blocked``; a signal's name; ``timeout``; ``absent``: the host
lacks the target; ``error``: the probe itself is broken) and ``detail``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

from tests.attacks.probes.base import PROBES, Blocked, Context, NotHere, check, libc

CLONE_NEWNS = 0x00020000
ALL_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000
MS_REC_PRIVATE = 16384 | 1 << 18
PR_SET_PDEATHSIG = 1


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _private_mounts() -> None:
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None))


def _own_user_namespace(newpid: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = 0x10000000 | CLONE_NEWNS | 0x40000000 | 0x08000000 | 0x04000000
    check(libc.unshare(flags | (0x20000000 if newpid else 0)))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")
    check(libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None))


def enter(kind: str, context: Context) -> None:
    """Put this process where a positive control belongs.

    ``same`` is as the caller; ``user`` an ordinary uid; ``mounts`` real root in
    a mount namespace of its own; ``userns`` what any user can make: root of
    new user, mount, network, ipc, uts and pid namespaces.
    """
    if kind == "user":
        os.setgroups([])
        os.setresgid(context["user_gid"], context["user_gid"], context["user_gid"])
        os.setresuid(context["user_uid"], context["user_uid"], context["user_uid"])
        # Becoming another user made us undumpable; an ordinary process is not.
        libc.prctl(4, 1, 0, 0, 0)
    elif kind == "mounts":
        _private_mounts()
    elif kind == "userns":
        _own_user_namespace(newpid=True)
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0x7F)
        # A probe that hangs is killed by way of its parent; as pid 1 of the
        # namespace it takes all that it started along.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    elif kind not in ("same", "root"):
        raise ValueError(kind)


def _verdict(name: str, kind: str, context: Context) -> dict[str, Any]:
    try:
        enter(kind, context)
        value = PROBES[name](context)
        return {"outcome": "ok", "detail": value}
    except Blocked as reason:
        return {"outcome": "blocked", "detail": str(reason)}
    except NotHere as reason:
        return {"outcome": "absent", "detail": str(reason)}
    except OSError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "outcome": errno.errorcode.get(error.errno or 0, str(error)),
            "detail": f"line {where.lineno}: {where.line} [{error.filename or ''}]",
        }
    except MemoryError:
        return {"outcome": "ENOMEM", "detail": "MemoryError"}
    except BaseException:
        return {"outcome": "error", "detail": traceback.format_exc()[-600:]}


def run_probe(
    name: str, kind: str, context: Context, timeout_s: float = 10
) -> dict[str, Any]:
    """Fork, run one probe in the child, and return its verdict."""
    begun = time.monotonic()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        # Verdicts end when the driver does, whatever a probe leaves running.
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)
        data = json.dumps(_verdict(name, kind, context), default=repr)
        os.write(write_end, data.encode()[:60000])
        os._exit(0)
    os.close(write_end)
    ready, _, _ = select.select([read_end], [], [], timeout_s)
    text = os.read(read_end, 65536) if ready else b""
    os.close(read_end)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    taken = time.monotonic() - begun
    if text:
        verdict: dict[str, Any] = json.loads(text)
    elif not ready:
        verdict = {"outcome": "timeout", "detail": f"no answer in {timeout_s} s"}
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict = {"outcome": signal.Signals(number).name, "detail": ""}
    else:
        verdict = {"outcome": "error", "detail": f"exit {os.WEXITSTATUS(status)}"}
    verdict["id"], verdict["seconds"] = name, round(taken, 3)
    return verdict


def main(payload: dict[str, Any]) -> None:
    """Run every probe of the payload, in order."""
    ctypes.set_errno(0)
    for name, kind in payload["run"]:
        verdict = run_probe(name, kind, payload["context"])
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()
