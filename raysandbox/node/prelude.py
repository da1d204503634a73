"""Read what a client chose for a worker, and hand on what of it the worker gets.

Run by ``raysandbox-worker`` in place of Ray's ``setup_worker.py``::

    python -I -S prelude.py LAUNCHER RESOURCES NODE_ID INTERPRETERS SPILLED
        WRAPPER [setup_worker.py] …

It has the rights of raylet and what it reads was written by a client, or by an
agent that a client told what to write. So it takes from it only directories
that Ray unpacked below the session's runtime_resources, and runs nothing: neither
the command that the agent would have put in front of the worker, nor another
interpreter than one of the operator's, nor with any variable of the client's. Those
that a jail may see reach it by Ray's own copy of the runtime_env.

Uses the standard library alone: every worker with a runtime_env waits for it.
"""

from __future__ import annotations

import base64
import glob
import json
import os
import struct
import sys

_FILE, _BIND, _CHDIR, _ENV, _TMPFS, _USER, _PROGRAM = 7, 5, 19, 20, 26, 31, 35
_READ_ONLY = 1
_PRIVATE_BYTES, _PRIVATE_INODES = 64 << 20, 1024
_CONTEXT = "--serialized-runtime-env-context="
_SPILL_TYPES = ("filesystem",)


def _text(*values: str) -> bytes:
    for value in values:
        if "\0" in value:
            raise ValueError("a NUL byte in a path")
    return b"".join(os.fsencode(value) + b"\0" for value in values)


class _Plan:
    """A compiled plan, record by record."""

    def __init__(self, content: bytes) -> None:
        if content[:8] != b"RSBXPLN1":
            raise ValueError("not a plan")
        self.records: list[tuple[int, bytes]] = []
        offset = 16
        while offset < len(content):
            kind, _, length = struct.unpack_from("<HHI", content, offset)
            offset += 8
            self.records.append((kind, content[offset : offset + length]))
            offset += length

    def add(self, kind: int, payload: bytes) -> None:
        self.records.append((kind, payload))

    def bind(self, path: str, *, read_only: bool) -> None:
        self.add(_BIND, struct.pack("<I", _READ_ONLY * read_only) + _text(path, path))

    def unset(self, name: str) -> None:
        prefix = os.fsencode(name) + b"="
        self.records = [
            (kind, payload)
            for kind, payload in self.records
            if kind != _ENV or not payload.startswith(prefix)
        ]

    def set(self, name: str, value: str) -> None:
        self.unset(name)
        # Also without a value: so it was taken out of the environment.
        self.add(_ENV, _text(f"{name}={value}"))

    def start(self, *, python: str = "", script: str = "") -> str:
        """Start another interpreter or script; return the script as it was."""
        ((at, old),) = [
            (at, payload)
            for at, (kind, payload) in enumerate(self.records)
            if kind == _PROGRAM
        ]
        before = [os.fsdecode(each) for each in old.split(b"\0")]
        self.records[at] = (_PROGRAM, _text(python or before[0], script or before[1]))
        return before[1]

    def encode(self) -> bytes:
        body = b"".join(
            struct.pack("<HHI", kind, 0, len(payload)) + payload
            for kind, payload in self.records
        )
        return (
            b"RSBXPLN1" + struct.pack("<II", 16 + len(body), len(self.records)) + body
        )


def _unpacked(path: object, resources: str) -> str:
    """Return a path as Ray unpacked it below the resources, else ``""``.

    A client's PYTHONPATH is among them: one package, and never what holds all.
    """
    if not isinstance(path, str) or not path.startswith("/"):
        return ""
    real = os.path.realpath(path)
    kind, _, package = real.removeprefix(resources + "/").partition("/")
    inside = real.startswith(resources + "/") and bool(kind and package)
    return real if inside and os.path.exists(real) else ""


def user_directories(context: object, resources: str) -> tuple[list[str], str]:
    """Return module directories of a runtime_env, and its working directory.

    Args:
        context: What the agent wrote, as JSON has it.
        resources: The session's runtime_resources, resolved.
    """
    if not isinstance(context, dict):
        return [], ""
    variables = context.get("env_vars")
    search = variables.get("PYTHONPATH") if isinstance(variables, dict) else ""
    entries = search.split(":") if isinstance(search, str) else []
    found = [_unpacked(entry, resources) for entry in entries]
    working = ""
    prefix = context.get("command_prefix")
    if isinstance(prefix, list) and "cd" in prefix[:-1]:
        working = _unpacked(prefix[prefix.index("cd") + 1], resources)
    # An environment that the agent made: its packages are for jails.
    python = context.get("py_executable")
    if isinstance(python, str) and python.startswith(resources + "/"):
        environment = os.path.dirname(os.path.dirname(python))
        packages = glob.glob(f"{glob.escape(environment)}/lib/python*/site-packages")
        found += [_unpacked(path, resources) for path in packages]
    return list(dict.fromkeys(filter(None, found))), working


def _outermost(paths: list[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def _spill_directories(config: str, node_id: str) -> list[str]:
    """Make and return the node's own directories for spilled objects."""
    chosen = json.loads(base64.b64decode(config)) if config else {}
    if not chosen:
        return []
    if chosen.get("type") not in _SPILL_TYPES:
        raise SystemExit(
            "raysandbox: objects can be spilled to a file system only; "
            f"object_spilling_config says {chosen.get('type')!r}"
        )
    paths = chosen["params"]["directory_path"]
    made = []
    for path in [paths] if isinstance(paths, str) else paths:
        # As ray._private.external_storage.FileSystemStorage names it.
        directory = f"{path}/ray_spilled_objects_{node_id}"
        os.makedirs(directory, mode=0o700, exist_ok=True)
        made.append(os.path.realpath(directory))
    return made


def _for_spilling(
    plan: _Plan, arguments: list[str], node_id: str, spilled: str
) -> None:
    """Workers that spill share their files: one id of the node's for all.

    Args:
        plan: The one that serves every worker.
        arguments: The worker's.
        node_id: The node's.
        spilled: Where they write down what they have spilled, see `spilling`.
    """
    index = next(i for i, (kind, _) in enumerate(plan.records) if kind == _USER)
    first, count = struct.unpack_from("<II", plan.records[index][1])
    user = first - 1 if count > 1 else first
    plan.records[index] = (_USER, struct.pack("<II", user, 1) + b"\0")
    config = _option(arguments, "--object-spilling-config")
    for directory in [spilled, *_spill_directories(config, node_id)]:
        if os.geteuid() == 0:
            os.chown(directory, user, user)
        plan.bind(directory, read_only=False)
    plan.unset("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
    plan.set("RAYSANDBOX_SPILLED", spilled)
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "spilling.py")
    script = plan.start(script=ours)
    arguments[:] = [ours if a == script else a for a in arguments]


def _interpret(
    plan: _Plan, wrapper: str, choice: dict[str, list[str]], arguments: list[str]
) -> _Plan:
    """Return the plan with another interpreter of the operator's in it.

    Args:
        plan: The one that serves every worker.
        wrapper: Beside which the plans are.
        choice: As `wall` wrote it.
        arguments: The worker's; an image has Ray's script in a place of its own.
    """
    (python,) = choice["python"]
    script = plan.start(python=python)
    for number, inside in zip(choice["image"], choice["script"]):
        with open(f"{wrapper}.image-{number}.plan", "rb") as file:
            plan = _Plan(file.read())
        arguments[:] = [inside if a == script else a for a in arguments]
    for key in ("read", "write"):
        for path in choice[key]:
            plan.bind(path, read_only=key == "read")
    for path in choice["private"]:
        size = struct.pack("<QQI", _PRIVATE_BYTES, _PRIVATE_INODES, 0o700)
        plan.add(_TMPFS, size + _text(path))
    return plan


def _option(arguments: list[str], name: str) -> str:
    found = [a[len(name) + 1 :] for a in arguments if a.startswith(name + "=")]
    return found[-1] if found else ""


def main(argv: list[str]) -> None:
    """Read, add, and become the launcher again."""
    launcher, resources, node_id, interpreters, spilled, wrapper, *arguments = argv
    resources = os.path.realpath(resources)
    with open(wrapper + ".plan", "rb") as file:
        plan = _Plan(file.read())
    context = _option(arguments, _CONTEXT[:-1])
    preload = _option(arguments, "--worker-preload-modules")
    arguments = [
        argument
        for argument in arguments
        if "setup_worker.py" not in argument
        and not argument.startswith(
            (_CONTEXT, "--language=", "--worker-preload-modules=")
        )
    ]
    if _option(arguments, "--worker-type"):
        _for_spilling(plan, arguments, node_id, spilled)
    elif context:
        chosen = json.loads(context)
        directories, working = user_directories(chosen, resources)
        wanted = chosen.get("py_executable") if isinstance(chosen, dict) else None
        choices = json.loads(interpreters)
        if isinstance(wanted, str) and wanted in choices:
            plan = _interpret(plan, wrapper, choices[wanted], arguments)
        for path in _outermost([*directories, *filter(None, [working])]):
            plan.bind(path, read_only=True)
        if directories:
            plan.set("RAYSANDBOX_USER_PATH", ":".join(directories))
        if working:
            plan.add(_CHDIR, _text(working))
    if preload:
        plan.set("__RAYSANDBOX_PRELOAD", preload)
    fd = os.memfd_create("plan", 0)
    os.write(fd, plan.encode())
    command = [launcher, f"--plan-fd={fd}", wrapper, *arguments]
    os.execv(launcher, command)  # noqa: S606 - the same process, on purpose


if __name__ == "__main__":
    main(sys.argv[1:])
