"""What no hardened cluster gets below: Ray's own TLS, and an Envoy that does nothing.

Each against stock Ray, and apart from each other: Ray with TLS and nothing in between;
an Envoy in between without TLS, identity, check, limit or log. See `cluster` for the
guard's own figures. By hand, from build/check::

    ../../.venv/bin/python -m tests.bench.floor
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from raysandbox.cluster import guard
from raysandbox.cluster.settings import ClusterDir
from tests.bench.cluster import WORK, Side
from tests.bench.turns import turns
from tests.cluster.conftest import HEAD, NODE, PORT, STOCK, Stock
from tests.cluster.lab import Host, Lab, wait_for

OTHER_PORT = 7000
# Ray's syncer sends the token twice, and the GCS takes it once.
ONE_TOKEN = """
function envoy_on_request(handle)
  local token = handle:headers():get("authorization")
  local first = token and string.match(token, "^([^,]*),")
  if first then handle:headers():replace("authorization", first) end
end
"""


def configuration(address: str) -> dict[str, Any]:
    """Return Envoy's: whatever comes goes to the GCS at this address."""

    def typed(kind: str, **fields: Any) -> dict[str, Any]:
        return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **fields}

    def at(port: int) -> dict[str, Any]:
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
            "endpoints": [{"lb_endpoints": [{"endpoint": at(PORT)}]}],
        },
        "typed_extension_protocol_options": {name: http2},
    }
    chain = {"filters": [{"name": "manager", "typed_config": manager}]}
    listener = {**at(OTHER_PORT), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [gcs]}}


def stock(lab: Lab, host: Host) -> dict[str, str]:
    """Start stock Ray; return what its drivers' environment has besides."""
    Stock(lab, host.name)
    return {}


def with_tls(lab: Lab, host: Host) -> dict[str, str]:
    """The same with Ray's TLS, which has the certificate of a cluster of ours."""
    host.raysandbox(
        "cluster", "init", "c", "--name=lab", f"--head-address={host.address}"
    )
    env = ClusterDir(host.home / "c").tls_env("raylet")
    Stock(lab, host.name, env)
    return env


def with_envoy(lab: Lab, host: Host) -> dict[str, str]:
    """Stock Ray, and an Envoy that its drivers' calls of the GCS pass."""
    token = Stock(lab, host.name).token
    file = host.home / "plain.json"
    file.write_text(json.dumps(configuration(host.address)))
    host.popen(
        str(guard.executable()), "-c", str(file), "--concurrency", "1",
        "--use-dynamic-base-id", "-l", "error", log="envoy.log",
    )  # fmt: skip
    wait_for("Envoy", lambda: f":{OTHER_PORT} " in host.run("ss", "-ltn").stdout)
    # Ray finds its own way to the token at the node's own address alone.
    return {
        "RAY_ADDRESS": f"{host.address}:{OTHER_PORT}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }  # fmt: skip


def main() -> None:
    """Print a line for each kind of work."""
    # Each has a machine of its own: drivers of one Ray would wait for each other.
    kinds = {HEAD: stock, NODE: with_tls, STOCK: with_envoy}
    with Lab() as lab:
        sides = []
        for address, begin in kinds.items():
            host = lab.host(begin.__name__.replace("_", "-"), address)
            lab.where[host.name] = "auto"
            env = begin(lab, host)
            sides.append(Side(host, "env", *(f"{k}={v}" for k, v in env.items())))
        try:
            for side in sides:
                side("connect")
            for name, function, arguments, _ in WORK:
                for side in sides:
                    side(function, *arguments)
                plain, tls, envoy = turns(
                    12, *(partial(side, function, *arguments) for side in sides)
                )
                print(
                    f"{name}: stock {plain:.3g}, with Ray's TLS {tls / plain:.2f} of "
                    f"it, with an Envoy {envoy / plain:.2f}"
                )
                sys.stdout.flush()
        finally:
            for side in sides:
                side.close()


if __name__ == "__main__":
    main()
