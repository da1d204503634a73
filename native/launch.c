/* raysandbox-launch: put a command, or the zygote, behind the walls of a plan.
 *
 * Theory of operation.  Two processes:
 *
 *   monitor   stays outside, in the caller's namespaces and with its ids.  It
 *             opens what must be opened with the caller's rights, writes the
 *             id maps, then only waits: for the inside to end, for the life
 *             pipe to close (its owner died), for the wall time to run out.
 *             Whatever happens first, it kills the inside and removes cgroups.
 *             For a zygote it is not its owner's child (see leave_owner).
 *   init      pid 1 of the new pid namespace.  For "run" it raises all walls,
 *             forks the command and reaps; for "zygote" it builds the root and
 *             becomes the zygote, which raises the inner walls for each jail.
 *             A short-lived child makes the network namespace meanwhile.
 *
 * When init dies the kernel kills everything in its pid namespace, and init
 * dies with the monitor (PR_SET_PDEATHSIG): nothing can stay behind.
 *
 *   raysandbox-launch --plan-fd=N [--status-fd=N] [--life-fd=N] [--keep-fd=N]...
 *                     [--zygote] [--linger] -- PROGRAM [ARGUMENT]...
 *
 * With --linger the monitor says "ended" and keeps the cgroups until its owner
 * has read from them what was used, and closes the life pipe.
 *
 * Exit status: the command's; 128+N if signal N ended it; 124 if the wall time
 * ran out; 125 if a step of the set-up failed (nothing was run).
 */
#define _GNU_SOURCE
#include "jail.h"
#include "plan.h"
#include "root.h"
#include "step.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_TIMEOUT = 124, MAX_KEEP = 16, MAX_CGROUPS = 16 };

struct options {
    int plan_fd, life_fd, keep_count;
    int keep_fds[MAX_KEEP + 2];
    int zygote, linger;
    char **command;
};

struct launch {
    struct options options;
    struct plan plan;
    struct binds binds;
    int binds_by_monitor; /* real root opened them before the user namespace */
    int sync[2];          /* init's id maps are ready; hung up: monitor died */
    int network_fd;       /* what make_network made, once it has */
    int proc_fd;
    int cgroup_fds[MAX_CGROUPS];
    int cgroup_count;
};

/* If argument is "<name>=<number>", store the number and return 1. */
static int
number_option(const char *argument, const char *name, int *value)
{
    size_t length = strlen(name);
    char *end;

    if (strncmp(argument, name, length) != 0 || argument[length] != '=')
        return 0;
    long parsed = strtol(argument + length + 1, &end, 10);
    if (argument[length + 1] == '\0' || *end != '\0' || parsed < 0 ||
        parsed > INT_MAX) {
        errno = EINVAL;
        rs_die("arguments", argument);
    }
    *value = (int)parsed;
    return 1;
}

static void
parse_arguments(struct options *options, char **argv)
{
    char **at = argv + 1;
    int keep;

    options->plan_fd = options->life_fd = -1;
    for (; *at != NULL && strcmp(*at, "--") != 0; at++) {
        if (strcmp(*at, "--zygote") == 0)
            options->zygote = 1;
        else if (strcmp(*at, "--linger") == 0)
            options->linger = 1;
        else if (number_option(*at, "--plan-fd", &options->plan_fd) ||
                 number_option(*at, "--status-fd", &rs_status_fd) ||
                 number_option(*at, "--life-fd", &options->life_fd))
            continue;
        else if (options->keep_count < MAX_KEEP &&
                 number_option(*at, "--keep-fd", &keep))
            options->keep_fds[options->keep_count++] = keep;
        else {
            errno = EINVAL;
            rs_die("arguments", *at);
        }
    }
    if (*at == NULL || at[1] == NULL || options->plan_fd < 0) {
        errno = EINVAL;
        rs_die("arguments", "need --plan-fd=N -- PROGRAM [ARGUMENT]...");
    }
    options->command = at + 1;
}

/* Open the files through which the inside joins its cgroups.
 *
 * Version 1's cgroup.procs waits for an RCU grace period, 10 ms and more; a
 * thread that moves itself by its tasks file does not, and the inside has one
 * thread.  Version 2 has no tasks. */
static void
open_cgroups(struct launch *launch)
{
    const struct record *record;
    char path[PATH_MAX];

    for (size_t cursor = 0;
         (record = plan_next(&launch->plan, R_CGROUP_JOIN, &cursor));) {
        const char *directory = field_str(record, 0);
        if (launch->cgroup_count == MAX_CGROUPS ||
            strlen(directory) + sizeof "/cgroup.procs" > sizeof path) {
            errno = E2BIG;
            rs_die("cgroup_open", NULL);
        }
        snprintf(path, sizeof path, "%s/tasks", directory);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT) {
            snprintf(path, sizeof path, "%s/cgroup.procs", directory);
            fd = open(path, O_WRONLY | O_CLOEXEC);
        }
        if (fd < 0)
            rs_die("cgroup_open", path);
        launch->cgroup_fds[launch->cgroup_count++] = fd;
    }
}

static void
execute(const struct launch *launch)
{
    const struct record *record;
    char **environment = calloc(launch->plan.count + 1, sizeof *environment);
    size_t count = 0;

    if (environment == NULL)
        rs_die("environment", NULL);
    for (size_t cursor = 0;
         (record = plan_next(&launch->plan, R_ENV, &cursor));)
        environment[count++] = (char *)(uintptr_t)field_str(record, 0);
    environ = environment;
    execvp(launch->options.command[0], launch->options.command);
    rs_die("exec", launch->options.command[0]);
}

/* The change of ids cleared the parent-death signal for a while; if the monitor
 * died just then, the pipe that it holds open says so. */
static void
check_monitor_alive(const struct launch *launch)
{
    struct pollfd monitor = {.fd = launch->sync[0], .events = POLLIN};

    if (poll(&monitor, 1, 0) != 0) {
        errno = ESRCH;
        rs_die("monitor", "died during set-up");
    }
    close(launch->sync[0]);
}

/* Make the network namespace, if there is to be one, beside us.
 *
 * It takes as long as all the rest of the root (0.3 ms and more) and nothing of
 * the rest needs it: another processor has it ready when join_network asks. */
static pid_t
make_network(struct launch *launch)
{
    const struct record *namespaces = plan_one(&launch->plan, R_NAMESPACES);

    if (!(field_u32(namespaces, 0) & CLONE_NEWNET))
        return 0;
    /* A place in the descriptor table, which the two share. */
    launch->network_fd = fcntl(launch->proc_fd, F_DUPFD_CLOEXEC, 3);
    if (launch->network_fd < 0)
        rs_die("network_place", NULL);
    pid_t pid = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL,
                               NULL);
    if (pid < 0)
        rs_die("network_fork", NULL);
    if (pid > 0)
        return pid;
    if (unshare(CLONE_NEWNET) != 0)
        rs_die("unshare_network", NULL);
    int fd = openat(launch->proc_fd, "self/ns/net", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        rs_die("open_network", NULL);
    if (dup3(fd, launch->network_fd, O_CLOEXEC) < 0)
        rs_die("network_place", NULL);
    close(fd);
    _exit(0);
}

static void
join_network(const struct launch *launch, pid_t maker)
{
    int status;

    if (maker == 0)
        return;
    if (waitpid(maker, &status, 0) != maker)
        rs_die("network_wait", NULL);
    if (status != 0)
        _exit(EXIT_SETUP); /* it has said why */
    if (setns(launch->network_fd, CLONE_NEWNET) != 0)
        rs_die("join_network", NULL);
    close(launch->network_fd);
}

/* Pid 1 of "run": reap until the command ends, then take all down with us. */
static _Noreturn void
reap(pid_t command)
{
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, 0);
        if (pid < 0 && errno != EINTR)
            rs_die("wait", NULL);
        if (pid != command)
            continue;
        if (WIFEXITED(status)) {
            rs_report("exit %d\n", WEXITSTATUS(status));
            _exit(WEXITSTATUS(status));
        }
        if (WIFSIGNALED(status)) {
            rs_report("signal %d\n", WTERMSIG(status));
            _exit(128 + WTERMSIG(status));
        }
    }
}

static _Noreturn void
init(struct launch *launch)
{
    struct options *options = &launch->options;
    const struct record *hostname = plan_one(&launch->plan, R_HOSTNAME);
    const struct record *idmap = plan_one(&launch->plan, R_IDMAP);
    char go;

    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
        rs_die("pdeathsig", NULL);
    close(launch->sync[1]);
    pid_t network = make_network(launch);
    if (read(launch->sync[0], &go, 1) != 1) {
        errno = ESRCH;
        rs_die("id_maps", "the monitor did not write them");
    }
    setsid();
    if (field_u32(idmap, 4) > 1 && setgroups(0, NULL) != 0)
        rs_die("setgroups", NULL);
    if (setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0)
        rs_die("setresuid", NULL);
    if (hostname != NULL && sethostname(field_str(hostname, 0),
                                        strlen(field_str(hostname, 0))) != 0)
        rs_die("sethostname", field_str(hostname, 0));
    if (!launch->binds_by_monitor)
        binds_open(&launch->binds, &launch->plan);
    reset_signals();

    if (options->zygote) {
        root_enter(&launch->plan, &launch->binds, &(struct root_options){0});
        join_network(launch, network);
        if (rs_status_fd >= 0) {
            fcntl(rs_status_fd, F_SETFD, FD_CLOEXEC);
            options->keep_fds[options->keep_count++] = rs_status_fd;
        }
        options->keep_fds[options->keep_count++] = launch->sync[0];
        close_other_fds(options->keep_fds, options->keep_count);
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
            rs_die("no_new_privs", NULL);
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0)
            rs_die("pdeathsig", NULL);
        check_monitor_alive(launch);
        execute(launch);
    }

    root_enter(&launch->plan, &launch->binds,
               &(struct root_options){.read_only_proc = 1});
    join_network(launch, network);
    if (rs_status_fd >= 0)
        options->keep_fds[options->keep_count++] = rs_status_fd;
    options->keep_fds[options->keep_count++] = launch->sync[0];
    struct jail_entry entry = {
        .plan = &launch->plan,
        .proc_fd = launch->proc_fd,
        .slot = field_u32(idmap, 4) > 1 ? 1 : 0,
        .cgroup_fds = launch->cgroup_fds,
        .cgroup_count = launch->cgroup_count,
        .keep_fds = options->keep_fds,
        .keep_count = options->keep_count,
    };
    jail_enter(&entry);
    check_monitor_alive(launch);

    /* It shares our memory until it has become the command: all that it does
     * before is not ours to lose. */
    pid_t command = vfork();
    if (command < 0)
        rs_die("fork", NULL);
    if (command == 0) {
        if (rs_status_fd >= 0)
            fcntl(rs_status_fd, F_SETFD, FD_CLOEXEC);
        execute(launch);
    }
    for (int i = 0; i < options->keep_count; i++)
        if (options->keep_fds[i] != rs_status_fd &&
            options->keep_fds[i] != launch->sync[0])
            close(options->keep_fds[i]);
    reap(command);
}

static void
write_id_map(pid_t pid, const char *name, const char *text)
{
    char path[64];

    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    rs_write_map(AT_FDCWD, path, text);
}

static void
write_id_maps(const struct plan *plan, pid_t pid)
{
    const struct record *idmap = plan_one(plan, R_IDMAP);
    uint32_t first = field_u32(idmap, 0), count = field_u32(idmap, 4);
    char text[64];

    if (count == 1)
        write_id_map(pid, "setgroups", "deny");
    snprintf(text, sizeof text, "0 %u %u", first, count);
    write_id_map(pid, "uid_map", text);
    if (count == 1)
        snprintf(text, sizeof text, "0 %u 1", getegid());
    write_id_map(pid, "gid_map", text);
}

/* Remove the groups below a directory whose names start with a prefix, and the
 * directory too if it is ours (.../raysandbox) and nobody else's groups are in
 * it; the kernel empties a group a moment after its last process died. */
static void
remove_cgroups(const char *directory, const char *prefix)
{
    for (int attempt = 0; attempt < 200; attempt++) {
        int left = 0;
        DIR *dir = opendir(directory);
        struct dirent *entry;
        if (dir == NULL)
            return;
        while ((entry = readdir(dir)) != NULL) {
            if (entry->d_type != DT_DIR ||
                strncmp(entry->d_name, prefix, strlen(prefix)) != 0)
                continue;
            if (unlinkat(dirfd(dir), entry->d_name, AT_REMOVEDIR) != 0 &&
                errno == EBUSY)
                left = 1;
        }
        closedir(dir);
        if (!left) {
            const char *name = strrchr(directory, '/');
            if (name != NULL && strcmp(name, "/raysandbox") == 0)
                rmdir(directory);
            return;
        }
        nanosleep(&(struct timespec){.tv_nsec = 5 * 1000 * 1000}, NULL);
    }
}

static int64_t
now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Wait for the first of: init ends, the life pipe closes, a signal asks us to
 * stop, the wall time is over.  Returns our exit status. */
static int
watch(const struct launch *launch, pid_t pid, int pid_fd, int signal_fd)
{
    const struct record *wall = plan_one(&launch->plan, R_WALL_TIME);
    int64_t deadline = wall ? now_ms() + (int64_t)field_u64(wall, 0) : -1;
    struct pollfd fds[3] = {{.fd = pid_fd, .events = POLLIN},
                            {.fd = launch->options.life_fd, .events = POLLIN},
                            {.fd = signal_fd, .events = POLLIN}};
    int status, outcome = -1;

    while (outcome < 0) {
        int64_t left = deadline < 0 ? -1 : deadline - now_ms();
        if (deadline >= 0 && left <= 0) {
            rs_report("timeout\n");
            outcome = EXIT_TIMEOUT;
            break;
        }
        if (poll(fds, 3, left > INT_MAX ? INT_MAX : (int)left) < 0) {
            if (errno == EINTR)
                continue;
            break;
        }
        if (fds[0].revents)
            break;
        if (fds[1].revents)
            outcome = 128 + SIGHUP;
        if (fds[2].revents) {
            struct signalfd_siginfo info;
            outcome = 128 + SIGTERM;
            if (read(signal_fd, &info, sizeof info) == sizeof info)
                outcome = 128 + (int)info.ssi_signo;
        }
    }
    if (outcome >= 0)
        syscall(SYS_pidfd_send_signal, pid_fd, SIGKILL, NULL, 0);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            rs_die("wait", NULL);
    if (outcome >= 0)
        return outcome;
    if (WIFSIGNALED(status)) {
        rs_report("signal %d\n", WTERMSIG(status));
        return 128 + WTERMSIG(status);
    }
    return WEXITSTATUS(status);
}

/* The mounts and the inside's descriptors are not the monitor's business; the
 * lock on the host ids, and whatever else its owner passed, is. */
static void
close_unneeded(const struct launch *launch)
{
    for (size_t i = 0; launch->binds_by_monitor && i < launch->binds.count; i++)
        close(launch->binds.fds[i]);
    for (int i = 0; i < launch->options.keep_count; i++)
        close(launch->options.keep_fds[i]);
}

/* Become nobody's child and leave the group: a Ray worker kills its children as
 * it exits, and raylet the worker's group, but somebody must clean up after.
 * The life pipe is what binds us to our owner. */
static void
leave_owner(void)
{
    pid_t pid = fork();

    if (pid < 0)
        rs_die("fork", NULL);
    if (pid > 0)
        _exit(0);
    setsid();
}

int
main(int argc, char **argv)
{
    struct launch launch = {0};
    const struct record *record;
    sigset_t stop;
    (void)argc;

    parse_arguments(&launch.options, argv);
    plan_read(&launch.plan, launch.options.plan_fd);
    close(launch.options.plan_fd);
    const struct record *namespaces = plan_one(&launch.plan, R_NAMESPACES);
    if (namespaces == NULL || plan_one(&launch.plan, R_IDMAP) == NULL) {
        errno = EINVAL;
        rs_die("plan_parse", "no namespaces or no id map");
    }
    /* Without these three nothing else holds, whatever the plan says. */
    uint32_t flags = field_u32(namespaces, 0) | CLONE_NEWUSER | CLONE_NEWPID |
                     CLONE_NEWNS;

    if (launch.options.zygote)
        leave_owner();
    launch.proc_fd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (launch.proc_fd < 0)
        rs_die("open_proc", NULL);
    launch.binds_by_monitor = geteuid() == 0;
    if (launch.binds_by_monitor)
        binds_open(&launch.binds, &launch.plan);
    open_cgroups(&launch);
    if (pipe2(launch.sync, O_CLOEXEC) != 0)
        rs_die("pipe", NULL);
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGHUP);
    if (sigprocmask(SIG_BLOCK, &stop, NULL) != 0)
        rs_die("sigprocmask", NULL);
    int signal_fd = signalfd(-1, &stop, SFD_CLOEXEC);
    if (signal_fd < 0)
        rs_die("signalfd", NULL);

    int pid_fd = -1;
    pid_t pid = (pid_t)syscall(SYS_clone,
                               (flags & ~(uint32_t)CLONE_NEWNET) | CLONE_PIDFD |
                                   SIGCHLD,
                               NULL, &pid_fd, NULL, NULL);
    if (pid < 0)
        rs_die("clone", "new namespaces");
    if (pid == 0) {
        close(signal_fd);
        init(&launch);
    }

    /* Our owner may be dead when we report: that must not keep us from cleaning. */
    signal(SIGPIPE, SIG_IGN);
    close(launch.sync[0]);
    write_id_maps(&launch.plan, pid);
    if (write(launch.sync[1], "g", 1) != 1)
        rs_die("id_maps", NULL);
    close_unneeded(&launch);
    rs_report("started %d\n", pid);

    int outcome = watch(&launch, pid, pid_fd, signal_fd);
    if (launch.options.zygote)
        rs_report("exit %d\n", outcome);
    if (launch.options.linger && launch.options.life_fd >= 0) {
        struct pollfd owner = {.fd = launch.options.life_fd, .events = POLLIN};
        rs_report("ended\n");
        while (poll(&owner, 1, -1) < 0 && errno == EINTR)
            ;
    }
    for (size_t cursor = 0;
         (record = plan_next(&launch.plan, R_CGROUP_CLEAN, &cursor));)
        remove_cgroups(field_str(record, 0), field_str2(record, 0));
    return outcome;
}
