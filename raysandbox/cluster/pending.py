"""Keys that are made at the member, and certificates that come back for them.

``pending/`` in a member's directory holds ``<component>.key`` and ``.csr``; a
head or node also ``workers.key``, ``workers.csr`` and ``workers.crl``, for the
issuer of its workers. What comes back is checked whole before any of it takes
the place of what is in use.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from raysandbox.cluster import pki
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.registry import NODES, WORKERS, Registry, install
from raysandbox.cluster.settings import ClusterDir, write_file

__all__ = ["install_all", "make", "sign_all"]

# More than any chain or request of a member.
MAX_BYTES = 1 << 18


def make(cluster: ClusterDir) -> list[tuple[Path, str]]:
    """Make new keys and requests; returns each request's path and identity."""
    settings, member = cluster.settings(), cluster.member()
    pending = cluster.path / "pending"
    pending.mkdir(mode=0o700, exist_ok=True)
    made = []
    for component in pki.COMPONENTS[member.role]:
        uri = f"spiffe://{settings.name}/{member.role}/{member.name}/{component}"
        key = pki.new_key()
        request = pki.make_csr(uri, member.addresses, key)
        write_file(pending / f"{component}.key", pki.key_pem(key))
        write_file(pending / f"{component}.csr", request, 0o644)
        made.append((pending / f"{component}.csr", uri))
    if member.role in NODES:
        key = pki.new_key()
        request = pki.make_workers_csr(
            settings.name, member.name, member.addresses, key
        )
        write_file(pending / f"{WORKERS}.key", pki.key_pem(key))
        write_file(pending / f"{WORKERS}.csr", request, 0o644)
        write_file(pending / f"{WORKERS}.crl", pki.empty_crl(member.name, key), 0o644)
        made.append((pending / f"{WORKERS}.csr", f"CA: {pki.workers_of(member.name)}"))
    return made


def sign_all(
    registry: Registry, source: Path, role: str, name: str,
    addresses: Sequence[str], out: Path, days: float,
) -> list[Path]:  # fmt: skip
    """Sign the requests of a directory; nothing is written unless all are good."""
    requests = sorted(source.glob("*.csr"))
    if not requests:
        raise ClusterError(where=str(source), what="holds no .csr files")
    signed: dict[str, bytes] = {}
    for path in requests:
        crl = source / f"{WORKERS}.crl"
        try:
            signed[path.stem] = registry.sign(
                _read(path), role, name, path.stem, addresses, days,
                _read(crl) if path.stem == WORKERS else b"",
            )  # fmt: skip
        except ClusterError as error:
            raise ClusterError(
                where=f"{path}: {error.where}", what=error.what, remedy=error.remedy
            ) from None
    out.mkdir(mode=0o755, parents=True, exist_ok=True)
    made = []
    for stem, cert in signed.items():
        write_file(out / f"{stem}.pem", cert, 0o644)
        made.append(out / f"{stem}.pem")
    return made


def install_all(cluster: ClusterDir, source: Path) -> list[str]:
    """Install ``<component>.pem`` for the pending keys; returns what to tell.

    Raises:
        ClusterError: One is missing, or not for this member; none is installed.
    """
    member, pending = cluster.member(), cluster.path / "pending"
    wanted = [*pki.COMPONENTS[member.role], *([WORKERS] * (member.role in NODES))]
    ready: list[tuple[str, pki.Key, bytes]] = []
    said = []
    for component in wanted:
        path = source / f"{component}.pem"
        data = _read(path)
        try:
            chain = x509.load_pem_x509_certificates(data)
        except ValueError as error:
            raise ClusterError(
                where=str(path), what=f"is not a certificate in PEM: {error}"
            ) from None
        key = pki.load_key(pending / f"{component}.key")
        check = (
            pki.check_issuer(cluster, path, chain, key)
            if component == WORKERS
            else pki.check_pair(
                cluster, component, path, chain, key, addresses=member.addresses
            )
        )
        said += [f"warning: {text}" for text in check]
        ready.append((component, key, data))
    for component, key, data in ready:
        install(cluster, component, key, data)
        said.append(f"{component}: installed")
    if member.role == "head":
        crl = _read(pending / f"{WORKERS}.crl")
        said.append(f"list of {Registry(cluster).trust(crl, ready[-1][2])}: installed")
    elif member.role == "node":
        said.append(
            f"note: the head needs {WORKERS}.crl (`certs trust`), unless its CA signed"
        )
    shutil.rmtree(pending)
    return said


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ClusterError(
            where=str(path), what=f"can't be read: {error.strerror}"
        ) from None
    if len(data) > MAX_BYTES:
        raise ClusterError(where=str(path), what=f"is larger than {MAX_BYTES} bytes")
    return data
