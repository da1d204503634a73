"""The system-call filter: the shipped policies' own bytes, call by call."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox import profile as profiles
from raysandbox.errors import ProfileError
from raysandbox.kernel import oci, seccomp, seccomp_tree
from raysandbox.profile.schema import OciPolicy, Syscalls
from tests.require import require
from tests.unit import bpf

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the interpreter's numbers are x86-64's"
)

SHIPPED = ("strict", "standard", "fast")
TABLE = seccomp._table()
GROUPS: Mapping[str, Any] = TABLE["groups"]
ENOSYS = bpf.ERRNO | errno.ENOSYS
EPERM = bpf.ERRNO | errno.EPERM

# What gives a way out, or a way into a part of the kernel that has been one.
NEVER_TEXT = """
    mount umount2 pivot_root chroot move_mount open_tree fsopen fsmount fsconfig fspick
    mount_setattr unshare setns ptrace process_vm_readv process_vm_writev pidfd_getfd
    kcmp bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    keyctl add_key request_key open_by_handle_at name_to_handle_at init_module
    finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct
    quotactl settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname
    iopl ioperm modify_ldt syslog nfsservctl lookup_dcookie fanotify_init vhangup
    personality
"""
NEVER = sorted(set(NEVER_TEXT.split()))


def number(call: str) -> int:
    """Return a call's number on x86-64."""
    found = seccomp._number(call)
    assert found is not None, call
    return found


def allowed_calls(policy: Syscalls) -> set[str]:
    """Return the calls that a policy allows whatever their arguments."""
    names = set(policy.allow)
    for group in policy.groups:
        names.update(GROUPS[group].get("calls", ()))
    return names - set(policy.deny) - set(TABLE["absent"])


def conditions(policy: Syscalls) -> Iterator[Mapping[str, Any]]:
    """Return what a policy allows depending on an argument."""
    whole = allowed_calls(policy)
    for group in policy.groups:
        for entry in GROUPS[group].get("when", ()):
            if entry["call"] not in whole and entry["call"] not in policy.deny:
                yield entry


@pytest.fixture(params=SHIPPED)
def policy(request: pytest.FixtureRequest) -> Syscalls:
    """The section of each shipped profile."""
    return profiles.load_file(profiles.shipped_dir() / f"{request.param}.toml").syscalls


# --- the table -----------------------------------------------------------------


def test_every_group_condition_and_denial_has_its_reason() -> None:
    """Nothing is allowed, or named as denied, without a sentence that says why."""
    for name, group in GROUPS.items():
        assert len(group["why"].split()) > 2, name
        for entry in group.get("when", ()):
            assert len(entry["why"].split()) > 3, (name, entry["call"])
    for reasons in (TABLE["denied"], TABLE["absent"]):
        for call, why in reasons.items():
            assert why.strip(), call


def test_every_name_is_a_system_call_somewhere() -> None:
    """A typing mistake would allow nothing and be noticed by nobody."""
    library = seccomp._pyseccomp()
    for name, group in GROUPS.items():
        for call in seccomp._names(group):
            machines = (library.Arch.X86_64, library.Arch.AARCH64)
            found = [library.resolve_syscall(each, call) for each in machines]
            assert any(each >= 0 for each in found), (name, call)


# What a socket is good for; which sockets there are, each group says.
SHARED = {"connect", "accept", "accept4"}


def test_no_call_is_in_two_groups() -> None:
    """To leave a group out must take its calls away."""
    seen: dict[str, str] = {}
    for name, group in GROUPS.items():
        if group.get("internal"):
            continue  # no profile can have them
        for call in group.get("calls", ()):
            if call in SHARED and seen.get(call) == "local_sockets" and name == "tcp":
                continue
            assert call not in seen, f"{call} is in {seen[call]} and {name}"
            seen[call] = name
    for name, group in GROUPS.items():
        for entry in group.get("when", ()):
            assert seen.get(entry["call"], name) == name, entry["call"]


def test_default_groups_are_in_the_table_and_in_strict() -> None:
    """The schema's default names groups that exist."""
    assert set(Syscalls().groups) <= set(GROUPS)
    assert seccomp.problems(Syscalls()) == []


# --- answers that hang on the number alone -------------------------------------


@given(
    st.dictionaries(st.integers(0, 900), st.sampled_from([bpf.ALLOW, ENOSYS]))
    | st.sets(st.integers(0, 900), min_size=400).map(lambda s: dict.fromkeys(s, EPERM))
)
@settings(max_examples=60, deadline=None)
def test_search_answers_each_number_as_asked(answers: dict[int, int]) -> None:
    """Every number gets its own answer, and one without runs into what follows.

    The larger sets need jumps that are longer than one comparison reaches.
    """
    load = struct.pack("<HBBI", 0x20, 0, 0, 0)
    follows = struct.pack("<HBBI", 0x06, 0, 0, bpf.LOG)
    program = load + seccomp_tree.dispatch(answers) + follows
    for each in (*range(902), 1 << 30, (1 << 32) - 1):
        assert bpf.run(program, each) == answers.get(each, bpf.LOG), each


# --- the shipped policies ------------------------------------------------------


def test_every_number_is_answered_as_the_table_says(policy: Syscalls) -> None:
    """All 512 numbers, without arguments: allowed, absent, newer, or denied."""
    program = seccomp.compile_policy(policy, notify=False).bpf
    plain = {number(c) for c in allowed_calls(policy) if seccomp._number(c) is not None}
    absent = {seccomp._number(call) for call in TABLE["absent"]}
    depends = {seccomp._number(entry["call"]) for entry in conditions(policy)}
    newest = number(seccomp._LAST_KNOWN)
    for each in range(512):
        answer = bpf.run(program, each)
        if each > newest or each in absent:
            assert answer == ENOSYS, each
        elif each in plain:
            assert answer == bpf.ALLOW, seccomp.name(each)
        elif each not in depends:
            assert answer == EPERM, seccomp.name(each)


def test_conditions_hold_for_the_argument_the_kernel_reads(policy: Syscalls) -> None:
    """Each listed value passes, each neighbour is denied, upper bits change nothing.

    Guards against comparing 64 bits where the kernel reads 32: a task would get a
    denied request through by setting a bit that nobody looks at.
    """
    program = seccomp.compile_policy(policy, notify=False).bpf
    for entry in conditions(policy):
        call, position = number(entry["call"]), entry["arg"]
        others = {o["arg"]: min(o["values"].values()) for o in entry.get("and", ())}

        def answer(
            value: int,
            call: int = call,
            others: dict[int, int] = others,
            position: int = position,
        ) -> int:
            args = [others.get(index, 0) for index in range(6)]
            args[position] = value
            return bpf.run(program, call, args)

        if "without" in entry:
            forbidden = entry["without"]
            assert answer(~forbidden & 0xFFFFFFFF) == bpf.ALLOW
            for bit in range(32):
                expected = EPERM if forbidden >> bit & 1 else bpf.ALLOW
                assert answer(1 << bit) == expected
                assert answer(1 << bit | 1 << 40) == expected
            continue
        mask = entry.get("mask", 0xFFFFFFFF)
        values = set(entry["values"].values())
        for value in values:
            assert answer(value) == bpf.ALLOW, (entry["call"], value)
            assert answer(value | 1 << 32) == bpf.ALLOW, (entry["call"], value)
            for bit in range(32):
                other = value ^ 1 << bit
                if other & mask not in values:
                    assert answer(other) == EPERM, (entry["call"], other)
                    assert answer(other | 1 << 63) == EPERM, (entry["call"], other)


@pytest.mark.parametrize("call", NEVER)
def test_what_must_never_pass_is_denied(call: str, policy: Syscalls) -> None:
    """In every shipped profile, for every value of every argument that we try."""
    if seccomp._number(call) is None:
        pytest.skip("this libseccomp has no number for it")
    program = seccomp.compile_policy(policy, notify=False).bpf
    for args in ((), (1,), (0xFFFFFFFF,) * 6, ((1 << 64) - 1,) * 6):
        answer = bpf.run(program, number(call), args)
        assert answer in (EPERM, ENOSYS)


def test_namespaces_can_not_be_cloned(policy: Syscalls) -> None:
    """Neither by clone's flags nor by clone3, whose flags no filter can see."""
    program = seccomp.compile_policy(policy, notify=False).bpf
    thread = 0x003D0F00  # what pthread_create passes
    assert bpf.run(program, number("clone"), [thread]) == bpf.ALLOW
    for flag in seccomp._NEW:
        assert bpf.run(program, number("clone"), [thread | flag]) == EPERM
    assert bpf.run(program, number("clone3")) == ENOSYS


def test_only_unix_sockets_exist(policy: Syscalls) -> None:
    """No family of the network, of the kernel's crypto, of virtual machines."""
    program = seccomp.compile_policy(policy, notify=False).bpf
    flags = 0o2000000 | 0o4000  # close-on-exec, non-blocking
    for kind in range(16):
        expected = kind in (1, 5)
        answer = bpf.run(program, number("socketpair"), [1, kind | flags])
        assert answer == (bpf.ALLOW if expected else EPERM), kind
    for family in range(64):
        expected = "local_sockets" in policy.groups and family == 1
        answer = bpf.run(program, number("socket"), [family, 1, 0])
        assert answer == (bpf.ALLOW if expected else EPERM), family


@pytest.mark.parametrize("call", ["sendto", "sendmsg", "sendmmsg"])
def test_no_data_opens_a_connection(call: str) -> None:
    """TCP Fast Open connects where Landlock's port rules do not look, to any port."""
    fast_open, position = 0x20000000, 2 if call == "sendmsg" else 3
    trusted = profiles.load_file(profiles.shipped_dir() / "trusted.toml").syscalls
    groups = [*trusted.groups, "internet"]
    for program in (
        seccomp.compile_policy(trusted, notify=False).bpf,
        seccomp.compile_worker(groups, [call]).bpf,
    ):
        args = [0] * 6
        assert bpf.run(program, number(call), args) == bpf.ALLOW
        args[position] = fast_open | 0x4000
        assert bpf.run(program, number(call), args) == EPERM


def test_a_worker_has_tcp_and_udp_but_no_relative_of_theirs() -> None:
    """Multipath TCP passes Landlock's rules by; no profile's own calls add it."""
    program = seccomp.compile_worker(["base", "internet"], ["socket"]).bpf
    for family in (2, 10):
        for kind, protocol, expected in (
            (1, 0, bpf.ALLOW),
            (1, 6, bpf.ALLOW),
            (2, 0, bpf.ALLOW),
            (2, 17, bpf.ALLOW),
            (1, 262, EPERM),  # multipath TCP
            (1, 132, EPERM),  # SCTP
            (5, 132, EPERM),
            (3, 6, EPERM),
        ):
            args = [family, kind | 0o2000000, protocol]
            assert bpf.run(program, number("socket"), args) == expected, args
    assert bpf.run(program, number("socket"), [43, 1, 0]) == EPERM  # SMC


@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize("action", ["errno", "kill", "log"])
def test_foreign_abis_are_killed(action: str, notify: bool) -> None:
    """x32, ia32 and every other architecture, whatever the policy does otherwise."""
    policy = Syscalls(action=action, why="to see it")
    program = seccomp.compile_policy(policy, notify=notify).bpf
    for each in (0, 1, 59, 511, 520, 0x3FFFFFFF):
        assert bpf.run(program, each | 0x40000000) == bpf.KILL
        assert bpf.run(program, each, arch=bpf.I386) == bpf.KILL
        assert bpf.run(program, each, arch=bpf.AARCH64) == bpf.KILL
        assert bpf.run(program, each, arch=0) == bpf.KILL
    for each in (0x80000000, 0xFFFFFFFF):
        assert bpf.run(program, each) in (bpf.KILL, ENOSYS)


@pytest.mark.parametrize(
    ("action", "notify", "answer"),
    [
        ("errno", False, EPERM),
        ("kill", False, bpf.KILL),
        ("log", False, bpf.LOG),
        ("errno", True, bpf.NOTIFY),
        ("kill", True, bpf.NOTIFY),
        ("log", True, bpf.LOG),
    ],
)
def test_a_denied_call_meets_the_profiles_action(action, notify, answer) -> None:
    """A supervisor answers where there is one; ``log`` never asks it."""
    policy = Syscalls(action=action, why="to see it")
    program = seccomp.compile_policy(policy, notify=notify).bpf
    assert bpf.run(program, number("mount")) == answer
    assert bpf.run(program, number("clone3")) == ENOSYS
    assert bpf.run(program, number("read")) == bpf.ALLOW


def test_programs_are_short_enough(policy: Syscalls) -> None:
    """The kernel takes 4096 instructions, and each call walks a part of them."""
    for notify in (False, True):
        program = seccomp.compile_policy(policy, notify=notify).bpf
        assert len(program) % 8 == 0
        assert len(program) // 8 < 1200


@settings(max_examples=30, deadline=None)
@given(
    left=st.sets(st.sampled_from(sorted(GROUPS))),
    denied=st.sets(st.sampled_from(["read", "openat", "kill", "socketpair", "clone"])),
    allowed=st.sets(st.sampled_from(["ptrace", "mount", "socket", "ioctl"])),
)
def test_groups_allow_and_deny_compose(left, denied, allowed) -> None:
    """Any policy's bytes say what its keys say; a denial wins over its group."""
    policy = Syscalls(
        groups=tuple(group for group in GROUPS if group not in left),
        allow=dict.fromkeys(allowed, "x"),
        deny=dict.fromkeys(denied, "x"),
    )
    program = seccomp.compile_policy(policy, notify=False).bpf
    for call in denied:
        for args in ((), (1,), (16,)):
            assert bpf.run(program, number(call), args) == EPERM
    for call in allowed:
        assert bpf.run(program, number(call), [17, 0x5412]) == bpf.ALLOW
    for call in ("read", "openat", "execve", "futex", "shmget", "listen"):
        expected = bpf.ALLOW if call in allowed_calls(policy) else EPERM
        assert bpf.run(program, number(call)) == expected


def test_compiling_is_done_once() -> None:
    """Equal policies share their program; any difference makes another."""
    one = seccomp.compile_policy(Syscalls(), notify=False)
    assert seccomp.compile_policy(Syscalls(why="another text"), notify=False) is one
    assert seccomp.compile_policy(Syscalls(), notify=True) is not one
    other = Syscalls(deny={"ptrace": "it is denied anyway"})
    assert seccomp.compile_policy(other, notify=False) is not one


# --- the kernel ----------------------------------------------------------------


def install_and_call(program: bytes, call: int, args: Sequence[int]) -> int:
    """Return errno of a call under a filter in a fresh process; -N: signal N."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("<H6xQ", len(program) // 8, ctypes.addressof(buffer))
        libc.prctl(38, 1, 0, 0, 0)
        if libc.prctl(22, 2, fprog) != 0:
            os._exit(1)
        result = libc.syscall(ctypes.c_long(call), *map(ctypes.c_long, args))
        code = ctypes.get_errno() if result < 0 else 0
        os.write(write_end, struct.pack("<i", code))
        os._exit(0)
    os.close(write_end)
    answer = os.read(read_end, 4)
    os.close(read_end)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return struct.unpack("<i", answer)[0] if answer else status


@pytest.mark.parametrize(
    ("call", "args", "outcome"),
    [
        ("getpid", (), 0),
        ("socket", (2, 1, 0), errno.EPERM),
        ("socketpair", (2, 1, 0, 0), errno.EPERM),
        ("unshare", (0x10000000,), errno.EPERM),
        ("clone3", (0, 0), errno.ENOSYS),
        ("ioctl", (0, 0x5412, 0), errno.EPERM),
    ],
)
def test_the_kernel_agrees_with_the_interpreter(call, args, outcome, policy) -> None:
    """The bytes that we evaluate are bytes that the kernel takes and obeys."""
    require("seccomp")
    program = seccomp.compile_policy(policy, notify=False).bpf
    evaluated = bpf.run(program, number(call), args)
    assert evaluated == (bpf.ERRNO | outcome if outcome else bpf.ALLOW)
    assert install_and_call(program, number(call), args) == outcome


def test_the_kernel_kills_x32_calls() -> None:
    """With SIGSYS, before it looks whether it has that ABI."""
    require("seccomp")
    program = seccomp.compile_policy(Syscalls(), notify=False).bpf
    assert install_and_call(program, number("getpid"), ()) == 0
    assert install_and_call(program, number("getpid") | 0x40000000, ()) == -31


# --- words ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "args", "text"),
    [
        ("socket", [2, 1, 0], "socket(AF_INET, SOCK_STREAM, 0)"),
        ("socket", [99, 0x80002, 6], "socket(99, SOCK_DGRAM, 6)"),
        ("unshare", [0x10020000], "unshare(CLONE_NEWNS|CLONE_NEWUSER)"),
        ("setns", [3, 0x40000000], "setns(CLONE_NEWNET)"),
        ("ioctl", [0, 0x5412, 7], "ioctl(0, TIOCSTI)"),
        ("ioctl", [0, 0xABCD, 7], "ioctl(0, 0xabcd)"),
        ("prctl", [4], "prctl(4)"),
        ("mount", [0xDEAD, 0xBEEF], "mount()"),
    ],
)
def test_denied_calls_as_words(call, args, text) -> None:
    """Numbers have names; what points somewhere is left out."""
    assert seccomp.describe(number(call), [*args, 0, 0, 0][:6]) == text


def test_an_unknown_number_has_words_too() -> None:
    """A hint never fails."""
    assert seccomp.describe(100_000, [0] * 6) == "syscall 100000()"
    assert seccomp.rule_for(100_000, [0] * 6, Syscalls()) == (
        "syscalls: in no allowed group"
    )


def test_the_rule_that_denies_is_named() -> None:
    """The profile's own words where it has some, else the table's."""
    rule = seccomp.rule_for
    deny = Syscalls(deny={"kill": "no signals"})
    assert rule(number("kill"), [0] * 6, deny) == "syscalls.deny: no signals"
    assert rule(number("socket"), [2, 1, 0], Syscalls()) == 'network.mode = "none"'
    assert "'local_sockets' is not in" in rule(number("listen"), [0] * 6, Syscalls())
    assert rule(number("ptrace"), [0] * 6, Syscalls()).startswith("syscalls: ")


# --- OCI -----------------------------------------------------------------------

ALLOW_READ = {"names": ["read"], "action": "SCMP_ACT_ALLOW"}


def policy_of(*entries: Mapping[str, Any], **top: Any) -> dict[str, Any]:
    """Return an OCI policy that denies by default."""
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": list(entries), **top}


def compiled(policy: Mapping[str, Any], action: str = "errno") -> bytes:
    """Compile an OCI policy as a profile that names it does."""
    text = json.dumps(policy)
    section = Syscalls(oci=OciPolicy("x.json", text), action=action, why="test")
    assert seccomp.problems(section) == []
    return seccomp.compile_policy(section, notify=False).bpf


def test_an_oci_policy_is_compiled_as_it_says() -> None:
    """Names, arguments, an errno of its own, and everything else denied."""
    program = compiled(
        policy_of(
            ALLOW_READ,
            {"name": "write", "action": "SCMP_ACT_ALLOW", "args": None},
            {
                "names": ["socket"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
            },
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [
                    {
                        "index": 0,
                        "value": 0x7E020000,
                        "valueTwo": 0,
                        "op": "SCMP_CMP_MASKED_EQ",
                    }
                ],
            },
            architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
        )
    )
    assert bpf.run(program, number("read")) == bpf.ALLOW
    assert bpf.run(program, number("write")) == bpf.ALLOW
    assert bpf.run(program, number("socket"), [1]) == bpf.ALLOW
    assert bpf.run(program, number("socket"), [2]) == EPERM
    assert bpf.run(program, number("clone3")) == ENOSYS
    assert bpf.run(program, number("clone"), [0x11]) == bpf.ALLOW
    assert bpf.run(program, number("clone"), [0x10000000]) == EPERM
    assert bpf.run(program, number("openat")) == EPERM
    # Foreign ABIs stay out, whatever architectures the file lists.
    assert bpf.run(program, number("read") | 0x40000000) == bpf.KILL
    assert bpf.run(program, 3, arch=bpf.I386) == bpf.KILL


def test_a_denial_beside_an_allowance_keeps_its_condition() -> None:
    """As container engines deny one netlink protocol and allow the other sockets."""
    netlink = {"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}
    audit = {"index": 2, "value": 9, "op": "SCMP_CMP_EQ"}
    other = {"index": 2, "value": 9, "op": "SCMP_CMP_NE"}
    for extra in ({"errnoRet": 22}, {"errno": "EINVAL"}, {}):
        denial = {"names": ["socket"], "action": "SCMP_ACT_ERRNO", **extra}
        program = compiled(
            policy_of(
                {**denial, "args": [netlink, audit]},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [other]},
            )
        )
        expected = bpf.ERRNO | (22 if extra else 1)
        assert bpf.run(program, number("socket"), [16, 3, 9]) == expected
        assert bpf.run(program, number("socket"), [16, 3, 0]) == bpf.ALLOW


@pytest.mark.parametrize("action", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
def test_a_denial_that_an_allowance_covers_is_refused(action) -> None:
    """Otherwise the call would pass that the file says is denied."""
    allow = {"names": ["socket"], "action": "SCMP_ACT_ALLOW"}
    deny = {
        "names": ["socket"],
        "action": action,
        "args": [{"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}],
    }
    with pytest.raises(ValueError, match=r"syscalls\[1\] denies socket, which sys"):
        oci.read(json.dumps(policy_of(allow, deny)))
    with pytest.raises(ValueError, match="denies socket"):
        oci.read(json.dumps(policy_of(deny, allow)))


def test_entries_for_others_do_not_count() -> None:
    """Those for capabilities, other machines and later kernels; never the reverse."""

    def allows(**when: Any) -> bool:
        return bool(oci.read(json.dumps(policy_of({**ALLOW_READ, **when}))))

    assert allows()
    assert allows(includes={}, excludes={})
    assert not allows(includes={"caps": ["CAP_SYS_ADMIN"]})
    assert allows(excludes={"caps": ["CAP_SYS_ADMIN"]})
    assert allows(includes={"arches": ["amd64"]})
    assert not allows(includes={"arches": ["s390x"]})
    assert not allows(excludes={"arches": ["amd64"]})
    assert allows(includes={"minKernel": "4.8"})
    assert not allows(includes={"minKernel": "99.0"})
    assert not allows(excludes={"minKernel": "4.8"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "defaultAction must be"),
        ('{"defaultAction": "SCMP_ACT_ALLOW"}', "what is not named must be denied"),
        ('{"defaultAction": "SCMP_ACT_LOG"}', "what is not named must be denied"),
        ('{"defaultAction": "SCMP_ACT_TRACE"}', "what is not named must be denied"),
        (policy_of(listenerPath="/x"), "listenerPath"),
        (policy_of(flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]), "flags"),
        (policy_of({"action": "SCMP_ACT_ALLOW"}), "names no system call"),
        (policy_of({"names": "read", "action": "SCMP_ACT_ALLOW"}), r"\[0\].names"),
        (policy_of({"names": [1], "action": "SCMP_ACT_ALLOW"}), r"\[0\].names\[0\]"),
        (policy_of({"names": ["read"], "action": "SCMP_ACT_NOTIFY"}), "action"),
        (policy_of({"names": ["read"], "action": "SCMP_ACT_TRACE"}), "action"),
        (policy_of({"names": ["read"]}), "action"),
        (policy_of({**ALLOW_READ, "args": [1]}), r"args\[0\]"),
        (policy_of({**ALLOW_READ, "args": [{"index": 6, "value": 0}]}), "index"),
        (policy_of({**ALLOW_READ, "arg": []}), "arg"),
        (policy_of({**ALLOW_READ, "includes": 5}), "includes"),
        (policy_of({**ALLOW_READ, "includes": {"minKernel": "x"}}), "minKernel"),
        (policy_of({**ALLOW_READ, "includes": {"distro": ["x"]}}), "distro"),
        (
            policy_of({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0}),
            "errnoRet",
        ),
        (
            policy_of({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errno": "EX"}),
            "errno 'EX' is unknown",
        ),
    ],
)
def test_what_is_not_understood_is_refused(text, message) -> None:
    """Never passed over: what a reader of the file believes must hold.

    An ``errnoRet`` of 0 would tell the task that a call succeeded which was never
    made.
    """
    text = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(ValueError, match=message):
        oci.read(text)
    section = Syscalls(oci=OciPolicy("x.json", text), why="test")
    assert [problem[0] for problem in seccomp.problems(section)] == ["oci"]
    with pytest.raises(ProfileError, match=r"x\.json: syscalls"):
        seccomp.compile_policy(section, notify=False)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5)
        | st.sampled_from(["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "read", "SCMP_CMP_EQ"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["defaultAction", "syscalls", "names", "action", "args", "index", "op",
                 "value", "includes", "caps", "minKernel", "errnoRet"]
            ),
            inner,
            max_size=5,
        ),
        max_leaves=20,
    )
)  # fmt: skip
def test_any_json_is_read_or_refused(value) -> None:
    """Nothing but ValueError comes out of a file."""
    try:
        oci.read(json.dumps(value))
    except ValueError:
        return


def test_oci_replaces_the_other_keys(tmp_path) -> None:
    """A ``deny`` beside it would be ignored, so it is refused."""
    with pytest.raises(ValueError, match="oci replaces allow and deny"):
        Syscalls(
            oci=OciPolicy("x", json.dumps(policy_of(ALLOW_READ))),
            deny={"ptrace": "x"},
            why="test",
        )
    (tmp_path / "o.json").write_text(json.dumps(policy_of(ALLOW_READ)))
    profile = tmp_path / "mine.toml"
    profile.write_text('[syscalls]\noci = "o.json"\nwhy = "ours"\n')
    loaded = profiles.load_file(profile)
    program = seccomp.compile_policy(loaded.syscalls, notify=False).bpf
    assert bpf.run(program, number("read")) == bpf.ALLOW
    assert bpf.run(program, number("write")) == EPERM
    (tmp_path / "o.json").chmod(0o666)
    with pytest.raises(ProfileError, match=r"o\.json: mode 0666"):
        profiles.load_file(profile)
