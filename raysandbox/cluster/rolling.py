"""A shell script that renews a cluster's certificates, one member at a time.

Ray reads a process's certificate when the process starts and serves it until
the end, so raylet, GCS and agents need a restart; the guard and the workers'
issuer do not. Nodes go first, one after the other, each only once the one
before is up again, and drained before it is restarted; the head is last, because
its restart ends running jobs unless the GCS keeps its state elsewhere.
"""

from __future__ import annotations

import datetime as dt
import shlex

from raysandbox.cluster.registry import Record, Registry

__all__ = ["due", "script"]

_HEAD = """\
#!/bin/sh
# Renews the certificates of cluster {name} that end within {within:g} days.
# Read it, then run it on the operator's machine. `on` and `copy` reach the
# members; a file named in ROLLING_HOW can define them otherwise.
set -eu
on() {{ host=$1; shift; ssh "root@$host" "$@"; }}
copy() {{ scp -pr "$1/." "root@$2:$3/"; }}
[ -z "${{ROLLING_HOW:-}}" ] || . "$ROLLING_HOW"
cluster={cluster}
there={there}
days={days:g}
# Seconds that a node's running tasks are given before it is restarted.
within=${{DRAIN_S:-300}}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
"""
_NODE = """
echo {member}
raysandbox cluster certs renew {member} --out "$stage"/{name} --days "$days" \
--cluster "$cluster"
copy "$stage"/{name} {address} "$there"
rm -rf "$stage"/{name}
raysandbox cluster nodes drain {name} --within "$within" --cluster "$cluster" ||
  echo "  what still runs on {name} ends with it"
on {address} raysandbox cluster down --cluster "$there"
on {address} raysandbox cluster up --cluster "$there"
on {address} raysandbox cluster status --cluster "$there"
"""
_OTHER = """
echo {member}
raysandbox cluster certs renew {member} --out {out} --days "$days" \
--cluster "$cluster"
echo "  take {out} to whoever is {member}; processes started from then on use it"
"""
_HEAD_NODE = """
# The guard takes its new certificate up at once. GCS, raylet and dashboard need
# the restart. It ends running jobs, and the nodes join anew, unless the GCS keeps
# its state elsewhere: set GCS_KEPT=1 then.
echo {member}
raysandbox cluster certs renew {member} --out "$cluster" --days "$days" \
--cluster "$cluster"
nodes() {{
  :{nodes}
}}
[ -n "${{GCS_KEPT:-}}" ] || nodes down
raysandbox cluster down --cluster "$cluster"
raysandbox cluster up --cluster "$cluster"
[ -n "${{GCS_KEPT:-}}" ] || nodes up
raysandbox cluster status --cluster "$cluster"
"""
_NODES = """
  on {address} raysandbox cluster "$1" --cluster "$there\""""


def due(registry: Registry, within_days: float) -> dict[str, Record]:
    """Return role/name → its record that ends first, of those that end soon."""
    latest: dict[str, Record] = {}
    for record in registry.records():
        latest[record.uri] = record
    soon: dict[str, Record] = {}
    limit = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=within_days)
    for record in latest.values():
        role, name = record.uri.split("/")[3:5]
        if role == "worker" or record.revoked or record.expires > limit:
            continue
        member = f"{role}/{name}"
        if member not in soon or record.expires < soon[member].expires:
            soon[member] = record
    return soon


def script(registry: Registry, *, within_days: float, days: float, there: str) -> str:
    """Return the script; it does nothing when no certificate ends soon."""
    found = due(registry, within_days)
    text = _HEAD.format(
        name=registry.name, within=within_days, days=days, there=shlex.quote(there),
        cluster=shlex.quote(str(registry.dir.path)),
    )  # fmt: skip
    order = {"node": 0, "head": 2}
    for member, record in sorted(
        found.items(), key=lambda item: (order.get(item[0].split("/")[0], 1), item[0])
    ):
        role, _, name = member.partition("/")
        template = {"node": _NODE, "head": _HEAD_NODE}.get(role, _OTHER)
        out = registry.dir.path / "issued" / role / name
        text += template.format(
            member=member, name=name, out=shlex.quote(str(out)),
            address=shlex.quote(record.addresses[0] if record.addresses else ""),
            nodes="".join(
                _NODES.format(address=shlex.quote(address))
                for address in _members(registry)
            ),
        )  # fmt: skip
    if not found:
        text += f"echo 'no certificate ends within {within_days:g} days'\n"
    return text


def _members(registry: Registry) -> list[str]:
    """Return the first address of each node that may join, but the head's."""
    return [
        node.addresses[0].partition("/")[0]
        for node in registry.dir.inventory().nodes.values()
        if not node.head and not node.quarantined
    ]
