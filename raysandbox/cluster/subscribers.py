"""Who waits for news under which name.

A client of the GCS's news calls itself by an identifier that it chooses: whoever knows
another's is told the other's news, and can cancel them. And the GCS keeps some 20 KB
for each identifier, for minutes after its last call. So an identifier is whose it was
first, and one caller has so many of them.

Pure: the time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

from collections import Counter

__all__ = ["FORGOTTEN_S", "Subscribers"]

# RAY_subscriber_timeout_ms is 5 minutes. After as long without an answer the GCS ends
# a call, after as long without a call it forgets who called, and it looks that often.
FORGOTTEN_S = 900.0


class Subscribers:
    """Identifiers that the GCS may know, by who uses them.

    Args:
        most: Of one caller.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Whose, who used it, when: the one that was used longest ago comes first.
        self._known: dict[str, tuple[str, str, float]] = {}
        self._of: Counter[str] = Counter()

    def whose(self, identifier: str, now: float) -> str:
        """Return the URI of whom an identifier is, or ``""``."""
        self._forget(now)
        return self._known.get(identifier, ("", "", 0.0))[1]

    def use(self, who: str, uri: str, identifier: str, now: float) -> str:
        """Note that its owner uses an identifier; return why it may not, or ``""``.

        Args:
            who: Whose the identifier is counted as.
            uri: The caller.
            identifier: What it calls itself.
            now: The time.
        """
        self._forget(now)
        if identifier not in self._known and self._of[who] >= self._most:
            return (
                f"{self._most} subscribers of this identity; the GCS forgets one "
                f"{FORGOTTEN_S / 60:g} minutes after its last call (cluster.toml, "
                "limits.held_calls)"
            )
        self.drop(identifier)
        self._known[identifier] = who, uri, now
        self._of[who] += 1
        return ""

    def drop(self, identifier: str) -> None:
        """The GCS does not know it any more, or its owner is known by other means."""
        known = self._known.pop(identifier, None)
        if known is None:
            return
        self._of[known[0]] -= 1
        if not self._of[known[0]]:
            del self._of[known[0]]

    def _forget(self, now: float) -> None:
        while self._known:
            oldest = next(iter(self._known))
            if now - self._known[oldest][2] < FORGOTTEN_S:
                return
            self.drop(oldest)
