"""Identities: what is issued, what is refused, and what a stolen key is good for."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox.cluster import pki
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.pending import install_all, make, sign_all
from raysandbox.cluster.registry import Registry, check_member
from raysandbox.cluster.rolling import due, script
from raysandbox.cluster.settings import (
    CALLERS,
    ClusterDir,
    Member,
    Role,
    read_secret,
    toml_text,
    write_file,
)

ADDRESS = "10.1.2.3"


def make_cluster(path: Path, name: str = "prod") -> ClusterDir:
    """Make a cluster directory of a head, as `cluster init` does."""
    path.mkdir(mode=0o700)
    write_file(path / "cluster.toml", f'name = "{name}"\nhead_address = "{ADDRESS}"\n')
    member = Member(role="head", name="head", addresses=(ADDRESS,))
    write_file(path / "member.toml", toml_text(member))
    write_file(path / "token", "t" * 64)
    cluster = ClusterDir(path)
    registry = Registry(cluster)
    registry.create()
    registry.issue("head", "head", [ADDRESS], path)
    return cluster


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterDir:
    """A cluster with a head and the node n1 (in ``n1``)."""
    made = make_cluster(tmp_path / "c")
    Registry(made).issue("node", "n1", ["10.1.2.4"], tmp_path / "n1")
    return made


def _modes(path: Path) -> dict[str, int]:
    return {
        str(file.relative_to(path)): file.stat().st_mode & 0o777
        for file in path.rglob("*")
    }


def test_secrets_are_for_their_owner_alone(cluster: ClusterDir, tmp_path: Path) -> None:
    """Keys, token and index have mode 0600 and directories 0700, whatever the umask."""
    old = os.umask(0)
    try:
        Registry(cluster).issue("driver", "alice", [ADDRESS], tmp_path / "alice")
    finally:
        os.umask(old)
    for root in (cluster.path, tmp_path / "n1", tmp_path / "alice"):
        for name, mode in _modes(root).items():
            if name.endswith((".key", "token", "index.json")):
                assert mode == 0o600, name
            elif (root / name).is_dir():
                assert mode == 0o700, name
            assert not mode & 0o022, name


def test_every_component_checks_out(cluster: ClusterDir, tmp_path: Path) -> None:
    """What was issued passes the checks that a start makes, without a warning."""
    for directory in (cluster, ClusterDir(tmp_path / "n1")):
        member = directory.member()
        for component in pki.COMPONENTS[member.role]:
            assert pki.check_identity(
                directory, component, addresses=member.addresses
            ) == []  # fmt: skip
            leaf, _ = pki.load_chain(directory.cert(component))
            assert pki.identity_of(leaf) == (
                f"spiffe://prod/{member.role}/{member.name}/{component}"
            )
        assert pki.check_workers(directory) == []


def _replace(cluster: ClusterDir, issuer: pki.Issuer, uri: str, **how: object) -> None:
    """Put a certificate of the given issuer in the place of the driver's."""
    key = pki.new_key()
    leaf = issuer.leaf(uri, [ADDRESS], key.public_key(), **how)  # type: ignore[arg-type]
    write_file(cluster.key("raylet"), pki.key_pem(key))
    write_file(cluster.cert("raylet"), pki.pem(leaf), 0o644)


RAYLET = "spiffe://prod/head/head/raylet"


def _wrong_ca(cluster: ClusterDir) -> None:
    _replace(cluster, pki.Issuer.root("prod cluster CA"), RAYLET)


def _expired(cluster: ClusterDir) -> None:
    _replace(cluster, Registry(cluster).root(), RAYLET, days=-0.001)


def _wrong_role(cluster: ClusterDir) -> None:
    _replace(cluster, Registry(cluster).root(), "spiffe://prod/node/head/raylet")


def _wrong_name(cluster: ClusterDir) -> None:
    _replace(cluster, Registry(cluster).root(), "spiffe://prod/head/other/raylet")


def _wrong_cluster(cluster: ClusterDir) -> None:
    _replace(cluster, Registry(cluster).root(), "spiffe://test/head/head/raylet")


def _other_key(cluster: ClusterDir) -> None:
    shutil.copy(cluster.key("agent"), cluster.key("raylet"))


def _no_key(cluster: ClusterDir) -> None:
    write_file(cluster.key("raylet"), b"-----BEGIN nonsense")


def _rsa_key(cluster: ClusterDir) -> None:
    key = rsa.generate_private_key(65537, 2048)
    write_file(
        cluster.key("raylet"),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )  # fmt: skip


def _no_cert(cluster: ClusterDir) -> None:
    write_file(cluster.cert("raylet"), b"\xff\xfe", 0o644)


def _open_key(cluster: ClusterDir) -> None:
    cluster.key("raylet").chmod(0o644)


def _group_key(cluster: ClusterDir) -> None:
    cluster.key("raylet").chmod(0o640)


def _linked_key(cluster: ClusterDir) -> None:
    cluster.key("raylet").rename(cluster.path / "elsewhere")
    cluster.key("raylet").symlink_to(cluster.path / "elsewhere")


def _fifo_key(cluster: ClusterDir) -> None:
    cluster.key("raylet").unlink()
    os.mkfifo(cluster.key("raylet"), 0o600)


def _empty_key(cluster: ClusterDir) -> None:
    write_file(cluster.key("raylet"), b"")


def _missing_key(cluster: ClusterDir) -> None:
    cluster.key("raylet").unlink()


def _writable_cert(cluster: ClusterDir) -> None:
    cluster.cert("raylet").chmod(0o666)


def _writable_ca(cluster: ClusterDir) -> None:
    cluster.ca_cert.chmod(0o664)


def _leaf_as_ca(cluster: ClusterDir) -> None:
    """Sign with the key of another leaf, and send that along as the issuer."""
    agent, _ = pki.load_chain(cluster.cert("agent"))
    rogue = pki.Issuer(agent, pki.load_key(cluster.key("agent")))
    _replace(cluster, rogue, RAYLET)
    pem = cluster.cert("raylet").read_bytes() + pki.pem(agent)
    write_file(cluster.cert("raylet"), pem, 0o644)


def _workers_issuer(cluster: ClusterDir) -> None:
    """Sign a member's certificate with the node's issuer of workers."""
    path = cluster.workers
    issuer = pki.Issuer.load(path / "issuer.pem", path / "issuer.key")
    _replace(cluster, issuer, "spiffe://prod/operator/root/cli")


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (_wrong_ca, "was not signed by"),
        (_expired, "expired on"),
        (_wrong_role, "is for spiffe://prod/node/head/raylet, not for"),
        (_wrong_name, "is for spiffe://prod/head/other/raylet, not for"),
        (_wrong_cluster, "is for spiffe://test"),
        (_other_key, "does not belong to its key"),
        (_no_key, "is not a private key"),
        (_rsa_key, "is not an elliptic-curve key"),
        (_no_cert, "is not a certificate"),
        (_open_key, "has mode 0644, so others can use it"),
        (_group_key, "has mode 0640"),
        (_linked_key, "is a link"),
        (_fifo_key, "is not a plain file"),
        (_empty_key, "is empty"),
        (_missing_key, "can't be read: No such file"),
        (_writable_cert, "so others can change it"),
        (_writable_ca, "so others can change it"),
        (_leaf_as_ca, "is no CA"),
        (_workers_issuer, "is for spiffe://prod/operator/root/cli"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_bad_identity_is_refused(
    cluster: ClusterDir, attack: Callable[[ClusterDir], None], says: str
) -> None:
    """Each is named with its file; before the attack the identity was good."""
    pki.check_identity(cluster, "raylet")
    attack(cluster)
    with pytest.raises(ClusterError, match=says) as caught:
        pki.check_identity(cluster, "raylet")
    assert str(cluster.path) in str(caught.value)


def test_clock_that_is_behind_is_named(
    cluster: ClusterDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate from the future says what both clocks say, and the remedy."""
    past = dt.datetime.now(dt.timezone.utc) - dt.timedelta(hours=1)
    monkeypatch.setattr(pki, "_now", lambda: past)
    with pytest.raises(ClusterError, match="this machine's clock says") as caught:
        pki.check_identity(cluster, "raylet")
    assert "NTP" in caught.value.remedy


def test_clock_that_is_behind_by_minutes_is_fine(
    cluster: ClusterDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that were just set up differ by a few minutes."""
    past = dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=4)
    monkeypatch.setattr(pki, "_now", lambda: past)
    assert pki.check_identity(cluster, "raylet") == []


def test_expiry_warns_thirty_days_ahead(cluster: ClusterDir) -> None:
    """A warning names the file, the days left and the command."""
    _replace(cluster, Registry(cluster).root(), RAYLET, days=29.5)
    (warning,) = pki.check_identity(cluster, "raylet")
    assert "expires in 29 days" in warning
    assert "certs renew head/head" in warning


def test_address_that_is_not_in_the_certificate_is_refused(cluster: ClusterDir) -> None:
    """Ray dials by address and would fail later and less clearly."""
    with pytest.raises(ClusterError, match=r"is not for address 10\.9\.9\.9"):
        pki.check_identity(cluster, "raylet", addresses=["10.9.9.9"])


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_key_of_another_user_is_refused(cluster: ClusterDir) -> None:
    """Whoever owns the file can change it at any time."""
    os.chown(cluster.key("raylet"), 65534, -1)
    with pytest.raises(ClusterError, match="belongs to uid 65534"):
        pki.check_identity(cluster, "raylet")


def test_directory_that_others_may_write_is_refused(cluster: ClusterDir) -> None:
    """In it another CA could take the place of ours between two starts."""
    cluster.path.chmod(0o777)
    with pytest.raises(ClusterError, match="has mode 0777"):
        ClusterDir(cluster.path)


BAD_NAMES = [
    "", ".", "..", "../x", "a/b", "a/../b", "/etc", "a\n", "a\0b", "A", "a b", "é",
    "-a", "a-", "a" * 64, "a%2fb", "a\\b", "*", "a;b", "$(x)",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_with_a_trick_is_refused(name: str) -> None:
    """A name becomes part of a path, a URI, a pattern and a configuration."""
    with pytest.raises(ClusterError, match="name"):
        check_member("node", name, [ADDRESS])


@given(st.text(max_size=70))
def test_accepted_names_are_plain(name: str) -> None:
    """Whatever is accepted has no character with a meaning anywhere."""
    try:
        check_member("node", name, [ADDRESS])
    except ClusterError:
        return
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert name.strip(".-") == name


@pytest.mark.parametrize(
    ("role", "addresses", "says"),
    [
        ("worker", [ADDRESS], "workers get theirs from their node"),
        ("root", [ADDRESS], "is none of"),
        ("node", [], "needs at least one address"),
        ("node", ["host.example"], "is no IP address"),
        ("node", ["0.0.0.0"], "is nobody's own"),
        ("driver", ["a b"], "neither an IP address nor a host name"),
        ("driver", ["a\n"], "neither an IP address nor a host name"),
    ],
)
def test_member_that_can_not_be_is_refused(
    role: str, addresses: list[str], says: str
) -> None:
    """Each with the rule that it breaks."""
    with pytest.raises(ClusterError, match=says):
        check_member(role, "n1", addresses)


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf"), 1e9])
def test_lifetime_that_makes_no_sense_is_refused(
    cluster: ClusterDir, tmp_path: Path, days: float
) -> None:
    """Nothing is issued then."""
    before = len(Registry(cluster).records())
    with pytest.raises(ClusterError, match="days"):
        Registry(cluster).issue("driver", "d", [ADDRESS], tmp_path / "d", days)
    assert len(Registry(cluster).records()) == before
    assert not (tmp_path / "d").exists()


def test_second_certificate_of_a_name_is_refused(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """One name is one member, until it is renewed or revoked.

    So for a node that would be named as the head is, whose workers it could mint.
    """
    registry = Registry(cluster)
    for role, name in (("node", "n1"), ("node", "head")):
        with pytest.raises(ClusterError, match="has a valid certificate already"):
            registry.issue(role, name, [ADDRESS], tmp_path / "again")
    registry.revoke("node/n1")
    assert registry.issue("node", "n1", [ADDRESS], tmp_path / "again")


def test_one_members_directory_is_not_anothers(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """An identity is not written over another's, nor among other files."""
    registry = Registry(cluster)
    for out in (cluster.path, tmp_path / "n1"):
        with pytest.raises(ClusterError, match="belongs to"):
            registry.issue("operator", "ops", [], out)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ClusterError, match="not empty"):
        registry.issue("operator", "ops", [], tmp_path / "home")


def test_revoked_serials_are_in_the_list(cluster: ClusterDir, tmp_path: Path) -> None:
    """All of a node's certificates, the old ones and its workers' issuer too."""
    registry = Registry(cluster)
    registry.issue("node", "n1", ["10.1.2.4"], tmp_path / "n1", renew=True)
    Registry(cluster).issue("node", "n10", ["10.1.2.5"], tmp_path / "n10")
    gone = registry.revoke("node/n1")
    assert len(gone) == 8
    crl = x509.load_pem_x509_crl((cluster.trust / "root.crl").read_bytes())
    revoked = {entry.serial_number for entry in crl}
    for record in registry.records():
        mine = "/n1/" in record.uri
        assert (record.serial in revoked) == mine
        assert (record.state() == "revoked") == mine


@pytest.mark.parametrize("role", CALLERS)
def test_who_speaks_to_the_guard_alone_has_another_ca(
    cluster: ClusterDir, tmp_path: Path, role: Role
) -> None:
    """Raylets and workers take all that the cluster's CA has signed, for anything.

    Positive control: a driver's, which they must take.
    """
    registry = Registry(cluster)
    ca = pki.load_chain(cluster.ca_cert)[0]
    registry.issue("driver", "alice", [ADDRESS], tmp_path / "alice")
    driver = ClusterDir(tmp_path / "alice")
    pki.load_chain(driver.cert("driver"))[0].verify_directly_issued_by(ca)

    registry.issue(role, "otto", [], tmp_path / "otto")
    otto = ClusterDir(tmp_path / "otto")
    (component,) = pki.COMPONENTS[role]
    assert pki.check_identity(otto, component) == []
    (leaf,) = pki.load_chain(otto.cert(component))
    with pytest.raises(ValueError, match=r"[Ii]ssuer"):
        leaf.verify_directly_issued_by(ca)
    assert pki.issuers(cluster)[role] == leaf.issuer.rfc4514_string()

    def revoked() -> bool:
        crl = x509.load_pem_x509_crl((cluster.trust / "callers.crl").read_bytes())
        return leaf.serial_number in {entry.serial_number for entry in crl}

    assert not revoked()
    registry.revoke(f"{role}/otto")
    assert revoked()

    key = pki.new_key()
    uri = f"spiffe://prod/{role}/otto/{component}"
    write_file(otto.key(component), pki.key_pem(key))
    other = registry.root().leaf(uri, [], key.public_key())
    write_file(otto.cert(component), pki.pem(other), 0o644)
    with pytest.raises(ClusterError, match=r"was not signed by .*callers.pem"):
        pki.check_identity(otto, component)


@pytest.mark.parametrize(
    "wanted", ["", "node", "node/", "/", "spiffe://prod/", "node/n1/raylet/x", "node/n"]
)
def test_revocation_needs_a_whole_name(cluster: ClusterDir, wanted: str) -> None:
    """A word too few does not revoke a role or everybody."""
    with pytest.raises(ClusterError, match=r"must be role/name|no valid certificate"):
        Registry(cluster).revoke(wanted)
    assert all(r.state() == "valid" for r in Registry(cluster).records())


def test_lost_index_takes_no_revocation_back(cluster: ClusterDir) -> None:
    """Without it, the next list would be empty: so nothing is issued any more."""
    registry = Registry(cluster)
    registry.revoke("node/n1")
    index = cluster.ca / "index.json"
    kept = index.read_bytes()
    for damage in (b"", b"[{}]", b"{", b"[1]"):
        index.write_bytes(damage)
        with pytest.raises(ClusterError, match=r"index\.json"):
            registry.revoke("head/head")
    index.unlink()
    with pytest.raises(ClusterError, match="is missing"):
        registry.records()
    write_file(index, kept)
    assert registry.records()


def test_issued_is_remembered_before_it_is_given_out(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """A certificate whose directory could not be written can still be revoked."""
    (tmp_path / "file").write_text("")
    with pytest.raises((ClusterError, OSError)):
        Registry(cluster).issue("driver", "d", [ADDRESS], tmp_path / "file" / "d")
    assert Registry(cluster).revoke("driver/d") == ["spiffe://prod/driver/d/driver"]


# -- requests whose keys stay where they were made ---------------------------------


def test_member_with_keys_of_its_own(cluster: ClusterDir, tmp_path: Path) -> None:
    """A node makes its keys, the operator signs, the node installs.

    Old keys go only when all new certificates are good.
    """
    registry = Registry(cluster)
    node = registry.bundle("node", "n2", ["10.1.2.5"], tmp_path / "n2")
    make(node)
    requests, signed = tmp_path / "requests", tmp_path / "signed"
    requests.mkdir()
    for file in (node.path / "pending").iterdir():
        if file.suffix != ".key":
            shutil.copy(file, requests)
    sign_all(registry, requests, "node", "n2", ["10.1.2.5"], signed, 100)
    assert not list(signed.glob("*.key"))
    good = (signed / "agent.pem").read_bytes()
    shutil.copy(cluster.cert("agent"), signed / "agent.pem")
    with pytest.raises(ClusterError, match="does not belong to its key"):
        install_all(node, signed)
    assert not node.cert("raylet").exists()
    (signed / "agent.pem").write_bytes(good)
    install_all(node, signed)
    for component in pki.COMPONENTS["node"]:
        assert pki.check_identity(node, component, addresses=["10.1.2.5"]) == []
    assert pki.check_workers(node) == []
    assert len(registry.revoke("node/n2")) == 4
    with pytest.raises(ClusterError, match="pending"):
        install_all(node, signed)


def test_guard_does_without_no_ca_of_observers(cluster: ClusterDir) -> None:
    """As if it were external, the cluster's CA would sign operators; it is not silent.

    Also where the CA's keys are kept elsewhere. Positive control: as it was made.
    """
    registry = Registry(cluster)
    assert registry.crls()
    kept = cluster.callers_cert.read_bytes()
    cluster.callers_cert.unlink()
    with pytest.raises(ClusterError, match=r"callers.pem: is missing"):
        registry.crls()
    (cluster.ca / "root.key").rename(cluster.ca / "elsewhere")
    with pytest.raises(ClusterError, match=r"callers.pem: is missing"):
        registry.crls()
    cluster.callers_cert.write_bytes(kept)
    (cluster.trust / "callers.crl").unlink()
    with pytest.raises(ClusterError, match=r"callers.crl: is missing"):
        registry.crls()


def test_observer_s_own_key_is_signed_by_its_own_ca(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """And one that the CA of nodes signed is not installed."""
    registry = Registry(cluster)
    otto = registry.bundle("observer", "otto", [], tmp_path / "otto")
    make(otto)
    signed = tmp_path / "signed"
    sign_all(registry, otto.path / "pending", "observer", "otto", [], signed, 100)
    good = (signed / "cli.pem").read_bytes()
    public = x509.load_pem_x509_certificate(good).public_key()
    uri = "spiffe://prod/observer/otto/cli"
    bad = registry.root().leaf(uri, [], public)  # type: ignore[arg-type]
    (signed / "cli.pem").write_bytes(pki.pem(bad))
    with pytest.raises(ClusterError, match="was not signed by"):
        install_all(otto, signed)
    (signed / "cli.pem").write_bytes(good)
    install_all(otto, signed)
    assert pki.check_identity(otto, "cli") == []


@pytest.mark.parametrize(
    ("uri", "addresses", "says"),
    [
        ("spiffe://prod/operator/ops/cli", [], "asks for spiffe://prod/operator"),
        ("spiffe://prod/driver/eve/driver", [], "asks for spiffe://prod/driver/eve"),
        ("spiffe://test/driver/bob/driver", [], "asks for spiffe://test"),
        ("spiffe://prod/driver/bob/driver/../../../operator/ops/cli", [], "asks for"),
        ("spiffe://prod/driver/bob/driver", ["10.1.2.3"], "asks for 10.1.2.3"),
        ("spiffe://prod/driver/bob/driver", ["head.example"], "asks for head.example"),
    ],
)
def test_request_for_another_identity_is_refused(
    cluster: ClusterDir, uri: str, addresses: list[str], says: str
) -> None:
    """Who is signed for is the operator's to say; a request that differs is told."""
    registry = Registry(cluster)
    key = pki.new_key()
    good = pki.make_csr("spiffe://prod/driver/bob/driver", ["10.8.8.8"], key)
    assert registry.sign(good, "driver", "bob", "driver", ["10.8.8.8"])
    before = len(registry.records())
    with pytest.raises(ClusterError, match=says):
        registry.sign(
            pki.make_csr(uri, addresses, key), "driver", "bob", "driver", ["10.8.8.8"]
        )
    assert len(registry.records()) == before


def test_request_can_not_smuggle_extensions(cluster: ClusterDir) -> None:
    """Nothing but the key is taken from a request: it can't make itself a CA."""
    key = pki.new_key()
    uri = "spiffe://prod/driver/bob/driver"
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(pki._name("workers of n1"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(pki._sans(uri, []), False)
        .sign(key, hashes.SHA256())
    )
    pem = csr.public_bytes(serialization.Encoding.PEM)
    cert = x509.load_pem_x509_certificate(
        Registry(cluster).sign(pem, "driver", "bob", "driver", ["10.8.8.8"])
    )
    basic = cert.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca
    assert cert.subject.rfc4514_string() == "CN=prod/driver/bob/driver"


def test_workers_issuer_is_asked_for_under_its_own_name(cluster: ClusterDir) -> None:
    """A node's request for the issuer of another node's workers is refused."""
    key = pki.new_key()
    csr = pki.make_workers_csr("prod", "n1", [ADDRESS], key)
    crl = pki.empty_crl("n2", key)
    with pytest.raises(ClusterError, match="asks for CN=workers of n1"):
        Registry(cluster).sign(csr, "node", "n2", "workers", [ADDRESS], 9, crl)
    csr = pki.make_workers_csr("prod", "n2", [ADDRESS], key)
    for bad in (b"", pki.empty_crl("n2", pki.new_key()), pki.empty_crl("n1", key)):
        with pytest.raises(ClusterError, match="revocation list"):
            Registry(cluster).sign(csr, "node", "n2", "workers", [ADDRESS], 9, bad)
    assert Registry(cluster).sign(csr, "node", "n2", "workers", [ADDRESS], 9, crl)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_request_or_list_are_an_error(data: bytes) -> None:
    """Nothing but a ClusterError comes of foreign bytes."""
    armour = b"-----BEGIN %s-----\n%s\n-----END %s-----\n"
    for load, kind in (
        (pki.load_csr, b"CERTIFICATE REQUEST"), (pki.load_crl, b"X509 CRL"),
    ):  # fmt: skip
        import base64

        for text in (data, armour % (kind, base64.encodebytes(data), kind)):
            with pytest.raises(ClusterError):
                load(text)


def test_external_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an external CA, requests go out, certificates and lists come in.

    The cluster holds no key that could sign a member.
    """
    from cryptography.x509 import load_pem_x509_certificate as load

    ca = pki.Issuer.root("Example Corp CA 7")
    path = tmp_path / "c"
    path.mkdir(mode=0o700)
    write_file(path / "cluster.toml", f'name = "prod"\nhead_address = "{ADDRESS}"\n')
    member = Member(role="head", name="head", addresses=(ADDRESS,))
    write_file(path / "member.toml", toml_text(member))
    head = ClusterDir(path)
    registry = Registry(head)
    registry.adopt(ca.cert)
    with pytest.raises(ClusterError, match="holds no CA key"):
        registry.issue("driver", "alice", [ADDRESS], tmp_path / "alice")
    signed = tmp_path / "signed"
    signed.mkdir()
    for csr_path, uri in make(head):
        csr = x509.load_pem_x509_csr(csr_path.read_bytes())
        public = csr.public_key()
        cert = (
            ca.sub_for("prod", "head", [ADDRESS], 90, public)  # type: ignore[arg-type]
            if csr_path.stem == "workers"
            else ca.leaf(uri, [ADDRESS], public, 90)  # type: ignore[arg-type]
        )
        (signed / f"{csr_path.stem}.pem").write_bytes(pki.pem(cert))
    install_all(head, signed)
    for component in pki.COMPONENTS["head"]:
        assert pki.check_identity(head, component, addresses=[ADDRESS]) == []
    serial = load((signed / "cli.pem").read_bytes()).serial_number
    now = dt.datetime.now(dt.timezone.utc)
    with pytest.raises(ClusterError, match="certs trust CRL"):
        registry.crls()
    assert "Example" in registry.trust(ca.crl([(serial, now)]))
    with pytest.raises(ClusterError, match="was not signed by"):
        registry.trust(pki.Issuer.root("Example Corp CA 7").crl([]))
    with monkeypatch.context() as patch:
        yesterday = now - dt.timedelta(days=1)
        patch.setattr(pki, "_now", lambda: yesterday)
        replayed = ca.crl([])
    with pytest.raises(ClusterError, match="older than the one in force"):
        registry.trust(replayed)
    crls = x509.load_pem_x509_crl((head.trust / "root.crl").read_bytes())
    assert [entry.serial_number for entry in crls] == [serial]
    assert len(list(head.trust.glob("*.crl"))) == 2


@pytest.mark.parametrize("name", ['x", evil()--', "a+b", "é", "a\\b"])
def test_external_ca_with_an_odd_name_is_refused(
    cluster: ClusterDir, name: str
) -> None:
    """Its name is compared as text by the guard, which must not depend on quoting."""
    with pytest.raises(ClusterError, match="must have letters"):
        Registry(cluster).adopt(pki.Issuer.root(name).cert)


def test_external_ca_must_be_one(cluster: ClusterDir) -> None:
    """A leaf, and a CA that may have none below it, are no CA of a cluster."""
    leaf = pki.load_chain(cluster.cert("agent"))[0]
    sub = pki.load_chain(cluster.workers / "issuer.pem")[0]
    for cert in (leaf, sub):
        with pytest.raises(ClusterError, match="must be a CA"):
            Registry(cluster).adopt(cert)


# -- renewal ------------------------------------------------------------------------


def test_rolling_script_names_the_due_in_order(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """Nodes, then the others, the head last; those with time left are not in it."""
    registry = Registry(cluster)
    registry.issue("driver", "alice", [ADDRESS], tmp_path / "a", 10)
    registry.issue("node", "n2", ["10.1.2.5"], tmp_path / "n2", 10)
    assert set(due(registry, 30)) == {"driver/alice", "node/n2"}
    text = script(registry, within_days=400, days=365, there="/etc/it's here")
    order = [text.index(f"echo {m}") for m in ("node/n2", "driver/alice", "head/head")]
    assert order == sorted(order)
    assert "there='/etc/it'\"'\"'s here'" in text
    assert "node/n1" not in script(registry, within_days=30, days=365, there="/x")
    registry.issue("node", "n2", ["10.1.2.5"], tmp_path / "n2", renew=True)
    assert "node/n2" not in due(registry, 30)


def test_secret_is_read_whole_and_bounded(tmp_path: Path) -> None:
    """A key file is not a way to make a process eat memory."""
    path = tmp_path / "key"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    path.chmod(0o600)
    with pytest.raises(ClusterError, match="is larger than"):
        read_secret(path)


def test_list_as_json_is_stable(cluster: ClusterDir) -> None:
    """What scripts read: serial, uri, end, addresses, revoked."""
    row = Registry(cluster).records()[0].as_json()
    assert sorted(row) == ["addresses", "end", "revoked", "serial", "uri"]
    json.dumps(row)


def test_list_that_ends_soon_is_named_ahead(tmp_path: Path) -> None:
    """A company's CA makes a list each week; one that lapses stops everybody.

    Soon is the last quarter of its life.
    """
    cluster = make_cluster(tmp_path / "c")
    registry = Registry(cluster)
    assert registry.lists_end() == []
    issuer, now = pki.Issuer.root("Example Corp CA 8"), pki._now()
    for days, warned in ((6, False), (1, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pki, "_now", lambda d=days: now - dt.timedelta(days=7 - d))
            made = pki._crl(
                issuer.cert.subject, issuer.key, now + dt.timedelta(days), []
            )
        write_file(cluster.trust / "corp.crl", made)
        assert [file.name for file, _ in registry.lists_end()] == ["corp.crl"] * warned
