"""Certificates of a cluster: who is who.

Identities are URIs, ``spiffe://<cluster>/<role>/<name>/<component>``. Four
kinds of issuer exist::

    cluster CA        signs every member's leaf, and the workers' issuers
      └ workers of N  on node N; signs one short-lived leaf per worker process
    guard CA          signs one leaf, the guard's as a client of the real GCS
    server anchor     not an issuer: the cluster CA's name and key, with an
                      extended key usage of serverAuth alone

The last two are how nothing but the guard reaches the real GCS. Ray gives a
process one certificate and one set of anchors for both of its roles. The GCS
gets {server anchor, guard CA}: as a client it can verify every raylet and
worker, as a server it accepts only what the guard CA signed, because a client
chain that ends in the server anchor has the wrong purpose (RFC 5280 4.2.1.12;
checked by OpenSSL and BoringSSL for every certificate of a chain).

Keys are P-256: a handshake costs a starting worker 1 ms, not 10.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import (
    NAME,
    ROLES,
    ClusterDir,
    Member,
    Role,
    read_secret,
    write_file,
)

__all__ = [
    "COMPONENTS",
    "Issuer",
    "Record",
    "Registry",
    "check_identity",
    "describe",
    "identity_of",
    "make_csr",
    "mint_worker",
]

COMPONENTS: dict[str, tuple[str, ...]] = {
    "head": ("gcs", "guard", "raylet", "agent", "dashboard", "monitor", "cli"),
    "node": ("raylet", "agent", "cli"),
    "worker": ("worker",),
    "driver": ("driver",),
    "client": ("client",),
    "operator": ("cli",),
    "observer": ("cli",),
}
CA_DAYS = 3650
LEAF_DAYS = 365
WORKER_DAYS = 30
WARN_DAYS = 30
# Clocks of machines that were just set up differ by more than NTP's milliseconds.
BACKDATE = dt.timedelta(minutes=5)

Key = ec.EllipticCurvePrivateKey


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def _in(days: float) -> dt.datetime:
    return _now() + dt.timedelta(days=days)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(cert: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def new_key() -> Key:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def load_key(path: Path) -> Key:
    """Load a private key; ClusterError when it is unreadable, open or no key."""
    try:
        key = serialization.load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError) as error:
        raise ClusterError(
            where=str(path), what=f"is not a private key in PEM: {error}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ClusterError(where=str(path), what="is not an elliptic-curve key")
    return key


def load_chain(path: Path) -> list[x509.Certificate]:
    """Load the certificates of a PEM file, leaf first."""
    try:
        chain = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ClusterError(
            where=str(path),
            what=f"can't be read: {error.strerror}",
            remedy="issue the certificate again, or run as the directory's owner",
        ) from None
    except ValueError as error:
        raise ClusterError(
            where=str(path), what=f"is not a certificate in PEM: {error}"
        ) from None
    return chain


def identity_of(cert: x509.Certificate) -> str:
    """Return the one URI SAN of a certificate, or ``""``."""
    try:
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ""
    uris = san.value.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 else ""


def _sans(uri: str, addresses: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    # gRPC checks a server's address against these; Ray dials by IP and, for
    # itself, by loopback.
    for address in dict.fromkeys([*addresses, "127.0.0.1", "localhost"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    return x509.SubjectAlternativeName(names)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    )


_CA_USAGE = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
    encipher_only=False, decipher_only=False,
)  # fmt: skip
_LEAF_USAGE = x509.KeyUsage(
    digital_signature=True, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=False, crl_sign=False,
    encipher_only=False, decipher_only=False,
)  # fmt: skip
_BOTH = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


class Issuer:
    """A CA certificate and its key."""

    def __init__(self, cert: x509.Certificate, key: Key) -> None:
        self.cert, self.key = cert, key

    @classmethod
    def root(cls, common_name: str) -> Issuer:
        """Make a self-signed CA that may have one level of CAs below it."""
        key, name = new_key(), _name(common_name)
        cert = (
            _builder(name, name, key.public_key(), _in(CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), True)
            .add_extension(_CA_USAGE, True)
            .sign(key, hashes.SHA256())
        )
        return cls(cert, key)

    @classmethod
    def load(cls, cert: Path, key: Path) -> Issuer:
        """Load a CA; ClusterError when certificate and key do not belong together."""
        issuer = cls(load_chain(cert)[0], load_key(key))
        if issuer.cert.public_key() != issuer.key.public_key():
            raise ClusterError(
                where=str(key), what=f"is not the key of {cert}: another CA's?"
            )
        return issuer

    def sub(self, common_name: str, days: int = LEAF_DAYS) -> Issuer:
        """Make a CA below this one that can sign leaves alone."""
        key = new_key()
        cert = (
            _builder(
                _name(common_name), self.cert.subject, key.public_key(), self._end(days)
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(_CA_USAGE, True)
            .add_extension(self._authority(), False)
            .sign(self.key, hashes.SHA256())
        )
        return Issuer(cert, key)

    def leaf(
        self,
        uri: str,
        addresses: Sequence[str],
        public: ec.EllipticCurvePublicKey,
        days: float = LEAF_DAYS,
    ) -> x509.Certificate:
        """Sign a leaf for an identity, good as server and as client."""
        subject = _name(uri.removeprefix("spiffe://")[-64:])
        return (
            _builder(subject, self.cert.subject, public, self._end(days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(_LEAF_USAGE, True)
            .add_extension(x509.ExtendedKeyUsage(_BOTH), False)
            .add_extension(_sans(uri, addresses), False)
            .add_extension(self._authority(), False)
            .sign(self.key, hashes.SHA256())
        )

    def _end(self, days: float) -> dt.datetime:
        return min(_in(days), self.cert.not_valid_after_utc)

    def crl(self, revoked: Sequence[tuple[int, dt.datetime]]) -> bytes:
        """Sign a list of revoked serial numbers, as PEM.

        It lives as long as the CA: a list that ran out would refuse everybody,
        and each revocation writes a new one anyhow.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.cert.subject)
            .last_update(_now() - BACKDATE)
            .next_update(self.cert.not_valid_after_utc)
            .add_extension(self._authority(), False)
            .add_extension(x509.CRLNumber(int(_now().timestamp() * 1000)), False)
        )
        for serial, when in revoked:
            entry = (
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(when)
                .build()
            )
            builder = builder.add_revoked_certificate(entry)
        return _pem(builder.sign(self.key, hashes.SHA256()))

    def _authority(self) -> x509.AuthorityKeyIdentifier:
        public = self.cert.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("not a key on an elliptic curve")
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)


def server_anchor(ca: x509.Certificate) -> x509.Certificate:
    """Return the CA's name and key as an anchor for servers alone.

    An anchor's own signature proves nothing and is checked by nobody, so this
    needs no CA key and works for an external CA as well.
    """
    public = ca.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ClusterError(
            where="ca.pem", what="the CA's key is not an elliptic-curve key"
        )
    return (
        _builder(ca.subject, ca.subject, public, ca.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), True)
        .add_extension(_CA_USAGE, True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), True)
        .sign(new_key(), hashes.SHA256())
    )


class Record:
    """One issued certificate, as the registry remembers it."""

    def __init__(
        self, *, serial: int, uri: str, addresses: Sequence[str], end: str,
        revoked: str = "",
    ) -> None:  # fmt: skip
        self.serial, self.uri, self.addresses = serial, uri, tuple(addresses)
        self.end, self.revoked = end, revoked

    @property
    def expires(self) -> dt.datetime:
        """When it stops being valid."""
        return dt.datetime.fromisoformat(self.end)

    def state(self) -> str:
        """Return revoked, expired, expiring or valid."""
        if self.revoked:
            return "revoked"
        left = self.expires - _now()
        if left <= dt.timedelta(0):
            return "expired"
        return "expiring" if left <= dt.timedelta(days=WARN_DAYS) else "valid"

    def as_json(self) -> dict[str, object]:
        """Return it as the index file holds it."""
        return {
            "serial": f"{self.serial:x}", "uri": self.uri, "end": self.end,
            "addresses": list(self.addresses), "revoked": self.revoked,
        }  # fmt: skip


class Registry:
    """The operator's half: CA keys, issued certificates, revocations."""

    def __init__(self, cluster: ClusterDir) -> None:
        self.dir = cluster
        self.name = cluster.settings().name
        self._index = cluster.ca / "index.json"

    def create(self) -> None:
        """Make the cluster's CA, the guard's CA, the anchors and an empty CRL."""
        self.dir.ca.mkdir(mode=0o700, exist_ok=False)
        root = Issuer.root(f"{self.name} cluster CA")
        self._keep_ca("root", root)
        self.adopt(root.cert)
        self._write([], root)

    def adopt(self, ca: x509.Certificate) -> None:
        """Install a CA certificate (our own or an external one) and the anchors."""
        guard = Issuer.root(f"{self.name} guard CA")
        self.dir.ca.mkdir(mode=0o700, exist_ok=True)
        self.dir.trust.mkdir(mode=0o700, exist_ok=True)
        self.dir.identity.mkdir(mode=0o700, exist_ok=True)
        write_file(self.dir.ca_cert, _pem(ca), 0o644)
        write_file(
            self.dir.trust / "gcs.pem",
            _pem(server_anchor(ca)) + _pem(guard.cert),
            0o644,
        )
        # The guard's inner certificate lives as long as its CA; its CA's key is
        # thrown away, so no second one can ever be made.
        key = new_key()
        public = key.public_key()
        leaf = guard.leaf(
            f"spiffe://{self.name}/guard/inner/client", [], public, CA_DAYS
        )
        write_file(self.dir.key("guard-inner"), _key_pem(key))
        write_file(self.dir.cert("guard-inner"), _pem(leaf), 0o644)

    def root(self) -> Issuer:
        """Load the CA's key, or say that the CA is elsewhere."""
        key = self.dir.ca / "root.key"
        if not key.exists():
            raise ClusterError(
                where=str(key),
                what="this directory holds no CA key",
                remedy="run this where the cluster was made, or use "
                "`raysandbox cluster certs csr` and `certs import` with your own CA",
            )
        return Issuer.load(self.dir.ca_cert, key)

    def issue(
        self,
        role: str,
        name: str,
        addresses: Sequence[str],
        out: Path,
        days: float = LEAF_DAYS,
    ) -> list[str]:
        """Issue every component's certificate of one member into `out`.

        Returns:
            The identities' URIs. Worker certificates are not issued here: a
            head or node gets an issuer of its own for them.
        """
        check_member(role, name, addresses)
        root = self.root()
        made = []
        target = ClusterDir(_mkdir(out))
        _mkdir(target.identity)
        with self._locked() as records:
            for component in COMPONENTS[role]:
                uri = f"spiffe://{self.name}/{role}/{name}/{component}"
                key = new_key()
                cert = root.leaf(uri, addresses, key.public_key(), days)
                write_file(target.key(component), _key_pem(key))
                write_file(target.cert(component), _pem(cert), 0o644)
                records.append(_record(cert, uri, addresses))
                made.append(uri)
            if role in ("head", "node"):
                issuer = root.sub(f"workers of {name}", int(max(days, 1)))
                uri = f"spiffe://{self.name}/worker/{name}/*"
                _mkdir(target.workers)
                write_file(target.workers / "issuer.key", _key_pem(issuer.key))
                write_file(target.workers / "issuer.pem", _pem(issuer.cert), 0o644)
                # The guard checks whole chains against CRLs, so it needs one of
                # each issuer; this one stays empty, a worker's end is its expiry.
                write_file(
                    self.dir.trust / f"workers-{issuer.cert.serial_number:x}.crl",
                    issuer.crl([]),
                    0o644,
                )
                records.append(_record(issuer.cert, uri, addresses))
                made.append(uri)
            self._write(records, root)
        if target.path != self.dir.path:
            self._bundle(
                target,
                Member(role=cast(Role, role), name=name, addresses=tuple(addresses)),
            )
        return made

    def sign_csr(
        self, csr_pem: bytes, uri: str, addresses: Sequence[str], days: float
    ) -> bytes:
        """Sign a request made elsewhere; the identity is ours to say, not its."""
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
        except ValueError as error:
            raise ClusterError(where="request", what=f"is no CSR: {error}") from None
        public = csr.public_key()
        if not csr.is_signature_valid:
            raise ClusterError(where="request", what="its signature is wrong")
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ClusterError(where="request", what="wants an elliptic-curve key")
        root = self.root()
        with self._locked() as records:
            cert = root.leaf(uri, addresses, public, days)
            records.append(_record(cert, uri, addresses))
            self._write(records, root)
        return _pem(cert)

    def revoke(self, prefix: str) -> list[str]:
        """Revoke every valid certificate of a member (``node/node1``) or URI.

        Returns:
            The URIs revoked; the CRL is written before this returns.
        """
        root = self.root()
        path = prefix.removeprefix(f"spiffe://{self.name}/").rstrip("/")
        base = f"spiffe://{self.name}/{path}"
        role, _, name = path.partition("/")
        workers = (
            f"spiffe://{self.name}/worker/{name}/*" if role in ("node", "head") else ""
        )
        gone = []
        with self._locked() as records:
            for record in records:
                mine = record.uri == base or record.uri.startswith(base + "/")
                if (mine or record.uri == workers) and not record.revoked:
                    record.revoked = _now().isoformat()
                    gone.append(record.uri)
            if not gone:
                raise ClusterError(
                    where=prefix,
                    what="no valid certificate of that name",
                    remedy="`raysandbox cluster certs list` shows all",
                )
            self._write(records, root)
        return gone

    def records(self) -> list[Record]:
        """Return all issued certificates, oldest first."""
        if not self._index.exists():
            return []
        rows = json.loads(self._index.read_bytes())
        return [
            Record(
                serial=int(r["serial"], 16), uri=r["uri"], end=r["end"],
                addresses=r["addresses"], revoked=r["revoked"],
            )
            for r in rows
        ]  # fmt: skip

    def crls(self) -> bytes:
        """Return every CRL of the cluster, concatenated."""
        files = sorted(self.dir.trust.glob("*.crl"))
        return b"".join(file.read_bytes() for file in files)

    def _bundle(self, target: ClusterDir, member: Member) -> None:
        """Give a member's directory what it needs besides its identity."""
        settings = (self.dir.path / "cluster.toml").read_bytes()
        write_file(target.path / "cluster.toml", settings, 0o644)
        write_file(target.ca_cert, self.dir.ca_cert.read_bytes(), 0o644)
        write_file(target.token, read_secret(self.dir.token))
        quoted = ", ".join(json.dumps(a) for a in member.addresses)
        write_file(
            target.path / "member.toml",
            f'role = "{member.role}"\nname = "{member.name}"\naddresses = [{quoted}]\n',
            0o644,
        )

    def _keep_ca(self, name: str, issuer: Issuer) -> None:
        write_file(self.dir.ca / f"{name}.key", _key_pem(issuer.key))
        write_file(self.dir.ca / f"{name}.pem", _pem(issuer.cert), 0o644)

    @contextmanager
    def _locked(self) -> Iterator[list[Record]]:
        lock = os.open(
            self.dir.ca / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.records()
        finally:
            os.close(lock)

    def _write(self, records: list[Record], root: Issuer) -> None:
        revoked = [
            (r.serial, dt.datetime.fromisoformat(r.revoked))
            for r in records
            if r.revoked
        ]
        write_file(self._index, json.dumps([r.as_json() for r in records], indent=0))
        write_file(self.dir.trust / "root.crl", root.crl(revoked), 0o644)


def _record(cert: x509.Certificate, uri: str, addresses: Sequence[str]) -> Record:
    return Record(
        serial=cert.serial_number,
        uri=uri,
        addresses=addresses,
        end=cert.not_valid_after_utc.isoformat(),
    )


def _mkdir(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def check_member(role: str, name: str, addresses: Sequence[str]) -> None:
    """Refuse a role, name or address list that no identity can have."""
    if role not in ROLES or role == "worker":
        raise ClusterError(
            where=f"role {role!r}",
            what="is none of head, node, driver, client, operator, observer"
            + (" (workers get theirs from their node)" if role == "worker" else ""),
        )
    if not NAME.match(name):
        raise ClusterError(
            where=f"name {name!r}",
            what="must be lower-case letters, digits, dots and dashes",
        )
    if role in ("head", "node", "driver") and not addresses:
        raise ClusterError(
            where=f"{role}/{name}",
            what="needs at least one address: nodes are bound to theirs, and workers "
            "that answer a driver check where it is",
            remedy="give --address once for each",
        )


def mint_worker(issuer: Issuer, cluster_name: str, name: str,
                addresses: Sequence[str]) -> tuple[bytes, str]:  # fmt: skip
    """Make one worker process's certificate: key, leaf and issuer in one PEM.

    Returns:
        The PEM and the identity's URI.
    """
    key = new_key()
    uri = f"spiffe://{cluster_name}/worker/{name}/{secrets.token_hex(8)}"
    leaf = issuer.leaf(uri, addresses, key.public_key(), WORKER_DAYS)
    return _key_pem(key) + _pem(leaf) + _pem(issuer.cert), uri


def make_csr(uri: str, addresses: Sequence[str]) -> tuple[bytes, bytes]:
    """Make a key and a signing request for an external CA; returns both as PEM."""
    key = new_key()
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(uri.removeprefix("spiffe://")[-64:]))
        .add_extension(_sans(uri, addresses), False)
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def check_identity(
    cluster: ClusterDir, component: str, *, addresses: Sequence[str] = ()
) -> list[str]:
    """Check one component's certificate and key, as a process would use them.

    Returns:
        Warnings (expires soon).

    Raises:
        ClusterError: Missing, unreadable, open to others, not a pair, expired,
            not valid yet (a clock is wrong), of another CA, for another
            identity, or without one of the addresses.
    """
    path, settings, member = (
        cluster.cert(component),
        cluster.settings(),
        cluster.member(),
    )
    chain = load_chain(path)
    leaf, key = chain[0], load_key(cluster.key(component))
    ca = load_chain(cluster.ca_cert)[0]
    again = f"`raysandbox cluster certs renew {member.role}/{member.name}`"
    if leaf.public_key() != key.public_key():
        raise ClusterError(
            where=str(path), what=f"does not belong to {cluster.key(component)}"
        )
    uri = f"spiffe://{settings.name}/{member.role}/{member.name}/{component}"
    if identity_of(leaf) != uri:
        raise ClusterError(
            where=str(path),
            what=f"is for {identity_of(leaf) or 'nobody'}, not for {uri}",
        )
    _check_issued(path, chain, ca, cluster.ca_cert)
    now = _now()
    if leaf.not_valid_before_utc > now:
        raise ClusterError(
            where=str(path),
            what=f"is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M:%S} "
            f"UTC, and this machine's clock says {now:%Y-%m-%d %H:%M:%S} UTC",
            remedy="set this machine's clock (NTP), or that of the CA's machine",
        )
    for cert, what in ((leaf, str(path)), (ca, str(cluster.ca_cert))):
        if cert.not_valid_after_utc <= now:
            raise ClusterError(
                where=what,
                what=f"expired on {cert.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
                remedy=again,
            )
    have = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {str(a) for a in have.get_values_for_type(x509.IPAddress)}
    known |= set(have.get_values_for_type(x509.DNSName))
    for address in addresses:
        if address not in known:
            raise ClusterError(
                where=str(path),
                what=f"is not for address {address}, only for "
                + ", ".join(sorted(known)),
                remedy=f"issue it again with --address {address}",
            )
    left = leaf.not_valid_after_utc - now
    if left < dt.timedelta(days=WARN_DAYS):
        return [f"{path}: expires in {left.days} days; {again}"]
    return []


def _check_issued(
    path: Path, chain: list[x509.Certificate], ca: x509.Certificate, ca_path: Path
) -> None:
    for cert, issuer in zip(chain, [*chain[1:], ca], strict=True):
        try:
            cert.verify_directly_issued_by(issuer)
        except (ValueError, InvalidSignature, TypeError):
            raise ClusterError(
                where=str(path),
                what=f"was not signed by {ca_path}: another cluster's, or another CA's",
                remedy="take both from the same `certs issue`",
            ) from None


def describe(record: Record) -> str:
    """Return role/name/component of a record."""
    return re.sub(r"^spiffe://[^/]+/", "", record.uri)
