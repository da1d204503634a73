#define _GNU_SOURCE
#include "group.h"
#include "step.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    JANITOR_MS = 2000, /* for a worker's janitor, from the worker's end */
    FORGET_MS = 60000, /* the end of a worker whose group has long been removed */
    MOST_GONE = 256,   /* workers that have ended, and are still known */
    BASE_ATTEMPTS = 100,
};

unsigned long long
start_time(pid_t pid)
{
    char path[64], text[1024];

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return 0;
    text[length] = '\0';
    /* The command name (field 2) may hold blanks and parentheses. */
    char *at = strrchr(text, ')');
    for (int field = 2; at != NULL && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at == NULL ? 0 : strtoull(at + 1, NULL, 10);
}

static unsigned long long
pid_namespace(void)
{
    struct stat there;
    return stat("/proc/self/ns/pid", &there) == 0
               ? (unsigned long long)there.st_ino
               : 0;
}

/* Put a value into a control file by one write; -1 with errno. */
static int
put(const char *directory, const char *file, const void *value, size_t length)
{
    char path[PATH_MAX];

    snprintf(path, sizeof path, "%s/%s", directory, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t written = write(fd, value, length);
    int error = errno;
    close(fd);
    errno = error;
    return written == (ssize_t)length ? 0 : -1;
}

static void
own(const char *directory, const char *file, uid_t owner)
{
    char path[PATH_MAX];

    snprintf(path, sizeof path, "%s/%s", directory, file);
    if (lchown(path, owner, owner) != 0)
        rs_die("cgroup_owner", path);
}

/* Version 2: what a group passes on to those below it has to be said. */
static void
pass_on_controllers(const char *directory)
{
    static const char *const NAMES[] = {"+memory", "+pids", "+cpu", "+io"};

    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (put(directory, "cgroup.subtree_control", NAMES[i],
                strlen(NAMES[i])) != 0 &&
            errno != ENOENT && errno != EINVAL)
            rs_die("cgroup_controllers", directory);
}

/* Who started us, or should have: raylet may be gone by now. */
static pid_t
raylet_pid(void)
{
    const char *told = getenv(RAYLET_VARIABLE);

    return told != NULL ? (pid_t)strtol(told, NULL, 10) : getppid();
}

/* What all nodes share goes with the last group in it, and may be made again.
 * A node's own has the node's limits: without it no worker starts. */
static int
may_be_made_again(const char *base)
{
    const char *last = strrchr(base, '/');

    return last != NULL && strcmp(last + 1, "raysandbox") == 0;
}

/* A group that is there before raylet ends is removed by raylet's keeper.  One
 * that is made later may be too late for it: so its maker looks afterwards. */
static void
leave_without_raylet(const struct worker_groups *groups, pid_t raylet)
{
    if (getppid() == raylet)
        return;
    for (size_t i = 0; i < groups->count; i++) {
        rmdir(groups->each[i].path);
        if (may_be_made_again(groups->each[i].base))
            rmdir(groups->each[i].base);
    }
    errno = ESRCH;
    rs_die("cgroup_create", "raylet has ended");
}

/* Others make what all share at the same time, and remove it when it is empty. */
static int
make_in(const char *base, const char *path)
{
    for (int attempt = 0; attempt < BASE_ATTEMPTS; attempt++) {
        if (mkdir(path, 0755) == 0)
            return 0;
        if (errno != ENOENT || !may_be_made_again(base) ||
            (mkdir(base, 0755) != 0 && errno != EEXIST))
            return -1;
    }
    return -1;
}

static void
make_groups(struct worker_groups *groups, const struct plan *plan)
{
    const struct record *record;
    unsigned long long start = start_time(getpid());
    pid_t raylet = raylet_pid();

    groups->count = 0;
    for (size_t cursor = 0;
         (record = plan_next(plan, R_CGROUP_BASE, &cursor));) {
        const char *base = field_str(record, 4);
        struct worker_group *group = &groups->each[groups->count];
        if (groups->count == MAX_GROUPS ||
            (size_t)snprintf(group->path, sizeof group->path,
                             "%s/raysandbox-%llu-%d-%llu-w%d", base,
                             pid_namespace(), getpid(), start, raylet) >=
                sizeof group->path - sizeof "/inner") {
            errno = E2BIG;
            rs_die("cgroup_create", base);
        }
        group->version = field_u32(record, 0);
        group->base = base;
        group->seen_at = field_str2(record, 4);
        groups->count++;
        if (make_in(base, group->path) != 0)
            rs_die("cgroup_create", group->path);
    }
    leave_without_raylet(groups, raylet);
}

void
groups_enter(struct worker_groups *groups, const struct plan *plan, uid_t owner)
{
    make_groups(groups, plan);
    for (size_t i = 0; i < groups->count; i++) {
        struct worker_group *group = &groups->each[i];
        const struct record *limit;
        for (size_t at = 0; (limit = plan_next(plan, R_CGROUP_LIMIT, &at));) {
            const char *file = field_str2(limit, 0);
            size_t length;
            const uint8_t *value =
                field_rest(limit,
                           strlen(field_str(limit, 0)) + strlen(file) + 2,
                           &length);
            if (strcmp(field_str(limit, 0), group->base) == 0 &&
                put(group->path, file, value, length) != 0)
                rs_die("cgroup_limit", file);
        }
        if (group->version == 2)
            pass_on_controllers(group->path);
        /* The worker's namespace begins inside: its limits are out of reach even
         * where it has the rights of whoever set them. */
        size_t length = strlen(group->path);
        snprintf(group->path + length, sizeof group->path - length, "/inner");
        if (mkdir(group->path, 0755) != 0)
            rs_die("cgroup_create", group->path);
        if (owner != geteuid()) {
            if (lchown(group->path, owner, owner) != 0)
                rs_die("cgroup_owner", group->path);
            if (group->version == 2) {
                own(group->path, "cgroup.procs", owner);
                own(group->path, "cgroup.subtree_control", owner);
            }
        }
        if (put(group->path, group->version == 1 ? "tasks" : "cgroup.procs", "0",
                1) != 0)
            rs_die("cgroup_join", group->path);
    }
}

void
groups_enter_leaf(const struct worker_groups *groups)
{
    for (size_t i = 0; i < groups->count; i++) {
        char leaf[PATH_MAX];
        if (groups->each[i].version != 2)
            continue;
        snprintf(leaf, sizeof leaf, "%s/worker", groups->each[i].path);
        if (mkdir(leaf, 0755) != 0)
            rs_die("cgroup_create", leaf);
        if (put(leaf, "cgroup.procs", "0", 1) != 0)
            rs_die("cgroup_join", leaf);
    }
}

/* All at once where the kernel can (version 2): none forks in between, and no
 * pid is somebody else's by the time that it is signalled. */
static int
kill_group(int directory)
{
    int fd = openat(directory, "cgroup.kill", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return -1;
    ssize_t written = write(fd, "1", 1);
    close(fd);
    return written == 1 ? 0 : -1;
}

static void
kill_all(int directory)
{
    if (kill_group(directory) == 0)
        return;
    int fd = openat(directory, "cgroup.procs", O_RDONLY | O_CLOEXEC);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
    int pid;

    if (file == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    while (fscanf(file, "%d", &pid) == 1)
        if (pid > 1)
            kill(pid, SIGKILL);
    fclose(file);
}

/* Remove a group and all groups below it.  0 when it is gone. */
static int
remove_tree(int parent, const char *name)
{
    int fd = openat(parent, name,
                    O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    if (dir == NULL) {
        if (fd >= 0)
            close(fd);
        return fd < 0 && errno == ENOENT ? 0 : -1;
    }
    kill_all(fd);
    while ((entry = readdir(dir)) != NULL)
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.')
            remove_tree(fd, entry->d_name);
    closedir(dir);
    return unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT ? 0 : -1;
}

/* Whether an owner has been gone for long enough: a worker's janitor ends what
 * is left in its group, writes down the end, and is itself in there. */
static int
is_over(int pid, unsigned long long start)
{
    static struct {
        int pid;
        unsigned long long start;
        long long seen_ms;
    } gone[MOST_GONE];
    struct timespec time;
    size_t at = MOST_GONE;

    clock_gettime(CLOCK_MONOTONIC, &time);
    long long now_ms = time.tv_sec * 1000LL + time.tv_nsec / 1000000;
    for (size_t i = 0; i < MOST_GONE; i++) {
        if (gone[i].pid == pid && gone[i].start == start)
            return now_ms - gone[i].seen_ms >= JANITOR_MS;
        if (gone[i].pid == 0 || now_ms - gone[i].seen_ms >= FORGET_MS)
            at = i;
    }
    if (at == MOST_GONE)
        return 1;
    gone[at].pid = pid;
    gone[at].start = start;
    gone[at].seen_ms = now_ms;
    return 0;
}

int
groups_sweep(const struct plan *plan, pid_t raylet, int end)
{
    const struct record *record;
    int left = 0;

    for (size_t cursor = 0;
         (record = plan_next(plan, R_CGROUP_BASE, &cursor));) {
        const char *base = field_str(record, 4);
        DIR *dir = opendir(base);
        struct dirent *entry;
        if (dir == NULL)
            continue;
        while ((entry = readdir(dir)) != NULL) {
            unsigned long long namespace, start;
            int pid, owner, length = 0;
            if (sscanf(entry->d_name, "raysandbox-%llu-%d-%llu-w%d%n",
                       &namespace, &pid, &start, &owner, &length) != 4 ||
                entry->d_name[length] != '\0' || namespace != pid_namespace())
                continue;
            int stays = start_time(pid) == start || !is_over(pid, start);
            if (stays && !(end && owner == raylet))
                left += owner == raylet;
            else if (remove_tree(dirfd(dir), entry->d_name) != 0)
                left += owner == raylet;
        }
        closedir(dir);
    }
    return left;
}

/* Remove a directory if it is one of ours, of this name, and empty by now. */
static void
remove_own(const char *directory, const char *name)
{
    const char *last = strrchr(directory, '/');

    if (last != NULL && strncmp(last + 1, name, strlen(name)) == 0)
        rmdir(directory);
}

void
groups_remove_bases(const struct plan *plan)
{
    const struct record *record;
    char parent[PATH_MAX];

    for (size_t cursor = 0;
         (record = plan_next(plan, R_CGROUP_BASE, &cursor));) {
        const char *base = field_str(record, 4), *last = strrchr(base, '/');
        if (last == NULL || (size_t)(last - base) >= sizeof parent)
            continue;
        /* The node's own group, or what all nodes share. */
        remove_own(base, "raysandbox");
        memcpy(parent, base, (size_t)(last - base));
        parent[last - base] = '\0';
        remove_own(parent, "raysandbox");
    }
}
