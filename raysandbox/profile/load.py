"""Find profiles, read them, and refuse what can't be used as written.

Search path, first find wins: the directories of ``RAYSANDBOX_PROFILE_PATH``
(separated by ``:``), ``/etc/raysandbox/profiles``, and the shipped profiles.
What is on it and can't be read is an error: to go on to the next directory
would run a task under another profile than the site's own.

``extends = "base"`` starts from another profile of the search path: tables
merge key by key, everything else (lists included) is replaced. ``description``
is not inherited, and a ``why`` speaks for its own file only: a profile that
writes into a section says why again if the section still weakens a default.

A profile decides what hostile code may do, so who could have written it
matters: a file, or a directory or link on the way to it, that group or others
may write, or that belongs to anybody but root and us, is refused, not skipped.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from raysandbox.errors import ProfileError
from raysandbox.profile.schema import OciPolicy, Profile, is_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ENV",
    "SITE_DIR",
    "as_tuples",
    "check",
    "explain",
    "find",
    "joined",
    "load",
    "load_file",
    "names",
    "parse_trusted",
    "read_trusted",
    "search_path",
    "shipped_dir",
    "strictest",
]

ENV = "RAYSANDBOX_PROFILE_PATH"
SITE_DIR = "/etc/raysandbox/profiles"

_MOST_BYTES = 1 << 20
_MOST_PARENTS = 16
_MOST_LEVELS = 16
_MOST_LINKS = 40  # as the kernel
_PACKAGE = Path(__file__).resolve().parent.parent


# --- where profiles are -------------------------------------------------------


def shipped_dir() -> Path:
    """Return where the shipped profiles are, in a wheel or a source tree."""
    installed = _PACKAGE / "_profiles"
    return installed if installed.is_dir() else _PACKAGE.parent / "profiles"


def search_path() -> list[Path]:
    """Return the directories that are searched, first first.

    Raises:
        ProfileError: ``RAYSANDBOX_PROFILE_PATH`` names what is no directory, or
            a relative one, which would make the profile depend on where a
            program is started.
    """
    found = []
    for entry in os.environ.get(ENV, "").split(":"):
        if not entry:
            continue
        if not entry.startswith("/"):
            raise ProfileError(
                source=ENV, value=entry, reason="must be absolute directories"
            )
        try:
            is_directory = stat.S_ISDIR(os.stat(entry).st_mode)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ProfileError(
                source=ENV, value=entry, reason=f"can't be used: {why}"
            ) from error
        if not is_directory:
            raise ProfileError(source=ENV, value=entry, reason="is not a directory")
        found.append(Path(entry))
    return [*found, Path(SITE_DIR), shipped_dir()]


def names() -> list[str]:
    """Return the names of all profiles on the search path, sorted."""
    found: set[str] = set()
    for directory in search_path():
        try:
            entries = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(directory, error) from error
        stems = (entry[:-5] for entry in entries if entry.endswith(".toml"))
        found.update(stem for stem in stems if is_name(stem))
    return sorted(found)


def find(name: str) -> Path:
    """Return the file of the profile ``name``.

    Raises:
        ProfileError: There is none, or the name can't be a profile's.
    """
    if not is_name(name):
        raise ProfileError(
            source="profile name",
            value=name,
            reason="must be of a-z, 0-9, _ and -, and start with a letter",
        )
    for directory in search_path():
        path = directory / f"{name}.toml"
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(path, error) from error
        return path
    known = names()
    others = _meant(name, known) or f"there are {', '.join(known)}"
    raise ProfileError(
        source="profile name", value=name, reason=f"no such profile; {others}"
    )


# --- loading --------------------------------------------------------------------


def load(name: str) -> Profile:
    """Load a profile by its name.

    Raises:
        ProfileError: Nothing of that name, or it can't be used as written;
            the message has one line for each problem.
    """
    return load_file(find(name))


def load_file(path: str | os.PathLike[str]) -> Profile:
    """Load a profile from a file of any place; as `load` otherwise."""
    profile, problems = _load(Path(path))
    if profile is None or problems:
        raise joined(problems)
    return profile


def check(path: str | os.PathLike[str]) -> list[ProfileError]:
    """Return everything that is wrong with a profile file; empty if nothing."""
    return _load(Path(path))[1]


def strictest() -> Profile:
    """Return the profile for whoever may not have what they asked for.

    It is the shipped ``strict``, which no file of the search path replaces.
    """
    return load_file(shipped_dir() / "strict.toml")


def _load(path: Path) -> tuple[Profile | None, list[ProfileError]]:
    try:
        chain = _chain(path)
    except ProfileError as error:
        return None, [error]
    file, tables = chain[0]
    name = file.name.removesuffix(".toml")
    if not is_name(name):
        return None, [
            ProfileError(
                source=str(file),
                reason="the file's name must be of a-z, 0-9, _ and -, start with "
                "a letter and end with .toml",
            )
        ]
    if tables.get("name", name) != name:
        return None, [
            ProfileError(
                source=str(file),
                where="name",
                value=tables["name"],
                reason=f"must be the file's name, {name!r}; it may be left out",
            )
        ]
    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for parent_file, parent in reversed(chain):
        _merge(merged, parent, origin, parent_file)
    merged["name"] = name

    def read_oci(value: str) -> OciPolicy:
        base = origin.get("syscalls.oci", file).parent
        oci = base / value
        try:
            return OciPolicy(str(oci), read_trusted(oci).decode())
        except ProfileError as error:
            raise ValueError(f"{error.source}: {error.reason}") from error
        except UnicodeDecodeError as error:
            raise ValueError("is not UTF-8 text") from error

    try:
        profile = Profile.model_validate(merged, context={"read_oci": read_oci})
    except ValidationError as error:
        return None, [explain(each, origin, file) for each in error.errors()]
    problems = _unknown_syscalls(profile, origin, file)
    profile._source = str(file)
    return profile, problems


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file and those that it extends, itself first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[str] = []
    while True:
        tables = parse_trusted(path)
        chain.append((path, tables))
        seen.append(os.path.realpath(path))
        base = tables.pop("extends", None)
        if base is None:
            return chain
        try:
            if not isinstance(base, str):
                raise ProfileError(source="", reason="must be one profile's name")
            path = find(base)
        except ProfileError as error:
            if error.source == ENV:
                raise
            raise ProfileError(
                source=str(chain[-1][0]),
                where="extends",
                value=base,
                reason=error.reason,
            ) from error
        steps = " -> ".join([*(file.stem for file, _ in chain), base])
        if os.path.realpath(path) in seen:
            reason = f"goes in a circle: {steps}"
            if path == chain[-1][0]:
                reason += "; to change a profile of the same name, use another name"
        elif len(chain) >= _MOST_PARENTS:
            reason = f"extends more than {_MOST_PARENTS} profiles: {steps}"
        else:
            continue
        raise ProfileError(
            source=str(chain[0][0]), where="extends", value=base, reason=reason
        )


def _merge(
    into: dict[str, Any], tables: dict[str, Any], origin: dict[str, Path], file: Path
) -> None:
    """Lay a profile over the one it extends; remember where each key is from."""
    for key in ("why", "description", "name"):
        into.pop(key, None)
        origin.pop(key, None)
    for key, value in tables.items():
        origin[key] = file
        old = into.get(key)
        if not isinstance(value, dict) or not isinstance(old, dict):
            into[key] = value
            for inner in value if isinstance(value, dict) else ():
                origin[f"{key}.{inner}"] = file
            continue
        table = {name: inner for name, inner in old.items() if name != "why"}
        for name, inner in value.items():
            origin[f"{key}.{name}"] = file
            if isinstance(inner, dict) and isinstance(table.get(name), dict):
                table[name] = {**table[name], **inner}
            else:
                table[name] = inner
        into[key] = table


def parse_trusted(path: Path) -> dict[str, Any]:
    """Read and parse a TOML file; see `read_trusted`."""
    try:
        tables: dict[str, Any] = as_tuples(tomllib.loads(read_trusted(path).decode()))
    except UnicodeDecodeError as error:
        raise ProfileError(source=str(path), reason="is not UTF-8 text") from error
    except ValueError as error:  # TOMLDecodeError, or a number of 5,000 digits
        raise ProfileError(source=str(path), reason=f"is not TOML: {error}") from error
    except RecursionError as error:
        raise ProfileError(source=str(path), reason="is nested too deeply") from error
    return tables


# --- who may have written it ----------------------------------------------------


def read_trusted(path: Path) -> bytes:
    """Read a file that only root and we can have written.

    Looks at the descriptor, not at the name: what is read is what was checked.
    """
    real = _check_way(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        there = os.fstat(fd)
        if not stat.S_ISREG(there.st_mode):
            raise ProfileError(source=str(path), reason="is not a regular file")
        _check_writers(path, real, there)
        if there.st_size > _MOST_BYTES:
            raise ProfileError(source=str(path), reason="is larger than 1MiB")
        with open(fd, "rb", closefd=False) as file:
            return file.read(_MOST_BYTES)
    finally:
        os.close(fd)


def check_trusted(path: Path, root: str = "") -> None:
    """Refuse a file that others than root and we could change, or replace.

    Args:
        path: Of the file.
        root: A directory that is the root for it: links lead nowhere outside.

    Raises:
        ProfileError: By name, with the remedy.
    """
    top = Path(_check_way(Path(root))) if root else Path("/")
    real = _check_way(path, top)
    _check_writers(path if not root else Path(real), real, os.lstat(real))


def _check_way(path: Path, root: Path = Path("/")) -> str:
    """Check what the kernel passes on its way to a file; return the real path.

    Whoever can write one of the directories, or owns one of the links, can put
    another file in its place.
    """
    here, links = root, 0
    _check_writers(here, str(here), here.stat())
    todo = [*reversed(path.absolute().parts[1:])]
    while todo:
        part = todo.pop()
        if part == "..":
            here = here.parent if here != root else root
            continue
        here = here / part
        try:
            there = here.lstat()
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if stat.S_ISLNK(there.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise _unreadable(path, OSError(errno.ELOOP, ""))
            _check_owner(here, str(here), there)
            target = Path(os.readlink(here))
            here = root if target.is_absolute() else here.parent
            todo += [p for p in reversed(target.parts) if p != "/"]
        # Of a sticky directory (/tmp) only its owner can take our entries away.
        elif len(todo) > 1 and there.st_mode & stat.S_ISVTX:
            _check_owner(here, str(here), there)
        elif todo:
            _check_writers(here, str(here), there)
    return str(here)


def _check_owner(path: Path, real: str, there: os.stat_result) -> int:
    """Refuse what another user owns; return the writers that are allowed."""
    owners, allowed = {0, os.geteuid()}, 0
    shipped = os.path.realpath(shipped_dir())
    if real == str(_PACKAGE.parent) or f"{real}/".startswith(f"{shipped}/"):
        # Whoever may change our code needs no profile.
        code = os.stat(__file__)
        owners.add(code.st_uid)
        allowed = code.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if there.st_uid not in owners:
        raise ProfileError(
            source=str(path),
            reason=f"belongs to uid {there.st_uid}: must be root's or ours "
            f"(chown -h root {path})",
        )
    return allowed


def _check_writers(path: Path, real: str, there: os.stat_result) -> None:
    allowed = _check_owner(path, real, there)
    if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~allowed:
        remedy = f"chmod go-w {path}"
        if there.st_mode & stat.S_ISVTX:  # /tmp must stay as it is
            remedy = "keep profiles elsewhere"
        raise ProfileError(
            source=str(path),
            reason=f"mode {stat.S_IMODE(there.st_mode):04o}: group or others can "
            f"write it ({remedy})",
        )


def _unreadable(path: Path, error: OSError | ValueError) -> ProfileError:
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number else str(error)
    return ProfileError(source=str(path), reason=f"can't be read: {why}")


# --- saying what is wrong ---------------------------------------------------------


def joined(problems: list[ProfileError]) -> ProfileError:
    """Return one error for all: its message has a line for each."""
    first, *others = problems
    if not others:
        return first
    return ProfileError(
        source=first.source,
        where=first.where,
        value=first.value,
        reason="\n".join([first.reason, *map(str, others)]),
    )


def as_tuples(value: Any, depth: int = 0) -> Any:
    """Return a TOML value with tuples for lists, as a frozen model has them.

    Raises:
        RecursionError: More levels than any profile has.
    """
    if depth > _MOST_LEVELS:
        raise RecursionError
    if isinstance(value, dict):
        return {key: as_tuples(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(as_tuples(inner, depth + 1) for inner in value)
    return value


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def _keys_of(
    location: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[str, list[str]]:
    """Return the table that a location's last part is in, and its keys."""
    more = ["extends"] if model is Profile else []
    table = ""
    for part in location[:-1]:
        for name, field in model.model_fields.items():
            section = _section_of(field.annotation)
            if (field.alias or name) == part and section is not None:
                model, table = section, str(part)
    keys = [field.alias or name for name, field in model.model_fields.items()]
    return table, sorted(keys if table else [*keys, *more])


def _section_of(annotation: object) -> type[BaseModel] | None:
    """Return the model of a table, or of each table of a list."""
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


_RULES = {
    "missing": "is required",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def explain(
    problem: Mapping[str, Any],
    origin: Mapping[str, Path],
    file: Path,
    model: type[BaseModel] = Profile,
) -> ProfileError:
    """Turn one of pydantic's problems into ours: place, value, rule."""
    location = tuple(part for part in problem["loc"] if part != "[key]")
    kind, context = problem["type"], problem.get("ctx", {})
    value = problem["input"]
    if kind == "extra_forbidden":
        table, known = _keys_of(location, model)
        place = f"[{table}] has" if table else "there are"
        word = str(location[-1])
        reason = _meant(word, known) or f"{place} {', '.join(known)}"
        reason = f"unknown key; {reason}"
    elif kind == "value_error":
        reason = str(context["error"])
    elif kind == "literal_error":
        expected = str(context["expected"]).replace("'", '"').replace("False", "false")
        reason = f"must be {expected}"
        if location == ("ray_api", "enabled"):
            reason = "must be false: a jail has no Ray API yet"
    elif kind == "greater_than_equal":
        reason = f"must be at least {context['ge']}"
    elif kind == "less_than_equal":
        reason = f"must be at most {context['le']}"
    elif kind == "string_too_short":
        reason = "must not be empty: say why"
    else:
        reason = _RULES.get(kind, problem["msg"])
    whole_section = isinstance(value, dict) and kind == "value_error"
    return ProfileError(
        source=str(_origin(location, origin, file)),
        where=_dotted(location),
        value=None if whole_section or kind == "missing" else _listed(value),
        reason=reason,
    )


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def _origin(
    location: tuple[int | str, ...], origin: Mapping[str, Path], file: Path
) -> Path:
    names_only = [part for part in location if isinstance(part, str)]
    for length in (2, 1):
        found = origin.get(".".join(names_only[:length]))
        if found is not None:
            return found
    return file


def _listed(value: object) -> object:
    if isinstance(value, tuple):
        return [_listed(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return value


def _unknown_syscalls(
    profile: Profile, origin: Mapping[str, Path], file: Path
) -> list[ProfileError]:
    """Problems that only the table of groups and calls can tell."""
    from raysandbox.kernel import seccomp

    return [
        ProfileError(
            source=str(_origin(("syscalls", where), origin, file)),
            where=f"syscalls.{where}",
            value=value,
            reason=reason,
        )
        for where, value, reason in seccomp.problems(profile.syscalls)
    ]
