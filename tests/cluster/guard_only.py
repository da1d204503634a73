"""A guard without Ray behind it, for what is decided before a call reaches the GCS.

Envoy and its helpers are real. That a call is let through shows in its answer:
Envoy says that it can't reach the GCS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.lab import Host

RS = (sys.executable, "-m", "raysandbox")
PROBE = Path(__file__).parent / "probes" / "call.py"
NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
START = (
    "import sys; from raysandbox.cluster.start import start_helpers;"
    "from raysandbox.cluster.settings import ClusterDir;"
    "start_helpers(ClusterDir(sys.argv[1]), fresh=True)"
)


class Guard:
    """The helpers of a head, and a probe on the same host."""

    def __init__(self, host: Host) -> None:
        self.host, self.path = host, host.home / "c"
        self._probe = subprocess.Popen(
            host.argv([sys.executable, str(PROBE)]), text=True,
            env=host.env({"GRPC_VERBOSITY": "NONE"}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def cli(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `raysandbox cluster ARGS` on the head's directory."""
        return self.host.raysandbox(
            "cluster", *args, "--cluster", str(self.path), check=check
        )

    @property
    def there(self) -> Path:
        """The head's directory as its host sees it, which has mounts of its own."""
        return Path(f"/proc/{self.host.pid}/root{self.path}")

    def start(self) -> None:
        """Start guard and helpers."""
        self.host.python(START, str(self.path))

    def verdict(
        self, who: str = "alice/identity/driver", method: str = NODES,
        kind: str = "GetAllNodeInfoRequest", fields: Any = None,
    ) -> str:  # fmt: skip
        """Say what becomes of a call: through, closed, denied, handshake or other."""
        identity = self.host.home / who
        ask = {
            "address": f"{self.host.address}:6379", "ca": self.path / "ca.pem",
            "fields": fields or {}, "cert": identity.with_suffix(".pem"),
            "key": identity.with_suffix(".key"), "token": self.path / "token",
            "method": method, "kind": kind,
        }  # fmt: skip
        assert self._probe.stdin is not None
        assert self._probe.stdout is not None
        self._probe.stdin.write(json.dumps(ask, default=str) + "\n")
        self._probe.stdin.flush()
        said = json.loads(self._probe.stdout.readline())
        if said["code"] == "PERMISSION_DENIED":
            return "denied"
        for mark, word in (
            ("the audit log can't be written", "closed"), ("upstream", "through"),
            ("TSI", "handshake"), ("andshake", "handshake"),
        ):  # fmt: skip
            if mark in said["details"]:
                return word
        return f"{said['code']}: {said['details']}"

    def said(self) -> str:
        """Return what the helpers wrote on their standard error."""
        return (self.there / "run" / "supervisor.log").read_text()

    def audit(self, *args: str) -> str:
        """Run `raysandbox audit`."""
        return self.host.raysandbox("audit", "--cluster", str(self.path), *args).stdout

    def close(self) -> None:
        """End the probe."""
        self._probe.kill()
        self._probe.wait()
        for pipe in (self._probe.stdin, self._probe.stdout):
            if pipe is not None:
                pipe.close()
