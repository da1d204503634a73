/* The outer wall: a root file system that holds only what the plan names. */
#ifndef RAYSANDBOX_ROOT_H
#define RAYSANDBOX_ROOT_H

#include "plan.h"

/* Detached copies of the plan's bind mounts, in the plan's order. */
struct binds {
    int *fds;
    size_t count;
};

/* What only some roots have. */
struct root_options {
    int read_only_proc;
    /* Of a /proc of our own, such as "hidepid=2"; NULL for none. */
    const char *proc_options;
    /* Who owns what R_TMPFS makes, as this user namespace counts. */
    unsigned owner;
    /* Adds what no record can say, below the directory fd of the new root. */
    void (*fill)(int root, void *argument);
    void *argument;
};

/* Open and restrict every bind source.
 *
 * With real root this is done by the monitor, before the user namespace:
 * inside it, root could not walk through a 0700 directory on the way. */
void binds_open(struct binds *binds, const struct plan *plan);

/* Build the new root, enter it, drop the old one.  Needs CAP_SYS_ADMIN over
 * the caller's own mount namespace.  Only a zygote, which runs no task, gets a
 * writable /proc: its jails mount their own over it. */
void root_enter(const struct plan *plan, const struct binds *binds,
                const struct root_options *options);

/* Open one bind source with the flags of R_BIND. */
int bind_open(const char *source, uint32_t flags);

/* Mount what bind_open opened at a path below the directory fd. */
void bind_attach(int root, int fd, const char *target);

/* Make a file below the directory fd; its descriptor is open for writing. */
int make_file(int root, const char *path, unsigned mode);

/* mkdir -p of an absolute path below the directory fd. */
void make_dirs(int root, const char *path, unsigned mode);
void make_parent_dirs(int root, const char *path);

#endif
