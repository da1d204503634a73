"""What jobs have in the object stores of this machine's nodes, against their quotas.

On a node that raysandbox started, the proxy in front of the store tells (it counts
what every worker makes); elsewhere the files in which workers count for themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from raysandbox.errors import SetupError
from raysandbox.node import store_proxy
from raysandbox.observe import nodes
from raysandbox.worker import quota

__all__ = ["Held", "Store", "look"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What somebody has in a store.

    Attributes:
        bytes: Of objects.
        objects: How many.
        most_bytes, most_objects: What the quota allows; None is no limit, or not
            known.
        refused: Objects that the quota refused so far.
        workers: How many workers serve the job now; 0 for a worker itself.
    """

    bytes: int
    objects: int
    most_bytes: int | None = None
    most_objects: int | None = None
    refused: int = 0
    workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """One node's store.

    Attributes:
        jobs: By Ray's id of the job, hexadecimal.
        workers: By pid; empty where there is no proxy.
        ended: Connections that the proxy ended for breaking a rule; None where
            there is no proxy, or it is not ours to ask.
    """

    jobs: dict[str, Held]
    workers: dict[int, Held]
    ended: int | None


def look(node: nodes.RayNode) -> Store:
    """Return what a node's jobs hold; empty where nothing tells."""
    directory = os.path.join(node.session_dir, "raysandbox")
    sockets = os.path.join(directory, "sockets")
    if os.path.exists(os.path.join(sockets, "control")):
        try:
            return _of_proxy(store_proxy.stats_of(sockets))
        except (SetupError, KeyError, TypeError, ValueError):
            return Store(jobs={}, workers={}, ended=None)
    return Store(
        jobs=_of_files(quota.directory(node.session_dir)), workers={}, ended=None
    )


def _of_proxy(stats: dict[str, Any]) -> Store:
    workers = {int(each["pid"]): _held(each) for each in stats["workers"]}
    jobs = {}
    for each in stats["jobs"]:
        held = _held(each)
        # A profile's limit is its workers': the least of them is what counts.
        of_workers = [w for w in stats["workers"] if w["job"] == each["job"]]
        jobs[str(each["job"])] = Held(
            bytes=held.bytes,
            objects=held.objects,
            most_bytes=_least(held.most_bytes, of_workers, "job_most_bytes"),
            most_objects=_least(held.most_objects, of_workers, "job_most_objects"),
            refused=held.refused,
            workers=int(each["workers"]),
        )
    return Store(jobs=jobs, workers=workers, ended=int(stats["ended"]))


def _held(each: dict[str, Any]) -> Held:
    return Held(
        bytes=int(each["bytes"]),
        objects=int(each["objects"]),
        most_bytes=_limit(each["most_bytes"]),
        most_objects=_limit(each["most_objects"]),
        refused=int(each["refused"]),
    )


def _limit(value: Any) -> int | None:
    return int(value) if int(value) >= 0 else None


def _least(limit: int | None, workers: list[dict[str, Any]], key: str) -> int | None:
    limits = [limit, *(_limit(each[key]) for each in workers)]
    return min((each for each in limits if each is not None), default=None)


def _of_files(directory: str) -> dict[str, Held]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return {}
    found = {}
    for name in names:
        try:
            usage = quota.usage_of(os.path.join(directory, name))
        except (OSError, SetupError):
            continue  # its job has ended, or it is not ours to read
        found[name] = Held(
            bytes=usage.stored_bytes,
            objects=usage.stored_objects,
            refused=usage.refused,
        )
    return found
