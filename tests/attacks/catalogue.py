"""The catalogue of attacks: what is tried, what must happen, what stops it.

Each row is one attack.  ``control`` says where the positive control runs (see
``probes/driver.py``) and must end in ``ok``; ``jail`` is what the same probe
must meet inside: an errno by name, ``blocked`` (nothing failed and nothing was
won) or a signal.  What depends on the host is a table: the first key that
holds wins, ``""`` always holds::

    {"landlock<3": "ok", "": "EACCES"}

``lacks`` names control outcomes that mean "this host has no such thing": the
attack is then skipped with that reason, or fails where
``RAYSANDBOX_TEST_REQUIRE`` names ``attack:ID`` or ``all``.

Rows of kind ``own`` have a jail of their own and a test function named after
them (``resources.fork_bomb`` is ``test_fork_bomb``); their expectation is in
words.

``python -m tests.attacks.catalogue [--json]`` prints it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

__all__ = ["ATTACKS", "Attack", "by_id", "choose", "of_surface"]

Expectation = str | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        id: ``surface.name``; also the probe's name.
        control: Where the control runs: ``same``, ``user``, ``root``,
            ``mounts``, ``userns``; ``own`` for a test function of its own.
        jail: What must happen inside.
        wall: What stops it first.
        rule: The rule, and the bug it guards against.
        lacks: Control outcomes that mean that the host has no such thing.
    """

    id: str
    control: str
    jail: Expectation
    wall: str
    rule: str
    lacks: tuple[str, ...] = ()

    @property
    def surface(self) -> str:
        """The part before the dot."""
        return self.id.partition(".")[0]


MOUNTS = "mount namespace"
PIDS = "pid namespace"
NET = "network namespace"
FILTER = "seccomp"
NO_CAPS = "no capabilities"
LANDLOCK = "landlock"
CGROUP = "cgroup"
READ_ONLY = "read-only mounts"
DUMPABLE = "undumpable init"
FDS = "closed descriptors"
RLIMIT = "rlimit"
SCRATCH = "scratch tmpfs"

# A socket family that the jail may not have: refused before the namespace sees it.
_FAMILY = ("EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT")

# One line of code per attack reads as a table; a formatter would make six.
# fmt: off
_ROWS: tuple[tuple[object, ...], ...] = (
    # --- files: leaving the root
    ("files.symlink_out", "same", "ENOENT", MOUNTS,
     "A link in the scratch resolves inside the jail's root only."),
    ("files.symlink_in_directory_part", "same", "ENOENT", MOUNTS,
     "A link as a middle component leads nowhere outside; prefix checks miss it."),
    ("files.dotdot", "same", "ENOENT", MOUNTS,
     "Climbing by .. ends at the jail's root."),
    ("files.proc_self_root", "same", "ENOENT", MOUNTS,
     "/proc/self/root is the jail's root, not the host's."),
    ("files.proc_thread_self_root", "same", "ENOENT", MOUNTS,
     "The thread's magic link is the same root."),
    ("files.proc_init_root", "same", "EACCES", DUMPABLE,
     "Pid 1's root link is closed: it may still see what the task may not."),
    ("files.proc_init_cwd", "same", "EACCES", DUMPABLE,
     "Pid 1's working directory is closed."),
    ("files.proc_init_exe", "same", "EACCES", DUMPABLE,
     "Pid 1's executable is closed (runc's CVE-2019-5736 rewrote it)."),
    ("files.proc_init_fd", "same", "EACCES", DUMPABLE,
     "Pid 1's descriptors (status pipe, monitor's pipe) are closed."),
    ("files.proc_init_map_files", "same", "EACCES", DUMPABLE,
     "Pid 1's mapped files are closed."),
    ("files.proc_host_process_fd", "same", "ENOENT", PIDS,
     "No /proc entry of a host process exists."),
    ("files.magic_link_to_deleted_host_file", "same", "ENOENT", PIDS,
     "A deleted file of the host can't be revived through a magic link."),
    ("files.o_path_then_openat", "same", "ENOENT", MOUNTS,
     "An O_PATH descriptor of / gives no way above it."),
    ("files.name_to_handle", "same", "EPERM", FILTER,
     "No file handles: they name inodes past every mount namespace.", "ENOTSUP"),
    ("files.open_by_handle", "root", "EPERM", FILTER,
     "No open by handle (the Shocker escape from early Docker)."),
    ("files.chroot", "userns", "EPERM", FILTER, "No chroot."),
    ("files.chroot_escape", "userns", "EPERM", FILTER,
     "No chroot with a directory kept open, the classic way out."),
    ("files.hardlink_of_readonly_file", "same", "EROFS", READ_ONLY,
     "A read-only file gets no second, writable name."),
    # --- files: mounts and devices
    ("files.mknod_character_device", "root", "EPERM", FILTER,
     "No device nodes: a node is a door to the driver."),
    ("files.mknod_block_device", "root", "EPERM", FILTER,
     "No block nodes: the host's disk under another name."),
    ("files.mount_tmpfs", "userns", "EPERM", FILTER, "No mount."),
    ("files.mount_proc", "userns", "EPERM", FILTER,
     "No second /proc, which would come without masks and writable."),
    ("files.mount_sysfs", "userns", "EPERM", FILTER, "No sysfs."),
    ("files.mount_overlay", "userns", "EPERM", FILTER,
     "No overlay (CVE-2021-3493, CVE-2023-0386 started there).", "ENODEV"),
    ("files.mount_cgroup", "mounts", "EPERM", FILTER, "No cgroup file system.",
     "ENODEV"),
    ("files.bind_over_system", "userns", "EPERM", FILTER,
     "Nothing is bound over the programs that run next."),
    ("files.remount_writable", "userns", "EPERM", FILTER,
     "A read-only bind is not remounted writable."),
    ("files.fsopen", "userns", "EPERM", FILTER, "No mount by the new calls either."),
    ("files.open_tree_clone", "userns", "EPERM", FILTER, "No clone of a mount tree."),
    ("files.open_tree_of_proc", "userns", "EPERM", FILTER,
     "No clone of /proc without the masks on it."),
    ("files.move_mount", "userns", "EPERM", FILTER, "No moving of mounts."),
    ("files.move_mount_reachable", "userns", "EPERM", FILTER,
     "move_mount itself is refused, whatever its arguments."),
    ("files.mount_setattr_writable", "userns", "EPERM", FILTER,
     "The read-only flag is not cleared by mount_setattr."),
    ("files.pivot_root", "userns", "EPERM", FILTER, "No other root."),
    ("files.umount_proc", "userns", "EPERM", FILTER, "No mount is taken away."),
    ("files.umount_mask", "userns", "EPERM", FILTER,
     "The mask over a hidden file is not lifted."),
    ("files.dev_mem", "root", "ENOENT", MOUNTS, "No physical memory.",
     "ENOENT", "EPERM"),
    ("files.dev_kmem", "root", "ENOENT", MOUNTS, "No kernel memory.", "ENOENT"),
    ("files.dev_port", "root", "ENOENT", MOUNTS, "No I/O ports.", "ENOENT", "EPERM"),
    ("files.dev_kmsg", "root", "ENOENT", MOUNTS, "No kernel log device.", "ENOENT"),
    ("files.dev_kvm", "root", "ENOENT", MOUNTS, "No hypervisor device.",
     "ENOENT", "ENODEV", "ENXIO"),
    ("files.dev_fuse", "root", "ENOENT", MOUNTS, "No FUSE device.",
     "ENOENT", "ENODEV", "ENXIO"),
    ("files.dev_loop_control", "root", "ENOENT", MOUNTS, "No loop devices.",
     "ENOENT", "ENODEV", "ENXIO"),
    ("files.dev_console", "root", "ENOENT", MOUNTS, "No console.",
     "ENOENT", "EIO", "ENODEV", "ENXIO"),
    ("files.dev_ptmx", "root", "ENOENT", MOUNTS, "No pseudo terminals.",
     "ENOENT", "EIO"),
    ("files.block_device", "root", "ENOENT", MOUNTS, "No disk.", "ENOENT", "ENXIO"),
    ("files.device_through_readonly_bind", "root", "EACCES", READ_ONLY,
     "A device node in a named directory is dead (nodev)."),
    ("files.chmod_dev_null", "root", "EPERM", "user namespace",
     "A device of the host is not chmodded: a root runtime once gave it away."),
    ("files.chown_dev_null", "root", "EPERM", "user namespace",
     "A device of the host is not chowned."),
    ("files.replace_dev_null", "root", "EROFS", READ_ONLY,
     "No new names in /dev."),
    # --- files: privilege through files
    ("files.setuid_binary", "user", "blocked", "no_new_privs, nosuid",
     "A setuid-root program gives nothing."),
    ("files.file_capabilities", "user", "blocked", "no_new_privs, nosuid",
     "A program with file capabilities gives nothing."),
    ("files.exec_of_scratch_setuid", "root", "EINVAL", "user namespace",
     "No file becomes root's: there is no root id inside."),
    # --- files: the kernel's files
    ("files.core_pattern", "root", "EROFS", READ_ONLY,
     "core_pattern is the kernel's way to run a program as root."),
    ("files.modprobe_path", "root", "EROFS", READ_ONLY,
     "modprobe's path is another.", "ENOENT"),
    ("files.binfmt_misc", "root", "ENOENT", MOUNTS,
     "binfmt_misc hands other programs an interpreter.", "ENOENT"),
    ("files.proc_sys_kernel", "root", "EROFS", READ_ONLY, "No sysctl kernel.*."),
    ("files.proc_sys_vm", "root", "EROFS", READ_ONLY, "No sysctl vm.*."),
    ("files.proc_sys_net", "root", "EROFS", READ_ONLY,
     "No sysctl net.*, though the network namespace would be our own."),
    ("files.proc_sys_user", "root", "EROFS", READ_ONLY, "No sysctl user.*.",
     "EACCES"),
    ("files.proc_irq", "root", "EROFS", READ_ONLY, "No interrupt affinity.",
     "ENOENT", "EIO"),
    ("files.sysrq_trigger", "root", "EACCES", READ_ONLY,
     "sysrq reboots the machine.", "ENOENT"),
    ("files.proc_kcore", "root", "EACCES", MOUNTS, "No kernel memory image.",
     "ENOENT", "EPERM"),
    ("files.proc_kmsg", "root", "EACCES", NO_CAPS, "No kernel log.", "ENOENT"),
    ("files.proc_kpageflags", "root", "EACCES", NO_CAPS, "No page flags.", "ENOENT"),
    ("files.proc_timer_list", "root", "EACCES", MOUNTS,
     "timer_list shows kernel addresses and every process's timers.", "ENOENT"),
    ("files.proc_sched_debug", "root", "ENOENT", MOUNTS, "No debugfs.", "ENOENT"),
    ("files.sys_write", "root", "ENOENT", MOUNTS, "No /sys to write.", "ENOENT"),
    ("files.sys_uevent_helper", "root", "ENOENT", MOUNTS,
     "uevent_helper is run by the kernel as root.", "ENOENT"),
    ("files.sys_power_state", "root", "ENOENT", MOUNTS, "No suspend.", "ENOENT"),
    ("files.proc_self_attr", "root", "EROFS", READ_ONLY,
     "No change of security label.", "ENOENT", "EINVAL"),
    ("files.oom_score_lower", "same", "EROFS", READ_ONLY,
     "The OOM killer can't be sent to somebody else."),
    ("files.coredump_filter", "same", "EROFS", READ_ONLY,
     "/proc/self is read-only too."),
    ("files.uid_map_again", "same", "EROFS", READ_ONLY, "The id map stays."),
    ("files.proc_self_mem_of_init", "same", "EROFS", READ_ONLY,
     "Pid 1's memory is closed."),
    # --- files: what is read-only
    ("files.create_in_readonly", "same", "EROFS", READ_ONLY, "No new file."),
    ("files.write_readonly", "same", "EROFS", READ_ONLY,
     "A world-writable file below a read-only bind is not written."),
    ("files.write_readonly_through_dirfd", "same", "EROFS", READ_ONLY,
     "Nor through a directory descriptor."),
    ("files.reopen_readonly_fd_for_writing", "same", "EROFS", READ_ONLY,
     "Nor by opening /proc/self/fd anew."),
    ("files.truncate_readonly", "same", "EROFS", READ_ONLY, "No truncate."),
    ("files.mkdir_in_readonly", "same", "EROFS", READ_ONLY, "No new directory."),
    ("files.unlink_in_readonly", "same", "EROFS", READ_ONLY, "No unlink."),
    ("files.rename_in_readonly", "same", "EROFS", READ_ONLY, "No rename."),
    ("files.symlink_in_readonly", "same", "EROFS", READ_ONLY, "No new link."),
    ("files.chmod_readonly", "same", "EROFS", READ_ONLY,
     "No chmod (Landlock does not see chmod; the mount does)."),
    ("files.fchmod_readonly", "same", "EROFS", READ_ONLY, "No fchmod."),
    ("files.utime_readonly", "same", "EROFS", READ_ONLY, "No change of times."),
    ("files.xattr_readonly", "same", "EPERM", FILTER,
     "No attributes.", "ENOTSUP"),
    ("files.fifo_in_readonly", "same", "EACCES", LANDLOCK,
     "A FIFO ignores the read-only mount; Landlock does not."),
    ("files.lease_on_readonly", "same", "EPERM", FILTER,
     "No lease: the host's next open of that file would hang for 45 s."),
    ("files.shared_mapping_of_readonly", "same", "EROFS", READ_ONLY,
     "No writable mapping."),
    ("files.proc_self_mem_over_readonly_file", "same", "EROFS", READ_ONLY,
     "Writing a mapping by /proc/self/mem changes a private copy (Dirty COW)."),
    ("files.hidden_file", "same", "EACCES", MOUNTS, "A hidden file is masked."),
    ("files.hidden_dir", "same", "EACCES", MOUNTS, "A hidden directory is masked."),
    ("files.hidden_file_by_bind_parent", "same", "EACCES", MOUNTS,
     "Nor by a descriptor of its directory."),
    ("files.o_path_reopen_of_hidden_dir", "same", "EACCES", MOUNTS,
     "Nor by an O_PATH descriptor opened anew."),
    # --- files: the host's
    ("files.host_shadow", "root", "ENOENT", MOUNTS, "No password hashes.", "ENOENT"),
    ("files.host_sudoers", "root", "ENOENT", MOUNTS, "No sudoers.", "ENOENT"),
    ("files.host_machine_id", "same", "ENOENT", MOUNTS, "No machine id.", "ENOENT"),
    ("files.host_home", "same", "ENOENT", MOUNTS, "No home directories."),
    ("files.host_tmp", "same", "ENOENT", MOUNTS, "The host's /tmp is not there."),
    ("files.host_tmp_names", "same", "blocked", MOUNTS, "Nor are its names."),
    ("files.host_run", "same", "ENOENT", MOUNTS, "No /run."),
    ("files.host_var", "same", "ENOENT", MOUNTS, "No /var/lib.", "ENOENT"),
    ("files.host_boot", "same", "ENOENT", MOUNTS, "No /boot.", "ENOENT"),
    ("files.host_dev_shm", "same", "ENOENT", MOUNTS,
     "No /dev/shm of the host: Ray's object store lies there."),
    ("files.service_socket", "same", "EPERM", FILTER,
     "No service's pathname socket (Docker's): only absence hides one."),
    ("files.ray_session_file", "same", "ENOENT", MOUNTS, "No Ray session files."),
    ("files.ray_session_socket", "same", "EPERM", FILTER, "No raylet socket."),
    ("files.auth_token", "same", "ENOENT", MOUNTS, "No cluster token."),
    ("files.cgroup_tree", "same", "ENOENT", MOUNTS, "No cgroup tree."),
    ("files.write_root_directory", "root", "EROFS", READ_ONLY,
     "The jail's root is read-only."),
    ("files.write_system_python", "root", "EROFS", READ_ONLY,
     "No module is added for later jails to import.", "EROFS"),
    ("files.write_interpreter", "root", "EACCES", "own host user",
     "The interpreter is not rewritten.", "EROFS"),
    ("files.overmount_with_symlink_scratch", "same", "EROFS", READ_ONLY,
     "The scratch itself can't be swapped for a link."),
    ("files.inotify_on_host_file", "same", "ENOENT", MOUNTS,
     "No watching of what can't be seen."),
    ("files.statx_of_host_file", "same", "ENOENT", MOUNTS,
     "Not even existence and size of a host file leak."),
    ("files.readlink_of_host_link", "same", "ENOENT", MOUNTS, "No host link."),
    ("files.file_size_over_limit", "same", "EFBIG", RLIMIT,
     "One byte over limits.file_size is refused, sparse or not."),
    # --- processes
    ("processes.kill_host_process", "same", "ESRCH", PIDS, "No signal to the host."),
    ("processes.kill_host_process_group", "same", "ESRCH", PIDS,
     "No signal to a group of the host."),
    ("processes.kill_init", "same", "blocked", PIDS,
     "Pid 1 ignores signals from inside."),
    ("processes.tgkill_host_thread", "same", "ESRCH", PIDS, "Nor to its threads."),
    ("processes.sigqueue_host_process", "same", "ESRCH", PIDS,
     "Nor with forged signal data."),
    ("processes.pidfd_of_host_process", "same", "ESRCH", PIDS, "No pidfd of it."),
    ("processes.pidfd_from_proc_directory", "same", "blocked", PIDS,
     "A directory of /proc is no stronger pidfd."),
    ("processes.pidfd_getfd_from_init", "same", "EPERM", FILTER,
     "Pid 1's descriptors are not taken."),
    ("processes.pidfd_getfd_from_own_child", "same", "EPERM", FILTER,
     "pidfd_getfd is out altogether."),
    ("processes.ptrace_attach_host", "same", "EPERM", FILTER, "No ptrace of hosts."),
    ("processes.ptrace_attach_init", "same", "EPERM", FILTER, "No ptrace of pid 1."),
    ("processes.ptrace_own_child", "same", "EPERM", FILTER,
     "No ptrace at all: a tracer rewrites calls that the filter has passed."),
    ("processes.ptrace_traceme", "same", "EPERM", FILTER, "Nor asking for it."),
    ("processes.process_vm_readv_own_child", "same", "EPERM", FILTER,
     "No reading of another's memory."),
    ("processes.process_vm_writev_own_child", "same", "EPERM", FILTER,
     "No writing of another's memory."),
    ("processes.process_vm_readv_host", "same", "EPERM", FILTER,
     "Nor of a host process."),
    ("processes.proc_host_environ", "same", "ENOENT", PIDS,
     "No environment of the host: tokens are in there."),
    ("processes.proc_host_cmdline", "same", "ENOENT", PIDS, "No command lines."),
    ("processes.proc_host_mem", "same", "ENOENT", PIDS, "No memory."),
    ("processes.proc_init_environ", "same", "EACCES", DUMPABLE,
     "Pid 1's environment is the launcher's: closed."),
    ("processes.proc_init_maps", "same", "EACCES", DUMPABLE, "Its map is closed."),
    ("processes.proc_init_stack", "same", "EACCES", DUMPABLE,
     "What it waits in is closed."),
    ("processes.proc_lists_host_processes", "same", "blocked", PIDS,
     "/proc lists the jail's processes only."),
    ("processes.setpgid_of_host_process", "same", "ESRCH", PIDS,
     "No moving of host processes between groups."),
    ("processes.getsid_of_host_process", "same", "ESRCH", PIDS, "Nor asking."),
    ("processes.priority_of_host_process", "same", "ESRCH", PIDS,
     "No priority of others."),
    ("processes.priority_of_host_user", "user", "blocked", PIDS,
     "PRIO_USER names a uid that other jails may share."),
    ("processes.affinity_of_host_process", "same", "ESRCH", PIDS, "No affinity."),
    ("processes.realtime_self", "root", "EPERM", NO_CAPS,
     "No real-time class: it starves the node."),
    ("processes.deadline_self", "root", "EPERM", NO_CAPS, "No deadline class.",
     "EBUSY"),
    ("processes.nice_below_start", "root", "EACCES", NO_CAPS, "No higher priority."),
    ("processes.realtime_io", "root", "EPERM", NO_CAPS, "No real-time io."),
    ("processes.prlimit_of_init", "same", "EPERM", FILTER,
     "Pid 1's limits stay."),
    ("processes.prlimit_of_host_process", "same", "EPERM", FILTER,
     "A host process's limits are not read."),
    ("processes.kcmp_with_init", "same", "EPERM", FILTER,
     "No comparing of kernel pointers."),
    ("processes.robust_list_of_init", "same", "EPERM", DUMPABLE,
     "Pid 1's robust list is an address in it."),
    ("processes.async_io_owner_is_host_process", "same", "ESRCH", PIDS,
     "F_SETOWN names no host process."),
    ("processes.timer_signals_host_thread", "same", "EINVAL", PIDS,
     "A timer signals no foreign thread."),
    ("processes.move_pages_of_init", "same", "EPERM", FILTER, "No move_pages.",
     "ENOSYS"),
    ("processes.migrate_pages", "same", "EPERM", FILTER, "No migrate_pages.",
     "ENOSYS"),
    ("processes.process_madvise_own_child", "root", "EPERM", FILTER,
     "No advice on another's memory."),
    ("processes.process_mrelease", "same", "EPERM", FILTER, "No process_mrelease."),
    ("processes.shared_memory_of_host", "same", "EINVAL", "ipc namespace",
     "System V segments of the host have no number here."),
    ("processes.shared_memory_by_key", "same", "ENOENT", "ipc namespace",
     "Nor a key."),
    ("processes.semaphore_of_host", "same", "ENOENT", "ipc namespace",
     "Nor its semaphores."),
    ("processes.message_queue_of_host", "same", "EPERM", FILTER,
     "POSIX queues of the host are not there."),
    ("processes.dumpable_again", "same", "EPERM", FILTER,
     "Making oneself dumpable opens nothing of pid 1."),
    # --- namespaces
    *((f"namespaces.unshare_{name}", "userns", "EPERM", FILTER,
       f"No new {name} namespace.", *lack)
      for name, lack in (
          ("user", ()), ("mount", ()), ("pid", ()), ("network", ()), ("ipc", ()),
          ("uts", ()), ("cgroup", ()), ("time", ("EINVAL",)))),
    ("namespaces.unshare_user_and_mount", "same", "EPERM", FILTER,
     "No capabilities over new namespaces: the start of most kernel exploits."),
    ("namespaces.clone_new_user", "same", "EPERM", FILTER, "Nor by clone."),
    ("namespaces.clone_new_pid", "userns", "EPERM", FILTER, "No pid namespace."),
    ("namespaces.clone_new_network", "userns", "EPERM", FILTER, "No network."),
    ("namespaces.clone_new_mount_user", "same", "EPERM", FILTER, "Nor both."),
    ("namespaces.clone_flags_in_high_half", "same", "EPERM", FILTER,
     "Garbage in the upper half of the flags hides none of the lower."),
    ("namespaces.clone3_new_user", "same", "ENOSYS", FILTER,
     "clone3's flags can't be filtered: it is absent."),
    ("namespaces.clone3_plain", "same", "ENOSYS", FILTER,
     "clone3 says ENOSYS, so that the C library falls back to clone."),
    ("namespaces.setns_init_mount", "root", "EACCES", DUMPABLE,
     "Pid 1's namespaces are not opened."),
    ("namespaces.setns_init_network", "root", "EACCES", DUMPABLE, "None of them."),
    ("namespaces.setns_init_user", "same", "EACCES", DUMPABLE, "Not the user's."),
    ("namespaces.setns_own_uts", "userns", "EPERM", FILTER, "No setns."),
    ("namespaces.setns_by_pidfd", "userns", "EPERM", FILTER, "Nor by pidfd."),
    ("namespaces.parent_of_user_namespace", "same", "EPERM", "user namespace",
     "The way up the namespaces' tree is closed."),
    ("namespaces.parent_of_pid_namespace", "same", "EPERM", "pid namespace",
     "For pid namespaces too."),
    ("namespaces.owner_of_mount_namespace", "root", "EPERM", "user namespace",
     "And from a namespace to its owner."),
    ("namespaces.same_namespaces_as_host", "same", "blocked", "namespaces",
     "No namespace is shared with the host."),
    ("namespaces.set_hostname", "userns", "EPERM", FILTER, "No hostname."),
    ("namespaces.set_domainname", "userns", "EPERM", FILTER, "No domain name."),
    ("namespaces.cgroup_leave", "root", "ENOENT", MOUNTS,
     "The limits' group is not left."),
    ("namespaces.cgroup_raise_pids", "root", "ENOENT", MOUNTS,
     "Limits are not raised.", "ENOENT"),
    ("namespaces.cgroup_release_agent", "root", "ENOENT", MOUNTS,
     "release_agent is run by the kernel as root (CVE-2022-0492).", "ENOENT"),
    ("namespaces.cgroup_notify_on_release", "root", "ENOENT", MOUNTS,
     "Its trigger.", "ENOENT", "EACCES"),
    ("namespaces.cgroup_path_of_host", "root", "blocked", "cgroup namespace",
     "Own cgroup reads as /: names of jobs and containers stay outside."),
    ("namespaces.list_mounts_of_parent", "root", "ENOSYS", FILTER,
     "Mounts of another namespace are not listed.", "ENOSYS"),
    ("namespaces.map_root_in_nested_namespace", "same", "EPERM", FILTER,
     "No nested uid 0."),
    ("namespaces.set_groups", "root", "EPERM", "user namespace",
     "setgroups is denied: dropping a group can win access."),
    # --- network
    ("network.tcp4_loopback", "same", "EPERM", FILTER,
     "No TCP to a listener on the host's loopback (GCS, raylet, dashboard)."),
    ("network.tcp6_loopback", "same", "EPERM", FILTER, "Nor by IPv6.",
     *_FAMILY, "EADDRNOTAVAIL"),
    ("network.udp4_loopback", "same", "EPERM", FILTER, "No UDP."),
    ("network.udp6_loopback", "same", "EPERM", FILTER, "Nor by IPv6.",
     *_FAMILY, "EADDRNOTAVAIL"),
    ("network.tcp4_on_own_address", "same", "EPERM", FILTER,
     "Nor by the node's own address."),
    ("network.tcp_listen", "same", "EPERM", FILTER, "No listening."),
    ("network.loopback_up", "userns", "EPERM", FILTER, "Loopback stays down."),
    ("network.cloud_metadata", "userns", "EPERM", FILTER,
     "The metadata address, which hands out the node's credentials."),
    ("network.raw_socket", "root", "EPERM", FILTER, "No raw socket."),
    ("network.raw6_socket", "root", "EPERM", FILTER, "Nor IPv6's.", *_FAMILY),
    ("network.packet_socket", "root", "EPERM", FILTER, "No packet socket.", *_FAMILY),
    ("network.netlink_route", "same", "EPERM", FILTER, "No netlink."),
    ("network.netlink_sock_diag", "same", "EPERM", FILTER, "No sock_diag.", *_FAMILY),
    ("network.netlink_uevent", "same", "EPERM", FILTER, "No uevents."),
    ("network.netlink_netfilter", "same", "EPERM", FILTER, "No netfilter.", *_FAMILY),
    ("network.netlink_audit", "same", "EPERM", FILTER, "No audit.", *_FAMILY),
    ("network.vsock", "same", "EPERM", FILTER,
     "No way to the hypervisor, which no network namespace covers.", *_FAMILY),
    ("network.af_alg", "same", "EPERM", FILTER, "No kernel crypto.", *_FAMILY),
    ("network.af_xdp", "root", "EPERM", FILTER, "No XDP.", *_FAMILY),
    ("network.af_tipc", "same", "EPERM", FILTER, "No TIPC.", *_FAMILY),
    ("network.af_bluetooth", "root", "EPERM", FILTER, "No Bluetooth.", *_FAMILY),
    ("network.af_can", "root", "EPERM", FILTER, "No CAN.", *_FAMILY),
    ("network.mptcp_socket", "same", "EPERM", FILTER,
     "MPTCP passes Landlock's TCP rules by.", *_FAMILY, "ENOPROTOOPT"),
    ("network.sctp_socket", "same", "EPERM", FILTER, "So does SCTP.", *_FAMILY),
    ("network.socketpair_inet", "same", "EPERM", FILTER, "No pair of it either."),
    ("network.socket_family_in_high_half", "same", "EPERM", FILTER,
     "Garbage in the upper half of the family hides nothing."),
    ("network.abstract_socket_of_host", "same", "EPERM", FILTER,
     "Abstract names of the host are another name space."),
    ("network.abstract_datagram_to_host", "same", "EPERM", FILTER,
     "For datagrams too."),
    ("network.pathname_socket_of_host", "same", "EPERM", FILTER,
     "A pathname socket is hidden by absence alone."),
    ("network.pathname_socket_in_readonly", "same", "EPERM", FILTER,
     "A socket in a read-only bind is not reached, though the mount allows it."),
    ("network.datagram_of_a_pair_to_socket_in_readonly", "same", "EPERM", FILTER,
     "No pair of datagram sockets: each end can send to any name."),
    ("network.descriptors_by_socket_in_readonly", "same", "EPERM", FILTER,
     "No descriptor comes in over such a socket."),
    ("network.descriptors_by_abstract_socket", "same", "EPERM", FILTER,
     "Nor over an abstract one."),
    ("network.io_uring_socket", "same", "EPERM", FILTER,
     "io_uring makes sockets past every filter rule.", "ENOSYS"),
    ("network.interfaces_of_host", "same", "blocked", NET, "Only lo is there."),
    ("network.connections_of_host", "same", "blocked", NET,
     "No table of the host's connections."),
    ("network.unix_sockets_of_host", "same", "blocked", NET,
     "Nor of its unix sockets."),
    ("network.bind_abstract_name", "same", "EPERM", FILTER,
     "No squatting of the host's abstract names."),
    # --- kernel
    *((f"kernel.{name}", control, "EPERM", FILTER, rule, *lack)
      for name, control, rule, *lack in (
          ("bpf", "root", "No bpf maps.", "ENOSYS"),
          ("bpf_program", "root", "No bpf programs.", "ENOSYS"),
          ("perf_event_open", "root", "No perf.", "ENOSYS", "ENOENT", "ENOTSUP"),
          ("userfaultfd", "root", "No userfaultfd.", "ENOSYS"),
          ("io_uring_setup", "root", "No io_uring.", "ENOSYS"),
          ("io_setup", "same", "No old asynchronous io.", "ENOSYS"),
          ("add_key", "same", "No keyrings: keys know no namespace but the uid.",
           "ENOSYS"),
          ("request_key", "same", "Nor searching them.", "ENOSYS"),
          ("keyctl_session", "same", "Nor keyctl.", "ENOSYS"),
          ("keyctl_join_session", "same", "Nor joining a session.", "ENOSYS"),
          ("kexec_load", "root", "No other kernel.", "ENOSYS", "EPERM"),
          ("kexec_file_load", "root", "Nor from a file.", "ENOSYS", "EPERM"),
          ("init_module", "root", "No modules.", "ENOSYS", "EPERM"),
          ("finit_module", "root", "Nor from a file.", "ENOSYS", "EPERM"),
          ("delete_module", "root", "Nor taking one away.", "ENOSYS", "EPERM"),
          ("iopl", "root", "No I/O privilege.", "ENOSYS", "EPERM"),
          ("ioperm", "root", "No port bitmap.", "ENOSYS", "EPERM"),
          ("modify_ldt", "same", "No LDT.", "ENOSYS"),
          ("personality_no_randomize", "same", "ASLR stays on."),
          ("personality_read_implies_exec", "same", "Data stays data."),
          ("personality_linux32", "same", "No other personality."),
          ("personality_high_half", "same",
           "Garbage in the upper half hides nothing."),
          ("seccomp_allow_all_on_top", "root",
           "A permissive filter on top weakens nothing.", "ENOSYS"),
          ("seccomp_listener", "same",
           "No supervisor of the task's own.", "ENOSYS"),
          ("tiocsti", "root", "No typing into the operator's terminal.", "EIO"),
          ("tiocsti_high_half", "root",
           "Nor with garbage in the request (CVE-2019-10063).", "EIO"),
          ("tioclinux", "same", "Nor pasting into a console."),
          ("tiocsctty", "same", "No controlling terminal."),
          ("quotactl", "root", "No quotas.", "ENOSYS"),
          ("swapon", "root", "No swap.", "ENOSYS"),
          ("swapoff", "root", "Nor less of it.", "ENOSYS"),
          ("reboot", "root", "No reboot."),
          ("settimeofday", "root", "No clock."),
          ("clock_settime", "root", "By no name."),
          ("adjtimex", "root", "Nor its speed."),
          ("acct", "root", "No process accounting.", "ENOSYS"),
          ("syslog_read_all", "root", "No kernel log by the call.", "ENOSYS"),
          ("syslog_size", "root", "Nor its size.", "ENOSYS"),
          ("fanotify_init", "root", "No fanotify.", "ENOSYS"),
          ("memfd_secret", "same", "No secret memory.", "ENOSYS"),
          ("vhangup", "root", "No hanging up of terminals."),
          ("lookup_dcookie", "root", "No cookies.", "ENOSYS"),
          ("uselib", "same", "No uselib.", "ENOSYS"),
          ("sysfs_call", "same", "No sysfs call.", "ENOSYS"),
          ("remap_file_pages", "same", "No remap_file_pages."),
          ("vmsplice", "same", "No vmsplice (Dirty Pipe's family)."),
          ("unknown_call", "same", "A number that no table lists is refused."),
          ("prctl_set_mm", "root", "No rewriting of what /proc says.", "EPERM"),
      )),
    ("kernel.dev_userfaultfd", "root", "ENOENT", MOUNTS,
     "Nor userfaultfd by its device.", "ENOENT"),
    ("kernel.mount_query_statmount", "same", "ENOSYS", FILTER,
     "No mount queries: calls newer than the filter look absent.", "ENOSYS"),
    ("kernel.lsm_list", "same", "ENOSYS", FILTER, "No list of security modules.",
     "ENOSYS"),
    ("kernel.negative_call", "same", "SIGSYS", FILTER,
     "The number -1 is in x32's half: killed."),
    ("kernel.x32_getpid", "same", "SIGSYS", FILTER,
     "x32's table has other numbers: killed."),
    ("kernel.x32_execve_number", "same", "SIGSYS", FILTER, "For each of them."),
    ("kernel.int80_getpid", "same", "SIGSYS", FILTER,
     "int 0x80 enters the 32-bit table: killed.", "SIGSEGV", "ENOSYS"),
    ("kernel.int80_socket", "same", "SIGSYS", FILTER,
     "Where the forbidden calls have other numbers.", "SIGSEGV", "ENOSYS"),
    ("kernel.seccomp_strict_mode_off", "same", "blocked", FILTER,
     "The filter stays."),
    ("kernel.landlock_permissive_on_top", "same", "EACCES", LANDLOCK,
     "A permissive ruleset on top lifts nothing.", "ENOSYS", "ENOTSUP"),
    ("kernel.mmap_zero_page", "root", "EPERM", NO_CAPS, "No page at 0."),
    # --- capabilities
    *((f"capabilities.{name}", "root", "blocked", NO_CAPS, f"{rule} is empty.")
      for name, rule in (
          ("effective", "The effective set"), ("permitted", "The permitted set"),
          ("inheritable", "The inheritable set"), ("bounding", "The bounding set"),
          ("ambient", "The ambient set"),
          ("bounding_by_prctl", "The bounding set, asked one by one,"))),
    ("capabilities.capset_raise", "root", "EPERM", NO_CAPS, "None is taken back."),
    ("capabilities.ambient_raise", "root", "EPERM", NO_CAPS, "Not as ambient."),
    ("capabilities.securebits", "root", "EPERM", NO_CAPS,
     "The secure bits stay locked."),
    ("capabilities.new_privileges", "same", "blocked", "no_new_privs",
     "no_new_privs is 1."),
    ("capabilities.clear_no_new_privs", "same", "blocked", "no_new_privs",
     "And stays 1."),
    ("capabilities.setuid_root", "root", "EINVAL", "user namespace",
     "uid 0 does not exist inside."),
    ("capabilities.setresuid_other", "root", "EINVAL", "user namespace",
     "Nor any other."),
    ("capabilities.setuid_to_neighbour", "root", "EINVAL", "user namespace",
     "Nor the next jail's."),
    ("capabilities.setgid_root", "root", "EINVAL", "user namespace", "Nor group 0."),
    ("capabilities.setfsuid_root", "root", "blocked", "user namespace",
     "Nor for files alone."),
    ("capabilities.chown_to_root", "root", "EINVAL", "user namespace",
     "No file is given away."),
    ("capabilities.dac_override", "root", "EACCES", NO_CAPS,
     "File permissions hold."),
    ("capabilities.supplementary_groups", "root", {"user": "ok", "": "blocked"},
     "user namespace",
     "No group of the worker comes along (docker, disk)."),
    ("capabilities.is_host_root", "root", "blocked", "own host user",
     "No id is 0."),
    # --- information
    ("information.environment", "same", "blocked", "environment",
     "No variable of the starter that the profile does not pass."),
    ("information.environment_values", "same", "blocked", "environment",
     "Nor its value on the initial stack."),
    ("information.hostname", "same", "blocked", "uts namespace", "No node name."),
    ("information.proc_sys_hostname", "same", "blocked", "uts namespace",
     "Nor through /proc."),
    ("information.mounts_of_host", "same", "blocked", MOUNTS,
     "The host's mounts are not listed."),
    ("information.kernel_command_line", "same", "EACCES", MOUNTS,
     "The kernel's command line may hold secrets."),
    ("information.kallsyms_addresses", "root", "EACCES", MOUNTS,
     "No kernel addresses.", "ENOENT"),
    ("information.proc_keys", "same", "EACCES", MOUNTS, "No keys listed.", "ENOENT"),
    ("information.proc_key_users", "same", "EACCES", MOUNTS, "Nor users.", "ENOENT"),
    ("information.proc_modules", "same", "EACCES", MOUNTS, "No modules.", "ENOENT"),
    ("information.proc_config", "same", "EACCES", MOUNTS, "No kernel config.",
     "ENOENT"),
    ("information.proc_interrupts", "same", "EACCES", MOUNTS,
     "No interrupt counts (keystroke timing)."),
    ("information.proc_diskstats", "same", "EACCES", MOUNTS, "No disk counts.",
     "ENOENT", "blocked"),
    ("information.proc_swaps", "same", "EACCES", MOUNTS, "No swap devices.",
     "ENOENT"),
    ("information.proc_iomem", "root", "EACCES", MOUNTS, "No memory map.", "ENOENT"),
    ("information.proc_scsi", "same", "EACCES", MOUNTS, "No disks.", "ENOENT"),
    ("information.proc_acpi", "same", "EACCES", MOUNTS, "No ACPI.", "ENOENT"),
    ("information.proc_slabinfo", "root", "EACCES", NO_CAPS, "No slabs.", "ENOENT"),
    ("information.proc_locks", "same", "EACCES", MOUNTS,
     "No locks of others: who waits for one is listed in every pid namespace.",
     "blocked"),
    ("information.proc_vmallocinfo", "root", "EACCES", NO_CAPS, "No vmalloc.",
     "ENOENT"),
    ("information.proc_pagemap_frames", "root", "blocked", NO_CAPS,
     "No physical addresses (Rowhammer)."),
    ("information.sys_devices", "same", "blocked", MOUNTS, "No devices listed."),
    ("information.sys_firmware", "same", "ENOENT", MOUNTS, "No firmware.", "ENOENT"),
    ("information.sys_net", "same", "ENOENT", MOUNTS, "No interfaces in /sys."),
    ("information.sys_debug", "root", "ENOENT", MOUNTS, "No debugfs.", "ENOENT"),
    ("information.sys_security", "same", "ENOENT", MOUNTS, "No securityfs.",
     "ENOENT"),
    ("information.identity_maps", "same", "blocked", "user namespace",
     "One id is mapped, not all."),
    ("information.parent_directory_names", "same", "blocked", MOUNTS,
     "Beside a bind its siblings are not seen."),
    ("information.passwd_of_host", "same", "blocked", MOUNTS, "No host accounts."),
    ("information.login_records", "same", "ENOENT", MOUNTS, "No login records.",
     "ENOENT"),
    ("information.boot_identity", "same", "EACCES", MOUNTS,
     "The node's boot id links jails."),
    ("information.parent_is_outside", "same", "blocked", PIDS,
     "No ancestor outside is named."),
)
# fmt: on


def _attack(row: tuple[object, ...]) -> Attack:
    name, control, jail, wall, rule, *lacks = row
    assert isinstance(jail, str | Mapping)
    return Attack(
        str(name), str(control), jail, str(wall), str(rule), tuple(map(str, lacks))
    )


ATTACKS: tuple[Attack, ...] = tuple(_attack(row) for row in _ROWS)


def by_id(name: str) -> Attack:
    """Return one row."""
    return next(attack for attack in ATTACKS if attack.id == name)


def of_surface(surface: str) -> Iterator[Attack]:
    """Yield the rows of a surface whose probes share a jail."""
    for attack in ATTACKS:
        if attack.surface == surface and attack.control != "own":
            yield attack


def choose(expectation: Expectation, facts: Mapping[str, bool]) -> str:
    """Resolve a table of expectations: the first key that holds."""
    if isinstance(expectation, str):
        return expectation
    return next(value for key, value in expectation.items() if not key or facts[key])


def _main() -> None:
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(attack) for attack in ATTACKS], indent=1))
        return
    for attack in ATTACKS:
        jail = attack.jail
        if not isinstance(jail, str):
            jail = ", ".join(f"{key or 'else'}: {v}" for key, v in jail.items())
        line = f"{attack.id:48} {attack.control:7} {jail:14} {attack.wall:22}"
        print(line, attack.rule)
    print(f"{len(ATTACKS)} attacks")


if __name__ == "__main__":
    _main()
