#define _GNU_SOURCE
#include "root.h"
#include "mount_api.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Any directory serves to mount the new root on: our mount namespace is
 * private, and the bind sources were opened before it is covered. */
#define STAGING "/tmp"
#define HIDDEN_DIR "/.hidden/dir"
#define HIDDEN_FILE "/.hidden/file"

int
bind_open(const char *source, uint32_t flags)
{
    struct rs_mount_attr attr = {.attr_set = RS_ATTR_NOSUID};

    if (flags & BIND_READ_ONLY)
        attr.attr_set |= RS_ATTR_RDONLY;
    if (flags & (BIND_NO_EXEC | BIND_DEVICE | BIND_SOCKET))
        attr.attr_set |= RS_ATTR_NOEXEC;
    if (!(flags & BIND_DEVICE))
        attr.attr_set |= RS_ATTR_NODEV;
    /* Nothing mounted on the host later may appear inside. */
    attr.propagation = MS_PRIVATE;

    int fd = rs_open_tree(AT_FDCWD, source,
                          RS_OPEN_TREE_CLONE | RS_OPEN_TREE_CLOEXEC |
                              RS_AT_RECURSIVE);
    if (fd < 0)
        rs_die("open_tree", source);
    if (rs_mount_setattr(fd, "", RS_AT_EMPTY_PATH | RS_AT_RECURSIVE, &attr) != 0)
        rs_die("mount_setattr", source);
    return fd;
}

void
binds_open(struct binds *binds, const struct plan *plan)
{
    const struct record *record;
    size_t cursor = 0;

    binds->count = 0;
    binds->fds = calloc(plan->count + 1, sizeof *binds->fds);
    if (binds->fds == NULL)
        rs_die("binds_alloc", NULL);
    while ((record = plan_next(plan, R_BIND, &cursor)) != NULL)
        binds->fds[binds->count++] =
            bind_open(field_str(record, 4), field_u32(record, 0));
}

/* An absolute path as seen from the directory that becomes the root. */
static const char *
below(const char *path)
{
    if (path[0] != '/') {
        errno = EINVAL;
        rs_die("not_absolute", path);
    }
    return path + 1;
}

/* Below, what is made is tried first and its parents are made when they are
 * missing: most of the time they are there. */

void
make_dirs(int root, const char *path, unsigned mode)
{
    const char *name = below(path);

    if (*name == '\0' || mkdirat(root, name, mode) == 0 || errno == EEXIST)
        return;
    if (errno != ENOENT)
        rs_die("mkdir", path);
    make_parent_dirs(root, path);
    if (mkdirat(root, name, mode) != 0 && errno != EEXIST)
        rs_die("mkdir", path);
}

void
make_parent_dirs(int root, const char *path)
{
    char parent[PATH_MAX];
    const char *slash = strrchr(path, '/');

    if (slash == NULL || (size_t)(slash - path) >= sizeof parent) {
        errno = EINVAL;
        rs_die("mkdir", path);
    }
    memcpy(parent, path, (size_t)(slash - path));
    parent[slash - path] = '\0';
    if (parent[0] != '\0')
        make_dirs(root, parent, 0755);
}

int
make_file(int root, const char *path, unsigned mode)
{
    int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
    int fd = openat(root, below(path), flags, mode);
    if (fd < 0 && errno == ENOENT) {
        make_parent_dirs(root, path);
        fd = openat(root, below(path), flags, mode);
    }
    if (fd < 0)
        rs_die("create", path);
    return fd;
}

/* An empty file to mount something on, unless there is one. */
static void
make_place(int root, const char *path)
{
    const char *name = below(path);

    if (mknodat(root, name, S_IFREG | 0444, 0) == 0 || errno == EEXIST)
        return;
    if (errno != ENOENT)
        rs_die("create", path);
    make_parent_dirs(root, path);
    if (mknodat(root, name, S_IFREG | 0444, 0) != 0)
        rs_die("create", path);
}

static void
write_file(int root, const char *path, mode_t mode, const uint8_t *bytes,
           size_t length)
{
    int fd = make_file(root, path, mode);

    while (length > 0) {
        ssize_t written = write(fd, bytes, length);
        if (written < 0)
            rs_die("write", path);
        bytes += written;
        length -= (size_t)written;
    }
    close(fd);
}

void
bind_attach(int root, int fd, const char *target)
{
    struct stat source;

    if (fstatat(fd, "", &source, RS_AT_EMPTY_PATH) != 0)
        rs_die("stat", target);
    if (S_ISDIR(source.st_mode))
        make_dirs(root, target, 0755);
    else
        make_place(root, target);
    if (rs_move_mount(fd, "", root, below(target), RS_MOVE_MOUNT_EMPTY_PATH) != 0)
        rs_die("move_mount", target);
    close(fd);
}

static void
hide(const char *path)
{
    struct stat there;

    if (lstat(path, &there) != 0) {
        if (errno == ENOENT)
            return; /* absent is better hidden than masked */
        rs_die("hide", path);
    }
    if (mount(S_ISDIR(there.st_mode) ? HIDDEN_DIR : HIDDEN_FILE, path, NULL,
              MS_BIND, NULL) != 0)
        rs_die("hide", path);
}

/* Path of something in the new root while it is still on STAGING. */
static void
staged(char *target, size_t size, const char *path)
{
    if ((size_t)snprintf(target, size, "%s%s", STAGING, path) >= size) {
        errno = ENAMETOOLONG;
        rs_die("staging", path);
    }
}

void
root_enter(const struct plan *plan, const struct binds *binds,
           const struct root_options *options)
{
    const struct record *record;
    size_t cursor, bind = 0, length;
    char target[PATH_MAX];

    /* Modes are the plan's, whatever our caller's umask. */
    mode_t mask = umask(0);

    /* Stop our mounts from reaching the host, and the host's from us. */
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        rs_die("mount_private", "/");
    if (mount("raysandbox", STAGING, "tmpfs", MS_NOSUID | MS_NODEV,
              "size=4m,nr_inodes=4096,mode=0755") != 0)
        rs_die("mount_root", STAGING);
    int root = open(STAGING, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        rs_die("open_root", STAGING);

    make_dirs(root, HIDDEN_DIR, 0000);
    write_file(root, HIDDEN_FILE, 0000, NULL, 0);
    for (cursor = 0; (record = plan_next(plan, R_TMPFS, &cursor));) {
        char data[128];
        const char *path = field_str(record, 20);
        make_dirs(root, path, 0755);
        staged(target, sizeof target, path);
        snprintf(data, sizeof data,
                 "size=%llu,nr_inodes=%llu,mode=%o,uid=%u,gid=%u",
                 (unsigned long long)field_u64(record, 0),
                 (unsigned long long)field_u64(record, 8),
                 field_u32(record, 16), options->owner, options->owner);
        if (mount("private", target, "tmpfs", MS_NOSUID | MS_NODEV, data) != 0)
            rs_die("mount_tmpfs", path);
    }
    for (cursor = 0; (record = plan_next(plan, R_DIR, &cursor));)
        make_dirs(root, field_str(record, 4), field_u32(record, 0));
    for (cursor = 0; (record = plan_next(plan, R_BIND, &cursor));) {
        if (bind >= binds->count) {
            errno = EINVAL;
            rs_die("binds", NULL);
        }
        bind_attach(root, binds->fds[bind++], field_str2(record, 4));
    }
    for (cursor = 0; (record = plan_next(plan, R_SYMLINK, &cursor));) {
        const char *path = field_str2(record, 0);
        if (symlinkat(field_str(record, 0), root, below(path)) == 0)
            continue;
        if (errno != ENOENT)
            rs_die("symlink", path);
        make_parent_dirs(root, path);
        if (symlinkat(field_str(record, 0), root, below(path)) != 0)
            rs_die("symlink", path);
    }
    for (cursor = 0; (record = plan_next(plan, R_FILE, &cursor));) {
        const char *path = field_str(record, 4);
        const uint8_t *bytes =
            field_rest(record, 4 + strlen(path) + 1, &length);
        write_file(root, path, field_u32(record, 0), bytes, length);
    }
    for (cursor = 0; (record = plan_next(plan, R_SCRATCH, &cursor));)
        make_dirs(root, field_str(record, 16), 0755);
    for (cursor = 0; (record = plan_next(plan, R_PROC, &cursor));) {
        make_dirs(root, field_str(record, 0), 0555);
        staged(target, sizeof target, field_str(record, 0));
        /* Before the old root goes: a user namespace may mount a /proc only
         * where it already sees one in full. */
        if (mount("proc", target, "proc",
                  MS_NOSUID | MS_NODEV | MS_NOEXEC |
                      (options->read_only_proc ? MS_RDONLY : 0),
                  options->proc_options) != 0)
            rs_die("mount_proc", target);
    }
    if (options->fill != NULL)
        options->fill(root, options->argument);

    /* pivot_root(".", ".") stacks the old root on the new one's place, so no
     * directory is needed to put it in; then it is detached. */
    if (fchdir(root) != 0 || chdir(STAGING) != 0)
        rs_die("chdir_root", STAGING);
    close(root);
    if (syscall(SYS_pivot_root, ".", ".") != 0)
        rs_die("pivot_root", STAGING);
    if (umount2(".", MNT_DETACH) != 0)
        rs_die("umount_old_root", NULL);
    if (chdir("/") != 0)
        rs_die("chdir_root", "/");

    for (cursor = 0; (record = plan_next(plan, R_HIDE, &cursor));)
        hide(field_str(record, 0));

    struct rs_mount_attr attr = {.attr_set = RS_ATTR_RDONLY | RS_ATTR_NOSUID |
                                             RS_ATTR_NODEV};
    if (rs_mount_setattr(AT_FDCWD, "/", 0, &attr) != 0)
        rs_die("root_read_only", "/");
    umask(mask);
}
