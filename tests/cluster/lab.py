"""Machines for cluster tests: namespaces of the project's own, and nothing else.

A `Lab` is one switch (a bridge inside its own network namespace) with hosts on
it. Each host has its own network, pid, mount, ipc and uts namespaces, its own
/tmp, /dev/shm and home, and one address on the bridge, so two Ray nodes on one
machine share nothing but the installed packages. Killing a host's first
process makes the kernel end everything in it: that is the clean-up, and it
also happens when the test process itself dies.

No packet leaves the namespaces: the bridge has no uplink.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the test process dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ip(*args: str, netns: str = "") -> None:
    prefix = ["ip", "-n", netns] if netns else ["ip"]
    subprocess.run([*prefix, *args], check=True, capture_output=True, text=True)


class Host:
    """One machine of the lab."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self.netns = f"{lab.name}-{name}"
        self.home = lab.path / name
        self.home.mkdir(mode=0o700)
        link = f"{lab.index}{name}"[:12]
        _ip("netns", "add", self.netns)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0",
            "netns", self.netns)  # fmt: skip
        _ip("link", "set", link, "netns", lab.switch)
        _ip("link", "set", link, "master", "br0", "up", netns=lab.switch)
        _ip("link", "set", "lo", "up", netns=self.netns)
        _ip("addr", "add", f"{address}/24", "dev", "eth0", netns=self.netns)
        _ip("link", "set", "eth0", "up", netns=self.netns)
        script = (
            "mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && "
            f"hostname {name} && echo ready && exec sleep infinity"
        )
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", self.netns, "unshare", "--pid", "--mount", "--ipc",
             "--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline().strip() != "ready":
            raise RuntimeError(f"host {name} did not come up")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def env(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a process on this host."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(extra or {}),
        }

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--pid", "--mount", "--ipc",
                "--uts", "--wd=" + str(self.home), "--", *command]  # fmt: skip

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        check: bool = True,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is in the error when it fails."""
        out = subprocess.run(
            self.argv(command),
            env=self.env(env),
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and out.returncode:
            raise AssertionError(
                f"{self.name}: {' '.join(command)}: exit {out.returncode}\n"
                f"{out.stdout[-4000:]}\n{out.stderr[-4000:]}"
            )
        return out

    def popen(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        log: str = "",
    ) -> subprocess.Popen[str]:
        """Start a command that goes on; its output goes to HOME/<log>."""
        target = open(self.home / log, "ab") if log else subprocess.DEVNULL
        try:
            return subprocess.Popen(
                self.argv(command),
                env=self.env(env),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            if not isinstance(target, int):
                target.close()

    def python(
        self,
        code: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 90,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python source on this host."""
        return self.run(
            sys.executable, "-c", code, *args, env=env, timeout_s=timeout_s, check=check
        )

    def kill(self) -> None:
        """End everything on this host at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait(timeout=10)

    def close(self) -> None:
        """End the host and remove its network namespace."""
        with contextlib.suppress(Exception):
            self.kill()
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True)


class Lab:
    """A switch and the hosts on it; use as a context manager."""

    _count = 0

    def __init__(self) -> None:
        Lab._count += 1
        self.index = f"r{os.getpid() % 100000}{chr(96 + Lab._count)}"
        self.name = f"rsb-{os.getpid()}-{Lab._count}"
        self.switch = f"{self.name}-switch"
        self.path = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/var/tmp"))
        self.hosts: dict[str, Host] = {}
        _ip("netns", "add", self.switch)
        try:
            _ip("link", "set", "lo", "up", netns=self.switch)
            _ip("link", "add", "br0", "type", "bridge", netns=self.switch)
            _ip("link", "set", "br0", "up", netns=self.switch)
        except BaseException:
            self.close()
            raise

    def host(self, name: str, address: str) -> Host:
        """Add a machine to the lab."""
        self.hosts[name] = Host(self, name, address)
        return self.hosts[name]

    def sniff(self, file: Path) -> subprocess.Popen[bytes]:
        """Start tcpdump on the lab's bridge, every byte of each packet, to `file`."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.switch, "tcpdump", "-i", "br0", "-s", "0",
             "-U", "-Z", "root", "-w", str(file)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert process.stderr is not None
        line = process.stderr.readline()
        if b"listening" not in line:
            process.kill()
            raise RuntimeError(f"tcpdump: {line.decode(errors='replace')}")
        return process

    def close(self) -> None:
        """Remove every host, namespace and file of the lab."""
        for host in self.hosts.values():
            host.close()
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def wait_for(what: str, check: object, timeout_s: float = 20) -> None:
    """Wait until `check()` is true; AssertionError that names `what` otherwise."""
    assert callable(check)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.05)
    raise AssertionError(f"not seen within {timeout_s} s: {what}")
