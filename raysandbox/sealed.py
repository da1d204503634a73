"""What a driver needs to open an exception that a jail sealed.

A worker never unpickles a task's exception; it passes the bytes on inside an
object whose pickle says "open this at the other end".
"""

from __future__ import annotations

import builtins
import pickle
from typing import Any

__all__ = ["SealedError", "open_cause", "rebuild_builtin"]


class SealedError(Exception):
    """A task's exception as the worker holds it: text, and bytes never opened.

    Attributes:
        type_name: Qualified name of the exception's type in the jail.
        message: What ``str()`` gave there.
        formatted: The traceback as formatted in the jail.
        blob: The pickled exception, or ``b""``: rebuild it from the name.
    """

    def __init__(
        self, type_name: str, message: str, formatted: str, blob: bytes = b""
    ) -> None:
        super().__init__(f"{type_name}: {message}")
        self.type_name, self.message = type_name, message
        self.formatted, self.blob = formatted, blob

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cause, (self.type_name, self.message, self.formatted, self.blob)


def open_cause(
    type_name: str, message: str, formatted: str, blob: bytes
) -> BaseException:
    """Return the exception, as the driver sees it.

    With ``results = "data"`` there are no bytes: builtin exception types are
    rebuilt from their message, others stay a :class:`SealedError`.
    """
    if blob:
        try:
            opened = pickle.loads(blob)
        except Exception as error:
            message = f"{message} (its pickle can't be opened here: {error!r})"
        else:
            if isinstance(opened, BaseException):
                return opened
    return rebuild_builtin(type_name, message) or SealedError(
        type_name, message, formatted
    )


def rebuild_builtin(type_name: str, message: str) -> Exception | None:
    """Return a builtin exception of that name, None if there is none."""
    module, _, name = type_name.rpartition(".")
    found = getattr(builtins, name, None) if module == "builtins" else None
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None
    try:
        return found(message)
    except TypeError:
        return None  # UnicodeDecodeError and its like want more than a message
