"""The wall around every Ray worker of a node, compiled once when the node starts.

`compile` turns what the operator wants (`Wall`) and where Ray's session is
(`Session`) into a plan for ``native/worker.c``, which raylet starts in the
interpreter's place for each worker. The records are those of
`raysandbox.plan`, plus the worker's own (``native/plan.h``, from ``R_TMPFS``):

==================  ===========================================================
``R_USER``          host ids to take one of (root), each for one worker at a time
``R_CGROUP_BASE``   where the worker's group is made, and where it sees it: as
                    the root of the hierarchy, so that jails' groups go below
``R_BIND``          system, Python and profiles, read-only; Ray's two sockets
``R_LOG``           the worker's own log files, each bound over its own name
``R_TMPFS``         its own /tmp and /dev/shm (plasma's arena comes as a
                    descriptor)
``R_COPY``,         token and TLS keys, readable for this worker alone and in
``R_COPY_ENV``      no jail's view
``R_ENV_PASS``      what of raylet's environment the worker sees
``R_LANDLOCK…``     ports, signals and abstract sockets
``R_SECCOMP``       what Ray and the making of jails need
==================  ===========================================================

The same plan serves every worker; what differs (ids, log names, groups) the
launcher fills in, and what a client chose (a runtime_env) a prelude adds
(`raysandbox.node.prelude`). To put something in the place of a file that the
worker sees, such as a proxy for plasma's socket, give it in `Wall.replace`.
"""

from __future__ import annotations

import json
import os
import pwd
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raysandbox import plan, profile
from raysandbox import policy as policies
from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.kernel import cgroup, landlock, seccomp
from raysandbox.launch import worker_ids
from raysandbox.node.interpreters import Found
from raysandbox.plan import Plan, State
from raysandbox.probe import Host
from raysandbox.profile import Profile
from raysandbox.worker.gate import IMAGE, SEALED

__all__ = [
    "HOOK",
    "SECRETS",
    "TLS_FILES",
    "USER_PATH",
    "Session",
    "Wall",
    "compile",
    "image_plan",
    "images",
]

#: What Ray runs in a worker before its first task.
HOOK = "raysandbox.worker_hook"
#: Where the worker finds token and keys.
SECRETS = "/run/raysandbox/secrets"
#: Variable with directories of a runtime_env that go to jails alone.
USER_PATH = "RAYSANDBOX_USER_PATH"
HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"

_BIND_SOCKET = 8
_NET_BIND = 1
_SCOPE_ABSTRACT, _SCOPE_SIGNAL = 1, 2
_TMP_BYTES, _SHM_BYTES, _SESSION_BYTES, _INODES = 256 << 20, 64 << 20, 1 << 20, 65536
# Host variables that a worker may see: nothing that steers the loader or
# Python, no secret by value.
_PASSED = (
    "LANG", "LC_*", "LANGUAGE", "TZ", "TERM", "OMP_NUM_THREADS", "SPT_NOENV",
    "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
    "CUDA_*", "NVIDIA_*", "RAY_*", "RAYSANDBOX_*", "GRPC_*", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "no_proxy", "NO_PROXY",
)  # fmt: skip
# Of those, set by us or not at all.
_OWN = ("RAY_AUTH_TOKEN", "RAYSANDBOX_CGROUP", USER_PATH, "RAYSANDBOX")
_FILES = (
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TLS_SERVER_CERT",
    "RAY_TLS_SERVER_KEY",
    "RAY_TLS_CA_CERT",
)


#: Of those, what Ray reads again for each new connection. The token it reads once.
TLS_FILES = tuple(f"{SECRETS}/{name.lower()}" for name in _FILES if "_TLS_" in name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What of Ray's session a worker has to do with: raylet's own arguments."""

    directory: str
    log_dir: str
    resource_dir: str
    raylet_socket: str
    plasma_socket: str
    worker_script: str
    interpreter: str
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """What the operator wants of the wall.

    Attributes:
        node: The node's policy and its profiles: the worker must be able to
            make their jails.
        bind_ports: First and last TCP port that a worker may listen on; None
            where Ray lets the kernel choose.
        own_ports: Option of `ray start` to the port of this node that it sets and
            workers connect to; 0 where Ray lets the kernel choose.
        replace: Path that the worker sees to path on the host.
        sockets: The same, for sockets besides Ray's two.
        shared: The same, for directories that all workers write to.
        spilled: Directory that says what was spilled: workers read it, and those
            that spill write it.
        interpreters: Those that a runtime_env may name besides the node's own.
        raylet_ports: Raylet's arguments about ports, for profiles with
            ``boundary = "worker"``: the worker can't see raylet's command.
    """

    node: policies.Node
    bind_ports: tuple[int, int] | None = None
    own_ports: Mapping[str, int] = field(default_factory=dict)
    replace: Mapping[str, str] = field(default_factory=dict)
    sockets: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    spilled: str = ""
    raylet_ports: Mapping[str, str] = field(default_factory=dict)
    interpreters: Sequence[Found] = ()


def compile(  # noqa: A001 - wall.compile, as plan.compile
    wall: Wall,
    session: Session,
    host: Host,
    groups: cgroup.Cgroups,
    program: str,
    image: Found | None = None,
) -> Plan:
    """Decide all that the launcher does for each worker of this session.

    Args:
        wall: What is wanted.
        session: Where Ray is.
        host: What the kernel gives.
        groups: Where groups can be made.
        program: What starts the prelude's second half: the launcher.
        image: Of workers that see an image's root file system, that image's.

    Raises:
        UnsupportedError: The host can't raise the wall.
        ProfileError: An offered profile can't be used here.
    """
    builder = _WorkerBuilder(wall, session, host, image)
    builder.namespaces()
    builder.groups(groups)
    builder.root()
    builder.session_parts()
    builder.secrets()
    builder.limits()
    builder.landlock()
    builder.seccomp()
    builder.surroundings()
    builder.prelude(program)
    return Plan("worker", tuple(builder.records), tuple(builder.protections))


def image_plan(wrapper: str, number: int) -> str:
    """Return where the plan of workers with an image is: the policy's, by number."""
    return f"{wrapper}.image-{number}.plan"


def images(wall: Wall) -> list[Found]:
    """Return those interpreters that need a plan of their own."""
    return [each for each in wall.interpreters if each.named.root]


def _worker_profile(wall: Wall, image: Found | None) -> Profile:
    """What a worker sees and may call: enough for every jail that it makes."""
    read = {"@system": None, "@python": None}
    for each in wall.interpreters if image is None else ():
        read |= dict.fromkeys(each.roots if not each.named.root else ())
    write: dict[str, None] = {}
    devices: dict[str, None] = {}
    for offered in wall.node.profiles.values():
        read |= dict.fromkeys(filter(_is_there, offered.filesystem.read))
        write |= dict.fromkeys(filter(_is_there, offered.filesystem.write))
        devices |= dict.fromkeys(offered.devices)
    base = profile.strictest()
    return base.model_copy(
        update={
            "name": "worker",
            "filesystem": base.filesystem.model_copy(
                update={"read": tuple(read), "write": tuple(write), "hide": ()}
            ),
            "devices": tuple(devices),
        }
    )


def _is_there(path: str) -> bool:
    """Whether a path is one that the host has; who asks for others is refused then."""
    return path.startswith("/") and os.path.exists(path)


def _host_id(user: str) -> int:
    """Return the id of the policy's user; never root's."""
    try:
        number = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise _bad_user(user, "this host has no such user") from None
    if number == 0:
        raise _bad_user(user, "is root")
    return number


def _bad_user(user: str, reason: str) -> ProfileError:
    return ProfileError(
        source="<policy>", where="worker.user", value=user, reason=reason
    )


def _search_path() -> list[str]:
    """Module directories of the node's Python, not of who happens to start it."""
    roots = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    chosen = os.environ.get("PYTHONPATH", "").split(":")
    return [
        path
        for path in sys.path
        if path
        and (path in chosen or any(path.startswith(root + "/") for root in roots))
    ]


def _require_reachable(interpreter: str, roots: Sequence[str], root: str = "") -> None:
    """Refuse a Python that a worker could not start: raylet would try for ever.

    Args:
        interpreter: As it is started, or what that leads to.
        roots: What workers see of Python; they get to each of these.
        root: The root file system that has all this, if not the host's.

    Raises:
        UnsupportedError: Something on the way is its owner's alone.
    """
    above = [root for root in roots if plan.is_below(interpreter, root)]
    at, stop = interpreter, os.path.dirname(min(above, key=len, default="/"))
    while at not in (stop, "/"):
        if not os.stat(plan.inside(root, at)).st_mode & 0o001:
            raise UnsupportedError(
                feature=f"the worker's Python, {root}{interpreter}",
                need="a path that the workers' user may walk",
                have=f"{root}{at} is its owner's alone",
                remedy=f"chmod o+rx {root}{at}, or install it elsewhere, such as below "
                "/opt",
            )
        at = os.path.dirname(at)


class _WorkerBuilder(plan.Builder):
    """As for a jail, with other walls where a worker's differ."""

    def __init__(
        self, wall: Wall, session: Session, host: Host, image: Found | None
    ) -> None:
        self.wall, self.session, self.image = wall, session, image
        ids, self.python_path = plan.IdRange(os.geteuid(), 1), ""
        if image is not None:
            root = image.named.root
            system = plan.image_paths(root, self._taken())
            context = plan.Context(
                ids=ids, python=image.roots, root=root, system=system
            )
        else:
            context = plan.Context(ids=ids, python=plan.python_paths(self._search()))
        super().__init__(_worker_profile(wall, image), host, context)

    def _search(self) -> list[str]:
        search = _search_path()
        package = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        self.python_path = os.environ.get("PYTHONPATH", "")
        if package not in search:
            # Work in a source tree.
            self.python_path = ":".join(filter(None, [package, self.python_path]))
            search.append(os.path.join(package, "raysandbox"))
        return search

    def _taken(self) -> list[str]:
        """Return the places where a worker sees what is no image's."""
        session, wall = self.session, self.wall
        files = _worker_profile(wall, self.image).filesystem
        shown = [path for path in (*files.read, *files.write) if path.startswith("/")]
        return [
            *shown,
            *(session.directory, session.log_dir, session.resource_dir),
            *(session.raylet_socket, session.plasma_socket, self._event_directory()),
            *wall.replace,
            *wall.sockets,
            *wall.shared,
            *filter(None, [wall.spilled]),
        ]

    def _event_directory(self) -> str:
        directory = self.wall.node.policy.audit.directory
        return self.session.log_dir if directory == "session" else directory

    @property
    def worker(self) -> policies.Worker:
        """What the policy says of workers."""
        return self.wall.node.policy.worker

    def namespaces(self) -> None:
        if self.host.namespaces_reason:
            raise UnsupportedError(
                feature="the worker's wall",
                need="user, mount, ipc, uts and cgroup namespaces for this user",
                have=self.host.namespaces_reason,
                remedy=self.host.namespaces_remedy,
            )
        self.add(plan.Record.HOSTNAME, plan.text("worker"))
        self.add(plan.Record.INNER_ID, plan.u32(plan.TASK_ID, plan.TASK_ID))
        first, count, registry = self._ids()
        self.add(plan.Record.USER, plan.u32(first, count) + plan.text(registry))
        for name in ("user", "mount", "ipc", "uts", "cgroup"):
            self.protect(f"{name} namespace", State.ENFORCED)
        if not self.host.is_root:
            self.protect(
                "own host user",
                State.OFF,
                "an ordinary user can map no id but its own; Landlock keeps workers "
                "from raylet and from each other",
            )
        elif self.worker.user != "auto":
            self.protect(
                "own host user", State.DEGRADED, "all workers have the policy's user"
            )
        else:
            self.protect("own host user", State.ENFORCED)

    def _ids(self) -> tuple[int, int, str]:
        if not self.host.is_root:
            return os.geteuid(), 1, ""
        if self.worker.user != "auto":
            return _host_id(self.worker.user), 1, ""
        ids, registry = worker_ids()
        # The first is for those that spill objects: they share files.
        return ids.first + 1, ids.count - 1, registry

    def groups(self, groups: cgroup.Cgroups) -> None:
        files, lower = groups.writes(
            cgroup.CgroupLimits(
                cpu_cores=self.worker.cpu_cores,
                memory_bytes=self.worker.memory_bytes,
                pids=self.worker.pids,
            )
        )
        for version, base, mount in groups.places():
            self.add(
                plan.Record.CGROUP_BASE, plan.u32(version) + plan.text(base, mount)
            )
            for file, value in files.get(base, ()):
                self.add(plan.Record.CGROUP_LIMIT, plan.text(base, file) + value)
        short = [f"{m.controller}: {m.have}" for m in groups.missing]
        short += [f"worker.{_POLICY_KEY[key]}: {why}" for key, why in lower.items()]
        if short:
            reason = "; ".join(short)
            state = State.DEGRADED if groups.places() else State.OFF
            self.protect("worker's control group", state, reason)
        else:
            self.protect("worker's control group", State.ENFORCED)

    def root(self) -> None:
        files = self.profile.filesystem
        self._bind_all("filesystem.read", files.read, read_only=True)
        self._bind_all("filesystem.write", files.write, read_only=False)
        self._devices()
        self._synthesised()
        if self.host.is_root:
            self.add(plan.Record.PROC, plan.text("/proc"))
            self.protect("own part of /proc", State.ENFORCED)
        else:
            # A /proc can be mounted only by who owns the pid namespace.
            self.add(plan.Record.BIND, plan.u32(0) + plan.text("/proc", "/proc"))
            self.protect(
                "own part of /proc",
                State.DEGRADED,
                "an ordinary user can't mount a /proc of its own in raylet's pid "
                "namespace: names and sizes of other processes can be seen, nothing "
                "that Landlock's domain or ptrace's rules keep",
            )
        private = {"/tmp": _TMP_BYTES, "/dev/shm": _SHM_BYTES}
        # Ray sets the modes of its directories each time: on a read-only mount
        # that would be an error which it does not expect.
        above = os.path.dirname(self.session.directory)
        if not any(above == path or above.startswith(f"{path}/") for path in private):
            private[above] = _SESSION_BYTES
        for path, size in private.items():
            self.add(
                plan.Record.TMPFS,
                plan.u64(size, _INODES) + plan.u32(0o700) + plan.text(path),
            )
        self.protect("root file system", State.ENFORCED)

    def session_parts(self) -> None:
        session = self.session
        for path in (session.raylet_socket, session.plasma_socket):
            source = self.wall.replace.get(path, path)
            self.add(plan.Record.BIND, plan.u32(_BIND_SOCKET) + plan.text(source, path))
        for target, source in self.wall.replace.items():
            if target not in (session.raylet_socket, session.plasma_socket):
                self.add(plan.Record.BIND, plan.u32(1) + plan.text(source, target))
        for target, source in self.wall.sockets.items():
            self.add(
                plan.Record.BIND, plan.u32(_BIND_SOCKET) + plan.text(source, target)
            )
        for target, source in self.wall.shared.items():
            self.add(plan.Record.BIND, plan.u32(0) + plan.text(source, target))
        if spilled := self.wall.spilled:
            self.add(plan.Record.BIND, plan.u32(1) + plan.text(spilled, spilled))
        self.add(plan.Record.DIR, plan.u32(0o755) + plan.text(session.resource_dir))
        self.add(plan.Record.DIR, plan.u32(0o755) + plan.text(f"{session.log_dir}/old"))
        for stream, name in (
            (1, "%t-%w-%j%p.out"),
            (2, "%t-%w-%j%p.err"),
            (0, "python-core-%k-%w_%p.log"),
            (0, "events/event_CORE_WORKER_%p.log"),
            (0, "export_events/event_EXPORT_TASK_%p.log"),
        ):
            path = f"{session.log_dir}/{name}"
            self.add(plan.Record.LOG, plan.u32(stream) + plan.text(path, path))
        # What `raysandbox ps` reads.
        path = f"{session.log_dir}/raysandbox_state-%w.bin"
        self.add(plan.Record.LOG, plan.u32(0) + plan.text(path, path))
        # Each worker has its own, under the name that all know.
        directory = self._event_directory()
        own = f"{directory}/raysandbox_events-%w.jsonl"
        seen = f"{directory}/raysandbox_events.jsonl"
        self.add(plan.Record.LOG, plan.u32(0) + plan.text(own, seen))
        self.protect("Ray's session", State.ENFORCED)

    def secrets(self) -> None:
        for name in _FILES:
            self.add(
                plan.Record.COPY_ENV,
                plan.u32(0o400) + plan.text(name, f"{SECRETS}/{name.lower()}"),
            )
        token = os.environ.get("RAY_AUTH_TOKEN")
        default = os.path.expanduser("~/.ray/auth_token")
        target = f"{SECRETS}/auth_token"
        if token:
            # By value it would stand in the environment.
            self.add(
                plan.Record.FILE, plan.u32(0o444) + plan.text(target) + token.encode()
            )
        elif "RAY_AUTH_TOKEN_PATH" not in os.environ and os.path.exists(default):
            self.add(plan.Record.COPY, plan.u32(0o400) + plan.text(default, target))
        else:
            target = ""
        if target:
            self.set("RAY_AUTH_TOKEN_PATH", target)

    def set(self, name: str, value: str) -> None:
        """Set a variable, whatever raylet's environment has."""
        self.add(plan.Record.ENV, plan.text(f"{name}={value}"))

    def limits(self) -> None:
        self._rlimit(resource.RLIMIT_CORE, 0)
        self._rlimit(resource.RLIMIT_NOFILE, self.worker.open_files)
        self._rlimit(resource.RLIMIT_RTPRIO, 0)
        self._rlimit(resource.RLIMIT_MSGQUEUE, 0)
        self.protect("resource limits", State.ENFORCED)

    def landlock(self) -> None:
        abi = self.host.landlock_abi
        governed = landlock.handled(abi)
        if not self.host.is_root and governed.scoped & _SCOPE_SIGNAL == 0:
            raise UnsupportedError(
                feature="the worker's wall",
                need="Landlock ABI 6 (Linux 6.12): raylet's user is the workers' own, "
                "and nothing else keeps a worker from signalling raylet",
                have=f"ABI {abi}" if abi else "none",
                remedy="run raylet as root: each worker then gets a user of its own",
            )
        connect = self._connect(abi, governed.net)
        net = landlock.CONNECT_TCP if connect is not None else 0
        if governed.net and self.wall.bind_ports is not None:
            net |= _NET_BIND
        if not (net or governed.scoped):
            self.protect("ports and signals", State.OFF, f"Landlock ABI {abi}")
            return
        self.add(plan.Record.LANDLOCK, plan.u64(0, net, governed.scoped))
        if net & _NET_BIND and self.wall.bind_ports is not None:
            self._ports(_NET_BIND, *self.wall.bind_ports)
        for first, last in connect or ():
            self._ports(landlock.CONNECT_TCP, first, last)
        lacking = []
        if not net & _NET_BIND:
            lacking.append("listening on any port")
        if connect is None:
            lacking.append("connecting to any port (worker.connect says which)")
        if not governed.scoped & _SCOPE_ABSTRACT:
            lacking.append("abstract sockets")
        if lacking:
            why = f"not governed: {', '.join(lacking)}"
            self.protect("ports and signals", State.DEGRADED, why)
        else:
            # Landlock has no rule for these, and a filter can't tell them apart.
            but = "for TCP, but for listening on a port that the kernel picks"
            self.protect("ports and signals", State.ENFORCED, but)

    def _connect(self, abi: int, net: int) -> list[tuple[int, int]] | None:
        """Return the ports that a worker may connect to; None for any.

        Only the operator knows those of nodes that join later, and a domain is
        for life. A profile with boundary = "worker" governs them when the job is
        known.
        """
        ranges = self.worker.connect_ranges
        if ranges is None:
            return None
        feature, or_not = "worker.connect", "or take worker.connect out of the policy"
        if not net:
            raise UnsupportedError(
                feature=feature,
                need="Landlock ABI 4",
                have=f"ABI {abi}" if abi else "none",
                remedy=f"boot Linux 6.7 or later with landlock in lsm=, {or_not}",
            )
        unknown = [name for name, port in self.wall.own_ports.items() if not port]
        if self.wall.bind_ports is None:
            unknown += ["--min-worker-port", "--max-worker-port"]
        if unknown or self.wall.bind_ports is None:
            raise UnsupportedError(
                feature=feature,
                need="the ports of this node's own Ray, before its workers start",
                have=f"ports that the kernel is to choose: {', '.join(unknown)}",
                remedy=f"give these to `raysandbox start`, {or_not}",
            )
        own = [(port, port) for port in self.wall.own_ports.values()]
        return [*ranges, *own, self.wall.bind_ports]

    def _ports(self, access: int, first: int, last: int) -> None:
        self.add(plan.Record.LANDLOCK_PORTS, plan.u64(access) + plan.u32(first, last))

    def seccomp(self) -> None:
        if not self.host.seccomp:
            raise UnsupportedError(
                feature="the worker's wall",
                need="seccomp filters (CONFIG_SECCOMP_FILTER)",
                have="none",
                remedy="boot a kernel with seccomp filters",
            )
        groups = [*profile.load("standard").syscalls.groups, "internet", "jails"]
        allow: list[str] = []
        for each in self.wall.node.profiles.values():
            groups += each.syscalls.groups
            allow += each.syscalls.allow
            if each.syscalls.oci is not None:
                allow += seccomp.oci_calls(each.syscalls.oci)
            if each.devices and set(each.devices) - set(_PLAIN_DEVICES):
                # Drivers have calls of their own.
                allow.append("ioctl")
        program = seccomp.compile_worker(groups, allow)
        self.add(plan.Record.SECCOMP, plan.u32(0) + program.bpf)
        self.protect("seccomp", State.ENFORCED)
        self.protect("no new privileges", State.ENFORCED)
        self.protect("no capabilities", State.ENFORCED)

    def surroundings(self) -> None:
        passed = dict.fromkeys(_PASSED)
        for each in self.wall.node.profiles.values():
            passed |= dict.fromkeys(each.environment.pass_)
        for pattern in passed:
            self.add(plan.Record.ENV_PASS, plan.text(pattern))
        for name in _OWN:
            self.add(plan.Record.ENV, plan.text(name))  # taken out
        self.set("PATH", "/usr/local/bin:/usr/bin:/bin")
        self.set("HOME", "/tmp")
        self.set("TMPDIR", "/tmp")
        self.set("USER", "task")
        self.set(HOOK_VARIABLE, HOOK)
        if self.python_path:
            self.set("PYTHONPATH", self.python_path)
        # Ray would rename log files that are bound one by one.
        self.set("RAY_ROTATION_MAX_BYTES", "0")
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("RAYSANDBOX_") and name not in _OWN
        }
        variables["RAYSANDBOX_RAYLET_PORTS"] = json.dumps(dict(self.wall.raylet_ports))
        if self.image is not None:
            uri = self.image.named.asked.removeprefix(policies.IMAGE_PREFIX)
            seen = {"uri": uri, "system": list(self.context.system)}
            variables[IMAGE] = json.dumps(seen)
        self.add(
            plan.Record.FILE,
            plan.u32(0o444) + plan.text(SEALED) + self.wall.node.seal(variables),
        )
        self.add(plan.Record.CHDIR, plan.text("/tmp"))

    def prelude(self, program: str) -> None:
        session = self.session
        # Without "..": a worker does not see all directories of the way.
        interpreter = os.path.abspath(session.interpreter)
        if self.image is not None:
            # It is the prelude that chose this plan.
            named, roots = self.image.named, self.image.roots
            real = plan.inside(named.root, named.path).removeprefix(named.root)
            for path in (named.path, real) if self.host.is_root else ():
                _require_reachable(path, roots, named.root)
            self.add(plan.Record.PROGRAM, plan.text(named.path, self.image.script))
            return
        if self.host.is_root:
            for path in (interpreter, os.path.realpath(interpreter)):
                _require_reachable(path, self.context.python)
            for other in self.wall.interpreters:
                path = other.named.path
                for at in (
                    (path, os.path.realpath(path)) if not other.named.root else ()
                ):
                    _require_reachable(at, other.roots)
        self.add(plan.Record.PROGRAM, plan.text(interpreter, session.worker_script))
        script = os.path.join(os.path.dirname(__file__), "prelude.py")
        for argument in (
            interpreter,
            "-I",
            "-S",
            script,
            program,
            session.resource_dir,
            session.node_id,
            json.dumps(self._choices()),
            self.wall.spilled,
        ):
            self.add(plan.Record.PRELUDE, plan.text(argument))

    def _choices(self) -> dict[str, dict[str, list[str]]]:
        """Return what the prelude may put in the interpreter's place."""
        own_plan, log_dir = images(self.wall), self.session.log_dir
        logs = [log_dir, f"{log_dir}/events", f"{log_dir}/export_events"]
        return {
            each.named.asked: {
                "python": [each.named.path],
                "image": [str(own_plan.index(each))] if each in own_plan else [],
                "script": [each.script] if each in own_plan else [],
                "read": [*each.named.read],
                "write": [*each.named.write],
                # Ray names logs by its pid, which is not the one that raylet knows
                # where something starts the interpreter as a child.
                "private": logs if each.named.key in policies.PROFILERS else [],
            }
            for each in self.wall.interpreters
        }


_POLICY_KEY = {"cpu_cores": "cpu", "memory_bytes": "memory", "pids": "pids"}
_PLAIN_DEVICES = ("null", "zero", "full", "random", "urandom")
