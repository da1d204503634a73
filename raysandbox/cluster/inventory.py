"""Changes of inventory.toml that keep what its owner wrote, comments included.

A change is checked before it takes the file's place: a file that can't be
loaded would admit nobody.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.exceptions import TOMLKitError

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import (
    ClusterDir,
    Inventory,
    read_trusted,
    validate,
    write_file,
)

__all__ = ["add", "quarantine", "remove"]


def add(
    cluster: ClusterDir,
    name: str,
    addresses: Sequence[str],
    resources: Mapping[str, float],
    labels: Mapping[str, str],
    *,
    head: bool = False,
) -> None:
    """Let a node join.

    Raises:
        ClusterError: It is there already, or not valid; nothing was changed.
    """

    def change(nodes: Any) -> None:
        if name in nodes:
            raise _error(cluster, f"has a node {name!r} already")
        entry = tomlkit.table()
        entry["addresses"] = list(addresses)
        if head:
            entry["head"] = True
        for key, values in (("resources", resources), ("labels", labels)):
            if values:
                inline = tomlkit.inline_table()
                inline.update(values)
                entry[key] = inline
        nodes[name] = entry

    _change(cluster, change)


def remove(cluster: ClusterDir, name: str) -> None:
    """Let a node join no more. ClusterError when there is none of that name."""

    def change(nodes: Any) -> None:
        _known(cluster, nodes, name)
        del nodes[name]

    _change(cluster, change)


def quarantine(cluster: ClusterDir, name: str, wanted: bool) -> bool:
    """Put a node into quarantine or take it out; returns whether that is new."""
    changed = []

    def change(nodes: Any) -> None:
        entry = _known(cluster, nodes, name)
        if bool(entry.get("quarantined", False)) != wanted:
            changed.append(True)
            if wanted:
                entry["quarantined"] = True
            else:
                del entry["quarantined"]

    _change(cluster, change)
    return bool(changed)


def _known(cluster: ClusterDir, nodes: Any, name: str) -> Any:
    if name not in nodes:
        known = ", ".join(nodes) or "none"
        raise _error(cluster, f"has no node {name!r}, only {known}")
    return nodes[name]


def _error(cluster: ClusterDir, what: str) -> ClusterError:
    return ClusterError(where=str(cluster.path / "inventory.toml"), what=what)


def _change(cluster: ClusterDir, change: Callable[[Any], None]) -> None:
    path = cluster.path / "inventory.toml"
    # The file itself is replaced, so it is the directory that is locked.
    lock = os.open(cluster.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster.inventory()
        before = read_trusted(path).decode() if os.path.lexists(path) else ""
        try:
            document = tomlkit.parse(before)
            change(document.setdefault("nodes", tomlkit.table(is_super_table=True)))
            text = tomlkit.dumps(document)
            validate(path, text, Inventory)
        except (TOMLKitError, ValidationError) as error:
            raise _error(cluster, f"can't be changed: {error}") from None
        write_file(path, text, 0o644)
    finally:
        os.close(lock)
