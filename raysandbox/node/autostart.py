"""``RAYSANDBOX=1``: a plain `ray start` puts its workers behind the node's wall.

Imported by the wheel's ``.pth`` file in every Python that has the variable, and
only then. It waits for three modules of Ray's: the one through which Ray starts its
processes, to put the launcher in front of it, and the two from which a driver
submits, to mark what it asks for (`raysandbox.client`). A driver behind a worker's
wall, which does not see raylet's process, is told which node it is on. Nothing else
of Ray is touched, and a Python without Ray never notices. If one of these can't be
done, Ray can't be imported: nothing is started without it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Loader(importlib.abc.Loader):
    """Ray's own loader, and one step after it."""

    def __init__(
        self, loader: importlib.abc.Loader, after: Callable[[ModuleType], None]
    ) -> None:
        self._loader, self._after = loader, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._after(module)


def _arm(module: ModuleType) -> None:
    module.start_ray_process = _armed(module)  # type: ignore[attr-defined]
    from raysandbox import client

    client.find_node(module)


def _armed(module: ModuleType) -> object:
    """Return a start_ray_process that arms itself when it is first called."""
    original = module.start_ray_process

    def start_ray_process(*args: object, **options: object) -> object:
        if module.start_ray_process is start_ray_process:
            module.start_ray_process = original  # type: ignore[attr-defined]
        from raysandbox.node import launch
        from raysandbox.node.start import arm

        if launch.current() is None:
            arm()
        return module.start_ray_process(*args, **options)

    start_ray_process.__wrapped__ = original  # type: ignore[attr-defined]
    return start_ray_process


def _mark(module: ModuleType) -> None:
    from raysandbox import client

    client.mark(module)


_AFTER = {
    "ray._private.services": _arm,
    "ray.remote_function": _mark,
    "ray.actor": _mark,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds each of these modules once, and gets out of the way."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER:
            return None
        after = _AFTER.pop(name)
        if not _AFTER:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, after)
        return spec


sys.meta_path.insert(0, _Finder())
