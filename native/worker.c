/* raysandbox-worker: put a Ray worker behind the node's wall, then become it.
 *
 * Theory of operation.  Raylet starts this in the interpreter's place.  It never
 * forks and makes no pid namespace: raylet signals the pid that it started, and
 * its group, and would hit others if the worker had another one.  main is the
 * ordered list of steps; every one takes something away.
 *
 *   raysandbox-worker WRAPPER [setup_worker.py] SCRIPT [OPTION]...
 *   raysandbox-worker --plan-fd=N WRAPPER SCRIPT [OPTION]...
 *   raysandbox-worker WRAPPER --refused=LANGUAGE ...
 *
 * The first form is what the kernel makes of WRAPPER, a file that names us in
 * its #! line and has the plan beside it (WRAPPER.plan).  A worker for which
 * something has to be read that a client wrote (a runtime_env, the place to
 * spill objects to) goes through the plan's prelude, a Python program that adds
 * what it understood to the plan and starts us again in the second form.
 *
 * Two ways to the same place.  Root opens everything with the host's rights,
 * builds the root, then takes a host id that no other worker has and a user
 * namespace with that id alone.  Anybody else makes the user namespace first.
 * Either way the worker is uid 1000 of a user namespace with one id, holds no
 * capability, and can do what an ordinary user can: make jails.
 *
 * Landlock holds for ports and signals alone here: a domain that governs files
 * forbids mount(2), which jails are made of.  Their own domain governs files.
 */
#define _GNU_SOURCE
#include "group.h"
#include "jail.h"
#include "plan.h"
#include "root.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_COPIES = 16, MAX_LOGS = 16, COPY_BYTES = 1 << 20 };

struct copy {
    const char *target;
    unsigned mode;
    uint8_t *bytes;
    size_t length;
};

struct log_file {
    char target[PATH_MAX];
    int mount_fd;
};

struct worker {
    struct plan plan;
    struct binds binds;
    int root;        /* real root starts us */
    uid_t uid;       /* on the host */
    unsigned inside; /* how the worker sees itself */
    char **arguments;
    const char *worker_id, *type;
    struct worker_groups groups;
    int group_mounts[MAX_GROUPS];
    struct copy copies[MAX_COPIES];
    size_t copy_count;
    struct log_file logs[MAX_LOGS];
    size_t log_count;
    int streams[3];
};

/* The value of "<name>=..." among the arguments, or NULL. */
static const char *
option(char **arguments, const char *name)
{
    size_t length = strlen(name);

    for (; *arguments != NULL; arguments++)
        if (strncmp(*arguments, name, length) == 0 && (*arguments)[length] == '=')
            return *arguments + length + 1;
    return NULL;
}

static int
open_plan(char **argv)
{
    char path[PATH_MAX];

    if (argv[1] == NULL || argv[2] == NULL) {
        errno = EINVAL;
        rs_die("arguments", "need WRAPPER SCRIPT [OPTION]...");
    }
    if (strncmp(argv[1], "--plan-fd=", 10) == 0)
        return atoi(argv[1] + 10);
    if ((size_t)snprintf(path, sizeof path, "%s.plan", argv[1]) >= sizeof path) {
        errno = ENAMETOOLONG;
        rs_die("plan_open", argv[1]);
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        rs_die("plan_open", path);
    return fd;
}

/* What a client may have written is read by the prelude, not by us. */
static void
run_prelude(const struct worker *worker, char **argv)
{
    const struct record *record;
    size_t count = 0, given = 0;

    while (argv[given] != NULL)
        given++;
    char **command = calloc(worker->plan.count + given + 1, sizeof *command);
    if (command == NULL)
        rs_die("prelude", NULL);
    for (size_t cursor = 0;
         (record = plan_next(&worker->plan, R_PRELUDE, &cursor));)
        command[count++] = (char *)(uintptr_t)field_str(record, 0);
    if (count == 0) {
        errno = EINVAL;
        rs_die("prelude", "the plan has none");
    }
    memcpy(command + count, argv + 1, given * sizeof *argv);
    execv(command[0], command);
    rs_die("exec", command[0]);
}

/* Take the script and its options, and nothing but these. */
static void
take_arguments(struct worker *worker, char **argv)
{
    const struct record *program = plan_one(&worker->plan, R_PROGRAM);

    if (program == NULL || plan_one(&worker->plan, R_USER) == NULL ||
        plan_one(&worker->plan, R_INNER_ID) == NULL) {
        errno = EINVAL;
        rs_die("plan_parse", "no program or no user");
    }
    /* Flags of the interpreter that raylet passes on. */
    char **at = argv;
    while (*at != NULL && (strcmp(*at, "-s") == 0 || strcmp(*at, "-S") == 0))
        at++;
    if (*at == NULL || strcmp(*at, field_str2(program, 0)) != 0) {
        errno = EINVAL;
        rs_die("arguments", "the script is not Ray's worker");
    }
    worker->arguments = argv - 1;
    worker->arguments[0] = (char *)(uintptr_t)field_str(program, 0);
    worker->worker_id = option(at, "--worker-id");
    worker->type = option(at, "--worker-type");
    if (worker->worker_id == NULL ||
        strspn(worker->worker_id, "0123456789abcdef") !=
            strlen(worker->worker_id)) {
        errno = EINVAL;
        rs_die("arguments", "--worker-id");
    }
}

struct holder {
    int32_t pid;
    uint32_t pad;
    uint64_t start;
};

/* Take a host id that no living worker of this machine has.
 *
 * The registry is a table of who holds which id.  It goes round, so that an id
 * rests for long before it is used again; what a dead worker has left behind
 * under its id is gone by then. */
static uid_t
take_id(const struct record *user)
{
    uint32_t first = field_u32(user, 0), count = field_u32(user, 4);
    const char *path = field_str(user, 8);
    struct holder holder;
    uint64_t next = 0;

    if (count == 1)
        return first;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0 || flock(fd, LOCK_EX) != 0)
        rs_die("take_id", path);
    if (pread(fd, &next, sizeof next, 0) != sizeof next)
        next = 0;
    for (uint32_t tried = 0; tried < count; tried++) {
        uint32_t slot = (uint32_t)((next + tried) % count);
        off_t offset = (off_t)(sizeof next + slot * sizeof holder);
        if (pread(fd, &holder, sizeof holder, offset) == sizeof holder &&
            holder.pid > 0 && start_time(holder.pid) == holder.start)
            continue;
        holder = (struct holder){.pid = getpid(), .start = start_time(getpid())};
        next = slot + 1;
        if (pwrite(fd, &holder, sizeof holder, offset) != sizeof holder ||
            pwrite(fd, &next, sizeof next, 0) != sizeof next)
            rs_die("take_id", path);
        close(fd);
        return first + slot;
    }
    errno = EUSERS;
    rs_die("take_id", path);
}

static void
expand(const struct worker *worker, const char *pattern, char *out, size_t size)
{
    const char *job = getenv("RAY_JOB_ID");
    size_t used = 0;

    for (; *pattern != '\0'; pattern++) {
        char text[160] = {*pattern, '\0'};
        if (*pattern == '%') {
            pattern++;
            if (*pattern == 'w')
                snprintf(text, sizeof text, "%s", worker->worker_id);
            else if (*pattern == 'j' && job != NULL && worker->type == NULL &&
                     strspn(job, "0123456789abcdef") == strlen(job))
                snprintf(text, sizeof text, "%s-", job);
            else if (*pattern == 'p')
                snprintf(text, sizeof text, "%d", getpid());
            else if (*pattern == 't')
                snprintf(text, sizeof text, "%s",
                         worker->type == NULL ? "worker" : "io_worker");
            else if (*pattern == 'k') {
                snprintf(text, sizeof text, "%s",
                         worker->type == NULL ? "WORKER" : worker->type);
                for (char *at = text; *at != '\0'; at++)
                    *at = (char)(*at >= 'A' && *at <= 'Z' ? *at + 32 : '_');
            } else
                text[0] = '\0';
        }
        size_t length = strlen(text);
        if (used + length >= size) {
            errno = ENAMETOOLONG;
            rs_die("log", NULL);
        }
        memcpy(out + used, text, length + 1);
        used += length;
    }
}

/* Make the worker's own log files, each bound over its name alone: what Ray
 * reads with root's rights there is never a name that the worker chose. */
static void
open_logs(struct worker *worker)
{
    const struct record *record;
    char path[PATH_MAX];

    for (size_t cursor = 0;
         (record = plan_next(&worker->plan, R_LOG, &cursor));) {
        struct log_file *file = &worker->logs[worker->log_count];
        uint32_t stream = field_u32(record, 0);
        struct stat there;
        if (worker->log_count++ == MAX_LOGS || stream > 2) {
            errno = E2BIG;
            rs_die("log", NULL);
        }
        expand(worker, field_str(record, 4), path, sizeof path);
        expand(worker, field_str2(record, 4), file->target, sizeof file->target);
        int fd = open(path,
                      O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW |
                          O_NONBLOCK | O_NOCTTY,
                      0640);
        if (fd < 0 || fstat(fd, &there) != 0)
            rs_die("log", path);
        if (!S_ISREG(there.st_mode) || there.st_nlink != 1) {
            errno = EINVAL;
            rs_die("log", path);
        }
        if (worker->root && fchown(fd, worker->uid, worker->uid) != 0)
            rs_die("log_owner", path);
        if (stream > 0)
            worker->streams[stream] = fd;
        else
            close(fd);
    }
}

static void
bind_logs(struct worker *worker)
{
    const struct record *record;
    char path[PATH_MAX];
    size_t count = 0;

    for (size_t cursor = 0;
         (record = plan_next(&worker->plan, R_LOG, &cursor));) {
        expand(worker, field_str(record, 4), path, sizeof path);
        worker->logs[count++].mount_fd = bind_open(path, BIND_NO_EXEC);
    }
}

static void
load_copy(struct worker *worker, unsigned mode, const char *source,
          const char *target)
{
    struct copy *copy = &worker->copies[worker->copy_count];

    if (worker->copy_count++ == MAX_COPIES) {
        errno = E2BIG;
        rs_die("copy", target);
    }
    *copy = (struct copy){.target = target, .mode = mode};
    int fd = open(source, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    copy->bytes = malloc(COPY_BYTES);
    if (fd < 0 || copy->bytes == NULL)
        rs_die("copy", source);
    for (;;) {
        ssize_t got = read(fd, copy->bytes + copy->length,
                           COPY_BYTES - copy->length);
        if (got < 0)
            rs_die("copy", source);
        if (got == 0)
            break;
        copy->length += (size_t)got;
    }
    if (copy->length == COPY_BYTES) {
        errno = EFBIG;
        rs_die("copy", source);
    }
    close(fd);
}

/* Secrets: read with the starter's rights, written for this worker alone. */
static void
load_copies(struct worker *worker)
{
    const struct record *record;
    size_t cursor;

    for (cursor = 0; (record = plan_next(&worker->plan, R_COPY, &cursor));)
        load_copy(worker, field_u32(record, 0), field_str(record, 4),
                  field_str2(record, 4));
    for (cursor = 0; (record = plan_next(&worker->plan, R_COPY_ENV, &cursor));) {
        const char *source = getenv(field_str(record, 4));
        if (source != NULL && source[0] != '\0')
            load_copy(worker, field_u32(record, 0), source,
                      field_str2(record, 4));
    }
}

/* The sockets' directory is closed to everybody but root; whoever has a mount
 * of a socket needs no way through the directory. */
static void
open_sockets(const struct worker *worker)
{
    const struct record *record;

    for (size_t cursor = 0;
         worker->root && (record = plan_next(&worker->plan, R_BIND, &cursor));)
        if (field_u32(record, 0) & BIND_SOCKET &&
            chmod(field_str(record, 4), 0666) != 0)
            rs_die("socket_mode", field_str(record, 4));
}

static void
open_mounts(struct worker *worker)
{
    binds_open(&worker->binds, &worker->plan);
    bind_logs(worker);
    for (size_t i = 0; i < worker->groups.count; i++)
        worker->group_mounts[i] =
            bind_open(worker->groups.each[i].path, BIND_NO_EXEC);
}

/* What this worker has and no other: its logs, its groups, its secrets. */
static void
fill_root(int root, void *argument)
{
    struct worker *worker = argument;

    for (size_t i = 0; i < worker->log_count; i++)
        bind_attach(root, worker->logs[i].mount_fd, worker->logs[i].target);
    for (size_t i = 0; i < worker->groups.count; i++)
        bind_attach(root, worker->group_mounts[i],
                    worker->groups.each[i].seen_at);
    for (size_t i = 0; i < worker->copy_count; i++) {
        struct copy *copy = &worker->copies[i];
        int fd = make_file(root, copy->target, 0600);
        if (write(fd, copy->bytes, copy->length) != (ssize_t)copy->length)
            rs_die("copy", copy->target);
        if ((worker->root && fchown(fd, worker->uid, worker->uid) != 0) ||
            fchmod(fd, copy->mode) != 0)
            rs_die("copy_owner", copy->target);
        close(fd);
        explicit_bzero(copy->bytes, copy->length);
        free(copy->bytes);
    }
}

static void
map_one_id(const struct worker *worker, gid_t gid)
{
    char text[64];

    rs_write_map(AT_FDCWD, "/proc/self/setgroups", "deny");
    snprintf(text, sizeof text, "%u %u 1", worker->inside, worker->uid);
    rs_write_map(AT_FDCWD, "/proc/self/uid_map", text);
    snprintf(text, sizeof text, "%u %u 1", worker->inside, gid);
    rs_write_map(AT_FDCWD, "/proc/self/gid_map", text);
}

static void
enter_namespaces(struct worker *worker)
{
    int flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
    const struct record *hostname = plan_one(&worker->plan, R_HOSTNAME);
    gid_t gid = getegid();

    if (worker->root)
        open_mounts(worker);
    if (unshare(worker->root ? flags : flags | CLONE_NEWUSER) != 0)
        rs_die("unshare", NULL);
    groups_enter_leaf(&worker->groups);
    if (!worker->root) {
        map_one_id(worker, gid);
        open_mounts(worker);
    }
    if (hostname != NULL && sethostname(field_str(hostname, 0),
                                        strlen(field_str(hostname, 0))) != 0)
        rs_die("sethostname", field_str(hostname, 0));
}

/* From root to an id of the worker's own, and to a namespace with that one. */
static void
become_user(const struct worker *worker)
{
    if (!worker->root)
        return;
    if (setgroups(0, NULL) != 0)
        rs_die("setgroups", NULL);
    if (setresgid(worker->uid, worker->uid, worker->uid) != 0 ||
        setresuid(worker->uid, worker->uid, worker->uid) != 0)
        rs_die("setresuid", NULL);
    /* The change made /proc/self root's; the maps are written there. */
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0)
        rs_die("dumpable", NULL);
    if (unshare(CLONE_NEWUSER) != 0)
        rs_die("unshare_user", NULL);
    map_one_id(worker, worker->uid);
}

/* Only 0, 1 and 2, and these are the worker's own: raylet's log files and a
 * pipe are open in every worker otherwise. */
static void
own_streams(struct worker *worker)
{
    int none[1];

    worker->streams[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (int stream = 0; stream < 3; stream++)
        if (worker->streams[stream] <= 2 ||
            dup2(worker->streams[stream], stream) != stream)
            rs_die("streams", NULL);
    close_other_fds(none, 0);
}

static int
is_passed(const struct plan *plan, const char *variable)
{
    const struct record *record;
    size_t length = strcspn(variable, "=");

    for (size_t cursor = 0; (record = plan_next(plan, R_ENV_PASS, &cursor));) {
        const char *pattern = field_str(record, 0);
        size_t prefix = strlen(pattern);
        if (prefix > 0 && pattern[prefix - 1] == '*'
                ? strncmp(variable, pattern, prefix - 1) == 0
                : length == prefix && strncmp(variable, pattern, length) == 0)
            return 1;
    }
    return 0;
}

/* Whether a variable's value is set by the plan, whatever it is now. */
static int
is_set_by_plan(const struct plan *plan, const char *variable)
{
    static const enum record_type TYPES[] = {R_ENV, R_COPY_ENV};
    size_t length = strcspn(variable, "=");

    for (int i = 0; i < 2; i++) {
        const struct record *record;
        for (size_t cursor = 0; (record = plan_next(plan, TYPES[i], &cursor));) {
            const char *name = field_str(record, i == 0 ? 0 : 4);
            if (strncmp(name, variable, length) == 0 &&
                (name[length] == '=' || name[length] == '\0'))
                return 1;
        }
    }
    return 0;
}

/* From lists: of ours what the plan passes, then what the plan says. */
static char **
environment(const struct plan *plan)
{
    const struct record *record;
    size_t count = 0, have = 0, cursor;

    while (environ[have] != NULL)
        have++;
    char **made = calloc(have + plan->count + 1, sizeof *made);
    if (made == NULL)
        rs_die("environment", NULL);
    for (size_t i = 0; i < have; i++)
        if (is_passed(plan, environ[i]) && !is_set_by_plan(plan, environ[i]))
            made[count++] = environ[i];
    for (cursor = 0; (record = plan_next(plan, R_COPY_ENV, &cursor));) {
        const char *name = field_str(record, 4), *source = getenv(name);
        if (source == NULL || source[0] == '\0')
            continue;
        if (asprintf(&made[count++], "%s=%s", name, field_str2(record, 4)) < 0)
            rs_die("environment", NULL);
    }
    for (cursor = 0; (record = plan_next(plan, R_ENV, &cursor));)
        if (strchr(field_str(record, 0), '=') != NULL) /* else it is taken out */
            made[count++] = (char *)(uintptr_t)field_str(record, 0);
    return made;
}

int
main(int argc, char **argv)
{
    struct worker worker = {.root = geteuid() == 0};
    (void)argc;

    reset_signals();
    umask(077);
    int plan_fd = open_plan(argv), kept[] = {plan_fd};
    close_other_fds(kept, 1);
    plan_read(&worker.plan, plan_fd);
    if (strncmp(argv[2], "--refused=", 10) == 0) {
        errno = EPERM;
        rs_die("language", "the node's policy has no workers in this language");
    }
    int complete = strncmp(argv[1], "--plan-fd=", 10) == 0;
    if (!complete && (strstr(argv[2], "setup_worker.py") != NULL ||
                      option(argv + 2, "--worker-type") != NULL ||
                      option(argv + 2, "--worker-preload-modules") != NULL))
        run_prelude(&worker, argv);
    take_arguments(&worker, argv + (complete ? 3 : 2));

    const struct record *user = plan_one(&worker.plan, R_USER), *record;
    worker.uid = worker.root ? take_id(user) : geteuid();
    worker.inside = field_u32(plan_one(&worker.plan, R_INNER_ID), 0);
    umask(022); /* of the groups and logs */
    groups_enter(&worker.groups, &worker.plan, worker.uid);
    open_logs(&worker);
    load_copies(&worker);
    open_sockets(&worker);
    enter_namespaces(&worker);
    root_enter(&worker.plan, &worker.binds,
               &(struct root_options){
                   .proc_options = "hidepid=2",
                   .owner = worker.root ? worker.uid : worker.inside,
                   .fill = fill_root,
                   .argument = &worker,
               });
    become_user(&worker);
    set_rlimits(&worker.plan);
    for (size_t cursor = 0; (record = plan_next(&worker.plan, R_CHDIR, &cursor));)
        if (chdir(field_str(record, 0)) != 0)
            rs_die("chdir", field_str(record, 0));
    own_streams(&worker);
    char **variables = environment(&worker.plan);
    umask(077);
    drop_capabilities();
    restrict_landlock(&worker.plan);
    install_filter(&worker.plan);
    execve(worker.arguments[0], worker.arguments, variables);
    rs_die("exec", worker.arguments[0]);
}
