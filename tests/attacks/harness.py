"""Runs probes outside (positive controls) and inside the jail.

The probes' modules travel as text on stdin.  Both sides run the same text with
the same interpreter; only the surroundings differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from tests.attacks.catalogue import ATTACKS
from tests.attacks.world import World

__all__ = ["Actor", "Verdict", "interpreter", "payload", "start_as"]

_SURFACES = sorted({a.surface for a in ATTACKS if a.control != "own"})
_MODULES = ["base", "driver", *_SURFACES]

WORKER_GROUP = 44444

# Rebuilds the package from the text on stdin, then hands over to the driver.
BOOT = """
import json, sys, types
p = json.load(sys.stdin)
for name in ("tests", "tests.attacks", "tests.attacks.probes"):
    sys.modules[name] = types.ModuleType(name)
for name, text in p["modules"]:
    full = "tests.attacks.probes." + name
    module = sys.modules[full] = types.ModuleType(full)
    exec(compile(text, name + ".py", "exec"), module.__dict__)
    setattr(sys.modules["tests.attacks.probes"], name, module)
sys.modules["tests.attacks.probes.driver"].main(p)
"""


def interpreter() -> str:
    """The real interpreter: without site there is no need for the venv's."""
    return os.path.realpath(sys.executable)


def payload(run: Iterable[tuple[str, str]], context: Mapping[str, Any]) -> bytes:
    """Return what BOOT reads."""
    modules = []
    for name in _MODULES:
        module = import_module(f"tests.attacks.probes.{name}")
        modules.append((name, inspect.getsource(module)))
    data = {"modules": modules, "run": list(run), "context": dict(context)}
    return json.dumps(data).encode()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe reported."""

    outcome: str
    detail: str
    seconds: float = 0


def _verdicts(output: bytes) -> dict[str, Verdict]:
    found = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            if isinstance(data, dict) and "id" in data:
                found[data["id"]] = Verdict(
                    data["outcome"], str(data["detail"]), data["seconds"]
                )
    return found


def _reach_interpreter() -> None:
    """Open the way to an interpreter below a directory that is closed to users.

    In a mount namespace of our own: the closed directory (``/root``) becomes an
    empty one with nothing in it but the interpreter's tree.  Host files are
    not touched.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "_reach_interpreter")

    closed, tree = _closed_directory()
    if not closed:
        return
    check(libc.unshare(0x00020000))
    check(libc.mount(b"none", b"/", None, 16384 | 1 << 18, None))
    fd = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    check(libc.mount(b"none", closed.encode(), b"tmpfs", 0, b"mode=755,size=64k"))
    os.makedirs(tree)
    check(libc.mount(f"/proc/self/fd/{fd}".encode(), tree.encode(), None, 4096, None))
    os.close(fd)


def _closed_directory() -> tuple[str, str]:
    """The outermost directory on the way that others may not search."""
    parts = os.path.dirname(os.path.dirname(interpreter())).split("/")
    for depth in range(2, len(parts) + 1):
        path = "/".join(parts[:depth])
        if not os.stat(path).st_mode & 0o001:
            return path, "/".join(parts)
    return "", ""


def start_as(
    uid: int,
    gid: int,
    command: Sequence[str],
    *,
    before: Callable[[], None] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a process as another user, as ordinary as one who logged in."""

    def prepare() -> None:
        if before is not None:
            before()
        if os.geteuid() == 0:
            # A group that must not come along, as "docker" would.
            os.setgroups([WORKER_GROUP])
        if uid != os.geteuid():
            _reach_interpreter()
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)

    return subprocess.Popen(list(command), preexec_fn=prepare, **options)


@dataclass(slots=True)
class Actor:
    """Who starts the jail: root, or an ordinary user.

    Attributes:
        name: ``root`` or ``user``.
        world: The victims.
        profile_dir: Where this actor's test profiles are.
    """

    name: str
    uid: int
    gid: int
    world: World
    profile_dir: str = ""
    cgroup_dirs: list[str] = field(default_factory=list)
    facts: dict[str, bool] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """What the actor's shell would export, secrets included."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "LANG", "RAYSANDBOX_UID_RANGE")
        }
        kept |= {
            "HOME": self.world.context["home"],
            "RAYSANDBOX_PROFILE_PATH": self.profile_dir,
            "RAY_AUTH_TOKEN": "rsx-secret-value",
            "AWS_SECRET_ACCESS_KEY": "rsx-secret-value",
            "PYTHONPATH": os.getcwd(),
        }
        if self.cgroup_dirs:
            kept["RAYSANDBOX_CGROUP"] = ":".join(self.cgroup_dirs)
        return kept

    @property
    def limited(self) -> bool:
        """Whether control groups are within its reach."""
        return self.uid == 0 or bool(self.cgroup_dirs)

    def write_profile(self, name: str, text: str) -> None:
        """Make a profile that extends ``strict``."""
        lines = ['extends = "strict"', *map(str.strip, text.splitlines())]
        if not self.limited:
            why = 'required = false\nwhy = "no delegated group here"'
            if "[limits]" in lines:
                lines.insert(lines.index("[limits]") + 1, why)
            else:
                lines += ["[limits]", why]
        path = f"{self.profile_dir}/{name}.toml"
        with open(path, "w") as file:
            file.write("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.gid)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process outside, as this actor."""
        options.setdefault("env", self.environment())
        if self.cgroup_dirs and self.world.home_group:
            options["before"] = self._go_home
        return start_as(self.uid, self.gid, command, **options)

    def _go_home(self) -> None:
        with open(f"{self.world.home_group}/cgroup.procs", "w") as file:
            file.write("0")

    def jail(
        self, command: Sequence[str], *, profile: str = "attack", **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start ``raysandbox run`` as this actor."""
        run = [sys.executable, "-m", "raysandbox", "run", "--profile", profile, "--"]
        return self.start([*run, *command], **options)

    def controls(self, attacks: Iterable[tuple[str, str]]) -> dict[str, Verdict]:
        """Run probes outside; those that need it, as root where we are."""
        by_uid: dict[int, list[tuple[str, str]]] = {}
        for name, kind in attacks:
            as_root = kind in ("root", "mounts", "user") and os.geteuid() == 0
            uid = 0 if as_root else self.uid
            if kind == "user" and not as_root:
                kind = "same"
            by_uid.setdefault(uid, []).append((name, kind))
        found: dict[str, Verdict] = {}
        for uid, run in by_uid.items():
            if uid != 0 and any(kind in ("root", "mounts") for _, kind in run):
                for name, kind in run:
                    if kind in ("root", "mounts"):
                        found[name] = Verdict("absent", "the control needs root")
                run = [one for one in run if one[1] not in ("root", "mounts")]
            data = payload(run, self.world.context | {"side": "control"})
            process = start_as(
                uid,
                self.gid if uid else 0,
                [interpreter(), "-I", "-S", "-c", BOOT],
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            output, _ = process.communicate(data, timeout=120)
            found |= _verdicts(output)
        return found

    def attacks(
        self, names: Iterable[str], profile: str = "attack"
    ) -> dict[str, Verdict]:
        """Run probes in one jail."""
        context = self.world.context | {
            "side": "jail",
            "init_pid": 1,
            "scratch": "/scratch",
            # By handle a file is opened on any path of its file system.
            "handle_mount": "/",
        }
        process = self.jail(
            [interpreter(), "-I", "-S", "-c", BOOT],
            profile=profile,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        data = payload([(name, "same") for name in names], context)
        output, errors = process.communicate(data, timeout=120)
        found = _verdicts(output)
        if not found:
            raise RuntimeError(
                f"no verdict from the jail (exit {process.returncode}): "
                f"{errors.decode(errors='replace')[-2000:]}"
            )
        return found
