"""Drives `tests.node.side`: a Ray of its own in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.peer import Peer


class Side(Peer):
    """A process of `tests.node.side`; see there for what it can be told."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(
            [sys.executable, "-m", "tests.node.side", kind, json.dumps(options)]
        )
