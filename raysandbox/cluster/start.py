"""Start a hardened node: `ray start`, with identities, guard and closed ports.

In order: everything that can be checked is checked and all problems are listed
together; the helpers start (on a head the guard is listening before the GCS
exists); `ray start` runs in this process with every command it starts rewritten
(`raysandbox.node.seams`); what then listens is probed. If anything is open,
what was started is ended again.

What each process gets:

=================  ===========================================================
GCS                loopback, its own port, its own certificate, anchors that
                   accept the guard alone
raylet             its own certificate; workers behind a wrapper
workers            a certificate each, made for that process
agents, dashboard  their own certificates; plain HTTP bound to loopback
Ray Client server  not started
=================  ===========================================================
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysandbox.cluster import guard, pki, running, sessions, surfaces
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir, Settings, read_secret, write_file
from raysandbox.node import seams

__all__ = ["check", "down", "hook", "preflight", "speak", "start", "start_helpers"]

LOOPBACK_MODULE = "raysandbox.node.loopback"
SUPERVISOR = "raysandbox.cluster.supervisor"
# Longer than agents take on a machine that is busy.
AGENTS_S = 60
SETTLE_S = 0.5
# By the names of their processes; the first has no port where Ray is installed
# without its dashboard.
AGENTS = ("DashboardA", "RuntimeEnv")
# Of what the helpers wrote, in an error.
TAIL_BYTES = 1500
WAIT_S = 40
GUARD_S = 3.0
# Told to a starting raylet by raylet itself; a worker's certificate is taken
# from the stock by renaming, so no two workers ever share one. None of an earlier
# raylet's: the guard would refuse it as soon as one of this one's speaks.
WRAPPER = """#!/bin/sh
# Starts one Ray worker with a certificate of its own. {why}
stock={ready} used={used}
if [ ! -f "$used/$$.pem" ]; then
  tries=0
  while :; do
    for file in "$stock"/{session}-*.pem; do
      mv "$file" "$used/$$.pem" 2>/dev/null && break 2
    done
    tries=$((tries + 1))
    [ "$tries" -gt 200 ] && {{ echo 'raysandbox: no worker certificate' >&2; exit 97; }}
    sleep 0.05
  done
fi
export RAY_TLS_SERVER_CERT="$used/$$.pem" RAY_TLS_SERVER_KEY="$used/$$.pem"
exec {program} "$@"
"""


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """Return ``--name`` → value of an argument list ("" for a bare flag)."""
    found: dict[str, str] = {}
    for index, item in enumerate(argv):
        if item.startswith("--"):
            name, equals, value = item.partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else ""
            found[name] = (
                value if equals else "" if following.startswith("--") else following
            )
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def preflight(cluster: ClusterDir, argv: Sequence[str]) -> list[str]:
    """Return every reason not to start; the empty list means go.

    Raises:
        ClusterError: The directory itself can't be used.
    """
    settings, member = cluster.settings(), cluster.member()
    flags, problems = _flags(argv), []
    head = "--head" in flags
    if head != (member.role == "head") or member.role not in ("head", "node"):
        problems.append(
            f"{cluster.path} belongs to {member.role}/{member.name}, which can't "
            f"start a {'head' if head else 'node'}"
        )
        return problems
    for component in pki.COMPONENTS[member.role]:
        try:
            for warning in pki.check_identity(
                cluster, component, addresses=member.addresses
            ):
                print(f"raysandbox: warning: {warning}", file=sys.stderr)
        except ClusterError as error:
            problems.append(str(error))
    for path in (cluster.token, cluster.workers / "issuer.key"):
        try:
            read_secret(path)
        except ClusterError as error:
            problems.append(str(error))
    problems += _flag_problems(settings, flags, member.addresses)
    problems += _environment_problems()
    for kind, pid in running.alive(cluster):
        if kind == "raylet":
            problems.append(
                f"a raylet of {cluster.path} runs already (pid {pid}): end it with "
                "`raysandbox cluster down`; another node has a directory of its own"
            )
    if head:
        try:
            guard.executable()
        except ClusterError as error:
            problems.append(str(error))
        problems += _port_problems(cluster, settings, flags)
    # Last: what is known to be wrong already is not shown to the guard.
    return problems or ([] if head else _refused_by_guard(cluster, settings))


def _port_problems(
    cluster: ClusterDir, settings: Settings, flags: Mapping[str, str]
) -> list[str]:
    """Return what is wrong with where a head is to listen."""
    try:
        addresses = guard.listen_addresses(settings)
    except ClusterError as error:
        return [str(error)]
    problems = []
    ports = [(settings.gcs_port, "GCS", [guard.LOOPBACK])]
    if not _running(cluster):
        ports.append((settings.port, "guard", addresses))
    if settings.dashboard_tls_port:
        # Behind its TLS front, requests and the token go wherever that port leads.
        dashboard = flags.get("--dashboard-port", str(guard.DASHBOARD_PORT))
        if dashboard != str(guard.DASHBOARD_PORT):
            problems.append(
                f"--dashboard-port={dashboard}: with dashboard_tls_port in "
                f"cluster.toml it must be {guard.DASHBOARD_PORT}"
            )
        ports.append((guard.DASHBOARD_PORT, "dashboard", [guard.LOOPBACK]))
        if not _running(cluster):
            ports.append(
                (settings.dashboard_tls_port, "dashboard's TLS front", addresses)
            )
    for port, what, where in ports:
        for address in where:
            problem = _bind_problem(address, port, what)
            if problem:
                problems.append(problem)
                break
    return problems


def _bind_problem(address: str, port: int, what: str) -> str:
    """Return why one can't listen there, or ""."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return (
                    f"{address}, where the {what} is to listen, is no address of this "
                    "machine: set head_address or listen_addresses in cluster.toml to "
                    "one that it has"
                )
            if error.errno == errno.EADDRINUSE:
                return (
                    f"port {port}, for the {what}, is in use on {address}; end what "
                    f"uses it (`ss -ltnp sport = :{port}` tells what)"
                )
            return f"{address}:{port}, for the {what}, can't be had: {error.strerror}"
    return ""


def _refused_by_guard(cluster: ClusterDir, settings: Settings) -> list[str]:
    """Ask the guard whether it takes this node's certificate; Ray would wait minutes.

    A guard that does not answer is no reason: it may be up before Ray gives up.
    """
    where = (settings.head_address, settings.port)
    context = ssl.create_default_context(cafile=cluster.ca_cert)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(cluster.cert("raylet"), cluster.key("raylet"))
    try:
        with (
            socket.create_connection(where, timeout=GUARD_S) as plain,
            context.wrap_socket(plain, server_hostname=where[0]) as secured,
        ):
            # In TLS 1.3 a client hears that it was refused when it first reads.
            secured.recv(1)
    except ssl.SSLError as error:
        why = (
            f"the guard at {where[0]}:{where[1]} and this node don't take each "
            f"other's certificates ({error.reason}). If this node was quarantined or "
            "its certificates revoked: `raysandbox cluster release` or `certs issue` "
            f"on the head, and what they write into {cluster.path}"
        )
        return [why]
    except OSError:
        pass
    return []


def _flag_problems(
    settings: Settings, flags: Mapping[str, str], addresses: Sequence[str]
) -> list[str]:
    problems = []
    if "--ray-client-server-port" in flags:
        problems.append(
            "--ray-client-server-port: the Ray Client server unpickles whatever it "
            "is sent and is off in a hardened cluster; connect with a driver's "
            "certificate instead (`raysandbox cluster env`)"
        )
    if "--ray-debugger-external" in flags:
        problems.append(
            "--ray-debugger-external opens debugger ports without authentication"
        )
    host = flags.get("--dashboard-host", "127.0.0.1")
    if not _is_loopback(host):
        problems.append(
            f"--dashboard-host={host} opens the dashboard in clear; leave it on "
            "loopback and set dashboard_tls_port in cluster.toml"
        )
    if flags.get("--port", str(settings.port)) != str(settings.port):
        problems.append(
            f"--port={flags['--port']}: cluster.toml says port = {settings.port}"
        )
    address = flags.get("--node-ip-address")
    if address and address not in addresses:
        problems.append(
            f"--node-ip-address={address} is not one of this member's addresses "
            f"({', '.join(addresses)})"
        )
    problems += _system_config_problems(flags.get("--system-config", ""))
    return problems


def _system_config_problems(text: str) -> list[str]:
    """Return which keys of ``--system-config`` would take protections away."""
    if not text:
        return []
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        return ["--system-config is no JSON object"]
    return [
        f"--system-config: {key}={json.dumps(value)} changes who may speak to whom, "
        "which a hardened cluster decides by itself; leave it out"
        for key, value in config.items()
        # AUTH_MODE, USE_TLS, TLS_SERVER_CERT, … in Ray's ray_config_def.h.
        if "auth" in key.lower() or "tls" in key.lower()
    ]


def _environment_problems() -> list[str]:
    problems = []
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        problems.append("RAY_AUTH_MODE is set to something other than token")
    if os.environ.get("RAY_USE_TLS", "1").lower() not in ("1", "true"):
        problems.append("RAY_USE_TLS is set and off")
    if os.environ.get("RAY_AUTH_TOKEN"):
        problems.append(
            "RAY_AUTH_TOKEN is set: every process and /proc reader would see it; "
            "unset it, the token file of the cluster directory is used"
        )
    return problems


def check(cluster: ClusterDir, argv: Sequence[str], problems: Sequence[str]) -> None:
    """Refuse a start with everything that is wrong with it, in one list.

    Args:
        cluster: Of which cluster.
        argv: The arguments of `ray start`.
        problems: Those that are known already.

    Raises:
        ClusterError: There is a problem; nothing was started.
    """
    _refuse([*problems, *preflight(cluster, argv)])


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ClusterError(
            where="raysandbox start",
            what="refused, nothing was started:\n  - " + "\n  - ".join(problems),
        )


def speak(cluster: ClusterDir) -> None:
    """Give this process its identity; must come before Ray is imported.

    Raises:
        ClusterError: The environment asks for less than a hardened cluster is.
    """
    _refuse(_environment_problems())
    os.environ.update(cluster.tls_env("cli"))


def _running(cluster: ClusterDir) -> int:
    """Return the supervisor's pid, or 0."""
    try:
        pid = int((cluster.run / "supervisor.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # Another cluster's may have the pid of ours by now.
        whose = command[command.index(SUPERVISOR.encode()) + 1]
        if not os.path.samefile(os.fsdecode(whose), cluster.path):
            return 0
    except (OSError, ValueError, IndexError):
        return 0
    return pid


def start_helpers(cluster: ClusterDir, *, fresh: bool) -> None:
    """Start the supervisor, or keep the one that runs, and wait until it is ready.

    Args:
        cluster: Of which cluster.
        fresh: Forget jobs, keys and actors: the GCS starts with none.
    """
    pid = _running(cluster)
    if pid and fresh:
        down(cluster)
        pid = 0
    if pid:
        return
    if fresh:
        _forget(cluster)
    cluster.run.mkdir(mode=0o700, exist_ok=True)
    for name in ("ready", "failed"):
        (cluster.run / name).unlink(missing_ok=True)
    log = os.open(
        cluster.run / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
    )
    process = subprocess.Popen(
        [sys.executable, "-m", SUPERVISOR, str(cluster.path)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=_clean_env(),
    )
    os.close(log)
    end = time.monotonic() + WAIT_S
    while not (cluster.run / "ready").exists():
        failed = cluster.run / "failed"
        if failed.exists() or process.poll() is not None or time.monotonic() > end:
            process.terminate()
            try:
                # None that is about to end is taken for one that runs.
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            said = failed.read_text() if failed.exists() else ""
            path = cluster.run / "supervisor.log"
            raise ClusterError(
                where=str(path),
                what=said
                or f"the guard and its helpers did not come up within {WAIT_S} s; "
                f"they said last: {_tail(path) or 'nothing'}",
                remedy="look for a full disk and for what keeps the machine busy, and "
                "start again",
            )
        time.sleep(0.02)


def _forget(cluster: ClusterDir) -> None:
    """Forget all facts but that the workers of before have ended."""
    path = cluster.path / "state" / "facts.jsonl"
    if path.exists():
        facts = sessions.closed(path)
        write_file(path, "".join(json.dumps(fact) + "\n" for fact in facts))


def _tail(path: Path) -> str:
    """Return the end of a log, "" when there is none."""
    try:
        return path.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""


def _clean_env() -> dict[str, str]:
    """Our environment without Ray's: the helpers are no Ray processes."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def down(cluster: ClusterDir) -> bool:
    """End the helpers of this member; returns whether any ran."""
    pid = _running(cluster)
    if not pid:
        return False
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 10
    # The pid file goes before the process: wait for the process itself.
    while running.exists(pid) and time.monotonic() < end:
        time.sleep(0.05)
    if running.exists(pid):
        os.kill(pid, signal.SIGKILL)
    return True


def hook(ray_params: Any, head: bool) -> None:
    """Ray's own start hook: parameters that no flag can turn off."""
    del head
    os.environ.pop("RAY_START_HOOK", None)
    ray_params.ray_client_server_port = None
    ray_params.dashboard_host = "127.0.0.1"
    ray_params.ray_debugger_external = False


class _Rewrite:
    """Rewrites what `ray start` starts on this member."""

    def __init__(self, cluster: ClusterDir, program: str) -> None:
        self.dir, self.settings = cluster, cluster.settings()
        self.program = program

    def __call__(self, process: seams.Process) -> None:
        if process.kind == "gcs_server":
            self._gcs(process)
        elif process.kind == "raylet":
            self._raylet(process)
        elif process.kind in ("dashboard", "monitor", "log_monitor"):
            component = process.kind if process.kind != "log_monitor" else "agent"
            process.env.update(self.dir.tls_env(component))
            self._loopback(process)
        elif process.kind == "ray_client_server":
            raise ClusterError(
                where="Ray Client server",
                what="is off in a hardened cluster",
                remedy="connect with a driver's certificate: `raysandbox cluster env`",
            )

    def _gcs(self, process: seams.Process) -> None:
        process.set_argument("--gcs_server_port", str(self.settings.gcs_port))
        process.set_argument("--node-ip-address", "127.0.0.1")
        # The GCS writes the port it is bound to into its session directory, and
        # others read it there: they are to find the guard's.
        real = Path(process.argument("--session-dir"))
        node_id = process.argument("--node-id")
        private = self.dir.run / "gcs-session"
        private.mkdir(mode=0o700, exist_ok=True)
        process.set_argument("--session-dir", str(private))
        port_file = real / f"gcs_server_port_{node_id}"
        write_file(port_file, str(self.settings.port), 0o644)
        process.env.update(self.dir.tls_env("gcs"))
        process.env["RAY_TLS_CA_CERT"] = str(self.dir.trust / "gcs.pem")

    def _raylet(self, process: seams.Process) -> None:
        raylet = seams.RayletCommand(process)
        raylet.wrap_workers(self.program, sys.executable)
        for agent in ("--dashboard_agent_command", "--runtime_env_agent_command"):
            raylet.wrap_agent(agent, sys.executable, "-m", LOOPBACK_MODULE)
        process.env.update(self.dir.tls_env("raylet"))

    def _loopback(self, process: seams.Process) -> None:
        command = process.command
        if command[0] != sys.executable:
            raise ClusterError(
                where=process.kind, what=f"is not started by {sys.executable}"
            )
        rest = [item for item in command[1:] if item != "-u"]
        process.command = [sys.executable, "-u", "-m", LOOPBACK_MODULE, *rest]


def write_wrapper(cluster: ClusterDir, program: str = "") -> Path:
    """Write the script that starts a worker, and return its path.

    Args:
        cluster: Of which cluster.
        program: What runs the worker: the interpreter, or a launcher that
            takes the interpreter's arguments.
    """
    path = cluster.run / "worker"
    text = WRAPPER.format(
        ready=shlex.quote(str(cluster.run / "workers")),
        used=shlex.quote(str(cluster.run / "workers-used")),
        session=sessions.current(cluster.run),
        program=shlex.quote(program or sys.executable),
        why="Written by raysandbox start.",
    )
    write_file(path, text, 0o700)
    return path


def start(
    cluster: ClusterDir,
    argv: Sequence[str],
    program: str = "",
    after: Callable[[], None] = lambda: None,
    problems: Sequence[str] = (),
) -> None:
    """Run `ray start` hardened.

    Args:
        cluster: Of which cluster.
        argv: The arguments of `ray start`.
        program: See `write_wrapper`.
        after: Called when our own rewriter is in place: to add others.
        problems: Reasons not to start that are known already.

    Raises:
        ClusterError: Nothing runs: what was started has been ended again.
    """
    check(cluster, argv, problems)
    _begin_session(cluster)
    settings, member = cluster.settings(), cluster.member()
    head = member.role == "head"
    flags = _flags(argv)
    args = [item for item in argv if item != "--block"]
    if head and "--port" not in flags:
        args.append(f"--port={settings.port}")
    if "--node-ip-address" not in flags:
        args.append(f"--node-ip-address={member.addresses[0]}")
    if "--node-name" not in flags:
        args.append(f"--node-name={member.name}")
    speak(cluster)
    os.environ["RAY_START_HOOK"] = f"{__name__}.hook"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    seams.install(_Rewrite(cluster, str(cluster.run / "worker")), gcs=True)
    after()
    durable = bool(
        os.environ.get("RAY_REDIS_ADDRESS") or os.environ.get("RAY_gcs_storage")  # noqa: SIM112 - Ray's name
    )
    start_helpers(cluster, fresh=head and not durable)
    write_wrapper(cluster, program)
    from ray.scripts.scripts import cli

    try:
        cli.main(["start", *args], prog_name="raysandbox", standalone_mode=False)
        running.remember(
            cluster, [(kind, process.pid) for kind, process in seams.started()]
        )
        _refuse_open(head)
    except BaseException:
        for _, process in reversed(seams.started()):
            with contextlib.suppress(OSError):
                process.kill()
        (cluster.run / "processes.json").unlink(missing_ok=True)
        down(cluster)
        raise
    if "--block" in flags:
        _block(cluster)


def _begin_session(cluster: ClusterDir) -> None:
    try:
        cluster.run.mkdir(mode=0o700, exist_ok=True)
        sessions.begin(cluster.run)
    except OSError as error:
        raise ClusterError(
            where=str(error.filename or cluster.run),
            what=f"can't be written: {error.strerror}; nothing was started",
            remedy="make room on its disk, and let whoever starts the node own it",
        ) from None


def _refuse_open(head: bool) -> None:
    """Probe what listens now; ClusterError with the list if anything is open."""
    roots = [process.pid for _, process in seams.started()]
    wait_until = time.monotonic() + AGENTS_S
    expected = {"raylet"} | ({"gcs_server"} if head else set())
    # Agents open their ports some time after raylet has started them.
    while missing := _silent_agents(roots):
        kinds = {kind for kind, process in seams.started() if process.poll() is None}
        if not expected <= kinds:
            raise ClusterError(
                where=", ".join(sorted(expected - kinds)), what="ended at once"
            )
        if time.monotonic() > wait_until:
            raise ClusterError(
                where="raysandbox start",
                what="refused, and ended again what it had started: "
                f"after {AGENTS_S} s {', '.join(missing)} had yet to open its port, "
                "so what it would leave open is not known",
                remedy="Ray's logs in /tmp/ray/session_latest/logs say what became of "
                "it; start again when the machine is less busy",
            )
        time.sleep(0.1)
    problems = surfaces.open_in_clear(roots)
    if problems:
        raise ClusterError(
            where="raysandbox start",
            what="refused, and ended again what it had started, because the network "
            "would reach in clear:\n  - " + "\n  - ".join(problems),
        )


def _silent_agents(roots: Sequence[int]) -> list[str]:
    """Return which of raylet's agents have opened no port yet.

    One that has opened its first may be about to open another, so the last to be
    heard of is given a moment.
    """
    minimal = any("--minimal" in str(process.args) for _, process in seams.started())
    wanted = AGENTS[minimal:]
    heard = _heard(roots)
    silent = [name for name in wanted if not any(name in who for who in heard)]
    if not silent:
        time.sleep(SETTLE_S)
        silent = ["an agent"] if _heard(roots) != heard else []
    return silent


def _heard(roots: Sequence[int]) -> set[str]:
    """Return where the agents listen among some processes and what they started."""
    found = surfaces.listeners_of(surfaces.processes_of(roots))
    return {str(item) for item in found if any(name in item.command for name in AGENTS)}


def _block(cluster: ClusterDir) -> None:
    """Stay until a process dies or a signal comes, then end all."""
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopping.append(n))
    while not stopping:
        time.sleep(0.5)
        dead = [
            (kind, process.returncode)
            for kind, process in seams.started()
            if process.poll() is not None and kind != "reaper"
        ]
        if dead:
            print(f"raysandbox: ended: {dead}; ending the rest", file=sys.stderr)
            break
    for _, process in reversed(seams.started()):
        with contextlib.suppress(OSError):
            process.terminate()
    for _, process in seams.started():
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
    down(cluster)
    if not stopping:
        raise ClusterError(where="raysandbox start", what=f"a process ended: {dead}")
