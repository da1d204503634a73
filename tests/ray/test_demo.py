"""The demo as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raysandbox", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """All attacks, as data."""
    done = _demo("--json", "--no-cost")
    assert done.returncode == 0, done.stdout + done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_every_attack_works_on_stock_ray_and_stops_here(table: dict[str, Any]) -> None:
    """Sixteen rows, each with the wall that stopped it."""
    assert table["ok"]
    assert len(table["attacks"]) >= 16
    for row in table["attacks"]:
        assert row["ok"], row
        assert row["stock"]["outcome"] == "through"
        assert row["sandbox"]["outcome"] == "stopped"
        assert row["sandbox"]["wall"]


def test_an_attack_that_gets_through_is_an_error() -> None:
    """What a wall did not stop makes a row that says so, whatever stock did."""
    from raysandbox.demo.attacks import ATTACKS
    from raysandbox.demo.compare import Row

    through = {"outcome": "through", "detail": "won", "wall": ""}
    stopped = {"outcome": "stopped", "detail": "lost", "wall": "a wall"}
    unclear = {"outcome": "unclear", "detail": "odd", "wall": ""}
    assert not Row(ATTACKS[0], through, stopped).problem
    assert "GOT THROUGH" in Row(ATTACKS[0], through, through).problem
    assert "unexpected" in Row(ATTACKS[0], through, unclear).problem
    assert "stock" in Row(ATTACKS[0], stopped, stopped).problem


def test_an_unknown_attack_is_refused() -> None:
    """The message names the attacks that there are."""
    done = _demo("--only", "no-such")
    assert done.returncode == 125
    assert "read-token" in done.stderr
