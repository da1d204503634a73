"""Start every worker of a node through the launcher: what `ray start` gets added.

`Launcher` is a rewriter (`raysandbox.node.seams`): when raylet is about to start,
it reads the node's policy, makes the node's control group, compiles the wall,
writes it beside a wrapper, and puts the wrapper in the interpreter's place in
raylet's commands. `install` does it for what this process starts, which is
`raysandbox start`, `raysandbox.init()`, and, by ``RAYSANDBOX=1``, any `ray start`.

Raylet drops ``setup_worker.py`` from a Python worker's command when it comes
second and there is no runtime_env; from any other language's it drops the
program in front as well. So those get a command in which it is not second, and
the launcher refuses them by name.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from types import ModuleType

from raysandbox import launch
from raysandbox import policy as policies
from raysandbox.errors import ProfileError, SetupError, UnsupportedError
from raysandbox.kernel import cgroup
from raysandbox.node import (
    env_agent,
    interpreters,
    job_agent,
    no_client,
    seams,
    spilling,
    store_proxy,
    totals,
    wall,
)
from raysandbox.plan import Protection, State, described
from raysandbox.policy import TAG_PREFIX
from raysandbox.probe import probe
from raysandbox.worker import quota
from raysandbox.worker.events import EventLog

__all__ = ["Launcher", "current", "install", "uninstall"]

_DIRECTORY = "raysandbox"
# What the kernel reads of a #! line, less what is not the path.
_INTERPRETER_BYTES = 250
# By this word `ray stop` finds the server of Ray Client, or what stands for it.
_CLIENT_SERVER = "ray.util.client.server"


class Launcher:
    """See the module.

    Attributes:
        load: Reads the policy; called when raylet is about to start.
        totals: Whether all workers together get a control group.
        ports: First and last TCP port for workers where Ray was told none; None
            leaves the choice to the kernel.
        wrapper: Where to write what starts a worker; "" for the session's
            directory.
        wrap: Put the wrapper into raylet's Python command; not where somebody
            else starts it.
        entrypoints: Where those of the Jobs API are hosted, see `job_agent`.
        protections: What the wall came to, once raylet has been started.
        proxy: What stands in front of Ray's sockets, once raylet has been
            started; it ends when raylet does.
    """

    def __init__(
        self,
        load: Callable[[], policies.Node],
        *,
        use_totals: bool = True,
        ports: tuple[int, int] | None = None,
        wrapper: str = "",
        wrap: bool = True,
        entrypoints: str = job_agent.ANYWHERE,
    ) -> None:
        self.load, self.use_totals, self.ports = load, use_totals, ports
        self.wrapper, self.wrap = wrapper, wrap
        self.entrypoints = entrypoints
        self.protections: tuple[Protection, ...] = ()
        self._of_totals: tuple[Protection, ...] = ()
        self.proxy: store_proxy.StoreProxy | None = None

    def __call__(self, process: seams.Process) -> None:
        if process.kind == "raylet":
            self._raylet(process)
        elif process.kind == "ray_client_server":
            _refuse_clients(process)

    def _raylet(self, process: seams.Process) -> None:
        raylet = seams.RayletCommand(process)
        node = self.load()
        session = _session(process)
        _advertise(process, node.policy)
        _make_audit_directory(node.policy.audit.directory)
        groups = self._groups(process, node.policy)
        wrapper = self.wrapper or f"{session.directory}/{_DIRECTORY}/worker"
        # What is below it is for the launcher to show to workers, one by one.
        os.makedirs(f"{session.directory}/{_DIRECTORY}", mode=0o700, exist_ok=True)
        shared = _quota_directory(session)
        spilled = _spilled_directory(session)
        sockets = self._store_proxy(node, session, spilled)
        wanted = wall.Wall(
            node=node,
            bind_ports=self._bind_ports(process),
            own_ports=_own_ports(process),
            raylet_ports=_raylet_ports(process),
            replace=sockets.mounts() if sockets else {},
            sockets={store_proxy.BIND: sockets.bind_socket} if sockets else {},
            shared={shared: shared},
            spilled=spilled,
            interpreters=interpreters.look(node.policy),
        )
        around = session, probe(), groups, launch.program_path("worker")
        compiled = wall.compile(wanted, *around)
        if os.geteuid() == 0:
            _close_directory(os.path.dirname(session.raylet_socket), session.directory)
        for name in ("events", "export_events"):
            # Ray's first process that logs there makes them; workers can't.
            os.makedirs(os.path.join(session.log_dir, name), exist_ok=True)
        _write_wrapper(wrapper, compiled.encode())
        for number, image in enumerate(wall.images(wanted)):
            seen = wall.compile(wanted, *around, image)
            _write(wall.image_plan(wrapper, number), seen.encode(), 0o600)
        if self.wrap:
            raylet.wrap_workers(wrapper, sys.executable)
        raylet.refuse_other_languages(wrapper)
        policy_file = f"{session.directory}/{_DIRECTORY}/policy"
        _write(policy_file, node.seal(), 0o600)
        raylet.wrap_agent(
            "--runtime_env_agent_command",
            sys.executable,
            _beside(env_agent),
            policy_file,
        )
        if node.policy.jobs.entrypoint is not None:
            raylet.wrap_agent(
                "--dashboard_agent_command",
                sys.executable,
                _beside(job_agent),
                node.policy.jobs.entrypoint,
                self.entrypoints,
            )
        process.command = [
            launch.program_path("node"),
            f"{wrapper}.plan",
            *process.command,
        ]
        self.protections = (
            *compiled.protections,
            *self._of_totals,
            _of_proxy(self.proxy),
        )
        log = EventLog(_log_directory(node, session))
        log.write(
            "node_started",
            node=session.node_id,
            policy=node.policy.digest,
            interpreters=[each.named.asked for each in wanted.interpreters],
            protections=described(self.protections),
        )
        log.close()

    def _store_proxy(
        self, node: policies.Node, session: wall.Session, spilled: str
    ) -> store_proxy.StoreProxy | None:
        """Put the proxy in front of Ray's sockets; None where Ray is too old.

        Raises:
            UnsupportedError: It is, and a profile lets code of users run in
                workers: there nothing else stands between.
        """
        if not store_proxy.supported():
            for name, profile in node.profiles.items():
                if profile.boundary == "worker":
                    raise store_proxy.unsupported(name)
            return None
        of_node = node.policy.object_store
        self.proxy = store_proxy.start(
            plasma_store=session.plasma_socket,
            raylet=session.raylet_socket,
            directory=f"{session.directory}/{_DIRECTORY}/sockets",
            spilled=spilled,
            limits=store_proxy.Limits(
                job_bytes=of_node.max_job_bytes,
                job_objects=of_node.max_job_objects,
            ),
            profilers=any(
                getattr(node.policy.runtime_env, key) for key in policies.PROFILERS
            ),
            events=f"{_log_directory(node, session)}/raysandbox_store-"
            f"{session.node_id[:8]}.jsonl",
        )
        return self.proxy

    def _groups(
        self, process: seams.Process, policy: policies.Policy
    ) -> cgroup.Cgroups:
        """Make the node's group, if it has one, and say where workers' go."""
        if not self.use_totals:
            return cgroup.discover()
        group = totals.enforce(policy.totals)
        process.env.update(group.variables())
        self._of_totals = tuple(
            Protection(f"totals.{name}", State(status.state.lower()), status.reason)
            for name, status in group.group.report.items()
        )
        return cgroup.discover(group.variables())

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


def _beside(module: ModuleType) -> str:
    """Return a module's file: it runs whatever the module path of its starter is."""
    return os.path.abspath(str(module.__file__))


def _refuse_clients(process: seams.Process) -> None:
    """Start what says that Ray Client is off in the place of its server."""
    host, port = process.argument("--host"), process.argument("--port")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    gcs = process.argument("--address")
    program = [sys.executable, "-u", _beside(no_client), address, gcs, _CLIENT_SERVER]
    # It is anybody's to talk to: no token, no key, no policy for it.
    names = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
    kept = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    process.command, process.env = ["/usr/bin/env", "-i", *kept, *program], {}


def _log_directory(node: policies.Node, session: wall.Session) -> str:
    """Return where events go."""
    directory = node.policy.audit.directory
    return session.log_dir if directory == "session" else directory


def _of_proxy(proxy: store_proxy.StoreProxy | None) -> Protection:
    name = "Ray's sockets behind a proxy"
    if proxy is not None:
        return Protection(name, State.ENFORCED)
    why = f"known for Ray {', '.join(store_proxy.PROTOCOLS)} alone"
    return Protection(name, State.OFF, why)


_installed: list[Launcher] = []


def current() -> Launcher | None:
    """Return the launcher of what this process starts."""
    return _installed[0] if _installed else None


def install(launcher: Launcher) -> None:
    """Add the launcher to what this process starts, in the place of an earlier one.

    Raises:
        UnsupportedError: A seam of Ray's is missing; nothing was changed.
        SetupError: The launcher is not installed.
    """
    for name in ("launch", "worker", "node"):
        launch.program_path(name)
    seams.install(launcher)
    uninstall()
    _installed.append(launcher)


def uninstall() -> None:
    """Start workers as Ray does again."""
    while _installed:
        seams.remove(_installed.pop())


def _raylet_ports(process: seams.Process) -> dict[str, str]:
    names = ("min_worker_port", "max_worker_port", "worker_port_list")
    return {
        name: item.partition("=")[2]
        for item in process.command
        for name in (*names, "node_manager_port")
        if item.startswith(f"--{name}=")
    }


def _own_ports(process: seams.Process) -> dict[str, int]:
    """Return what a worker of this node connects to besides other workers."""
    words = shlex.split(process.argument("--python_worker_command"))
    told = dict(word.split("=", 1) for word in words if "=" in word)
    ports = {
        "--port": told.get("--gcs-address", "").rpartition(":")[2],
        "--node-manager-port": process.argument("--node_manager_port"),
        "--dashboard-agent-grpc-port": told.get("--metrics-agent-port", ""),
    }
    return {name: int(port) if port.isdigit() else 0 for name, port in ports.items()}


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


def _make_audit_directory(directory: str) -> None:
    if directory == "session":
        return
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
    except OSError as error:
        raise ProfileError(
            source="<policy>",
            where="audit.directory",
            value=directory,
            reason=f"can't be made: {os.strerror(error.errno or 0)}",
        ) from error


def _quota_directory(session: wall.Session) -> str:
    """Make the directory of the jobs' counts; workers have users of their own."""
    path = quota.directory(session.directory)
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        os.chmod(path, 0o777)  # the directory above it is root's alone
    return path


def _spilled_directory(session: wall.Session) -> str:
    """Make the directory of what was spilled: workers ask in it, by name."""
    path = spilling.directory(session.directory)
    os.makedirs(path, mode=0o711, exist_ok=True)
    if os.geteuid() == 0:
        os.chmod(path, 0o711)  # whatever the umask; spill workers will own it
    return path


def _advertise(process: seams.Process, policy: policies.Policy) -> None:
    """Offer the policy's profiles as resources, with the policy's counts."""
    words = process.argument("--static_resource_list").split(",")
    names = words[0::2]
    claimed = sorted(name for name in names if name.startswith(TAG_PREFIX))
    if claimed:
        raise ProfileError(
            source="resources",
            where=claimed[0],
            reason=f"{TAG_PREFIX}… is offered by the policy alone "
            f"({policy.source or 'the default'}, table [offer])",
        )
    offered = [
        f"{TAG_PREFIX}{name},{count}" for name, count in sorted(policy.offer.items())
    ]
    process.set_argument(
        "--static_resource_list", ",".join([*filter(None, words), *offered])
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


def _write_wrapper(wrapper: str, plan: bytes) -> None:
    """Write the file that raylet starts, and its plan beside it."""
    program, directory = launch.program_path("worker"), os.path.dirname(wrapper)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if len(program) > _INTERPRETER_BYTES:
        with open(program, "rb") as file:
            content = file.read()
        program = f"{directory}/launcher"
        _write(program, content, 0o700)
    _write(f"{wrapper}.plan", plan, 0o600)
    _write(wrapper, f"#!{program}\n".encode(), 0o700)
    if not os.access(wrapper, os.X_OK):
        raise SetupError(
            step="wrapper",
            detail=f"{wrapper} can't be run: is its file system mounted noexec?",
        )


def _write(path: str, content: bytes, mode: int) -> None:
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(fd, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
    os.replace(new, path)
