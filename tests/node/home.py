"""Whom attackers call: what runs in a jail has no network, what runs elsewhere has."""

from __future__ import annotations

import socket
import threading

__all__ = ["CALL", "SAFE", "Home"]

CALL = """
def call(what):
    import socket
    with socket.create_connection(("127.0.0.1", {port}), timeout=2) as client:
        client.sendall(what.encode())
"""
SAFE = """
def safe_call(what):
    try:
        call(what)
    except BaseException:
        pass
"""


class Home:
    """Hears who calls home."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.heard: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            with client:
                self.heard.append(client.recv(100).decode(errors="replace"))
