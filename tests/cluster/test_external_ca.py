"""A cluster whose CA is somebody else's: requests out, certificates and lists in.

The guard alone; a Ray of such a cluster runs in `test_failures`.
"""

from __future__ import annotations

import datetime as dt
import shutil

import pytest

from raysandbox.cluster import pki
from tests.cluster.external import sign
from tests.cluster.guard_only import Guard
from tests.cluster.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

HEAD = "10.77.6.1"


def test_cluster_of_an_external_ca() -> None:
    """It comes up, takes the CA's members, refuses others and those it revokes.

    Also refused: to come up before there is a list of the revoked.
    """
    ca = pki.Issuer.root("Example Corp CA 7")
    with Lab() as lab:
        host = lab.host("head", HEAD)
        guard, home = Guard(host), host.home
        (home / "corp.pem").write_bytes(pki.pem(ca.cert))
        host.raysandbox(
            "cluster", "init", str(home / "c"), "--name", "prod",
            "--head-address", HEAD, "--external-ca", str(home / "corp.pem"),
        )  # fmt: skip
        assert not list((home / "c").glob("**/root.key"))
        guard.cli("certs", "csr")
        sign(ca, home / "c" / "pending", home / "signed", "head", HEAD)
        guard.cli("certs", "import", str(home / "signed"))
        with pytest.raises(AssertionError, match="certs trust CRL"):
            guard.start()
        (home / "corp.crl").write_bytes(ca.crl([]))
        guard.cli("certs", "trust", str(home / "corp.crl"))
        guard.start()

        guard.cli("certs", "bundle", "driver", "alice", "--address", HEAD,
                  "--out", str(home / "alice"))  # fmt: skip
        alice = ("--cluster", str(home / "alice"))
        host.raysandbox("cluster", "certs", "csr", *alice)
        sign(ca, home / "alice" / "pending", home / "signed-alice", "alice", HEAD)
        host.raysandbox(
            "cluster", "certs", "import", str(home / "signed-alice"), *alice
        )
        assert guard.verdict() == "through"

        rogue = pki.Issuer.root("Example Corp CA 7")
        shutil.copytree(home / "alice", home / "eve")
        host.raysandbox("cluster", "certs", "csr", "--cluster", str(home / "eve"))
        sign(rogue, home / "eve" / "pending", home / "signed-eve", "alice", HEAD)
        out = host.raysandbox("cluster", "certs", "import", str(home / "signed-eve"),
                       "--cluster", str(home / "eve"), check=False)  # fmt: skip
        assert (out.returncode, "was not signed by" in out.stderr) == (1, True)
        for suffix, source in ((".pem", "signed-eve"), (".key", "eve/pending")):
            shutil.copy(home / source / f"driver{suffix}", home / f"eve-raw{suffix}")
        assert guard.verdict(who="eve-raw") == "handshake"

        leaf = pki.load_chain(home / "alice" / "identity" / "driver.pem")[0]
        now = dt.datetime.now(dt.timezone.utc)
        (home / "corp.crl").write_bytes(ca.crl([(leaf.serial_number, now)]))
        out = guard.cli("certs", "trust", str(home / "corp.crl"))
        assert "in force" in out.stdout
        assert guard.verdict() == "handshake"
        guard.close()
