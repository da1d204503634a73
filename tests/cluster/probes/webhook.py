"""A webhook's receiver on loopback: appends each body to a file.

Arguments: the port and the file.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Keep the body."""
        body = self.rfile.read(int(self.headers["content-length"]))
        with open(sys.argv[2], "ab") as file:
            file.write(body + b"\n")
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


HTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
