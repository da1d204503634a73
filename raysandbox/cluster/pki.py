"""Certificates of a cluster: who is who.

Identities are URIs, ``spiffe://<cluster>/<role>/<name>/<component>``. Five
kinds of issuer exist::

    cluster CA        signs leaves of heads, nodes, drivers, and the workers' issuers
      └ workers of N  on node N; signs one short-lived leaf per worker process
    callers CA        signs leaves of those that speak to the guard alone
    guard CA          signs one leaf, the guard's as a client of the real GCS
    servers CA        signs one certificate: the cluster CA's name and key again,
                      with an extended key usage of serverAuth alone

Raylets and workers take every certificate of the cluster CA for anything: who only
looks at a cluster, or drains its nodes, has none of it. Where the CA is external,
there is no callers CA, and that one signs all.

The last two are how nothing but the guard reaches the real GCS. Ray gives a
process one certificate and one set of anchors for both of its roles. The GCS
gets {servers CA, guard CA}. Members send the servers CA's certificate after their
own: as a client the GCS can verify every raylet and worker through it, as a
server it refuses them, because on a client's way it has the wrong purpose (RFC
5280 4.2.1.12). It must be a certificate on the way and not the anchor: BoringSSL,
which gRPC has, looks at the purposes of what it was sent, never of an anchor.

The registry of what was issued and revoked is in `registry`.

Keys are P-256: a handshake costs a starting worker 1 ms, not 10.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import (
    ClusterDir,
    read_secret,
    read_trusted,
)

__all__ = [
    "COMPONENTS",
    "Issuer",
    "check_identity",
    "check_issuer",
    "check_pair",
    "check_workers",
    "identity_of",
    "issuers",
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
# An actor may live as long as its node's issuer: it can't be given another one.
WORKER_DAYS = LEAF_DAYS
WARN_DAYS = 30
# Clocks of machines that were just set up differ by more than NTP's milliseconds.
BACKDATE = dt.timedelta(minutes=5)

LOCAL = ("127.0.0.1", "localhost")
HOST = re.compile(r"^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?\Z")

Key = ec.EllipticCurvePrivateKey


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def _in(days: float) -> dt.datetime:
    return _now() + dt.timedelta(days=days)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def pem(cert: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key) -> bytes:
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
        chain = x509.load_pem_x509_certificates(read_trusted(path))
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
    uris = _uris(san.value)
    return uris[0] if len(uris) == 1 else ""


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def check_address(address: str, *, ip_only: bool) -> None:
    """Refuse what is no IP address (or host name, where that is allowed)."""
    if _is_ip(address):
        ip = ipaddress.ip_address(address)
        if ip.is_unspecified or ip.is_multicast:
            raise ClusterError(where=f"address {address}", what="is nobody's own")
    elif ip_only or not HOST.match(address):
        raise ClusterError(
            where=f"address {address!r}",
            what="is no IP address; nodes are bound to theirs by the guard"
            if ip_only
            else "is neither an IP address nor a host name",
        )


def _sans(uri: str, addresses: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    # gRPC checks a server's address against these; Ray dials by IP and, for
    # itself, by loopback.
    for address in dict.fromkeys([*addresses, *LOCAL]):
        if _is_ip(address):
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        else:
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


def workers_of(name: str) -> str:
    """Return the common name of a node's issuer; the guard looks for it."""
    return f"workers of {name}"


def _constraints(cluster_name: str, addresses: Sequence[str]) -> x509.NameConstraints:
    hosts = [a for a in addresses if not _is_ip(a)]
    allowed: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(cluster_name),
        *(x509.DNSName(host) for host in dict.fromkeys([*hosts, "localhost"])),
    ]
    return x509.NameConstraints(allowed, None)


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

    def sub(
        self, cluster_name: str, name: str, addresses: Sequence[str], days: float
    ) -> Issuer:
        """Make the issuer of one node's workers: it can sign leaves alone.

        Its name constraints keep it to this cluster's URIs and to the node's host
        names. They can't say which role and which address: URI constraints see
        the host part only (RFC 5280 4.2.1.10), and BoringSSL, which gRPC and Envoy
        use, refuses every chain with constraints on addresses. Role and node are
        what the guard decides by the issuer's own name.
        """
        key = new_key()
        public = key.public_key()
        return Issuer(self.sub_for(cluster_name, name, addresses, days, public), key)

    def sub_for(
        self, cluster_name: str, name: str, addresses: Sequence[str], days: float,
        public: ec.EllipticCurvePublicKey,
    ) -> x509.Certificate:  # fmt: skip
        """Sign the issuer of one node's workers, whose key is elsewhere."""
        subject = _name(workers_of(name))
        return (
            _builder(subject, self.cert.subject, public, self._end(days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(_CA_USAGE, True)
            .add_extension(_constraints(cluster_name, addresses), True)
            .add_extension(self._authority(), False)
            .sign(self.key, hashes.SHA256())
        )

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
        return _crl(self.cert.subject, self.key, self.cert.not_valid_after_utc, revoked)

    def _authority(self) -> x509.AuthorityKeyIdentifier:
        public = self.cert.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise TypeError("not a key on an elliptic curve")
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)


def _crl(
    issuer: x509.Name, key: Key, end: dt.datetime,
    revoked: Sequence[tuple[int, dt.datetime]],
) -> bytes:  # fmt: skip
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer)
        .last_update(_now() - BACKDATE)
        .next_update(end)
        .add_extension(authority, False)
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
    return pem(builder.sign(key, hashes.SHA256()))


def servers_only(
    cluster_name: str, ca: x509.Certificate
) -> tuple[x509.Certificate, x509.Certificate]:
    """Make an anchor, and the way from it to the CA that is good for servers alone.

    Needs no key of the CA, and so works for an external one. The anchor's own key
    is thrown away.
    """
    public = ca.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ClusterError(where="CA", what="its key is not an elliptic-curve key")
    limits = _basic(ca)
    if not limits.ca or limits.path_length == 0:
        raise ClusterError(
            where="CA",
            what="must be a CA that may have another below it (path length 1 or none): "
            "each node has an issuer for its workers",
        )
    # The guard compares the issuer's name as text, and libraries differ in how
    # they write other characters.
    subject = ca.subject.rfc4514_string()
    if not re.fullmatch(r"[A-Za-z0-9 =,._/-]+", subject):
        raise ClusterError(
            where="CA",
            what=f"has the name {subject!r}; it must have letters, digits, spaces and "
            "-._/ alone",
        )
    _check_time(Path("CA"), [ca], "take another CA certificate")
    key, name = new_key(), _name(f"{cluster_name} servers CA")
    anchor = Issuer(
        _builder(name, name, key.public_key(), ca.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=2), True)
        .add_extension(_CA_USAGE, True)
        .sign(key, hashes.SHA256()),
        key,
    )
    way = (
        _builder(ca.subject, name, public, ca.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), True)
        .add_extension(_CA_USAGE, True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), True)
        .add_extension(anchor._authority(), False)
        .sign(key, hashes.SHA256())
    )
    return anchor.cert, way


def issuers(cluster: ClusterDir) -> dict[str, str]:
    """Return the name of each role's issuer; workers' have one of their own."""
    return {
        role: load_chain(cluster.issuer_cert(role))[0].subject.rfc4514_string()
        for role in COMPONENTS
        if role != "worker"
    }


def mint_worker(
    issuer: Issuer, cluster_name: str, name: str, session: str,
    addresses: Sequence[str], way: bytes = b"",
) -> tuple[bytes, str]:  # fmt: skip
    """Make one worker process's certificate: key and chain in one PEM.

    Args:
        issuer: The node's.
        cluster_name: For the identity.
        name: The node's.
        session: Of its raylet, see `raysandbox.cluster.sessions`.
        addresses: The node's.
        way: What members send after their own certificate, see `servers_only`.

    Returns:
        The PEM and the identity's URI.
    """
    key = new_key()
    worker = f"{session}-{secrets.token_hex(8)}"
    uri = f"spiffe://{cluster_name}/worker/{name}/{worker}"
    leaf = issuer.leaf(uri, addresses, key.public_key(), WORKER_DAYS)
    return key_pem(key) + pem(leaf) + pem(issuer.cert) + way, uri


def make_csr(uri: str, addresses: Sequence[str], key: Key) -> bytes:
    """Make a signing request for a member's component, as PEM."""
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(uri.removeprefix("spiffe://")[-64:]))
        .add_extension(_sans(uri, addresses), False)
        .sign(key, hashes.SHA256())
    )
    return csr.public_bytes(serialization.Encoding.PEM)


def make_workers_csr(
    cluster_name: str, name: str, addresses: Sequence[str], key: Key
) -> bytes:
    """Make a signing request for the issuer of a node's workers, as PEM."""
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(workers_of(name)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(_CA_USAGE, True)
        .add_extension(_constraints(cluster_name, addresses), True)
        .sign(key, hashes.SHA256())
    )
    return csr.public_bytes(serialization.Encoding.PEM)


def empty_crl(name: str, key: Key) -> bytes:
    """Make the list of a workers' issuer, before its certificate exists.

    Verifiers want a list of each issuer in a chain; this one stays empty, because
    the end of a worker's certificate is its expiry.
    """
    return _crl(_name(workers_of(name)), key, _in(CA_DAYS), [])


def load_csr(data: bytes) -> x509.CertificateSigningRequest:
    """Load a signing request, or ClusterError."""
    try:
        csr = x509.load_pem_x509_csr(data)
        valid = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ClusterError(where="request", what=f"is no CSR: {error}") from None
    if not valid:
        raise ClusterError(where="request", what="its signature is wrong")
    if not isinstance(csr.public_key(), ec.EllipticCurvePublicKey):
        raise ClusterError(where="request", what="wants an elliptic-curve key")
    return csr


def load_crl(data: bytes) -> x509.CertificateRevocationList:
    """Load a revocation list, or ClusterError."""
    try:
        return x509.load_pem_x509_crl(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ClusterError(
            where="revocation list", what=f"is no CRL in PEM: {error}"
        ) from None


def asked_identity(csr: x509.CertificateSigningRequest) -> tuple[list[str], set[str]]:
    """Return the URIs and the addresses that a request asks for."""
    try:
        found = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return [], set()
    except (ValueError, x509.DuplicateExtension) as error:
        raise ClusterError(where="request", what=f"is malformed: {error}") from None
    return _uris(found.value), _hosts(found.value)


def _uris(san: x509.SubjectAlternativeName) -> list[str]:
    return list(san.get_values_for_type(x509.UniformResourceIdentifier))


def _hosts(san: x509.SubjectAlternativeName) -> set[str]:
    found = {str(a) for a in san.get_values_for_type(x509.IPAddress)}
    return found | set(san.get_values_for_type(x509.DNSName))


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
    path = cluster.cert(component)
    return check_pair(
        cluster, component, path, load_chain(path), load_key(cluster.key(component)),
        addresses=addresses,
    )  # fmt: skip


def check_pair(
    cluster: ClusterDir, component: str, path: Path, chain: list[x509.Certificate],
    key: Key, *, addresses: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Check a chain and a key for one component; see `check_identity`."""
    settings, member = cluster.settings(), cluster.member()
    issuer = cluster.issuer_cert(member.role)
    leaf, ca = chain[0], load_chain(issuer)[0]
    again = f"`raysandbox cluster certs renew {member.role}/{member.name}`"
    if leaf.public_key() != key.public_key():
        raise ClusterError(
            where=str(path), what="does not belong to its key", remedy=again
        )
    uri = f"spiffe://{settings.name}/{member.role}/{member.name}/{component}"
    if identity_of(leaf) != uri:
        raise ClusterError(
            where=str(path),
            what=f"is for {identity_of(leaf) or 'nobody'}, not for {uri}",
        )
    _check_issued(path, chain, ca, issuer)
    _check_use(path, leaf)
    _check_time(path, [*chain, ca], again)
    have = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = _hosts(have)
    for address in (*addresses, *LOCAL):
        if address not in known:
            raise ClusterError(
                where=str(path),
                what=f"is not for address {address}, only for "
                + ", ".join(sorted(known)),
                remedy=f"issue it again with --address {address}",
            )
    return _ends_soon(path, leaf, again)


def check_workers(cluster: ClusterDir) -> list[str]:
    """Check the issuer of this node's workers; see `check_identity`."""
    path = cluster.workers / "issuer.pem"
    return check_issuer(
        cluster, path, load_chain(path), load_key(cluster.workers / "issuer.key")
    )


def check_issuer(
    cluster: ClusterDir, path: Path, chain: list[x509.Certificate], key: Key
) -> list[str]:
    """Check a chain and a key as the issuer of this node's workers."""
    member = cluster.member()
    cert, ca = chain[0], load_chain(cluster.ca_cert)[0]
    again = f"`raysandbox cluster certs renew {member.role}/{member.name}`"
    if cert.public_key() != key.public_key():
        raise ClusterError(
            where=str(path), what="does not belong to its key", remedy=again
        )
    if cert.subject != _name(workers_of(member.name)):
        raise ClusterError(
            where=str(path),
            what=f"is {cert.subject.rfc4514_string()}, and the guard takes workers of "
            f"{member.name} from CN={workers_of(member.name)} alone",
        )
    limits = _basic(cert)
    if not limits.ca or limits.path_length != 0:
        raise ClusterError(where=str(path), what="must be a CA with a path length of 0")
    _check_issued(path, chain, ca, cluster.ca_cert)
    _check_time(path, [*chain, ca], again)
    return _ends_soon(path, cert, again)


def _basic(cert: x509.Certificate) -> x509.BasicConstraints:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return x509.BasicConstraints(ca=False, path_length=None)


def _check_use(path: Path, leaf: x509.Certificate) -> None:
    if _basic(leaf).ca:
        raise ClusterError(where=str(path), what="is a CA's, not a member's")
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    for wanted, word in zip(_BOTH, ("serverAuth", "clientAuth")):
        if wanted not in usage:
            raise ClusterError(
                where=str(path),
                what=f"has no extended key usage {word}: Ray uses one certificate as "
                "server and as client",
            )


def _check_time(path: Path, chain: list[x509.Certificate], again: str) -> None:
    now = _now()
    for cert in chain:
        what = "" if cert is chain[0] else f"({cert.subject.rfc4514_string()}) "
        if cert.not_valid_before_utc > now:
            raise ClusterError(
                where=str(path),
                what=f"{what}is not valid before "
                f"{cert.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC, and this "
                f"machine's clock says {now:%Y-%m-%d %H:%M:%S} UTC",
                remedy="set this machine's clock (NTP), or that of the CA's machine",
            )
        if cert.not_valid_after_utc <= now:
            raise ClusterError(
                where=str(path),
                what=f"{what}expired on {cert.not_valid_after_utc:%Y-%m-%d %H:%M:%S} "
                "UTC",
                remedy=again,
            )


def _ends_soon(path: Path, cert: x509.Certificate, again: str) -> list[str]:
    left = cert.not_valid_after_utc - _now()
    if left < dt.timedelta(days=WARN_DAYS):
        return [f"{path}: expires in {left.days} days; {again}"]
    return []


def _check_issued(
    path: Path, chain: list[x509.Certificate], ca: x509.Certificate, ca_path: Path
) -> None:
    # What members send for the GCS comes last and is another way to the same CA.
    if len(chain) > 1 and (chain[-1].subject, chain[-1].public_key()) == (
        ca.subject, ca.public_key(),
    ):  # fmt: skip
        chain = chain[:-1]
    for index, (cert, issuer) in enumerate(zip(chain, [*chain[1:], ca], strict=True)):
        try:
            cert.verify_directly_issued_by(issuer)
        except (ValueError, InvalidSignature, TypeError):
            raise ClusterError(
                where=str(path),
                what=f"was not signed by {ca_path}: another cluster's, or another CA's",
                remedy="take both from the same `certs issue`",
            ) from None
        limits = _basic(issuer)
        below = index + _basic(chain[0]).ca
        if not limits.ca or (
            limits.path_length is not None and limits.path_length < below
        ):
            raise ClusterError(
                where=str(path),
                what=f"was signed by {issuer.subject.rfc4514_string()}, which is no CA",
            )
