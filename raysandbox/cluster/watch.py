"""Looks into the real GCS, as the guard: what nodes and keys it has."""

from __future__ import annotations

from typing import Any

import grpc
from ray.core.generated import (
    common_pb2,
    gcs_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
)

from raysandbox.cluster.settings import ClusterDir, read_secret

__all__ = ["Watcher"]

TIMEOUT_S = 5


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
