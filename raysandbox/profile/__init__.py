"""Profiles: what a task may do, as TOML files with one schema."""

from __future__ import annotations

from raysandbox.profile.load import (
    check,
    find,
    load,
    load_file,
    names,
    search_path,
    shipped_dir,
    strictest,
)
from raysandbox.profile.order import Excess, excess, explain_order
from raysandbox.profile.schema import (
    Environment,
    Filesystem,
    Landlock,
    Limits,
    Namespaces,
    Network,
    ObjectStore,
    OciPolicy,
    Profile,
    RayApi,
    Results,
    Syscalls,
    is_name,
    json_schema,
)
from raysandbox.profile.toml import dump

__all__ = [
    "Environment",
    "Excess",
    "Filesystem",
    "Landlock",
    "Limits",
    "Namespaces",
    "Network",
    "ObjectStore",
    "OciPolicy",
    "Profile",
    "RayApi",
    "Results",
    "Syscalls",
    "check",
    "dump",
    "excess",
    "explain_order",
    "find",
    "is_name",
    "json_schema",
    "load",
    "load_file",
    "names",
    "search_path",
    "shipped_dir",
    "strictest",
]
