/* Theory of operation.
 *
 * The caller is single-threaded, alone in a new pid namespace, and holds all
 * capabilities in the zygote's user namespace (never in the host's).  Each
 * step below takes something away; none gives anything back.  The order
 * matters: mounts need the capabilities, the id maps need a writable /proc,
 * Landlock must see the final mounts, and the filter comes last because it
 * forbids what the other steps do. */
#define _GNU_SOURCE
#include "jail.h"
#include "root.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From linux/landlock.h of 6.18; older headers lack the later fields, and an
 * older kernel accepts them as long as they are zero. */
struct landlock_ruleset {
    uint64_t handled_access_fs;
    uint64_t handled_access_net;
    uint64_t scoped;
};
struct landlock_path_rule {
    uint64_t allowed_access;
    int32_t parent_fd;
} __attribute__((packed));
struct landlock_port_rule {
    uint64_t allowed_access;
    uint64_t port;
};
enum { LANDLOCK_RULE_PATH = 1, LANDLOCK_RULE_PORT = 2 };
/* Rights that make sense on a file; the others are refused there. */
#define LANDLOCK_FILE_RIGHTS                                                   \
    (1ULL << 0 | 1ULL << 1 | 1ULL << 2 | 1ULL << 14 | 1ULL << 15)

static void
join_cgroups(const struct jail_entry *entry)
{
    for (int i = 0; i < entry->cgroup_count; i++)
        if (write(entry->cgroup_fds[i], "0", 1) != 1)
            rs_die("cgroup_join", NULL);
}

/* Bind the scratch's own tmp over a shared place such as /tmp.
 *
 * Ray keeps working directories and environments below /tmp, and /tmp must be
 * the jail's own: what the plan bound there is carried over by a second bind. */
static void
bind_tmp(const struct plan *plan, const char *scratch, unsigned slot)
{
    const struct record *tmp = plan_one(plan, R_TMP), *record;
    char own[PATH_MAX], target[PATH_MAX];

    if (tmp == NULL)
        return;
    const char *shared = field_str(tmp, 0);
    if ((size_t)snprintf(own, sizeof own, "%s/tmp", scratch) >= sizeof own) {
        errno = ENAMETOOLONG;
        rs_die("tmp", scratch);
    }
    if (mkdir(own, 0700) != 0 || chown(own, slot, slot) != 0 ||
        chmod(own, 01777) != 0)
        rs_die("tmp", own);
    int own_fd = open(own, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (own_fd < 0)
        rs_die("tmp", own);
    for (size_t cursor = 0; (record = plan_next(plan, R_CARRY, &cursor));) {
        const char *path = field_str(record, 0);
        const char *below = path + strlen(shared);
        struct stat there;
        if (strncmp(path, shared, strlen(shared)) != 0 || *below != '/' ||
            (size_t)snprintf(target, sizeof target, "%s%s", own, below) >=
                sizeof target) {
            errno = EINVAL;
            rs_die("carry", path);
        }
        if (stat(path, &there) != 0)
            rs_die("carry", path);
        if (S_ISDIR(there.st_mode))
            make_dirs(own_fd, below, 0755);
        else if (make_parent_dirs(own_fd, below),
                 mknodat(own_fd, below + 1, S_IFREG | 0444, 0) != 0)
            rs_die("carry", path);
        if (mount(path, target, NULL, MS_BIND | MS_REC, NULL) != 0)
            rs_die("carry", path);
    }
    close(own_fd);
    if (mount(own, shared, NULL, MS_BIND | MS_REC, NULL) != 0)
        rs_die("tmp", shared);
}

static void
mount_private_parts(const struct plan *plan, int own_mounts, unsigned slot)
{
    const struct record *record;
    size_t cursor;

    /* Over the zygote's; a command's own is there already. */
    for (cursor = 0; own_mounts && (record = plan_next(plan, R_PROC, &cursor));)
        if (mount("proc", field_str(record, 0), "proc",
                  MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
            rs_die("mount_proc", field_str(record, 0));
    for (cursor = 0; (record = plan_next(plan, R_MASK, &cursor));) {
        const char *path = field_str(record, 0);
        if (mount("/.hidden/file", path, NULL, MS_BIND, NULL) == 0)
            continue;
        if (errno == ENOENT && access(path, F_OK) != 0 && errno == ENOENT)
            continue; /* this kernel does not have it */
        if (mount("/.hidden/dir", path, NULL, MS_BIND, NULL) != 0)
            rs_die("mask", path);
    }
    for (cursor = 0; (record = plan_next(plan, R_SCRATCH, &cursor));) {
        char options[128];
        snprintf(options, sizeof options,
                 "size=%llu,nr_inodes=%llu,mode=0700,uid=%u,gid=%u",
                 (unsigned long long)field_u64(record, 0),
                 (unsigned long long)field_u64(record, 8), slot, slot);
        if (mount("scratch", field_str(record, 16), "tmpfs",
                  MS_NOSUID | MS_NODEV, options) != 0)
            rs_die("mount_scratch", field_str(record, 16));
        bind_tmp(plan, field_str(record, 16), slot);
    }
}

void
set_rlimits(const struct plan *plan)
{
    const struct record *record;

    for (size_t cursor = 0; (record = plan_next(plan, R_RLIMIT, &cursor));) {
        struct rlimit limit = {.rlim_cur = field_u64(record, 4),
                               .rlim_max = field_u64(record, 12)};
        if (setrlimit((int)field_u32(record, 0), &limit) != 0)
            rs_die("setrlimit", NULL);
    }
}

/* Become the jail's own host id, then nobody's root: a nested user namespace
 * maps that one id only.  All mounts made so far become locked in it, and no
 * capability that could be won there reaches them. */
static void
become_user(const struct jail_entry *entry)
{
    const struct record *inner = plan_one(entry->plan, R_INNER_ID);
    const struct record *idmap = plan_one(entry->plan, R_IDMAP);
    char text[64];

    if (inner == NULL || idmap == NULL) {
        errno = EINVAL;
        rs_die("ids", NULL);
    }
    if (entry->slot >= field_u32(idmap, 4)) {
        errno = ERANGE;
        rs_die("ids", NULL);
    }
    if (entry->slot != 0 && setgroups(0, NULL) != 0)
        rs_die("setgroups", NULL);
    if (setresgid(entry->slot, entry->slot, entry->slot) != 0 ||
        setresuid(entry->slot, entry->slot, entry->slot) != 0)
        rs_die("setresuid", NULL);
    /* Changing ids made us undumpable, and /proc/self root's. */
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0)
        rs_die("dumpable", NULL);
    if (unshare(CLONE_NEWUSER) != 0)
        rs_die("unshare_user", NULL);
    rs_write_map(entry->proc_fd, "self/setgroups", "deny");
    snprintf(text, sizeof text, "%u %u 1", field_u32(inner, 0), entry->slot);
    rs_write_map(entry->proc_fd, "self/uid_map", text);
    snprintf(text, sizeof text, "%u %u 1", field_u32(inner, 4), entry->slot);
    rs_write_map(entry->proc_fd, "self/gid_map", text);
}

static void
make_scratch_dirs(const struct plan *plan)
{
    const struct record *record;
    size_t cursor;

    for (cursor = 0; (record = plan_next(plan, R_SUBDIR, &cursor));) {
        const char *path = field_str(record, 4);
        if (mkdir(path, 0700) != 0 || chmod(path, field_u32(record, 0)) != 0)
            rs_die("scratch_dir", path);
    }
    for (cursor = 0; (record = plan_next(plan, R_CHDIR, &cursor));)
        if (chdir(field_str(record, 0)) != 0)
            rs_die("chdir", field_str(record, 0));
}

void
drop_capabilities(void)
{
    struct __user_cap_header_struct header = {
        .version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2];
    unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED |
                         SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED |
                         SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                         SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

    for (unsigned long cap = 0; cap < 64; cap++)
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0) {
            if (errno == EINVAL)
                break; /* past the last capability of this kernel */
            rs_die("capbset_drop", NULL);
        }
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0)
        rs_die("ambient_clear", NULL);
    if (prctl(PR_SET_SECUREBITS, bits, 0, 0, 0) != 0)
        rs_die("securebits", NULL);
    memset(none, 0, sizeof none);
    if (syscall(SYS_capset, &header, none) != 0)
        rs_die("capset", NULL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        rs_die("no_new_privs", NULL);
}

void
reset_signals(void)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t none;

    for (int signal_number = 1; signal_number < SIGRTMAX; signal_number++)
        if (signal_number != SIGKILL && signal_number != SIGSTOP)
            sigaction(signal_number, &action, NULL);
    sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) != 0)
        rs_die("sigprocmask", NULL);
}

static int
by_number(const void *left, const void *right)
{
    return *(const int *)left - *(const int *)right;
}

void
close_other_fds(int *keep, int count)
{
    unsigned next = 3;

    qsort(keep, (size_t)count, sizeof *keep, by_number);
    for (int i = 0; i < count; i++) {
        if (keep[i] < (int)next)
            continue;
        if ((unsigned)keep[i] > next &&
            syscall(SYS_close_range, next, (unsigned)keep[i] - 1, 0) != 0)
            rs_die("close_range", NULL);
        next = (unsigned)keep[i] + 1;
    }
    if (syscall(SYS_close_range, next, ~0U, 0) != 0)
        rs_die("close_range", NULL);
}

void
restrict_landlock(const struct plan *plan)
{
    const struct record *record = plan_one(plan, R_LANDLOCK);
    size_t cursor;

    if (record == NULL)
        return; /* the plan's protections say OFF, and why */
    struct landlock_ruleset attr = {
        .handled_access_fs = field_u64(record, 0),
        .handled_access_net = field_u64(record, 8),
        .scoped = field_u64(record, 16),
    };
    int ruleset =
        (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0);
    if (ruleset < 0)
        rs_die("landlock_create_ruleset", NULL);
    for (cursor = 0; (record = plan_next(plan, R_LANDLOCK_PATH, &cursor));) {
        const char *path = field_str(record, 8);
        struct landlock_path_rule rule = {
            .allowed_access = field_u64(record, 0)};
        struct stat there;

        rule.parent_fd = open(path, O_PATH | O_CLOEXEC);
        if (rule.parent_fd < 0 || fstat(rule.parent_fd, &there) != 0)
            rs_die("landlock_open", path);
        if (!S_ISDIR(there.st_mode))
            rule.allowed_access &= LANDLOCK_FILE_RIGHTS;
        if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH, &rule,
                    0) != 0)
            rs_die("landlock_add_path", path);
        close(rule.parent_fd);
    }
    for (cursor = 0; (record = plan_next(plan, R_LANDLOCK_PORT, &cursor));) {
        struct landlock_port_rule rule = {.allowed_access = field_u64(record, 0),
                                          .port = field_u64(record, 8)};
        if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PORT, &rule,
                    0) != 0)
            rs_die("landlock_add_port", NULL);
    }
    for (cursor = 0; (record = plan_next(plan, R_LANDLOCK_PORTS, &cursor));) {
        struct landlock_port_rule rule = {.allowed_access = field_u64(record, 0)};
        uint64_t last = field_u32(record, 12);
        for (rule.port = field_u32(record, 8); rule.port <= last; rule.port++)
            if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PORT,
                        &rule, 0) != 0)
                rs_die("landlock_add_port", NULL);
    }
    if (syscall(SYS_landlock_restrict_self, ruleset, 0) != 0)
        rs_die("landlock_restrict_self", NULL);
    close(ruleset);
}

int
install_filter(const struct plan *plan)
{
    const struct record *record = plan_one(plan, R_SECCOMP);
    size_t length;

    if (record == NULL)
        return -1; /* the plan's protections say OFF, and why */
    uint32_t flags = field_u32(record, 0);
    const uint8_t *bytes = field_rest(record, 4, &length);
    if (length == 0 || length % sizeof(struct sock_filter) != 0 ||
        length / sizeof(struct sock_filter) > 4096) {
        errno = EINVAL;
        rs_die("seccomp_program", NULL);
    }
    struct sock_fprog program = {
        .len = (unsigned short)(length / sizeof(struct sock_filter)),
        .filter = malloc(length),
    };
    if (program.filter == NULL)
        rs_die("seccomp_program", NULL);
    memcpy(program.filter, bytes, length);
    long fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (fd < 0)
        rs_die("seccomp", NULL);
    free(program.filter);
    return flags & SECCOMP_FILTER_FLAG_NEW_LISTENER ? (int)fd : -1;
}

int
jail_enter(struct jail_entry *entry)
{
    const struct record *namespaces = plan_one(entry->plan, R_NAMESPACES);

    if (namespaces == NULL) {
        errno = EINVAL;
        rs_die("namespaces", NULL);
    }
    join_cgroups(entry);
    if (unshare((int)field_u32(namespaces, 4)) != 0)
        rs_die("unshare", NULL);
    mount_private_parts(entry->plan, (field_u32(namespaces, 4) & CLONE_NEWNS) != 0,
                        entry->slot);
    set_rlimits(entry->plan);
    become_user(entry);
    make_scratch_dirs(entry->plan);
    drop_capabilities();
    close_other_fds(entry->keep_fds, entry->keep_count);
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        rs_die("undumpable", NULL);
    /* After the last change of credentials, which would clear it. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        rs_die("pdeathsig", NULL);
    restrict_landlock(entry->plan);
    return install_filter(entry->plan);
}
