"""What an Envoy that does nothing costs: stock Ray with and without one in between.

The floor of what any guard that is an Envoy can reach, see `cluster` for the guard's
own figures: no TLS, no identity, no check, no limit, no log. By hand, from
build/check::

    ../../.venv/bin/python -m tests.bench.plain_envoy
"""

from __future__ import annotations

import json
import sys
from typing import Any

from raysandbox.cluster import guard
from tests.bench.cluster import WORK, Side
from tests.bench.turns import turns
from tests.cluster.conftest import PORT, STOCK, Stock
from tests.cluster.lab import Lab, wait_for

OTHER_PORT = 7000
# Ray's syncer sends the token twice, and the GCS takes it once.
ONE_TOKEN = """
function envoy_on_request(handle)
  local token = handle:headers():get("authorization")
  local first = token and string.match(token, "^([^,]*),")
  if first then handle:headers():replace("authorization", first) end
end
"""


def configuration() -> dict[str, Any]:
    """Return Envoy's: whatever comes goes to the GCS."""

    def typed(kind: str, **fields: Any) -> dict[str, Any]:
        return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **fields}

    def at(address: str, port: int) -> dict[str, Any]:
        return {"address": {"socket_address": {"address": address, "port_value": port}}}

    lua = typed(
        "filters.http.lua.v3.Lua", default_source_code={"inline_string": ONE_TOKEN}
    )
    router = typed("filters.http.router.v3.Router")
    everything = {
        "match": {"prefix": "/"}, "route": {"cluster": "gcs", "timeout": "0s"}
    }  # fmt: skip
    manager = typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="plain",
        codec_type="HTTP2",
        stream_idle_timeout="0s",
        http_filters=[
            {"name": "lua", "typed_config": lua},
            {"name": "router", "typed_config": router},
        ],
        route_config={
            "virtual_hosts": [{"name": "gcs", "domains": ["*"], "routes": [everything]}]
        },
    )
    http2 = typed(
        "upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": {}},
    )
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    gcs = {
        "name": "gcs",
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": "gcs",
            "endpoints": [{"lb_endpoints": [{"endpoint": at(STOCK, PORT)}]}],
        },
        "typed_extension_protocol_options": {name: http2},
    }
    chain = {"filters": [{"name": "manager", "typed_config": manager}]}
    listener = {**at(STOCK, OTHER_PORT), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [gcs]}}


def main() -> None:
    """Print a line for each kind of work."""
    with Lab() as lab:
        host = lab.host("stock", STOCK)
        lab.where["stock"] = "auto"
        stock = Stock(lab)
        file = host.home / "plain.json"
        file.write_text(json.dumps(configuration()))
        envoy = host.popen(
            str(guard.executable()), "-c", str(file), "--concurrency", "1",
            "--use-dynamic-base-id", "-l", "error", log="envoy.log",
        )  # fmt: skip
        wait_for("Envoy", lambda: f":{OTHER_PORT} " in host.run("ss", "-ltn").stdout)
        through = Side(
            host, "env", f"RAY_ADDRESS={STOCK}:{OTHER_PORT}", "RAY_AUTH_MODE=token",
            f"RAY_AUTH_TOKEN_PATH={stock.token}",
        )  # fmt: skip
        direct = Side(host)
        try:
            for side in (through, direct):
                side("connect")
            for name, function, arguments, _ in WORK:
                for side in (through, direct):
                    side(function, *arguments)
                with_it, without = turns(
                    6,
                    lambda f=function, a=arguments: through(f, *a),
                    lambda f=function, a=arguments: direct(f, *a),
                )
                ratio = with_it / without
                print(f"{name}: {with_it:.3g} against {without:.3g}, {ratio:.2f}")
                sys.stdout.flush()
        finally:
            through.close()
            direct.close()
            envoy.kill()


if __name__ == "__main__":
    main()
