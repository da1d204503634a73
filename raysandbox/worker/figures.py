"""What this worker's jails came to, as metrics of Ray's own pipeline.

Tasks only count into plain dictionaries (well below a microsecond each); the
pump's thread hands the sums to ``ray.util.metrics`` once in a while. From there
they go to the node's agent, and appear at Ray's metrics port with the prefix
``ray_`` and labels of node and worker:

===========================================  =================================
``raysandbox_jails_started``                 jails that got a call, by profile
``raysandbox_jails_ended``                   by profile and outcome
``raysandbox_jail_wait_s``                   how long a call waited for its jail
``raysandbox_denials``                       system calls denied, by profile
``raysandbox_quota_refusals``                by profile and limit
``raysandbox_policy_refusals``               tasks the policy refused, by rule
``raysandbox_walls``                         jails by profile, wall, and whether it
                                             was enforced, degraded or off
===========================================  =================================

Labels come from the operator's files and from this program, never from a task:
a task could make as many series as it has names.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["Figures"]

_EVERY_S = 2.0
_MOST_WAITS = 4096
_BOUNDARIES_S = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0]
_OUTCOMES = frozenset(
    (
        "ok",
        "ended",
        "lost",
        "stopped",
        "set-up failed",
        "JailProtocolError",
        "TaskDenied",
        "TaskKilled",
        "TaskOutOfMemory",
        "TaskQuotaExceeded",
        "TaskTimedOut",
        "KeyboardInterrupt",
        "TaskCancelledError",
    )
)
# Metric: what it counts, and its labels.
_STARTED = "raysandbox_jails_started"
_COUNTERS = {
    _STARTED: ("Jails that got a call.", ("profile",)),
    "raysandbox_jails_ended": ("Jails that ended.", ("profile", "outcome")),
    "raysandbox_denials": ("System calls that were denied.", ("profile",)),
    "raysandbox_quota_refusals": (
        "Arguments, results and outputs over a limit.",
        ("profile", "limit"),
    ),
    "raysandbox_policy_refusals": ("Tasks that the policy refused.", ("rule",)),
    "raysandbox_walls": (
        "Jails by what became of a wall.",
        ("profile", "wall", "state"),
    ),
}


def outcome_label(outcome: str) -> str:
    """Return one of a few words for what became of a jail."""
    if outcome.startswith("exception:"):
        return "exception"
    return outcome if outcome in _OUTCOMES else "other"


class Figures:
    """Counts, and hands on what was counted."""

    def __init__(self) -> None:
        self._sums: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._waits: list[tuple[str, float]] = []
        self._walls: dict[str, Sequence[tuple[str, str]]] = {}
        self._lock = threading.Lock()
        self._metrics: dict[str, Any] = {}
        self._next = 0.0

    def jail_started(
        self, profile: str, wait_s: float, walls: Sequence[tuple[str, str]]
    ) -> None:
        """Count a jail that got its first call.

        Args:
            profile: Its profile's name.
            wait_s: How long the call waited for it.
            walls: Name and state of each wall of this profile's jails.
        """
        self._add(_STARTED, profile)
        self._walls[profile] = walls
        if len(self._waits) < _MOST_WAITS:
            self._waits.append((profile, wait_s))

    def jail_ended(self, profile: str, outcome: str, denials: int) -> None:
        """Count a jail's end."""
        self._add("raysandbox_jails_ended", profile, outcome_label(outcome))
        if denials:
            self._add("raysandbox_denials", profile, count=denials)

    def quota_refused(self, profile: str, limit: str) -> None:
        """Count something that was larger than ``limit``, a profile's key, allows."""
        self._add("raysandbox_quota_refusals", profile, limit)

    def policy_refused(self, rule: str) -> None:
        """Count a task that a rule of the policy refused."""
        self._add("raysandbox_policy_refusals", rule)

    def _add(self, name: str, *labels: str, count: int = 1) -> None:
        with self._lock:
            self._sums[name, labels] += count

    def flush(self, *, now: bool = False) -> None:
        """Hand on what was counted, every few seconds; called often."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY_S
        with self._lock:
            sums, self._sums = self._sums, Counter()
        waits, self._waits = self._waits, []
        for (name, labels), count in sums.items():
            self._count(name, labels, count)
            if name == _STARTED:
                for wall in self._walls[labels[0]]:
                    self._count("raysandbox_walls", (*labels, *wall), count)
        for profile, wait_s in waits:
            self._histogram().observe(wait_s, {"profile": profile})

    def _count(self, name: str, labels: tuple[str, ...], count: int) -> None:
        text, keys = _COUNTERS[name]
        if name not in self._metrics:
            from ray.util import metrics

            self._metrics[name] = metrics.Counter(name, text, keys)
        self._metrics[name].inc(count, dict(zip(keys, labels)))

    def _histogram(self) -> Any:
        name = "raysandbox_jail_wait_s"
        if name not in self._metrics:
            from ray.util import metrics

            self._metrics[name] = metrics.Histogram(
                name,
                "Seconds that a call waited for its jail.",
                _BOUNDARIES_S,
                ("profile",),
            )
        return self._metrics[name]
