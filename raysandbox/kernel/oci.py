"""OCI seccomp JSON, as container engines ship it, reduced to what a jail can use.

Only an allow-list is accepted, and nothing in it is skipped over: a key, an
action or a combination that would come out laxer here than it was meant is an
error. See the runtime specification, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["Condition", "Rule", "read"]

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
_ErrnoNumber = Annotated[int, Field(ge=1, le=4095)]


@dataclass(frozen=True, slots=True)
class Condition:
    """What one argument must be; ``op`` is libseccomp's name without its prefix."""

    index: int
    op: str
    value: int
    second: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One call under conditions that must all hold.

    Attributes:
        call: Name of the system call.
        errno: What it fails with; None if it is allowed.
    """

    call: str
    conditions: tuple[Condition, ...]
    errno: int | None


# --- the file's form ------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Argument(_Strict):
    index: Annotated[int, Field(ge=0, le=5)]
    value: _U64
    valueTwo: _U64 = 0  # noqa: N815 - the format's name, as those below
    op: Literal[
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ]


class _When(_Strict):
    """When an entry counts; an extension of the container engines."""

    caps: list[str] = []
    arches: list[str] = []
    minKernel: Annotated[  # noqa: N815
        str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?$")
    ] = ""


class _Entry(_Strict):
    names: list[str] = []
    name: str = ""
    action: Literal[
        "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS"
    ]
    args: list[_Argument] | None = None
    errnoRet: _ErrnoNumber | None = None  # noqa: N815
    errno: str | None = None
    comment: str | None = None
    includes: _When | None = None
    excludes: _When | None = None


class _Policy(_Strict):
    defaultAction: Literal[  # noqa: N815
        "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS"
    ]
    # What a denied call gets is syscalls.action's; which ABI, the launcher's.
    defaultErrnoRet: int | None = None  # noqa: N815
    defaultErrno: str | None = None  # noqa: N815
    architectures: list[str] | None = None
    archMap: list[dict[str, Any]] | None = None  # noqa: N815
    syscalls: list[_Entry] | None = None


# --- reading --------------------------------------------------------------------


def read(text: str) -> list[Rule]:
    """Return the rules of a policy that apply to a jail.

    Raises:
        ValueError: It says something that is not understood, allows what it
            does not name, or denies part of what it allows.
    """
    try:
        policy = _Policy.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_explain(error)) from error
    found: list[tuple[int, Rule]] = []
    for index, entry in enumerate(policy.syscalls or ()):
        names = entry.names or ([entry.name] if entry.name else [])
        if not names:
            raise ValueError(f"syscalls[{index}] names no system call")
        if _applies(entry):
            for name in names:
                found += ((index, rule) for rule in _rules(name, entry))
    _refuse_overlaps(found)
    return [rule for _, rule in found]


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"is not JSON: {first['ctx']['error']}"
    if not first["loc"]:
        return "must be a JSON object"
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["loc"] == ("defaultAction",):
        return (
            "defaultAction must be SCMP_ACT_ERRNO or SCMP_ACT_KILL_PROCESS: what is "
            "not named must be denied"
        )
    return f"{place.lstrip('.')}: {first['msg']}"


def _applies(entry: _Entry) -> bool:
    """Whether an entry counts for a process without capabilities here."""
    includes, excludes = entry.includes or _When(), entry.excludes or _When()
    machine = _MACHINES.get(platform.machine(), "")
    if includes.caps or machine in excludes.arches:
        return False
    if includes.arches and machine not in includes.arches:
        return False
    if excludes.minKernel and _kernel() >= _version(excludes.minKernel):
        return False
    return not includes.minKernel or _kernel() >= _version(includes.minKernel)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _kernel() -> tuple[int, ...]:
    parts = os.uname().release.split("-")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())


def _rules(call: str, entry: _Entry) -> Iterator[Rule]:
    number = None if entry.action == "SCMP_ACT_ALLOW" else _errno_of(entry)
    made = tuple(
        Condition(a.index, a.op.removeprefix("SCMP_CMP_"), a.value, a.valueTwo)
        for a in entry.args or ()
    )
    # As container engines do: an argument that is named twice means "or".
    if len({each.index for each in made}) < len(made):
        yield from (Rule(call, (each,), number) for each in made)
    else:
        yield Rule(call, made, number)


def _errno_of(entry: _Entry) -> int:
    if entry.errnoRet is not None:
        return entry.errnoRet
    number = getattr(errno, entry.errno or "EPERM", None)
    if not isinstance(number, int):
        raise ValueError(f"errno {entry.errno!r} is unknown")
    return number


def _refuse_overlaps(found: Sequence[tuple[int, Rule]]) -> None:
    """Refuse a denial of what is allowed too: which of them wins is not written."""
    allowed: dict[str, list[tuple[int, Rule]]] = {}
    for place, rule in found:
        if rule.errno is None:
            allowed.setdefault(rule.call, []).append((place, rule))
    for place, rule in found:
        for other, same in allowed.get(rule.call, ()) if rule.errno else ():
            if not _disjoint(rule.conditions, same.conditions):
                raise ValueError(
                    f"syscalls[{place}] denies {rule.call}, which syscalls[{other}] "
                    "allows: which of them wins is not written"
                )


def _disjoint(one: Sequence[Condition], other: Sequence[Condition]) -> bool:
    """Whether no call can meet both; False where that is not plain to see."""
    for a in one:
        for b in other:
            if a.index != b.index:
                continue
            ops = {a.op, b.op}
            if ops == {"EQ", "NE"} and a.value == b.value:
                return True
            if ops == {"EQ"} and a.value != b.value:
                return True
    return False
