/* The inner wall: what every jail gets for itself, after the fork. */
#ifndef RAYSANDBOX_JAIL_H
#define RAYSANDBOX_JAIL_H

#include "plan.h"

struct jail_entry {
    const struct plan *plan;
    /* Directory fd of a writable /proc in which this process has a pid; the
     * jail's own /proc is read-only, and the id maps must still be written. */
    int proc_fd;
    /* Which of the mapped ids this jail takes (0: the only one). */
    unsigned slot;
    const int *cgroup_fds; /* cgroup.procs, open for writing */
    int cgroup_count;
    int *keep_fds; /* stay open besides 0, 1, 2; sorted in place */
    int keep_count;
};

/* Raise every wall around the calling process, in order, or die.
 *
 * Returns only when all of them are up.  If the plan asks for notification,
 * returns the listener's descriptor, else -1. */
int jail_enter(struct jail_entry *entry);

/* Close every descriptor above stderr but the ones meant (sorted in place).
 *
 * Landlock is checked at open(2), not at read(2): a descriptor opened before
 * confinement stays usable after it, whatever the policy says. */
void close_other_fds(int *keep, int count);

/* Single steps of jail_enter, for who has another order. */

/* A blocked or ignored signal survives fork and exec; the inside starts clean. */
void reset_signals(void);

void set_rlimits(const struct plan *plan);

/* Give up every capability, and no_new_privs the ways to win one back. */
void drop_capabilities(void);

/* The plan's ruleset, if there is one: the plan says why if not. */
void restrict_landlock(const struct plan *plan);

/* The plan's filter, if there is one; the listener's descriptor or -1. */
int install_filter(const struct plan *plan);

#endif
