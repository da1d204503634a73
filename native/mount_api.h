/* The mount calls of Linux 5.2 and later, which not every libc wraps; numbers
 * from include/uapi/linux/mount.h (its header clashes with libc's). */
#ifndef RAYSANDBOX_MOUNT_API_H
#define RAYSANDBOX_MOUNT_API_H

#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    RS_OPEN_TREE_CLONE = 1,
    RS_OPEN_TREE_CLOEXEC = 02000000, /* O_CLOEXEC */
    RS_MOVE_MOUNT_EMPTY_PATH = 4,
    RS_ATTR_RDONLY = 1,
    RS_ATTR_NOSUID = 2,
    RS_ATTR_NODEV = 4,
    RS_ATTR_NOEXEC = 8,
    RS_AT_RECURSIVE = 0x8000,
    RS_AT_EMPTY_PATH = 0x1000,
};

struct rs_mount_attr {
    uint64_t attr_set, attr_clr, propagation, userns_fd;
};

static inline int
rs_open_tree(int dir, const char *path, unsigned flags)
{
    return (int)syscall(SYS_open_tree, dir, path, flags);
}

static inline int
rs_move_mount(int from, const char *from_path, int to, const char *to_path,
              unsigned flags)
{
    return (int)syscall(SYS_move_mount, from, from_path, to, to_path, flags);
}

static inline int
rs_mount_setattr(int dir, const char *path, unsigned flags,
                 struct rs_mount_attr *attr)
{
    return (int)syscall(SYS_mount_setattr, dir, path, flags, attr, sizeof *attr);
}

#endif
