"""Calls a method of the GCS as whoever the arguments say; answers with JSON.

    call.py ADDRESS CA CERT KEY TOKEN METHOD [KIND JSON]…

The last two may come again. CERT and KEY may be ``-`` for none. KIND is the
request's message of gcs_service_pb2, JSON its fields.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from ray.core.generated import gcs_service_pb2 as pb


def main() -> None:
    """Make the calls and print a list of code, details, bytes."""
    address, ca, cert, key, token, *rest = sys.argv[1:]
    credentials = grpc.ssl_channel_credentials(
        Path(ca).read_bytes(),
        None if key == "-" else Path(key).read_bytes(),
        None if cert == "-" else Path(cert).read_bytes(),
    )
    metadata = [("authorization", f"Bearer {Path(token).read_text().strip()}")]
    said = []
    with grpc.secure_channel(address, credentials) as channel:
        for method, kind, fields in zip(rest[::3], rest[1::3], rest[2::3]):
            message: Any = getattr(pb, kind)()
            json_format.ParseDict(json.loads(fields), message)
            call = channel.unary_unary(method)
            try:
                answer = call(
                    message.SerializeToString(), timeout=8, metadata=metadata
                )
                said.append({"code": "OK", "details": "", "bytes": len(answer)})
            except grpc.RpcError as error:
                why = dict(error.trailing_metadata() or ()).get("x-rsb-why", "")
                said.append(
                    {
                        "code": error.code().name,
                        "details": f"{error.details()} {why}",
                        "bytes": 0,
                    }
                )
    print(json.dumps(said))


if __name__ == "__main__":
    main()
