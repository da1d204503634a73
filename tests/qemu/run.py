"""Runs a command on Debian's 6.1 kernel, over this machine's own files.

::

    python -m tests.qemu.run -- uname -a
    python -m tests.qemu.run --uid 54321 --timeout 300 -- .venv/bin/pytest tests/unit

That machine has cgroup version 2 alone, Landlock ABI 2, no network but loopback,
and this machine's tree below an overlay in memory: it reads everything and
writes nothing. `tests/qemu/init.c` sets it up and tells what it does. The
emulation is by software, since /dev/kvm need not exist: about ten times slower.

The kernel comes from ``make setup``.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUILD", "Result", "kill_all", "lacks", "pytest_inside", "run"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "qemu"
KERNEL = BUILD / "vmlinuz"
QEMU = "qemu-system-x86_64"
MEMORY_MIB = 2048

# lsm: Debian builds Landlock in and leaves it off. mitigations: only slow here.
COMMAND_LINE = (
    "console=ttyS0 loglevel=4 panic=-1 lsm=landlock,lockdown,yama,bpf "
    "cgroup_no_v1=all mitigations=off random.trust_cpu=on rdinit=/init"
)


@dataclass(frozen=True, slots=True)
class Result:
    """How the command ended.

    Attributes:
        exit: Its exit status; 128+N for signal N; None if the machine ended
            before it did (`console` tells more) or time ran out.
        output: What it wrote to stdout and stderr.
        console: What the kernel and the machine's first process wrote.
        timed_out: Whether the machine was killed at its deadline.
        boot_s: Seconds until the command's first output; the whole run if none.
        total_s: Seconds until QEMU was gone.
        files: What the command left in /out, by name.
    """

    exit: int | None
    output: str
    console: str
    timed_out: bool
    boot_s: float
    total_s: float
    files: dict[str, bytes]


def lacks() -> str:
    """Say what is missing to boot the second kernel here, or ``""``."""
    if os.uname().machine != "x86_64":
        return f"the second kernel is for x86_64, this is {os.uname().machine}"
    for program in (QEMU, "cpio", "cc"):
        if shutil.which(program) is None:
            return f"no program {program} on PATH (make setup)"
    if not KERNEL.exists():
        return f"no kernel in {KERNEL} (make setup)"
    return ""


def _initramfs() -> Path:
    """Build the initramfs, or find the one that is there."""
    source = (HERE / "init.c").read_bytes()
    release = (BUILD / "release").read_bytes()
    name = hashlib.sha256(source + release).hexdigest()[:16]
    image = BUILD / f"initramfs-{name}.cpio"
    if image.exists():
        return image
    with tempfile.TemporaryDirectory(dir=BUILD) as stage:
        init = f"{stage}/init"
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        subprocess.run(["cc", *flags, str(HERE / "init.c"), "-o", init], check=True)
        shutil.copytree(BUILD / "modules", f"{stage}/modules")
        names = sorted(str(path.relative_to(stage)) for path in Path(stage).rglob("*"))
        made = image.with_suffix(f".{os.getpid()}")
        with made.open("wb") as target:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc"],
                cwd=stage,
                input="\n".join(names).encode(),
                stdout=target,
                check=True,
            )
        made.replace(image)
    for old in BUILD.glob("initramfs-*.cpio"):
        if old != image:
            old.unlink(missing_ok=True)
    return image


_running: list[subprocess.Popen[bytes]] = []


def _be_humble() -> None:
    """Die with the thread that started this, and leave the cores to others."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.nice(19)


def kill_all() -> None:
    """End every machine of this process."""
    for process in list(_running):
        process.kill()


def pytest_inside(arguments: Sequence[str]) -> Result:
    """Run tests of this directory's tree on the second kernel."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    return run(
        [*command, "--timeout", "600", *arguments],
        env={"RAYSANDBOX_TEST_ALONE": "1"},
        timeout_s=1200,
    )


def _words(words: Sequence[str]) -> bytes:
    return b"".join(word.encode() + b"\0" for word in words)


def run(
    argv: Sequence[str],
    *,
    uid: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout_s: float = 300,
    stream: bool = False,
) -> Result:
    """Boot, run one command, and wait until the machine is gone.

    Args:
        argv: The command; looked up on the PATH of `env`.
        uid: Whom it runs as; also the gid.
        env: Its whole environment, besides PATH and HOME.
        cwd: Its directory, the caller's unless given.
        timeout_s: Boot included.
        stream: Copy its output to our stdout as it comes.
    """
    if why := lacks():
        raise RuntimeError(why)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root" if uid == 0 else "/tmp",
        "LANG": "C.UTF-8",
        **(env or {}),
    }
    with tempfile.TemporaryDirectory(prefix="out-", dir=BUILD) as out:
        # The ordinary user writes its results there too.
        os.chmod(out, 0o1777)
        for name, content in {
            "argv": _words(argv),
            "environ": _words([f"{k}={v}" for k, v in environment.items()]),
            "cwd": (cwd or os.getcwd()).encode(),
            "uid": str(uid).encode(),
        }.items():
            Path(out, name).write_bytes(content)
        console = Path(out, "console")
        machine = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
            "-m", str(MEMORY_MIB),
            "-kernel", str(KERNEL), "-initrd", str(_initramfs()),
            "-append", COMMAND_LINE,
            "-serial", f"file:{console}",
            "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out",
            "-fsdev", ("local,id=host,path=/,security_model=none,readonly=on,"
                       "multidevs=remap"),
            "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
            "-fsdev", f"local,id=out,path={out},security_model=none",
            "-device", "virtio-9p-pci,fsdev=out,mount_tag=out",
        ]  # fmt: skip
        began = time.monotonic()
        process = subprocess.Popen(
            machine,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_be_humble,
        )
        _running.append(process)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        chunks: list[bytes] = []
        first_s = 0.0
        try:
            assert process.stdout is not None
            while chunk := os.read(process.stdout.fileno(), 65536):
                first_s = first_s or time.monotonic() - began
                chunks.append(chunk)
                if stream:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            _running.remove(process)
            process.stdout.close()  # type: ignore[union-attr]
        total_s = time.monotonic() - began
        files = {
            str(path.relative_to(out)): path.read_bytes()
            for path in Path(out).rglob("*")
            if path.is_file()
        }
    status = files.pop("exit", b"")
    return Result(
        exit=int(status) if status else None,
        output=b"".join(chunks).decode(errors="replace"),
        console=files.pop("console", b"").decode(errors="replace"),
        timed_out=expired.is_set(),
        boot_s=first_s or total_s,
        total_s=total_s,
        files=files,
    )


def main() -> int:
    """Run what the command line says; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.qemu.run")
    parser.add_argument("--uid", type=int, default=0, help="run as this user")
    parser.add_argument("--timeout", type=float, default=300, help="in seconds")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--keep", metavar="DIR", help="copy what is left in /out")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    result = run(
        args.command,
        uid=args.uid,
        env=dict(entry.split("=", 1) for entry in args.env),
        timeout_s=args.timeout,
        stream=True,
    )
    if args.keep:
        for name, content in result.files.items():
            path = Path(args.keep, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if result.exit is None:
        sys.stderr.write(result.console[-4000:])
        why = f"no end within {args.timeout:g} s" if result.timed_out else "it broke"
        sys.stderr.write(f"\nthe second kernel: {why}\n")
        return 125
    return result.exit


if __name__ == "__main__":
    sys.exit(main())
