"""A cluster directory: its files, and the settings in `cluster.toml`.

Every member of a cluster has one directory. The operator's (and the head's)
holds everything; a node's or driver's is a bundle with its own identity only::

    cluster.toml        settings, the same for every member
    member.toml         who this directory is: role, name, addresses
    token               Ray's shared token, 0600
    ca.pem              the cluster's CA certificate
    servers.pem         what members send after their own certificate, see `pki`
    identity/           <component>.pem and .key (0600) of this member
    workers/            the issuer of this node's worker certificates
    inventory.toml      head: which nodes may join
    access.toml         head: extra rights of drivers (optional)
    ca/                 operator: CA keys, index of certificates, CRL
    issued/             operator: certificates issued to other members
    trust/              head: anchors of the GCS, CRL
    run/                sockets, pids, guard configuration; rebuilt at each start
    audit/              head: the audit log

What must not be readable by others is checked at each load, not only made so.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raysandbox.cluster.errors import ClusterError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ROLES",
    "TRUSTED",
    "Access",
    "Audit",
    "ClusterDir",
    "DriverAccess",
    "Inventory",
    "Limits",
    "Member",
    "Node",
    "RoleLimit",
    "Settings",
    "read_secret",
    "read_trusted",
    "toml_text",
    "validate",
    "write_file",
]

Role = Literal["head", "node", "worker", "driver", "client", "operator", "observer"]
ROLES: tuple[Role, ...] = (
    "head",
    "node",
    "worker",
    "driver",
    "client",
    "operator",
    "observer",
)
#: They speak to the guard alone: raylets and workers need not take their certificates,
#: which a CA of their own signs.
CALLERS: tuple[Role, ...] = ("client", "operator", "observer")
# Those of the machines themselves.
TRUSTED: tuple[Role, ...] = ("head", "node")
# \Z and not $, which would let a line feed pass at the end.
NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?\Z")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleLimit(_Model):
    """What one identity of a role may ask of the GCS.

    Attributes:
        calls_per_s: Refill of the bucket of calls.
        calls_burst: Size of that bucket.
        read_bytes_per_s: Refill of the bucket of bytes read from the KV.
        read_burst_bytes: Size of that bucket.
        write_bytes_per_s: Refill of the bucket of bytes sent in requests.
        write_burst_bytes: Size of that bucket, and so the largest request.
        in_flight: Calls of 64 KiB and more, sent or read, that may be open at once.
        stored_bytes: Bytes that its keys may hold in the GCS at once.
    """

    calls_per_s: int = Field(ge=1)
    calls_burst: int = Field(ge=1)
    read_bytes_per_s: int = Field(ge=1024)
    read_burst_bytes: int = Field(ge=1024)
    write_bytes_per_s: int = Field(ge=1024)
    write_burst_bytes: int = Field(ge=1024)
    in_flight: int = Field(ge=1)
    stored_bytes: int = Field(ge=1024)


MIB = 1 << 20
# Larger than any file of a cluster directory that is read whole.
MAX_BYTES = 16 * MIB


def _default_limits() -> dict[Role, RoleLimit]:
    trusted = RoleLimit(
        calls_per_s=2000,
        calls_burst=4000,
        read_bytes_per_s=64 * MIB,
        read_burst_bytes=512 * MIB,
        write_bytes_per_s=16 * MIB,
        write_burst_bytes=512 * MIB,
        in_flight=64,
        stored_bytes=512 * MIB,
    )
    user = RoleLimit(
        calls_per_s=100,
        calls_burst=3000,
        read_bytes_per_s=8 * MIB,
        read_burst_bytes=64 * MIB,
        write_bytes_per_s=128 << 10,
        write_burst_bytes=16 * MIB,
        in_flight=8,
        stored_bytes=64 * MIB,
    )
    few = user.model_copy(update={"calls_per_s": 20, "calls_burst": 60})
    return {
        "head": trusted,
        "node": trusted,
        "worker": user.model_copy(update={"calls_per_s": 200, "calls_burst": 2000}),
        "driver": user,
        "client": user,
        "operator": few.model_copy(update={"calls_per_s": 100}),
        "observer": few,
    }


class Limits(_Model):
    """Limits by role, per identity; connections by address; streams by connection.

    When the inventory has more than 64 addresses, or certificates name more than 64
    others, each of these shares one of 64 limits with those of the same hash (CRC-32,
    modulo 64); the head's addresses, and loopback, have one for themselves. All who
    share one have together what one address has.

    Attributes:
        roles: By role; a role that is not named keeps its default.
        connections: TLS connections from each address, or network, of the inventory.
        other_connections: TLS connections from each other address that certificates
            name, and as many from all together that nobody has named. At the
            dashboard's port: from each of all these addresses.
        streams_per_connection: Calls open at once on one connection. A driver waits
            with one for each of its actors that is not placed yet.
        calls_open: Calls open at once of all nodes together, and of all others.
        held_calls: Calls open at once of one identity that is no node's, of those
            that are answered when something happens.
        request_bytes: Largest request whose content is looked at; of who is no node,
            as its role's `write_burst_bytes` says.
        request_s: Seconds that a request may take to come in.
        memory_bytes: Memory of the guard's program, from which on it gives up the
            calls that hold most of it.
    """

    roles: dict[Role, RoleLimit] = Field(default_factory=_default_limits)
    connections: int = Field(default=1024, ge=16)
    other_connections: int = Field(default=512, ge=16)
    streams_per_connection: int = Field(default=1024, ge=16)
    calls_open: int = Field(default=16384, ge=16)
    # Each may cost the GCS some 20 KB. More than one connection has.
    held_calls: int = Field(default=1536, ge=16)
    request_bytes: int = Field(default=128 * MIB, ge=MIB)
    # More than the access service may take to answer.
    request_s: int = Field(default=60, ge=10)
    memory_bytes: int = Field(default=1024 * MIB, ge=128 * MIB)

    @property
    def user_request_bytes(self) -> int:
        """Largest request of who is no node.

        Some more than its budget: one that is a little over reads which limit it is.
        """
        most = max(
            limit.write_burst_bytes
            for role, limit in self.roles.items()
            if role not in TRUSTED
        )
        return min(most + MIB, self.request_bytes)

    @field_validator("roles")
    @classmethod
    def _complete(cls, value: dict[Role, RoleLimit]) -> dict[Role, RoleLimit]:
        return {**_default_limits(), **value}


class Audit(_Model):
    """How decisions are recorded.

    Attributes:
        when_disk_is_full: `closed` refuses every call while the log can't be
            written (streams that are open go on), `open` lets calls through
            unrecorded. Either is said on stderr, in the metrics and, once it
            can be written again, in the log.
        anchor_file: File on another disk or machine that the chain's end is
            appended to once a minute, for `raysandbox audit verify --anchors`.
        webhook: URL that alerts are posted to, as JSON; https, or on loopback.
        metrics_port: Loopback port of the Prometheus page; None: no page.
    """

    rotate_bytes: int = Field(default=64 * MIB, ge=64 << 10)
    keep_files: int = Field(default=16, ge=1)
    when_disk_is_full: Literal["closed", "open"] = "closed"
    anchor_file: Path | None = None
    webhook: str | None = None
    metrics_port: int | None = Field(default=None, ge=1, le=65535)

    @field_validator("webhook")
    @classmethod
    def _https(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = urlsplit(value)
        local = url.hostname in ("localhost", "127.0.0.1", "::1")
        if not url.hostname or not (
            url.scheme == "https" or (url.scheme == "http" and local)
        ):
            raise ValueError("must be an https URL, or an http one on this machine")
        return value

    @field_validator("anchor_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value


class Settings(_Model):
    """cluster.toml.

    Attributes:
        name: The cluster's name, the host part of every identity's URI.
        head_address: IPv4 address of the head as nodes and drivers reach it, or its
            name.
        listen_addresses: Where the head listens besides 127.0.0.1, when that is not
            at `head_address`; `0.0.0.0` is all of its addresses.
        port: The guard's port, where everybody believes the GCS to be.
        gcs_port: Loopback port of the real GCS.
        dashboard_tls_port: Port of the TLS front of the dashboard, None: none.
        admission: `enforce` refuses a node that is not in the inventory,
            `observe` only records and alerts.
    """

    name: str
    head_address: str
    listen_addresses: tuple[str, ...] = ()
    port: int = Field(default=6379, ge=1, le=65535)
    gcs_port: int = Field(default=16379, ge=1, le=65535)
    dashboard_tls_port: int | None = Field(default=None, ge=1, le=65535)
    admission: Literal["enforce", "observe"] = "enforce"
    limits: Limits = Limits()
    audit: Audit = Audit()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _valid_name(value)

    @field_validator("head_address")
    @classmethod
    def _address(cls, value: str) -> str:
        if ":" in value:
            raise ValueError("must be an IPv4 address: the guard listens at no other")
        if not re.fullmatch(r"[0-9a-zA-Z.-]{1,253}", value):
            raise ValueError("must be an IP address or a host name")
        return value

    @field_validator("listen_addresses")
    @classmethod
    def _listen(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            ipaddress.IPv4Address(address)
        return value


class Member(_Model):
    """member.toml: who a cluster directory belongs to."""

    role: Role
    name: str
    addresses: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _valid_name(value)


class Node(_Model):
    """One node of the inventory.

    Attributes:
        addresses: IP addresses or networks (``10.0.0.0/24``) that it may speak
            and register from; its identity is bound to them.
        head: Whether it may register as the head node.
        resources: Ceilings on what it may claim; a resource that is not named
            may not be claimed, `"*"` stands for any other.
        labels: Labels it may claim, exactly; Ray's own `ray.io/` ones may be
            claimed by every node.
        quarantined: Its calls are refused and it is drained.
    """

    addresses: tuple[str, ...] = Field(min_length=1)
    head: bool = False
    resources: dict[str, float] = Field(default_factory=lambda: {"*": float("inf")})
    labels: dict[str, str] = {}
    quarantined: bool = False

    @field_validator("addresses")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            ipaddress.ip_network(address)
        return value

    @field_validator("resources")
    @classmethod
    def _ceilings(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if not amount >= 0:
                raise ValueError(f"the ceiling of {name!r} must be 0 or more")
        return value

    def has_address(self, address: str) -> bool:
        """Whether an address is one of the node's, or in one of its networks."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in ipaddress.ip_network(a) for a in self.addresses)


class Inventory(_Model):
    """inventory.toml: the nodes that may join."""

    nodes: dict[str, Node] = {}

    @field_validator("nodes")
    @classmethod
    def _names(cls, value: dict[str, Node]) -> dict[str, Node]:
        for name in value:
            _valid_name(name)
        return value


class DriverAccess(_Model):
    """Rights of one driver beyond its own jobs."""

    namespaces: tuple[str, ...] = ()


class Access(_Model):
    """access.toml: which Ray namespaces are reserved for whom."""

    drivers: dict[str, DriverAccess] = {}


def _valid_name(value: str) -> str:
    if not NAME.match(value):
        raise ValueError(
            "must be 1 to 63 lower-case letters, digits, dots and dashes, "
            "starting and ending with a letter or digit"
        )
    return value


def write_file(
    path: Path, data: bytes | str, mode: int = 0o600, *, durable: bool = True
) -> None:
    """Replace a file in one step; it never exists with a wider mode than `mode`.

    Args:
        path: The file; its directory is made.
        data: All of its contents.
        mode: Of the file.
        durable: Wait until it would survive a power cut. Not for what each start
            writes anew: any task can keep a disk busy, and who waits for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    if isinstance(data, str):
        data = data.encode()
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
    except OSError:
        # Or a full disk would be left full of them.
        os.unlink(scratch)
        raise
    finally:
        os.close(fd)
    os.rename(scratch, path)


def read_secret(path: Path) -> bytes:
    """Return a secret file's bytes, or refuse one that others can read.

    Raises:
        ClusterError: It is missing, empty, unreadable, a link, not a plain file,
            owned by somebody else, or readable or writable by group or others.
    """
    data = _read(path, 0o077)
    if not data:
        raise ClusterError(where=str(path), what="is empty", remedy="issue it again")
    return data


def read_trusted(path: Path) -> bytes:
    """Return the bytes of a file that others may read but must not be able to write.

    Raises:
        ClusterError: See `read_secret`.
    """
    return _read(path, 0o022)


def _read(path: Path, forbidden: int) -> bytes:
    # Opened once and checked on the descriptor: a name can change in between.
    # Without O_NONBLOCK a FIFO in the file's place would hang the reader.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise ClusterError(
            where=str(path),
            what="is a link" if link else f"can't be read: {error.strerror}",
            remedy="put the file itself there"
            if link
            else "run as the user that owns the cluster directory, or issue it again",
        ) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ClusterError(where=str(path), what="is not a plain file")
        _check_owner(path, info, forbidden)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise ClusterError(where=str(path), what=f"is larger than {MAX_BYTES} bytes")
    return data


def _check_owner(path: Path, info: os.stat_result, forbidden: int) -> None:
    if info.st_uid not in (os.geteuid(), 0):
        raise ClusterError(
            where=str(path),
            what=f"belongs to uid {info.st_uid}, not to uid {os.geteuid()}",
            remedy=f"chown {os.geteuid()} {path}",
        )
    mode = stat.S_IMODE(info.st_mode)
    if mode & forbidden:
        secret = forbidden & 0o044
        wanted = f"{mode & ~forbidden:o}"
        raise ClusterError(
            where=str(path),
            what=f"has mode {mode:04o}, so others can {'use' if secret else 'change'} "
            "it",
            remedy=f"chmod {wanted} {path}, and replace it if others may have "
            + ("read it" if secret else "changed it"),
        )


def toml_text(model: BaseModel) -> str:
    """Return a flat model as TOML; JSON's strings, numbers and lists are TOML's."""
    values = model.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def validate(path: Path, text: str | bytes, model: type[_Model]) -> Any:
    """Return the model that a TOML text holds.

    Args:
        path: The file that it is, for errors.
        text: The text.
        model: What it must be.

    Raises:
        ClusterError: It is no TOML, or a key is unknown, missing or not valid.
    """
    try:
        raw = tomllib.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise ClusterError(where=str(path), what=f"is not TOML: {error}") from None
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ClusterError(
            where=f"{path}: {key}",
            what=f"{first['msg']} (got {first['input']!r:.80})",
        ) from None


def _load(path: Path, model: type[_Model]) -> Any:
    return validate(path, read_trusted(path), model)


class ClusterDir:
    """The files of one cluster directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_dir():
            raise ClusterError(
                where=str(self.path),
                what="is not a directory",
                remedy="`raysandbox cluster init` makes one, "
                "`raysandbox cluster certs issue --out` one for another member",
            )
        # Whoever may write here may put another CA in the place of ours.
        _check_owner(self.path, self.path.stat(), 0o022)
        self.ca = self.path / "ca"
        self.identity = self.path / "identity"
        self.workers = self.path / "workers"
        self.trust = self.path / "trust"
        self.run = self.path / "run"
        self.token = self.path / "token"
        self.ca_cert = self.path / "ca.pem"
        self.callers_cert = self.path / "callers.pem"
        self.servers_cert = self.path / "servers.pem"
        self.audit = self.path / "audit"
        self.access_socket = self.run / "access.sock"
        self.admin_socket = self.run / "admin.sock"

    def issuer_cert(self, role: str) -> Path:
        """Path of the CA that signs a role's certificates, but for workers'.

        That of an external CA is the same for all.
        """
        apart = role in CALLERS and os.path.lexists(self.callers_cert)
        return self.callers_cert if apart else self.ca_cert

    def ca_certs(self) -> list[Path]:
        """Paths of all CAs whose members the guard takes."""
        return sorted({self.issuer_cert(role) for role in ROLES})

    def settings(self) -> Settings:
        """Load cluster.toml."""
        loaded: Settings = _load(self.path / "cluster.toml", Settings)
        return loaded

    def member(self) -> Member:
        """Load member.toml."""
        loaded: Member = _load(self.path / "member.toml", Member)
        return loaded

    def inventory(self) -> Inventory:
        """Load inventory.toml; a missing one admits nobody."""
        path = self.path / "inventory.toml"
        if not os.path.lexists(path):
            return Inventory()
        loaded: Inventory = _load(path, Inventory)
        return loaded

    def access(self) -> Access:
        """Load access.toml; a missing one grants nothing extra."""
        path = self.path / "access.toml"
        if not os.path.lexists(path):
            return Access()
        loaded: Access = _load(path, Access)
        return loaded

    def digest(self) -> str:
        """Return a digest of what running helpers take up on SIGHUP."""
        found = hashlib.sha256()
        for path in (
            self.path / "inventory.toml",
            self.path / "access.toml",
            self.workers / "issuer.pem",
            self.cert("guard"),
            *sorted(self.trust.glob("*.crl")),
        ):
            data = path.read_bytes() if path.is_file() else b"-"
            found.update(len(data).to_bytes(8, "big") + data)
        return found.hexdigest()

    def cert(self, component: str) -> Path:
        """Path of a component's certificate chain."""
        return self.identity / f"{component}.pem"

    def key(self, component: str) -> Path:
        """Path of a component's key."""
        return self.identity / f"{component}.key"

    def tls_env(self, component: str) -> dict[str, str]:
        """Environment that makes a Ray process speak as `component`."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_CA_CERT": str(self.ca_cert),
            "RAY_TLS_SERVER_CERT": str(self.cert(component)),
            "RAY_TLS_SERVER_KEY": str(self.key(component)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }
