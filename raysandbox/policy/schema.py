"""What a node's policy is: one model, from which the JSON Schema is generated too.

The operator's word against the client's: which profiles this node offers, who
may have which, and what all of them together may take. Every default is the
strictest choice that lets a node work, what weakens one needs a ``why`` in the
same table, and what is not listed here is an error. Values are written as in
profiles (``"8GiB"``, ``"4h"``, ``"unlimited"``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from raysandbox.profile.schema import (
    SIZE_PATTERN,
    Cores,
    OptionalDuration,
    OptionalSize,
    Unique,
    is_name,
)
from raysandbox.profile.schema import _as_written as as_written
from raysandbox.profile.schema import _Matching as Matching
from raysandbox.profile.schema import _or_unlimited as or_unlimited
from raysandbox.profile.schema import _Section as Section
from raysandbox.profile.units import parse_size

__all__ = [
    "IMAGE_PREFIX",
    "JOBS_NAMESPACE",
    "MOST_AT_ONCE",
    "NEVER",
    "PROFILERS",
    "STRICTEST",
    "TAG_PREFIX",
    "Audit",
    "Ceilings",
    "Image",
    "Interpreter",
    "Jobs",
    "ObjectStore",
    "Percent",
    "Policy",
    "Profiler",
    "Rule",
    "RuntimeEnv",
    "Totals",
    "Worker",
    "json_schema",
]

#: The profile that everybody may have, and that decides where nothing else does.
STRICTEST = "strict"
#: A resource of this prefix names the profile that a task asks for.
TAG_PREFIX = "sandbox:"

#: Ray namespace of the job to which all entrypoints of the Jobs API belong: that of
#: Ray's agent, which makes an actor for each.
JOBS_NAMESPACE = "_ray_internal_dashboard"

#: Of one profile on one node; so many are as many as somebody likes. (Ray counts
#: resources in ten-thousandths in a 64-bit number.)
MOST_AT_ONCE = 1_000_000

_RULE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}|[0-9]{1,10}")
_PERCENT = re.compile(r"([1-9][0-9]?|100)%")
_PORTS = re.compile(r"([1-9][0-9]{0,4})-([1-9][0-9]{0,4})")
_PERCENT_SCHEMA = {"type": "string", "pattern": r"^([1-9][0-9]?|100)%$"}


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of what the machine has."""

    value: int

    def __str__(self) -> str:
        return f"{self.value}%"

    def of(self, whole: float) -> float:
        """Return this share of ``whole``."""
        return whole * self.value / 100


def _percent_or(
    value: object, parse: Any, least: float, most: float, rule: str
) -> Percent | int | float:
    if isinstance(value, Percent):
        return value
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        return Percent(int(match[1]))
    try:
        number = parse(value)
    except ValueError:
        raise ValueError(rule) from None
    if not least <= number <= most:
        raise ValueError(rule)
    return number  # type: ignore[no-any-return]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return value


def _whole_number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("no whole number")
    return value


def _cpu_total(value: object) -> Percent | int | float:
    rule = 'must be a number of cores from 0.1 to 4096, or a share such as "80%"'
    return _percent_or(value, _number, 0.1, 4096, rule)


def _memory_total(value: object) -> Percent | int | float:
    rule = 'must be a size of at least 256MiB such as "12GiB", or a share such as "80%"'
    return _percent_or(value, parse_size, 256 << 20, math.inf, rule)


def _pids_total(value: object) -> Percent | int | float:
    rule = 'must be a number of at least 64, or a share such as "50%"'
    return _percent_or(value, _whole_number, 64, 1 << 22, rule)


_AS_WRITTEN = PlainSerializer(lambda v: str(v) if isinstance(v, Percent) else v)
CpuTotal = Annotated[
    Percent | float,
    _AS_WRITTEN,
    BeforeValidator(_cpu_total),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0.1, "maximum": 4096},
                _PERCENT_SCHEMA,
            ]
        }
    ),
]
MemoryTotal = Annotated[
    Percent | int,
    _AS_WRITTEN,
    BeforeValidator(_memory_total),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, _PERCENT_SCHEMA]}
    ),
]
PidsTotal = Annotated[
    Percent | int,
    _AS_WRITTEN,
    BeforeValidator(_pids_total),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 64}, _PERCENT_SCHEMA]}),
]


def _count(value: object) -> object:
    value = or_unlimited(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError('must be a whole number above 0, or "unlimited"')
    return value


Count = Annotated[
    int | None,
    BeforeValidator(_count),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "unlimited"}]}
    ),
]


def _enough_pids(value: int | None) -> int | None:
    if value is not None and value < 8:
        raise ValueError("must be at least 8")
    return value


Pids = Annotated[Count, AfterValidator(_enough_pids)]


def _size_of_at_least(least: int, shown: str) -> AfterValidator:
    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise ValueError(f"must be at least {shown}")
        return value

    return AfterValidator(check)


def _time_of_at_least_100ms(value: float | None) -> float | None:
    if value is not None and value < 0.1:
        raise ValueError("must be at least 100ms")
    return value


_Time = Annotated[OptionalDuration, AfterValidator(_time_of_at_least_100ms)]


def _port_range(value: int | str) -> tuple[int, int]:
    """Return the first and last of the ports that a policy writes as one item."""
    if isinstance(value, int):
        return value, value
    first, _, last = value.partition("-")
    return int(first), int(last)


def _ports(value: object) -> object:
    written = type(value) is int or (
        isinstance(value, str) and _PORTS.fullmatch(value) is not None
    )
    first, last = _port_range(value) if written else (0, 0)  # type: ignore[arg-type]
    if not 1 <= first <= last <= 65535:
        raise ValueError(
            'must be a TCP port from 1 to 65535, or a range such as "20000-20200"'
        )
    return value


PortRange = Annotated[
    int | str,
    BeforeValidator(_ports),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {"type": "string", "pattern": f"^(?:{_PORTS.pattern})$"},
            ]
        }
    ),
]


def _profile_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("must be a profile's name: a-z, 0-9, _ and -")
    return value


ProfileName = Annotated[str, AfterValidator(_profile_name)]


def _pattern(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("must be a name, with * and ? as in a shell")
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]


# --- who may have what -----------------------------------------------------------


class Rule(Section):
    """Which jobs it is for, and which profiles those may use.

    All that is given must match. Rules are tried in order and the first that
    matches decides alone.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    name: Annotated[
        str,
        Matching(_RULE_NAME, "must be a short text of letters, digits, blanks, . _ -"),
        Field(description="For messages and `policy explain`; unique."),
    ]
    namespaces: Annotated[
        tuple[Pattern, ...],
        Unique,
        Field(
            description="Ray namespaces of the job, as the GCS has them, with * and ?. "
            "Left out: any."
        ),
    ] = ()
    metadata: dict[str, Pattern] = Field(
        default_factory=dict,
        description="Job metadata, as the GCS has it; values may have * and ?.",
    )
    signers: Annotated[
        tuple[Pattern, ...],
        Unique,
        Field(
            description="Who must have signed the code. Without a verified "
            "signature a rule that asks for one matches nothing."
        ),
    ] = ()
    profiles: Annotated[
        tuple[ProfileName, ...],
        Unique,
        Field(description='What these jobs may ask for; "strict" always is.'),
    ]
    untagged: Annotated[
        ProfileName | None,
        Field(description="For their tasks without a tag; default: the policy's."),
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.untagged not in (None, STRICTEST, *self.profiles):
            raise ValueError(f"untagged = {self.untagged!r} is not one of its profiles")
        return self

    def may_use(self, profile: str) -> bool:
        """Whether a job that this rule is for may ask for ``profile``."""
        return profile == STRICTEST or profile in self.profiles


class Ceilings(Section):
    """What no profile gets more of, whatever its file says.

    A profile that asks for more is lowered to it when the node starts.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    cpu_cores: Annotated[Cores, Field(alias="cpu")] = None
    memory_bytes: Annotated[
        OptionalSize, _size_of_at_least(64 << 20, "64MiB"), Field(alias="memory")
    ] = None
    pids: Pids = None
    wall_time_s: Annotated[_Time, Field(alias="wall_time")] = None
    cpu_time_s: Annotated[_Time, Field(alias="cpu_time")] = None
    scratch_bytes: Annotated[
        OptionalSize, _size_of_at_least(1 << 20, "1MiB"), Field(alias="scratch")
    ] = None
    output_bytes: Annotated[
        OptionalSize, _size_of_at_least(4096, "4KiB"), Field(alias="output")
    ] = None
    max_argument_bytes: Annotated[OptionalSize, Field(alias="max_argument")] = None
    max_result_bytes: Annotated[OptionalSize, Field(alias="max_result")] = None
    max_put_bytes: Annotated[OptionalSize, Field(alias="max_put")] = None
    boundary: Annotated[
        Literal["task", "job", "worker"],
        Field(description="The weakest boundary that an offered profile may have."),
    ] = "worker"


# --- what a runtime_env may do ----------------------------------------------------


_Answer = Literal["refuse", "allow"]

_PYTHON_ALONE = "the launcher has a wall for Python workers alone"
#: Keys of a runtime_env that no policy can allow, and why.
NEVER: Mapping[str, str] = dict.fromkeys(
    ("java_jars", "java_workers", "cpp_workers"), _PYTHON_ALONE
)


def _never(key: str) -> BeforeValidator:
    """Take "refuse" alone: a value without an effect would be a promise."""

    def check(value: object) -> object:
        if value != "refuse":
            raise ValueError(f'must be "refuse": {NEVER[key]}')
        return value

    return BeforeValidator(check)


_Refused = Literal["refuse"]


def _absolute_path(value: str) -> str:
    if (
        not value.startswith("/")
        or set(value) & set("\0\n ")
        or ".." in value.split("/")
    ):
        raise ValueError('must be an absolute path, without spaces and ".."')
    return value


def python_of(prefix: str) -> str:
    """Return the path of an environment's interpreter."""
    return f"{prefix.rstrip('/')}/bin/python"


_Path = Annotated[
    str,
    AfterValidator(_absolute_path),
    WithJsonSchema({"type": "string", "pattern": "^/"}),
]


def _below_root(path: str) -> str:
    if not path.strip("/."):
        raise ValueError("must not be the host's own root: it would show all of it")
    return path


class Image(BaseModel):
    """A root file system that the operator unpacked, to be seen instead of the host's.

    Attributes:
        root: Its directory on this host.
        python: Its interpreter, as seen inside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Annotated[_Path, AfterValidator(_below_root)]
    python: _Path = "/usr/local/bin/python3"


class Profiler(BaseModel):
    """A program of the operator's that starts the worker's interpreter.

    Attributes:
        program: It is started in the interpreter's place, with its arguments.
        read: What it needs besides: files and directories of this host.
        write: Where it puts what it found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: _Path
    read: tuple[_Path, ...] = ()
    write: tuple[_Path, ...] = ()


class Interpreter(NamedTuple):
    """What a job may have in the place of the node's Python.

    Attributes:
        asked: What Ray's agent calls it, as the ``py_executable`` of what it made.
        key: The policy's key that names it, below ``runtime_env``.
        path: Where it is, seen from ``root``.
        root: The root file system that its workers see; "" for the host's.
        read: Paths that its workers see besides.
        write: Paths that they may write besides.
    """

    asked: str
    key: str
    path: str
    root: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


_URI = re.compile(r"[!-~]{1,500}")


def _images(value: object) -> object:
    if value == "refuse":
        return {}
    if not isinstance(value, Mapping):
        return value
    for uri in value:
        if not _URI.fullmatch(str(uri)):
            raise ValueError("an image's name must be printable, without spaces")
    return {
        uri: {"root": each} if isinstance(each, str) else each
        for uri, each in value.items()
    }


def _path_or(*others: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of what may be written as a path alone."""
    return {"anyOf": [{"type": "string", "pattern": "^/"}, *others]}


def _profiler(value: object) -> object:
    if value == "refuse":
        return None
    return {"program": value} if isinstance(value, str) else value


class RuntimeEnv(Section):
    """What happens to a runtime_env that would reach around the worker's wall.

    Keys that say "refused always" are here so that a policy can name them: no
    value of theirs allows anything. Of what stands in the place of the worker's
    interpreter, or around it, a job may choose what the operator made.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = dict.fromkeys(
        ("pip", "uv", "remote_uris", "other"), ("allow",)
    )

    py_executable: Annotated[
        tuple[_Path, ...],
        BeforeValidator(lambda value: () if value == "refuse" else value),
        Unique,
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "refuse"},
                    {"type": "array", "items": {"type": "string", "pattern": "^/"}},
                ]
            }
        ),
        Field(
            description="Paths of interpreters that the operator made, each with the "
            "node's versions of Ray and raysandbox: a job may ask for one of these by "
            "exactly that path. They run in the worker, so nobody else may be able to "
            'write them. [] or "refuse": the node\'s own alone.'
        ),
    ] = ()
    image_uri: Annotated[
        Mapping[str, Image],
        BeforeValidator(_images),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "refuse"},
                    {
                        "type": "object",
                        "additionalProperties": _path_or(Image.model_json_schema()),
                    },
                ]
            }
        ),
        Field(
            description="Images that a job may ask for, by exactly that URI, each with "
            "the directory of a root file system that the operator unpacked (such as "
            "by `docker export`), or with {root = DIRECTORY, python = PATH}, where "
            "PATH is its interpreter as seen inside, /usr/local/bin/python3 unless "
            "said. It has the node's versions of Ray and raysandbox. The worker and "
            "its jails see it, read-only, instead of the host's files; no container "
            "engine is used and nothing is pulled."
        ),
    ] = {}
    container: Annotated[
        Literal["refuse", "image_uri"],
        Field(
            description='"image_uri": {image = URI} is taken as image_uri has it. What '
            "else the key has (run_options, worker_path) is refused always: options of "
            "a container engine."
        ),
    ] = "refuse"
    nsight: Annotated[
        Profiler | None,
        BeforeValidator(_profiler),
        WithJsonSchema(_path_or(Profiler.model_json_schema(), {"const": "refuse"})),
        Field(
            description="A program of the operator's that starts Python under Nsight "
            "Systems, such as a script with `exec nsys profile … "
            'python "$@"`: for jobs with nsight = "default". Its path, or {program = '
            "PATH, read = [PATHS], write = [PATHS]} with what workers under it see "
            "and write besides. It runs behind the worker's wall; a job's own options "
            "are refused always."
        ),
    ] = None
    rocprof_sys: Annotated[
        Profiler | None,
        BeforeValidator(_profiler),
        WithJsonSchema(_path_or(Profiler.model_json_schema(), {"const": "refuse"})),
        Field(description="As nsight, for ROCm's profiler."),
    ] = None
    conda: Annotated[
        Mapping[str, _Path],
        BeforeValidator(lambda value: {} if value == "refuse" else value),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "refuse"},
                    {
                        "type": "object",
                        "additionalProperties": {"type": "string", "pattern": "^/"},
                    },
                ]
            }
        ),
        Field(
            description="Names of environments that the operator made, with the "
            "directory (prefix) of each: a job that asks for one by its name runs "
            "PREFIX/bin/python, as if py_executable allowed that. Conda itself is not "
            "used, and a specification is refused always: its installer would run "
            "the job's code on the node, outside of every wall."
        ),
    ] = {}
    pip: Annotated[
        _Answer,
        Field(
            description="An installer that runs the job's code (setup.py) on the node, "
            "outside of every wall. What it installed is for the jails alone. Wheels "
            "in py_modules are installed by it, with what they say that they need."
        ),
    ] = "refuse"
    uv: Annotated[_Answer, Field(description="As pip.")] = "refuse"
    remote_uris: Annotated[
        _Answer,
        Field(
            description="working_dir and py_modules at http, https, s3, gs, azure and "
            "abfss: the node fetches them, from its place in the network and with its "
            "credentials. What a driver uploads needs none; file and local are refused "
            "always."
        ),
    ] = "refuse"
    java_jars: Annotated[
        _Refused,
        _never("java_jars"),
        Field(description="Code of a Java worker: refused always."),
    ] = "refuse"
    java_workers: Annotated[
        _Refused,
        _never("java_workers"),
        Field(description="Workers in Java: refused always."),
    ] = "refuse"
    cpp_workers: Annotated[
        _Refused,
        _never("cpp_workers"),
        Field(description="Workers in C++: refused always."),
    ] = "refuse"
    other: Annotated[
        _Answer,
        Field(
            description="Keys that raysandbox does not know, of a plugin of Ray's "
            "agent. Its code runs on the node, outside of every wall; what it puts "
            "before the worker's command is left out."
        ),
    ] = "refuse"
    setup_hook: Annotated[
        Literal["jail", "refuse"],
        Field(
            description="A job's own worker_process_setup_hook and preload modules: "
            "run inside the jails, or the job is refused."
        ),
    ] = "jail"
    loader_variables: Annotated[
        Literal["jail", "drop", "refuse"],
        Field(
            description="env_vars that steer the loader or Python (LD_*, PYTHON*): "
            "the jail alone sees them, nobody does, or the job is refused."
        ),
    ] = "jail"
    ray_variables: Annotated[
        Literal["drop", "refuse"],
        Field(description="env_vars of Ray's and ours (RAY_*, RAYSANDBOX_*)."),
    ] = "drop"

    @model_validator(mode="after")
    def _has_images(self) -> RuntimeEnv:
        if self.container == "image_uri" and not self.image_uri:
            raise ValueError(
                'container = "image_uri" allows nothing: image_uri names no image'
            )
        return self

    def deviations(self) -> list[str]:
        """See `Section`."""
        named = [key for key in _NAMED if getattr(self, key)]
        return [*super().deviations(), *named]

    def interpreters(self) -> dict[str, Interpreter]:
        """Return all that a job may ask for, by what Ray's agent calls each."""
        found = [
            Interpreter(path, "py_executable", path) for path in self.py_executable
        ]
        for name, prefix in self.conda.items():
            path = python_of(prefix)
            found.append(Interpreter(path, f"conda.{name}", path))
        for uri, image in self.image_uri.items():
            found.append(
                Interpreter(
                    f"{IMAGE_PREFIX}{uri}", f"image_uri.{uri}", image.python, image.root
                )
            )
        for key in PROFILERS:
            each: Profiler | None = getattr(self, key)
            if each is not None:
                found.append(
                    Interpreter(
                        f"{key}:{each.program}",
                        key,
                        each.program,
                        read=each.read,
                        write=each.write,
                    )
                )
        return {each.asked: each for each in found}


#: Keys that name what the operator made.
_NAMED = ("py_executable", "conda", "image_uri", "nsight", "rocprof_sys")
#: Keys of programs that start the worker's interpreter.
PROFILERS = ("nsight", "rocprof_sys")
#: What Ray's agent calls an image's interpreter: no path, which a client could name.
IMAGE_PREFIX = "image_uri:"


class Jobs(Section):
    """Entrypoints of the Jobs API (``ray job submit``): programs beside an actor.

    Each is a driver, with the cluster's token and all that a driver may do in Ray.
    Left out they are refused.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    entrypoint: Annotated[
        ProfileName | None,
        Field(
            description='A profile with boundary = "worker" that [offer] counts: each '
            "entrypoint runs inside its walls, and takes one of its tags. Whoever "
            "reaches the Jobs API may run one. Ray 2.60; in a hardened cluster on the "
            "head alone."
        ),
    ] = None

    def deviations(self) -> list[str]:
        """See `Section`."""
        return ["entrypoint"] if self.entrypoint is not None else []


# --- workers and the node ----------------------------------------------------------


class Worker(Section):
    """The process that speaks Ray's protocol, with its jails inside.

    Its limits hold on top of those of the profiles.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    user: Annotated[
        str,
        Matching(_USER, "must be a user's name or number"),
        Field(
            description="Who workers run as where raylet is root's: a name, a number, "
            'or "auto" for an id that nobody else on the machine has.'
        ),
    ] = "auto"
    cpu_cores: Annotated[Cores, Field(alias="cpu")] = None
    memory_bytes: Annotated[
        OptionalSize, _size_of_at_least(256 << 20, "256MiB"), Field(alias="memory")
    ] = None
    pids: Pids = 4096
    open_files: Annotated[int, Field(ge=1024, le=1 << 20)] = 65536
    log_bytes: Annotated[
        OptionalSize,
        _size_of_at_least(128 << 10, "128KiB"),
        Field(
            alias="log",
            description="Of each log file of a worker (standard output, standard "
            "error, Ray's own), whatever is written into it. One that has half of "
            "this starts anew, and its newest half is left beside it, as NAME.1.",
        ),
    ] = 256 << 20
    all_logs_bytes: Annotated[
        OptionalSize,
        _size_of_at_least(1 << 20, "1MiB"),
        Field(
            alias="all_logs",
            description="Of all log files of workers in Ray's session on this node. "
            "Of those that have ended the oldest go; if living workers have more, "
            "each of their files may have less.",
        ),
    ] = 8 << 30
    connect: Annotated[
        tuple[PortRange, ...] | None,
        Field(
            description="TCP ports that Ray uses on the cluster's other nodes (GCS, "
            "raylets, workers, drivers); those of this node are added, and a worker "
            "connects to no others. [] for a cluster of one node; left out: to any. "
            "Needs --node-manager-port, --dashboard-agent-grpc-port and worker ports "
            "at the node's start, and Landlock ABI 4. UDP is not governed."
        ),
    ] = None

    @property
    def connect_ranges(self) -> list[tuple[int, int]] | None:
        """First and last port of each item of ``connect``; None for any port."""
        return None if self.connect is None else [_port_range(p) for p in self.connect]

    @model_validator(mode="after")
    def _unprivileged(self) -> Worker:
        if self.user in ("root", "0") or (self.user.isdigit() and not int(self.user)):
            raise ValueError("user must not be root: a worker needs no privilege")
        return self


class Totals(Section):
    """What all workers and jails of the node may take together.

    The rest stays for raylet, the GCS and the machine.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {"required": (False,)}

    cpu_cores: Annotated[CpuTotal, Field(alias="cpu")] = Percent(90)
    cpu_weight: Annotated[
        int,
        Field(
            ge=1,
            le=10000,
            description="All of them together against raylet and the rest under "
            "contention; 100 is the host's default for one group.",
        ),
    ] = 50
    memory_bytes: Annotated[MemoryTotal, Field(alias="memory")] = Percent(80)
    pids: PidsTotal = Percent(50)
    required: Annotated[
        bool,
        Field(description="Refuse to start where the host can't enforce these."),
    ] = True


class ObjectStore(Section):
    """Ray's object store: what one task and one job may hold.

    Holds together with the profile's ``object_store``; the smaller one decides.
    """

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    max_task_bytes: Annotated[
        OptionalSize, Field(alias="max_task", description="Stored by one task.")
    ] = None
    max_task_objects: Annotated[
        Count, Field(description="Objects stored by one task.")
    ] = 10_000
    max_job_bytes: Annotated[
        OptionalSize,
        Field(alias="max_job", description="Held by one job on this node."),
    ] = 8 << 30
    max_job_objects: Annotated[
        Count, Field(description="Objects held by one job on this node.")
    ] = 100_000


class Audit(Section):
    """Where events go: jails' ends, refusals, kills."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    directory: Annotated[
        str,
        AfterValidator(
            lambda path: path if path == "session" else _absolute_path(path)
        ),
        Field(
            description='An absolute directory, or "session" for Ray\'s session logs. '
            "Each worker has a file of its own there, of at most 16 MiB (one that a "
            "worker made larger than 32 MiB is emptied). Of workers "
            "that are gone the session's logs keep the newest 512 and 64 MiB; from a "
            "directory of the operator's nothing is removed."
        ),
    ] = "session"


class Policy(Section):
    """Everything that a node's operator decides; see `raysandbox.policy`."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    description: str = ""
    untagged: Annotated[
        ProfileName,
        Field(
            description="For tasks without a tag, of jobs whose rule allows it; "
            "all others get strict."
        ),
    ] = STRICTEST
    offer: dict[ProfileName, Annotated[int, Field(ge=1, le=MOST_AT_ONCE)]] = Field(
        default_factory=lambda: {STRICTEST: 64},
        description="Profile to how many of it at once: the node's tags. A task takes "
        f"a whole one, but where there are {MOST_AT_ONCE}, which bounds nobody.",
    )
    rules: tuple[Rule, ...] = ()
    ceilings: Ceilings = Field(default_factory=Ceilings)
    runtime_env: RuntimeEnv = Field(default_factory=RuntimeEnv)
    worker: Worker = Field(default_factory=Worker)
    totals: Totals = Field(default_factory=Totals)
    object_store: ObjectStore = Field(default_factory=ObjectStore)
    audit: Audit = Field(default_factory=Audit)
    jobs: Jobs = Field(default_factory=Jobs)

    _source: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """The file it was loaded from, or ``""``."""
        return self._source

    @property
    def digest(self) -> str:
        """Short hash of the whole policy, for records."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def profiles(self) -> list[str]:
        """Return every profile that it names, sorted; strict is always one."""
        named = {STRICTEST, self.untagged, *self.offer}
        if self.jobs.entrypoint is not None:
            named.add(self.jobs.entrypoint)
        for rule in self.rules:
            named |= {*rule.profiles, *([rule.untagged] if rule.untagged else [])}
        return sorted(named)

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        names = [rule.name for rule in self.rules]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"two rules are named {doubles[0]!r}")
        if self.jobs.entrypoint not in (None, *self.offer):
            raise ValueError(
                f"jobs.entrypoint = {self.jobs.entrypoint!r} is not in [offer], which "
                "says how many run at once"
            )
        return self


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a policy file, for editors."""
    schema = Policy.model_json_schema(by_alias=True, mode="validation")
    sections: list[type[Section]] = [Policy, Rule, *_tables()]
    for section in sections:
        table = schema if section is Policy else schema["$defs"][section.__name__]
        for name, field in section.model_fields.items():
            key = table["properties"][field.alias or name]
            as_written(key, name)
            if isinstance(field.default, Percent):
                key["default"] = str(field.default)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "raysandbox node policy"
    return schema


def _tables() -> list[type[Section]]:
    annotations = (field.annotation for field in Policy.model_fields.values())
    return [a for a in annotations if isinstance(a, type) and issubclass(a, Section)]
