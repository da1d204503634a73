"""A node started by `raysandbox start`, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.answers import ALONE

ROOT = Path(__file__).parents[2]


def policy(more: str = "", **offer: int) -> str:
    """Return a policy by which everybody may have all that it offers."""
    offered = "\n".join(f"{name} = {count}" for name, count in offer.items())
    tagged = ", ".join(f'"{name}"' for name in offer if name != "strict")
    return f"""
[offer]
{offered}

[[rules]]
name = "everybody"
profiles = [{tagged}]

[totals]
cpu = "100%"
memory = "80%"
pids = "90%"
{more}"""


POLICY = policy("\n[worker]\npids = 512\n", strict=3, standard=4)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


#: Ray's own `ray start`.
PLAIN = [sys.executable, "-c", "from ray.scripts.scripts import main\nmain()"]


def remove_group(path: str | Path) -> None:
    """Remove a control group and all below it; nobody is in them any more."""
    subprocess.run(["find", str(path), "-depth", "-type", "d", "-delete"])


_numbers = itertools.count()


@contextlib.contextmanager
def delegated(uid: int) -> Iterator[dict[str, str]]:
    """Give a user the version 1 groups that a node needs, until the end.

    Yields:
        The variable that names them to whatever starts workers.
    """
    made = []
    name = f"rsn-{os.getpid()}-{next(_numbers)}"
    try:
        for each in ("memory", "pids", "cpu", "cpuacct", "blkio", "freezer"):
            if os.path.exists(f"/sys/fs/cgroup/{each}/cgroup.procs"):
                path = f"/sys/fs/cgroup/{each}/{name}"
                os.mkdir(path)
                made.append(path)
                os.chown(path, uid, uid)
        yield {"RAYSANDBOX_CGROUP": ":".join(made)} if made else {}
    finally:
        for path in made:
            remove_group(path)


def _is_keeper(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "raysandbox-node"
    except OSError:
        return False


#: Ray's own `ray stop`, which sees these processes and no others.
_STOP = """
import sys, psutil
pids = [int(pid) for pid in sys.argv.pop(1).split(",")]
every = psutil.process_iter
psutil.process_iter = lambda *given: (p for p in every(*given) if p.pid in pids)
from ray.scripts.scripts import main
main()
"""


class Node:
    """Start one; `close`, or the end of a `with`, ends it, and nothing else."""

    def __init__(
        self,
        command: list[str] | None = None,
        *,
        policy: str = POLICY,
        arguments: Sequence[str] = (),
        uid: int = 0,
        block: bool = True,
        **variables: str,
    ) -> None:
        """Start it and wait until it serves.

        Args:
            command: What takes the arguments of ``ray start``; ours unless given.
            policy: The node's.
            arguments: More of them; the last one of a name counts.
            uid: Whose it is; its drivers are, too. Who is not root is given control
                groups of its own.
            block: What starts it stays, and ends with it.
            variables: More of its environment; drivers get those of Ray's, too.
        """
        if uid:
            from tests.require import require

            require("landlock:6")
        self.uid = uid
        self.temporary = Path(tempfile.mkdtemp(prefix="rsn-", dir="/tmp"))
        # Not in /tmp: who may write there could replace the directory.
        home = "/srv" if uid else Path.home()
        self.site = Path(tempfile.mkdtemp(prefix="rsn-", dir=home))
        policy_file = self.site / "policy.toml"
        policy_file.write_text(policy)
        self.token = self.site / "token"
        self.token.write_text("0123456789abcdef" * 4)
        self.token.chmod(0o600)
        for path in (self.temporary, self.site, policy_file, self.token):
            os.chown(path, uid or os.geteuid(), -1)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.log = self.temporary / "start.log"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY")},
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "PYTHONPATH": str(ROOT),
        }
        self.environment |= {k: v for k, v in variables.items() if k.startswith("RAY_")}
        # Between what Ray Client's servers take and what the kernel gives out.
        first = 24_100 + os.getpid() % 32 * 256
        command = command or [sys.executable, "-m", "raysandbox"]
        first_words = [
            "start", "--head", "--num-cpus=2", f"--port={self.port}",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            f"--temp-dir={self.temporary}/r", f"--min-worker-port={first}",
            f"--max-worker-port={first + 255}",
            "--object-store-memory=200000000",
            f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        if uid:
            self.environment["HOME"] = str(self.site)
        self._block = block
        self._command = [*command, *first_words, *["--block"] * block, *arguments]
        self._variables = {"RAYSANDBOX_POLICY": str(policy_file), **variables}
        self._given = contextlib.ExitStack()
        if uid:
            self._variables |= self._given.enter_context(delegated(uid))
        self.start()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, once more after `stop`, and wait until it serves."""
        with open(self.log, "wb") as log:
            self.process = self._start(
                self._command,
                env={**self.environment, **self._variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while True:
            code = self.process.poll()
            said = self.log.read_text()
            if "--block" in said if self._block else code == 0:
                return
            if code is not None or time.monotonic() > end:
                raise AssertionError(f"did not start: {said[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it as its operator does: by SIGTERM where it blocks, else `ray stop`."""
        if self._block:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            return
        pids = ",".join(map(str, self.processes()))
        command = [sys.executable, "-c", _STOP, pids, "stop"]
        with open(self.log, "ab") as log:
            process = self._start(
                command, env=self.environment, stdout=log, stderr=log, cwd="/"
            )
            process.wait(60)

    def drive(
        self, code: str, options: str = "", limit_s: float = 110, **variables: str
    ) -> str:
        """Run a driver's source on this node; its output is in the error if it fails.

        Args:
            code: What it does once it is connected, as `options` do before.
            options: Lines that set ``options``, more arguments of ray.init.
            limit_s: How long it may take.
            variables: More of its environment.
        """
        first = (
            f"{ALONE}\nimport faulthandler, time, ray\n"
            f"faulthandler.dump_traceback_later({limit_s * 0.95})\n"
            f"options = {{}}\n{textwrap.dedent(options)}\n"
            f"ray.init(address={self.address!r}, logging_level='ERROR', "
            "log_to_driver=False, **options)\n"
        )
        try:
            done = self.run(first + textwrap.dedent(code), limit_s, **variables)
        except subprocess.TimeoutExpired as expired:
            said = f"{self._last_words()}\nno end within {limit_s} s, but:\n"
            said += f"{expired.stdout}\n{expired.stderr}"
            raise AssertionError(said) from None
        assert done.returncode == 0, (
            done.stdout[-2000:] + done.stderr[-4000:] + self._last_words()
        )
        return done.stdout

    def _last_words(self) -> str:
        """What a node said last, whether or not it lives."""
        said = f"\nThe node's end: {self.process.poll()}, its raylet: {self.raylet}\n"
        logs = self.session / "logs"
        names = ("raylet.out", "raylet.err", "gcs_server.out", "dashboard_agent.log")
        for path in (self.log, *(logs / name for name in names)):
            with contextlib.suppress(OSError):
                said += f"--- {path.name}\n{path.read_text()[-3000:]}\n"
        return said

    def run(
        self, code: str, limit_s: float = 110, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with what a driver of this node has in its environment."""
        process = self._start(
            [sys.executable, "-c", code],
            env={**self.environment, **variables},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException as error:
            process.kill()
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                error.output, error.stderr = out, err
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def _start(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        if not self.uid:
            return subprocess.Popen(command, **options)
        from tests.attacks.harness import start_as

        return start_as(self.uid, self.uid, command, **options)

    @property
    def host(self) -> str:
        """Its address as Ray has it, which takes loopback's for another."""
        from ray._private.services import get_node_ip_address

        return str(get_node_ip_address())

    @property
    def session(self) -> Path:
        return (self.temporary / "r" / "session_latest").resolve()

    def processes(self) -> dict[int, str]:
        """Every living process of this node: pid to the start of its command."""
        found = {}
        raylet = self.raylet
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().decode()
                parent = int(
                    Path(f"/proc/{entry}/stat")
                    .read_text()
                    .rpartition(")")[2]
                    .split()[1]
                )
            except (OSError, UnicodeDecodeError):
                continue
            if (
                str(self.temporary) in command
                or (raylet and parent == raylet)
                or self._is_ours(entry)
            ):
                found[int(entry)] = command.replace("\0", " ")[:80]
        return found

    def _is_ours(self, pid: str) -> bool:
        """Agents rename themselves; the node's policy is in their environment."""
        try:
            return str(self.site).encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    @property
    def raylet(self) -> int:
        for entry in os.listdir("/proc"):
            try:
                if os.path.basename(os.readlink(f"/proc/{entry}/exe")) == "raylet":
                    command = Path(f"/proc/{entry}/cmdline").read_bytes().decode()
                    if str(self.temporary) in command:
                        return int(entry)
            except OSError:
                continue
        return 0

    def groups(self, raylet: int) -> list[str]:
        """Control groups of this node's workers, and the node's own."""
        return [
            str(path)
            for path in Path("/sys/fs/cgroup").rglob(f"raysandbox-*-w{raylet}")
        ]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                # It drains for half a minute if there is something to wait for, and
                # without raylet there is nothing that could end in order.
                self.process.wait(5 if self.raylet else 0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        end = time.monotonic() + 40
        # Again and again: one of them may be about to start another.
        while (left := self.processes()) and time.monotonic() < end:
            for pid in left:
                # The node's keeper removes its groups, and then ends.
                if not _is_keeper(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.site, ignore_errors=True)
        self._given.close()
