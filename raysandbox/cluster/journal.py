"""What the access service must still know after a restart: facts, one JSON line each.

A fact is a list: the name of a table, a key, a value. A line that a crash cut off
is taken out before the next one is written, or both would be lost. When the file
has grown well past what is true now, it is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.lines import LineFile
from raysandbox.cluster.settings import write_file

__all__ = ["Journal"]

COMPACT_BYTES = 8 << 20


class Journal:
    """The file of facts; one process writes it.

    Attributes:
        wants_compaction: Whether most of the file is no longer true.
    """

    def __init__(self, path: Path, compact_bytes: int = COMPACT_BYTES) -> None:
        self.path, self._compact_bytes = path, compact_bytes
        self._file = LineFile(path)
        self._threshold = compact_bytes

    def facts(self) -> Iterator[list[Any]]:
        """Yield what was written, oldest first.

        Raises:
            ClusterError: A line in it is damaged: who owns what is not known.
        """
        with self.path.open("rb") as lines:
            for index, line in enumerate(lines, 1):
                try:
                    fact = json.loads(line)
                    if not isinstance(fact, list) or len(fact) < 3:
                        raise ValueError
                except (ValueError, RecursionError):
                    raise ClusterError(
                        where=f"{self.path}:{index}",
                        what="is damaged: who owns which key is not known any more",
                        remedy="`raysandbox cluster down` and `up` begin anew",
                    ) from None
                yield fact

    def write(self, fact: list[Any]) -> None:
        """Append a fact.

        Raises:
            OSError: Nothing of it is in the file.
        """
        self._file.append(json.dumps(fact, separators=(",", ":")).encode() + b"\n")

    @property
    def wants_compaction(self) -> bool:
        """Whether most of the file is no longer true."""
        return self._file.end >= self._threshold

    def compact(self, facts: Iterable[list[Any]]) -> None:
        """Write the file anew with what is true now.

        Raises:
            OSError: The old file goes on.
        """
        text = "".join(json.dumps(f, separators=(",", ":")) + "\n" for f in facts)
        # Whatever becomes of it, not again before the file has doubled.
        self._threshold = max(self._compact_bytes, 2 * self._file.end)
        write_file(self.path, text)
        self._file.close()
        self._file = LineFile(self.path)
        self._threshold = max(self._compact_bytes, 2 * self._file.end)
