"""Start every worker of a node through the launcher: what `ray start` gets added.

`Launcher` is a rewriter (`raysandbox.node.seams`): when raylet is about to start,
it compiles the node's wall, writes it beside a wrapper, and puts the wrapper in
the interpreter's place in raylet's commands. `install` does it for what this
process starts, which is `raysandbox start`, `raysandbox.init()`, and, by
``RAYSANDBOX=1``, any `ray start`.

Raylet drops ``setup_worker.py`` from a Python worker's command when it comes
second and there is no runtime_env; from any other language's it drops the
program in front as well. So those get a command in which it is not second, and
the launcher refuses them by name.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace

from raysandbox import launch
from raysandbox.errors import SetupError, UnsupportedError
from raysandbox.kernel import cgroup
from raysandbox.node import seams, wall
from raysandbox.plan import Protection
from raysandbox.probe import probe

__all__ = ["Launcher", "install"]

_DIRECTORY = "raysandbox"
# What the kernel reads of a #! line, less what is not the path.
_INTERPRETER_BYTES = 250


class Launcher:
    """See the module.

    Attributes:
        protections: What the wall came to, once raylet has been started.
    """

    def __init__(
        self,
        wanted: wall.Wall,
        *,
        ports: tuple[int, int] | None = None,
        wrapper: str = "",
        wrap: bool = True,
    ) -> None:
        """Prepare.

        Args:
            wanted: The wall.
            ports: TCP ports for workers, where Ray was not told any.
            wrapper: Where to write what starts a worker; "" for the session's
                directory.
            wrap: Put the wrapper into raylet's Python command; not where
                somebody else starts it.
        """
        self.wanted, self.ports = wanted, ports
        self.wrapper, self.wrap = wrapper, wrap
        self.protections: tuple[Protection, ...] = ()

    def __call__(self, process: seams.Process) -> None:
        if process.kind == "raylet":
            self._raylet(process)

    def _raylet(self, process: seams.Process) -> None:
        raylet = seams.RayletCommand(process)
        session = _session(process)
        wrapper = self.wrapper or f"{session.directory}/{_DIRECTORY}/worker"
        directory = os.path.dirname(wrapper)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            _close_directory(os.path.dirname(session.raylet_socket), session.directory)
        groups = cgroup.discover()
        wanted = replace(self.wanted, bind_ports=self._bind_ports(process))
        program = launch.program_path("worker")
        compiled = wall.compile(wanted, session, probe(), groups, program)
        _write(f"{wrapper}.plan", compiled.encode(), 0o600)
        first = program
        if len(program) > _INTERPRETER_BYTES:
            first = f"{directory}/launcher"
            with open(program, "rb") as file:
                _write(first, file.read(), 0o700)
        _write(wrapper, f"#!{first}\n".encode(), 0o700)
        if not os.access(wrapper, os.X_OK):
            raise SetupError(
                step="wrapper",
                detail=f"{wrapper} can't be run: is its file system mounted noexec?",
            )
        if self.wrap:
            raylet.wrap_workers(wrapper, sys.executable)
        raylet.refuse_other_languages(wrapper)
        process.command = [
            launch.program_path("node"),
            f"{wrapper}.plan",
            *process.command,
        ]
        self.protections = compiled.protections

    def _bind_ports(self, process: seams.Process) -> tuple[int, int] | None:
        """Return the ports workers listen on; where Ray has none, set ours."""
        low = int(process.argument("--min_worker_port"))
        high = int(process.argument("--max_worker_port"))
        if any(item.startswith("--worker_port_list=") for item in process.command):
            ports = [int(p) for p in process.argument("--worker_port_list").split(",")]
            return (min(ports), max(ports))
        if low == 0 and self.ports is not None:
            low, high = self.ports
            process.set_argument("--min_worker_port", str(low))
            process.set_argument("--max_worker_port", str(high))
        return (low, high or 65535) if low else None


def install(launcher: Launcher) -> None:
    """Add the launcher to what this process starts.

    Raises:
        UnsupportedError: A seam of Ray's is missing; nothing was changed.
    """
    seams.install(launcher)


def _session(process: seams.Process) -> wall.Session:
    command = shlex.split(process.argument("--python_worker_command"))
    scripts = [part for part in command if part.endswith("default_worker.py")]
    if len(scripts) != 1:
        raise UnsupportedError(
            feature="Ray's internals: default_worker.py in raylet's worker command",
            need="one",
            have=str(len(scripts)),
            remedy="install a Ray version that raysandbox supports",
        )
    return wall.Session(
        directory=process.argument("--session_dir"),
        log_dir=process.argument("--log_dir"),
        resource_dir=process.argument("--resource_dir"),
        raylet_socket=process.argument("--raylet_socket_name"),
        plasma_socket=process.argument("--store_socket_name"),
        worker_script=scripts[0],
        interpreter=sys.executable,
        node_id=process.argument("--node_id"),
    )


def _close_directory(path: str, session: str) -> None:
    """Only root may walk to the sockets; workers get a mount of each."""
    if not os.path.realpath(path).startswith(os.path.realpath(session) + "/"):
        raise SetupError(
            step="sockets",
            detail=f"{path} is not below the session's directory {session}: "
            "leave the sockets' names to Ray",
        )
    os.chmod(path, 0o700)


def _write(path: str, content: bytes, mode: int) -> None:
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(fd, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
    os.replace(new, path)
