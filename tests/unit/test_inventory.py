"""Files of a cluster directory: what is loaded, refused and kept when edited."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raysandbox.cli import app
from raysandbox.cluster import inventory, pki
from raysandbox.cluster.audit import AuditLog
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.registry import Registry, install
from raysandbox.cluster.settings import (
    Access,
    ClusterDir,
    Inventory,
    Member,
    Node,
    Settings,
    toml_text,
    validate,
)
from tests.unit.test_certificates import make_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterDir:
    """A cluster directory whose inventory has a comment."""
    made = make_cluster(tmp_path / "c")
    (made.path / "inventory.toml").write_text(
        "# racks 1 to 3\n[nodes.head]\naddresses = ['10.1.2.3']  # the big one\n"
        "head = true\n\n[nodes.'n1']\naddresses = [ '10.1.2.4' ]\n"
    )
    return made


def _text(cluster: ClusterDir) -> str:
    return (cluster.path / "inventory.toml").read_text()


# -- edits --------------------------------------------------------------------------


def test_edits_keep_what_the_owner_wrote(cluster: ClusterDir) -> None:
    """Comments, quotes and order stay; only what was asked for changes."""
    before = _text(cluster)
    inventory.add(cluster, "n2", ["10.1.2.5"], {"CPU": 8.0}, {"zone": "b"})
    node = cluster.inventory().nodes["n2"]
    assert (node.resources, node.labels) == ({"CPU": 8.0}, {"zone": "b"})
    assert _text(cluster).startswith(before.rstrip("\n"))
    assert inventory.quarantine(cluster, "n1", True)
    assert not inventory.quarantine(cluster, "n1", True)
    assert cluster.inventory().nodes["n1"].quarantined
    assert not cluster.inventory().nodes["n2"].quarantined
    assert inventory.quarantine(cluster, "n1", False)
    inventory.remove(cluster, "n2")
    assert _text(cluster).split() == before.split()


@pytest.mark.parametrize(
    ("name", "addresses", "resources", "says"),
    [
        ("n1", ["10.1.2.9"], {}, "has a node 'n1' already"),
        ("n2", [], {}, "at least 1 item"),
        ("n2", ["n2.example"], {}, "does not appear to be"),
        ("n2", ["10.1.2.5/8"], {}, "has host bits set"),
        ("../n2", ["10.1.2.5"], {}, "must be 1 to 63"),
        ("N2", ["10.1.2.5"], {}, "must be 1 to 63"),
        ("n2", ["10.1.2.5"], {"CPU": -1.0}, "must be 0 or more"),
        ("n2", ["10.1.2.5"], {"CPU": float("nan")}, "must be 0 or more"),
    ],
)
def test_edit_that_is_not_valid_changes_nothing(
    cluster: ClusterDir, name: str, addresses: list[str], resources: dict[str, float],
    says: str,
) -> None:  # fmt: skip
    """A file that can't be loaded would admit nobody, so it never takes the place."""
    before = _text(cluster)
    with pytest.raises(ClusterError, match=says):
        inventory.add(cluster, name, addresses, resources, {})
    assert _text(cluster) == before


def test_edit_of_a_broken_file_is_refused(cluster: ClusterDir) -> None:
    """It is the owner's to repair; nothing of it is lost."""
    (cluster.path / "inventory.toml").write_text("[nodes.n1\n")
    with pytest.raises(ClusterError, match="is not TOML"):
        inventory.quarantine(cluster, "n1", True)
    assert _text(cluster) == "[nodes.n1\n"


def test_unknown_node_is_named_with_the_known(cluster: ClusterDir) -> None:
    """A typo does not quarantine nobody in silence."""
    for change in (
        lambda: inventory.remove(cluster, "n9"),
        lambda: inventory.quarantine(cluster, "n9", True),
    ):
        with pytest.raises(ClusterError, match="has no node 'n9', only head, n1"):
            change()


def test_edits_at_once_are_all_kept(cluster: ClusterDir) -> None:
    """Two operators at the same moment: neither's node is lost."""
    code = (
        "import sys; from raysandbox.cluster import inventory as i;"
        "from raysandbox.cluster.settings import ClusterDir;"
        "[i.add(ClusterDir(sys.argv[1]), f'{sys.argv[2]}{n}', ['10.1.2.5'], {}, {})"
        " for n in range(5)]"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(cluster.path), name])
        for name in "abc"
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(cluster.inventory().nodes) == 2 + 15


# -- loading ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("cluster.toml", 'name = "a"', "head_address: Field required"),
        ("cluster.toml", 'name = "a"\nhead_address = "h"\nx = 1', "x: Extra inputs"),
        ("cluster.toml", 'name = "a\\n"\nhead_address = "h"', "name: .*be 1 to 63"),
        ("cluster.toml", 'name = "a"\nhead_address = "a b"', "head_address: "),
        ("cluster.toml", 'name = "a"\nhead_address = "h"\nport = 70000', "port: "),
        ("cluster.toml", 'name = "a"\nhead_address = "h"\nadmission = "off"',
         "admission: Input should be 'enforce' or 'observe'"),
        ("cluster.toml", 'name="a"\nhead_address="h"\n[audit]\nwebhook="file:///etc"',
         "audit.webhook: "),
        ("cluster.toml", 'name="a"\nhead_address="h"\n[audit]\nwebhook="http://x.org"',
         "audit.webhook: .*https"),
        ("cluster.toml", 'name="a"\nhead_address="h"\n[audit]\nanchor_file="x"',
         "audit.anchor_file: .*absolute"),
        ("member.toml", 'role = "root"\nname = "a"', "role: "),
        ("member.toml", 'role = "node"\nname = "../a"', "name: "),
        ("inventory.toml", "[nodes.n1]\n", "nodes.n1.addresses: Field required"),
        ("inventory.toml", '[nodes.n1]\naddresses = ["10.0.0.1"]\nquarantine = true',
         "nodes.n1.quarantine: Extra inputs"),
        ("inventory.toml", '[nodes."a/b"]\naddresses = ["10.0.0.1"]', "nodes: "),
        ("inventory.toml", "\ud800", "is not TOML"),
        ("access.toml", "[drivers.a]\nall = true", "drivers.a.all: Extra inputs"),
    ],
)  # fmt: skip
def test_file_that_is_not_valid_names_its_key(
    cluster: ClusterDir, file: str, text: str, says: str
) -> None:
    """A mistyped key is an error, and never a setting that is not there."""
    path = cluster.path / file
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    load = {
        "cluster.toml": cluster.settings, "member.toml": cluster.member,
        "inventory.toml": cluster.inventory, "access.toml": cluster.access,
    }[file]  # fmt: skip
    with pytest.raises(ClusterError, match=says) as caught:
        load()
    assert file in str(caught.value)


def test_missing_inventory_admits_nobody(cluster: ClusterDir) -> None:
    """And a link to nowhere is no missing file."""
    path = cluster.path / "inventory.toml"
    path.unlink()
    assert cluster.inventory().nodes == {}
    path.symlink_to("/nonexistent")
    with pytest.raises(ClusterError, match="is a link"):
        cluster.inventory()


def test_inventory_that_others_may_write_is_refused(cluster: ClusterDir) -> None:
    """Whoever may write it decides who joins."""
    (cluster.path / "inventory.toml").chmod(0o666)
    with pytest.raises(ClusterError, match="so others can change it"):
        cluster.inventory()


MODELS = st.sampled_from([Settings, Member, Inventory, Access])


@settings(max_examples=120, deadline=None)
@given(MODELS, st.text(max_size=120) | st.binary(max_size=80))
def test_any_text_is_a_model_or_an_error(
    model: type[Settings], text: str | bytes
) -> None:
    """Nothing else comes of it, whatever the bytes."""
    with contextlib.suppress(ClusterError):
        assert isinstance(validate(Path("x.toml"), text, model), model)


VALUE = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*Settings.model_fields, *Node.model_fields, "nodes", "drivers", "n1", "roles"]
)


@settings(max_examples=60, deadline=None)
@given(MODELS, st.dictionaries(KEYS, VALUE | st.dictionaries(KEYS, VALUE)))
def test_any_toml_is_a_model_or_an_error(
    model: type[Settings], values: dict[str, object]
) -> None:
    """Well-formed TOML with the right keys and any values."""
    import tomlkit

    try:
        text = tomlkit.dumps(values)
    except Exception:
        return
    with contextlib.suppress(ClusterError):
        assert isinstance(validate(Path("x.toml"), text, model), model)


@given(
    st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF), max_size=20),
    st.lists(st.text(st.characters(codec="ascii"), max_size=8), max_size=3),
)
def test_flat_models_come_back_from_their_text(head: str, addresses: list[str]) -> None:
    """What we write ourselves, quotes and line feeds included."""
    member = Member(role="node", name="n1", addresses=(*addresses, head))
    assert validate(Path("m"), toml_text(member), Member) == member


# -- the commands -------------------------------------------------------------------


def _run(*args: str) -> Result:
    """Run a command in this process: an interpreter's start costs a second."""
    with pytest.MonkeyPatch.context() as patch:
        # Which command it is to import, it reads there.
        patch.setattr(sys, "argv", ["raysandbox", *args])
        out = CliRunner().invoke(app, args)
    if out.exception is not None and not isinstance(out.exception, SystemExit):
        raise out.exception
    return out


def test_first_commands_of_a_user(tmp_path: Path) -> None:
    """init, nodes add, certs issue, list, revoke, quarantine, release, doctor."""
    path, node = tmp_path / "c", tmp_path / "n1"
    where = ("--cluster", str(path))
    out = _run("cluster", "init", str(path), "--name", "prod", "--head-address",
               "10.0.0.1")  # fmt: skip
    assert (out.exit_code, out.stderr) == (0, "")
    assert "cluster up" in out.stdout
    out = _run("cluster", "certs", "issue", "node", "n1", "--address", "10.0.0.2",
               "--out", str(node), *where)  # fmt: skip
    assert "spiffe://prod/node/n1/raylet" in out.stdout
    assert "cluster nodes add n1 --address 10.0.0.2" in out.stderr
    out = _run("cluster", "nodes", "add", "n1", "--address", "10.0.0.2", *where)
    assert out.exit_code == 0, out.stderr
    out = _run("cluster", "nodes", "list", "--json", *where)
    assert json.loads(out.stdout)["nodes"]["n1"]["addresses"] == ["10.0.0.2"]
    rows = json.loads(_run("cluster", "certs", "list", "--json", *where).stdout)
    assert {row["state"] for row in rows} == {"valid"}
    out = _run("cluster", "quarantine", "n1", *where)
    assert (out.exit_code, out.stdout.count("revoked")) == (0, 4), out.stderr
    again = _run("cluster", "quarantine", "head", *where)
    assert (again.exit_code, "is the head" in again.stderr) == (1, True)
    out = _run("cluster", "release", "n1", "--out", str(tmp_path / "new"), *where)
    assert out.exit_code == 0, out.stderr
    rows = json.loads(_run("cluster", "certs", "list", "--json", *where).stdout)
    assert [row["state"] for row in rows if "/n1/" in row["uri"]] == (
        ["revoked"] * 4 + ["valid"] * 4
    )
    out = _run("cluster", "status", *where)
    assert (out.exit_code, "DOWN" in out.stdout) == (3, True)
    out = _run("doctor", "--json", *where)
    checks = {row["check"]: row["state"] for row in json.loads(out.stdout)["checks"]}
    assert out.exit_code == 1
    assert checks["processes"] == "problem"
    assert checks["certificate gcs"] == "ok"
    out = _run("cluster", "env", "--cluster", str(tmp_path / "new"))
    assert "export RAY_USE_TLS=1" in out.stdout


def test_node_of_a_network_is_released(tmp_path: Path) -> None:
    """Its entry has no address of its own; its last certificate has.

    One whose certificate names none in the network stays in quarantine.
    """
    path = tmp_path / "c"
    where = ("--cluster", str(path))
    out = _run("cluster", "init", str(path), "--head-address", "10.0.0.1")
    assert out.exit_code == 0, out.stderr
    for name, address in (("n1", "10.3.0.2"), ("n2", "10.9.0.2")):
        for args in (
            ("certs", "issue", "node", name, "--address", address, "--out",
             str(tmp_path / name)),
            ("nodes", "add", name, "--address", "10.3.0.0/16"), ("quarantine", name),
        ):  # fmt: skip
            out = _run("cluster", *args, *where)
            assert out.exit_code == 0, out.stderr
    out = _run("cluster", "release", "n1", "--out", str(tmp_path / "new"), *where)
    assert out.exit_code == 0, out.stderr
    assert ClusterDir(tmp_path / "new").member().addresses == ("10.3.0.2",)
    out = _run("cluster", "release", "n2", "--out", str(tmp_path / "no"), *where)
    assert out.exit_code == 1
    assert "has only networks in inventory.toml" in " ".join(out.stderr.split())
    assert ClusterDir(path).inventory().nodes["n2"].quarantined


@pytest.mark.parametrize(
    "args",
    [
        ("--name", 'x"\nport = 1'), ("--name", "../x"), ("--head-name", "a/b"),
        ("--head-address", "not an address"), ("--head-address", "0.0.0.0"),
        ("--external-ca", "/nonexistent"), ("--external-ca", "/etc/passwd"),
    ],
)  # fmt: skip
def test_init_that_fails_leaves_nothing(tmp_path: Path, args: tuple[str, ...]) -> None:
    """One line that says why, and no half-made directory."""
    out = _run("cluster", "init", str(tmp_path / "c"), *args)
    assert out.exit_code == 1
    assert out.stderr.startswith("raysandbox: ")
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "c").exists()


def test_init_touches_no_directory_that_is_in_use(tmp_path: Path) -> None:
    """Not another cluster, not anybody's files, not a file."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    for path in (tmp_path / "used", tmp_path / "used" / "x"):
        out = _run("cluster", "init", str(path))
        assert (out.exit_code, "not an empty" in out.stderr) == (1, True)
    assert os.listdir(tmp_path / "used") == ["x"]


@pytest.mark.parametrize(
    "args",
    [
        ("cluster", "status"), ("cluster", "up"), ("cluster", "down"),
        ("cluster", "certs", "list"), ("cluster", "nodes", "list"),
        ("cluster", "quarantine", "n1"), ("audit",), ("cluster", "reload"),
        ("cluster", "certs", "revoke", "a/b"), ("cluster", "certs", "csr"),
        ("cluster", "certs", "rolling"), ("cluster", "env"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_command_on_no_cluster_directory_says_so(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    """One line, exit 1, for a path that is none and for an empty directory."""
    for path in (tmp_path / "none", tmp_path):
        out = _run(*args, "--cluster", str(path))
        if args[-1] in ("reload", "down") and path == tmp_path:
            assert out.exit_code == 0
            continue
        assert out.exit_code == 1, out.stdout
        assert out.stderr.startswith("raysandbox: "), out.stderr
        assert "Traceback" not in out.stderr


def test_commands_for_keys_that_stay_where_they_are(tmp_path: Path) -> None:
    """bundle, csr, sign, import: the operator's side and the node's side."""
    path, node = tmp_path / "c", tmp_path / "n1"
    where, there = ("--cluster", str(path)), ("--cluster", str(node))
    address = ("--address", "10.0.0.2")
    assert (
        _run("cluster", "init", str(path), "--head-address", "10.0.0.1").exit_code == 0
    )
    out = _run("cluster", "certs", "bundle", "node", "n1", *address, "--out", str(node),
               *where)  # fmt: skip
    assert out.exit_code == 0, out.stderr
    assert not list(node.rglob("*.key"))
    out = _run("doctor", "--json", *there)
    checks = {row["check"]: row["state"] for row in json.loads(out.stdout)["checks"]}
    assert checks["certificate raylet"] == "problem"
    assert _run("cluster", "certs", "csr", *there).exit_code == 0
    pending = str(node / "pending")
    out = _run("cluster", "certs", "sign", pending, "driver/eve", *address,
               "--out", str(tmp_path / "bad"), *where)  # fmt: skip
    assert (out.exit_code, "no role has that component" in out.stderr) == (1, True)
    assert not (tmp_path / "bad").exists()
    signed = tmp_path / "signed"
    out = _run("cluster", "certs", "sign", pending, "node/n1", *address,
               "--out", str(signed), *where)  # fmt: skip
    assert out.exit_code == 0, out.stderr
    out = _run("cluster", "certs", "import", str(signed), *there)
    assert (out.exit_code, out.stdout.count("installed")) == (0, 4), out.stderr
    out = _run("doctor", "--json", *there)
    checks = {row["check"]: row["state"] for row in json.loads(out.stdout)["checks"]}
    assert checks["certificate raylet"] == checks["certificate workers"] == "ok"


def test_rolling_is_a_script_that_a_shell_reads(tmp_path: Path) -> None:
    """`sh -n` accepts what is printed, also for names of directories with spaces."""
    path = tmp_path / "my cluster's"
    assert _run("cluster", "init", str(path)).exit_code == 0
    out = _run("cluster", "certs", "rolling", "--within-days", "400", "--cluster",
               str(path), "--member-dir", "/etc/a b")  # fmt: skip
    assert "raysandbox cluster up" in out.stdout
    subprocess.run(["sh", "-n"], input=out.stdout, text=True, check=True)


def test_audit_commands_on_their_own(tmp_path: Path) -> None:
    """No log is an error, a span that is none too; a broken one exits 1 as JSON."""
    path = tmp_path / "c"
    where = ("--cluster", str(path))
    assert _run("cluster", "init", str(path)).exit_code == 0
    out = _run("audit", *where)
    assert (out.exit_code, "there is no audit log" in out.stderr) == (1, True)
    assert _run("audit", *where, "verify").exit_code == 1
    log = AuditLog(path / "audit", 1 << 20, 9)
    log.append([{"t": 0, "who": "driver/alice", "ok": True, "method": "/x/Y"}])
    log.close()
    assert "driver/alice Y" in _run("audit", *where).stdout
    assert _run("audit", *where, "--since", "5 parsecs").exit_code == 2
    assert _run("audit", *where, "--since", "1h").stdout == ""
    assert "1 lines, unbroken" in _run("audit", *where, "verify").stdout
    file = path / "audit" / "audit.jsonl"
    file.write_text(file.read_text() * 2)
    out = _run("audit", *where, "verify", "--json")
    assert (out.exit_code, json.loads(out.stdout)["ok"]) == (1, False)


def test_up_lists_all_that_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    """A key that others can read, an expired certificate, a token that is open."""
    cluster = make_cluster(tmp_path / "c")
    cluster.key("agent").chmod(0o644)
    cluster.token.chmod(0o640)
    key = pki.new_key()
    uri = "spiffe://prod/head/head/raylet"
    root = Registry(cluster).root()
    leaf = root.leaf(uri, ["10.1.2.3"], key.public_key(), -0.001)
    install(cluster, "raylet", key, pki.pem(leaf))
    policy = str(tmp_path / "policy.toml")
    assert _run("policy", "init", "--output", policy).exit_code == 0
    out = subprocess.run(
        [sys.executable, "-m", "raysandbox", "cluster", "up", "--policy", policy,
         "--cluster", str(cluster.path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 1
    assert "nothing was started" in out.stderr
    for says in ("agent.key: has mode 0644", "raylet.pem: expired", "token: has mode"):
        assert says in out.stderr
    assert "Traceback" not in out.stderr
    assert not (cluster.run / "supervisor.pid").exists()
