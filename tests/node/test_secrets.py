"""The cluster's token and the node's TLS key: who finds them, and where.

Looked for by their first bytes; what follows is compared by its hash, so that no
looker has what it looks for in its own code or memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.conftest import USER
from tests.node.nodes import Node, policy

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(240)]

_FIRST, _REST = 20, 28
POLICY = policy(strict=3, fast=3, trusted=3)
HUNT = """
import ctypes, hashlib, json

def hunt(roots, secrets, prunes=("/usr", "/proc", "/sys", "/dev")):
    found = []

    def look(data, place):
        for name, first, rest in secrets:
            first = bytes.fromhex(first)
            index = data.find(first)
            while index >= 0:
                begin = index + len(first)
                tail = bytes(data[begin : begin + REST])
                if hashlib.sha256(tail).hexdigest() == rest:
                    found.append([name, place])
                index = data.find(first, index + 1)

    def read(path, place):
        try:
            with open(path, "rb") as file:
                look(file.read(1 << 22), place)
        except OSError:
            pass

    # First: what is read below is in memory then. Through a pipe: the kernel says
    # where nothing is, and /proc/self/mem may be shut.
    libc, chunk = ctypes.CDLL(None), 1 << 16
    reader, writer = os.pipe()
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        span, rights = line.split()[:2]
        if rights[0] != "r" or "[v" in line:
            continue
        low, high = (int(part, 16) for part in span.split("-"))
        while low < high:
            size = min(high - low, chunk)
            size = libc.write(writer, ctypes.c_void_p(low), ctypes.c_size_t(size))
            if size > 0:
                look(os.read(reader, size), "memory")
            low += chunk - 64
    for root in roots:
        for at, directories, files in os.walk(root):
            directories[:] = [d for d in directories if d != "site-packages"
                              and os.path.join(at, d) not in prunes]
            for name in files:
                if os.path.isfile(os.path.join(at, name)):
                    read(os.path.join(at, name), "path " + os.path.join(at, name))
    for name, value in os.environb.items():
        look(value + b" ", "environment")
        # As its owner would: whatever path a variable names.
        if value.startswith(b"/"):
            read(value, "path by variable")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("environ", "cmdline"):
            read(f"/proc/{pid}/{name}", "/proc")
    for number in os.listdir("/proc/self/fd"):
        try:
            look(os.pread(int(number), 1 << 22, 0), "descriptor")
        except OSError:
            pass
    return sorted({tuple(each) for each in found})

def nested():
    return ray.get(ray.remote(lambda: os.getpid()).options(
        resources={"sandbox:strict": 1}, num_cpus=0).remote(), timeout=60)

def ask(profile, function, *arguments):
    return ray.get(ray.remote(function).options(
        resources={"sandbox:" + profile: 1}).remote(*arguments), timeout=90)

answer = {name: ask(name, hunt, ["/"], SECRETS) for name in PROFILES}
answer["nested"] = ask("trusted", nested)
answer["control"] = hunt([SITE], SECRETS)
print(json.dumps(answer))
"""
PROFILES = ("strict", "fast", "trusted")


def _told(name: str, secret: bytes) -> tuple[str, str, str]:
    rest = secret[_FIRST : _FIRST + _REST]
    return name, secret[:_FIRST].hex(), hashlib.sha256(rest).hexdigest()


@pytest.fixture(scope="module", params=["root", "user"])
def hunts(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was found by each profile, and by the driver, which may have it.

    On a node of root's, then on one of an ordinary user's.
    """
    from ray._common.tls_utils import generate_self_signed_tls_certs

    uid = USER if request.param == "user" else 0
    certificate, private = generate_self_signed_tls_certs()
    lines = [line for line in private.splitlines() if "-----" not in line]
    with tempfile.TemporaryDirectory(
        prefix="rsn-", dir="/srv" if uid else Path.home()
    ) as site:
        cert, key = (Path(site, name) for name in ("cert.pem", "key.pem"))
        cert.write_text(certificate)
        key.write_text(private)
        key.chmod(0o600)
        for path in (site, cert, key):
            os.chown(path, uid, uid)
        with Node(
            policy=POLICY,
            uid=uid,
            RAY_USE_TLS="1",
            RAY_TLS_SERVER_CERT=str(cert),
            RAY_TLS_SERVER_KEY=str(key),
            RAY_TLS_CA_CERT=str(cert),
        ) as node:
            # From the middle: what comes before is the same in every key.
            der = base64.b64decode("".join(lines))
            secrets = [
                _told("token", node.token.read_bytes()),
                _told("key", lines[len(lines) // 2].encode()),
                _told("key, binary", der[len(der) // 2 :]),
            ]
            values = {
                "SECRETS": secrets,
                "PROFILES": PROFILES,
                "SITE": str(node.site),
                "REST": _REST,
            }
            names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
            yield json.loads(node.drive(names + HUNT).splitlines()[-1])


def test_control_who_may_have_them_finds_them(hunts):
    """A driver: by path, by the variables that name the files, in its own memory."""
    found = {tuple(each) for each in hunts["control"]}
    assert {("token", "memory"), ("token", "path by variable")} <= found
    assert {("key", "memory"), ("key", "path by variable")} <= found
    assert any(name == "token" and place.startswith("path /") for name, place in found)


@pytest.mark.parametrize("profile", ["strict", "fast"])
def test_a_jail_finds_neither(hunts, profile):
    """By no path, variable, /proc, descriptor, nor in memory from its zygote."""
    assert hunts[profile] == []


def test_a_boundary_worker_finds_the_token_in_its_memory_alone(hunts):
    """Ray's own process has it, as the README says; no file has it any more."""
    assert [place for name, place in hunts["trusted"] if name == "token"] == ["memory"]


def test_a_boundary_worker_has_the_key_for_its_connections(hunts):
    """The launcher's copy and memory, no other place; a task from inside arrives.

    Ray reads the key for each new connection: without it that task never ends.
    """
    places = {place for name, place in hunts["trusted"] if name.startswith("key")}
    assert places <= {"memory", "path by variable"}
    assert hunts["nested"] == 1
