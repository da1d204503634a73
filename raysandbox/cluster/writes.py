"""Writes of keys that the GCS may or may not have done yet.

A call is decided before it is made, and who made it can give it up while it is held
back, on its way or at work. Of two writes of one key that are open at a time nobody
here knows which came last. So what a write makes of a key is certain once it has
ended well, if no other write of that key was open in the meantime.

Pure: the time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

__all__ = ["Write", "Writes"]

# A call that was given up may still be at work in the GCS for so long.
UNSURE_S = 10.0
# A call whose end was never heard of is given up after this long.
OPEN_S = 120.0
MOST_NAMES = 100_000

Name = TypeVar("Name")
Entry = TypeVar("Entry")


class _Key:
    __slots__ = ("deletions", "last", "open", "since", "unsure")

    def __init__(self) -> None:
        self.open = self.deletions = self.last = 0
        self.since = self.unsure = 0.0

    def is_idle(self, now: float) -> bool:
        quiet = self.open == 0 or now - self.since > OPEN_S
        return quiet and now >= self.unsure


class Write(Generic[Name, Entry]):
    """One call, and what it makes of its keys.

    Attributes:
        who: Who pays for them.
        before: Each key, and what was known of it when the call was decided.
        made: What it is when the call was done; None when it is gone.
    """

    __slots__ = ("alone", "before", "made", "number", "who")

    def __init__(
        self, who: str, before: Mapping[Name, Entry], made: Entry | None
    ) -> None:
        self.who, self.before, self.made = who, before, made
        self.number = 0
        self.alone: dict[Name, tuple[_Key, bool]] = {}


class Writes(Generic[Name, Entry]):
    """All open writes, by request."""

    def __init__(self) -> None:
        self._calls: dict[str, Write[Name, Entry]] = {}
        self._keys: dict[Name, _Key] = {}
        self._deletions: Counter[str] = Counter()
        self._number = 0

    def begin(self, request_id: str, now: float, write: Write[Name, Entry]) -> None:
        """A write was let through."""
        # Two calls of one name: of the first no end will be known.
        self.end(request_id, now, done=False)
        if len(self._calls) >= MOST_NAMES:
            self.end(next(iter(self._calls)), now, done=False)
        if len(self._keys) >= MOST_NAMES:
            self._keys = {k: v for k, v in self._keys.items() if not v.is_idle(now)}
        self._number += 1
        write.number = self._number
        for name in write.before:
            key = self._keys.get(name)
            if alone := key is None or key.is_idle(now):
                key = self._keys[name] = _Key()
            write.alone[name] = key, alone
            key.open += 1
            key.deletions += write.made is None
            key.last, key.since = write.number, now
        self._calls[request_id] = write
        if write.made is None:
            self._deletions[write.who] += 1

    def end(
        self, request_id: str, now: float, *, done: bool
    ) -> tuple[Write[Name, Entry] | None, list[Name]]:
        """A call has ended: return the write that it was, and which keys are certain.

        Args:
            request_id: Which call; most are no writes.
            now: When.
            done: Whether the GCS has answered that it was done.
        """
        write = self._calls.pop(request_id, None)
        if write is None:
            return None, []
        if write.made is None:
            self._deletions -= Counter([write.who])
        certain = []
        for name, (key, alone) in write.alone.items():
            key.open -= 1
            key.deletions -= write.made is None
            if not done:
                key.unsure = now + UNSURE_S
            elif alone and key.last == write.number:
                certain.append(name)
            if self._keys.get(name) is key and key.is_idle(now):
                del self._keys[name]
        return write, certain

    def is_deleted(self, name: Name) -> bool:
        """Whether a deletion of a key is open."""
        key = self._keys.get(name)
        return key is not None and key.deletions > 0

    def deletes(self, who: str) -> bool:
        """Whether a deletion is open of what somebody pays for."""
        return who in self._deletions
