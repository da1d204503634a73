/* A worker's own cgroups: made by it before it has walls, removed by the node. */
#ifndef RAYSANDBOX_GROUP_H
#define RAYSANDBOX_GROUP_H

#include "plan.h"

#include <sys/types.h>

enum { GROUP_NAME = 96, MAX_GROUPS = 8 };

struct worker_group {
    const char *base;    /* in which it is made */
    const char *seen_at; /* where the worker finds it */
    char path[512];      /* where it is on the host */
    unsigned version;
};

struct worker_groups {
    struct worker_group each[MAX_GROUPS];
    size_t count;
};

/* Variable by which raylet's workers know its pid; not one that they pass on. */
#define RAYLET_VARIABLE "__RAYSANDBOX_RAYLET"

/* Start time of a process in clock ticks since boot (proc(5), stat field 22);
 * 0 if there is none.  With it a pid that was given to another process is not
 * taken for its owner. */
unsigned long long start_time(pid_t pid);

/* Make a group with the plan's limits below each R_CGROUP_BASE, owned by owner,
 * and enter it; the caller must have one thread.  Its name tells the worker's
 * pid namespace, pid and start time, and which raylet's it is:
 *
 *     raysandbox-<namespace>-<pid>-<start>-w<raylet's pid>
 *
 * What the worker sees, and is in, is the group "inner" in it.  A worker whose
 * raylet has ended meanwhile removes what it made and dies: nobody else would.
 */
void groups_enter(struct worker_groups *groups, const struct plan *plan, uid_t owner);

/* In version 2 a group with children holds no process itself: move into a leaf.
 * After the cgroup namespace, whose root is to be the group. */
void groups_enter_leaf(const struct worker_groups *groups);

/* Remove groups of workers that have been gone for a moment, and kill what is left
 * in them; with `end` all of this raylet's workers at once, living or not.  How many groups of
 * this raylet's workers stay. */
int groups_sweep(const struct plan *plan, pid_t raylet, int end);

/* Remove the directories in which the groups were, if nobody else's are there. */
void groups_remove_bases(const struct plan *plan);

#endif
