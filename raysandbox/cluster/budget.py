"""What one caller may still ask of the GCS: buckets that can go into debt.

A call over a limit is not refused at once but made to wait until its caller has
earned it, up to `PATIENCE_S`: Ray's clients take a slow answer as it is, and stop
for a second or more after a refusal. What a call costs is taken before it is made,
so one that is abandoned has cost its caller what it would have cost the GCS.

Pure: the time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

from raysandbox.cluster.settings import RoleLimit

__all__ = ["LARGE_BYTES", "PATIENCE_S", "PENALTY_S", "Account", "OverBudgetError"]

# How long a call may have to wait before it is refused.
PATIENCE_S = 1.0
# How long a refusal is held back: whoever repeats refused calls in a loop is slowed
# down to four of them a second for each of its loops.
PENALTY_S = 0.25
# From here on a call takes a place in flight. The end of a call is known when the
# guard's log says so, some time later: a place for each small call would be held
# long after it, and small calls are counted by their bucket anyhow.
LARGE_BYTES = 64 << 10
# Events of tasks are kept too, and are no requests that anybody waits for: a driver
# that starts two thousand tasks a second sends a megabyte of them, in one call. So
# they have a bucket of their own, which refills this much faster than that of writes.
EVENTS = 8
# A call that its end was never heard of is given up after this long.
IN_FLIGHT_S = 120.0


class OverBudgetError(Exception):
    """A call that its caller can't have.

    Attributes:
        why: Which limit, in words.
        retry: Whether it can have it later.
    """

    def __init__(self, why: str, *, retry: bool) -> None:
        super().__init__(why)
        self.why, self.retry = why, retry


class _Bucket:
    __slots__ = ("burst", "left", "per_s", "seen")

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self.per_s, self.burst, self.left, self.seen = per_s, burst, burst, now

    def wait_s(self, amount: float, now: float) -> float:
        """Return how long until so much is there."""
        self.left = min(self.burst, self.left + (now - self.seen) * self.per_s)
        self.seen = now
        return max(0.0, (amount - self.left) / self.per_s)


class Account:
    """One caller's budget."""

    __slots__ = (
        "calls", "events", "flight", "held", "limit", "reads", "refused", "writes"
    )  # fmt: skip

    def __init__(self, limit: RoleLimit, now: float) -> None:
        self.limit = limit
        self.calls = _Bucket(limit.calls_per_s, limit.calls_burst, now)
        self.reads = _Bucket(limit.read_bytes_per_s, limit.read_burst_bytes, now)
        self.writes = _Bucket(limit.write_bytes_per_s, limit.write_burst_bytes, now)
        many = EVENTS * limit.write_bytes_per_s
        self.events = _Bucket(many, limit.write_burst_bytes, now)
        self.refused = _Bucket(many, limit.write_burst_bytes, now)
        self.held = 0
        self.flight: dict[str, float] = {}

    def count(self, now: float) -> float:
        """Charge for a call as such, whatever becomes of it; return its wait."""
        wait_s = self.calls.wait_s(1, now)
        if wait_s > PATIENCE_S:
            raise OverBudgetError("calls per second of this identity", retry=True)
        self.calls.left -= 1
        return wait_s

    def hold(self, now: float, size: int) -> None:
        """Charge for a request before it is looked into.

        `give_back` is for those that go on: who is refused has it to pay.

        Raises:
            OverBudgetError: Nothing was charged.
        """
        self.held = min(size, self.limit.write_burst_bytes)
        if self.refused.wait_s(self.held, now) > PATIENCE_S:
            self.held = 0
            raise OverBudgetError(
                "bytes per second of refused calls of this identity", retry=True
            )
        self.refused.left -= self.held

    def give_back(self) -> None:
        """What was held is not to be paid."""
        self.refused.left += self.held
        self.held = 0

    def charge(
        self, now: float, reads: int, writes: int, request_id: str, events: int = 0
    ) -> float:
        """Charge for a call's bytes; return its wait.

        Raises:
            OverBudgetError: Nothing was charged.
        """
        limit = self.limit
        for key, size, most in (
            ("write_burst_bytes", max(writes, events), limit.write_burst_bytes),
            ("read_burst_bytes", reads, limit.read_burst_bytes),
        ):
            if size > most:
                raise OverBudgetError(
                    f"{size} bytes at once are over this role's {key} = {most} "
                    "(cluster.toml, limits.roles)",
                    retry=False,
                )
        large = reads + writes + events >= LARGE_BYTES
        if large and len(self.flight) >= limit.in_flight:
            self.flight = {
                key: since
                for key, since in self.flight.items()
                if now - since <= IN_FLIGHT_S
            }
            if len(self.flight) >= limit.in_flight:
                raise OverBudgetError(
                    f"{limit.in_flight} large calls of this identity are in flight",
                    retry=True,
                )
        wait_s = max(
            self.reads.wait_s(reads, now), self.writes.wait_s(writes, now),
            self.events.wait_s(events, now),
        )  # fmt: skip
        if wait_s > PATIENCE_S:
            raise OverBudgetError("bytes per second of this identity", retry=True)
        self.reads.left -= reads
        self.writes.left -= writes
        self.events.left -= events
        if large and request_id:
            self.flight[request_id] = now
        return wait_s

    def ended(self, request_id: str) -> None:
        """A call has ended, in whatever way: its place in flight is free."""
        self.flight.pop(request_id, None)
