"""Run as an actor: a stand-in for raylet, its workers, and what they must not reach.

Its argument is the policy's user of workers. Prints JSON: the attacks' outcomes
outside (``control``) and in a worker behind the wall (``inside``), and what the
worker is like.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from raysandbox import launch, policy
from raysandbox.kernel import cgroup
from raysandbox.node import wall
from raysandbox.node.launch import _write_wrapper
from raysandbox.plan import Plan, described
from raysandbox.probe import probe

PROBE = str(Path(__file__).resolve().with_name("probe.py"))
WORKER, OTHER, JAILER, OPEN = "aa" * 28, "bb" * 28, "cc" * 28, "dd" * 28


def _listen(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(8)
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    return server


def _listen_tcp() -> tuple[socket.socket, int]:
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    return server, int(server.getsockname()[1])


def _serve(server: socket.socket) -> None:
    kept = []
    while True:
        kept.append(server.accept())


def _wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise SystemExit(f"{path}: {path.read_text() if path.exists() else 'absent'}")


def _free_ports(count: int) -> int:
    """Return the first of so many neighbours on which nobody listens."""
    for first in range(20_100, 32_000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    listener = held.enter_context(socket.socket())
                    listener.bind(("0.0.0.0", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


def main() -> None:
    user = sys.argv[1]
    base = Path(tempfile.mkdtemp(prefix="rsn-"))
    base.chmod(0o755)
    session = base / "session_x"
    logs, sockets, resources = (
        session / "logs",
        session / "sockets",
        session / "runtime_resources",
    )
    for directory in (
        logs,
        sockets,
        resources,
        logs / "events",
        logs / "export_events",
    ):
        directory.mkdir(parents=True)
    raylet_log = logs / "raylet.err"
    raylet_log.write_text("raylet's\n")
    token = base / "token"
    token.write_text("secret-token")
    token.chmod(0o600)
    resource = resources / "other-jobs-code.py"
    resource.write_text("x")
    shm = Path(f"/dev/shm/rsn-{os.getpid()}")
    shm.write_text("x")
    servers = [_listen(str(sockets / "raylet")), _listen(str(sockets / "plasma_store"))]
    foreign = str(base / "foreign")
    servers += [_listen(foreign), _listen(f"\0rsn-{os.getpid()}")]
    os.chmod(foreign, 0o777)
    tcp = [_listen_tcp() for _ in range(4)]
    ports = [port for _, port in tcp]
    groups = cgroup.discover()
    first_port = _free_ports(11)

    def wall_of(connect: tuple[int | str, ...] | None) -> Plan:
        worker = policy.Worker(pids=100, connect=connect, user=user)
        node = policy.Policy(worker=worker)
        return wall.compile(
            wall.Wall(
                node=policy.resolve(node),
                bind_ports=(first_port, first_port + 9),
                own_ports={"--port": ports[1]},
            ),
            wall.Session(
                directory=str(session),
                log_dir=str(logs),
                resource_dir=str(resources),
                raylet_socket=str(sockets / "raylet"),
                plasma_socket=str(sockets / "plasma_store"),
                worker_script=PROBE,
                interpreter=sys.executable,
                node_id="n" * 8,
            ),
            probe(),
            groups,
            launch.program_path("worker"),
        )

    # Rules on ports need Landlock ABI 4; without them all else is as it is.
    abi = probe().landlock_abi
    compiled = wall_of((ports[2], f"{ports[3]}-{ports[3]}") if abi >= 4 else None)
    open_to_all = wall_of(None)
    if os.geteuid() == 0:
        sockets.chmod(0o700)
    wrapper = str(session / "raysandbox" / "worker")
    _write_wrapper(wrapper, compiled.encode())
    _write_wrapper(f"{wrapper}-open", open_to_all.encode())

    _pipe_read, pipe_write = os.pipe()
    leaked_log = os.open(raylet_log, os.O_WRONLY | os.O_APPEND)
    environment = {
        **os.environ,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_ID": "ffffffff",
        "RAY_PROBE_SECRET": "x",
        "LD_PRELOAD": "/nonexistent/evil.so",
        "PYTHONSTARTUP": "/nonexistent",
        "OPERATOR_SECRET": "x",
    }
    del environment["LD_PRELOAD"]

    def start(program: list[str], worker: str, **more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*program, f"--worker-id={worker}"],
            env={**environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=leaked_log,
            pass_fds=[pipe_write, leaked_log],
        )

    victim = start([wrapper, PROBE, "wait"], OTHER)
    victim_log = logs / f"worker-{OTHER}-ffffffff-{victim.pid}.out"
    _wait_for(victim_log, "waiting")
    byte = ctypes.create_string_buffer(b"secret")
    bases = [path for _, path, _ in groups.places()]
    planted = {
        "new_name_in_logs": f"{logs}/worker-planted.out",
        "write_hosts_tmp": f"{base}/planted",
    }
    world = {
        "raylet": os.getpid(),
        "worker": victim.pid,
        "address": ctypes.addressof(byte),
        "worker_log": str(victim_log),
        "raylet_log": str(raylet_log),
        "token": str(token),
        "resource": str(resource),
        "foreign_socket": foreign,
        "abstract": f"\0rsn-{os.getpid()}",
        "raylet_socket": str(sockets / "raylet"),
        "port_inside": first_port + 5,
        "port_outside": first_port + 10,
        "foreign_port": ports[0],
        "ports_of_ray": ports[1:],
        "only": "",
        "shm": str(shm),
        "tmp": str(resource),
        "home": str(base),
        "leaked": [pipe_write, leaked_log],
        "planted": planted,
        "limits": [f"{path}/pids.max" for path in (*bases, "/sys/fs/cgroup/pids")],
    }

    def note_planted(outcomes: dict[str, str]) -> None:
        """Where it was written, the host decides."""
        for name, path in planted.items():
            if os.path.lexists(path):
                os.unlink(path)
            elif outcomes[name] == "ok":
                outcomes[name] = "private"

    control = {**world, "control": True, "limits": []}
    out = start(
        [sys.executable, PROBE, json.dumps(control)],
        WORKER,
        RAY_AUTH_TOKEN="secret-token",
        PYTHONPATH=os.environ.get("PYTHONPATH", ""),
    ).communicate(timeout=200)[0]
    found = {"control": json.loads(out.splitlines()[-1])}
    note_planted(found["control"])
    inside = {**world, "control": False}

    def attempt(program: str, name: str) -> tuple[dict[str, Any], int, Path]:
        """Return what a worker found behind a wall, its pid and its log."""
        worker = start(
            [program, PROBE, json.dumps(inside)], name, LD_PRELOAD="/nonexistent/x.so"
        )
        log = logs / f"worker-{name}-ffffffff-{worker.pid}.out"
        worker.communicate(timeout=200)
        said = log.read_text() if log.exists() else ""
        if worker.returncode:
            err = log.with_suffix(".err")
            raise SystemExit(
                f"worker: {worker.returncode} {said} "
                f"{err.read_text() if err.exists() else raylet_log.read_text()}"
            )
        return json.loads(said.splitlines()[-1]), worker.pid, log

    found["inside"], found["pid"], log = attempt(wrapper, WORKER)
    note_planted(found["inside"])
    found["log_mode"] = log.stat().st_mode & 0o777
    inside["only"] = "connect_"
    found["open"] = attempt(f"{wrapper}-open", OPEN)[0]
    found["open_protections"] = described(open_to_all.protections)
    jailer = start([wrapper, PROBE, "jail"], JAILER)
    jailer.communicate(timeout=200)
    log = logs / f"worker-{JAILER}-ffffffff-{jailer.pid}.out"
    found["jail"] = log.read_text() + log.with_suffix(".err").read_text()
    found["host_uid"] = os.stat(f"/proc/{victim.pid}").st_uid
    found["protections"] = {p.name: p.state.value for p in compiled.protections}
    victim.kill()
    victim.wait()
    shm.unlink()
    subprocess.run(["rm", "-rf", str(base)])
    found["groups"], found["raylet"] = bases, os.getpid()
    found["landlock_abi"] = abi
    print(json.dumps(found))


if __name__ == "__main__":
    main()
