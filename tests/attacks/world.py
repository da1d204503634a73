"""The victims: files, processes, sockets and groups that the attacks aim at.

All of it belongs to the tests.  Nothing is protected by its own permissions:
files are 0666 and directories 0777 where an attack must be stopped by a wall
and not by ordinary access rights.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import selectors
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any

from tests.attacks.probes.base import NotHere, syscall
from tests.attacks.probes.files import _handle

__all__ = ["World"]

SECRET = "host secret"
# Not /tmp: the jail has its own there, and a bind below it would be special.
_PLACES = ("/var/tmp", "/srv", "/run", "/mnt", "/dev/shm")

_VICTIM = """
import ctypes, os, sys, tempfile
file = tempfile.TemporaryFile(); file.write(b"host secret"); file.flush(); file.seek(0)
buffer = ctypes.create_string_buffer(b"secret")
print(os.getpid(), file.fileno(), ctypes.addressof(buffer), flush=True)
sys.stdin.read()
"""


def _place() -> str:
    chosen = os.environ.get("RAYSANDBOX_TEST_DIR")
    for path in (chosen,) if chosen else _PLACES:
        if path and os.access(path, os.W_OK):
            return path
    raise RuntimeError(f"none of {_PLACES} is writable; set RAYSANDBOX_TEST_DIR")


class _Servers(threading.Thread):
    """Answers every connection and datagram with a greeting."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="victims")
        self.handlers: dict[socket.socket, Callable[[socket.socket], None]] = {}
        self.stop_read, self.stop_write = os.pipe()

    def listen(
        self,
        family: int,
        kind: int,
        address: Any,
        handler: Callable[[socket.socket], None] | None = None,
    ) -> Any:
        sock = socket.socket(family, kind)
        sock.bind(address)
        if kind != socket.SOCK_DGRAM:
            sock.listen(16)
        default = _greet_datagram if kind == socket.SOCK_DGRAM else _greet
        self.handlers[sock] = handler or default
        if family == socket.AF_UNIX and isinstance(address, str) and address[0] == "/":
            os.chmod(address, 0o777)
        return sock.getsockname()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (self.stop_read, *self.handlers):
                selector.register(each, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == self.stop_read:
                        return
                    self._answer(key.fileobj)

    def _answer(self, sock: Any) -> None:
        try:
            self.handlers[sock](sock)
        except OSError:
            pass  # the probe is gone
        except Exception:
            # Whatever it was: the others' controls need us.
            traceback.print_exc()

    def close(self) -> None:
        os.write(self.stop_write, b"x")
        self.join()
        for sock in self.handlers:
            sock.close()
        os.close(self.stop_read)
        os.close(self.stop_write)


def _greet(sock: socket.socket) -> None:
    client, _ = sock.accept()
    with client:
        client.send(b"hello")


def _greet_datagram(sock: socket.socket) -> None:
    _, sender = sock.recvfrom(64)
    if sender:
        sock.sendto(b"hello", sender)


class World:
    """Makes the victims for one actor; a context for the probes.

    Attributes:
        root: Directory that holds the files.
        readonly: The one part of it that the profile names, read-only.
    """

    def __init__(self, uid: int, gid: int) -> None:
        self.uid, self.gid = uid, gid
        self.is_root = os.geteuid() == 0
        self._undo: list[Callable[[], object]] = []
        self.root = tempfile.mkdtemp(prefix="rsx-", dir=_place())
        self._undo.append(lambda: shutil.rmtree(self.root, ignore_errors=True))
        os.chmod(self.root, 0o755)
        self.given = self._dir("given")
        self.readonly = self._dir("given/readonly")
        self.profiles = self._dir("profiles")
        os.chmod(self.profiles, 0o755)
        self.delegated: list[str] = []
        # Version 2: where the user's processes are, in what it was given.
        self.home_group = ""
        self.context: dict[str, Any] = {"side": "control"}
        try:
            self._files()
            self._servers()
            self._processes()
            self._ipc()
            self._groups()
            self._host()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take everything away again."""
        while self._undo:
            with contextlib.suppress(OSError):
                self._undo.pop()()

    def _dir(self, name: str) -> str:
        path = f"{self.root}/{name}"
        os.mkdir(path)
        os.chmod(path, 0o777)
        self._own(path)
        return path

    def _own(self, path: str) -> None:
        if self.is_root:
            os.chown(path, self.uid, self.gid)

    def _file(self, path: str, text: str = SECRET) -> str:
        if not path.startswith("/"):
            path = f"{self.root}/{path}"
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o666)
        self._own(path)
        return path

    def _temporary(self, directory: str) -> str:
        fd, path = tempfile.mkstemp(prefix="rsx-", dir=directory)
        os.close(fd)
        self._undo.append(lambda: os.unlink(path))
        return self._file(path)

    def _files(self) -> None:
        secrets = tempfile.mkdtemp(prefix="rsx-", dir="/tmp")
        self._undo.append(lambda: shutil.rmtree(secrets, ignore_errors=True))
        os.chmod(secrets, 0o755)
        home = self._dir("home")
        os.mkdir(f"{home}/.ray")
        os.chmod(f"{home}/.ray", 0o755)
        self._dir("ray")
        session = self._dir("ray/session_latest")
        self._dir("ray/session_latest/sockets")
        self._file("ray/session_latest/node_ip_address.json")
        self._file("home/.ray/auth_token")
        link = f"{secrets}/link"
        os.symlink("secret", link)
        self._file("given/sibling")
        self._dir("given/readonly/hidden")
        self._file("given/readonly/hidden/inside")
        self._file("given/readonly/hidden-file", "hidden secret")
        self._file("given/readonly/unlink-me", "x")
        self._file("given/readonly/file", "file")
        os.mkfifo(f"{self.readonly}/fifo", 0o666)
        os.chmod(f"{self.readonly}/fifo", 0o666)
        self._own(f"{self.readonly}/fifo")
        program = os.path.realpath(shutil.which("id") or "/usr/bin/id")
        if self.is_root:
            shutil.copy(program, f"{self.readonly}/setuid-id")
            os.chmod(f"{self.readonly}/setuid-id", 0o4755)
            cat = os.path.realpath(shutil.which("cat") or "/bin/cat")
            shutil.copy(cat, f"{self.readonly}/caps-cat")
            # vfs_cap_data, revision 2, effective: CAP_NET_RAW.
            caps = bytes.fromhex("0100000200200000000000000000000000000000")
            os.setxattr(f"{self.readonly}/caps-cat", b"security.capability", caps)
            os.mknod(f"{self.readonly}/device", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
            os.chmod(f"{self.readonly}/device", 0o666)
        self._dir("own")
        self.context |= {
            "secret": self._file(f"{secrets}/secret"),
            "secret_link": link,
            "scratch": self._dir("own/scratch"),
            "readonly": self.readonly,
            "beside_readonly": self.given,
            "home": home,
            "home_secret": self._file("home/secret"),
            "ray_session": session,
            "shm_file": self._temporary("/dev/shm"),
            "id_program": program,
            "handle_mount": self.root,
            "user_uid": self.uid if self.uid else 54321,
            "user_gid": self.gid if self.gid else 54321,
        }

    def _servers(self) -> None:
        servers = _Servers()
        name = f"raysandbox-{os.getpid()}-{self.uid}"
        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        give = self._give_descriptor
        tcp4 = servers.listen(socket.AF_INET, stream, ("", 0))
        udp4 = servers.listen(socket.AF_INET, datagram, ("127.0.0.1", 0))
        tcp6 = udp6 = ("", 0)
        with contextlib.suppress(OSError):
            tcp6 = servers.listen(socket.AF_INET6, stream, ("::1", 0))
            udp6 = servers.listen(socket.AF_INET6, datagram, ("::1", 0))
        unix = socket.AF_UNIX
        servers.listen(unix, stream, f"\0{name}")
        servers.listen(unix, stream, f"\0{name}-fds", give)
        servers.listen(unix, datagram, f"\0{name}-dgram")
        servers.listen(unix, stream, f"{self.root}/socket")
        servers.listen(unix, stream, f"{self.readonly}/socket")
        servers.listen(unix, stream, f"{self.readonly}/socket-fds", give)
        servers.listen(unix, datagram, f"{self.readonly}/socket-datagram")
        servers.listen(unix, stream, f"{self.root}/ray/session_latest/sockets/raylet")
        service = f"{self.root}/docker.sock"
        if os.access("/run", os.W_OK):
            service = f"/run/{name}.sock"
            self._undo.append(lambda: os.unlink(service))
        servers.listen(unix, stream, service)
        servers.start()
        self._undo.append(servers.close)
        self.context |= {
            "tcp4_port": tcp4[1],
            "tcp6_port": tcp6[1],
            "udp4_port": udp4[1],
            "udp6_port": udp6[1],
            "address": _own_address(),
            "abstract": name,
            "abstract_dgram": f"{name}-dgram",
            "abstract_fds": f"{name}-fds",
            "unix_socket": f"{self.root}/socket",
            "run_socket": service,
        }

    def _give_descriptor(self, sock: socket.socket) -> None:
        client, _ = sock.accept()
        with client, open(self.context["secret"], "rb") as file:
            rights = array.array("i", [file.fileno()])
            kind = (socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)
            client.sendmsg([b"x"], [kind])

    def _processes(self) -> None:
        from tests.attacks.harness import interpreter, start_as

        victim = start_as(
            self.uid,
            self.gid,
            [interpreter(), "-I", "-S", "-c", _VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

        def end() -> None:
            victim.kill()
            victim.communicate()

        self._undo.append(end)
        assert victim.stdout is not None
        pid, fd, address = map(int, victim.stdout.readline().split())
        self.victim = victim
        self.context |= {
            "victim": pid,
            "victim_group": pid,
            "victim_fd": fd,
            "victim_address": address,
            # What pid 1 is to the jail, the victim is to the control.
            "init_pid": pid,
        }

    def _ipc(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        key = 0x52530000 + os.getpid() % 0xFFFF + (0 if self.uid == 0 else 0x10000)
        segment = libc.shmget(key, ctypes.c_size_t(4096), 0o1666)
        libc.shmat.restype = ctypes.c_void_p
        where = libc.shmat(segment, None, 0)
        ctypes.memmove(where, b"secret", 6)
        libc.shmdt(ctypes.c_void_p(where))
        self._undo.append(lambda: libc.shmctl(segment, 0, None))
        semaphore = libc.semget(key, 1, 0o1666)
        self._undo.append(lambda: libc.semctl(semaphore, 0, 0))
        name = f"rsx-{os.getpid()}-{self.uid}"
        mask = os.umask(0)
        try:
            os.close(syscall("mq_open", name.encode(), 0o102, 0o666, 0))
            number = {"x86_64": 241, "aarch64": 181}[os.uname().machine]
            self._undo.append(lambda: libc.syscall(number, name.encode()))
        except OSError:
            name = "rsx-none"
        finally:
            os.umask(mask)
        self.context |= {"shm_id": segment, "shm_key": key, "queue": name}

    def _groups(self) -> None:
        """A group of the host that an escaped task could join."""
        first, second = "/sys/fs/cgroup/pids", "/sys/fs/cgroup"
        version1 = os.path.exists(f"{first}/cgroup.procs")
        base = first if version1 else second
        path = f"{base}/rsx-attack-{os.getpid()}-{self.uid}"
        if self.is_root:
            with contextlib.suppress(OSError):
                os.mkdir(path)
                self._undo.append(lambda: os.rmdir(path))
        if self.uid and self.is_root:
            self._delegate(version1)
        self.context |= {
            "cgroup_dir": path,
            "cgroup_fs": "cgroup" if version1 else "cgroup2",
            "cgroup_options": "pids" if version1 else "",
            "release_agent": f"{base}/release_agent",
        }

    def _delegate(self, version1: bool) -> None:
        """Give the ordinary user groups of its own, as an administrator would."""
        root = "/sys/fs/cgroup"
        places = [root]
        if version1:
            names = ("memory", "pids", "cpu", "cpuacct", "freezer")
            places = [f"{root}/{name}" for name in names]
        for place in sorted({os.path.realpath(place) for place in places}):
            path = f"{place}/rsx-delegated-{os.getpid()}"
            with contextlib.suppress(OSError):
                os.mkdir(path)
                self._undo.append(lambda path=path: _rmdir_tree(path))
                for at in (path, *(f"{path}/{name}" for name in os.listdir(path))):
                    os.chown(at, self.uid, self.gid)
                if not version1:
                    self.home_group = f"{path}/home"
                    os.mkdir(self.home_group)
                    for at in ("", *os.listdir(self.home_group)):
                        os.chown(f"{self.home_group}/{at}", self.uid, self.gid)
                self.delegated.append(path)

    def _host(self) -> None:
        with open("/proc/mounts") as file:
            points = [line.split()[1] for line in file]
        ours = ("/", "/proc", "/dev", "/dev/shm", "/tmp", self.readonly)
        with open("/etc/passwd") as file:
            accounts = file.readlines()
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        self.context |= {
            "host_only_mounts": [point for point in points if point not in ours],
            "hostname": os.uname().nodename,
            "passwd_line": accounts[-1],
            "boot_id": boot,
            "host_namespaces": {
                name: os.stat(f"/proc/self/ns/{name}").st_ino
                for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
                if os.path.exists(f"/proc/self/ns/{name}")
            },
            "host_mount_namespace": 0,
            "block_device": _block_device(),
            "secret_variables": ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"],
            "secret_value": "rsx-secret-value",
            "launcher_pid": os.getpid(),
            "python": sys.executable,
            "file_size_bytes": 1 << 20,
        }
        with contextlib.suppress(OSError, NotHere):
            buffer, _ = _handle(self.context["secret"])
            self.context["handle"] = bytes(buffer).hex()
            # The handle means something on the file system it came from.
            self.context["handle_mount"] = os.path.dirname(self.context["secret"])


def _rmdir_tree(path: str) -> None:
    for directory, _, _ in os.walk(path, topdown=False):
        os.rmdir(directory)


def _own_address() -> str:
    """An address of this machine that is not loopback, if it has one."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(sock, 0x8915, request)
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    return address
    return "127.0.0.2"


def _block_device() -> str:
    """A disk that root may open here (a device cgroup may forbid some)."""
    for name in sorted(os.listdir("/dev")):
        path = f"/dev/{name}"
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(os.stat(path).st_mode):
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                return path
    return "/dev/vda"
