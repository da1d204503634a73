/* libraysandbox.so: what the zygote calls through ctypes for each fork.
 *
 * The zygote keeps one plan and a descriptor of its own writable /proc for its
 * whole life. */
#define _GNU_SOURCE
#include "jail.h"
#include "plan.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static struct plan plan;
static int proc_fd = -1;
static int *tid_address; /* where libc keeps the calling thread's id */

/* Find where libc caches this thread's id.
 *
 * A jail must be born in its cgroup and pid namespace (joining a version 2
 * group later costs an RCU grace period, 10 ms and more), which takes clone3;
 * but only libc's own fork tells the child's libc its new thread id, and a
 * stale one breaks pthread calls.  The kernel writes it instead, if told where.
 * The place is not public, so it is looked for, and proved: after a fork by
 * libc it must hold the child's id, in exactly one candidate. */
static int
find_tid_address(void)
{
    char *self = (char *)(uintptr_t)pthread_self();
    enum { WORDS = 512 };
    unsigned char verdict[WORDS];
    int pipe_fds[2], found = 0, status;

    if (pipe2(pipe_fds, O_CLOEXEC) != 0)
        return errno;
    pid_t parent = (pid_t)syscall(SYS_gettid);
    for (int i = 0; i < WORDS; i++)
        verdict[i] = ((int *)(void *)self)[i] == parent;
    pid_t child = fork();
    if (child < 0)
        return errno;
    if (child == 0) {
        pid_t own = (pid_t)syscall(SYS_gettid);
        for (int i = 0; i < WORDS; i++)
            verdict[i] = verdict[i] && ((int *)(void *)self)[i] == own;
        ssize_t sent = write(pipe_fds[1], verdict, sizeof verdict);
        _exit(sent == sizeof verdict ? 0 : 1);
    }
    close(pipe_fds[1]);
    ssize_t got = read(pipe_fds[0], verdict, sizeof verdict);
    close(pipe_fds[0]);
    if (waitpid(child, &status, 0) != child || got != sizeof verdict)
        return ECHILD;
    for (int i = 0; i < WORDS; i++)
        if (verdict[i] && found++ == 0)
            tid_address = &((int *)(void *)self)[i];
    return found == 1 ? 0 : ENOTSUP;
}

/* Take a plan for the life of this process.  0, or errno. */
int
rs_load_plan(const uint8_t *bytes, size_t length)
{
    uint8_t *copy = malloc(length ? length : 1);

    if (copy == NULL)
        return ENOMEM;
    memcpy(copy, bytes, length);
    if (plan_parse(&plan, copy, length) != 0)
        return errno;
    proc_fd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    return proc_fd < 0 ? errno : find_tid_address();
}

/* Fork pid 1 of a new pid namespace, born in the cgroup (version 2) whose
 * directory is cgroup_fd if that is not -1.  As fork(2); -errno on failure.
 * The caller must have one thread, and hold Python's fork hooks around this. */
pid_t
rs_clone(int cgroup_fd)
{
    struct clone_args args = {
        .flags = CLONE_NEWPID | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID |
                 (cgroup_fd >= 0 ? CLONE_INTO_CGROUP : 0),
        .child_tid = (uint64_t)(uintptr_t)tid_address,
        .exit_signal = SIGCHLD,
        .cgroup = cgroup_fd >= 0 ? (unsigned)cgroup_fd : 0U,
    };
    long pid = syscall(SYS_clone3, &args, sizeof args);
    return pid < 0 ? -errno : (pid_t)pid;
}

/* In the child: raise every wall or die.  On the way out, tell the parent
 * that the jail is ready, with the notification descriptor if there is one;
 * a failed step was reported on the same socket.  Closes report_fd. */
void
rs_enter_jail(unsigned slot, const int *cgroup_fds, int cgroup_count,
              const int *keep_fds, int keep_count, int report_fd)
{
    int keep[64];

    rs_status_fd = report_fd;
    if (keep_count < 0 || keep_count > 62) {
        errno = E2BIG;
        rs_die("keep_fds", NULL);
    }
    memcpy(keep, keep_fds, (size_t)keep_count * sizeof *keep);
    keep[keep_count] = report_fd;

    struct jail_entry entry = {
        .plan = &plan,
        .proc_fd = proc_fd,
        .slot = slot,
        .cgroup_fds = cgroup_fds,
        .cgroup_count = cgroup_count,
        .keep_fds = keep,
        .keep_count = keep_count + 1,
    };
    int listener = jail_enter(&entry);

    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    char ready[] = "ready\n";
    struct iovec part = {.iov_base = ready, .iov_len = sizeof ready - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (listener >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &listener, sizeof listener);
    }
    if (sendmsg(report_fd, &message, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        rs_die("ready", NULL);
    if (listener >= 0)
        close(listener);
    close(report_fd);
    rs_status_fd = -1;
}
