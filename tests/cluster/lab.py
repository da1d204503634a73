"""Machines for cluster tests: namespaces of the project's own, and nothing else.

A `Lab` is one switch (a bridge in a network namespace) with hosts on it. Each
host has its own network, pid, mount, ipc and uts namespaces, its own /tmp,
/dev/shm and home, and one address on the bridge, so two Ray nodes on one
machine share nothing but the installed packages.

Nothing here has a name outside: a namespace lives as long as its first process,
which the kernel ends when the test process ends, however that happens, and with
it go links, mounts and everything that ran there. The one thing on disk, the
lab's directory, is removed by a process that waits for our end of a pipe to
close. No packet leaves: the bridge has no uplink.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import raysandbox

PR_SET_PDEATHSIG = 1
SERVANT = Path(__file__).parent / "probes" / "servant.py"
# Where the package under test is, when that is a source tree and not installed.
_package = Path(raysandbox.__file__).resolve().parents[1]
SOURCE = {} if _package.name == "site-packages" else {"PYTHONPATH": str(_package)}
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the test process dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _inside(pid: int, *command: str) -> None:
    """Run a command in the network namespace of a process.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    out = subprocess.run(
        ["nsenter", "-t", str(pid), "--net", "--", *command],
        capture_output=True, text=True,
    )  # fmt: skip
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)}: {out.stderr.strip()}")


def _holder(*unshare: str, script: str = "") -> tuple[subprocess.Popen[str], int]:
    """Start the first process of new namespaces; return it and its child's pid."""
    holder = subprocess.Popen(
        ["unshare", *unshare, "--fork", "--kill-child", "sh", "-c",
         f"{script} echo ready && exec sleep infinity"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        preexec_fn=_die_with_parent,
    )  # fmt: skip
    assert holder.stdout is not None
    if holder.stdout.readline().strip() != "ready":
        raise RuntimeError(f"namespaces did not come up: {script}")
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    return holder, int(children.read_text().split()[0])


class Servant:
    """A process on a host that has imported what many calls need."""

    def __init__(self, host: Host, *modules: str) -> None:
        self.host = host
        self._process = subprocess.Popen(
            host.argv([sys.executable, str(SERVANT), *modules]), env=host.env(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip

    def __call__(
        self, run: str, *argv: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a function, ``module:name``, as a program with these arguments."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        ask = {
            "run": run, "argv": argv, "env": self.host.env(env),
            "cwd": str(self.host.home),
        }  # fmt: skip
        stdin.write(json.dumps(ask) + "\n")
        stdin.flush()
        said = json.loads(stdout.readline())
        return subprocess.CompletedProcess(argv, said["code"], said["out"], said["err"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Host:
    """One machine of the lab."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self._servants: dict[tuple[str, ...], Servant] = {}
        self.home = lab.path / name
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.boot()

    def boot(self) -> None:
        """Start the machine, its home as a former life left it."""
        self._holder, self.pid = _holder(
            "--net", "--pid", "--mount", "--ipc", "--uts", "--mount-proc",
            script="mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && "
            f"hostname {self.name} &&",
        )  # fmt: skip
        self.lab.namespaces.add(os.stat(f"/proc/{self.pid}/ns/pid").st_ino)
        switch = self.lab.switch
        _inside(switch, "ip", "link", "add", "name", self.name, "type", "veth", "peer",
                "name", "eth0", "netns", str(self.pid))  # fmt: skip
        _inside(switch, "ip", "link", "set", self.name, "master", "br0", "up")
        _inside(self.pid, "ip", "link", "set", "lo", "up")
        _inside(self.pid, "ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        # The same in each life: neighbours remember it.
        mac = "02:00:" + bytes(map(int, self.address.split("."))).hex(":")
        _inside(self.pid, "ip", "link", "set", "eth0", "address", mac)
        _inside(self.pid, "ip", "link", "set", "eth0", "up")

    @property
    def policy(self) -> Path:
        """The node's policy: as shipped, but for totals that all hosts share."""
        path = self.home / "policy.toml"
        if not path.exists():
            path.write_text(POLICY)
        return path

    def env(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a process on this host."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **SOURCE,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAYSANDBOX_POLICY": str(self.policy),
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

    def servant(self, *modules: str) -> Servant:
        """Return the process that has imported these modules, or paths of files."""
        if modules not in self._servants:
            self._servants[modules] = Servant(self, *modules)
        return self._servants[modules]

    def raysandbox(
        self, *arguments: str, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of ours that starts nothing of Ray's."""
        out = self.servant(*COMMANDS)(
            "raysandbox.cli:main", "raysandbox", *arguments, env=env
        )
        if check and out.returncode:
            raise AssertionError(
                f"{self.name}: {' '.join(arguments)}: exit {out.returncode}\n"
                f"{out.stdout[-4000:]}\n{out.stderr[-4000:]}\n{self._last_words()}"
            )
        return out

    def _last_words(self) -> str:
        """What the helpers of this host wrote last."""
        return "\n".join(
            f"--- {log}\n{log.read_text(errors='replace')[-1500:]}"
            for log in sorted(self.home.glob("*/run/*.log"))
        )

    def kill(self) -> None:
        """End everything on this host at once, as a power cut would."""
        while self._servants:
            self._servants.popitem()[1].close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait(timeout=10)
        # The kernel takes the cable away when it gets to it, and until then its end
        # at the switch has the name that the next life's would have.
        with contextlib.suppress(RuntimeError):
            _inside(self.lab.switch, "ip", "link", "delete", self.name)

    def reboot(self) -> None:
        """End everything here and start the machine again."""
        self.kill()
        self.boot()

    def close(self) -> None:
        """End the host for good."""
        with contextlib.suppress(Exception):
            self.kill()


def _groups() -> set[str]:
    """Control groups of raysandbox's, in every hierarchy."""
    return {
        directory
        for directory, _, _ in os.walk("/sys/fs/cgroup")
        if "/raysandbox" in directory
    }


def _is_in_use(group: str) -> bool:
    """Whether a control group, or one below it, has processes."""
    for procs in Path(group).rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            if procs.read_text():
                return True
    return False


class Lab:
    """A switch and the hosts on it; use as a context manager."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="rsb-lab-", dir="/var/tmp"))
        self.hosts: dict[str, Host] = {}
        # By host: where its drivers find their cluster.
        self.where: dict[str, str] = {}
        self._groups_before = _groups()
        # Process namespaces of the hosts, in each of their lives.
        self.namespaces: set[int] = set()
        # Its standard input ends with us, whatever ends us.
        self._janitor = subprocess.Popen(
            ["sh", "-c", 'read _; exec rm -rf "$0"', str(self.path)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            self._holder, self.switch = _holder("--net")
            _inside(self.switch, "ip", "link", "set", "lo", "up")
            _inside(self.switch, "ip", "link", "add", "br0", "type", "bridge")
            _inside(self.switch, "ip", "link", "set", "br0", "up")
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
            ["nsenter", "-t", str(self.switch), "--net", "--",
             "tcpdump", "--immediate-mode", "-i", "br0", "-s", "0", "-U", "-Z", "root",
             "-w", str(file)],
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
        holder = getattr(self, "_holder", None)
        if holder is not None:
            holder.kill()
            holder.wait(timeout=10)
        self._remove_groups()
        if self._janitor.stdin is not None:
            self._janitor.stdin.close()
        self._janitor.wait(timeout=60)

    def _remove_groups(self, within_s: float = 10) -> None:
        """Remove the control groups of hosts that lost their power.

        On a real machine they would be gone with the kernel.
        """
        until = time.monotonic() + within_s
        while left := set(filter(self._is_ours, _groups() - self._groups_before)):
            for path in sorted(left, key=len, reverse=True):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            # Those with processes in them are somebody else's: ours have ended.
            if time.monotonic() > until or all(map(_is_in_use, left)):
                break
            time.sleep(0.05)
        # What all share goes with the last group in it, whoever made it.
        for group in _groups():
            if group.endswith("/raysandbox"):
                with contextlib.suppress(OSError):
                    os.rmdir(group)

    def _is_ours(self, group: str) -> bool:
        """Whether a group may be a host's: others' names have another namespace."""
        named = re.search(r"/raysandbox-(?:node-)?(\d+)-", group)
        return named is None or int(named[1]) in self.namespaces

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# What `Host.raysandbox` has imported; Ray is not of it, which reads who it is then.
COMMANDS = ("raysandbox.cli", "raysandbox.cli.cluster", "raysandbox.cli.audit",
            "raysandbox.cluster.registry", "raysandbox.cluster.report")  # fmt: skip
POLICY = """
[offer]
strict = 64
standard = 64
fast = 64

[[rules]]
name = "everybody"
profiles = ["standard", "fast"]

[totals]
required = false
why = "the hosts of a lab share one machine"
"""


def wait_for(what: str, check: object, timeout_s: float = 20) -> None:
    """Wait until `check()` is true; AssertionError that names `what` otherwise."""
    assert callable(check)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.05)
    raise AssertionError(f"not seen within {timeout_s} s: {what}")
