/* The compiled plan: what raysandbox/plan.py decided, as data.
 *
 * A plan is a header and a list of records.  Numbers are little-endian and
 * unaligned, strings end in NUL.  The launcher applies records in ITS order
 * (launch.c, jail.c), never in the plan's: no plan can move a wall behind the
 * door.  An unknown type, a length that does not fit or a missing NUL refuses
 * the whole plan.
 *
 *     header  "RSBXPLN1"  u32 length of the whole plan  u32 number of records
 *     record  u16 type  u16 zero  u32 payload length  payload
 */
#ifndef RAYSANDBOX_PLAN_H
#define RAYSANDBOX_PLAN_H

#include <stddef.h>
#include <stdint.h>

enum record_type {
    R_NAMESPACES = 1,     /* u32 outer CLONE_NEW* flags, u32 inner flags */
    R_HOSTNAME = 2,       /* str */
    R_IDMAP = 3,          /* u32 first host id, u32 count; inside from 0 */
    R_DIR = 4,            /* u32 mode, str path */
    R_BIND = 5,           /* u32 BIND_* flags, str source, str target */
    R_SYMLINK = 6,        /* str target, str path */
    R_FILE = 7,           /* u32 mode, str path, bytes content */
    R_HIDE = 8,           /* str path: masked in the root */
    R_PROC = 9,           /* str path */
    R_MASK = 10,          /* str path: masked in the jail's own /proc */
    R_SCRATCH = 11,       /* u64 bytes, u64 inodes, str path */
    R_SUBDIR = 12,        /* u32 mode, str path: made in the scratch */
    R_RLIMIT = 13,        /* u32 resource, u64 soft, u64 hard */
    R_INNER_ID = 14,      /* u32 uid, u32 gid as the task sees itself */
    R_LANDLOCK = 15,      /* u64 handled fs, u64 handled net, u64 scoped */
    R_LANDLOCK_PATH = 16, /* u64 access, str path */
    R_LANDLOCK_PORT = 17, /* u64 access, u64 port */
    R_SECCOMP = 18,       /* u32 SECCOMP_FILTER_FLAG_*, bytes program */
    R_CHDIR = 19,         /* str */
    R_ENV = 20,           /* str NAME=value */
    R_CGROUP_JOIN = 21,   /* str directory: joined by the command (run) */
    R_CGROUP_CLEAN = 22,  /* str directory, str prefix: removed at the end */
    R_WALL_TIME = 23,     /* u64 milliseconds (run) */
    R_TMP = 24,           /* str path: the scratch's tmp is bound there */
    R_CARRY = 25,         /* str path below R_TMP's that stays visible */
    /* The rest is for worker.c. */
    R_TMPFS = 26,         /* u64 bytes, u64 inodes, u32 mode, str path */
    R_COPY = 27,          /* u32 mode, str source, str target: read at launch */
    R_COPY_ENV = 28,      /* u32 mode, str NAME, str target: as R_COPY, of the
                             file that NAME names; NAME then names the target */
    R_ENV_PASS = 29,      /* str NAME, or PREFIX*: kept from our environment */
    R_LANDLOCK_PORTS = 30, /* u64 access, u32 first, u32 last */
    R_USER = 31,          /* u32 first host id, u32 count, str registry */
    R_LOG = 32,           /* u32 descriptor or 0, str path, str seen at; of
                             both, %w is the worker, %j its job and a dash, %p
                             the pid, %t worker or io_worker, %k its type */
    R_CGROUP_BASE = 33,   /* u32 version, str directory, str seen at */
    R_CGROUP_LIMIT = 34,  /* str directory, str file, bytes value */
    R_PROGRAM = 35,       /* str interpreter, str worker script */
    R_PRELUDE = 36,       /* str argument of the program that reads a
                             runtime_env and starts us again */
    R_LOG_LIMIT = 37,     /* u64 bytes of one R_LOG file and what it was before,
                             u64 of all workers' together (node.c) */
    R_MAX = R_LOG_LIMIT,
};

enum {
    BIND_READ_ONLY = 1,
    BIND_DEVICE = 2,  /* a device node: stays usable, nothing else is */
    BIND_NO_EXEC = 4,
    BIND_SOCKET = 8, /* opened to everybody who has a path to it: to us */
};

struct record {
    uint16_t type;
    uint32_t length;
    const uint8_t *payload;
};

struct plan {
    const uint8_t *bytes;
    size_t count;
    struct record *records;
};

/* Check and index a plan; the bytes must outlive it.  0, or -1 with errno. */
int plan_parse(struct plan *plan, const uint8_t *bytes, size_t length);

/* Read and check a whole plan from a descriptor, or die. */
void plan_read(struct plan *plan, int fd);

/* The next record of a type after *cursor (start at 0), or NULL. */
const struct record *plan_next(const struct plan *plan, enum record_type type,
                               size_t *cursor);

/* The only record of a type, or NULL. */
const struct record *plan_one(const struct plan *plan, enum record_type type);

/* Fields of a record that plan_parse has checked. */
uint32_t field_u32(const struct record *record, size_t offset);
uint64_t field_u64(const struct record *record, size_t offset);
const char *field_str(const struct record *record, size_t offset);
const char *field_str2(const struct record *record, size_t offset);
/* What follows the string at offset. */
const uint8_t *field_rest(const struct record *record, size_t offset,
                          size_t *length);

#endif
