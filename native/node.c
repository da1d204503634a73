/* raysandbox-node: become raylet, and leave somebody behind who cleans up.
 *
 *   raysandbox-node PLAN RAYLET [ARGUMENT]...
 *
 * Theory of operation.  A worker can't remove its own cgroup and files, and
 * nobody else is there when raylet is killed.  So before this process becomes
 * raylet (same pid: whoever started us watches it) it forks a keeper, which is
 * nobody's child.  The keeper removes what workers that have ended leave, and
 * bounds what workers write into their logs; when raylet ends, its workers have a
 * few seconds to notice, then it kills what is left, removes all and ends: at
 * once, where nothing is left. */
#define _GNU_SOURCE
#include "group.h"
#include "jail.h"
#include "litter.h"
#include "logs.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    ROUND_MS = 250,
    SWEEP_ROUNDS = 4,    /* from one look at groups to the next */
    LITTER_ROUNDS = 120, /* and at files that are left */
    LOOK_SHARE = 10,     /* times as long as a look at logs took there is none */
    STARTS_S = 120,      /* that a worker may need until it locks its file */
    GRACE_MS = 5000,
    END_MS = 30000,
    STEP_MS = 100,
};

/* `ray stop` ends what has a name of Ray's in its arguments, and raylet's have
 * all of them: the keeper would end before its work begins. */
static void
forget(char **arguments)
{
    for (; *arguments != NULL; arguments++)
        memset(*arguments, 0, strlen(*arguments));
}

static _Noreturn void
keep(const struct plan *plan, pid_t raylet, int raylet_fd, char **command)
{
    struct pollfd end = {.fd = raylet_fd, .events = POLLIN};
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), kept[] = {raylet_fd};

    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        rs_die("null", NULL);
    close_other_fds(kept, 1);
    reset_signals();
    /* Of a service manager that ends all at once: raylet's end is ours. */
    signal(SIGTERM, SIG_IGN);
    prctl(PR_SET_NAME, "raysandbox-node", 0, 0, 0);
    forget(command);
    if (chdir("/") != 0)
        rs_die("chdir", "/");
    long pause_ms = 0;
    for (int rounds = 0; poll(&end, 1, ROUND_MS) <= 0; rounds++) {
        if (rounds % SWEEP_ROUNDS == 0)
            groups_sweep(plan, raylet, 0);
        if (rounds % LITTER_ROUNDS == 0)
            litter_sweep(plan, STARTS_S);
        if ((pause_ms -= ROUND_MS) <= 0)
            pause_ms = LOOK_SHARE * logs_bound(plan);
    }
    for (int waited = 0; waited < END_MS; waited += STEP_MS) {
        if (groups_sweep(plan, raylet, waited >= GRACE_MS) == 0)
            break;
        nanosleep(&(struct timespec){.tv_nsec = STEP_MS * 1000000L}, NULL);
    }
    litter_sweep(plan, 0);
    logs_bound(plan);
    groups_remove_bases(plan);
    _exit(0);
}

int
main(int argc, char **argv)
{
    struct plan plan;

    if (argc < 3) {
        errno = EINVAL;
        rs_die("arguments", "need PLAN RAYLET [ARGUMENT]...");
    }
    int plan_fd = open(argv[1], O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (plan_fd < 0)
        rs_die("plan_open", argv[1]);
    plan_read(&plan, plan_fd);
    close(plan_fd);
    pid_t raylet = getpid();
    char pid[16];
    int raylet_fd = (int)syscall(SYS_pidfd_open, raylet, 0);
    if (raylet_fd < 0)
        rs_die("pidfd_open", NULL);
    pid_t child = fork();
    if (child < 0)
        rs_die("fork", NULL);
    if (child == 0) {
        setsid();
        if (fork() == 0)
            keep(&plan, raylet, raylet_fd, argv + 2);
        _exit(0);
    }
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    close(raylet_fd);
    snprintf(pid, sizeof pid, "%d", raylet);
    if (setenv(RAYLET_VARIABLE, pid, 1) != 0)
        rs_die("setenv", NULL);
    execv(argv[2], argv + 2);
    rs_die("exec", argv[2]);
}
