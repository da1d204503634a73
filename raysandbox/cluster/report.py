"""What a running member says about itself: for `cluster status` and `doctor`."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

from raysandbox.cluster import audit, guard, pki, running, surfaces
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.registry import NODES, Registry
from raysandbox.cluster.settings import ClusterDir, read_secret
from raysandbox.cluster.start import _running

__all__ = ["cluster_checks", "member_report"]


def member_report(cluster: ClusterDir) -> dict[str, Any]:
    """Say what runs here and what is wrong with it.

    Returns:
        ``cluster``, ``member``, ``running`` (all of it), ``processes`` (kind to
        pid, 0 for one that has ended), ``nodes`` (on a head: those that the GCS
        holds alive), ``certificates``, ``problems``, ``warnings``.

    Raises:
        ClusterError: The directory itself can't be used.
    """
    settings, member = cluster.settings(), cluster.member()
    found: dict[str, Any] = {
        "cluster": settings.name,
        "member": f"{member.role}/{member.name}",
        "running": False,
        "processes": {},
        "nodes": [],
        "certificates": certificates(cluster),
        "problems": [],
        "warnings": [],
    }
    for row in found["certificates"]:
        for kind in ("problem", "warning"):
            if row[kind]:
                found[f"{kind}s"].append(row[kind])
    if member.role not in NODES:
        found["running"] = True
        return found
    supervisor = _running(cluster)
    alive = running.alive(cluster)
    found["processes"]["helpers"] = supervisor
    for kind, pid in running.known(cluster):
        found["processes"][kind] = pid if (kind, pid) in alive else 0
    found["running"] = bool(supervisor and alive)
    if not found["running"]:
        return found
    found["problems"] += [
        f"{kind} has ended"
        for kind, pid in found["processes"].items()
        if not pid and kind != "reaper"
    ]
    found["problems"] += [
        f"open: {text}" for text in surfaces.open_in_clear([pid for _, pid in alive])
    ]
    if member.role == "head":
        try:
            found["nodes"] = _nodes(cluster)
        except ClusterError as error:
            found["problems"].append(str(error))
    return found


def certificates(cluster: ClusterDir) -> list[dict[str, Any]]:
    """Return each of this member's certificates: component, end, what is wrong."""
    member = cluster.member()
    rows = []
    for component in pki.COMPONENTS[member.role]:
        rows.append(_certificate(cluster, component))
    if member.role in NODES:
        rows.append(_certificate(cluster, "workers"))
    return rows


def _certificate(cluster: ClusterDir, component: str) -> dict[str, Any]:
    workers = component == "workers"
    path = cluster.workers / "issuer.pem" if workers else cluster.cert(component)
    row: dict[str, Any] = {
        "component": component, "end": None, "problem": "", "warning": ""
    }  # fmt: skip
    try:
        row["end"] = pki.load_chain(path)[0].not_valid_after_utc.isoformat()
        warnings = (
            pki.check_workers(cluster)
            if workers
            else pki.check_identity(
                cluster, component, addresses=cluster.member().addresses
            )
        )
        row["warning"] = "; ".join(warnings)
    except ClusterError as error:
        row["problem"] = str(error)
    return row


def _nodes(cluster: ClusterDir) -> list[dict[str, str]]:
    """Return the nodes that the GCS holds alive, asked with the guard's identity."""
    from raysandbox.cluster.watch import Watcher

    async def ask() -> list[dict[str, str]]:
        watcher = Watcher(cluster)
        return [
            {"node_id": node_id, "address": address, "name": name}
            for node_id, (address, name) in (await watcher.alive_with_names()).items()
        ]

    try:
        return asyncio.run(ask())
    except Exception as error:  # noqa: BLE001 - gRPC's errors are of many kinds
        raise ClusterError(
            where="GCS", what=f"did not answer: {type(error).__name__}"
        ) from None


def cluster_checks(cluster: ClusterDir) -> list[dict[str, str]]:
    """Audit a member: each check with ``check``, ``state`` and ``reason``.

    States: ``ok``, ``warning``, ``problem``. A check that could not be done is a
    problem.
    """
    settings, member = cluster.settings(), cluster.member()
    report = member_report(cluster)
    rows: list[dict[str, str]] = []

    def add(check: str, state: str, reason: str = "") -> None:
        rows.append({"check": check, "state": state, "reason": reason})

    for row in report["certificates"]:
        state = "problem" if row["problem"] else "warning" if row["warning"] else "ok"
        reason = row["problem"] or row["warning"] or f"until {str(row['end'])[:10]}"
        add(f"certificate {row['component']}", state, reason)
    _try(add, "token", lambda: read_secret(cluster.token) and "")
    if member.role in NODES:
        ended = [k for k, pid in report["processes"].items() if not pid]
        if not report["running"]:
            add("processes", "problem", "not running")
        else:
            add(
                "processes", "problem" if set(ended) - {"reaper"} else "ok",
                ", ".join(ended),
            )  # fmt: skip
        opened = [p for p in report["problems"] if p.startswith("open: ")]
        add(
            "nothing open in clear",
            "problem" if opened else "ok" if report["running"] else "problem",
            "; ".join(opened) or ("" if report["running"] else "not running"),
        )
    if member.role != "head":
        return rows
    _try(add, "guard's program", lambda: str(guard.executable()))
    apart = cluster.issuer_cert("observer") != cluster.ca_cert
    add(
        "raylets take no observers", "ok" if apart else "warning",
        "" if apart else "an external CA signs all roles: raylets and workers take the "
        "certificates of operators, observers and clients too",
    )  # fmt: skip
    _try(add, "inventory", lambda: f"{len(cluster.inventory().nodes)} nodes")
    _try(add, "revocation lists", lambda: _crls(cluster))
    add(
        "admission", "ok" if settings.admission == "enforce" else "problem",
        "" if settings.admission == "enforce" else "observe: unlisted nodes join",
    )  # fmt: skip
    policy = settings.audit.when_disk_is_full
    add(
        "audit when the disk is full", "ok" if policy == "closed" else "warning",
        policy,
    )  # fmt: skip
    _try(
        add,
        "audit log unbroken",
        lambda: (
            f"{audit.verify(cluster.audit, anchors=settings.audit.anchor_file).lines}"
            " lines"
        ),
    )
    outside = bool(settings.audit.anchor_file)
    add(
        "audit anchored elsewhere", "ok" if outside else "warning",
        "" if outside else "a log written anew would not show: set audit.anchor_file",
    )  # fmt: skip
    told = bool(settings.audit.webhook or settings.audit.metrics_port)
    add(
        "alerts reach somebody", "ok" if told else "warning",
        "" if told else "set audit.webhook or audit.metrics_port",
    )  # fmt: skip
    unlisted = [
        node["address"]
        for node in report["nodes"]
        if node["name"] not in cluster.inventory().nodes
    ]
    add(
        "nodes are those of the inventory",
        "problem" if unlisted or not report["nodes"] else "ok",
        ", ".join(unlisted) or ("" if report["nodes"] else "the GCS names none"),
    )
    return rows


def _try(add: Any, check: str, how: Any) -> None:
    try:
        add(check, "ok", how() or "")
    except ClusterError as error:
        add(check, "problem", str(error))


def _crls(cluster: ClusterDir) -> str:
    now = dt.datetime.now(dt.timezone.utc)
    files = sorted(cluster.trust.glob("*.crl"))
    Registry(cluster).crls()
    for file in files:
        end = pki.load_crl(file.read_bytes()).next_update_utc
        if end is not None and end <= now:
            raise ClusterError(
                where=str(file),
                what=f"ended on {end:%Y-%m-%d %H:%M} UTC: the guard refuses everybody",
                remedy="`raysandbox cluster certs trust` a newer one",
            )
    return f"{len(files)} lists"
