"""Reads what raysandbox logged about this cluster's jails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray

from raysandbox.worker.events import FILE_NAME


def events() -> list[dict[str, Any]]:
    """All events so far."""
    log = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
    # One for each worker behind a wall, or one for all.
    return [
        json.loads(line)
        for path in log.glob(f"{Path(FILE_NAME).stem}*.jsonl")
        for line in path.read_text().splitlines()
    ]


def ended(task: str) -> list[dict[str, Any]]:
    """The ends of jails that ran a task of this name."""
    return [e for e in events() if e["event"] == "jail_ended" and task in e["tasks"]]
