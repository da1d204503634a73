"""The operator's half of the certificates: what was issued, and what is revoked.

A certificate is written into the index before it is given out: one that nobody
remembers could never be revoked.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from raysandbox.cluster import pki
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import (
    CALLERS,
    NAME,
    ROLES,
    ClusterDir,
    Member,
    Role,
    read_secret,
    read_trusted,
    toml_text,
    write_file,
)

__all__ = ["Record", "Registry", "check_member", "describe"]

NODES = ("head", "node")
WORKERS = "workers"


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
        left = self.expires - dt.datetime.now(dt.timezone.utc)
        if left <= dt.timedelta(0):
            return "expired"
        return "expiring" if left <= dt.timedelta(days=pki.WARN_DAYS) else "valid"

    def as_json(self) -> dict[str, object]:
        """Return it as the index file holds it."""
        return {
            "serial": f"{self.serial:x}", "uri": self.uri, "end": self.end,
            "addresses": list(self.addresses), "revoked": self.revoked,
        }  # fmt: skip


class Registry:
    """CA keys, issued certificates, revocations."""

    def __init__(self, cluster: ClusterDir) -> None:
        self.dir = cluster
        self.name = cluster.settings().name
        self._index = cluster.ca / "index.json"
        self._root_crl = cluster.trust / "root.crl"
        self._callers_crl = cluster.trust / "callers.crl"

    # -- the CA -----------------------------------------------------------------

    def create(self) -> None:
        """Make the CAs of the cluster, its anchors and empty lists."""
        self.dir.ca.mkdir(mode=0o700, exist_ok=False)
        root = pki.Issuer.root(f"{self.name} cluster CA")
        write_file(self.dir.ca / "root.key", pki.key_pem(root.key))
        write_file(self.dir.ca / "root.pem", pki.pem(root.cert), 0o644)
        self.adopt(root.cert)
        callers = pki.Issuer.root(f"{self.name} callers CA")
        write_file(self.dir.ca / "callers.key", pki.key_pem(callers.key))
        write_file(self.dir.callers_cert, pki.pem(callers.cert), 0o644)
        self._write([])

    def adopt(self, ca: x509.Certificate) -> None:
        """Install a CA certificate (our own or an external one) and the anchors."""
        anchor, way = pki.servers_only(self.name, ca)
        guard = pki.Issuer.root(f"{self.name} guard CA")
        for path in (self.dir.ca, self.dir.trust, self.dir.identity):
            path.mkdir(mode=0o700, exist_ok=True)
        write_file(self.dir.ca_cert, pki.pem(ca), 0o644)
        write_file(self.dir.servers_cert, pki.pem(way), 0o644)
        write_file(
            self.dir.trust / "gcs.pem", pki.pem(anchor) + pki.pem(guard.cert), 0o644
        )
        # The guard's inner certificate lives as long as its CA; its CA's key is
        # thrown away, so no second one can ever be made.
        key = pki.new_key()
        public = key.public_key()
        leaf = guard.leaf(
            f"spiffe://{self.name}/guard/inner/client", [], public, pki.CA_DAYS
        )
        write_file(self.dir.key("guard-inner"), pki.key_pem(key))
        write_file(self.dir.cert("guard-inner"), pki.pem(leaf), 0o644)

    def root(self) -> pki.Issuer:
        """Load the CA's key, or say that the CA is elsewhere."""
        key = self.dir.ca / "root.key"
        if not key.exists():
            raise ClusterError(
                where=str(key),
                what="this directory holds no CA key",
                remedy="run this where the cluster was made, or use "
                "`raysandbox cluster certs csr` and `certs import` with your own CA",
            )
        return pki.Issuer.load(self.dir.ca_cert, key)

    def callers(self) -> pki.Issuer:
        """Load the CA of those that speak to the guard alone."""
        self.root()
        return pki.Issuer.load(self.dir.callers_cert, self.dir.ca / "callers.key")

    # -- issuing ----------------------------------------------------------------

    def issue(
        self, role: str, name: str, addresses: Sequence[str], out: Path,
        days: float = pki.LEAF_DAYS, *, renew: bool = False,
    ) -> list[str]:  # fmt: skip
        """Issue every component's certificate of one member into `out`.

        Args:
            role: One of `ROLES`, but worker.
            name: The member's name.
            addresses: Where it is reached.
            out: Its directory: a new one, or the one that it already has.
            days: How long the certificates live.
            renew: Whether the member may have valid ones already; they stay valid.

        Returns:
            The identities' URIs. Worker certificates are not issued here: a
            head or node gets an issuer of its own for them.
        """
        check_member(role, name, addresses)
        _check_days(days)
        root = self.root()
        signer = self.callers() if role in CALLERS else root
        _check_target(out, role, name)
        keys: dict[str, tuple[pki.Key, x509.Certificate]] = {}
        with self._locked() as records:
            if not renew:
                self._refuse_second(records, role, name)
            for component in pki.COMPONENTS[role]:
                uri = f"spiffe://{self.name}/{role}/{name}/{component}"
                key = pki.new_key()
                cert = signer.leaf(uri, addresses, key.public_key(), days)
                keys[component] = key, cert
                records.append(_record(cert, uri, addresses))
            if role in NODES:
                issuer = root.sub(self.name, name, addresses, max(days, 1))
                keys[WORKERS] = issuer.key, issuer.cert
                records.append(_record(issuer.cert, self._workers_uri(name), addresses))
                self._keep_workers_crl(issuer.key, issuer.crl([]))
            self._write(records)
        made = records[-len(keys) :]
        target = self.bundle(role, name, addresses, out)
        for component, (key, cert) in keys.items():
            install(target, component, key, pki.pem(cert))
        return [record.uri for record in made]

    def bundle(
        self, role: str, name: str, addresses: Sequence[str], out: Path
    ) -> ClusterDir:
        """Make a member's directory with all but its identity."""
        check_member(role, name, addresses)
        _check_target(out, role, name)
        _mkdir(out)
        if out.resolve() == self.dir.path.resolve():
            return self.dir
        settings = read_trusted(self.dir.path / "cluster.toml")
        write_file(out / "cluster.toml", settings, 0o644)
        target = ClusterDir(out)
        write_file(target.ca_cert, read_trusted(self.dir.ca_cert), 0o644)
        signer = self.dir.issuer_cert(role)
        if signer != self.dir.ca_cert:
            write_file(target.callers_cert, read_trusted(signer), 0o644)
        way = read_trusted(self.dir.servers_cert)
        write_file(target.servers_cert, way, 0o644)
        write_file(target.token, read_secret(self.dir.token))
        member = Member(role=cast(Role, role), name=name, addresses=tuple(addresses))
        write_file(target.path / "member.toml", toml_text(member), 0o644)
        return target

    def sign(
        self, csr_pem: bytes, role: str, name: str, component: str,
        addresses: Sequence[str], days: float = pki.LEAF_DAYS, crl_pem: bytes = b"",
    ) -> bytes:  # fmt: skip
        """Sign a request whose key was made at the member, and stays there.

        Args:
            csr_pem: The request.
            role: Whom the operator wants to sign for…
            name: …and not what the request says.
            component: One of the role's, or ``workers``.
            addresses: All that the certificate may name.
            days: How long it lives.
            crl_pem: For ``workers``: the list of that issuer.

        Returns:
            The certificate as PEM.

        Raises:
            ClusterError: The request is none, asks for another identity, or for
                an address that is not in `addresses`.
        """
        check_member(role, name, addresses)
        _check_days(days)
        root = self.root()
        csr = pki.load_csr(csr_pem)
        public = cast(ec.EllipticCurvePublicKey, csr.public_key())
        if component == WORKERS and role in NODES:
            uri = self._workers_uri(name)
            cert = root.sub_for(self.name, name, addresses, days, public)
            if csr.subject != cert.subject:
                raise _asks(csr.subject.rfc4514_string(), cert.subject.rfc4514_string())
        elif component in pki.COMPONENTS[role]:
            uri = f"spiffe://{self.name}/{role}/{name}/{component}"
            uris, hosts = pki.asked_identity(csr)
            if uris != [uri]:
                raise _asks(", ".join(uris) or "no identity", uri)
            if extra := hosts - set(addresses) - set(pki.LOCAL):
                raise _asks(", ".join(sorted(extra)), ", ".join(addresses))
            signer = self.callers() if role in CALLERS else root
            cert = signer.leaf(uri, addresses, public, days)
        else:
            raise ClusterError(
                where=f"{role}/{name}/{component}", what="no role has that component"
            )
        with self._locked() as records:
            records.append(_record(cert, uri, addresses))
            if component == WORKERS:
                self._keep_workers_crl(public, _checked_crl(crl_pem, cert))
            self._write(records)
        return pki.pem(cert)

    def trust(self, crl_pem: bytes, issuer_pem: bytes = b"") -> str:
        """Install a revocation list of an external CA or of a workers' issuer.

        Args:
            crl_pem: The list.
            issuer_pem: The issuer's certificate when it is not the CA itself.

        Returns:
            Whose list it is.
        """
        ca = pki.load_chain(self.dir.ca_cert)[0]
        if not issuer_pem:
            checked = _checked_crl(crl_pem, ca)
            if self._root_crl.exists():
                # An older list would take back what was revoked since.
                have = pki.load_crl(read_trusted(self._root_crl)).last_update_utc
                new = pki.load_crl(checked).last_update_utc
                if new < have:
                    raise ClusterError(
                        where="revocation list",
                        what=f"is of {new:%Y-%m-%d %H:%M} UTC, older than the one in "
                        f"force, of {have:%Y-%m-%d %H:%M} UTC",
                    )
            write_file(self._root_crl, checked, 0o644)
            return ca.subject.rfc4514_string()
        try:
            issuer = x509.load_pem_x509_certificate(issuer_pem)
            issuer.verify_directly_issued_by(ca)
        except Exception as error:  # noqa: BLE001 - many kinds, all the same here
            raise ClusterError(
                where="issuer", what=f"is not signed by {self.dir.ca_cert}: {error}"
            ) from None
        self._keep_workers_crl(issuer.public_key(), _checked_crl(crl_pem, issuer))
        return issuer.subject.rfc4514_string()

    # -- revoking ---------------------------------------------------------------

    def revoke(self, member: str) -> list[str]:
        """Revoke every valid certificate of a member, or of one component.

        Args:
            member: ``node/node1``, ``node/node1/raylet``, or a whole URI.

        Returns:
            The URIs revoked; the CRL is written before this returns.
        """
        self.root()
        path = member.removeprefix(f"spiffe://{self.name}/")
        parts = path.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise ClusterError(
                where=repr(member),
                what="must be role/name, role/name/component or a whole identity",
            )
        role, name = parts[:2]
        base = f"spiffe://{self.name}/{path}"
        also = self._workers_uri(name) if role in NODES and len(parts) == 2 else ""
        gone = []
        with self._locked() as records:
            for record in records:
                mine = record.uri == base or record.uri.startswith(base + "/")
                if (mine or record.uri == also) and record.state() in (
                    "valid", "expiring",
                ):  # fmt: skip
                    record.revoked = dt.datetime.now(dt.timezone.utc).isoformat()
                    gone.append(record.uri)
            if not gone:
                raise ClusterError(
                    where=member,
                    what="no valid certificate of that name",
                    remedy="`raysandbox cluster certs list` shows all",
                )
            self._write(records)
        return gone

    def records(self) -> list[Record]:
        """Return all issued certificates, oldest first.

        Raises:
            ClusterError: The index is damaged, or missing beside a list of
                revocations, which a new one would take back.
        """
        if not self._index.exists():
            if (self.dir.ca / "root.key").exists() and self._root_crl.exists():
                raise ClusterError(
                    where=str(self._index),
                    what="is missing, and with it what was issued and revoked",
                    remedy="bring it back from a copy of the ca directory",
                )
            return []
        try:
            return [
                Record(
                    serial=int(r["serial"], 16), uri=str(r["uri"]), end=str(r["end"]),
                    addresses=[str(a) for a in r["addresses"]],
                    revoked=str(r["revoked"]),
                )
                for r in json.loads(read_secret(self._index))
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ClusterError(
                where=str(self._index),
                what="is damaged",
                remedy="bring it back from a copy of the ca directory",
            ) from None

    def crls(self) -> bytes:
        """Return every CRL of the cluster, concatenated.

        Raises:
            ClusterError: The CA's own is missing: the guard would refuse everybody
                without it, and that would be the good case.
        """
        if not self._root_crl.exists():
            raise ClusterError(
                where=str(self._root_crl),
                what="is missing: the CA's list of revoked certificates",
                remedy="`raysandbox cluster certs trust CRL` for an external CA",
            )
        ours = self._callers_crl.exists() or (self.dir.ca / "root.key").exists()
        if ours and not self.dir.callers_cert.exists():
            # As if the CA were external, the guard would take the cluster CA's word.
            raise ClusterError(
                where=str(self.dir.callers_cert),
                what="is missing: the CA of operators, observers and clients",
                remedy="bring it back from a copy; a directory that was made before "
                "there was one has to be made anew (`raysandbox cluster init`)",
            )
        if self.dir.callers_cert.exists() and not self._callers_crl.exists():
            raise ClusterError(
                where=str(self._callers_crl),
                what="is missing: the list of revoked operators and observers",
                remedy="revoking somebody writes it anew",
            )
        files = sorted(self.dir.trust.glob("*.crl"))
        return b"".join(read_trusted(file) for file in files)

    def lists_end(self) -> list[tuple[Path, str]]:
        """Return which lists of revoked certificates end soon, and when.

        Soon is within the last quarter of a list's life, for none less than a day:
        a CA may make one each week.

        Raises:
            ClusterError: One can't be read.
        """
        found, now = [], dt.datetime.now(dt.timezone.utc)
        for file in sorted(self.dir.trust.glob("*.crl")):
            crl = pki.load_crl(read_trusted(file))
            end = crl.next_update_utc
            if end is None:
                continue
            soon = max((end - crl.last_update_utc) / 4, dt.timedelta(days=1))
            if end - now <= min(soon, dt.timedelta(days=pki.WARN_DAYS)):
                found.append((file, f"{end:%Y-%m-%d %H:%M} UTC"))
        return found

    def last_addresses(self, role: str, name: str) -> tuple[str, ...]:
        """Return the addresses of a member's last certificate, revoked or not."""
        for record in reversed(self.records()):
            if record.uri.split("/")[3:5] == [role, name]:
                return record.addresses
        return ()

    def addresses_of(self, role: str, name: str) -> tuple[str, ...]:
        """Return the addresses of a member's last certificate.

        Raises:
            ClusterError: It has none that is not revoked.
        """
        for record in reversed(self.records()):
            if record.uri.split("/")[3:5] == [role, name] and not record.revoked:
                return record.addresses
        raise ClusterError(where=f"{role}/{name}", what="has no certificate to renew")

    # -- inside -----------------------------------------------------------------

    def _workers_uri(self, name: str) -> str:
        return f"spiffe://{self.name}/worker/{name}/*"

    def _refuse_second(self, records: list[Record], role: str, name: str) -> None:
        base = f"spiffe://{self.name}/{role}/{name}/"
        # A node and the head of one name would share their workers' identities.
        others = [self._workers_uri(name)] if role in NODES else []
        for record in records:
            if record.state() not in ("valid", "expiring"):
                continue
            if record.uri.startswith(base) or record.uri in others:
                raise ClusterError(
                    where=f"{role}/{name}",
                    what=f"has a valid certificate already ({describe(record)})",
                    remedy="`certs renew` it, `certs revoke` it first, or take another "
                    "name",
                )

    def _keep_workers_crl(self, key: object, crl: bytes) -> None:
        public = key.public_key() if isinstance(key, pki.Key) else key
        raw = cast(ec.EllipticCurvePublicKey, public).public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        )
        name = hashlib.sha256(raw).hexdigest()[:32]
        write_file(self.dir.trust / f"workers-{name}.crl", crl, 0o644)

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

    def _write(self, records: list[Record]) -> None:
        issuers = (self._root_crl, self.root()), (self._callers_crl, self.callers())
        revoked = [
            (r.serial, dt.datetime.fromisoformat(r.revoked))
            for r in records
            if r.revoked
        ]
        write_file(self._index, json.dumps([r.as_json() for r in records], indent=0))
        # Each names all: a serial number that is another's is nobody's.
        for path, issuer in issuers:
            write_file(path, issuer.crl(revoked), 0o644)


def install(target: ClusterDir, component: str, key: pki.Key, chain_pem: bytes) -> None:
    """Write one component's key and certificates where a process looks for them."""
    if component == WORKERS:
        paths = target.workers / "issuer.key", target.workers / "issuer.pem"
    else:
        paths = target.key(component), target.cert(component)
        if target.issuer_cert(target.member().role) == target.ca_cert:
            way = read_trusted(target.servers_cert)
            chain_pem = chain_pem.removesuffix(way) + way
    _mkdir(paths[0].parent)
    write_file(paths[0], pki.key_pem(key))
    write_file(paths[1], chain_pem, 0o644)


def _asks(asked: str, wanted: str) -> ClusterError:
    return ClusterError(
        where="request",
        what=f"asks for {asked}, and is to be signed for {wanted}",
        remedy="have the member make its request anew, or name the right member",
    )


def _checked_crl(crl_pem: bytes, issuer: x509.Certificate) -> bytes:
    """Return a list, as PEM, that the issuer signed and that is in force."""
    crl = pki.load_crl(crl_pem)
    public = cast(ec.EllipticCurvePublicKey, issuer.public_key())
    if crl.issuer != issuer.subject or not crl.is_signature_valid(public):
        raise ClusterError(
            where="revocation list",
            what=f"was not signed by {issuer.subject.rfc4514_string()}",
        )
    end = crl.next_update_utc
    if end is not None and end <= dt.datetime.now(dt.timezone.utc):
        raise ClusterError(
            where="revocation list",
            what=f"ended on {end:%Y-%m-%d %H:%M} UTC: the guard would refuse everybody",
        )
    return pki.pem(crl)


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


def _check_days(days: float) -> None:
    if not math.isfinite(days) or not 0 < days <= pki.CA_DAYS:
        raise ClusterError(
            where=f"days {days}", what=f"must be above 0 and at most {pki.CA_DAYS}"
        )


def _check_target(out: Path, role: str, name: str) -> None:
    """Refuse to write one member's identity over another's, or into somewhere."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ClusterError(where=str(out), what="is not a directory")
    if (out / "member.toml").exists():
        member = ClusterDir(out).member()
        if (member.role, member.name) != (role, name):
            raise ClusterError(
                where=str(out),
                what=f"belongs to {member.role}/{member.name}, not to {role}/{name}",
                remedy="give each member a directory of its own",
            )
    elif any(out.iterdir()):
        raise ClusterError(
            where=str(out), what="is not empty and no member's directory"
        )


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
            what="must be 1 to 63 lower-case letters, digits, dots and dashes, "
            "starting and ending with a letter or digit",
        )
    if role in ("head", "node", "driver") and not addresses:
        raise ClusterError(
            where=f"{role}/{name}",
            what="needs at least one address: nodes are bound to theirs, and workers "
            "that answer a driver check where it is",
            remedy="give --address once for each",
        )
    for address in addresses:
        pki.check_address(address, ip_only=role in NODES)


def describe(record: Record) -> str:
    """Return role/name/component of a record."""
    return re.sub(r"^spiffe://[^/]+/", "", record.uri)
