"""Attacks on other processes: signals, debugging, memory, scheduling, IPC."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time

from tests.attacks.probes.base import (
    Blocked,
    Context,
    addr,
    check,
    libc,
    probe,
    syscall,
)

PTRACE_TRACEME, PTRACE_SEIZE = 0, 0x4206


def _child() -> int:
    """Fork a child that sleeps until it is killed."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        signal.pause()
        os._exit(0)
    return child


@probe
def kill_host_process(context: Context) -> object:
    os.kill(context["victim"], 0)
    return "may signal"


@probe
def kill_host_process_group(context: Context) -> object:
    os.killpg(context["victim_group"], 0)
    return "may signal"


@probe
def kill_init(context: Context) -> object:
    """Pid 1 of the jail; outside, a parent of one's own."""
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    os.kill(target, signal.SIGKILL)
    os.kill(target, signal.SIGTERM)
    time.sleep(0.05)
    if context["side"] == "control":
        os.waitpid(target, os.WNOHANG)
    try:
        os.kill(target, 0)
    except ProcessLookupError:
        return "dead"
    raise Blocked("init lives")


@probe
def tgkill_host_thread(context: Context) -> object:
    return syscall("tgkill", context["victim"], context["victim"], 0)


@probe
def sigqueue_host_process(context: Context) -> object:
    """SI_QUEUE carries data: forged signals confuse whoever trusts si_pid."""
    info = ctypes.create_string_buffer(struct.pack("iii", 0, 0, -1), 128)
    return syscall("rt_sigqueueinfo", context["victim"], 0, addr(info))


@probe
def pidfd_of_host_process(context: Context) -> object:
    return syscall("pidfd_open", context["victim"], 0)


@probe
def pidfd_from_proc_directory(context: Context) -> object:
    """A directory of /proc is a pidfd too; here that of pid 1."""
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    fd = os.open(f"/proc/{target}", os.O_RDONLY)
    syscall("pidfd_send_signal", fd, signal.SIGKILL, 0, 0)
    if context["side"] == "control":
        os.waitpid(target, 0)
    else:
        time.sleep(0.05)
    if os.path.exists(f"/proc/{target}/status"):
        raise Blocked("init lives")
    return "dead"


@probe
def pidfd_getfd_from_init(context: Context) -> object:
    """Take the monitor's or init's descriptors: plan, status pipe, cgroups."""
    pidfd = syscall("pidfd_open", context["init_pid"], 0)
    return syscall("pidfd_getfd", pidfd, 0, 0)


@probe
def pidfd_getfd_from_own_child(context: Context) -> object:
    child = _child()
    try:
        pidfd = syscall("pidfd_open", child, 0)
        return syscall("pidfd_getfd", pidfd, 0, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def ptrace_attach_host(context: Context) -> object:
    syscall("ptrace", PTRACE_SEIZE, context["victim"], 0, 0)
    return "attached"


@probe
def ptrace_attach_init(context: Context) -> object:
    syscall("ptrace", PTRACE_SEIZE, context["init_pid"], 0, 0)
    return "attached"


@probe
def ptrace_own_child(context: Context) -> object:
    """A tracer can rewrite system calls after the filter has seen them."""
    child = _child()
    try:
        return syscall("ptrace", PTRACE_SEIZE, child, 0, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def ptrace_traceme(context: Context) -> object:
    return syscall("ptrace", PTRACE_TRACEME, 0, 0, 0)


def _vectors(pid: int, name: str) -> int:
    mine = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(addr(mine), 8)
    return syscall(name, pid, addr(local), 1, addr(local), 1, 0)


@probe
def process_vm_readv_own_child(context: Context) -> object:
    child = _child()
    try:
        return _vectors(child, "process_vm_readv")
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def process_vm_writev_own_child(context: Context) -> object:
    child = _child()
    try:
        return _vectors(child, "process_vm_writev")
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def process_vm_readv_host(context: Context) -> object:
    mine = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(addr(mine), 8)
    remote = (ctypes.c_uint64 * 2)(context["victim_address"], 8)
    pid = context["victim"]
    return syscall("process_vm_readv", pid, addr(local), 1, addr(remote), 1, 0)


@probe
def proc_host_environ(context: Context) -> object:
    with open(f"/proc/{context['victim']}/environ", "rb") as file:
        return len(file.read())


@probe
def proc_host_cmdline(context: Context) -> object:
    with open(f"/proc/{context['victim']}/cmdline", "rb") as file:
        return file.read().decode()


@probe
def proc_host_mem(context: Context) -> object:
    with open(f"/proc/{context['victim']}/mem", "rb") as file:
        file.seek(context["victim_address"])
        return file.read(6).decode()


@probe
def proc_init_environ(context: Context) -> object:
    with open(f"/proc/{context['init_pid']}/environ", "rb") as file:
        return len(file.read())


@probe
def proc_init_maps(context: Context) -> object:
    with open(f"/proc/{context['init_pid']}/maps", "rb") as file:
        return len(file.read())


@probe
def proc_init_stack(context: Context) -> object:
    with open(f"/proc/{context['init_pid']}/syscall", "rb") as file:
        return len(file.read())


@probe
def proc_lists_host_processes(context: Context) -> object:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    if len(pids) > 10 or context["victim"] in pids:
        return len(pids)
    raise Blocked("own processes only")


@probe
def setpgid_of_host_process(context: Context) -> object:
    """Outside: a child of one's own; the call works on who can be seen."""
    if context["side"] == "control":
        target = _child()
        try:
            os.setpgid(target, target)
            return "moved"
        finally:
            os.kill(target, signal.SIGKILL)
    os.setpgid(context["victim"], 0)
    return "moved"


@probe
def getsid_of_host_process(context: Context) -> object:
    return os.getsid(context["victim"])


@probe
def priority_of_host_process(context: Context) -> object:
    os.setpriority(os.PRIO_PROCESS, context["victim"], 1)
    return "set"


@probe
def priority_of_host_user(context: Context) -> object:
    """PRIO_USER names a uid, not a pid: it must stay in the pid namespace.

    The control is never root's: all of the machine's services would be nicer.
    """
    uid = os.getuid()
    assert uid != 0
    os.setpriority(os.PRIO_USER, uid, 19)
    try:
        now = os.getpriority(os.PRIO_PROCESS, context["victim"])
    except ProcessLookupError:
        raise Blocked("own processes only") from None
    return f"the victim's is {now}"


@probe
def affinity_of_host_process(context: Context) -> object:
    os.sched_setaffinity(context["victim"], os.sched_getaffinity(0))
    return "set"


@probe
def realtime_self(context: Context) -> object:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "real-time"


@probe
def deadline_self(context: Context) -> object:
    attr = ctypes.create_string_buffer(
        struct.pack("IIQiIQQQ", 48, 6, 0, 0, 0, 1000000, 10000000, 10000000)
    )
    syscall("sched_setattr", 0, addr(attr), 0)
    return "deadline"


@probe
def nice_below_start(context: Context) -> object:
    """Outside: -1 is what only a privileged process may take."""
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - 1)
    return "raised"


@probe
def realtime_io(context: Context) -> object:
    syscall("ioprio_set", 1, 0, 1 << 13)
    return "real-time io"


@probe
def prlimit_of_init(context: Context) -> object:
    limits = (ctypes.c_uint64 * 2)(64, 64)
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    syscall("prlimit64", target, 4, addr(limits), 0)
    return "set"


@probe
def prlimit_of_host_process(context: Context) -> object:
    limits = (ctypes.c_uint64 * 2)()
    syscall("prlimit64", context["victim"], 7, 0, addr(limits))
    return limits[0]


@probe
def kcmp_with_init(context: Context) -> object:
    """Outside: own child.  Tells addresses of kernel objects apart."""
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    syscall("kcmp", os.getpid(), target, 1, 0, 0)
    return "compared"


@probe
def robust_list_of_init(context: Context) -> object:
    head, size = ctypes.c_uint64(), ctypes.c_uint64()
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    syscall("get_robust_list", target, addr(head), addr(size))
    return "read"


@probe
def async_io_owner_is_host_process(context: Context) -> object:
    """F_SETOWN: the kernel sends SIGIO to whom one names."""
    import fcntl

    read_end, _ = os.pipe()
    fcntl.fcntl(read_end, fcntl.F_SETOWN, context["victim"])
    owner = fcntl.fcntl(read_end, fcntl.F_GETOWN)
    if owner != context["victim"]:
        raise Blocked("no owner")
    return owner


@probe
def timer_signals_host_thread(context: Context) -> object:
    """SIGEV_THREAD_ID with a thread that is not ours; outside: our own."""
    target = context["victim"]
    if context["side"] == "control":
        target = os.getpid()
    event = ctypes.create_string_buffer(struct.pack("qiii", 0, 10, 4, target), 64)
    timer = ctypes.c_int()
    syscall("timer_create", 0, addr(event), addr(timer))
    return "armed"


@probe
def move_pages_of_init(context: Context) -> object:
    target = 0 if context["side"] == "control" else context["init_pid"]
    page = ctypes.create_string_buffer(4096)
    pages = (ctypes.c_uint64 * 1)(addr(page))
    status = (ctypes.c_int * 1)()
    syscall("move_pages", target, 1, addr(pages), 0, addr(status), 0)
    return "asked"


@probe
def migrate_pages(context: Context) -> object:
    mask = (ctypes.c_uint64 * 1)(1)
    syscall("migrate_pages", 0, 2, addr(mask), addr(mask))
    return "migrated"


@probe
def process_madvise_own_child(context: Context) -> object:
    child = _child()
    try:
        pidfd = syscall("pidfd_open", child, 0)
        page = ctypes.create_string_buffer(8192)
        vector = (ctypes.c_uint64 * 2)((addr(page) + 4095) & ~4095, 4096)
        return syscall("process_madvise", pidfd, addr(vector), 1, 20, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def process_mrelease(context: Context) -> object:
    """EINVAL: the call was reached, the target is just not dying."""
    child = _child()
    try:
        pidfd = syscall("pidfd_open", child, 0)
        try:
            return syscall("process_mrelease", pidfd, 0)
        except OSError as error:
            if error.errno == 22:
                return "reached"
            raise
    finally:
        os.kill(child, signal.SIGKILL)


@probe
def shared_memory_of_host(context: Context) -> object:
    """System V ids are numbers that anyone can guess."""
    libc.shmat.restype = ctypes.c_void_p
    where = libc.shmat(context["shm_id"], None, 0)
    if where == ctypes.c_void_p(-1).value:
        check(-1)
    return ctypes.string_at(where, 6).decode()


@probe
def shared_memory_by_key(context: Context) -> object:
    return check(libc.shmget(context["shm_key"], ctypes.c_size_t(1), 0))


@probe
def message_queue_of_host(context: Context) -> object:
    return syscall("mq_open", context["queue"].encode(), os.O_RDONLY, 0, 0)


@probe
def semaphore_of_host(context: Context) -> object:
    return check(libc.semget(context["shm_key"], 0, 0))


@probe
def dumpable_again(context: Context) -> object:
    """PR_SET_DUMPABLE(1) is allowed to anyone; it must win nothing.

    What is checked: pid 1 stays closed, though it has our credentials.
    """
    check(libc.prctl(4, 1, 0, 0, 0))
    target = context["init_pid"]
    if context["side"] == "control":
        target = _child()
    return os.readlink(f"/proc/{target}/cwd")
