"""The light ``ray`` that a jail sees until it asks for more.

Ray's own package takes half a second and 80 MB to import, and a jail has no use
for most of it: it has no connection. So ``ray`` is a small module here, whose
``__path__`` is the real one's, so that ``ray.cloudpickle`` (which every task
needs) imports alone. What a task commonly touches is answered here; the calls
that would talk to the cluster say at once that they can't; anything else loads
the real package into this same module and then closes those calls again.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

__all__ = ["RayApiUnavailableError", "context", "install"]

#: What get_runtime_context() answers from; the runner fills it for each call.
context: dict[str, Any] = {}

# Submodules that import nothing of the rest of Ray.
_LIGHT = ("ray.cloudpickle",)

# Everything of the top level that talks to the cluster.
_CLOSED = (
    "available_resources",
    "cancel",
    "client",
    "cluster_resources",
    "get",
    "get_actor",
    "get_gpu_ids",
    "init",
    "kill",
    "nodes",
    "put",
    "shutdown",
    "timeline",
    "wait",
)


_HOMES = ("ray._private.worker", "ray._private.state", "ray.actor")
# Through these goes every ``.remote()`` of what was defined outside.
_SUBMIT = (
    ("ray.remote_function", "RemoteFunction", "_remote"),
    ("ray.actor", "ActorClass", "_remote"),
    ("ray.actor", "ActorHandle", "_actor_method_call"),
)


class RayApiUnavailableError(RuntimeError):
    """A task called the Ray API from inside a jail."""

    def __init__(self, call: str) -> None:
        profile = context.get("profile", "?")
        super().__init__(
            f"{call} is not available in a jail: task "
            f"{context.get('task_name', '?')!r} runs under profile {profile!r} "
            f"(boundary = {context.get('boundary', 'task')!r}), which has no "
            "connection to the cluster. Pass what the task needs as arguments and "
            "return what it makes, or ask the operator for a profile with "
            'boundary = "worker"'
        )
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeError, (str(self),)


def _closed(name: str) -> Any:
    def call(*_args: Any, **_options: Any) -> Any:
        raise RayApiUnavailableError(f"ray.{name}()")

    call.__name__ = call.__qualname__ = name
    return call


def _closed_method(cls: str) -> Any:
    def call(self: Any, *_args: Any, **_options: Any) -> Any:
        name = getattr(self, "_function_name", None) or cls
        raise RayApiUnavailableError(f"{name}.remote()")

    return call


class RuntimeContext:
    """The answers of ``ray.get_runtime_context()`` that need no connection."""

    namespace = property(lambda self: context.get("namespace"))
    was_current_actor_reconstructed = property(lambda self: False)

    def get_job_id(self) -> str:
        """Return the job's id in hexadecimal."""
        return str(context["job_id"])

    def get_task_id(self) -> str | None:
        """Return the task's id in hexadecimal."""
        return context.get("task_id")

    def get_task_name(self) -> str | None:
        """Return the task's name."""
        return context.get("task_name")

    def get_task_function_name(self) -> str | None:
        """Return the name of the task's function."""
        return context.get("function_name")

    def get_actor_id(self) -> str | None:
        """Return the actor's id in hexadecimal, None in a task."""
        return context.get("actor_id")

    def get_actor_name(self) -> str | None:
        """Return the actor's name, None in a task."""
        return context.get("actor_name")

    def get_node_id(self) -> str:
        """Return the node's id in hexadecimal."""
        return str(context["node_id"])

    def get_worker_id(self) -> str:
        """Return the worker's id in hexadecimal."""
        return str(context["worker_id"])

    def get_assigned_resources(self) -> dict[str, float]:
        """Return the resources assigned to this task or actor."""
        return dict(context.get("resources", {}))

    def __getattr__(self, name: str) -> Any:
        raise RayApiUnavailableError(f"ray.get_runtime_context().{name}")


class _Definition:
    """What ``@ray.remote`` makes: callable where it stands, not elsewhere."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.__doc__ = getattr(target, "__doc__", None)
        self.__name__ = getattr(target, "__name__", "remote")

    def remote(self, *_args: Any, **_options: Any) -> Any:
        raise RayApiUnavailableError(f"{self.__name__}.remote()")

    def options(self, **_options: Any) -> _Definition:
        return self

    def __call__(self, *_args: Any, **_options: Any) -> Any:
        raise TypeError(
            f"remote function {self.__name__!r} cannot be called directly; "
            f"try {self.__name__}.remote()"
        )


def _remote(*args: Any, **options: Any) -> Any:
    if len(args) == 1 and not options and callable(args[0]):
        return _Definition(args[0])
    return _Definition


class _Facade(types.ModuleType):
    """The module itself; loads the real one when it must."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_loading"):
            raise AttributeError(f"module 'ray' has no attribute {name!r}")
        _materialise()
        return getattr(self, name)


class _Loaded:
    """Loader of a module that loading the real package has loaded already."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module

    def create_module(self, _spec: Any) -> types.ModuleType:
        return self.module

    def exec_module(self, _module: Any) -> None:
        return


class _Finder:
    """Loads the real package before any submodule that needs it."""

    @staticmethod
    def find_spec(
        name: str, _path: Sequence[str] | None = None, _target: Any = None
    ) -> Any:
        if not name.startswith("ray.") or name.startswith(_LIGHT):
            return None
        _materialise()
        module = sys.modules.get(name)
        if module is None or module.__spec__ is None:
            return None
        # It is there now. importlib takes the spec of what is there, and would
        # run it a second time, beside the one in use.
        module.__spec__.loader = _Loaded(module)  # type: ignore[assignment]
        return module.__spec__


def _close() -> None:
    """Replace the calls that talk to the cluster by ones that say so."""
    module = sys.modules["ray"]
    for name in _CLOSED:
        setattr(module, name, _closed(name))
    module.remote = _remote  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    module.get_runtime_context = RuntimeContext  # type: ignore[attr-defined]
    # The same functions under the names that pickles refer to them by.
    for home in _HOMES:
        real = sys.modules.get(home)
        for name in _CLOSED if real is not None else ():
            if hasattr(real, name):
                setattr(real, name, _closed(name))
    for home, cls, method in _SUBMIT:
        real = sys.modules.get(home)
        if real is not None:
            setattr(getattr(real, cls), method, _closed_method(cls))


def _materialise() -> None:
    """Run the real ``ray/__init__.py`` in the facade's place."""
    module = sys.modules["ray"]
    if module.__dict__.get("_loading") or module.__dict__.get("_loaded"):
        return
    module._loading = True  # type: ignore[attr-defined]
    # Importing must never start or join a cluster.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    try:
        spec = module.__spec__
        if spec is None or spec.loader is None:
            raise ImportError("no real ray to load")
        spec.loader.exec_module(module)
        for home in (*_HOMES, *(home for home, _, _ in _SUBMIT)):
            importlib.import_module(home)
    finally:
        module._loading = False  # type: ignore[attr-defined]
    module._loaded = True  # type: ignore[attr-defined]
    _close()


def install(directory: str) -> None:
    """Put the facade in ``sys.modules`` and import the light parts.

    Args:
        directory: Where Ray's package is installed.
    """
    spec = importlib.util.spec_from_file_location(
        "ray",
        os.path.join(directory, "__init__.py"),
        submodule_search_locations=[directory],
    )
    if spec is None:
        raise ImportError(f"no Ray package in {directory}")
    module = _Facade("ray")
    module.__spec__ = spec
    module.__path__ = [directory]
    module.__file__ = spec.origin
    module.__package__ = "ray"
    sys.modules["ray"] = module
    _close()
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("ray.cloudpickle")
