"""The audit log: one JSON line per decision, chained by hashes.

Each line carries ``n``, its number, and ``h``, the SHA-256 of the line before's
``h`` and this line's text without it; a line that was changed, removed, put in
or moved breaks the chain there. Cutting lines off the end is seen against
``head.json``, which is written after them. Whoever may write to the directory
may rewrite all of it: give the last hash (`raysandbox audit verify` prints it)
to somewhere else, and check with ``--expect``.

Files are ``audit.jsonl`` and, rotated, ``audit-<first number>.jsonl``; the
chain runs on from one to the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import write_file

__all__ = ["AuditLog", "query", "verify"]

START = "0" * 64
CURRENT = "audit.jsonl"


def _chain(previous: str, text: str) -> str:
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True)


class AuditLog:
    """Appends to the log of one directory; one writer at a time."""

    def __init__(self, path: Path, rotate_bytes: int, keep_files: int) -> None:
        self.path, self.rotate_bytes, self.keep_files = path, rotate_bytes, keep_files
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.number, self.hash = 0, START
        for record, digest in _lines(path):
            self.number, self.hash = record["n"], digest
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self.path / CURRENT, flags, 0o600)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write records, all or none.

        Raises:
            OSError: Nothing of them is in the log, and the chain is as it was.
        """
        number, digest, text = self.number, self.hash, []
        for record in records:
            number += 1
            line = _dump({"n": number, **record})
            digest = _chain(digest, line)
            text.append(f'{line[:-1]},"h":"{digest}"}}\n')
        data = "".join(text).encode()
        start = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise
        self.number, self.hash = number, digest
        if start + len(data) >= self.rotate_bytes:
            self._rotate()

    def sync(self) -> None:
        """Write the log's end where a cut would show, and flush both to disk."""
        os.fdatasync(self._fd)
        head = {"n": self.number, "h": self.hash, "t": time.time()}
        write_file(self.path / "head.json", _dump(head))

    def close(self) -> None:
        """Flush and close."""
        self.sync()
        os.close(self._fd)

    def _rotate(self) -> None:
        os.close(self._fd)
        name = f"audit-{self.number:012d}.jsonl"
        os.rename(self.path / CURRENT, self.path / name)
        self._fd = self._open()
        old = sorted(self.path.glob("audit-*.jsonl"))
        for file in old[: -self.keep_files]:
            file.unlink()


def _files(path: Path) -> list[Path]:
    current = path / CURRENT
    found = sorted(path.glob("audit-*.jsonl"))
    return [*found, current] if current.exists() else found


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for file in _files(path):
        with file.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    yield record, record["h"]
                except (ValueError, KeyError):
                    # A half line is a crash's; `verify` names it.
                    continue


def verify(path: Path, expect: str = "") -> tuple[int, str]:
    """Check the whole chain.

    Returns:
        How many lines there are, and the last one's hash.

    Raises:
        ClusterError: The first line that does not follow from the one before,
            lines cut off the end, or a last hash that is not `expect`.
    """
    count, digest, number = 0, "", None
    seen: set[str] = {""} if not expect else set()
    for file in _files(path):
        with file.open("rb") as lines:
            for index, line in enumerate(lines, 1):
                where = f"{file}:{index}"
                try:
                    text = line.decode()
                    body, mark, tail = text.rpartition(',"h":"')
                    stored = tail.removesuffix('"}\n')
                    body += "}"
                    record = json.loads(body)
                    if not mark or len(stored) != 64:
                        raise ValueError
                except ValueError:
                    raise ClusterError(
                        where=where, what="is not a line of the audit log"
                    ) from None
                if number is None:
                    # Older files were rotated away: the chain starts here.
                    digest = START if record["n"] == 1 else ""
                elif record["n"] != number + 1:
                    raise ClusterError(
                        where=where,
                        what=f"line {record['n']} follows line {number}: lines are "
                        "missing, added or moved",
                    )
                if digest and _chain(digest, body) != stored:
                    raise ClusterError(
                        where=where,
                        what=f"line {record['n']} does not match its hash: it, or "
                        "the one before, was changed",
                    )
                number, digest = record["n"], stored
                seen.add(stored)
                count += 1
    head = path / "head.json"
    if head.exists():
        end = json.loads(head.read_text())
        if end["n"] > (number or 0) or (end["n"] and end["h"] not in seen):
            raise ClusterError(
                where=str(head),
                what=f"the log ended at line {end['n']}, and now at {number or 0}: "
                "lines were cut off",
            )
    if expect and expect not in seen:
        raise ClusterError(
            where=str(path), what=f"no line has the hash {expect}: the log was replaced"
        )
    return count, digest


def query(
    path: Path,
    *,
    who: str = "",
    what: str = "",
    since_s: float | None = None,
    denied: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the records that match.

    Args:
        path: Directory of the log.
        who: Part of the identity or source.
        what: Part of the method, object or event.
        since_s: Only of the last so many seconds.
        denied: Only what was refused.
    """
    start = time.time() - since_s if since_s is not None else 0.0
    for record, _ in _lines(path):
        if record.get("t", 0) < start or (denied and record.get("ok", True)):
            continue
        whose = f"{record.get('who', '')} {record.get('source', '')}"
        about = " ".join(
            str(record.get(k, "")) for k in ("method", "object", "event", "why")
        )
        if who in whose and what in about:
            yield record
