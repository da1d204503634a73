"""seccomp: a profile's system-call policy as a BPF program, and as words.

libseccomp (through pyseccomp) compiles the rules on arguments and the default; in
front of that stand instructions of our own. Some say what its rules can't: a
foreign ABI ends the process, and a number newer than libseccomp's table is
answered ENOSYS, as by an older kernel, so that libc falls back. The others answer
calls that no argument decides (`seccomp_tree`). See seccomp(2); struct sock_filter
and its codes: linux/filter.h.
"""

from __future__ import annotations

import errno
import functools
import itertools
import platform
import struct
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from raysandbox.errors import ProfileError, UnsupportedError
from raysandbox.kernel import oci, seccomp_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from raysandbox.profile import OciPolicy, Syscalls

__all__ = [
    "Filter",
    "compile_policy",
    "compile_worker",
    "describe",
    "name",
    "oci_calls",
    "problems",
    "rule_for",
]

# pyseccomp's architecture, the kernel's AUDIT_ARCH_*, and the bit that marks a
# second ABI under the same AUDIT_ARCH (x32), 0 where there is none.
_ARCHITECTURES = {
    "x86_64": ("X86_64", 0xC000003E, 0x40000000),
    "aarch64": ("AARCH64", 0xC00000B7, 0),
}
# The last number that libseccomp 2.5.4 names (futex_waitv's successor).
_LAST_KNOWN = "set_mempolicy_home_node"

_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_LD_ABS, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data

_INT = 0xFFFFFFFF
# With any argument, these make connections that Landlock's port rules don't see.
_AROUND_PORTS = {"socket", "sendto", "sendmsg", "sendmmsg"}


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled policy.

    Attributes:
        bpf: Array of ``struct sock_filter``.
    """

    bpf: bytes


@dataclass(frozen=True, slots=True)
class _Condition:
    """One argument that must have one of ``values`` under ``mask``.

    ``also`` are others that must hold at the same time.
    """

    call: str
    arg: int
    mask: int
    values: Mapping[str, int]
    also: tuple[_Condition, ...] = ()


# --- the table ------------------------------------------------------------------


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("syscalls.toml").read_text()
    return tomllib.loads(text)


def _calls(group: str) -> list[str]:
    return list(_table()["groups"][group].get("calls", ()))


def _conditions(group: str) -> list[_Condition]:
    return [_condition(entry) for entry in _table()["groups"][group].get("when", ())]


def _condition(entry: Mapping[str, Any]) -> _Condition:
    if "without" in entry:
        mask, values = entry["without"], {"none": 0}
    else:
        mask, values = entry.get("mask", _INT), entry["values"]
    others = ({**other, "call": entry["call"]} for other in entry.get("and", ()))
    also = tuple(_condition(other) for other in others)
    return _Condition(entry["call"], entry["arg"], mask, values, also)


def _rules(condition: _Condition) -> Iterable[tuple[tuple[int, int, int], ...]]:
    """Every combination of values that is allowed: argument, mask, value."""
    choices = [
        [(each.arg, each.mask, value) for value in each.values.values()]
        for each in (condition, *condition.also)
    ]
    return itertools.product(*choices)


def problems(syscalls: Syscalls) -> list[tuple[str, object, str]]:
    """Return what of a policy only this table can tell to be wrong.

    Returns:
        Key of the section, value, and rule, for each problem.
    """
    found: list[tuple[str, object, str]] = []
    known = {k: v for k, v in _table()["groups"].items() if "internal" not in v}
    for group in syscalls.groups:
        if group not in known:
            found.append(
                ("groups", group, f"unknown group; there are {', '.join(known)}")
            )
    for key in ("allow", "deny"):
        for call in getattr(syscalls, key):
            if _number(call) is None and call not in _table()["denied"]:
                found.append((key, call, "no system call of that name"))
    for call in syscalls.allow:
        if call in _table()["absent"]:
            found.append(("allow", call, _table()["absent"][call]))
    if syscalls.oci is not None:
        try:
            oci.read(syscalls.oci.text)
        except ValueError as error:
            found.append(("oci", syscalls.oci.path, str(error)))
    return found


# --- numbers --------------------------------------------------------------------


def _machine() -> tuple[str, int, int]:
    try:
        return _ARCHITECTURES[platform.machine()]
    except KeyError:
        raise UnsupportedError(
            feature="seccomp",
            need=f"one of {', '.join(_ARCHITECTURES)}",
            have=platform.machine(),
            remedy="run on a supported architecture",
        ) from None


@functools.cache
def _pyseccomp() -> Any:
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(
            feature="seccomp",
            need="libseccomp and pyseccomp",
            have=str(error),
            remedy="install the package libseccomp2",
        ) from error
    return pyseccomp


@functools.cache
def _number(call: str) -> int | None:
    """Return a call's number here, None if this architecture has none."""
    library = _pyseccomp()
    arch = getattr(library.Arch, _machine()[0])
    number = int(library.resolve_syscall(arch, call))
    return number if number >= 0 else None


@functools.cache
def name(number: int) -> str:
    """Return the name of a system call of this machine, or its number as text."""
    library = _pyseccomp()
    arch = getattr(library.Arch, _machine()[0])
    try:
        return bytes(library.resolve_syscall(arch, number)).decode()
    except (ValueError, TypeError, OSError):
        return f"syscall {number}"


# --- compiling ------------------------------------------------------------------


def compile_policy(syscalls: Syscalls, *, notify: bool) -> Filter:
    """Compile a policy; the result is kept for the life of this process.

    Args:
        syscalls: The profile's section.
        notify: Denied calls go to a supervisor, which answers them.

    Raises:
        UnsupportedError: No libseccomp, or an architecture without a table.
        ProfileError: The OCI file can't be used.
    """
    key = (syscalls.digest, notify)
    if key not in _compiled:
        _compiled[key] = Filter(_preamble() + _compile(syscalls, notify))
    return _compiled[key]


_compiled: dict[tuple[str, bool], Filter] = {}


def _preamble() -> bytes:
    """Instructions before libseccomp's, for every policy."""
    _, audit, second_abi = _machine()
    last = _number(_LAST_KNOWN)
    program: list[tuple[int, int, int, int]] = [
        (_LD_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, audit),
        (_RET, 0, 0, _RET_KILL_PROCESS),
        (_LD_ABS, 0, 0, _NR),
    ]
    if second_abi:
        program += [(_JGE, 0, 1, second_abi), (_RET, 0, 0, _RET_KILL_PROCESS)]
    if last is not None:
        program += [(_JGE, 0, 1, last + 1), (_RET, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def _compile(syscalls: Syscalls, notify: bool) -> bytes:
    library = _pyseccomp()
    denied = {
        "errno": library.ERRNO(errno.EPERM),
        "kill": library.KILL_PROCESS,
        "log": library.LOG,
    }[syscalls.action]
    if notify and syscalls.action != "log":
        denied = library.NOTIFY
    if syscalls.oci is not None:
        return _compile_oci(library, syscalls.oci.path, syscalls.oci.text, denied)
    rules = _Rules(library)
    absent = set(_table()["absent"])
    for call in absent:
        rules.add(library.ERRNO(errno.ENOSYS), call)
    _allow(library, rules, syscalls.groups, syscalls.allow, {*syscalls.deny, *absent})
    return rules.export(denied)


def compile_worker(groups: Iterable[str], allow: Iterable[str]) -> Filter:
    """Compile the filter of a Ray worker: that of its jails comes on top.

    Args:
        groups: Every group of every profile that the worker may have to serve,
            and the internal ones.
        allow: Further calls; of those that get around rules on ports no more
            than the groups have.

    Raises:
        UnsupportedError: No libseccomp, or an architecture without a table.
    """
    library = _pyseccomp()
    rules = _Rules(library)
    allow = set(allow) - _AROUND_PORTS
    _allow(library, rules, [*dict.fromkeys(groups)], allow, set())
    return Filter(_preamble() + rules.export(library.ERRNO(errno.EPERM)))


def _allow(
    library: Any,
    rules: _Rules,
    groups: Sequence[str],
    allow: Iterable[str],
    left_out: set[str],
) -> None:
    whole = set(allow)
    for group in groups:
        whole.update(_calls(group))
    for call in sorted(whole - left_out):
        rules.add(library.ALLOW, call)
    seen = set()
    for group in groups:
        for condition in _conditions(group):
            if condition.call in left_out or condition.call in whole:
                continue
            for rule in _rules(condition):
                if (condition.call, rule) in seen:
                    continue
                seen.add((condition.call, rule))
                arguments = [
                    library.Arg(arg, library.MASKED_EQ, mask, value)
                    for arg, mask, value in rule
                ]
                rules.add(library.ALLOW, condition.call, *arguments)


class _Rules:
    """What a policy says of each call, before it is compiled."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._rules: dict[int, list[tuple[int, tuple[Any, ...]]]] = {}

    def add(self, action: int, call: str, *arguments: Any) -> None:
        """Add a rule; a call that this architecture lacks needs none."""
        number = _number(call)
        if number is not None:
            self._rules.setdefault(number, []).append((action, arguments))

    def export(self, default: int) -> bytes:
        """Compile; libseccomp's actions are the kernel's ``SECCOMP_RET_*``."""
        made = self._library.SyscallFilter(default)
        # A tree instead of a list: less to do for calls at the end.
        made.set_attr(self._library.Attr.CTL_OPTIMIZE, 2)
        answers = {}
        for number, rules in self._rules.items():
            if len(rules) == 1 and not rules[0][1]:
                answers[number] = rules[0][0]
                continue
            for action, arguments in rules:
                made.add_rule_exactly(action, number, *arguments)
        with tempfile.TemporaryFile() as file:
            made.export_bpf(file)
            file.seek(0)
            return seccomp_tree.dispatch(answers) + file.read()


# --- OCI ------------------------------------------------------------------------


def _compile_oci(library: Any, path: str, text: str, denied: int) -> bytes:
    try:
        read = oci.read(text)
    except ValueError as error:
        raise ProfileError(
            source=path, where="syscalls", reason=f"can't be compiled: {error}"
        ) from error
    rules = _Rules(library)
    for rule in read:
        action = library.ALLOW if rule.errno is None else library.ERRNO(rule.errno)
        # EPERM is what a call that is not named gets, as the profile has it.
        if rule.errno == errno.EPERM:
            continue
        arguments = [
            library.Arg(each.index, getattr(library, each.op), each.value, each.second)
            for each in rule.conditions
        ]
        rules.add(action, rule.call, *arguments)
    return rules.export(denied)


def oci_calls(policy: OciPolicy) -> list[str]:
    """Return every call that an OCI policy allows in some form.

    Raises:
        ProfileError: It can't be used.
    """
    try:
        rules = oci.read(policy.text)
    except ValueError as error:
        raise ProfileError(
            source=policy.path, where="syscalls", reason=str(error)
        ) from error
    allowed = dict.fromkeys(rule.call for rule in rules if rule.errno is None)
    return [call for call in allowed if _number(call) is not None]


# --- words ----------------------------------------------------------------------

_FAMILIES = {
    0: "AF_UNSPEC", 1: "AF_UNIX", 2: "AF_INET", 10: "AF_INET6", 16: "AF_NETLINK",
    17: "AF_PACKET", 38: "AF_ALG", 40: "AF_VSOCK", 44: "AF_XDP",
}  # fmt: skip
_TYPES = {1: "SOCK_STREAM", 2: "SOCK_DGRAM", 3: "SOCK_RAW", 5: "SOCK_SEQPACKET"}
_NEW = {
    0x00000080: "CLONE_NEWTIME",
    0x00020000: "CLONE_NEWNS",
    0x02000000: "CLONE_NEWCGROUP",
    0x04000000: "CLONE_NEWUTS",
    0x08000000: "CLONE_NEWIPC",
    0x10000000: "CLONE_NEWUSER",
    0x20000000: "CLONE_NEWPID",
    0x40000000: "CLONE_NEWNET",
}
_REQUESTS = {0x5412: "TIOCSTI", 0x541C: "TIOCLINUX", 0x540E: "TIOCSCTTY"}
_NAMESPACE_CALLS = ("unshare", "setns", "clone")


def describe(number: int, args: Sequence[int]) -> str:
    """Return a call as words: ``socket(AF_INET, SOCK_STREAM, 0)``.

    Arguments that point somewhere are left out: what they point to can change
    under the reader's eyes.
    """
    call = name(number)
    first, second, third = (args[i] & _INT for i in range(3))
    if call in ("socket", "socketpair"):
        family = _FAMILIES.get(first, str(first))
        return f"{call}({family}, {_TYPES.get(second & 0xF, second & 0xF)}, {third})"
    if call in _NAMESPACE_CALLS:
        flags = args[1] if call == "setns" else args[0]
        named = [word for bit, word in _NEW.items() if flags & bit]
        return f"{call}({'|'.join(named) or hex(flags & _INT)})"
    if call == "ioctl":
        return f"ioctl({first}, {_REQUESTS.get(second, hex(second))})"
    if call in ("prctl", "personality", "ptrace", "bpf", "keyctl", "kill"):
        return f"{call}({first})"
    return f"{call}()"


def rule_for(number: int, args: Sequence[int], syscalls: Syscalls) -> str:
    """Return which rule of the profile denies a call."""
    call = name(number)
    if call in syscalls.deny:
        return f"syscalls.deny: {syscalls.deny[call]}"
    if syscalls.oci is not None:
        return f"syscalls.oci = {syscalls.oci.path}"
    if call in ("socket", "socketpair"):
        return 'network.mode = "none"'
    for group, entry in _table()["groups"].items():
        if group not in syscalls.groups and call in _names(entry):
            return f"group {group!r} is not in syscalls.groups"
    reason = _table()["denied"].get(call)
    return f"syscalls: {reason}" if reason else "syscalls: in no allowed group"


def _names(entry: Mapping[str, Any]) -> Iterable[str]:
    return [*entry.get("calls", ()), *(each["call"] for each in entry.get("when", ()))]
