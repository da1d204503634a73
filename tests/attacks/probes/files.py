"""Attacks on the file system: leave the root, write what is read-only, mount."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import stat
import subprocess
import sys
import tempfile

from tests.attacks.probes.base import (
    Blocked,
    Context,
    addr,
    check,
    libc,
    probe,
    syscall,
)

MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
AT_FDCWD = -100
OPEN_TREE_CLONE_ALL = 1 | 0x8000
MNT_DETACH = 2
O_PATH = 0o10000000


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(64).decode(errors="replace")


def _open_for_writing(path: str) -> str:
    os.close(os.open(path, os.O_WRONLY))
    return path


def _mount(source: str, target: str, kind: str | None, flags: int, data: str) -> None:
    check(
        libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            data.encode(),
        )
    )


def _new_dir(context: Context, name: str) -> str:
    # Not by pid: in a pid namespace of its own every control is pid 1.
    return tempfile.mkdtemp(prefix=f"{name}-", dir=context["scratch"])


@probe
def symlink_out(context: Context) -> object:
    link = f"{context['scratch']}/link-{os.getpid()}"
    os.symlink(context["secret"], link)
    return _read(link)


@probe
def symlink_in_directory_part(context: Context) -> object:
    link = f"{context['scratch']}/dirlink-{os.getpid()}"
    os.symlink(os.path.dirname(context["secret"]), link)
    return _read(f"{link}/{os.path.basename(context['secret'])}")


@probe
def hardlink_of_readonly_file(context: Context) -> object:
    source = f"{context['readonly']}/file"
    target = f"{context['beside_readonly']}/hard-{os.getpid()}"
    os.link(source, target)
    try:
        return _open_for_writing(target)
    finally:
        os.unlink(target)


@probe
def dotdot(context: Context) -> object:
    inner = _new_dir(context, "deep")
    os.chdir(inner)
    return _read("../" * 40 + context["secret"].lstrip("/"))


@probe
def proc_self_root(context: Context) -> object:
    return _read(f"/proc/self/root{context['secret']}")


@probe
def proc_thread_self_root(context: Context) -> object:
    return _read(f"/proc/thread-self/root{context['secret']}")


@probe
def proc_init_root(context: Context) -> object:
    return _read(f"/proc/{context['init_pid']}/root{context['secret']}")


@probe
def proc_init_cwd(context: Context) -> object:
    return os.listdir(f"/proc/{context['init_pid']}/cwd")


@probe
def proc_init_exe(context: Context) -> object:
    return _read(f"/proc/{context['init_pid']}/exe")[:4]


@probe
def proc_init_fd(context: Context) -> object:
    return os.listdir(f"/proc/{context['init_pid']}/fd")


@probe
def proc_init_map_files(context: Context) -> object:
    return os.listdir(f"/proc/{context['init_pid']}/map_files")


@probe
def proc_host_process_fd(context: Context) -> object:
    return os.listdir(f"/proc/{context['victim']}/fd")


@probe
def magic_link_to_deleted_host_file(context: Context) -> object:
    return _read(f"/proc/{context['victim']}/fd/{context['victim_fd']}")


@probe
def o_path_then_openat(context: Context) -> object:
    root = os.open("/", O_PATH | os.O_DIRECTORY)
    fd = os.open("../.." + context["secret"], os.O_RDONLY, dir_fd=root)
    return os.read(fd, 16).decode()


@probe
def o_path_reopen_of_hidden_dir(context: Context) -> object:
    fd = os.open(f"{context['readonly']}/hidden", O_PATH | os.O_DIRECTORY)
    found = os.listdir(f"/proc/self/fd/{fd}")
    if "inside" not in found:
        raise Blocked(f"listed {found}")
    return found


@probe
def hidden_file(context: Context) -> object:
    text = _read(f"{context['readonly']}/hidden-file")
    if text != "hidden secret":
        raise Blocked(f"read {text!r}")
    return text


@probe
def hidden_dir(context: Context) -> object:
    return _read(f"{context['readonly']}/hidden/inside")


@probe
def hidden_file_by_bind_parent(context: Context) -> object:
    """The name is masked; the inode must not be reachable from its directory."""
    directory = os.open(context["readonly"], os.O_RDONLY)
    fd = os.open("hidden-file", os.O_RDONLY, dir_fd=directory)
    text = os.read(fd, 64).decode()
    if text != "hidden secret":
        raise Blocked(f"read {text!r}")
    return text


def _handle(path: str) -> tuple[ctypes.Array[ctypes.c_char], int]:
    buffer = ctypes.create_string_buffer(8 + 128)
    ctypes.c_uint.from_buffer(buffer).value = 128
    mount_id = ctypes.c_int()
    at = AT_FDCWD
    syscall("name_to_handle_at", at, path.encode(), addr(buffer), addr(mount_id), 0)
    return buffer, mount_id.value


@probe
def name_to_handle(context: Context) -> object:
    return len(_handle("/usr")[0])


@probe
def open_by_handle(context: Context) -> object:
    """Shocker: handles are inode numbers, they know no mount namespace."""
    if "handle" in context:
        buffer = ctypes.create_string_buffer(bytes.fromhex(context["handle"]), 136)
    else:
        buffer, _ = _handle(context["secret"])
    mount = os.open(context["handle_mount"], os.O_RDONLY)
    fd = syscall("open_by_handle_at", mount, addr(buffer), os.O_RDONLY)
    return os.read(fd, 16).decode()


@probe
def chroot(context: Context) -> object:
    os.chroot(_new_dir(context, "chroot"))
    return "in a new root"


@probe
def chroot_escape(context: Context) -> object:
    """The classic: keep a directory fd outside the new root and climb."""
    outside = os.open("/", os.O_RDONLY)
    os.chroot(_new_dir(context, "climb"))
    os.fchdir(outside)
    return _read(context["secret"].lstrip("/"))


@probe
def mknod_character_device(context: Context) -> object:
    path = f"{context['scratch']}/null-{os.getpid()}"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.unlink(path)
    return "made a device"


@probe
def mknod_block_device(context: Context) -> object:
    path = f"{context['scratch']}/loop-{os.getpid()}"
    os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, 0))
    os.unlink(path)
    return "made a device"


@probe
def mount_tmpfs(context: Context) -> object:
    _mount("t", _new_dir(context, "mnt"), "tmpfs", 0, "size=4k")
    return "mounted"


@probe
def mount_proc(context: Context) -> object:
    _mount("p", _new_dir(context, "mnt"), "proc", 0, "")
    return "mounted"


@probe
def mount_sysfs(context: Context) -> object:
    _mount("s", _new_dir(context, "mnt"), "sysfs", 0, "")
    return "mounted"


@probe
def mount_overlay(context: Context) -> object:
    base = _new_dir(context, "ovl")
    _mount("o", base, "tmpfs", 0, "size=64k")
    for name in ("low", "up", "work", "all"):
        os.mkdir(f"{base}/{name}")
    options = f"lowerdir={base}/low,upperdir={base}/up,workdir={base}/work"
    _mount("o", f"{base}/all", "overlay", 0, options)
    return "mounted"


@probe
def mount_cgroup(context: Context) -> object:
    target = _new_dir(context, "cg")
    _mount("c", target, context["cgroup_fs"], 0, context["cgroup_options"])
    return os.listdir(target)[:3]


@probe
def bind_over_system(context: Context) -> object:
    _mount(_new_dir(context, "evil"), "/usr", None, MS_BIND, "")
    return "bound"


@probe
def remount_writable(context: Context) -> object:
    """Outside: a read-only bind of one's own that one may make writable again."""
    target = context["readonly"]
    if context["side"] == "control":
        _mount(target, target, None, MS_BIND, "")
        _mount("", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY, "")
    _mount("", target, None, MS_REMOUNT | MS_BIND, "")
    return _open_for_writing(f"{target}/file")


@probe
def fsopen(context: Context) -> object:
    return syscall("fsopen", b"tmpfs", 0)


@probe
def open_tree_clone(context: Context) -> object:
    return syscall("open_tree", AT_FDCWD, b"/", OPEN_TREE_CLONE_ALL)


@probe
def open_tree_of_proc(context: Context) -> object:
    """A clone of a masked directory would come without the mask."""
    return syscall("open_tree", AT_FDCWD, b"/proc", OPEN_TREE_CLONE_ALL)


@probe
def move_mount(context: Context) -> object:
    tree = syscall("open_tree", AT_FDCWD, context["scratch"].encode(), 0x8001)
    target = _new_dir(context, "moved").encode()
    syscall("move_mount", tree, b"", AT_FDCWD, target, 4)
    return "moved"


@probe
def move_mount_reachable(context: Context) -> object:
    """EINVAL or EBADF from the call itself would mean that it was let in."""
    try:
        syscall("move_mount", -1, b"", -1, b"", 4)
    except OSError as error:
        if error.errno in (9, 22, 2):
            return "reached"
        raise
    return "reached"


@probe
def mount_setattr_writable(context: Context) -> object:
    """Clears MOUNT_ATTR_RDONLY (1) of the root mount."""
    attr = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    syscall("mount_setattr", AT_FDCWD, b"/", 0, addr(attr), 32)
    return "cleared"


@probe
def pivot_root(context: Context) -> object:
    new = _new_dir(context, "new")
    if context["side"] == "control":
        _mount("t", new, "tmpfs", 0, "size=16k")
        os.mkdir(f"{new}/old")
    syscall("pivot_root", new.encode(), f"{new}/old".encode())
    return "pivoted"


@probe
def umount_proc(context: Context) -> object:
    if context["side"] == "control":
        _mount("p", "/proc", "tmpfs", 0, "")
    syscall("umount2", b"/proc", MNT_DETACH)
    return "unmounted"


@probe
def umount_mask(context: Context) -> object:
    """Lift the mask from a hidden file, and read what is below."""
    target = f"{context['readonly']}/hidden-file"
    if context["side"] == "control":
        _mount(f"{context['readonly']}/file", target, None, MS_BIND, "")
    syscall("umount2", target.encode(), MNT_DETACH)
    return _read(target)


def _device(path: str, flags: int = os.O_RDONLY) -> str:
    os.close(os.open(path, flags | os.O_NONBLOCK))
    return path


@probe
def dev_mem(context: Context) -> object:
    return _device("/dev/mem")


@probe
def dev_kmem(context: Context) -> object:
    return _device("/dev/kmem")


@probe
def dev_port(context: Context) -> object:
    return _device("/dev/port")


@probe
def dev_kmsg(context: Context) -> object:
    return _device("/dev/kmsg")


@probe
def dev_kvm(context: Context) -> object:
    return _device("/dev/kvm", os.O_RDWR)


@probe
def dev_fuse(context: Context) -> object:
    return _device("/dev/fuse", os.O_RDWR)


@probe
def dev_loop_control(context: Context) -> object:
    return _device("/dev/loop-control", os.O_RDWR)


@probe
def dev_console(context: Context) -> object:
    return _device("/dev/console", os.O_WRONLY | os.O_NOCTTY)


@probe
def dev_ptmx(context: Context) -> object:
    return _device("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


@probe
def block_device(context: Context) -> object:
    return _device(context["block_device"])


@probe
def device_through_readonly_bind(context: Context) -> object:
    """A device node that lies in a directory the profile names must be dead."""
    return _device(f"{context['readonly']}/device")


@probe
def setuid_binary(context: Context) -> object:
    command = [f"{context['readonly']}/setuid-id", "-u"]
    uid = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if uid != "0":
        raise Blocked(f"euid stayed {uid}")
    return uid


@probe
def file_capabilities(context: Context) -> object:
    command = [f"{context['readonly']}/caps-cat", "/proc/self/status"]
    try:
        text = subprocess.run(command, capture_output=True, text=True).stdout
    except PermissionError:
        # The kernel refuses the exec outright where the bounding set lacks
        # what the file would give (cap_effective set on the file).
        raise Blocked("no capability") from None
    effective = text.partition("CapEff:")[2].split()[0]
    if int(effective, 16) == 0:
        raise Blocked("no capability")
    return effective


@probe
def exec_of_scratch_setuid(context: Context) -> object:
    """Own a file, set its setuid bit: it must stay powerless and harmless."""
    path = f"{context['scratch']}/id-{os.getpid()}"
    with open(path, "wb") as target, open(context["id_program"], "rb") as source:
        target.write(source.read())
    os.chmod(path, 0o4755)
    os.chown(path, 0, 0)
    return "root-owned setuid file"


@probe
def core_pattern(context: Context) -> object:
    return _open_for_writing("/proc/sys/kernel/core_pattern")


@probe
def modprobe_path(context: Context) -> object:
    return _open_for_writing("/proc/sys/kernel/modprobe")


@probe
def binfmt_misc(context: Context) -> object:
    return _open_for_writing("/proc/sys/fs/binfmt_misc/register")


@probe
def proc_sys_kernel(context: Context) -> object:
    return _open_for_writing("/proc/sys/kernel/randomize_va_space")


@probe
def proc_sys_vm(context: Context) -> object:
    return _open_for_writing("/proc/sys/vm/overcommit_memory")


@probe
def proc_sys_net(context: Context) -> object:
    return _open_for_writing("/proc/sys/net/ipv4/ip_forward")


@probe
def proc_sys_user(context: Context) -> object:
    return _open_for_writing("/proc/sys/user/max_user_namespaces")


@probe
def proc_irq(context: Context) -> object:
    return _open_for_writing("/proc/irq/default_smp_affinity")


@probe
def sysrq_trigger(context: Context) -> object:
    return _open_for_writing("/proc/sysrq-trigger")


@probe
def proc_kcore(context: Context) -> object:
    return _device("/proc/kcore")


@probe
def proc_kmsg(context: Context) -> object:
    return _device("/proc/kmsg")


@probe
def proc_kpageflags(context: Context) -> object:
    return _device("/proc/kpageflags")


@probe
def proc_timer_list(context: Context) -> object:
    if not _read("/proc/timer_list"):
        raise Blocked("empty")
    return "read"


@probe
def proc_sched_debug(context: Context) -> object:
    return _device("/sys/kernel/debug/sched/debug")


@probe
def sys_write(context: Context) -> object:
    return _open_for_writing("/sys/kernel/profiling")


@probe
def sys_uevent_helper(context: Context) -> object:
    return _open_for_writing("/sys/kernel/uevent_helper")


@probe
def sys_power_state(context: Context) -> object:
    return _open_for_writing("/sys/power/state")


@probe
def proc_self_attr(context: Context) -> object:
    return _open_for_writing("/proc/self/attr/current")


@probe
def oom_score_lower(context: Context) -> object:
    """Escape the OOM killer: another process of the node dies instead."""
    with open("/proc/self/oom_score_adj", "r+") as file:
        file.write(file.read().strip())
    return "written"


@probe
def coredump_filter(context: Context) -> object:
    return _open_for_writing("/proc/self/coredump_filter")


@probe
def uid_map_again(context: Context) -> object:
    return _open_for_writing("/proc/self/uid_map")


@probe
def proc_self_mem_of_init(context: Context) -> object:
    os.close(os.open(f"/proc/{context['init_pid']}/mem", os.O_RDWR))
    return "opened"


@probe
def create_in_readonly(context: Context) -> object:
    path = f"{context['readonly']}/new-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
    return path


@probe
def write_readonly(context: Context) -> object:
    return _open_for_writing(f"{context['readonly']}/file")


@probe
def write_readonly_through_dirfd(context: Context) -> object:
    directory = os.open(context["readonly"], os.O_RDONLY)
    os.close(os.open("file", os.O_RDWR, dir_fd=directory))
    return "opened"


@probe
def reopen_readonly_fd_for_writing(context: Context) -> object:
    fd = os.open(f"{context['readonly']}/file", os.O_RDONLY)
    return _open_for_writing(f"/proc/self/fd/{fd}")


@probe
def truncate_readonly(context: Context) -> object:
    os.truncate(f"{context['readonly']}/file", 4)
    return "truncated"


@probe
def mkdir_in_readonly(context: Context) -> object:
    path = f"{context['readonly']}/dir-{os.getpid()}"
    os.mkdir(path)
    os.rmdir(path)
    return path


@probe
def unlink_in_readonly(context: Context) -> object:
    path = f"{context['readonly']}/unlink-me"
    os.unlink(path)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
    return path


@probe
def rename_in_readonly(context: Context) -> object:
    path = f"{context['readonly']}/unlink-me"
    os.rename(path, path + "x")
    os.rename(path + "x", path)
    return path


@probe
def symlink_in_readonly(context: Context) -> object:
    path = f"{context['readonly']}/sym-{os.getpid()}"
    os.symlink("file", path)
    os.unlink(path)
    return path


@probe
def chmod_readonly(context: Context) -> object:
    os.chmod(f"{context['readonly']}/file", 0o666)
    return "chmod"


@probe
def fchmod_readonly(context: Context) -> object:
    fd = os.open(f"{context['readonly']}/file", os.O_RDONLY)
    os.fchmod(fd, 0o666)
    return "fchmod"


@probe
def utime_readonly(context: Context) -> object:
    os.utime(f"{context['readonly']}/file")
    return "utime"


@probe
def xattr_readonly(context: Context) -> object:
    os.setxattr(f"{context['readonly']}/file", b"user.raysandbox", b"1")
    return "setxattr"


@probe
def fifo_in_readonly(context: Context) -> object:
    """A read-only mount does not stop writes to a FIFO; Landlock does."""
    fd = os.open(f"{context['readonly']}/fifo", os.O_RDWR | os.O_NONBLOCK)
    os.write(fd, b"x")
    os.read(fd, 1)
    return "wrote into a host FIFO"


@probe
def lease_on_readonly(context: Context) -> object:
    """A lease makes the host's own opens of the file wait for seconds."""
    import fcntl

    fd = os.open(f"{context['readonly']}/file", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return "lease"


@probe
def shared_mapping_of_readonly(context: Context) -> object:
    path = f"{context['readonly']}/file"
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 4, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as area:
        area[0:1] = area[0:1]
    return "mapped"


@probe
def proc_self_mem_over_readonly_file(context: Context) -> object:
    """Dirty-COW shape: write a read-only file mapping through /proc/self/mem.

    Outside the mapping is one's own shared writable one; the file changes.
    """
    path = f"{context['readonly']}/file"
    before = _read(path)
    outside = context["side"] == "control"
    fd = os.open(path, os.O_RDWR if outside else os.O_RDONLY)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if outside else 0)
    flags = mmap.MAP_SHARED if outside else mmap.MAP_PRIVATE
    libc.mmap.restype = ctypes.c_void_p
    where = libc.mmap(None, ctypes.c_size_t(4), protection, flags, fd, 0)
    memory = os.open("/proc/self/mem", os.O_RDWR)
    flipped = bytes([before.encode()[0] ^ 1])
    os.pwrite(memory, flipped, where)
    if _read(path) == before:
        raise Blocked("file unchanged")
    os.pwrite(memory, before.encode()[:1], where)
    return "file changed"


@probe
def host_shadow(context: Context) -> object:
    return _read("/etc/shadow")[:1]


@probe
def host_sudoers(context: Context) -> object:
    return _read("/etc/sudoers")[:1]


@probe
def host_machine_id(context: Context) -> object:
    return len(_read("/etc/machine-id"))


@probe
def host_home(context: Context) -> object:
    return _read(context["home_secret"])


@probe
def host_tmp(context: Context) -> object:
    return _read(context["secret"])


@probe
def host_tmp_names(context: Context) -> object:
    names = os.listdir("/tmp")
    if context["secret"].split("/")[2] not in names:
        raise Blocked("not listed")
    return "listed"


@probe
def host_run(context: Context) -> object:
    return sorted(os.listdir("/run"))[:3]


@probe
def host_var(context: Context) -> object:
    return sorted(os.listdir("/var/lib"))[:3]


@probe
def host_boot(context: Context) -> object:
    return os.listdir("/boot")[:1]


@probe
def host_dev_shm(context: Context) -> object:
    return _read(context["shm_file"])


@probe
def service_socket(context: Context) -> object:
    """Docker's way in: a pathname socket that no namespace hides."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(context["run_socket"])
        return client.recv(16).decode()


@probe
def ray_session_file(context: Context) -> object:
    return _read(context["ray_session"] + "/node_ip_address.json")


@probe
def ray_session_socket(context: Context) -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(context["ray_session"] + "/sockets/raylet")
        return client.recv(16).decode()


@probe
def auth_token(context: Context) -> object:
    return _read(context["home"] + "/.ray/auth_token")


@probe
def cgroup_tree(context: Context) -> object:
    return os.listdir("/sys/fs/cgroup")


@probe
def chmod_dev_null(context: Context) -> object:
    """Once a container runtime gave the host's /dev/null away like this."""
    mode = stat.S_IMODE(os.stat("/dev/null").st_mode)
    os.chmod("/dev/null", mode)
    return "chmod"


@probe
def chown_dev_null(context: Context) -> object:
    os.chown("/dev/null", os.getuid(), os.getgid())
    return "chown"


@probe
def replace_dev_null(context: Context) -> object:
    path = f"/dev/raysandbox-{os.getpid()}"
    os.symlink("null", path)
    os.unlink(path)
    return path


@probe
def write_root_directory(context: Context) -> object:
    path = f"/raysandbox-{os.getpid()}"
    os.mkdir(path)
    os.rmdir(path)
    return path


@probe
def write_system_python(context: Context) -> object:
    """Poison what every later jail imports."""
    directory = os.path.dirname(os.__file__)
    path = f"{directory}/raysandbox_{os.getpid()}.py"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)
    return path


@probe
def write_interpreter(context: Context) -> object:
    """Outside: open for append and close; ETXTBSY still means permission."""
    try:
        os.close(os.open(os.path.realpath(sys.executable), os.O_WRONLY))
    except OSError as error:
        if error.errno != 26:
            raise
    return "writable"


@probe
def overmount_with_symlink_scratch(context: Context) -> object:
    """Replace the scratch directory itself by a link to somewhere else."""
    os.rename(context["scratch"], context["scratch"] + "-moved")
    os.rename(context["scratch"] + "-moved", context["scratch"])
    return "renamed"


@probe
def inotify_on_host_file(context: Context) -> object:
    """Watch what the rest of the node does with a file that is not visible."""
    fd = check(libc.inotify_init1(0))
    check(libc.inotify_add_watch(fd, context["secret"].encode(), 0xFFF))
    return "watching"


@probe
def statx_of_host_file(context: Context) -> object:
    return os.stat(context["secret"]).st_size


@probe
def readlink_of_host_link(context: Context) -> object:
    return os.readlink(context["secret_link"])


@probe
def file_size_over_limit(context: Context) -> object:
    """RLIMIT_FSIZE: one byte over limits.file_size."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fd = os.open(f"{context['scratch']}/big-{os.getpid()}", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, context["file_size_bytes"] + 1)
    return "sparse file over the limit"
