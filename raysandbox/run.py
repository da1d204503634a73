"""Run one command under a profile: what ``raysandbox run`` and the tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raysandbox import launch, plan
from raysandbox.kernel import cgroup
from raysandbox.probe import probe
from raysandbox.profile import Limits, Profile

__all__ = ["Result", "cgroup_limits", "limit_protections", "run"]

_CHECK_S = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    Attributes:
        exit_code: Its own, 128+N for signal N, 124 for the time limits.
        reason: Why it was ended, with the profile's key; "" if it ended itself.
        usage: What it used, as far as the host can tell.
        protections: What was enforced.
    """

    exit_code: int
    reason: str
    usage: cgroup.Usage
    protections: tuple[plan.Protection, ...]


def cgroup_limits(profile: Profile) -> cgroup.CgroupLimits:
    """Return the part of a profile's limits that control groups enforce."""
    limits = profile.limits
    return cgroup.CgroupLimits(
        memory_bytes=limits.memory_bytes,
        swap_bytes=limits.swap_bytes,
        cpu_cores=limits.cpu_cores,
        cpu_weight=limits.cpu_weight,
        pids=limits.pids,
        io_read_bytes_per_s=limits.io_read_bytes_per_s,
        io_write_bytes_per_s=limits.io_write_bytes_per_s,
    )


def limit_protections(
    report: Mapping[str, cgroup.Status],
) -> tuple[plan.Protection, ...]:
    """Return what became of each limit, in the profile's words."""
    fields, found = Limits.model_fields, []
    for name, status in report.items():
        state, reason = plan.State(status.state.lower()), status.reason
        key = fields[name].alias or name if name in fields else name
        if name == "oom_group" and state is plan.State.OFF:
            # We see to that ourselves, a moment later.
            state = plan.State.DEGRADED
            reason = "cgroup version 1 kills one process; raysandbox ends the others"
        found.append(plan.Protection(f"limits.{key}", state, reason))
    return tuple(found)


def run(
    profile: Profile,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    chdir: str | None = None,
    working_dirs: Sequence[str] = (),
    root: str = "",
    system: Sequence[str] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Result:
    """Run ``command`` to its end.

    Args:
        profile: What to enforce.
        command: Program and arguments, as seen inside.
        environment: Variables that it gets besides those that the profile passes.
        chdir: Where it starts; None for the scratch.
        working_dirs: What ``@working_dir`` stands for.
        root: See `plan.Context`.
        system: See `plan.Context`.
        stdin: Descriptor, as for subprocess; None to inherit.
        stdout: As stdin.
        stderr: As stdin.

    Raises:
        UnsupportedError: The host lacks what the profile requires.
        ProfileError: The profile names what is not there.
        SetupError: A step failed. In each case nothing was run.
    """
    with cgroup.discover() as groups:
        limits = cgroup_limits(profile)
        if profile.limits.required:
            groups.require(limits, profile=profile.name)
        group = groups.create("run", limits, required=profile.limits.required)
        try:
            return _run(
                profile,
                command,
                group,
                groups,
                plan.Context(
                    ids=plan.IdRange(0, 0),  # replaced by the lease's
                    environment=dict(os.environ),
                    extra_environment=environment or {},
                    chdir=chdir,
                    working_dirs=working_dirs,
                    root=root,
                    system=system,
                    wall_time=True,
                    cgroup_dirs=group.paths,
                    cgroup_clean=groups.owned,
                ),
                (stdin, stdout, stderr),
            )
        finally:
            group.kill()
            group.remove()


def _run(
    profile: Profile,
    command: Sequence[str],
    group: cgroup.Cgroup,
    groups: cgroup.Cgroups,
    context: plan.Context,
    streams: tuple[int | None, int | None, int | None],
) -> Result:
    import dataclasses

    lease = launch.lease_ids()
    try:
        context = dataclasses.replace(context, ids=lease.ids)
        compiled = plan.compile(profile, probe(), context)
        stdin, stdout, stderr = streams
        launched = launch.start(
            compiled,
            command,
            lease=lease,
            linger=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
    finally:
        lease.close()
    reason = ""
    while True:
        try:
            if launched.ended(_CHECK_S):
                break
            reason = reason or _over(profile, group.usage())
            if reason:
                launched.kill()
        except KeyboardInterrupt:
            launched.kill(signal.SIGINT)
    usage = group.usage()
    launched.release()
    outcome = launched.wait()
    exit_code = outcome.exit_code
    reason = reason or _over(profile, usage)
    if reason.startswith("limits.cpu_time"):
        exit_code = 124
    elif reason.startswith("limits.memory"):
        # As the kernel's: whether it or the monitor was first is chance.
        exit_code = 128 + signal.SIGKILL
    if outcome.timed_out:
        reason = f"limits.wall_time allows {profile.limits.wall_time_s:g} s"
    elif not reason and outcome.signal == signal.SIGSYS:
        reason = "the system-call filter: a foreign ABI, or syscalls.action = kill"
    walls = (*limit_protections(group.report), *compiled.protections)
    return Result(exit_code, reason, usage, walls)


def _over(profile: Profile, usage: cgroup.Usage) -> str:
    """Return the limit that the whole group is over, or ``""``."""
    limits = profile.limits
    if usage.oom_kills:
        return f"limits.memory allows {limits.memory_bytes} bytes"
    if limits.cpu_time_s is not None and (usage.cpu_time_s or 0) > limits.cpu_time_s:
        return f"limits.cpu_time allows {limits.cpu_time_s:g} s"
    return ""
