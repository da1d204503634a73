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

/* What the child says when it is behind its walls. */
#define READY "ready\n"

enum { MAX_CGROUP_FDS = 16 };

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

/* One jail: as struct _Spawn in raysandbox/native.py. */
struct spawn {
    uint32_t slot; /* which of the plan's mapped ids; 0 if it maps one */
    int32_t call_fd, stdout_fd, stderr_fd;
    int32_t cgroup_dir_fd; /* version 2 group that it is born in, or -1 */
    int32_t cgroup_count;
    int32_t cgroup_fds[MAX_CGROUP_FDS]; /* files through which it joins others */
    /* Of the interpreter; PyOS_BeforeFork, _AfterFork_Parent, _AfterFork_Child. */
    void (*before)(void);
    void (*in_parent)(void);
    void (*in_child)(void);
    /* Answers: to the parent alone. */
    int32_t pid_fd, notify_fd; /* -1 where the plan's filter notifies nobody */
    char report[1024];         /* the step that failed, as rs_report has it */
};

/* Fork pid 1 of a new pid namespace, born in the spawn's version 2 group if it
 * has one.  As fork(2). */
static pid_t
clone_jail(struct spawn *spawn)
{
    struct clone_args args = {
        .flags = CLONE_NEWPID | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID |
                 CLONE_PIDFD |
                 (spawn->cgroup_dir_fd >= 0 ? CLONE_INTO_CGROUP : 0),
        .pidfd = (uint64_t)(uintptr_t)&spawn->pid_fd,
        .child_tid = (uint64_t)(uintptr_t)tid_address,
        .exit_signal = SIGCHLD,
        .cgroup = spawn->cgroup_dir_fd >= 0 ? (unsigned)spawn->cgroup_dir_fd : 0U,
    };
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* In the child: raise every wall or die.  On the way out, tell the parent
 * that the jail is ready, with the notification descriptor if there is one;
 * a failed step was reported on the same socket.  Closes report_fd. */
static void
enter(const struct spawn *spawn, int report_fd)
{
    int keep[] = {spawn->call_fd, report_fd};

    rs_status_fd = report_fd;
    if (dup2(spawn->stdout_fd, STDOUT_FILENO) < 0 ||
        dup2(spawn->stderr_fd, STDERR_FILENO) < 0)
        rs_die("streams", NULL);
    struct jail_entry entry = {
        .plan = &plan,
        .proc_fd = proc_fd,
        .slot = spawn->slot,
        .cgroup_fds = spawn->cgroup_fds,
        .cgroup_count = spawn->cgroup_count,
        .keep_fds = keep,
        .keep_count = 2,
    };
    int listener = jail_enter(&entry);

    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    char ready[] = READY;
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

/* Wait for the child's word; 0 when it is behind its walls. */
static int
hear(struct spawn *spawn, int report_fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = spawn->report,
                         .iov_len = sizeof spawn->report - 1};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t got;

    do
        got = recvmsg(report_fd, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    spawn->report[got > 0 ? got : 0] = '\0';
    struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header != NULL && header->cmsg_type == SCM_RIGHTS)
        memcpy(&spawn->notify_fd, CMSG_DATA(header), sizeof spawn->notify_fd);
    return strcmp(spawn->report, READY) == 0 ? 0 : -1;
}

/* Fork a jail; return when all its walls are up: 0 in it, its pid in the parent.
 * On failure the child is gone and the parent gets -errno, or -EPROTO when the
 * spawn's report says which step it was.  The caller must have one thread.
 *
 * The jail is behind its walls before its interpreter runs again: each page that
 * is written to after a fork is a copy, and the interpreter writes to many. */
pid_t
rs_spawn(struct spawn *spawn)
{
    int pair[2];

    spawn->pid_fd = spawn->notify_fd = -1;
    spawn->report[0] = '\0';
    if (spawn->cgroup_count < 0 || spawn->cgroup_count > MAX_CGROUP_FDS)
        return -E2BIG;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    spawn->before();
    pid_t pid = clone_jail(spawn);
    int error = errno;
    if (pid == 0) {
        enter(spawn, pair[1]);
        spawn->in_child();
        return 0;
    }
    spawn->in_parent();
    close(pair[1]);
    if (pid > 0 && hear(spawn, pair[0]) != 0) {
        close(spawn->pid_fd);
        if (spawn->notify_fd >= 0)
            close(spawn->notify_fd);
        waitpid(pid, NULL, 0);
        pid = -1;
        error = EPROTO;
    }
    close(pair[0]);
    return pid > 0 ? pid : -error;
}
