"""What a profile is: one model, from which the JSON Schema is generated too.

Every default is the strictest choice: a profile with nothing in it is
``strict``.  What weakens a default needs a ``why`` in the same section; what is
not listed here is an error.  TOML keys are the fields' aliases: the Python name
without its unit (``memory_bytes`` is written ``memory = "1GiB"``).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from raysandbox.profile.toml import written
from raysandbox.profile.units import parse_duration, parse_rate, parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Environment",
    "Filesystem",
    "Landlock",
    "Limits",
    "Namespaces",
    "Network",
    "ObjectStore",
    "OciPolicy",
    "Profile",
    "RayApi",
    "Results",
    "Syscalls",
    "is_name",
    "json_schema",
]

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE_GLOB = re.compile(r"[A-Za-z_][A-Za-z0-9_*?]*")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SYSCALL = re.compile(r"[a-z_][a-z0-9_]*")
_AT_NAMES = ("@system", "@python", "@working_dir", "@scratch")
# What must never reach a jail, whatever the profile passes: the cluster's
# token, its keys, and our own settings.
_SECRET_PREFIXES = ("RAY_", "RAYSANDBOX_")

SIZE_PATTERN = r"^[0-9]{1,19}(B|KiB|MiB|GiB|TiB)$"
DURATION_PATTERN = r"^[0-9]{1,19}(ms|s|min|h|d)$"
RATE_PATTERN = r"^[0-9]{1,19}(B|KiB|MiB|GiB|TiB)/s$"
# As _path has it: an @name, or absolute, not the root, and without "..".
PATH_PATTERN = (
    rf"^(?:{'|'.join(_AT_NAMES)}|/(?!(?:[^\0]*/)?\.\.(?:/|$))[^\0]*[^/\0][^\0]*)$"
)


def is_name(name: str) -> bool:
    """Return whether ``name`` can be a profile's: it is a file name and a tag."""
    return _NAME.fullmatch(name) is not None


# --- types of single values -------------------------------------------------


def _at_least(least: int, shown: str) -> AfterValidator:
    def check(value: int) -> int:
        if value < least:
            raise ValueError(f"must be at least {shown}")
        return value

    return AfterValidator(check)


def _or_unlimited(value: object) -> object:
    return None if value == "unlimited" else value


def _text_schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


_UNLIMITED = {"const": "unlimited"}

Size = Annotated[int, BeforeValidator(parse_size), _text_schema(SIZE_PATTERN, "256MiB")]
Duration = Annotated[
    float, BeforeValidator(parse_duration), _text_schema(DURATION_PATTERN, "10min")
]
_Rate = Annotated[
    int, BeforeValidator(parse_rate), _text_schema(RATE_PATTERN, "50MiB/s")
]
OptionalSize = Annotated[
    Size | None,
    BeforeValidator(_or_unlimited),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, _UNLIMITED]}
    ),
]


def _count(value: object) -> object:
    value = _or_unlimited(value)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError('must be a whole number from 1, or "unlimited"')
    return value


OptionalCount = Annotated[
    int | None,
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, _UNLIMITED]}),
]
OptionalDuration = Annotated[
    Duration | None,
    BeforeValidator(_or_unlimited),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": DURATION_PATTERN}, _UNLIMITED]}
    ),
]
OptionalRate = Annotated[
    Annotated[_Rate, _at_least(4096, "4KiB/s")] | None,
    BeforeValidator(_or_unlimited),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": RATE_PATTERN}, _UNLIMITED]}
    ),
]


def _cores(value: object) -> object:
    value = _or_unlimited(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('must be a number of cores such as 1 or 0.5, or "unlimited"')
    if not 0.01 <= value <= 4096:
        raise ValueError("must be between 0.01 and 4096 cores")
    return float(value)


Cores = Annotated[
    float | None,
    BeforeValidator(_cores),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0.01, "maximum": 4096}, _UNLIMITED]}
    ),
]


def _path(value: str) -> str:
    if value.startswith("@"):
        if value not in _AT_NAMES:
            raise ValueError(f"unknown @name; there are {', '.join(_AT_NAMES)}")
        return value
    if not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path or an @name")
    if ".." in value.split("/"):
        raise ValueError("must not contain '..'")
    if value.rstrip("/") == "":
        raise ValueError("must not be the whole root: name what is needed")
    return value


@dataclass(frozen=True, slots=True)
class _Matching:
    """Refuses, here and in the JSON Schema, a text that is not of a pattern."""

    pattern: re.Pattern[str]
    rule: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern.pattern})$"}

    def _check(self, value: str) -> str:
        if self.pattern.fullmatch(value) is None:
            raise ValueError(self.rule)
        return value


@dataclass(frozen=True, slots=True)
class _Unique:
    """Refuses, here and in the JSON Schema, a list that says something twice."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "uniqueItems": True}

    def _check(self, value: tuple[str, ...]) -> tuple[str, ...]:
        doubles = sorted({item for item in value if value.count(item) > 1})
        if doubles:
            raise ValueError(f"lists {', '.join(doubles)} more than once")
        return value


def _passable(value: str) -> str:
    """Refuse a pattern that could let a secret of Ray's through."""
    literal = re.split(r"[*?]", value, maxsplit=1)[0]
    for prefix in _SECRET_PREFIXES:
        if literal.startswith(prefix) or (
            literal != value and prefix.startswith(literal)
        ):
            raise ValueError(
                f"must not match {prefix}* (cluster token, keys, settings)"
            )
    return value


Unique = _Unique()
PathName = Annotated[
    str,
    AfterValidator(_path),
    WithJsonSchema({"type": "string", "pattern": PATH_PATTERN}),
]
Paths = Annotated[tuple[PathName, ...], Unique]
Reason = Annotated[
    str,
    Field(min_length=1, description="Why this is needed; a sentence for a reader."),
]


SyscallName = Annotated[str, _Matching(_SYSCALL, "must be a system call's name")]
PassedVariable = Annotated[
    str,
    _Matching(
        _VARIABLE_GLOB, "must be a variable's name, with * and ? after its start"
    ),
    AfterValidator(_passable),
]
VariableName = Annotated[str, _Matching(_VARIABLE, "must be a variable's name")]


@dataclass(frozen=True, slots=True)
class OciPolicy:
    """An OCI seccomp policy: where it is and what it said when it was loaded."""

    path: str
    text: str


def _read_oci(value: object, info: ValidationInfo) -> object:
    """Turn the path into the file's text; the loader says how to read it."""
    if value is None or isinstance(value, OciPolicy):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be the path of a JSON file")
    read = (info.context or {}).get("read_oci")
    if read is None:
        raise ValueError("can only be given in a file")
    policy: OciPolicy = read(value)
    return policy


# --- sections -----------------------------------------------------------------


class _Section(BaseModel):
    """A table of a profile.

    ``deviations`` says which of its values weaken the default.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )

    #: Key to the values that weaken it (for those that weaken at all).
    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {"required": (False,)}

    why: Annotated[
        str, Field(description="Why this section weakens a default, if it does.")
    ] = ""

    def deviations(self) -> list[str]:
        """Return the keys (as in TOML) whose values weaken the default."""
        fields = type(self).model_fields
        return [
            fields[name].alias or name
            for name, values in self.weak.items()
            if getattr(self, name) in values
        ]

    @model_validator(mode="after")
    def _explained(self) -> _Section:
        weakened = self.deviations()
        if weakened and not self.why.strip():
            raise ValueError(f'weakens {", ".join(weakened)}: say why = "…"')
        return self


Required = Annotated[
    bool,
    Field(description="Refuse to run on a host that can't give this protection."),
]


Indispensable = Annotated[
    bool,
    WithJsonSchema({"const": True, "description": "Always true: no jail without it."}),
]


class Namespaces(_Section):
    """Kernel namespaces that a jail has to itself."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = dict.fromkeys(
        ("network", "ipc", "uts", "cgroup", "required"), (False,)
    )

    user: Indispensable = True
    pid: Indispensable = True
    mount: Indispensable = True
    network: bool = True
    ipc: bool = True
    uts: bool = True
    cgroup: bool = True
    hostname: Annotated[
        str, _Matching(_HOSTNAME, "must be a host name: a-z, 0-9 and -")
    ] = "jail"
    required: Required = True

    @model_validator(mode="after")
    def _indispensable(self) -> Namespaces:
        missing = [n for n in ("user", "pid", "mount") if not getattr(self, n)]
        if missing:
            raise ValueError(f"no jail can be built without {', '.join(missing)}")
        return self


class Filesystem(_Section):
    """What of the host's files is there, and the jail's own scratch."""

    read: Annotated[
        Paths, Field(description="Paths and @names that are there, read-only.")
    ] = ("@system", "@python", "@working_dir")
    write: Annotated[Paths, Field(description="Paths that are there, writable.")] = (
        "@scratch",
    )
    hide: Annotated[Paths, Field(description="Paths below those that are masked.")] = ()
    scratch_bytes: Annotated[
        Size,
        _at_least(1 << 20, "1MiB"),
        Field(
            alias="scratch", description="Size of /scratch, /tmp, /dev/shm together."
        ),
    ] = 256 << 20
    scratch_inodes: Annotated[
        int, Field(ge=64, le=1 << 24, description="Files and directories in it.")
    ] = 65536
    required: Required = True

    def deviations(self) -> list[str]:
        defaults = type(self).model_fields
        found = super().deviations()
        for name in ("read", "write"):
            if not set(getattr(self, name)) <= set(defaults[name].default):
                found.append(name)
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Filesystem:
        if any(path.startswith("@") for path in self.hide):
            raise ValueError("hide takes paths, not @names")
        both = sorted(set(self.read) & set(self.write))
        if both:
            raise ValueError(f"{', '.join(both)} can't be in both read and write")
        return self


class Landlock(_Section):
    """The kernel's second look at each access to a file, port or signal."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "enabled": (False,),
        "required": (False,),
    }

    enabled: bool = True
    min_abi: Annotated[
        int,
        Field(
            ge=1,
            le=99,
            description="Least ABI to run with; what a better one has is used.",
        ),
    ] = 1
    required: Required = True


class Network(_Section):
    """What a jail, or a worker that is its own boundary, can reach."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "mode": ("ray",),
        "required": (False,),
    }

    mode: Annotated[
        Literal["none", "ray"],
        Field(
            description="none: no interface, no IP sockets. ray: TCP to the ports "
            'of this Ray cluster, for boundary = "worker" alone.'
        ),
    ] = "none"
    required: Required = True


class Syscalls(_Section):
    """The system-call filter: an allow-list of groups."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "action": ("log",),
        "required": (False,),
    }

    groups: Annotated[
        tuple[str, ...],
        Unique,
        Field(description="Groups of allowed calls; syscalls.toml has their reasons."),
    ] = (
        "base",
        "files",
        "memory",
        "processes",
        "signals",
        "threads",
        "time",
        "events",
        "socket_pairs",
        "terminal",
        "ipc",
        "identity",
        "scheduling",
        "confinement",
    )
    allow: Annotated[
        dict[SyscallName, Reason],
        Field(description="Further calls, each with its reason."),
    ] = {}
    deny: Annotated[
        dict[SyscallName, Reason],
        Field(description="Calls taken out of the groups, each with its reason."),
    ] = {}
    action: Annotated[
        Literal["errno", "kill", "log"],
        Field(
            description="A denied call fails with EPERM, kills the task, or (to "
            "write a profile by) is logged and let through."
        ),
    ] = "errno"
    oci: Annotated[
        OciPolicy | None,
        BeforeValidator(_read_oci),
        WithJsonSchema({"type": "string"}),
        Field(description="OCI seccomp JSON to use instead of groups, allow, deny."),
    ] = None
    required: Required = True

    def deviations(self) -> list[str]:
        return [*super().deviations(), *(["oci"] if self.oci else [])]

    @model_validator(mode="after")
    def _consistent(self) -> Syscalls:
        both = sorted(self.allow.keys() & self.deny.keys())
        if both:
            raise ValueError(f"{', '.join(both)} can't be in both allow and deny")
        if self.oci is not None and (self.allow or self.deny):
            raise ValueError("oci replaces allow and deny: write them in its file")
        return self

    @property
    def digest(self) -> str:
        """Short hash of what decides the compiled filter."""
        return _digest(
            {
                "groups": sorted(self.groups),
                "allow": sorted(self.allow),
                "deny": sorted(self.deny),
                "action": self.action,
                "oci": self.oci.text if self.oci else None,
            }
        )


class Limits(_Section):
    """Resources that one task may use, all of its processes together."""

    cpu_cores: Annotated[
        Cores, Field(alias="cpu", description="CPU seconds per second.")
    ] = 1.0
    cpu_weight: Annotated[
        int | None,
        Field(ge=1, le=10000, description="Share under contention; 100 is the host's."),
    ] = None
    memory_bytes: Annotated[
        Size,
        _at_least(64 << 20, "64MiB"),
        Field(alias="memory", description="Hard ceiling, scratch included."),
    ] = 1 << 30
    swap_bytes: Annotated[
        Size, Field(alias="swap", description="Swap on top of memory.")
    ] = 0
    pids: Annotated[
        int, Field(ge=8, le=1 << 22, description="Processes and threads at once.")
    ] = 64
    open_files: Annotated[
        int, Field(ge=32, le=1 << 20, description="Descriptors of each process.")
    ] = 1024
    file_size_bytes: Annotated[
        OptionalSize, Field(alias="file_size", description="Largest single file.")
    ] = 256 << 20
    wall_time_s: Annotated[
        OptionalDuration, Field(alias="wall_time", description="From start to SIGKILL.")
    ] = 600.0
    cpu_time_s: Annotated[
        OptionalDuration,
        Field(alias="cpu_time", description="CPU seconds of all processes together."),
    ] = 600.0
    io_read_bytes_per_s: Annotated[
        OptionalRate, Field(alias="io_read", description="For each disk of the host.")
    ] = None
    io_write_bytes_per_s: Annotated[
        OptionalRate, Field(alias="io_write", description="For each disk of the host.")
    ] = None
    output_bytes: Annotated[
        Annotated[Size, _at_least(4096, "4KiB")] | None,
        BeforeValidator(_or_unlimited),
        WithJsonSchema(
            {"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, _UNLIMITED]}
        ),
        Field(
            alias="output",
            description="stdout and stderr together; unlimited with "
            'boundary = "worker" alone.',
        ),
    ] = 16 << 20
    required: Required = True

    @model_validator(mode="after")
    def _above_zero(self) -> Limits:
        for name in ("wall_time", "cpu_time"):
            value = getattr(self, f"{name}_s")
            if value is not None and value < 0.1:
                raise ValueError(f"{name} must be at least 100ms")
        return self


class ObjectStore(_Section):
    """How much a task and a job may take from and put into Ray's object store."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    max_argument_bytes: Annotated[
        Size, Field(alias="max_argument", description="Largest single argument.")
    ] = 1 << 30
    max_result_bytes: Annotated[
        Size, Field(alias="max_result", description="Largest single result.")
    ] = 256 << 20
    max_put_bytes: Annotated[
        Size, Field(alias="max_put", description="All puts and results together.")
    ] = 512 << 20
    max_put_objects: Annotated[
        OptionalCount, Field(description="How many puts and results.")
    ] = 10_000
    max_arguments_bytes: Annotated[
        OptionalSize,
        Field(alias="max_arguments", description="All arguments together."),
    ] = 2 << 30
    max_argument_objects: Annotated[
        OptionalCount, Field(description="How many arguments.")
    ] = 10_000
    max_job_bytes: Annotated[
        OptionalSize,
        Field(
            alias="max_job",
            description="All puts and results of a job that a node has, spilled too.",
        ),
    ] = 4 << 30
    max_job_objects: Annotated[
        OptionalCount, Field(description="How many of those.")
    ] = 100_000
    max_job_arguments_bytes: Annotated[
        OptionalSize,
        Field(
            alias="max_job_arguments",
            description="Arguments of all tasks of a job that run on a node.",
        ),
    ] = 16 << 30
    max_job_argument_objects: Annotated[
        OptionalCount, Field(description="How many of those.")
    ] = 100_000


class Results(_Section):
    """How a result reaches the driver."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {"mode": ("pickle",)}

    mode: Annotated[
        Literal["pickle", "data"],
        Field(
            description="data: values of plain types, never pickled by the task. "
            "pickle: any object; whoever reads it runs what the task put in."
        ),
    ] = "data"


class Environment(_Section):
    """Variables of the worker that the task sees."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    pass_: Annotated[
        tuple[PassedVariable, ...],
        Unique,
        Field(alias="pass", description="Names; * and ? match as in a shell."),
    ] = ("LANG", "LC_*", "TZ")
    set: Annotated[
        dict[VariableName, str],
        Field(description="Variables with fixed values."),
    ] = {}

    def deviations(self) -> list[str]:
        allowed = type(self).model_fields["pass_"].default
        passes = all(
            any(fnmatchcase(name, pattern) for pattern in allowed)
            for name in self.pass_
        )
        return [] if passes else ["pass"]

    @model_validator(mode="after")
    def _no_nul(self) -> Environment:
        for name, value in self.set.items():
            if "\0" in value:
                raise ValueError(f"the value of {name} contains a NUL byte")
        return self


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


class RayApi(_Section):
    """Use of Ray from inside a jail; reserved."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    enabled: Annotated[
        Literal[False],
        BeforeValidator(_boolean),  # 0 == False
        Field(description="Reserved: a jail has no Ray API yet."),
    ] = False


class Profile(_Section):
    """Everything that decides what a task may do; see `raysandbox.profile`."""

    weak: ClassVar[Mapping[str, tuple[object, ...]]] = {"boundary": ("job", "worker")}

    name: Annotated[
        str,
        _Matching(_NAME, "must be of a-z, 0-9, _ and -, and start with a letter"),
        Field(description="Same as the file's name without .toml; may be left out."),
    ]
    description: Annotated[str, Field(description="One line for `profiles list`.")] = ""
    boundary: Annotated[
        Literal["task", "job", "worker"],
        Field(
            description="task: a fresh jail for each task. job: one jail serves "
            "consecutive tasks of one job. worker: the worker process itself."
        ),
    ] = "task"
    preload: Annotated[
        tuple[
            Annotated[str, _Matching(_MODULE, "must be a module's dotted name")], ...
        ],
        Unique,
        Field(description="Modules that every jail finds imported already."),
    ] = ()
    namespaces: Namespaces = Field(default_factory=Namespaces)
    filesystem: Filesystem = Field(default_factory=Filesystem)
    landlock: Landlock = Field(default_factory=Landlock)
    network: Network = Field(default_factory=Network)
    syscalls: Syscalls = Field(default_factory=Syscalls)
    limits: Limits = Field(default_factory=Limits)
    object_store: ObjectStore = Field(default_factory=ObjectStore)
    results: Results = Field(default_factory=Results)
    environment: Environment = Field(default_factory=Environment)
    ray_api: RayApi = Field(default_factory=RayApi)
    devices: Annotated[
        tuple[Literal["null", "zero", "full", "random", "urandom", "tty"], ...],
        Unique,
        Field(description="Devices of /dev that are there."),
    ] = ("null", "zero", "full", "random", "urandom")

    _source: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """The file it was loaded from, or ``""``."""
        return self._source

    def deviations(self) -> list[str]:
        found = super().deviations()
        if "tty" in self.devices:
            found.append("devices")
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.filesystem.scratch_bytes > self.limits.memory_bytes:
            raise ValueError(
                "filesystem.scratch must not exceed limits.memory, which it counts in"
            )
        inside = self.boundary == "worker"
        # What only one kind of boundary can keep is an error with the other: a
        # key that is silently ignored would be a promise that nobody keeps.
        wrong = [f"{key} = {shown}" for key, shown in self._out_of_place(inside)]
        if wrong and inside:
            raise ValueError(
                "boundary = \"worker\" runs the task in Ray's own process and can't "
                f"keep {', '.join(wrong)}: give "
                'network.mode = "ray", results.mode = "pickle", and "unlimited" for '
                "limits.wall_time, limits.cpu_time and limits.output"
            )
        if wrong:
            raise ValueError(f'{", ".join(wrong)}: only with boundary = "worker"')
        return self

    def _out_of_place(self, inside: bool) -> list[tuple[str, str]]:
        limits = self.limits
        if not inside:
            found = [("network.mode", '"ray"')] if self.network.mode == "ray" else []
            if limits.output_bytes is None:
                found.append(("limits.output", '"unlimited"'))
            return found
        return [
            (key, f'"{value}"')
            for key, value, fits in (
                ("network.mode", self.network.mode, self.network.mode == "ray"),
                ("results.mode", self.results.mode, self.results.mode == "pickle"),
                ("limits.wall_time", limits.wall_time_s, limits.wall_time_s is None),
                ("limits.cpu_time", limits.cpu_time_s, limits.cpu_time_s is None),
                ("limits.output", limits.output_bytes, limits.output_bytes is None),
            )
            if not fits
        ]

    @property
    def digest(self) -> str:
        """Short hash of everything that has an effect, for records and caches."""
        return _digest(_effective(self))


def _effective(section: BaseModel) -> dict[str, Any]:
    """The model without its texts for readers."""
    plain: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in ("why", "description"):
            continue
        if isinstance(value, BaseModel):
            value = _effective(value)
        elif isinstance(value, OciPolicy):
            value = value.text
        elif isinstance(value, Mapping):
            keys_only = isinstance(section, Syscalls)
            value = sorted(value) if keys_only else dict(value)
        elif isinstance(value, tuple):
            value = list(value) if name == "preload" else sorted(value)
        plain[name] = value
    return plain


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a profile file, for editors.

    What it refuses, the loader refuses. The loader also knows rules that it does
    not say: which values weaken a default and need a ``why``, least sizes, what
    contradicts itself, which groups and system calls there are.
    """
    schema = Profile.model_json_schema(by_alias=True, mode="validation")
    sections: list[type[BaseModel]] = [Profile, *_sections()]
    for section in sections:
        table = schema if section is Profile else schema["$defs"][section.__name__]
        for name, field in section.model_fields.items():
            _as_written(table["properties"][field.alias or name], name)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "raysandbox profile"
    del schema["required"]
    schema["properties"] = {
        "extends": {
            "type": "string",
            "pattern": f"^(?:{_NAME.pattern})$",
            "description": "Profile to start from: tables merge, lists replace.",
        },
        **schema["properties"],
    }
    return schema


def _sections() -> list[type[BaseModel]]:
    annotations = (field.annotation for field in Profile.model_fields.values())
    return [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]


def _as_written(key: dict[str, Any], name: str) -> None:
    """Turn the schema of a model's field into that of what a file holds."""
    if key.get("default", ...) is None:
        del key["default"]
    if "default" in key:
        key["default"] = tomllib.loads(f"x = {written(name, key['default'])}")["x"]
    if "patternProperties" in key:
        key["additionalProperties"] = False
    if "anyOf" in key:  # TOML has no null
        key["anyOf"] = [each for each in key["anyOf"] if each != {"type": "null"}]
