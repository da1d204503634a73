"""Both sides of the demo, and what they say together."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raysandbox.demo.attacks import ATTACKS, Attack
from raysandbox.errors import InternalError

__all__ = ["SIDES", "Row", "attacks", "honest"]

SIDES = ("stock", "strict", "fast")
_TIMEOUT_S = 240.0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one attack on both sides.

    Attributes:
        stock: Verdict on stock Ray: ``outcome`` (through, stopped, unclear),
            ``detail``, ``wall``, ``error``, ``seconds``.
        sandbox: The same in the sandbox.
    """

    attack: Attack
    stock: dict[str, Any]
    sandbox: dict[str, Any]

    @property
    def problem(self) -> str:
        """Why this row proves nothing, or worse; ``""`` if all is as it must be."""
        if self.stock["outcome"] != "through":
            return f"did not work on stock Ray: {self.stock['detail']}"
        if self.sandbox["outcome"] == "through":
            return f"GOT THROUGH the sandbox: {self.sandbox['detail']}"
        if self.sandbox["outcome"] != "stopped":
            return f"ended in an unexpected way: {self.sandbox['detail']}"
        return ""

    def data(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {
            "attack": self.attack.name,
            "title": self.attack.title,
            "stock": self.stock,
            "sandbox": self.sandbox,
            "ok": not self.problem,
        }


def _lines(side: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run one side; yield what it says, line by line."""
    command = [sys.executable, "-m", "raysandbox.demo.driver", side, *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    )
    try:
        out, errors = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not found:
        raise InternalError(
            what=f"the demo's {side} side said nothing:\n{errors[-3000:]}"
        )
    yield from found


def attacks(chosen: Sequence[Attack], progress: Progress) -> list[Row]:
    """Run attacks on both sides.

    Stock Ray's node ends with the first attack that kills it: the others of that
    kind get a node of their own there.

    Args:
        chosen: Which.
        progress: Called with a line before each step.
    """
    calm = [attack.name for attack in chosen if not attack.fatal]
    fatal = [attack.name for attack in chosen if attack.fatal]
    groups = {
        "stock": [[*calm, *fatal[:1]], *([name] for name in fatal[1:])],
        "sandbox": [[*calm, *fatal]],
    }
    verdicts: dict[str, dict[str, dict[str, Any]]] = {"stock": {}, "sandbox": {}}
    for side, found in verdicts.items():
        where = "stock Ray" if side == "stock" else "the sandbox"
        for names in filter(None, groups[side]):
            what = names[0] if len(names) == 1 else f"{len(names)} attacks"
            progress(f"{what} on {where}")
            for verdict in _lines(side, "attacks", *names):
                found[verdict["name"]] = verdict
    nothing = {"outcome": "unclear", "detail": "no verdict", "wall": "", "seconds": 0.0}
    return [
        Row(
            attack,
            verdicts["stock"].get(attack.name, nothing),
            verdicts["sandbox"].get(attack.name, nothing),
        )
        for attack in ATTACKS
        if attack in chosen
    ]


def honest(progress: Progress, rounds: int = 2) -> dict[str, dict[str, float]]:
    """Return milliseconds per honest task: job → side → median.

    The sides take turns, so that what else the machine does hits them alike.
    """
    seen: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for side in SIDES:
            progress(f"honest tasks, {side}, round {number + 1} of {rounds}")
            for line in _lines(side, "honest"):
                for job, value_ms in line.items():
                    seen.setdefault(job, {}).setdefault(side, []).append(value_ms)
    return {
        job: {side: statistics.median(values) for side, values in sides.items()}
        for job, sides in seen.items()
    }
