"""Find the node's policy, read it, and refuse what can't be used as written.

The place: ``--policy``, else ``RAYSANDBOX_POLICY``, else
``/etc/raysandbox/policy.toml``. Who could have written the file matters as
much as for a profile, and the same check is made (`raysandbox.profile.load`).

`load_node` reads the profiles that the policy names with it and lowers them to
its ceilings: what comes out is all that a worker needs to decide, and travels
to it as one piece (`Node.seal`), so that no worker looks for profiles where a
client could have put some.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from raysandbox import profile as profiles
from raysandbox.errors import ProfileError
from raysandbox.policy.schema import STRICTEST, TAG_PREFIX, Ceilings, Policy
from raysandbox.profile import OciPolicy, Profile
from raysandbox.profile.load import as_tuples, explain, joined, parse_trusted
from raysandbox.profile.order import Excess
from raysandbox.profile.toml import dump, written

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ENV",
    "SITE_FILE",
    "Node",
    "check",
    "find",
    "load",
    "load_node",
    "lower",
    "sealed_variables",
    "unseal",
]

ENV = "RAYSANDBOX_POLICY"
SITE_FILE = "/etc/raysandbox/policy.toml"

_SEAL_VERSION = 1
_BOUNDARIES = ("task", "job", "worker")

# Ceiling to the profile's table and field that it bounds.
_BOUNDED = {
    "cpu_cores": ("limits", "cpu_cores"),
    "memory_bytes": ("limits", "memory_bytes"),
    "pids": ("limits", "pids"),
    "wall_time_s": ("limits", "wall_time_s"),
    "cpu_time_s": ("limits", "cpu_time_s"),
    "output_bytes": ("limits", "output_bytes"),
    "scratch_bytes": ("filesystem", "scratch_bytes"),
    "max_argument_bytes": ("object_store", "max_argument_bytes"),
    "max_result_bytes": ("object_store", "max_result_bytes"),
    "max_put_bytes": ("object_store", "max_put_bytes"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A policy with the profiles it names, ready to decide.

    Attributes:
        policy: What the operator wrote.
        profiles: Every profile that it names, lowered to its ceilings.
        lowered: For each profile that asked for more, in which keys.
    """

    policy: Policy
    profiles: Mapping[str, Profile]
    lowered: Mapping[str, list[Excess]]

    def resources(self) -> dict[str, float]:
        """Return the tags that this node offers, for ``--resources``."""
        return {f"{TAG_PREFIX}{name}": n for name, n in self.policy.offer.items()}

    def seal(self, variables: Mapping[str, str] | None = None) -> bytes:
        """Return all of it as one piece, for `unseal` in a worker.

        Nothing in it is secret; that nobody can change it on the way is for
        whoever passes it on.

        Args:
            variables: Our own variables (``RAYSANDBOX_*``) for every worker;
                whatever its environment says, those are what it uses.
        """
        named = {
            name: {
                "toml": dump(each),
                "oci": each.syscalls.oci.text if each.syscalls.oci else None,
                "source": each.source,
            }
            for name, each in self.profiles.items()
        }
        sealed = {
            "version": _SEAL_VERSION,
            "policy": dump(self.policy),
            "source": self.policy.source,
            "profiles": named,
            "variables": dict(variables or {}),
        }
        return json.dumps(sealed).encode()


def find(option: str = "", environ: Mapping[str, str] | None = None) -> Path:
    """Return where the policy is: the option, the variable, the site's file.

    Raises:
        ProfileError: A relative path in the variable.
    """
    if option:
        return Path(option)
    named = (os.environ if environ is None else environ).get(ENV, "")
    if named and not named.startswith("/"):
        raise ProfileError(source=ENV, value=named, reason="must be an absolute path")
    return Path(named or SITE_FILE)


def load(path: str | os.PathLike[str]) -> Policy:
    """Load a policy from a file.

    Raises:
        ProfileError: It is missing, could have been written by others, or
            can't be used as written; the message has a line for each problem,
            and what to do where nothing was found.
    """
    file = Path(path)
    if not os.path.lexists(file):
        raise ProfileError(
            source=str(file),
            reason="there is no policy, and no node starts without one: "
            f"`raysandbox policy init --output {file}` writes one to start from, "
            f"or name another with --policy or {ENV}",
        )
    return _policy(parse_trusted(file), str(file))


def _policy(tables: dict[str, Any], source: str) -> Policy:
    try:
        policy = Policy.model_validate(tables)
    except ValidationError as error:
        problems = [
            explain(each, {}, Path(source), model=Policy) for each in error.errors()
        ]
        raise joined(problems) from None
    policy._source = source
    return policy


def load_node(path: str | os.PathLike[str]) -> Node:
    """Load a policy and every profile that it names; as `load` otherwise."""
    return resolve(load(path))


def resolve(policy: Policy) -> Node:
    """Load every profile that a policy names.

    Raises:
        ProfileError: One of them can't be used, or not under this policy.
    """
    found: dict[str, Profile] = {}
    problems: list[ProfileError] = []
    for name in policy.profiles():
        try:
            # No file of the search path replaces the strictest.
            each = profiles.strictest() if name == STRICTEST else profiles.load(name)
        except ProfileError as error:
            problems.append(
                ProfileError(
                    source=policy.source,
                    where=_where(policy, name),
                    value=name,
                    reason=f"can't be used: {error}",
                )
            )
            continue
        least = policy.ceilings.boundary
        if _BOUNDARIES.index(each.boundary) > _BOUNDARIES.index(least):
            problems.append(
                ProfileError(
                    source=policy.source,
                    where=_where(policy, name),
                    value=name,
                    reason=f'has boundary = "{each.boundary}", and '
                    f'ceilings.boundary allows no weaker one than "{least}"',
                )
            )
        problems += _unkeepable(policy, each)
        if name == policy.jobs.entrypoint and each.boundary != "worker":
            problems.append(
                ProfileError(
                    source=policy.source,
                    where="jobs.entrypoint",
                    value=name,
                    reason=f'has boundary = "{each.boundary}"; a driver needs Ray in '
                    'its own process, so its profile must have boundary = "worker"',
                )
            )
        found[name] = each
    if problems:
        raise joined(problems)
    return _node(policy, found)


def _unkeepable(policy: Policy, profile: Profile) -> list[ProfileError]:
    """Name the ceilings that this profile's boundary can't keep.

    Ray's own process is not ended when a task's time runs out.
    """
    if profile.boundary != "worker":
        return []
    return [
        ProfileError(
            source=policy.source,
            where=_where(policy, profile.name),
            value=profile.name,
            reason=f'has boundary = "worker", which can\'t keep ceilings.{key}',
        )
        for key, value in (
            ("wall_time", policy.ceilings.wall_time_s),
            ("cpu_time", policy.ceilings.cpu_time_s),
            ("output", policy.ceilings.output_bytes),
        )
        if value is not None
    ]


def _node(policy: Policy, found: Mapping[str, Profile]) -> Node:
    lowered: dict[str, list[Excess]] = {}
    ready: dict[str, Profile] = {}
    for name, each in found.items():
        ready[name], excesses = lower(each, policy.ceilings)
        if excesses:
            lowered[name] = excesses
    return Node(policy, ready, lowered)


def _where(policy: Policy, name: str) -> str:
    """Return the first key that names a profile."""
    if name in policy.offer:
        return "offer"
    for index, rule in enumerate(policy.rules):
        if name in (*rule.profiles, rule.untagged):
            return f"rules[{index}]"
    return "untagged"


def check(path: str | os.PathLike[str]) -> tuple[Node | None, list[str]]:
    """Return the node's policy, or None and everything that is wrong with it."""
    try:
        return load_node(path), []
    except ProfileError as error:
        return None, str(error).splitlines()


# --- ceilings -----------------------------------------------------------------------


def lower(profile: Profile, ceilings: Ceilings) -> tuple[Profile, list[Excess]]:
    """Return a profile that exceeds no ceiling, and where it had to be lowered."""
    changes: dict[str, dict[str, Any]] = {}
    excesses: list[Excess] = []

    def bound(table: str, field: str, most: Any) -> None:
        section: BaseModel = getattr(profile, table)
        value = changes.get(table, {}).get(field, getattr(section, field))
        if value is not None and value <= most:
            return
        changes.setdefault(table, {})[field] = most
        alias = type(section).model_fields[field].alias or field
        key = f"{table}.{alias}"
        excesses.append(Excess(key, written(field, value), written(field, most)))

    for ceiling, (table, field) in _BOUNDED.items():
        most = getattr(ceilings, ceiling)
        if most is not None:
            bound(table, field, most)
    # Scratch counts in memory: a profile has no more of it than that.
    memory = changes.get("limits", {}).get("memory_bytes")
    if memory is not None:
        bound("filesystem", "scratch_bytes", memory)
    if not changes:
        return profile, []
    sections = {
        table: getattr(profile, table).model_copy(update=update)
        for table, update in changes.items()
    }
    made = profile.model_copy(update=sections)
    made._source = profile.source
    return made, excesses


# --- to the workers -------------------------------------------------------------------


def unseal(data: bytes) -> Node:
    """Return what `Node.seal` was called on.

    Raises:
        ProfileError: It is no sealed policy, or another version's.
    """
    try:
        sealed = json.loads(data)
        if sealed["version"] != _SEAL_VERSION:
            raise ValueError(f"version {sealed['version']}")
        policy = _policy(as_tuples(tomllib.loads(sealed["policy"])), sealed["source"])
        found = {
            name: _sealed_profile(name, each)
            for name, each in sealed["profiles"].items()
        }
        if missing := set(policy.profiles()) - found.keys():
            raise ValueError(f"without profiles {sorted(missing)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProfileError(
            source="<sealed policy>",
            reason=f"is none of this raysandbox's ({error}); restart the node",
        ) from error
    return _node(policy, found)


def sealed_variables(data: bytes) -> dict[str, str]:
    """Return the variables that were sealed with a policy that `unseal` took."""
    return {str(k): str(v) for k, v in json.loads(data)["variables"].items()}


def _sealed_profile(name: str, sealed: dict[str, Any]) -> Profile:
    def read_oci(path: str) -> OciPolicy:
        return OciPolicy(path, str(sealed["oci"]))

    tables = as_tuples(tomllib.loads(sealed["toml"]))
    each = Profile.model_validate(tables, context={"read_oci": read_oci})
    if each.name != name:
        raise ValueError(f"profile {each.name!r} in the place of {name!r}")
    each._source = str(sealed["source"])
    return each
