"""Errors: what each looks like, and that Ray can carry it."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import ray.cloudpickle

import raysandbox
from raysandbox import errors

TASK = {"task": "count", "profile": "strict"}
FULL = TASK | {
    "limit": "limits.memory",
    "allowed": "1 GiB",
    "seen": "2 GiB",
    "remedy": "use less",
    "hint": "denied on the way: socket()",
}

# An instance of each, and its message in full.
EXAMPLES: list[tuple[errors.RaysandboxError, str]] = [
    (
        errors.ProfileError(
            source="strict.toml",
            where="limits.memory",
            value="5",
            reason="must be at least 64MiB",
        ),
        'strict.toml: limits.memory = "5": must be at least 64MiB',
    ),
    (
        errors.ProfileError(source="x.toml", reason="is not UTF-8 text"),
        "x.toml: is not UTF-8 text",
    ),
    (
        errors.UnsupportedError(
            feature="landlock",
            need="ABI 4 or later",
            have="ABI 2",
            remedy="boot Linux 6.7",
            profile="strict",
        ),
        (
            "profile 'strict' requires landlock: need ABI 4 or later, have ABI 2. "
            "Nothing was started. To fix: boot Linux 6.7"
        ),
    ),
    (
        errors.UnsupportedError(feature="x", need="a", have="b", remedy="c"),
        "x: need a, have b. Nothing was started. To fix: c",
    ),
    (
        errors.SetupError(step="mount_proc", errno=1, detail="/proc"),
        (
            "jail set-up failed at step 'mount_proc': Operation not permitted "
            "(errno 1) [/proc]; the task never started"
        ),
    ),
    (
        errors.SetupError(step="launch"),
        "jail set-up failed at step 'launch'; the task never started",
    ),
    (
        errors.InternalError(what="two jails of one number"),
        "internal error in raysandbox: two jails of one number",
    ),
    (
        errors.TaskOutOfMemory(**FULL),
        (
            "task 'count' under profile 'strict' ran out of memory and was killed; "
            "limits.memory allows 1 GiB; seen: 2 GiB; denied on the way: socket(); "
            "to fix: use less"
        ),
    ),
    (
        errors.TaskTimedOut(**TASK, limit="limits.wall_time", allowed="600 s"),
        (
            "task 'count' under profile 'strict' ran out of time and was killed; "
            "limits.wall_time allows 600 s"
        ),
    ),
    (
        errors.TaskDenied(**TASK, limit="syscalls.action"),
        (
            "task 'count' under profile 'strict' was killed by the system-call filter; "
            "syscalls.action"
        ),
    ),
    (
        errors.TaskQuotaExceeded(**TASK, seen="2 bytes"),
        "task 'count' under profile 'strict' went over a quota; seen: 2 bytes",
    ),
    (
        errors.TaskKilled(**TASK),
        "task 'count' under profile 'strict' was killed before it answered",
    ),
    (
        errors.TaskUnsupported(**TASK),
        (
            "task 'count' under profile 'strict' asked for something that a jail "
            "does not have"
        ),
    ),
    (
        errors.JailProtocolError(**TASK),
        (
            "task 'count' under profile 'strict' sent a reply that breaks the jail "
            "protocol"
        ),
    ),
    (errors.TaskError(**TASK), "task 'count' under profile 'strict' failed"),
]
PICKLERS = {
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "oldest pickle": lambda e: pickle.loads(pickle.dumps(e, protocol=2)),
    "cloudpickle": lambda e: pickle.loads(ray.cloudpickle.dumps(e)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def name(value: object) -> str:
    """Name a case by its class."""
    return type(value).__name__


@pytest.mark.parametrize(("error", "message"), EXAMPLES, ids=name)
def test_message(error, message) -> None:
    """What a person reads, word by word."""
    assert str(error) == message


@pytest.mark.parametrize("how", PICKLERS)
@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=name)
def test_every_error_survives_the_way_to_the_driver(error, how) -> None:
    """Type, message and every field; Ray pickles errors.

    Guards against exceptions whose pickle calls ``cls(message)``.
    """
    again = PICKLERS[how](error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again._fields == error._fields
    for field in error._fields:
        assert getattr(again, field) == getattr(error, field)


def test_every_class_is_an_example() -> None:
    """A new class without a line above fails here."""
    classes = {
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, errors.RaysandboxError)
    }
    shown = {type(error) for error, _ in EXAMPLES}
    assert classes - {errors.RaysandboxError} == shown
    assert {each.__name__ for each in classes} == set(errors.__all__)


def test_a_users_subclass_survives_too() -> None:
    """Fields are keyword arguments all the way down."""
    for made in (errors.TaskError(**FULL), errors.TaskKilled(**TASK)):
        assert PICKLERS["cloudpickle"](made)._fields == made._fields


@pytest.mark.parametrize("name", errors.__all__)
def test_all_are_names_of_the_package(name) -> None:
    """``except raysandbox.TaskOutOfMemory`` works without knowing a module."""
    assert getattr(raysandbox, name) is getattr(errors, name)


def test_the_tree_tells_the_task_from_the_sandbox() -> None:
    """What became of a task is a TaskError; what kept it from starting is not."""
    for error, _ in EXAMPLES:
        started = type(error).__name__.startswith(("Task", "Jail"))
        assert isinstance(error, errors.TaskError) is started
        assert isinstance(error, errors.RaysandboxError)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true"),
        (1.5, "1.5"),
        (["a", 1], '["a", 1]'),
        ("a\nb", r'"a\nb"'),
        ("\x1b[2J", r'"\u001b[2J"'),
        ("\x9b\u202e", r'"\x9b\u202e"'),
        ("ü", '"ü"'),
        ("x" * 1000, '"' + "x" * 199 + "…"),
    ],
)
def test_a_value_is_shown_as_written(value, shown) -> None:
    """On one line, without what a terminal would obey, and not without end."""
    error = errors.ProfileError(source="f", where="k", value=value, reason="r")
    assert str(error) == f"f: k = {shown}: r"
    assert error.value == value
