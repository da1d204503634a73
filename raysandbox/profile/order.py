"""Which of two profiles is stricter, key by key, and why.

A partial order: a profile is within another one if it exceeds it nowhere.
Node policy uses it for ceilings, and for who may have the laxer profiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from raysandbox.profile.schema import Profile
from raysandbox.profile.toml import written

__all__ = ["Excess", "excess", "explain_order"]

# What makes a value the stricter one of two:
#   on       true is stricter
#   less     the smaller number; None (unlimited) is the largest
#   more     the larger number
#   fewer    a subset
#   superset a superset
#   order    the earlier one of a list
#   equal    nothing: any difference may be laxer
#   text     has no strictness
_ORDER: Mapping[str, str | tuple[object, ...]] = {
    "name": "text",
    "description": "text",
    "why": "text",
    "boundary": ("task", "job", "worker"),
    "preload": "fewer",
    "devices": "fewer",
    "namespaces.user": "on",
    "namespaces.pid": "on",
    "namespaces.mount": "on",
    "namespaces.network": "on",
    "namespaces.ipc": "on",
    "namespaces.uts": "on",
    "namespaces.cgroup": "on",
    "namespaces.hostname": "text",
    "filesystem.read": "fewer",
    "filesystem.write": "fewer",
    "filesystem.hide": "superset",
    "filesystem.scratch_bytes": "less",
    "filesystem.scratch_inodes": "less",
    "landlock.enabled": "on",
    "landlock.min_abi": "more",
    "network.mode": ("none", "ray"),
    "syscalls.groups": "fewer",
    "syscalls.allow": "fewer",
    "syscalls.deny": "superset",
    "syscalls.action": ("kill", "errno", "log"),
    "syscalls.oci": "equal",
    "limits.cpu_cores": "less",
    "limits.cpu_weight": "less",
    "limits.memory_bytes": "less",
    "limits.swap_bytes": "less",
    "limits.pids": "less",
    "limits.open_files": "less",
    "limits.file_size_bytes": "less",
    "limits.wall_time_s": "less",
    "limits.cpu_time_s": "less",
    "limits.io_read_bytes_per_s": "less",
    "limits.io_write_bytes_per_s": "less",
    "limits.output_bytes": "less",
    "object_store.max_argument_bytes": "less",
    "object_store.max_result_bytes": "less",
    "object_store.max_put_bytes": "less",
    "object_store.max_put_objects": "less",
    "object_store.max_arguments_bytes": "less",
    "object_store.max_argument_objects": "less",
    "object_store.max_job_bytes": "less",
    "object_store.max_job_objects": "less",
    "object_store.max_job_arguments_bytes": "less",
    "object_store.max_job_argument_objects": "less",
    "results.mode": ("data", "pickle"),
    "environment.pass_": "fewer",
    "environment.set": "text",
    "ray_api.enabled": (False, True),
}
_IN_EVERY_SECTION = {"why": "text", "required": "on"}


@dataclass(frozen=True, slots=True)
class Excess:
    """One key in which a profile gives more than a ceiling allows.

    Attributes:
        key: As in TOML (``"limits.memory"``).
        value: What the profile has, written as in TOML.
        ceiling: What the ceiling has.
    """

    key: str
    value: str
    ceiling: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value} exceeds {self.ceiling}"


def excess(profile: Profile, ceiling: Profile) -> list[Excess]:
    """Return where ``profile`` is laxer than ``ceiling``; empty if nowhere."""
    return [*_excess(profile, ceiling, "")]


def explain_order(
    one: Profile, other: Profile
) -> tuple[Literal["same", "stricter", "laxer", "neither"], list[Excess]]:
    """Say which of two profiles is stricter, with what speaks against it.

    Returns:
        How ``one`` relates to ``other``, and the keys in which it is laxer.
    """
    laxer, stricter = excess(one, other), excess(other, one)
    if laxer and stricter:
        return "neither", laxer
    if laxer:
        return "laxer", laxer
    return ("stricter" if stricter else "same"), laxer


def _excess(one: BaseModel, other: BaseModel, table: str) -> list[Excess]:
    found: list[Excess] = []
    for name, field in type(one).model_fields.items():
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, BaseModel):
            found += _excess(mine, theirs, f"{name}.")
            continue
        rule = _IN_EVERY_SECTION.get(name) or _ORDER[f"{table}{name}"]
        if _is_laxer(rule, mine, theirs):
            key = f"{table}{field.alias or name}"
            found.append(Excess(key, written(name, mine), written(name, theirs)))
    return found


def _is_laxer(rule: str | tuple[object, ...], mine: Any, theirs: Any) -> bool:
    if isinstance(rule, tuple):
        return rule.index(mine) > rule.index(theirs)
    if rule == "on":
        return bool(theirs and not mine)
    if rule in ("less", "more"):
        if mine is None or theirs is None:
            return mine is None and theirs is not None
        return bool(mine > theirs if rule == "less" else mine < theirs)
    if rule == "fewer":
        return not set(mine) <= set(theirs)
    if rule == "superset":
        return not set(mine) >= set(theirs)
    if rule == "equal":
        return bool(mine != theirs)
    return False
