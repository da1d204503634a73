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
        hint: Which rule of the profile stood in the way, or ``""``.
    """

    def __init__(
        self,
        type_name: str,
        message: str,
        formatted: str,
        blob: bytes = b"",
        hint: str = "",
    ) -> None:
        super().__init__(f"{type_name}: {message}")
        self.type_name, self.message = type_name, message
        self.formatted, self.blob, self.hint = formatted, blob, hint

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cause, (
            self.type_name,
            self.message,
            self.formatted,
            self.blob,
            self.hint,
        )


def open_cause(
    type_name: str, message: str, formatted: str, blob: bytes, hint: str = ""
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
                if hint:
                    _add_note(opened, hint)
                return opened
    return rebuild_builtin(type_name, message) or SealedError(
        type_name, message, formatted, hint=hint
    )


def _add_note(error: BaseException, note: str) -> None:
    """Attach a line to an exception; before Python 3.11 there is no place for it."""
    add = getattr(error, "add_note", None)
    if add is not None:
        add(note)


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
