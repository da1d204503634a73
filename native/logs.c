/* Workers' log files, kept small by somebody who is no worker.
 *
 * A file is open in its worker and bound over its name there, so it stays the
 * same inode: it is copied and truncated, as by logrotate's copytruncate.  All
 * append, so they go on at its new end, and Ray's log monitor reads a file that
 * has become smaller from its start.  No hole is left in it: the monitor would
 * read that as one line.  What is written between the copy's end and the
 * truncation is lost.
 *
 * The directories are raylet's, no worker can make a name there; what is in a
 * file, and how large it says it is, a worker chooses. */
#define _GNU_SOURCE
#include "logs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    MOST_DIRECTORIES = 16,
    MOST_ENDED = 16384,     /* files of workers that have ended */
    MOST_OURS = 32 << 20,   /* twice what an event log lets itself have */
    LEAST_BYTES = 64 << 10, /* that a living worker's file always may have */
    LATE_BYTES = 16 << 20,  /* copied of what comes while we copy */
    ONE_COPY = 8 << 20,
};

static const char OLD[] = "/old", KEPT[] = ".1";
static const char HEX[] = "0123456789abcdef", DIGITS[] = "0123456789";
static const char KIND[] = "abcdefghijklmnopqrstuvwxyz_";

struct file {
    char name[NAME_MAX + 1];
    int directory;
    int kept;   /* NAME.1 */
    int ours;   /* no log of Ray's: no pid in its name */
    int stream; /* somebody reads it line by line */
    int ended;
    time_t changed;
    off_t size, disk;
};

struct look {
    const struct plan *plan;
    int directories[MOST_DIRECTORIES];
    size_t directory_count;
    struct file *files;
    size_t count, room;
};

static const char *
base_of(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash == NULL ? path : slash + 1;
}

/* Whether the name starts as worker.c makes it of the pattern: of which pid (or
 * 0), and what follows. */
static int
is_made_of(const char *name, const char *pattern, const char **rest, int *pid)
{
    *pid = 0;
    for (; *pattern != '\0'; pattern++) {
        if (*pattern != '%') {
            if (*name++ != *pattern)
                return 0;
            continue;
        }
        const char *letters = HEX;
        pattern++;
        if (*pattern == 'p')
            letters = DIGITS;
        else if (*pattern == 't' || *pattern == 'k')
            letters = KIND;
        size_t length = strspn(name, letters);
        if (*pattern == 'j') { /* a job and a dash, or nothing */
            name += length > 0 && name[length] == '-' ? length + 1 : 0;
            continue;
        }
        if (length == 0)
            return 0;
        if (*pattern == 'p')
            *pid = atoi(name);
        name += length;
    }
    *rest = name;
    return 1;
}

static void
add_file(struct look *look, int directory, const char *name,
         const struct record *record)
{
    const char *rest;
    struct stat there;
    int pid;

    if (!is_made_of(name, base_of(field_str(record, 4)), &rest, &pid))
        return;
    int kept = pid != 0 && strcmp(rest, KEPT) == 0;
    if ((!kept && *rest != '\0') ||
        fstatat(directory, name, &there, AT_SYMLINK_NOFOLLOW) != 0 ||
        !S_ISREG(there.st_mode) || there.st_nlink != 1)
        return;
    if (look->count == look->room) {
        size_t room = look->room == 0 ? 64 : 2 * look->room;
        struct file *more = realloc(look->files, room * sizeof *more);
        if (more == NULL)
            return;
        look->files = more;
        look->room = room;
    }
    struct file *file = &look->files[look->count++];
    *file = (struct file){
        .directory = directory,
        .kept = kept,
        .ours = pid == 0,
        .stream = field_u32(record, 0) != 0,
        .ended = pid != 0 && kill(pid, 0) != 0 && errno == ESRCH,
        .changed = there.st_mtime,
        .size = there.st_size,
        .disk = there.st_blocks * 512,
    };
    strcpy(file->name, name);
}

/* Whether both are files in one directory. */
static int
are_beside(const char *path, const char *other)
{
    size_t length = (size_t)(base_of(path) - path);

    return length == (size_t)(base_of(other) - other) &&
           strncmp(path, other, length) == 0;
}

/* Add what is in the directory of a log file, or in the one of old files there. */
static void
look_into(struct look *look, const char *path, const char *below)
{
    char directory[PATH_MAX];
    const struct record *record;
    struct dirent *entry;
    int length = (int)(base_of(path) - path) - 1;

    if (length <= 0 || look->directory_count == MOST_DIRECTORIES ||
        (size_t)snprintf(directory, sizeof directory, "%.*s%s", length, path,
                         below) >= sizeof directory)
        return;
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *dir = fd < 0 ? NULL : fdopendir(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (dir == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    look->directories[look->directory_count++] = fd;
    while ((entry = readdir(dir)) != NULL)
        for (size_t cursor = 0;
             (record = plan_next(look->plan, R_LOG, &cursor));)
            if (are_beside(path, field_str(record, 4)))
                add_file(look, fd, entry->d_name, record);
    closedir(dir);
}

static void
look_at_all(struct look *look)
{
    const struct record *record, *before;

    for (size_t cursor = 0; (record = plan_next(look->plan, R_LOG, &cursor));) {
        const char *path = field_str(record, 4);
        size_t earlier = 0;
        while ((before = plan_next(look->plan, R_LOG, &earlier)) != record &&
               !are_beside(path, field_str(before, 4)))
            ;
        if (before != record)
            continue;
        look_into(look, path, "");
        look_into(look, path, OLD);
    }
}

/* Leave the newest of what is in the file beside it. */
static void
copy_newest(int fd, const struct file *file, off_t size, off_t keep)
{
    char name[NAME_MAX + 1];
    off_t from = size > keep ? size - keep : 0, most = size + LATE_BYTES;

    if ((size_t)snprintf(name, sizeof name, "%s%s", file->name, KEPT) >=
        sizeof name)
        return;
    unlinkat(file->directory, name, 0);
    int kept = openat(file->directory, name,
                      O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
    if (kept < 0)
        return;
    /* Where the disk is full less is kept. */
    while (from < most && sendfile(kept, fd, &from, ONE_COPY) > 0)
        ;
    close(kept);
}

static void
start_anew(const struct file *file, off_t keep)
{
    struct stat there;
    int fd = openat(file->directory, file->name,
                    O_RDWR | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK |
                        O_NOCTTY);

    if (fd < 0)
        return;
    if (fstat(fd, &there) == 0 && S_ISREG(there.st_mode) &&
        there.st_nlink == 1) {
        if (keep > 0)
            copy_newest(fd, file, there.st_size, keep);
        if (ftruncate(fd, 0) == 0 && file->stream)
            dprintf(fd,
                    "raysandbox: the node began this log anew; the newest of the "
                    "%lld bytes before are in %s%s (worker.log in its policy)\n",
                    (long long)there.st_size, file->name, KEPT);
    }
    close(fd);
}

static off_t
least(off_t one, off_t other)
{
    return one < other ? one : other;
}

/* Bytes of the living workers' files, none of them larger than it may be. */
static off_t
living_bytes(const struct look *look, off_t most)
{
    off_t sum = 0;

    for (size_t i = 0; i < look->count; i++)
        if (!look->files[i].ours && !look->files[i].ended)
            sum += least(look->files[i].disk, most);
    return sum;
}

static void
cut(const struct look *look, off_t most)
{
    for (size_t i = 0; i < look->count; i++) {
        const struct file *file = &look->files[i];
        off_t may = file->ours ? MOST_OURS : most;
        /* File systems set room aside for a file that grows. */
        if (file->size <= may && file->disk <= 2 * may + LATE_BYTES)
            continue;
        if (file->kept)
            unlinkat(file->directory, file->name, 0);
        else
            start_anew(file, file->ours ? 0 : may);
    }
}

static int
newest_first(const void *one, const void *other)
{
    const struct file *a = one, *b = other;

    return a->changed == b->changed ? strcmp(a->name, b->name)
                                    : a->changed < b->changed ? 1 : -1;
}

static void
remove_oldest(struct look *look, off_t most, off_t room)
{
    size_t count = 0;

    if (look->count > 0)
        qsort(look->files, look->count, sizeof *look->files, newest_first);
    for (size_t i = 0; i < look->count; i++) {
        const struct file *file = &look->files[i];
        if (file->ours || !file->ended)
            continue;
        room -= least(file->disk, most);
        if (++count > MOST_ENDED || room < 0)
            unlinkat(file->directory, file->name, 0);
    }
}

long
logs_bound(const struct plan *plan)
{
    const struct record *limit = plan_one(plan, R_LOG_LIMIT);
    struct look look = {.plan = plan};
    struct timespec begun, done;

    if (limit == NULL)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    look_at_all(&look);
    clock_gettime(CLOCK_MONOTONIC, &done);
    off_t most = (off_t)field_u64(limit, 0) / 2, all = (off_t)field_u64(limit, 8);
    while (most > LEAST_BYTES && living_bytes(&look, most) > all)
        most /= 2;
    cut(&look, most);
    remove_oldest(&look, most, all - living_bytes(&look, most));
    for (size_t i = 0; i < look.directory_count; i++)
        close(look.directories[i]);
    free(look.files);
    return (done.tv_sec - begun.tv_sec) * 1000 +
           (done.tv_nsec - begun.tv_nsec) / 1000000;
}
