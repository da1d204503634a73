"""The seams of Ray's worker that keep it from running or opening user bytes.

The only module that knows Ray's internals. Each seam replaces one place where a
stock worker (Ray 2.60) would unpickle or import something a user controls:

==========================================  ==================================
``FunctionActorManager`` (functions, class)  the bytes are kept, not opened
``fetch_registered_method``, outer dicts     read by an unpickler without globals
``SerializationContext._deserialize_object`` arguments stay sealed
``SerializationContext.serialize``           sealed results pass through
``_raylet.ray_pickle``                       retry lists: the jail decides
``_raylet.traceback``                        errors show the jail's traceback
``sys.path``                                 user directories stay out of it
``_raylet.ObjectStoreFullError``             says which quota is full, if one is
==========================================  ==================================

:func:`unseal` takes them away again, in a worker that is its own boundary.
:func:`install` checks that each is there and refuses by name if one is not.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import itertools
import json
import os
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import ray
from google.protobuf.message import DecodeError
from ray import exceptions
from ray._private import function_manager, ray_constants, serialization
from ray._private import worker as ray_worker
from ray._private.runtime_env import setup_hook
from ray.core.generated import common_pb2
from ray.exceptions import RayTaskError

from raysandbox.api import HOOK
from raysandbox.errors import ProfileError, SetupError, UnsupportedError

_raylet: Any = ray._raylet

__all__ = [
    "Executor",
    "SealedArgument",
    "SealedResult",
    "TrustedPath",
    "install",
    "unseal",
]

_ABSENT = object()
#: Variable in which the node tells its workers what ports raylet was given.
RAYLET_PORTS = "RAYSANDBOX_RAYLET_PORTS"


class SealedArgument:
    """An argument that nobody opened: Ray's metadata and data."""

    __slots__ = ("data", "metadata")

    def __init__(self, metadata: bytes, data: Any) -> None:
        self.metadata, self.data = metadata, data


class SealedResult:
    """A jail's answer, on its way to Ray's store.

    ``len()`` is asked only when a task has several returns; then the jail is
    asked to take its answer apart.
    """

    def __init__(self, serialized: Any, split: Callable[[], list[Any]]) -> None:
        self.serialized, self._split = serialized, split
        self._parts: list[Any] | None = None

    def parts(self) -> list[Any]:
        """Return one result for each item."""
        if self._parts is None:
            self._parts = self._split()
        return self._parts

    def __len__(self) -> int:
        return len(self.parts())

    def __iter__(self) -> Any:
        return iter(self.parts())


class Executor:
    """What the seams call; implemented by ``hook``.

    Attributes:
        profile_inside: What runs in this very process runs behind it, if anything.
    """

    profile_inside: Any = None

    def task(
        self, info: FunctionBytes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function in a jail."""
        raise NotImplementedError

    def actor(
        self,
        info: FunctionBytes,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an actor's constructor or method in its jail."""
        raise NotImplementedError

    def is_retryable(self, error: BaseException, allowed: bytes) -> bool:
        """Ask the jail whether its exception is of one of the pickled types."""
        raise NotImplementedError

    def formatted(self, error: BaseException | None) -> str | None:
        """Return the traceback to show instead of the worker's own."""
        raise NotImplementedError

    def serialized(self) -> None:
        """The last result is stored; its jail is no longer needed."""

    def opens(self) -> bool:
        """Say whether the call that is to come runs in this very process.

        Asked before anything of the call is opened. If so, every wall of its
        profile is up around the process and the seals are off when it returns.
        """
        raise NotImplementedError

    def guarded(self, info: Any) -> Any:
        """Return Ray's record of a function, with a look at each call's tag."""
        raise NotImplementedError

    def why_full(self) -> str:
        """Return which quota the object store refused for, or ``""``."""
        raise NotImplementedError


class FunctionBytes:
    """A function or class as it lies in the GCS, unopened.

    Attributes:
        number: Its own in this worker: a jail that has it knows it by that.
    """

    __slots__ = ("code", "methods", "module", "name", "number")
    _numbers = itertools.count(1)

    def __init__(
        self, name: str, module: str, code: bytes, methods: Iterable[str] = ()
    ) -> None:
        self.name, self.module, self.code = name, module, code
        self.methods = tuple(methods)
        self.number = next(self._numbers)


class _DataUnpickler(pickle.Unpickler):
    """Reads what needs no import: anything else is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"the function table holds a reference to {module}.{name}; a function "
            "table entry is plain data"
        )


def _plain_loads(data: bytes) -> Any:
    return _DataUnpickler(io.BytesIO(data)).load()


class TrustedPath(list):  # type: ignore[type-arg]
    """``sys.path`` of a worker: what a user adds goes to the jail, not here.

    A directory of a user's in front of it would let any module that the worker
    imports later be the user's own.

    Attributes:
        refused: What was kept out, in the order of precedence.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        super().__init__(entries)
        self.refused: list[str] = []

    @classmethod
    def of_worker(cls, entries: Iterable[str]) -> TrustedPath:
        """Take over a worker's path without what its runtime_env put there.

        All of that lies below the session's ``runtime_resources``: what Ray's
        agent passes by ``PYTHONPATH``, and the packages of a pip environment.
        """
        root = os.path.realpath(runtime_resources()) + "/"
        user = [
            entry
            for entry in dict.fromkeys(entries)
            if entry and os.path.realpath(entry).startswith(root)
        ]
        made = cls(entry for entry in entries if entry and entry not in user)
        # Behind the node's wall they come by another way, not into this path.
        handed = os.environ.get("RAYSANDBOX_USER_PATH", "").split(":")
        made.refused = [*user, *filter(None, handed)]
        return made

    def insert(self, index: Any, entry: str) -> None:
        """Keep a new entry for the jail; one that is here already is nothing."""
        if entry not in self and entry not in self.refused:
            self.refused.insert(0 if index == 0 else len(self.refused), entry)

    def append(self, entry: str) -> None:
        """As :meth:`insert`, with the lowest precedence."""
        self.insert(len(self), entry)

    def extend(self, entries: Iterable[str]) -> None:
        """As :meth:`append`, for each."""
        for entry in entries:
            self.append(entry)


#: What `install` replaced: owner, name, and what stood there itself.
_replaced: list[tuple[Any, str, Any]] = []


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


def unseal() -> None:
    """Put stock Ray back: from here on this process opens what users send.

    Only behind the walls of a profile with ``boundary = "worker"``, once and
    for good. The look at each call's tag stays.
    """
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    if isinstance(sys.path, TrustedPath):
        sys.path = [*sys.path.refused, *sys.path]
    # Asked for when the job became known, and answered with none then.
    logging = ray_worker.global_worker.job_logging_config
    if logging is not None:
        logging._apply()


def install(executor: Executor) -> None:
    """Replace all seams, or none.

    Raises:
        UnsupportedError: This Ray lacks one; it is named with the version.
    """
    needed = (
        (function_manager.FunctionActorManager, "fetch_registered_method"),
        (function_manager.FunctionActorManager, "fetch_and_register_remote_function"),
        (function_manager.FunctionActorManager, "_load_actor_class_from_gcs"),
        (function_manager.FunctionActorManager, "_load_actor_class_from_local"),
        (function_manager.FunctionActorManager, "_load_function_from_local"),
        (function_manager.FunctionActorManager, "get_execution_info"),
        (serialization.SerializationContext, "_deserialize_object"),
        (serialization.SerializationContext, "serialize"),
        (_raylet, "ObjectStoreFullError"),
        (_raylet, "ray_pickle"),
        (_raylet, "pickle"),
        (_raylet, "traceback"),
        (_raylet, "Pickle5Writer"),
        (_raylet, "Pickle5SerializedObject"),
        (_raylet, "MessagePackSerializedObject"),
        (_raylet, "RawSerializedObject"),
        (_raylet, "split_buffer"),
        (serialization, "pickle"),
        (function_manager, "pickle"),
        (exceptions, "pickle"),
        (ray_worker, "pickle"),
        (ray_worker.Worker, "job_logging_config"),
    )
    for owner, name in needed:
        if getattr(owner, name, _ABSENT) is _ABSENT:
            raise UnsupportedError(
                feature="Ray's worker seams",
                need=f"{getattr(owner, '__name__', owner)}.{name}",
                have=f"Ray {ray.__version__} without it",
                remedy="install a Ray version that raysandbox supports",
            )
    _guard_functions(executor)
    _explain_full_store(executor)
    _seal_functions(executor)
    _seal_arguments()
    _seal_results(executor)
    _seal_pickle(executor)


def _guard_functions(executor: Executor) -> None:
    """Stays for the worker's life, sealed or not."""
    manager = function_manager.FunctionActorManager
    original = manager.get_execution_info

    def get_execution_info(self: Any, job_id: Any, descriptor: Any) -> Any:
        info = original(self, job_id, descriptor)
        return info if executor.profile_inside is None else executor.guarded(info)

    manager.get_execution_info = get_execution_info


def _explain_full_store(executor: Executor) -> None:
    """Stays for the worker's life: Ray raises what it finds under this name."""
    original = exceptions.ObjectStoreFullError

    class Explained(original):  # type: ignore[misc, valid-type]
        def __new__(cls, message: str = "", *args: Any) -> Any:
            why = executor.why_full()
            return original(f"{message}\n{why}" if why else message, *args)

    _raylet.ObjectStoreFullError = Explained


def _seal_functions(executor: Executor) -> None:
    manager = function_manager.FunctionActorManager

    def fetch_registered_method(self: Any, key: bytes, timeout: Any = None) -> Any:
        values = self._worker.gcs_client.internal_kv_get(
            key, ray_constants.KV_NAMESPACE_FUNCTION_TABLE
        )
        if values is None:
            return None
        values = _plain_loads(values)
        fields = (
            "job_id",
            "function_id",
            "function_name",
            "function",
            "module",
            "max_calls",
        )
        return function_manager.ImportedFunctionInfo._make(
            values.get(field) for field in fields
        )

    def fetch_and_register_remote_function(self: Any, key: bytes) -> Any:
        if executor.opens():
            return self.fetch_and_register_remote_function(key)
        found = self.fetch_registered_method(key)
        if not found:
            return False
        info = FunctionBytes(
            str(found.function_name), str(found.module), bytes(found.function)
        )

        def run(*args: Any, **kwargs: Any) -> Any:
            return executor.task(info, args, kwargs)

        function_id = ray.FunctionID(found.function_id)
        with self.lock:
            self._num_task_executions[function_id] = 0
            self._function_execution_info[function_id] = (
                function_manager.FunctionExecutionInfo(
                    function=run,
                    function_name=info.name,
                    max_calls=int(found.max_calls),
                )
            )
        return True

    def load_actor_class_from_gcs(self: Any, job_id: Any, descriptor: Any) -> Any:
        if executor.opens():
            return self._load_actor_class_from_gcs(job_id, descriptor)
        key = function_manager.make_function_table_key(
            b"ActorClass", job_id, descriptor.function_id.binary()
        )
        values = self._worker.gcs_client.internal_kv_get(
            key, ray_constants.KV_NAMESPACE_FUNCTION_TABLE
        )
        values = _plain_loads(values) if values is not None else {}
        info = FunctionBytes(
            str(values["class_name"]),
            str(values["module"]),
            bytes(values["class"]),
            json.loads(values["actor_method_names"]),
        )
        return _actor_class(info, executor)

    def load_actor_class_from_local(self: Any, descriptor: Any) -> Any:
        if executor.opens():
            return self._load_actor_class_from_local(descriptor)
        return None

    def load_function_from_local(self: Any, descriptor: Any) -> Any:
        return executor.opens() and self._load_function_from_local(descriptor)

    for name, seam in (
        ("fetch_registered_method", fetch_registered_method),
        ("fetch_and_register_remote_function", fetch_and_register_remote_function),
        ("_load_actor_class_from_gcs", load_actor_class_from_gcs),
        # Code from local paths would be imported by the worker: always the GCS.
        ("_load_actor_class_from_local", load_actor_class_from_local),
        ("_load_function_from_local", load_function_from_local),
    ):
        _replace(manager, name, seam)


def _actor_class(info: FunctionBytes, executor: Executor) -> type:
    """Make a class whose methods go to the actor's jail."""
    asynchronous = ray_worker.global_worker.core_worker

    def method(name: str) -> Callable[..., Any]:
        def call(_self: Any, *args: Any, **kwargs: Any) -> Any:
            return executor.actor(info, name, args, kwargs)

        async def call_async(_self: Any, *args: Any, **kwargs: Any) -> Any:
            return executor.actor(info, name, args, kwargs)

        made = call_async if asynchronous.current_actor_is_asyncio() else call
        made.__name__ = made.__qualname__ = name
        return made

    names = {"__init__", "__ray_ready__", "__ray_call__", *info.methods}
    # Ray's own way for an actor to leave; it needs nothing of the user's.
    names.discard("__ray_terminate__")
    body: dict[str, Any] = {name: method(name) for name in names}
    body["__ray_terminate__"] = lambda _self: ray.actor.exit_actor()
    body["__module__"] = info.module
    return type(info.name, (), body)


def _seal_arguments() -> None:
    context = serialization.SerializationContext
    original = context._deserialize_object
    sealed = (
        ray_constants.OBJECT_METADATA_TYPE_PYTHON,
        ray_constants.OBJECT_METADATA_TYPE_CROSS_LANGUAGE,
        ray_constants.OBJECT_METADATA_TYPE_RAW,
        ray_constants.OBJECT_METADATA_TYPE_ACTOR_HANDLE,
    )
    failed = str(serialization.ErrorType.Value("TASK_EXECUTION_EXCEPTION")).encode()
    died = str(serialization.ErrorType.Value("ACTOR_DIED")).encode()
    cancelled = str(serialization.ErrorType.Value("TASK_CANCELLED")).encode()

    def deserialize_object(
        self: Any, data: Any, metadata: bytes, ref: Any, *rest: Any
    ) -> Any:
        kind = metadata.split(b",")[0] if metadata else b""
        if kind in sealed:
            if kind == ray_constants.OBJECT_METADATA_TYPE_RAW and (
                data is None or data.size <= 64
            ):
                # Ray's own markers in argument lists are such; and bytes are data.
                return b"" if data is None else data.to_pybytes()
            if kind == ray_constants.OBJECT_METADATA_TYPE_CROSS_LANGUAGE:
                name = _short_text(data)
                if name is not None:
                    return name
            return SealedArgument(bytes(metadata), data)
        if kind in (failed, died, cancelled):
            return _failed_dependency(data)
        return original(self, data, metadata, ref, *rest)

    _replace(context, "_deserialize_object", deserialize_object)


def _short_text(data: Any) -> str | None:
    """Return a keyword's name: a small object that is a msgpack string alone."""
    if data is None or data.size > 256:
        return None
    try:
        msgpack_data, _ = _raylet.split_buffer(data)
        # Extensions would be Python objects: there are none in such an object.
        value = _raylet.MessagePackSerializer.loads(msgpack_data)
    except (ValueError, TypeError, serialization.DeserializationError):
        return None
    return value if type(value) is str else None


class SealedCauseError(Exception):
    """The cause of a failed dependency, as the bytes that it came in."""

    def __init__(self, blob: bytes) -> None:
        super().__init__("a dependency of this task failed")
        self.blob = blob

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_cause_of, (self.blob,)


def _open_cause_of(blob: bytes) -> Any:
    from ray.exceptions import RayError

    error = RayError.from_bytes(blob)
    return getattr(error, "cause", None) or error


class SealedDependencyError(RayTaskError):
    """A failed dependency, passed on as the bytes that it came in."""

    def __init__(self, blob: bytes, formatted: str = "") -> None:
        self.shown = formatted or "a dependency of this task failed"
        super().__init__("?", self.shown, SealedCauseError(blob))
        self.blob = blob

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_dependency, (self.blob,)

    def __str__(self) -> str:
        return self.shown


def _open_dependency(blob: bytes) -> Any:
    from ray.exceptions import RayError

    return RayError.from_bytes(blob)


def _failed_dependency(data: Any) -> Exception:
    msgpack_data, _ = _raylet.split_buffer(data)
    blob = bytes(_raylet.MessagePackSerializer.loads(msgpack_data))
    message = common_pb2.RayException()
    try:
        message.ParseFromString(blob)
    except DecodeError:
        return SealedDependencyError(blob)
    return SealedDependencyError(blob, message.formatted_exception_string)


def _seal_results(executor: Executor) -> None:
    context = serialization.SerializationContext
    original = context.serialize

    def serialize(self: Any, value: Any) -> Any:
        if isinstance(value, SealedResult):
            serialized = value.serialized
            executor.serialized()
            return serialized(self, original) if callable(serialized) else serialized
        return original(self, value)

    _replace(context, "serialize", serialize)


def serialize_python(inband: bytes, buffers: Iterable[memoryview]) -> Any:
    """Frame a jail's pickle as Ray does, with Ray's own writer.

    The worker writes all lengths and offsets itself: none that a jail made up
    ever reaches the C++ code that reads them.
    """
    writer = _raylet.Pickle5Writer()
    for view in buffers:
        writer.buffer_callback(pickle.PickleBuffer(view))
    kind = ray_constants.OBJECT_METADATA_TYPE_PYTHON
    inner = _raylet.Pickle5SerializedObject(kind, inband, writer, [])
    return _raylet.MessagePackSerializedObject(kind, _FIRST_OBJECT, [], inner)


def serialize_raw(data: bytes) -> Any:
    """Frame a bytes result."""
    return _raylet.RawSerializedObject(data)


def serialize_none() -> Any:
    """Frame None, as Ray does."""
    kind = ray_constants.OBJECT_METADATA_TYPE_CROSS_LANGUAGE
    return _raylet.MessagePackSerializedObject(kind, _NONE, [], None)


# msgpack for "the first of the pickled objects", and for None.
_FIRST_OBJECT = _raylet.MessagePackSerializer.dumps(object(), lambda _: 0)
_NONE = _raylet.MessagePackSerializer.dumps(None, lambda _: 0)


def _seal_pickle(executor: Executor) -> None:
    class Retryable(type):
        """Stands for the pickled list of types: the jail looks into it."""

        allowed: bytes

        def __instancecheck__(cls, error: Any) -> bool:
            return executor.is_retryable(error, cls.allowed)

    def loads(data: Any, *_args: Any, **_options: Any) -> Any:
        allowed = Retryable("Allowed", (), {})
        allowed.allowed = bytes(data)
        return (allowed,)

    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        raise pickle.UnpicklingError("a sandboxed worker opens no pickles")

    def shim(module: types.ModuleType, load: Callable[..., Any]) -> Any:
        made = types.ModuleType(module.__name__)
        made.__dict__.update(module.__dict__)
        made.loads = load  # type: ignore[attr-defined]
        made.load = refuse  # type: ignore[attr-defined]
        return made

    _replace(_raylet, "ray_pickle", shim(_raylet.ray_pickle, loads))
    _replace(_raylet, "pickle", shim(_raylet.pickle, refuse))
    for module in (serialization, function_manager, ray_worker, exceptions):
        _replace(module, "pickle", shim(module.pickle, refuse))
    # The driver's logging configuration is a pickle as well.
    _replace(ray_worker.Worker, "job_logging_config", property(lambda _self: None))

    def format_exc(*args: Any, **options: Any) -> str:
        shown = executor.formatted(sys.exc_info()[1])
        return traceback.format_exc(*args, **options) if shown is None else shown

    def format_exception(error: Any, *args: Any, **options: Any) -> list[str]:
        value = args[0] if args else error
        shown = executor.formatted(value)
        if shown is None:
            return traceback.format_exception(error, *args, **options)
        return [shown]

    formatter = types.ModuleType("traceback")
    formatter.__dict__.update(traceback.__dict__)
    formatter.format_exc = format_exc  # type: ignore[attr-defined]
    formatter.format_exception = format_exception  # type: ignore[attr-defined]
    _replace(_raylet, "traceback", formatter)


def on_main_thread() -> bool:
    """Whether this is the thread that runs ordinary tasks."""
    return threading.current_thread() is threading.main_thread()


def signature_of(target: Any) -> str:
    """Return a callable's signature for messages."""
    return str(inspect.signature(target))


def setup_hook_of(variables: Mapping[str, Any]) -> dict[str, str]:
    """Return a runtime_env's own setup hook, unopened, for a jail to run.

    Returns:
        ``{}``, ``{"module": "a.b"}`` or ``{"code": base64 of the pickle}``.

    Raises:
        ProfileError: The GCS has no such function.
    """
    hook = variables.get(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR)
    if not isinstance(hook, str) or hook == HOOK:
        return {}
    if not hook.startswith(setup_hook.RUNTIME_ENV_FUNC_IDENTIFIER):
        return {"module": hook}
    manager = ray_worker.global_worker.function_actor_manager
    info = manager.fetch_registered_method(setup_hook._encode_function_key(hook))
    if info is None:
        raise ProfileError(
            source="runtime_env",
            where="worker_process_setup_hook",
            reason="the GCS does not have the function",
        )
    return {"code": base64.b64encode(info.function).decode()}


def run_setup_hook(runtime_env: str) -> str:
    """Run a runtime_env's own setup hook here, as stock Ray does.

    Only in a worker that is its own boundary. Returns what went wrong, or ``""``.
    """
    variables = json.loads(runtime_env or "{}").get("env_vars") or {}
    hook = variables.get(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR)
    if not isinstance(hook, str) or hook == HOOK:
        return ""
    return setup_hook.load_and_execute_setup_hook(hook) or ""


def preload(modules: Iterable[str]) -> str:
    """Import a job's own worker_preload_modules here; one that is absent is none.

    As `run_setup_hook` otherwise.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            sys.stderr.write(f"raysandbox: module {name} is not preloaded: {error}\n")
        except Exception:  # noqa: BLE001 - a user's module may raise anything
            return f"module {name} can't be preloaded: {traceback.format_exc()}"
    return ""


def runtime_resources() -> str:
    """Return where Ray unpacks what runtime environments bring."""
    return str(ray_worker.global_worker.node.get_runtime_env_dir_path())


def session_dir() -> str:
    """Return Ray's directory of this session."""
    return str(ray_worker.global_worker.node.get_session_dir_path())


def store_socket() -> str:
    """Return the path of the node's object store's socket."""
    return str(ray_worker.global_worker.node.plasma_store_socket_name)


def live_jobs(gcs_client: Any) -> set[str]:
    """Return the jobs that have not ended, as hex."""
    table = gcs_client.get_all_job_info(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    return {job.hex() for job, data in table.items() if not data.is_dead}


def session_log_dir() -> str:
    """Return Ray's log directory of this session."""
    node = ray_worker.global_worker.node
    return str(os.path.join(node.get_session_dir_path(), "logs"))


def with_function(info: Any, function: Callable[..., Any], max_calls: int) -> Any:
    """Return Ray's record of a function with another function in it."""
    return info._replace(function=function, max_calls=max_calls)


def leave(reason: str) -> NoReturn:
    """End this worker instead of running the task that is to run now.

    As a worker that breaks: Ray writes the reason down, and tries the task
    again in another one if it may be tried again.
    """
    leaving = SystemExit(1)
    leaving.ray_terminate_msg = reason  # type: ignore[attr-defined]
    raise leaving


def speak_for_job(worker: Any) -> None:
    """Make this worker's first call to its job's function table.

    By that call the guard of a hardened cluster knows whose the worker is, for life.
    Ray makes it before it runs what it found there; it makes none for code from
    files (``code_search_path``), whose first call could name any job.

    Raises:
        SetupError: The GCS refuses it, or does not answer.
    """
    job = worker.current_job_id.hex()
    try:
        worker.gcs_client.internal_kv_exists(
            f"RemoteFunction:{job}:".encode(),
            ray_constants.KV_NAMESPACE_FUNCTION_TABLE,
        )
    except ray.exceptions.RayError as error:
        raise SetupError(step="function_table", detail=str(error)) from error


def ray_ports() -> tuple[frozenset[int], str]:
    """Return the TCP ports that Ray may connect to from a worker here.

    Returns:
        The ports, and why they are more than Ray's own, or ``""``. Ray's own
        are those of the GCS, of each node's raylet, of agent and dashboard, and
        the range for workers and drivers, which nodes are taken to have in
        common; where Ray lets the kernel choose, the kernel's whole range.
    """
    worker = ray_worker.global_worker
    node, ports = worker.node, set()
    addresses = [worker.gcs_client.address, node.webui_url or ""]
    ports |= {_port(address) for address in addresses}
    for each in worker.gcs_client.get_all_node_info().values():
        ports |= {each.node_manager_port, each.metrics_agent_port}
        ports |= {getattr(each, "runtime_env_agent_port", 0)}
    options, chosen = _raylet_options(), set(worker_ports())
    loose = []
    if not chosen:
        loose.append("--min-worker-port and --max-worker-port are not set")
    if not int(options.get("node_manager_port", 0)):
        loose.append("--node-manager-port is not set")
    if loose:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = (int(word) for word in file.read().split())
        chosen |= set(range(first, last + 1))
    reason = f"the kernel's own range too: {', '.join(loose)}" if loose else ""
    return frozenset(ports | chosen) - {0}, reason


def worker_ports() -> frozenset[int]:
    """Return the TCP ports that raylet gives to workers and drivers; none if any."""
    options = _raylet_options()
    listed = options.get("worker_port_list", "").split(",")
    low, high = (int(options.get(f"{end}_worker_port", 0)) for end in ("min", "max"))
    known = range(low, high + 1) if low and high else ()
    return frozenset([*(int(port) for port in listed if port), *known])


def _port(address: str) -> int:
    port = address.rpartition(":")[2].partition("/")[0]
    return int(port) if port.isdigit() else 0


def _raylet_options() -> dict[str, str]:
    """Return what raylet was started with: it is our parent.

    Behind the node's wall it can't be seen; then the wall tells.
    """
    told = os.environ.get(RAYLET_PORTS)
    if told is not None:
        return {str(key): str(value) for key, value in json.loads(told).items()}
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")
    except OSError:
        return {}
    pairs = (word[2:].split("=", 1) for word in words if word.startswith("--"))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def job_of(gcs_client: Any, job_id: str) -> tuple[str, dict[str, str]] | None:
    """Return a job's namespace and metadata from the GCS's job table, or None.

    The job configuration of this process is no source: it came with the task.
    """
    table = gcs_client.get_all_job_info(
        job_or_submission_id=job_id,
        skip_submission_job_info_field=True,
        skip_is_running_tasks_field=True,
    )
    for found, data in table.items():
        if found.hex() == job_id:
            return data.config.ray_namespace, dict(data.config.metadata)
    return None


def global_worker() -> Any:
    """Return Ray's object for this process."""
    return ray_worker.global_worker
