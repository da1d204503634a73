"""Calls methods of the GCS as whoever each line of standard input says.

A line is a JSON object: ``address``, ``ca``, ``cert``, ``key`` (paths, the last
two may be null), ``token`` (path), ``method``, ``kind`` (a request's message of
gcs_service_pb2) and ``fields`` (of that message, as JSON). Each is answered with
a line: ``code``, ``details``, ``bytes``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from ray.core.generated import gcs_service_pb2 as pb


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def call(ask: dict[str, Any]) -> dict[str, Any]:
    """Make one call on a connection of its own."""
    credentials = grpc.ssl_channel_credentials(
        _read(ask["ca"]), _read(ask["key"]), _read(ask["cert"])
    )
    token = Path(ask["token"]).read_text().strip()
    message: Any = getattr(pb, ask["kind"])()
    json_format.ParseDict(ask["fields"], message)
    # Without this, gRPC would use the connection of an equal channel again.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(ask["address"], credentials, options) as channel:
        try:
            answer = channel.unary_unary(ask["method"])(
                message.SerializeToString(),
                timeout=8,
                metadata=[("authorization", f"Bearer {token}")],
            )
        except grpc.RpcError as error:
            why = dict(error.trailing_metadata() or ()).get("x-rsb-why", "")
            return {
                "code": error.code().name,
                "details": f"{error.details()} {why}",
                "bytes": 0,
            }
    return {"code": "OK", "details": "", "bytes": len(answer)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), flush=True)
