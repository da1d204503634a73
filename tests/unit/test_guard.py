"""The guard's filter chains: whose connections are counted together, and whose rules.

Envoy takes the chain of the smallest network that an address is in, and refuses two
chains of the same network.
"""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raysandbox.cluster import guard
from raysandbox.cluster.settings import Inventory, Limits, Node, Settings
from tests.require import require

HEAD = "10.9.0.1"
LIMITS = Limits(connections=40, other_connections=20)


def _settings(**more: Any) -> Settings:
    return Settings(name="c", head_address=HEAD, **{"limits": LIMITS, **more})


def _inventory(**nodes: Node) -> Inventory:
    return Inventory(nodes={"head": Node(addresses=(HEAD,), head=True), **nodes})


def _many(count: int) -> Inventory:
    """Return a head and nodes of one address each."""
    return _inventory(
        **{f"n{i}": Node(addresses=(f"10.1.{i >> 8}.{i & 255}",)) for i in range(count)}
    )


def _listeners(
    inventory: Inventory, *members: str, run: Path = Path("/run/x"), **more: Any
) -> list[Any]:
    made = guard.listeners(_settings(**more), inventory, run, {"head": "CN=x"}, members)
    found: list[Any] = made["resources"]
    return found


def _sources(chain: Any) -> list[str]:
    ranges = chain["filter_chain_match"]["source_prefix_ranges"]
    return [f"{each['address_prefix']}/{each['prefix_len']}" for each in ranges]


def _most(chain: Any) -> int:
    most: int = chain["filters"][0]["typed_config"]["max_connections"]
    return most


def _of(listener: Any, address: str) -> Any:
    """Return the chain that Envoy takes for an address."""
    ip, best, found = ipaddress.ip_address(address), -1, None
    for chain in listener["filter_chains"]:
        for source in map(ipaddress.ip_network, _sources(chain)):
            if ip in source and source.prefixlen > best:
                best, found = source.prefixlen, chain
    return found or listener["default_filter_chain"]


def _policies(chain: Any) -> Any:
    for each in chain["filters"][-1]["typed_config"]["http_filters"]:
        if each["name"] == "envoy.filters.http.rbac":
            return each["typed_config"]["rules"]["policies"]
    raise AssertionError("no rules")


def _allows(policies: Any, role: str, name: str, address: str) -> bool:
    """Say what Envoy says to a member of a role that calls from an address."""

    def applies(rule: Any) -> bool:
        (kind, body), ip = next(iter(rule.items())), ipaddress.ip_address(address)
        if kind == "and_ids":
            return all(map(applies, body["ids"]))
        if kind == "or_ids":
            return any(map(applies, body["ids"]))
        if kind == "not_id":
            return not applies(body)
        if kind == "metadata":
            # The script has let it through.
            return True
        if kind == "direct_remote_ip":
            text = f"{body['address_prefix']}/{body['prefix_len']}"
            return ip in ipaddress.ip_network(text)
        pattern = body["principal_name"]["safe_regex"]["regex"]
        return bool(re.fullmatch(pattern, f"spiffe://c/{role}/{name}/x"))

    rules = policies.get(role, {"principals": []})["principals"]
    return any(map(applies, rules))


def test_each_address_has_connections_of_its_own() -> None:
    """A node's network is one, and all that nobody has named are one together."""
    nodes = _inventory(a=Node(addresses=("10.0.0.5", "10.2.0.0/16")))
    (main,) = _listeners(nodes, "10.0.0.5", "10.7.0.1", "10.7.0.2", "a.host.name")
    assert {(*_sources(c), _most(c)) for c in main["filter_chains"]} == {
        ("127.0.0.1/32", 40), (f"{HEAD}/32", 40), ("10.0.0.5/32", 40),
        ("10.2.0.0/16", 40), ("10.7.0.1/32", 20), ("10.7.0.2/32", 20),
    }  # fmt: skip
    assert (_sources(main["default_filter_chain"]), _most(_of(main, "10.8.0.1"))) == (
        [], 20,
    )  # fmt: skip
    names = [chain["name"] for chain in main["filter_chains"]]
    assert len(set(names)) == len(names)


def test_dashboard_is_split_likewise() -> None:
    """With the smaller number for everybody."""
    nodes = _inventory(a=Node(addresses=("10.0.0.5",)))
    main, dashboard = _listeners(nodes, "10.7.0.1", dashboard_tls_port=8443)
    assert [_sources(c) for c in dashboard["filter_chains"]] == [
        _sources(c) for c in main["filter_chains"]
    ]
    chains = (*dashboard["filter_chains"], dashboard["default_filter_chain"])
    assert {_most(chain) for chain in chains} == {20}


OVERLAPPING = _inventory(
    wide=Node(addresses=("10.0.0.0/16", "10.0.0.7")),
    narrow=Node(addresses=("10.0.0.0/24",)),
    inside=Node(addresses=("10.0.0.7",)),
    same=Node(addresses=("10.0.0.7/32", "10.0.0.0/16")),
    everywhere=Node(addresses=("0.0.0.0/0",)),
    far=Node(addresses=("fd00::/8", "fd00::1")),
)


def test_network_that_several_nodes_list_is_one_chain() -> None:
    """Envoy takes no two of the same; one inside another has its own.

    In each are the rules of all nodes that may call from there, and of no others.
    """
    (main,) = _listeners(OVERLAPPING, "10.0.0.9", "10.200.0.1")
    sources = [source for c in main["filter_chains"] for source in _sources(c)]
    assert len(set(sources)) == len(sources)
    for address, expected in (
        ("10.0.0.7", {"wide", "narrow", "inside", "same", "everywhere"}),
        ("10.0.0.8", {"wide", "narrow", "same", "everywhere"}),
        ("10.0.1.1", {"wide", "same", "everywhere"}),
        ("10.200.0.1", {"everywhere"}),
        ("127.0.0.1", {"head", "everywhere"}),
    ):
        chain = _of(main, address)
        rules = json.dumps(_policies(chain)["node"])
        assert set(re.findall(r"c/node/([a-z]+)/", rules)) == expected
        assert _most(chain) == 40


@st.composite
def _inventories(draw: st.DrawFn) -> Inventory:
    """Nodes whose networks are often inside each other's, or the same."""
    networks = st.builds(
        lambda last, length: str(
            ipaddress.ip_network((f"10.0.{last & 1}.{last}", length), strict=False)
        ),
        st.integers(0, 15), st.integers(20, 32),
    )  # fmt: skip
    nodes = st.builds(
        Node, addresses=st.lists(networks, min_size=1, max_size=3).map(tuple),
        head=st.booleans(), quarantined=st.booleans(),
    )  # fmt: skip
    names = st.sampled_from(["a", "b", "c", "d", "e", "f"])
    return Inventory(nodes=draw(st.dictionaries(names, nodes)))


@given(_inventories(), st.sampled_from(["enforce", "observe"]), st.integers(1, 64))
@hypothesis_settings(max_examples=60, deadline=None)
def test_chain_decides_as_all_rules_together_do(
    inventory: Inventory, admission: Any, most: int
) -> None:
    """Rules that a chain does not have would have allowed nothing there."""
    settings = _settings(admission=admission)
    everything = guard._rbac(settings, inventory)["rules"]["policies"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "MOST_CHAINS", most)
        (main,) = _listeners(inventory, "10.0.0.3", "10.0.1.9", admission=admission)
    addresses = [f"10.0.{i & 1}.{i}" for i in range(16)]
    for address in (*addresses, "127.0.0.1", "10.9.9.9"):
        policies = _policies(_of(main, address))
        for role in ("head", "node", "worker", "driver", "operator"):
            for name in (*inventory.nodes, "stranger"):
                assert _allows(policies, role, name, address) == _allows(
                    everything, role, name, address
                )


def test_beyond_the_most_chains_addresses_share_them() -> None:
    """Each has one, the same whatever else comes and goes, and the head's its own.

    Guards against a node that takes connections that the head itself needs.
    """
    members = [f"10.3.0.{i}" for i in range(200)]
    (main,) = _listeners(_many(300), *members)
    (more,) = _listeners(_many(310), *members[:150])
    kinds = [chain["name"].split()[0] for chain in main["filter_chains"]]
    assert guard.MOST_CHAINS / 2 < kinds.count("inventory") <= guard.MOST_CHAINS + 1
    assert guard.MOST_CHAINS / 2 < kinds.count("members") <= guard.MOST_CHAINS
    sources = [source for c in main["filter_chains"] for source in _sources(c)]
    assert len(set(sources)) == len(sources) == 1 + 1 + 300 + 200
    assert set(_sources(_of(main, HEAD))) == {f"{HEAD}/32", "127.0.0.1/32"}
    assert _most(_of(main, HEAD)) == _most(_of(main, "10.1.0.1")) == 40
    for address in ("10.1.0.9", "10.1.1.7", *members[:9]):
        assert _of(main, address)["name"] == _of(more, address)["name"]


def test_most_chains_are_not_exceeded_by_one() -> None:
    """As many have one each; one more, and some share."""
    for nodes, shared in ((guard.MOST_CHAINS - 2, False), (guard.MOST_CHAINS, True)):
        (main,) = _listeners(_many(nodes))
        sizes = {len(_sources(chain)) for chain in main["filter_chains"]}
        assert (sizes != {1}) == shared


def test_quarantined_node_has_no_connections_of_nodes() -> None:
    """Its address is one of those that certificates name, or of strangers."""
    nodes = _inventory(
        bad=Node(addresses=("10.0.0.5",), quarantined=True),
        good=Node(addresses=("10.0.0.6",)),
    )
    (main,) = _listeners(nodes, "10.0.0.5", "10.0.0.6")
    chain = _of(main, "10.0.0.5")
    assert (chain["name"], _most(chain)) == ("members 10.0.0.5/32", 20)
    assert _of(main, "10.0.0.6")["name"] == "inventory 10.0.0.6/32"
    assert not _allows(_policies(chain), "node", "bad", "10.0.0.5")
    (main,) = _listeners(nodes)
    assert _of(main, "10.0.0.5") == main["default_filter_chain"]


def test_observing_lets_unlisted_nodes_in_everywhere() -> None:
    """From any address, but for one that is in quarantine."""
    nodes = _inventory(bad=Node(addresses=("10.0.0.5",), quarantined=True))
    (main,) = _listeners(nodes, "10.7.0.1", admission="observe")
    for address in (HEAD, "127.0.0.1", "10.0.0.5", "10.7.0.1", "10.8.0.1"):
        policies = _policies(_of(main, address))
        assert _allows(policies, "node", "unlisted", address)
        assert not _allows(policies, "node", "bad", address)


def test_calls_of_an_identity_are_counted_once() -> None:
    """All chains have the same routes, and those have the buckets."""
    (main,) = _listeners(_many(3), "10.7.0.1")
    chains = [*main["filter_chains"], main["default_filter_chain"]]
    managers = [chain["filters"][1]["typed_config"] for chain in chains]
    assert {json.dumps(each["rds"]) for each in managers} == {
        json.dumps(managers[0]["rds"])
    }
    assert not any("route_config" in each for each in managers)
    (routes,) = guard.routes_of(_settings())["resources"]
    (host,) = routes["virtual_hosts"]
    assert guard.RATE_LIMIT in host["typed_per_filter_config"]
    # A call without a route would have no buckets but its chain's.
    assert (host["domains"], host["routes"][-1]["match"]) == (["*"], {"prefix": "/"})


def test_call_over_its_limits_is_refused_whatever_else_is() -> None:
    """It waits, and is refused also where too many wait, or the log can be written.

    Guards against Envoy's own names for how much is refused: the supervisor sets them.
    """
    (main,) = _listeners(_many(1))
    filters = main["default_filter_chain"]["filters"][-1]["typed_config"][
        "http_filters"
    ]
    names = [each["name"].rpartition(".")[2] for each in filters]
    assert names[: names.index("rbac")] == [
        "fault", "lua", "local_ratelimit", "wait", "refuse"
    ]  # fmt: skip
    _, _, limit, wait, refuse = (each["typed_config"] for each in filters[:5])
    assert limit["filter_enabled"]["default_value"]["numerator"] == 100
    (mark,) = limit["request_headers_to_add_when_not_enforced"]
    for each in (wait, refuse):
        marked = {"name": mark["header"]["key"], "present_match": True}
        assert each["headers"] == [marked]
        own = {value for key, value in each.items() if key.endswith("_runtime")}
        assert len(own) == 6
        assert not any(value.startswith("fault.") for value in own)
    assert "max_active_faults" in wait
    assert "max_active_faults" not in refuse
    assert refuse["abort"]["percentage"]["numerator"] == 100


@pytest.mark.parametrize("port", [None, 8443])
def test_limit_of_all_connections_takes_none_of_a_chain(port: int | None) -> None:
    """However many addresses there will be, there is room for all that chains hold."""
    settings = _settings(dashboard_tls_port=port)
    members = [f"10.{i}.3.{j}" for i in range(20, 30) for j in range(200)]
    made = guard.listeners(
        settings, _many(2000), Path("/run"), {"head": "CN=x"}, members
    )
    allowed = guard.connections_allowed(settings, 10**6)
    assert guard.connections_of(made) + guard.SPARE_CONNECTIONS <= allowed
    assert allowed + guard.FILES_BESIDE == guard.files_wanted(settings)
    text = json.dumps(guard.bootstrap(settings, Path("/run"), 10**6))
    assert f'"max_active_downstream_connections": {allowed}' in text


@pytest.mark.parametrize(
    ("files", "connections"), [(20000, 20000 - guard.FILES_BESIDE), (1024, 512)]
)
def test_limit_of_all_connections_leaves_files(files: int, connections: int) -> None:
    """Those that the guard needs for itself are not taken by members."""
    settings = _settings(limits=Limits())
    assert guard.connections_allowed(settings, files) == connections


@pytest.mark.parametrize(
    "inventory", [Inventory(), OVERLAPPING, _many(150)],
    ids=["empty", "overlapping", "many"],
)  # fmt: skip
def test_envoy_takes_the_configuration(inventory: Inventory, tmp_path: Path) -> None:
    """What is made of any inventory is valid, with the routes that it refers to.

    The control: a second chain of the same network is not.
    """
    require("module:envoy")
    settings = _settings(dashboard_tls_port=8443)
    members = ["10.0.0.9", "10.200.0.1", *(f"10.3.0.{i}" for i in range(100))]
    made = guard.bootstrap(settings, tmp_path, 10**6)
    listeners = guard.listeners(
        settings, inventory, tmp_path, {"head": "CN=x"}, members
    )
    (routes,) = guard.routes_of(settings)["resources"]
    # What is in other files is not looked at: here it is in the same one.
    del made["dynamic_resources"], routes["@type"]
    made["static_resources"]["listeners"] = listeners["resources"]
    for each in listeners["resources"]:
        del each["@type"]
    for name in ("inner", "gcs", "server", "members", "routes"):
        (tmp_path / f"{name}.json").touch()
    chains = listeners["resources"][0]["filter_chains"]
    manager = chains[0]["filters"][1]["typed_config"]
    del manager["rds"]
    manager["route_config"] = routes

    def validate() -> subprocess.CompletedProcess[str]:
        (tmp_path / "envoy.json").write_text(json.dumps(made))
        command = [str(guard.executable()), "--mode", "validate", "-c", "envoy.json"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    out = validate()
    assert out.returncode == 0, out.stderr[-2000:]
    chains.append({**chains[0], "name": "again"})
    assert "same matching rules" in validate().stderr


def test_nobody_gets_through_whom_a_script_has_not_let() -> None:
    """Envoy goes on with a request on which a script fails: RBAC refuses it then."""
    main, dashboard = _listeners(_many(1), dashboard_tls_port=8443)
    roles = set()
    for listener in (main, dashboard):
        for chain in (*listener["filter_chains"], listener["default_filter_chain"]):
            filters = chain["filters"][-1]["typed_config"]["http_filters"]
            names = [each["name"].rpartition(".")[2] for each in filters]
            assert names.index("lua") < names.index("rbac")
            for role, policy in _policies(chain).items():
                (principal,) = policy["principals"]
                checked, _ = principal["and_ids"]["ids"]
                assert checked["metadata"]["filter"] == "rsb"
                assert checked["metadata"]["path"] == [{"key": "checked"}]
                roles.add(role)
    assert {"driver", "observer", "operator", "node", "head", "worker"} <= roles
