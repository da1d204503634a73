"""Every error that raysandbox raises, in one small tree.

::

    RaysandboxError
    ├── ProfileError         the caller's mistake: a profile, a tag, a policy
    ├── UnsupportedError     the host's lack: a required wall that it can't give
    ├── SetupError           a set-up step failed; the task never started
    ├── InternalError        our own bug
    └── TaskError            what became of a task; its owner sees it in ray.get
        ├── TaskOutOfMemory      the jail went over limits.memory
        ├── TaskTimedOut         wall or CPU time ran out
        ├── TaskDenied           killed by the system-call filter
        ├── TaskQuotaExceeded    an argument, result, output or put quota
        ├── TaskKilled           killed by a signal that is none of the above
        ├── TaskUnsupported      asked for what its boundary does not have
        ├── TaskRefused          the node's policy does not let it run
        └── JailProtocolError    the jail's reply broke the protocol

Ray pickles errors on their way to the driver, so every class here keeps its
fields as keyword arguments and round-trips through cloudpickle.
"""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = [
    "InternalError",
    "JailProtocolError",
    "ProfileError",
    "RaysandboxError",
    "SetupError",
    "TaskDenied",
    "TaskError",
    "TaskKilled",
    "TaskOutOfMemory",
    "TaskQuotaExceeded",
    "TaskRefused",
    "TaskTimedOut",
    "TaskUnsupported",
    "UnsupportedError",
]


_MOST_SHOWN = 200


def _rebuild(cls: type[RaysandboxError], fields: dict[str, Any]) -> RaysandboxError:
    """Make an error again from its fields (the other half of ``__reduce__``)."""
    return cls(**fields)


def _written(value: object) -> str:
    """Return a value as a file has it: on one line, without control characters."""
    text = _plain(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _plain(text: str) -> str:
    """Escape what a terminal or a log would not show as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class RaysandboxError(Exception):
    """Base of all errors of this package.

    Subclasses take keyword arguments only and pass them on as ``fields``,
    from which the error is rebuilt after pickling.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self._fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._fields)


class ProfileError(RaysandboxError):
    """A profile, tag or policy that can't be used as written.

    Attributes:
        source: The file, or what stands in for one (``"<tag>"``).
        where: Dotted table and key (``"limits.memory"``), or ``""``.
        value: The offending value as written, or None.
        reason: The rule that it breaks.
    """

    def __init__(
        self, *, source: str, reason: str, where: str = "", value: object = None
    ) -> None:
        place = _plain(f"{source}: {where}" if where else source)
        shown = "" if value is None else f" = {_written(value)}"
        super().__init__(
            f"{place}{shown}: {reason}",
            source=source,
            reason=reason,
            where=where,
            value=value,
        )
        self.source, self.where, self.value, self.reason = source, where, value, reason


class UnsupportedError(RaysandboxError):
    """The host can't give a protection that the profile requires.

    Attributes:
        feature: The wall that is missing (``"cgroup memory"``).
        need: What the profile asks for.
        have: What the host offers.
        remedy: What the operator can do about it.
        profile: The profile that requires it, or ``""``.
    """

    def __init__(
        self, *, feature: str, need: str, have: str, remedy: str, profile: str = ""
    ) -> None:
        who = f"profile {profile!r} requires {feature}" if profile else feature
        super().__init__(
            f"{who}: need {need}, have {have}. Nothing was started. To fix: {remedy}",
            feature=feature,
            need=need,
            have=have,
            remedy=remedy,
            profile=profile,
        )
        self.feature, self.need, self.have = feature, need, have
        self.remedy, self.profile = remedy, profile


class SetupError(RaysandboxError):
    """A step of building the jail failed; no line of the task was run.

    Attributes:
        step: The step's name as the launcher reports it (``"mount_proc"``).
        errno: The kernel's error number, 0 if there is none.
        detail: What was being done, with which value.
    """

    def __init__(self, *, step: str, errno: int = 0, detail: str = "") -> None:
        why = f": {os.strerror(errno)} (errno {errno})" if errno else ""
        more = f" [{detail}]" if detail else ""
        super().__init__(
            f"jail set-up failed at step {step!r}{why}{more}; the task never started",
            step=step,
            errno=errno,
            detail=detail,
        )
        self.step, self.errno, self.detail = step, errno, detail


class InternalError(RaysandboxError):
    """A state that raysandbox itself should have made impossible."""

    def __init__(self, *, what: str) -> None:
        super().__init__(f"internal error in raysandbox: {what}", what=what)
        self.what = what


class TaskError(RaysandboxError):
    """What became of a task, as its owner sees it.

    Attributes:
        task: The task's or method's name.
        profile: The profile it ran under.
        limit: Profile key of the limit or rule (``"limits.memory"``).
        allowed: What the rule allows, in words with a unit.
        seen: What was observed, in words with a unit.
        remedy: What the owner or the operator can change.
        hint: Which denied calls or paths were seen on the way, or ``""``.
    """

    what = "failed"

    def __init__(
        self,
        *,
        task: str,
        profile: str,
        limit: str = "",
        allowed: str = "",
        seen: str = "",
        remedy: str = "",
        hint: str = "",
    ) -> None:
        parts = [f"task {task!r} under profile {profile!r} {self.what}"]
        if limit:
            parts.append(f"{limit} allows {allowed}" if allowed else limit)
        if seen:
            parts.append(f"seen: {seen}")
        if hint:
            parts.append(hint)
        if remedy:
            parts.append(f"to fix: {remedy}")
        super().__init__(
            "; ".join(parts),
            task=task,
            profile=profile,
            limit=limit,
            allowed=allowed,
            seen=seen,
            remedy=remedy,
            hint=hint,
        )
        self.task, self.profile, self.limit = task, profile, limit
        self.allowed, self.seen, self.remedy, self.hint = allowed, seen, remedy, hint


class TaskOutOfMemory(TaskError):  # noqa: N818 - the name is the user's word for it
    """The jail's processes together went over ``limits.memory``."""

    what = "ran out of memory and was killed"


class TaskTimedOut(TaskError):  # noqa: N818 - as above
    """``limits.wall_time`` or ``limits.cpu_time`` ran out."""

    what = "ran out of time and was killed"


class TaskDenied(TaskError):  # noqa: N818 - as above
    """The system-call filter killed the task."""

    what = "was killed by the system-call filter"


class TaskQuotaExceeded(TaskError):  # noqa: N818 - as above
    """An argument, a result, a put or the output went over its quota."""

    what = "went over a quota"


class TaskKilled(TaskError):  # noqa: N818 - as above
    """The jail ended without an answer, for no reason that has its own class."""

    what = "was killed before it answered"


class TaskUnsupported(TaskError):  # noqa: N818 - as above
    """The task asked for something that its boundary does not have."""

    what = "asked for something that a jail does not have"


class TaskRefused(TaskError):  # noqa: N818 - as above
    """The node's policy does not let this job have what it asked for."""

    what = "was refused by the node's policy; nothing of it was run"


class JailProtocolError(TaskError):
    """The jail's reply broke the protocol; the jail was ended."""

    what = "sent a reply that breaks the jail protocol"
