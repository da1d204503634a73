"""Looks into the real GCS, as the guard: what nodes and keys it has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import grpc
from ray.core.generated import (
    common_pb2,
    gcs_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
)

from raysandbox.cluster.access import over_ceiling
from raysandbox.cluster.settings import ClusterDir, Inventory, read_secret

__all__ = ["Ceilings", "Watcher"]

TIMEOUT_S = 5
# A node that was lost and has come back is there twice until the GCS has given the
# first one up.
TOGETHER_S = 90.0
# What a placement group has set aside of a node's resource, by Ray's naming.
SET_ASIDE = re.compile(r"^(.+?)_group_(?:\d+_)?[0-9a-f]{36}$")


class Ceilings:
    """Which nodes have more than the inventory allows them, after they joined.

    A node says what it has when it registers, and again whenever it likes; and one
    identity can register several times.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def look(
        self, inventory: Inventory, nodes: Mapping[str, str],
        alive: Mapping[str, str], totals: Mapping[str, Mapping[str, float]],
        now: float,
    ) -> dict[str, str]:  # fmt: skip
        """Return node id → what is wrong with it.

        Args:
            inventory: With the ceilings.
            nodes: Node id → role/name of those that were admitted, oldest first.
            alive: Node id → address of those that the GCS holds alive.
            totals: Node id → what it has now.
            now: Seconds of any steady clock.
        """
        found, together = {}, {}
        sums: dict[str, Counter[str]] = {}
        for node_id, who in nodes.items():
            name = who.partition("/")[2]
            entry = inventory.nodes.get(name)
            if entry is None or node_id not in alive or node_id not in totals:
                continue
            has = {
                resource: amount
                for resource, amount in totals[node_id].items()
                # A marker that its bundle is on the node; thousand for each.
                if not resource.startswith("bundle_group_")
            }
            plain = {r: amount for r, amount in has.items() if not SET_ASIDE.match(r)}
            problem = over_ceiling(name, entry, alive[node_id], plain)
            for resource, amount in has.items():
                aside = SET_ASIDE.match(resource)
                if aside and not problem:
                    part = {aside[1]: amount}
                    problem = over_ceiling(name, entry, alive[node_id], part)
            if problem:
                found[node_id] = problem
                continue
            rest = {r: a for r, a in plain.items() if not r.startswith("node:")}
            all_of = sums.setdefault(who, Counter())
            # Ray counts in ten thousandths, and so do sums of them.
            summed = {r: round(a + all_of[r], 4) for r, a in rest.items()}
            if problem := over_ceiling(name, entry, "", summed):
                together[node_id] = f"{problem}, with its other node ids"
            else:
                all_of.update(rest)
        self._since = {n: self._since.get(n, now) for n in together}
        for node_id, since in self._since.items():
            if now - since >= TOGETHER_S:
                found[node_id] = together[node_id]
        return found


class Watcher:
    """A client of the real GCS with the guard's own certificate."""

    def __init__(self, cluster: ClusterDir) -> None:
        credentials = grpc.ssl_channel_credentials(
            cluster.ca_cert.read_bytes(),
            read_secret(cluster.key("guard-inner")),
            cluster.cert("guard-inner").read_bytes(),
        )
        port = cluster.settings().gcs_port
        self._channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials)
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(self._channel)
        self._stub = stub
        resources: Any = gcs_service_pb2_grpc.NodeResourceInfoGcsServiceStub(
            self._channel
        )
        self._resources = resources
        kv: Any = gcs_service_pb2_grpc.InternalKVGcsServiceStub(self._channel)
        self._kv = kv
        token = read_secret(cluster.token).decode().strip()
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def alive(self) -> dict[str, str]:
        """Return node id → address of every node that the GCS holds alive."""
        found = await self.alive_with_names()
        return {node_id: address for node_id, (address, _) in found.items()}

    async def alive_with_names(self) -> dict[str, tuple[str, str]]:
        """Return node id → address and name of every node that is alive."""
        request: Any = gcs_service_pb2.GetAllNodeInfoRequest
        reply = await self._stub.GetAllNodeInfo(
            request(), metadata=self._metadata, timeout=TIMEOUT_S
        )
        up = gcs_pb2.GcsNodeInfo.ALIVE
        return {
            info.node_id.hex(): (info.node_manager_address, info.node_name)
            for info in reply.node_info_list
            if info.state == up
        }

    async def totals(self) -> dict[str, dict[str, float]]:
        """Return node id → what each node has, as it last said."""
        request: Any = gcs_service_pb2.GetAllTotalResourcesRequest
        reply = await self._resources.GetAllTotalResources(
            request(), metadata=self._metadata, timeout=TIMEOUT_S
        )
        return {
            each.node_id.hex(): dict(each.resources_total)
            for each in reply.resources_list
        }

    async def remove(self, node_id: str) -> None:
        """Have the GCS count a node as dead; its tasks go elsewhere."""
        request: Any = gcs_service_pb2.UnregisterNodeRequest
        asked = request(node_id=bytes.fromhex(node_id))
        asked.node_death_info.reason = common_pb2.NodeDeathInfo.EXPECTED_TERMINATION
        asked.node_death_info.reason_message = "refused by raysandbox admission"
        await self._stub.UnregisterNode(
            asked, metadata=self._metadata, timeout=TIMEOUT_S
        )

    async def keys(self, namespace: bytes) -> frozenset[bytes]:
        """Return the keys of a namespace."""
        request: Any = gcs_service_pb2.InternalKVKeysRequest
        reply = await self._kv.InternalKVKeys(
            request(namespace=namespace), metadata=self._metadata, timeout=TIMEOUT_S
        )
        return frozenset(reply.results)

    async def delete_key(self, namespace: bytes, key: bytes) -> None:
        """Remove a key; none is there afterwards."""
        request: Any = gcs_service_pb2.InternalKVDelRequest
        await self._kv.InternalKVDel(
            request(namespace=namespace, key=key),
            metadata=self._metadata,
            timeout=TIMEOUT_S,
        )
