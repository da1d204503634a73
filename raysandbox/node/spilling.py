"""Which objects a node has spilled, written down by Ray's own spill workers.

Raylet has objects moved from the store to files by workers of Ray's that run no
code of users, and has the files removed once nothing in them is needed any more.
Here is what such a worker runs in place of Ray's ``default_worker.py``::

    python spilling.py [OPTION OF default_worker.py] …

It is Ray's worker, which besides keeps a directory (`directory`) in which each
object that is in a file has a link of its own, by its id. A link is there from before
the object leaves the store until its file is gone, so that an object that counts
against a job's quota is in the store or here until it is freed. The counts of quotas
(`raysandbox.worker.quota` and the proxy in front of the store) read this, and nobody
but these workers writes it.

Ray fuses what it spills at once, 100 MB or more, into one file, which is removed with
the last object in there. Here each job has files of its own, and large objects too:
else one object would hold what another job, or the same one, has long let go.
"""

from __future__ import annotations

import os
import runpy
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = [
    "VARIABLE",
    "Registry",
    "directory",
    "fused",
    "main",
    "recording",
    "which_spilled",
]

#: Variable with the directory, for the worker that writes.
VARIABLE = "RAYSANDBOX_SPILLED"

# Bytes of an object's id that are its job's.
_JOB = slice(20, 24)
# Of a job, for what Ray spills at once: 100 MB in fewer objects are large ones.
_MOST_FILES = 64


def directory(session_dir: str) -> str:
    """Return where what a session's nodes spilled is written down."""
    return os.path.join(session_dir, "raysandbox", "spilled")


def which_spilled(path: str, ids: Iterable[bytes]) -> set[bytes]:
    """Return those of `ids` that are in files; none where nobody writes them down.

    Ask the store first: what leaves it in between is found here.
    """
    return {each for each in ids if os.path.lexists(os.path.join(path, each.hex()))}


def _base(url: bytes) -> str:
    """Return the file of an object's URL, which ends with its place in there."""
    return url.decode().partition("?")[0]


class Registry:
    """The directory, as its writers see it.

    An object's link leads to the name of its batch: an object that was lost and made
    again may be in an older file as well. Beside the links each file has a list, by
    the file's name, with the file's path, its batch, and its objects.

    Args:
        path: The directory; it is there.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def clean(self) -> None:
        """Take out what a worker did not that ended between two steps."""
        for name in os.listdir(self._path):
            if "-multi-" in name:
                known = self._read(name)
                if known and not os.path.exists(known[0]):
                    self._remove(name, known)

    def add(self, ids: Sequence[str]) -> str:
        """Write objects down that are about to be spilled; return their batch."""
        batch = uuid.uuid4().hex
        for each in ids:
            try:
                os.symlink(batch, self._at(each))
            except FileExistsError:
                new = self._at(f".{batch}")
                os.symlink(batch, new)
                os.replace(new, self._at(each))
        return batch

    def cancel(self, batch: str, ids: Iterable[str]) -> None:
        """They were not spilled after all."""
        for each in ids:
            try:
                if os.readlink(self._at(each)) == batch:
                    os.unlink(self._at(each))
            except FileNotFoundError:
                continue

    def done(self, file: str, batch: str, ids: Iterable[str]) -> None:
        """They are in this file now."""
        new = self._at(f".{batch}")
        with open(new, "w") as listed:
            listed.write("\n".join([file, batch, *ids]))
        os.replace(new, self._at(os.path.basename(file)))

    def remove(self, file: str) -> None:
        """The file is gone; once more does nothing."""
        name = os.path.basename(file)
        self._remove(name, self._read(name))

    def _remove(self, name: str, known: list[str]) -> None:
        if known:
            _, batch, *ids = known
            self.cancel(batch, ids)
            try:
                os.unlink(self._at(name))
            except FileNotFoundError:
                return  # another worker was faster

    def _read(self, name: str) -> list[str]:
        try:
            with open(self._at(name)) as listed:
                return listed.read().split("\n")
        except FileNotFoundError:
            return []

    def _at(self, name: str) -> str:
        return os.path.join(self._path, name)


def fused(ids: Sequence[bytes]) -> Iterator[list[int]]:
    """Return which of these objects go into one file, by their places."""
    of_job: dict[bytes, list[int]] = {}
    for index, each in enumerate(ids):
        of_job.setdefault(each[_JOB], []).append(index)
    for indices in of_job.values():
        size = -(-len(indices) // _MOST_FILES)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def recording(storage: type[Any], registry: Registry) -> type[Any]:
    """Return Ray's class for a place to spill to, which keeps `registry`.

    Args:
        storage: Ray's FileSystemStorage.
        registry: Where it is written down.
    """

    class Recording(storage):  # type: ignore[misc]
        """Ray's, with more files."""

        def spill_objects(
            self, object_refs: Sequence[Any], owner_addresses: Sequence[Any]
        ) -> list[bytes]:
            urls: dict[int, bytes] = {}
            try:
                for some in fused([ref.binary() for ref in object_refs]):
                    made = self._spill(
                        [object_refs[index] for index in some],
                        [owner_addresses[index] for index in some],
                    )
                    urls.update(zip(some, made, strict=True))
            except BaseException:
                # Raylet tries all of them again.
                self.delete_spilled_objects(list(urls.values()))
                raise
            return [urls[index] for index in range(len(object_refs))]

        def _spill(self, refs: list[Any], owners: list[Any]) -> list[bytes]:
            ids = [ref.hex() for ref in refs]
            batch = registry.add(ids)
            try:
                made: list[bytes] = super().spill_objects(refs, owners)
            except BaseException:
                registry.cancel(batch, ids)
                raise
            registry.done(_base(made[0]), batch, ids)
            return made

        def delete_spilled_objects(self, urls: Sequence[bytes]) -> None:
            super().delete_spilled_objects(urls)
            for url in urls:
                registry.remove(_base(url))

    return Recording


def main() -> None:
    """Become Ray's worker."""
    # Where this file is there are modules that nobody else means by their names.
    del sys.path[0]
    from ray._private import external_storage
    from ray._private.workers import __path__ as places

    registry = Registry(os.environ.pop(VARIABLE))
    registry.clean()
    external_storage.FileSystemStorage = recording(
        external_storage.FileSystemStorage, registry
    )
    script = os.path.join(next(iter(places)), "default_worker.py")
    sys.argv[0] = script
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
