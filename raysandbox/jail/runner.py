"""What runs in a jail: one call after the other, until the worker ends it.

Everything that a user made is unpickled here and nowhere else. A call is a
frame whose first part says in JSON what calls of a kind have in common (empty: the
same as the last time), and whose second is `CALL_HEAD`: what to do, attempt, task.
The others are the function or class, and each argument as Ray serialized it::

    TASK    function, arguments → result
    NEW     class, arguments → the jail's actor
    METHOD  arguments → result of the actor's method
    SPLIT   the last result again, one value for each item
    RETRY   pickled exception types → is the last exception one?

A function has a number (``"function"``); where this jail has run it before, its
part is empty. A call that is a `CALL_HEAD` and nothing else is the last task again,
which had no arguments.

Replies: RESULT, whose first part has 8 bytes for each value (mode, zeros, u32
number of parts), or ERROR, whose first part is the error's kind. A RESULT of one
part has the 8 bytes and the one part of its one value; that of None is empty.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
import types
from typing import Any

from raysandbox import wire
from raysandbox.jail import ray_facade, ray_objects

__all__ = [
    "CALL_HEAD",
    "ERROR_QUOTA",
    "ERROR_RESULT",
    "ERROR_UNSUPPORTED",
    "ERROR_USER",
    "MODE_DATA",
    "MODE_NONE",
    "MODE_PICKLE",
    "MODE_RAW",
    "NONE",
    "Op",
    "rehearse",
    "run",
]


class Op:
    """What a call is for; plain numbers, which cost nothing to compare."""

    TASK, NEW, METHOD, SPLIT, RETRY = range(5)


#: An `Op`, the task's attempt, its id; the last two are zeros where they don't matter.
CALL_HEAD = struct.Struct("<BxxxI24s")
MODE_PICKLE, MODE_DATA, MODE_RAW, MODE_NONE = 1, 2, 3, 4
ERROR_USER, ERROR_UNSUPPORTED, ERROR_RESULT, ERROR_QUOTA = 1, 2, 3, 4
ENTRY = struct.Struct("<BBHI")
ERROR_HEAD = struct.Struct("<Bi")
#: What a task answers that was called for its effects.
NONE = ENTRY.pack(MODE_NONE, 0, 0, 1)
#: Metadata of an argument that is text and nothing else.
PLAIN_TEXT = b"RAYSANDBOX_TEXT"

_WHOLE_BYTES = wire.INLINE_BYTES - ENTRY.size
_MAX_CALL_BYTES = 1 << 48
_MAX_CALL_PARTS = 1 << 20
_TEXT_BYTES = 256 << 10
_ATOMS = frozenset((type(None), bool, int, float, str))
_ASYNCHRONOUS = (types.CoroutineType, types.AsyncGeneratorType)
_INTERNAL = ("raysandbox/jail/runner.py", "ray/util/tracing/tracing_helper.py")


class _UnsupportedError(Exception):
    """Something that this boundary does not have."""


class _QuotaError(Exception):
    """The result is larger than the profile allows."""


class _State:
    """What one call leaves for the next in the same jail."""

    actor: Any = None
    functions: dict[int, Any]
    told: dict[str, Any]
    task: Any = None
    result: Any = None
    error: BaseException | None = None

    def __init__(self) -> None:
        self.functions, self.told = {}, {}


def rehearse(sock: socket.socket) -> None:
    """Serve one call as a jail does, and forget it."""
    _serve_next(sock, _State())
    ray_facade.context.clear()


def run(sock: socket.socket) -> None:
    """Serve calls; never returns."""
    status = 0
    state = _State()
    try:
        while _serve_next(sock, state):
            pass
    except OSError:
        status = 1  # the worker is gone, or the socket is not what it was
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _serve_next(sock: socket.socket, state: _State) -> bool:
    frame = wire.receive(
        sock,
        limit_bytes=_MAX_CALL_BYTES,
        max_parts=_MAX_CALL_PARTS,
        takes_kept=True,
    )
    if frame is None:
        return False
    _serve(sock, frame, state)
    # With the frame goes its mapping: the worker may fill that file again.
    return True


def _serve(sock: socket.socket, frame: wire.Frame, state: _State) -> None:
    is_again = len(frame.parts) == 1
    if not is_again and frame.parts[0]:
        state.told = json.loads(bytes(frame.parts[0]))
    meta = state.told
    op, attempt, task_id = CALL_HEAD.unpack(frame.parts[0 if is_again else 1])
    try:
        if op == Op.RETRY:
            _reply(sock, frame.call, [(MODE_RAW, [_is_retryable(frame, state)])])
            return
        if op == Op.SPLIT:
            if state.result is None:
                raise TypeError("the task returned one value where several belong")
            values = [_encode(item, meta) for item in state.result]
            state.result = None
            _reply(sock, frame.call, values)
            return
        state.result = state.error = None
        context = ray_facade.context
        context.clear()
        context.update(meta["context"])
        context["attempt"], context["task_id"] = attempt, task_id.hex()
        if meta["env"] or meta["cwd"] or meta["first_path"] or "setup" in meta:
            _prepare(meta)
        value = state.task() if is_again else _call(op, meta, frame, state)
        if type(value) not in _ATOMS:
            _check(value)
            if isinstance(value, (tuple, list)):
                state.result = value
        if value is None and meta["results"] == "pickle":
            _flush()
            wire.send_whole(sock, wire.RESULT, frame.call, NONE)
            return
        mode, parts = _encode(value, meta)
        _flush()
        entry = ENTRY.pack(mode, 0, 0, len(parts))
        if len(parts) == 1 and len(parts[0]) <= _WHOLE_BYTES and mode != MODE_DATA:
            wire.send_whole(sock, wire.RESULT, frame.call, entry + parts[0])
        else:
            wire.send(sock, wire.RESULT, frame.call, [entry, *parts])
    except (SystemExit, KeyboardInterrupt) as error:
        _fail(sock, frame.call, ERROR_USER, error, meta, state)
    except _UnsupportedError as error:
        _fail(sock, frame.call, ERROR_UNSUPPORTED, error, meta, state)
    except _QuotaError as error:
        _fail(sock, frame.call, ERROR_QUOTA, error, meta, state)
    except BaseException as error:
        kind = ERROR_USER
        if getattr(error, "raysandbox_encode_error", False):
            kind = ERROR_RESULT
        _fail(sock, frame.call, kind, error, meta, state)


def _check(value: Any) -> None:
    if isinstance(value, _ASYNCHRONOUS):
        raise _UnsupportedError("an async function")
    if isinstance(value, types.GeneratorType):
        raise _UnsupportedError("a generator")


def _prepare(meta: dict[str, Any]) -> None:
    first = meta["first_path"]
    if first and first != sys.path[: len(first)]:
        sys.path[:] = [*first, *(p for p in sys.path if p not in first)]
    if meta["env"]:
        os.environ.update(meta["env"])
    if meta["cwd"]:
        os.chdir(meta["cwd"])
    if "setup" in meta:
        _set_up(meta)


def _set_up(meta: dict[str, Any]) -> None:
    """Run the job's own setup hook, and import what the node preloads."""
    for name in meta["modules"]:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # as Ray does: it is an optimisation
    setup = meta["setup"] or {}
    if "module" in setup:
        module, _, name = setup["module"].rpartition(".")
        getattr(importlib.import_module(module), name)()
    elif "code" in setup:
        pickle.loads(base64.b64decode(setup["code"]))()


def _call(op: int, meta: dict[str, Any], frame: wire.Frame, state: _State) -> Any:
    if op == Op.METHOD:
        target = _method(state.actor, meta["method"])
        arguments = frame.parts[2:]
    else:
        target = _load(frame.parts[2], meta, state)
        arguments = frame.parts[3:]
    layout = meta["layout"]
    args, kwargs = _arguments(layout, arguments) if layout else ([], {})
    if op == Op.NEW:
        state.actor = target.__new__(target)
        target = target.__init__.__get__(state.actor)
    elif op == Op.METHOD and meta["method"] == "__ray_call__":
        function, *rest = args
        args = [state.actor, *rest]
        target = function
    # Only what had no arguments can be asked for again.
    state.task = target if op == Op.TASK and not layout else None
    value = target(*args, **kwargs)
    if op == Op.NEW:
        _check(value)
        return None
    return value


def _method(actor: Any, name: str) -> Any:
    if name in ("__ray_ready__", "__ray_call__"):
        return lambda *_: True
    return getattr(actor, name)


def _load(code: memoryview, meta: dict[str, Any], state: _State) -> Any:
    number = meta["function"]
    target = state.functions.get(number)
    if target is None:
        target = pickle.loads(code)
        try:
            target.__module__ = meta["module"]
        except (AttributeError, TypeError):
            pass  # a callable object or a builtin: its module is its own
        state.functions[number] = target
    return target


def _arguments(
    layout: list[str | None], parts: list[memoryview]
) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for index, name in enumerate(layout):
        metadata, data = bytes(parts[2 * index]), parts[2 * index + 1]
        if metadata == PLAIN_TEXT:
            value: Any = str(data, "utf-8", "surrogatepass")
        else:
            value = ray_objects.loads(metadata, data)
        if name is None:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


def _encode(value: Any, meta: dict[str, Any]) -> tuple[int, list[Any]]:
    """Serialize a result as the profile wants it; check its size."""
    if meta["results"] == "data":
        from raysandbox import datacodec

        try:
            parts: list[Any] = list(datacodec.encode(value))
        except datacodec.DataEncodeError as error:
            error.raysandbox_encode_error = True  # type: ignore[attr-defined]
            raise
        mode = MODE_DATA
    elif type(value) is bytes:
        mode, parts = MODE_RAW, [value]
    elif type(value) in _ATOMS:
        # What cloudpickle would make of it, without its set-up.
        data = pickle.dumps([value], protocol=5)
        if len(data) > meta["max_result_bytes"]:
            raise _QuotaError(str(len(data)))
        return MODE_PICKLE, [data]
    else:
        from ray import cloudpickle

        buffers: list[memoryview] = []
        inband = cloudpickle.dumps(
            [value],
            protocol=5,
            buffer_callback=lambda buffer: buffers.append(buffer.raw()),
        )
        mode, parts = MODE_PICKLE, [inband, *buffers]
    size = sum(memoryview(part).nbytes for part in parts)
    if size > meta["max_result_bytes"]:
        raise _QuotaError(str(size))
    return mode, parts


def _flush() -> None:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # closed by the task, or nobody reads it any more
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the same


def _reply(sock: socket.socket, call: int, values: list[tuple[int, list[Any]]]) -> None:
    table, body = b"", []
    for mode, parts in values:
        table += ENTRY.pack(mode, 0, 0, len(parts))
        body += parts
    wire.send(sock, wire.RESULT, call, [table, *body])


def _is_retryable(frame: wire.Frame, state: _State) -> bytes:
    allowed = pickle.loads(frame.parts[2])
    return b"1" if allowed is None or isinstance(state.error, allowed) else b"0"


def _fail(
    sock: socket.socket,
    call: int,
    kind: int,
    error: BaseException,
    meta: dict[str, Any],
    state: _State,
) -> None:
    state.error = error
    # Our own frames, and Ray's around a method, tell the user nothing.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.endswith(_INTERNAL):
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        text = "the exception could not be formatted"
    cause = b""
    if kind == ERROR_USER and meta.get("results") == "pickle":
        try:
            from ray import cloudpickle

            cause = cloudpickle.dumps(error.with_traceback(None))
        except Exception:
            cause = b""
    if len(cause) > meta.get("max_result_bytes", 0):
        cause = b""
    denied = error.filename if isinstance(error, OSError) else None
    number = error.errno if isinstance(error, OSError) else None
    name = type(error)
    parts = [
        ERROR_HEAD.pack(kind, number or 0),
        _text(f"{name.__module__}.{name.__qualname__}"),
        _text(_string(error)),
        _text(text),
        cause,
        _text(denied if isinstance(denied, str) else ""),
    ]
    _flush()
    wire.send(sock, wire.ERROR, call, parts)


def _string(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its message could not be formatted)"


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:_TEXT_BYTES]


# A task that ignores SIGPIPE sees EPIPE, as in any Python.
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
