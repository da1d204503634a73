"""The audit log: one JSON line per decision, chained by hashes.

Each line carries ``n``, its number, and ``h``, the SHA-256 of the line before's
``h`` and this line's text without it. Files are ``audit.jsonl`` and, rotated,
``audit-<last number>.jsonl``; the chain runs on from one to the next. When the
oldest file is removed, a line says up to which number and hash the log is gone.

What `verify` sees, and against what:

==============================  ==============================================
a line changed, put in, moved   the chain
a line or file missing inside   numbers and chain
the oldest files missing        the line that says what was removed by rotation
lines or files cut off the end  ``head.json``, written each second after them;
                                an anchor file (``audit.anchor_file``)
everything replaced by an       the anchor file, or a hash that was noted
older copy, or written anew     elsewhere (``--expect``): no chain can show that
==============================  ==============================================

Up to a second of lines may be missing after a crash, and one line be torn: it
is cut away at the next start, and what it held is put into the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.lines import LineFile
from raysandbox.cluster.settings import write_file

__all__ = ["AuditLog", "Checked", "Fold", "plain", "query", "tail_problem", "verify"]

START = "0" * 64
CURRENT = "audit.jsonl"
HEAD = "head.json"
ANCHOR_EVERY_S = 60.0
# How much of a torn line goes into the log.
TORN_BYTES = 2000
# Different refusals of one caller, and of all, that one second may log.
PER_CALLER = 20
PER_FOLD = 500


def _chain(previous: str, text: str) -> str:
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True)


class AuditLog:
    """Appends to the log of one directory; one writer at a time.

    Args:
        path: The directory; made with mode 0700.
        rotate_bytes: Size at which a file is closed and the next begun.
        keep_files: Closed files that stay.
        anchor: File that the chain's end is appended to once a minute, or None.

    Attributes:
        number: Number of the last line.
        hash: Its hash.
        torn: What a crash left of a line, taken out of the file; or ``""``.

    Raises:
        ClusterError: Another process writes this log.
        OSError: The directory or file can't be made.
    """

    def __init__(
        self,
        path: Path,
        rotate_bytes: int,
        keep_files: int,
        anchor: Path | None = None,
    ) -> None:
        self.path, self.rotate_bytes, self.keep_files = path, rotate_bytes, keep_files
        self._anchor, self._anchored, self._anchored_at = anchor, 0, 0.0
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(
            path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ClusterError(
                where=str(path),
                what="another process writes this audit log",
                remedy="`raysandbox cluster status` says which guard runs",
            ) from None
        self.number, self.hash = 0, START
        for file in reversed(_files(path)):
            found = _last(file)
            if found is not None:
                self.number, self.hash = found
                break
        self._file = LineFile(path / CURRENT)
        self.torn = self._file.torn[:TORN_BYTES].decode("utf-8", "backslashreplace")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write records, all or none.

        Raises:
            OSError: Nothing of them is in the log, and the chain is as it was.
        """
        if not records:
            return
        if self._file.end >= self.rotate_bytes:
            self._rotate()
        number, digest, text = self.number, self.hash, []
        for record in records:
            number += 1
            line = _dump({"n": number, **record})
            digest = _chain(digest, line)
            text.append(f'{line[:-1]},"h":"{digest}"}}\n')
        self._file.append("".join(text).encode())
        self.number, self.hash = number, digest

    def sync(self) -> None:
        """Flush, and write the log's end where a cut would show.

        Raises:
            OSError: The disk is full or the log's file is not where it was; the
                lines themselves stay written.
        """
        os.fdatasync(self._file.fd)
        head = {"n": self.number, "h": self.hash, "t": time.time()}
        write_file(self.path / HEAD, _dump(head))
        if time.monotonic() - self._anchored_at >= ANCHOR_EVERY_S:
            self.anchor()
        if not self._file.is_in_place():
            # Somebody took the file away: what comes next must not go with it.
            self._file.close()
            self._file = LineFile(self.path / CURRENT)
            raise OSError(errno.ESTALE, "the file was removed or replaced")

    def anchor(self) -> None:
        """Append the chain's end to the anchor file, if it has moved.

        Raises:
            OSError: It can't be written.
        """
        if self._anchor is None or self._anchored == self.number:
            return
        line = _dump({"n": self.number, "h": self.hash, "t": round(time.time(), 3)})
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._anchor, flags, 0o600)
        try:
            os.write(fd, f"{line}\n".encode())
            os.fdatasync(fd)
        finally:
            os.close(fd)
        self._anchored, self._anchored_at = self.number, time.monotonic()

    def close(self) -> None:
        """Flush, anchor and close.

        Raises:
            OSError: See `sync`; everything is closed nonetheless.
        """
        try:
            self.sync()
            self.anchor()
        finally:
            self._file.close()
            os.close(self._lock)

    def _rotate(self) -> None:
        """Begin a new file, and remove the oldest when there are too many.

        Raises:
            OSError: The old file is still the current one.
        """
        self._file.settle()
        os.fdatasync(self._file.fd)
        old = self.path / f"audit-{self.number:012d}.jsonl"
        os.rename(self.path / CURRENT, old)
        try:
            new = LineFile(self.path / CURRENT)
        except OSError:
            os.rename(old, self.path / CURRENT)
            raise
        self._file.close()
        self._file = new
        closed = sorted(self.path.glob("audit-*.jsonl"))
        gone = closed[: -self.keep_files]
        if not gone:
            return
        last = _last(gone[-1])
        number, digest = last if last is not None else (0, "")
        # The line first: files without it would look as if somebody took them.
        self.append(
            [
                {
                    "t": round(time.time(), 6), "event": "audit_rotated",
                    "gone": number, "gone_h": digest,
                }
            ]
        )  # fmt: skip
        for file in gone:
            file.unlink(missing_ok=True)


class Fold:
    """Counts equal refusals instead of keeping each.

    A flood must not write the log full, nor push its history out by rotation:
    of one caller at most `PER_CALLER` different refusals are kept until the next
    `take`, of all callers `PER_FOLD`; the rest is one line with a count.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], dict[str, Any]] = {}
        self._of: dict[tuple[str, str], int] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Take one refusal in."""
        source = str(record.get("source", "")).rpartition(":")[0]
        caller = (str(record.get("who", "")), source)
        key = (
            *caller, *(str(record.get(k, "")) for k in ("method", "event", "why",
                                                        "object")),
        )  # fmt: skip
        if key not in self._kept:
            if len(self._kept) >= PER_FOLD:
                caller, key = ("", ""), ("", "", "(many)")
            elif self._of.get(caller, 0) >= PER_CALLER:
                key = (*caller, "(many)")
            if key[-1] == "(many)":
                kept: dict[str, Any] = {
                    k: record[k] for k in ("t", "ok") if k in record
                }
                if caller[0]:
                    kept |= {k: record[k] for k in ("who", "role") if k in record}
                if caller[1]:
                    kept["source"] = record["source"]
                kept |= {"event": "refusals_folded", "why": "many different refusals"}
                record = kept if key not in self._kept else record
        known = self._kept.get(key)
        if known is None:
            self._kept[key] = record
            self._of[caller] = self._of.get(caller, 0) + 1
        else:
            known["count"] = known.get("count", 1) + 1
            known["in"] = known.get("in", 0) + record.get("in", 0)

    def take(self) -> list[dict[str, Any]]:
        """Return what was kept, and begin anew."""
        kept, self._kept, self._of = list(self._kept.values()), {}, {}
        return kept


def plain(text: object) -> str:
    r"""Return text that a terminal can only print.

    Names and reasons come from callers: an escape sequence in one would be run by
    the terminal of whoever reads the log, and a direction mark would show another
    name than it is. What is not printable becomes ``\x1b``, ``\u202e``.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


def _files(path: Path) -> list[Path]:
    current = path / CURRENT
    found = sorted(path.glob("audit-*.jsonl"))
    return [*found, current] if current.exists() else found


def _parse(line: bytes) -> tuple[dict[str, Any], str, str]:
    """Return record, hash, and the text that was hashed; ValueError if none."""
    text = line.decode()
    body, mark, tail = text.rpartition(',"h":"')
    digest = tail.removesuffix('"}\n')
    body += "}"
    try:
        record = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not mark or len(digest) != 64 or not isinstance(record, dict):
        raise ValueError("not a line of the log")
    if type(record.get("n")) is not int:
        raise ValueError("no number")
    return record, digest, body


def _last(file: Path) -> tuple[int, str] | None:
    """Return number and hash of a file's last whole line."""
    with file.open("rb") as lines:
        size = lines.seek(0, os.SEEK_END)
        step = 1 << 16
        while True:
            lines.seek(max(0, size - step))
            for line in reversed(lines.read(step).splitlines(keepends=True)):
                with contextlib.suppress(ValueError):
                    record, digest, _ = _parse(line)
                    return record["n"], digest
            if step >= size:
                return None
            step *= 16


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for file in _files(path):
        with contextlib.suppress(FileNotFoundError), file.open("rb") as lines:
            for line in lines:
                # What is no line is for `verify` to name.
                with contextlib.suppress(ValueError):
                    yield _parse(line)[0]


@dataclass
class Checked:
    """What `verify` found in order.

    Attributes:
        lines: How many there are.
        first: Number of the first; above 1 when rotation removed older ones.
        last: Number of the last.
        hash: Hash of the last: the one to note elsewhere.
        anchors: How many anchors were found in the chain.
        notes: What is no fault but worth knowing.
    """

    lines: int = 0
    first: int = 0
    last: int = 0
    hash: str = ""
    anchors: int = 0
    notes: list[str] = field(default_factory=list)


def verify(path: Path, expect: str = "", anchors: Path | None = None) -> Checked:
    """Check the whole chain.

    Args:
        path: Directory of the log.
        expect: A hash noted earlier; it must be in the chain.
        anchors: The anchor file; every line of it must be in the chain.

    Raises:
        ClusterError: The first line that does not follow from the one before,
            lines that are missing, or a noted hash that is not there.
    """
    if not path.is_dir():
        raise ClusterError(
            where=str(path),
            what="there is no audit log",
            remedy="run this on the head, where the guard writes it",
        )
    for attempt in range(3):
        before = [file.name for file in _files(path)]
        try:
            return _verify(path, expect, anchors)
        except (ClusterError, OSError) as error:
            # A guard that runs may have rotated its files meanwhile.
            if attempt < 2 and before != [file.name for file in _files(path)]:
                continue
            if isinstance(error, ClusterError):
                raise
            raise ClusterError(
                where=str(error.filename or path),
                what=f"can't be read: {error.strerror}",
            ) from None
    raise AssertionError


def _load_end(where: str, text: str | bytes) -> tuple[int, str]:
    try:
        end = json.loads(text)
        number, digest = end["n"], end["h"]
        if type(number) is not int or not isinstance(digest, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ClusterError(where=where, what="holds no end of a chain") from None
    return number, digest


def _ends(path: Path, anchors: Path | None) -> dict[int, tuple[str, str]]:
    """Return line number → its hash as noted, and where it was noted."""
    noted: dict[int, tuple[str, str]] = {}
    files = []
    if anchors is not None:
        try:
            files = anchors.read_bytes().splitlines()
        except OSError as error:
            raise ClusterError(
                where=str(anchors), what=f"can't be read: {error.strerror}"
            ) from None
        if not files:
            raise ClusterError(where=str(anchors), what="holds no anchor")
    for index, line in enumerate(files, 1):
        where = f"{anchors}:{index}"
        number, digest = _load_end(where, line)
        if noted.setdefault(number, (digest, where))[0] != digest:
            raise ClusterError(
                where=where,
                what=f"line {number} had another hash in an earlier anchor: the log "
                "was written anew",
            )
    head = path / HEAD
    try:
        number, digest = _load_end(str(head), head.read_bytes())
    except FileNotFoundError:
        if _files(path):
            raise ClusterError(
                where=str(head),
                what="is missing, so lines cut off the end would not show",
                remedy="compare the last hash with one that was noted elsewhere",
            ) from None
    else:
        if number and noted.setdefault(number, (digest, str(head)))[0] != digest:
            raise ClusterError(
                where=noted[number][1],
                what=f"says another hash of line {number} than {head}",
            )
    return noted


def _verify(
    path: Path, expect: str, anchors: Path | None, *, whole: bool = True
) -> Checked:
    noted = _ends(path, anchors)
    done, digest, gone, expected = Checked(), "", (0, START), not expect
    first_line: tuple[str, str, str] = ("", "", "")
    files = _files(path)
    before = None if whole or len(files) < 2 else _last(files[-2])
    if before is not None:
        files, (done.last, digest) = files[-1:], before
    for file in files:
        with file.open("rb") as lines:
            for index, line in enumerate(lines, 1):
                where = f"{file}:{index}"
                try:
                    record, stored, body = _parse(line)
                except ValueError:
                    if file is files[-1] and not line.endswith(b"\n"):
                        done.notes.append(f"{where}: half a line, as a crash leaves it")
                        break
                    raise ClusterError(
                        where=where, what="is not a line of the audit log"
                    ) from None
                number = record["n"]
                if not done.lines and before is None:
                    done.first, first_line = number, (where, body, stored)
                elif number != done.last + 1:
                    raise ClusterError(
                        where=where,
                        what=f"line {number} follows line {done.last}: lines are "
                        "missing, added or moved",
                    )
                elif _chain(digest, body) != stored:
                    raise ClusterError(
                        where=where,
                        what=f"line {number} does not match its hash: it, or the one "
                        "before, was changed",
                    )
                if record.get("event") == "audit_rotated":
                    gone = _gone(where, record)
                if number in noted:
                    text, whose = noted.pop(number)
                    if text != stored:
                        raise ClusterError(
                            where=where,
                            what=f"line {number} is not the one that {whose} knew: "
                            "the log was written anew",
                        )
                    done.anchors += 1
                expected = expected or stored == expect
                done.last, digest = number, stored
                done.lines += 1
    done.hash = digest
    if before is None:
        _check_begin(path, done, gone, first_line)
    for number, (_, whose) in sorted(noted.items()):
        if number > done.last:
            raise ClusterError(
                where=whose,
                what=f"the log had {number} lines and ends at {done.last}: lines were "
                "cut off, or an older copy was put back",
            )
    if not expected:
        raise ClusterError(
            where=str(path), what=f"no line has the hash {expect}: the log was replaced"
        )
    return done


def _gone(where: str, record: dict[str, Any]) -> tuple[int, str]:
    number, digest = record.get("gone"), record.get("gone_h")
    if type(number) is not int or not isinstance(digest, str):
        raise ClusterError(where=where, what="is not a line of the audit log")
    return number, digest


def _check_begin(
    path: Path, done: Checked, gone: tuple[int, str], line: tuple[str, str, str]
) -> None:
    """Check that the log begins where its own rotation says."""
    where, body, stored = line
    number, digest = gone
    if done.lines and done.first > number + 1:
        raise ClusterError(
            where=str(path),
            what=f"begins with line {done.first}, and rotation removed only those up "
            f"to {number}: the oldest files were removed by somebody",
        )
    if done.first == number + 1 and digest and _chain(digest, body) != stored:
        raise ClusterError(
            where=where,
            what=f"line {done.first} does not match its hash: it, or the one before, "
            "was changed",
        )
    if 1 < done.first <= number:
        done.notes.append(
            f"{where}: of a file that rotation was removing; nothing tells whether "
            "this one line was changed"
        )
    if done.first > 1:
        done.notes.append(f"lines before {done.first} were removed by rotation")


def tail_problem(path: Path) -> str:
    """Return what is wrong with the end of the chain, or "".

    For a guard that starts: the current file alone, from the last line of the one
    before, because all of them could take a minute.
    """
    try:
        if _files(path):
            _verify(path, "", None, whole=False)
    except (ClusterError, OSError) as error:
        return str(error)
    return ""


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
    start = time.time() - since_s if since_s is not None else None
    for record in _records(path):
        if denied and record.get("ok", True):
            continue
        when = record.get("t", 0)
        if start is not None and (
            not isinstance(when, (int, float)) or not when >= start
        ):
            continue
        whose = f"{record.get('who', '')} {record.get('source', '')}"
        about = " ".join(
            str(record.get(k, "")) for k in ("method", "object", "event", "why")
        )
        if who in whose and what in about:
            yield record
