"""Attacks on the kernel's surface: calls that a task never needs.

Nothing here does harm where it gets through: arguments are chosen so that the
kernel refuses them with an errno of its own, and :func:`_reached` reads that
errno as "the call was let in".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

from tests.attacks.probes.base import (
    ARCH,
    Blocked,
    Context,
    NotHere,
    addr,
    check,
    libc,
    probe,
    syscall,
)


def _reached(names: str, call: str, *arguments: int | bytes | None) -> str:
    """Make a call; the named errnos mean that the kernel looked at it."""
    try:
        syscall(call, *arguments)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) in names.split():
            return f"reached: {errno.errorcode[error.errno or 0]}"
        raise
    return "done"


@probe
def bpf(context: Context) -> object:
    attr = ctypes.create_string_buffer(struct.pack("IIIII", 2, 4, 4, 1, 0), 128)
    return syscall("bpf", 0, addr(attr), 128)


@probe
def bpf_program(context: Context) -> object:
    return _reached("EINVAL E2BIG EFAULT", "bpf", 5, 0, 1)


@probe
def perf_event_open(context: Context) -> object:
    attr = ctypes.create_string_buffer(struct.pack("IIQQQQ", 1, 128, 1, 0, 0, 0), 128)
    # exclude_kernel and exclude_hv: what an ordinary user may count
    struct.pack_into("Q", attr, 40, 1 << 5 | 1 << 6)
    return syscall("perf_event_open", addr(attr), 0, -1, -1, 0)


@probe
def userfaultfd(context: Context) -> object:
    """Stops the kernel in the middle of a copy: wins its races."""
    return syscall("userfaultfd", 1)


@probe
def dev_userfaultfd(context: Context) -> object:
    return os.open("/dev/userfaultfd", os.O_RDWR)


@probe
def io_uring_setup(context: Context) -> object:
    parameters = ctypes.create_string_buffer(120)
    return syscall("io_uring_setup", 4, addr(parameters))


@probe
def io_setup(context: Context) -> object:
    """Old asynchronous io: contexts are counted for the whole machine."""
    context_id = ctypes.c_uint64()
    syscall("io_setup", 1, addr(context_id))
    return "set up"


@probe
def add_key(context: Context) -> object:
    return syscall("add_key", b"user", b"raysandbox", b"x", 1, -2)


@probe
def request_key(context: Context) -> object:
    """ENOKEY: the kernel searched, and may have run /sbin/request-key."""
    return _reached("ENOKEY", "request_key", b"user", b"raysandbox-none", 0, 0)


@probe
def keyctl_session(context: Context) -> object:
    """Keyrings are per uid and know no namespace but the user's."""
    return syscall("keyctl", 0, -3, 0)


@probe
def keyctl_join_session(context: Context) -> object:
    return syscall("keyctl", 1, b"raysandbox-probe")


@probe
def kexec_load(context: Context) -> object:
    return _reached("EINVAL EBUSY EADDRNOTAVAIL", "kexec_load", 0, 99, 0, 0xFFFF)


@probe
def kexec_file_load(context: Context) -> object:
    return _reached("EINVAL EBADF", "kexec_file_load", -1, -1, 0, 0, 0xFFFF)


@probe
def init_module(context: Context) -> object:
    return _reached("ENOEXEC EINVAL EFAULT", "init_module", b"\0" * 8, 8, b"")


@probe
def finit_module(context: Context) -> object:
    return _reached("EBADF EINVAL", "finit_module", -1, b"", 0x8000)


@probe
def delete_module(context: Context) -> object:
    return _reached("ENOENT", "delete_module", b"raysandbox_none", 0o4000)


@probe
def iopl(context: Context) -> object:
    return _reached("EINVAL", "iopl", 0)


@probe
def ioperm(context: Context) -> object:
    return _reached("EINVAL", "ioperm", 0x10000, 16, 1)


@probe
def modify_ldt(context: Context) -> object:
    """A writable LDT has been the start of several privilege escalations."""
    entry = struct.pack("IIII", 0, 0, 0, 0x28)
    buffer = ctypes.create_string_buffer(entry)
    return syscall("modify_ldt", 17, addr(buffer), 16)


@probe
def personality_no_randomize(context: Context) -> object:
    return syscall("personality", 0x0040000)


@probe
def personality_read_implies_exec(context: Context) -> object:
    return syscall("personality", 0x0400000)


@probe
def personality_linux32(context: Context) -> object:
    return syscall("personality", 0x0008)


@probe
def personality_high_half(context: Context) -> object:
    return syscall("personality", 0x0040000 | 1 << 40)


@probe
def x32_getpid(context: Context) -> object:
    """Bit 30 picks the x32 table: other numbers for the same calls.

    Outside, ENOSYS says that the call went through the filterless entry.
    """
    if ARCH != "x86_64":
        raise NotHere("x32 is an ABI of x86-64")
    ctypes.set_errno(0)
    result = int(libc.syscall(ctypes.c_long(0x40000000 + 39)))
    if result > 0 or ctypes.get_errno() == errno.ENOSYS:
        return "reached"
    return check(result)


@probe
def x32_execve_number(context: Context) -> object:
    """x32's own execve (520) with a null path: EFAULT or ENOSYS is reached."""
    if ARCH != "x86_64":
        raise NotHere("x32 is an ABI of x86-64")
    ctypes.set_errno(0)
    result = int(libc.syscall(ctypes.c_long(0x40000000 + 520), None, None, None))
    if result == -1 and ctypes.get_errno() in (errno.ENOSYS, errno.EFAULT):
        return "reached"
    return check(result)


def _machine_code(code: bytes) -> int:
    """Run bytes that leave their answer in eax."""
    area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    area.write(code)
    where = addr(ctypes.c_char.from_buffer(area))
    result: int = ctypes.CFUNCTYPE(ctypes.c_int)(where)()
    return result


@probe
def int80_getpid(context: Context) -> object:
    """int 0x80 enters the 32-bit table, where 20 is getpid."""
    if ARCH != "x86_64":
        raise NotHere("int 0x80 is x86's")
    # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    result = _machine_code(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")
    if result == os.getpid():
        return "got the pid"
    raise OSError(-result, os.strerror(-result))


@probe
def int80_socket(context: Context) -> object:
    """socket(AF_INET) by its 32-bit number 359."""
    if ARCH != "x86_64":
        raise NotHere("int 0x80 is x86's")
    # push rbx; eax=359; ebx=2; ecx=1; edx=0; int 0x80; pop rbx; ret
    code = (
        b"\x53\xb8\x67\x01\x00\x00\xbb\x02\x00\x00\x00\xb9\x01\x00\x00\x00"
        b"\x31\xd2\xcd\x80\x5b\xc3"
    )
    result = _machine_code(code)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _filter(*instructions: tuple[int, int, int, int]) -> ctypes.Array[ctypes.c_char]:
    code = b"".join(struct.pack("HBBI", *one) for one in instructions)
    return ctypes.create_string_buffer(code)


def _program(code: ctypes.Array[ctypes.c_char], count: int) -> object:
    return ctypes.create_string_buffer(struct.pack("HxxxxxxQ", count, addr(code)))


@probe
def seccomp_allow_all_on_top(context: Context) -> object:
    """A permissive filter on top must not weaken the one below.

    Outside there is none below: the call that follows works.
    """
    code = _filter((6, 0, 0, 0x7FFF0000))
    program = _program(code, 1)
    check(libc.prctl(38, 1, 0, 0, 0))
    try:
        syscall("seccomp", 1, 0, addr(program))
    except OSError as error:
        if context["side"] == "control":
            raise
        raise OSError(error.errno, "installing") from error
    parameters = ctypes.create_string_buffer(120)
    return syscall("io_uring_setup", 4, addr(parameters))


@probe
def seccomp_listener(context: Context) -> object:
    """A second supervisor could answer "continue" to what is denied."""
    code = _filter((6, 0, 0, 0x7FFF0000))
    program = _program(code, 1)
    check(libc.prctl(38, 1, 0, 0, 0))
    return syscall("seccomp", 1, 8, addr(program))


@probe
def seccomp_strict_mode_off(context: Context) -> object:
    """PR_SET_SECCOMP back to 0: EINVAL always; the mode must read 2."""
    mode = int(libc.prctl(21, 0, 0, 0, 0))
    if mode == 0:
        return "no filter"
    libc.prctl(22, 0, 0, 0, 0)
    raise Blocked(f"mode {int(libc.prctl(21, 0, 0, 0, 0))}")


@probe
def landlock_permissive_on_top(context: Context) -> object:
    """A ruleset that handles nothing much must not lift the lower one."""
    attr = (ctypes.c_uint64 * 1)(1)
    ruleset = syscall("landlock_create_ruleset", addr(attr), 8, 0)
    root = os.open("/", os.O_RDONLY | 0o10000000)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", 1, root))
    syscall("landlock_add_rule", ruleset, 1, addr(rule), 0)
    check(libc.prctl(38, 1, 0, 0, 0))
    syscall("landlock_restrict_self", ruleset, 0)
    fd = os.open(f"{context['readonly']}/fifo", os.O_RDWR | os.O_NONBLOCK)
    return f"fifo opened as {fd}"


@probe
def tiocsti(context: Context) -> object:
    """Types into the terminal that the operator started us from."""
    parent, child = os.openpty() if context["side"] == "control" else (-1, 0)
    if context["side"] == "control":
        os.setsid()
        fcntl.ioctl(child, 0x540E, 0)
    fcntl.ioctl(child, 0x5412, b"x")
    return f"typed through {parent}"


@probe
def tiocsti_high_half(context: Context) -> object:
    """CVE-2019-10063: the kernel reads 32 bits of the ioctl number."""
    child = 0
    if context["side"] == "control":
        _, child = os.openpty()
        os.setsid()
        fcntl.ioctl(child, 0x540E, 0)
    number = {"x86_64": 16, "aarch64": 29}[ARCH]
    request = ctypes.c_uint64(0x5412 | 1 << 32)
    letter = ctypes.create_string_buffer(b"x")
    result = libc.syscall(
        ctypes.c_long(number), ctypes.c_long(child), request, ctypes.byref(letter)
    )
    check(int(result))
    return "typed"


@probe
def tioclinux(context: Context) -> object:
    """TIOCLINUX pastes into a console; ENOTTY and EINVAL mean reached."""
    try:
        fcntl.ioctl(0, 0x541C, b"\x02")
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return "reached"
        raise
    return "done"


@probe
def tiocsctty(context: Context) -> object:
    try:
        fcntl.ioctl(0, 0x540E, 1)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return "reached"
        raise
    return "done"


@probe
def quotactl(context: Context) -> object:
    return _reached("ENOENT ENODEV EINVAL ENOTBLK", "quotactl", 0x800002 << 8, b"", 0)


@probe
def swapon(context: Context) -> object:
    return _reached("ENOENT EINVAL", "swapon", b"/nowhere", 0)


@probe
def swapoff(context: Context) -> object:
    return _reached("ENOENT EINVAL", "swapoff", b"/nowhere")


@probe
def reboot(context: Context) -> object:
    """Wrong magic numbers: EINVAL is the answer of a kernel that would."""
    return _reached("EINVAL", "reboot", 0, 0, 0, 0)


@probe
def settimeofday(context: Context) -> object:
    moment = (ctypes.c_int64 * 2)(0, 2_000_000)
    return _reached("EINVAL", "settimeofday", addr(moment), 0)


@probe
def clock_settime(context: Context) -> object:
    moment = (ctypes.c_int64 * 2)(0, 2_000_000_000)
    return _reached("EINVAL", "clock_settime", 0, addr(moment))


@probe
def adjtimex(context: Context) -> object:
    """A bad tick: refused by its value, after the permission was seen."""
    data = ctypes.create_string_buffer(struct.pack("I", 0x4000), 208)
    return _reached("EINVAL", "adjtimex", addr(data))


@probe
def acct(context: Context) -> object:
    return _reached("ENOENT", "acct", b"/nowhere")


@probe
def syslog_read_all(context: Context) -> object:
    buffer = ctypes.create_string_buffer(64)
    return syscall("syslog", 3, addr(buffer), 64) > 0


@probe
def syslog_size(context: Context) -> object:
    return syscall("syslog", 10, 0, 0)


@probe
def fanotify_init(context: Context) -> object:
    """Sees, and may veto, every open on a mount."""
    return syscall("fanotify_init", 0, 0)


@probe
def memfd_secret(context: Context) -> object:
    """Memory that no one can look into, and that is never swapped."""
    return syscall("memfd_secret", 0)


@probe
def mount_query_statmount(context: Context) -> object:
    request = ctypes.create_string_buffer(struct.pack("IIQQQ", 24, 0, 1 << 40, 2, 0))
    buffer = ctypes.create_string_buffer(4096)
    return _reached("ENOENT", "statmount", addr(request), addr(buffer), 4096, 0)


@probe
def lsm_list(context: Context) -> object:
    ids = (ctypes.c_uint64 * 16)()
    size = ctypes.c_uint32(128)
    return syscall("lsm_list_modules", addr(ids), addr(size), 0)


@probe
def vhangup(context: Context) -> object:
    return syscall("vhangup") if os.isatty(0) else _reached("", "vhangup")


@probe
def lookup_dcookie(context: Context) -> object:
    buffer = ctypes.create_string_buffer(64)
    return _reached("EINVAL ENOENT", "lookup_dcookie", 0, addr(buffer), 64)


@probe
def uselib(context: Context) -> object:
    return _reached("ENOENT EINVAL", "uselib", b"/nowhere")


@probe
def sysfs_call(context: Context) -> object:
    return syscall("sysfs", 3)


@probe
def remap_file_pages(context: Context) -> object:
    return _reached("EINVAL", "remap_file_pages", 0, 0, 0, 0, 0)


@probe
def vmsplice(context: Context) -> object:
    """Dirty Pipe's family: pages of others in one's own pipe."""
    _, write_end = os.pipe()
    page = ctypes.create_string_buffer(b"x" * 16)
    vector = (ctypes.c_uint64 * 2)(addr(page), 16)
    return syscall("vmsplice", write_end, addr(vector), 1, 8)


@probe
def unknown_call(context: Context) -> object:
    """A number within the tables that no kernel has given a meaning.

    Outside the kernel answers ENOSYS, which is what a filter that lets
    unknown numbers through would show as well; so the jail must show EPERM.
    """
    ctypes.set_errno(0)
    result = int(libc.syscall(ctypes.c_long(400)))
    if result == -1 and ctypes.get_errno() == errno.ENOSYS:
        return "reached"
    return check(result)


@probe
def negative_call(context: Context) -> object:
    """The number -1 means "skipped" to tracers."""
    ctypes.set_errno(0)
    result = int(libc.syscall(ctypes.c_long(-1)))
    if result == -1 and ctypes.get_errno() == errno.ENOSYS:
        return "reached"
    return check(result)


@probe
def prctl_set_mm(context: Context) -> object:
    """Rewrites what /proc says about us; EINVAL is the kernel's answer."""
    if int(libc.prctl(35, 99, 0, 0, 0)) == -1:
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return "reached"
        raise OSError(number, os.strerror(number))
    return "done"


@probe
def mmap_zero_page(context: Context) -> object:
    """A mapped zero page turns null-pointer bugs of the kernel into exploits."""
    libc.mmap.restype = ctypes.c_void_p
    where = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x32, -1, 0)
    if where == ctypes.c_void_p(-1).value:
        check(-1)
    return where or "zero page"
