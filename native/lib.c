/* libraysandbox.so: what the zygote calls through ctypes around each fork.
 *
 * The zygote keeps one plan, one descriptor of its own pid namespace and one
 * of its own writable /proc for its whole life. */
#define _GNU_SOURCE
#include "jail.h"
#include "plan.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct plan plan;
static int proc_fd = -1, pid_ns_fd = -1;

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
    pid_ns_fd = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    return proc_fd < 0 || pid_ns_fd < 0 ? errno : 0;
}

/* The next fork makes pid 1 of a new pid namespace.  0, or errno. */
int
rs_fork_begin(void)
{
    return unshare(CLONE_NEWPID) == 0 ? 0 : errno;
}

/* The kernel allows that once; going back to our own namespace re-arms it. */
int
rs_fork_end(void)
{
    return setns(pid_ns_fd, CLONE_NEWPID) == 0 ? 0 : errno;
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
