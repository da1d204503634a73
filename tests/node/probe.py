"""What hostile code in a worker process would try; also the control, outside.

Run as Ray's worker script: ``probe.py ATTACKS --worker-id=…``, or with ``wait``
in the attacks' place to be a victim. Prints one JSON object: attack to outcome,
``ok`` or the name of the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
IPPROTO_MPTCP = 262
ATTACKS: dict[str, Callable[[dict[str, Any]], object]] = {}


def attack(function: Callable[[dict[str, Any]], object]) -> Any:
    ATTACKS[function.__name__] = function
    return function


def _call(name: str, *arguments: Any) -> int:
    result = int(getattr(libc, name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _syscall(number: int, *arguments: int) -> int:
    return _call("syscall", ctypes.c_long(number), *map(ctypes.c_long, arguments))


@attack
def signal_raylet(world: dict[str, Any]) -> object:
    os.kill(world["raylet"], 0)


@attack
def signal_worker(world: dict[str, Any]) -> object:
    os.kill(world["worker"], 0)


@attack
def signal_worker_by_pidfd(world: dict[str, Any]) -> object:
    fd = os.pidfd_open(world["worker"])
    import signal

    signal.pidfd_send_signal(fd, 0)


@attack
def environment_of_raylet(world: dict[str, Any]) -> object:
    with open(f"/proc/{world['raylet']}/environ", "rb") as file:
        assert file.read()


@attack
def environment_of_worker(world: dict[str, Any]) -> object:
    with open(f"/proc/{world['worker']}/environ", "rb") as file:
        assert file.read()


@attack
def memory_of_worker(world: dict[str, Any]) -> object:
    with open(f"/proc/{world['worker']}/maps") as file:
        start = int(file.read().split("-")[0], 16)
    with open(f"/proc/{world['worker']}/mem", "rb") as file:
        file.seek(start)
        assert file.read(4) == b"\x7fELF"


@attack
def memory_of_worker_by_call(world: dict[str, Any]) -> object:
    buffer = ctypes.create_string_buffer(1)
    local = struct.pack("PN", ctypes.addressof(buffer), 1)
    remote = struct.pack("PN", world["address"], 1)
    _call("process_vm_readv", world["raylet"], local, 1, remote, 1, 0)


@attack
def descriptors_of_worker(world: dict[str, Any]) -> object:
    os.readlink(f"/proc/{world['worker']}/fd/0")


@attack
def root_of_raylet(world: dict[str, Any]) -> object:
    os.listdir(f"/proc/{world['raylet']}/root/etc")


@attack
def trace_worker(world: dict[str, Any]) -> object:
    _call("ptrace", 0x4206, world["worker"], None, None)  # PTRACE_SEIZE


@attack
def logs_of_worker(world: dict[str, Any]) -> object:
    with open(world["worker_log"]) as file:
        file.read()


@attack
def write_logs_of_worker(world: dict[str, Any]) -> object:
    with open(world["worker_log"], "r+"):
        pass


@attack
def raylets_log(world: dict[str, Any]) -> object:
    with open(world["raylet_log"]) as file:
        file.read()


@attack
def new_name_in_logs(world: dict[str, Any]) -> object:
    """A link that Ray's log monitor would follow with root's rights."""
    os.symlink("/etc/shadow", world["planted"]["new_name_in_logs"])


@attack
def hosts_token(world: dict[str, Any]) -> object:
    with open(world["token"]) as file:
        file.read()


@attack
def token_by_environment(world: dict[str, Any]) -> object:
    if "secret-token" not in os.environ.get("RAY_AUTH_TOKEN", ""):
        raise PermissionError(errno.EACCES, "not there")


@attack
def runtime_env_of_others(world: dict[str, Any]) -> object:
    with open(world["resource"]) as file:
        file.read()


@attack
def socket_by_path(world: dict[str, Any]) -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(world["foreign_socket"])


@attack
def abstract_socket(world: dict[str, Any]) -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(world["abstract"])


@attack
def listen_outside_the_range(world: dict[str, Any]) -> object:
    with socket.socket() as server:
        server.bind(("127.0.0.1", world["port_outside"]))


@attack
def listen_outside_the_range_by_multipath(world: dict[str, Any]) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as server:
        server.bind(("127.0.0.1", world["port_outside"]))


@attack
def connect_to_a_foreign_port(world: dict[str, Any]) -> object:
    socket.create_connection(("127.0.0.1", world["foreign_port"]), 5).close()


@attack
def connect_to_a_foreign_port_by_ipv6(world: dict[str, Any]) -> object:
    with socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", world["foreign_port"]))


@attack
def connect_to_a_foreign_port_by_multipath(world: dict[str, Any]) -> object:
    """Landlock's rules are for TCP alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as client:
        client.connect(("127.0.0.1", world["foreign_port"]))


@attack
def connect_to_a_foreign_port_with_data(world: dict[str, Any]) -> object:
    """TCP Fast Open: a connection without connect(2), which Landlock looks at."""
    with socket.socket() as client:
        at = ("127.0.0.1", world["foreign_port"])
        client.sendto(b"x", socket.MSG_FASTOPEN, at)


@attack
def connect_to_a_foreign_port_with_data_in_parts(world: dict[str, Any]) -> object:
    with socket.socket() as client:
        at = ("127.0.0.1", world["foreign_port"])
        client.sendmsg([b"x"], [], socket.MSG_FASTOPEN, at)


@attack
def shared_memory_of_the_host(world: dict[str, Any]) -> object:
    with open(world["shm"]) as file:
        file.read()


@attack
def tmp_of_the_host(world: dict[str, Any]) -> object:
    with open(world["tmp"]) as file:
        file.read()


@attack
def neighbours_of_the_session(world: dict[str, Any]) -> object:
    if os.path.basename(world["token"]) not in os.listdir(world["home"]):
        raise FileNotFoundError(errno.ENOENT, "only what the worker needs")


@attack
def leaked_descriptors(world: dict[str, Any]) -> object:
    """Raylet's log and a pipe, as raylet leaves them open in every worker."""
    open_ones = set(os.listdir("/proc/self/fd"))
    for number in world["leaked"]:
        if str(number) in open_ones and not _is_ours(number):
            return
    raise OSError(errno.EBADF, "closed")


def _is_ours(number: int) -> bool:
    return os.readlink(f"/proc/self/fd/{number}").startswith("/proc/")


@attack
def raylets_output(world: dict[str, Any]) -> object:
    """Standard error is raylet's own log file in stock Ray."""
    if "raylet" not in os.readlink("/proc/self/fd/2"):
        raise OSError(errno.EBADF, "the worker's own")


@attack
def capabilities(world: dict[str, Any]) -> object:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":\t") for line in file)
    assert lines["NoNewPrivs"].strip() == "1" or world["control"]
    if int(lines["CapBnd"], 16) == 0:
        raise PermissionError(errno.EPERM, "none")


@attack
def set_hostname(world: dict[str, Any]) -> object:
    name = socket.gethostname().encode()
    _call("unshare", 0x04000000 | 0x10000000 if world["control"] else 0x04000000)
    _call("sethostname", name, len(name))


@attack
def mount_over_usr(world: dict[str, Any]) -> object:
    if world["control"]:
        _call("unshare", 0x10020000)
    _call("mount", b"none", b"/usr", b"tmpfs", 0, None)


@attack
def write_hosts_tmp(world: dict[str, Any]) -> object:
    with open(world["planted"]["write_hosts_tmp"], "w"):
        pass


@attack
def bpf(world: dict[str, Any]) -> object:
    """Absent where an ordinary user may not either: EINVAL is past the door."""
    try:
        _syscall(321, 0, 0, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.E2BIG, errno.EFAULT):
            raise


@attack
def io_uring(world: dict[str, Any]) -> object:
    try:
        _syscall(425, 0, 0)
    except OSError as error:
        if error.errno not in (errno.EFAULT, errno.EINVAL):
            raise


@attack
def keyrings(world: dict[str, Any]) -> object:
    _syscall(250, 0, -3 & 0xFFFFFFFF, 0)  # KEYCTL_GET_KEYRING_ID, session


@attack
def userfaultfd(world: dict[str, Any]) -> object:
    os.close(_syscall(323, 1 | os.O_CLOEXEC))


@attack
def perf(world: dict[str, Any]) -> object:
    try:
        _syscall(298, 0, 0, -1, -1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


@attack
def pidfd_getfd(world: dict[str, Any]) -> object:
    os.close(_syscall(438, os.pidfd_open(world["worker"]), 0, 0))


@attack
def escape_the_limits(world: dict[str, Any]) -> object:
    """Raise them, leave the group, mount the hierarchy anew; then fork 200 times."""
    _write_all(world["limits"])
    try:
        _call("unshare", 0x12020000)  # user, mount and cgroup namespaces
        os.makedirs("/tmp/groups", exist_ok=True)
        for kind, options in ((b"cgroup", b"pids"), (b"cgroup2", b"")):
            with contextlib.suppress(OSError):
                _call("mount", b"none", b"/tmp/groups", kind, 0, options)
        _write_all(world["limits"], "/tmp/groups")
    except OSError:
        pass
    children = []
    try:
        for _ in range(200):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            children.append(pid)
    finally:
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _write_all(limits: list[str], below: str = "") -> None:
    places = [os.path.dirname(path) for path in limits]
    for place in [*places, *([below] if below else [])]:
        for at, _, files in os.walk(place):
            for name in {"pids.max", "cgroup.procs"} & set(files):
                try:
                    with open(f"{at}/{name}", "w") as file:
                        file.write("max" if name == "pids.max" else "0")
                except OSError:
                    continue


@attack
def names_of_processes(world: dict[str, Any]) -> object:
    with open(f"/proc/{world['raylet']}/cmdline", "rb") as file:
        assert file.read()


@attack
def names_of_workers(world: dict[str, Any]) -> object:
    with open(f"/proc/{world['worker']}/cmdline", "rb") as file:
        assert file.read()


def works(world: dict[str, Any]) -> dict[str, object]:
    """What a worker must still be able to do; the pid that raylet started."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(world["raylet_socket"])
        client.sendall(b"hello")
    with socket.socket() as server:
        server.bind(("127.0.0.1", world["port_inside"]))
    for port in world["ports_of_ray"]:
        socket.create_connection(("127.0.0.1", port), 5).close()
    with open(os.environ["RAY_AUTH_TOKEN_PATH"]) as file:
        token = file.read()
    with open("/tmp/mine", "w") as file, open("/dev/shm/mine", "w") as shared:
        file.write("x")
        shared.write("x")
    return {
        "pid": os.getpid(),
        "pgid": os.getpgid(0),
        "uid": os.getuid(),
        "token": token,
        "fds": sorted(int(n) for n in os.listdir("/proc/self/fd") if int(n) > 2)[1:],
        "variables": sorted(os.environ),
        "processes": sorted(int(n) for n in os.listdir("/proc") if n.isdigit()),
    }


def main() -> None:
    if sys.argv[1] == "wait":
        print("waiting", flush=True)
        time.sleep(600)
    if sys.argv[1] == "jail":
        jail()
        return
    world = json.loads(sys.argv[1])
    found: dict[str, object] = {}
    for name, function in ATTACKS.items():
        if not name.startswith(world["only"]):
            continue
        pid = os.fork()
        if pid == 0:
            code = 0
            try:
                function(world)
            except OSError as error:
                code = error.errno or 255
            except BaseException:
                code = 254
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found[name] = "ok" if code == 0 else errno.errorcode.get(code, str(code))
    if not world["control"]:
        found["works"] = works(world)
    print(json.dumps(found), flush=True)


def jail() -> None:
    """Make a jail of the node's strictest profile; look for secrets from there."""
    from raysandbox import policy, run
    from raysandbox.worker.gate import SEALED

    with open(SEALED, "rb") as file:
        node = policy.unseal(file.read())
    looking = "id -u; ls -d /run/raysandbox $RAY_AUTH_TOKEN_PATH; ls /proc; exit 7"
    result = run.run(
        node.profiles["strict"],
        ["/bin/sh", "-c", looking],
        environment={"RAY_AUTH_TOKEN_PATH": os.environ["RAY_AUTH_TOKEN_PATH"]},
    )
    print(f"jail exit {result.exit_code}", flush=True)


if __name__ == "__main__":
    main()
