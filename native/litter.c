#define _GNU_SOURCE
#include "litter.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Of event logs whose workers are gone. */
enum { MOST_LOGS = 512, MOST_BYTES = 64 << 20 };

static const char STATE[] = "raysandbox_state-", STATE_END[] = ".bin";
static const char EVENTS[] = "raysandbox_events-", EVENTS_END[] = ".jsonl";

struct log {
    char name[NAME_MAX + 1];
    time_t changed;
    off_t size;
};

/* The worker's id in a name of this form: its length, 0 if it is none. */
static int
id_in(const char *name, const char *start, const char *end)
{
    size_t length = strlen(name), before = strlen(start), after = strlen(end);

    if (length <= before + after || strncmp(name, start, before) != 0 ||
        strcmp(name + length - after, end) != 0 ||
        strspn(name + before, "0123456789abcdef") != length - before - after)
        return 0;
    return (int)(length - before - after);
}

/* Whether nobody holds the file's lock, and its maker had time to take it. */
static int
is_left(int directory, const char *name, int age_s)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat there;
    int fd = openat(directory, name,
                    O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
    int left = fd >= 0 && fstat(fd, &there) == 0 && S_ISREG(there.st_mode) &&
               time(NULL) - there.st_ctime >= age_s &&
               fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;

    if (fd >= 0)
        close(fd);
    return left;
}

static int
newest_first(const void *one, const void *other)
{
    const struct log *a = one, *b = other;

    return a->changed == b->changed ? strcmp(a->name, b->name)
                                    : a->changed < b->changed ? 1 : -1;
}

/* The event logs here of workers that have no state file. */
static size_t
find_logs(DIR *dir, struct log **logs)
{
    struct dirent *entry;
    struct stat there;
    char state[NAME_MAX + 1];
    size_t count = 0, room = 0;

    rewinddir(dir);
    while ((entry = readdir(dir)) != NULL) {
        int length = id_in(entry->d_name, EVENTS, EVENTS_END);
        if (length == 0 ||
            (size_t)snprintf(state, sizeof state, "%s%.*s%s", STATE, length,
                             entry->d_name + strlen(EVENTS),
                             STATE_END) >= sizeof state ||
            faccessat(dirfd(dir), state, F_OK, AT_SYMLINK_NOFOLLOW) == 0 ||
            fstatat(dirfd(dir), entry->d_name, &there, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        if (count == room) {
            room = room == 0 ? 64 : 2 * room;
            struct log *more = realloc(*logs, room * sizeof **logs);
            if (more == NULL)
                break;
            *logs = more;
        }
        struct log *log = &(*logs)[count++];
        strcpy(log->name, entry->d_name);
        log->changed = there.st_mtime;
        log->size = there.st_size;
    }
    return count;
}

static void
sweep_directory(const char *path, int age_s)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    struct log *logs = NULL;
    off_t total = 0;

    if (dir == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    while ((entry = readdir(dir)) != NULL)
        if (id_in(entry->d_name, STATE, STATE_END) &&
            is_left(fd, entry->d_name, age_s))
            unlinkat(fd, entry->d_name, 0);
    size_t count = find_logs(dir, &logs);
    if (count > 0)
        qsort(logs, count, sizeof *logs, newest_first);
    for (size_t i = 0; i < count; i++) {
        total += logs[i].size;
        if (i >= MOST_LOGS || total > MOST_BYTES)
            unlinkat(fd, logs[i].name, 0);
    }
    free(logs);
    closedir(dir);
}

void
litter_sweep(const struct plan *plan, int age_s)
{
    const struct record *record;
    char directory[PATH_MAX];

    for (size_t cursor = 0; (record = plan_next(plan, R_LOG, &cursor));) {
        const char *path = field_str(record, 4), *name = strrchr(path, '/');
        if (name == NULL || name == path ||
            strncmp(name + 1, STATE, strlen(STATE)) != 0 ||
            (size_t)(name - path) >= sizeof directory)
            continue;
        memcpy(directory, path, (size_t)(name - path));
        directory[name - path] = '\0';
        sweep_directory(directory, age_s);
    }
}
