"""A CA that is somebody else's, as a company's would be: no file of the cluster's."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from raysandbox.cluster import pki


def sign(ca: pki.Issuer, pending: Path, out: Path, name: str, address: str) -> None:
    """Sign what is asked for, as the company would after looking at it."""
    out.mkdir(exist_ok=True)
    for path in pending.glob("*.csr"):
        csr = x509.load_pem_x509_csr(path.read_bytes())
        public = csr.public_key()
        if path.stem == "workers":
            cert = ca.sub_for("prod", name, [address], 90, public)
        else:
            uris, _ = pki.asked_identity(csr)
            cert = ca.leaf(uris[0], [address], public, 90)
        (out / f"{path.stem}.pem").write_bytes(pki.pem(cert))
