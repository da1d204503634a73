#define _GNU_SOURCE
#include "plan.h"
#include "step.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[8] = {'R', 'S', 'B', 'X', 'P', 'L', 'N', '1'};

enum { HEADER = 16, RECORD_HEADER = 8, MAX_RECORDS = 4096 };

/* Shape of each record: fixed bytes first, then strings, then maybe bytes. */
static const struct shape {
    uint8_t fixed;
    uint8_t strings;
    uint8_t rest; /* 1: any bytes may follow */
} SHAPES[R_MAX + 1] = {
    [R_NAMESPACES] = {8, 0, 0},     [R_HOSTNAME] = {0, 1, 0},
    [R_IDMAP] = {8, 0, 0},          [R_DIR] = {4, 1, 0},
    [R_BIND] = {4, 2, 0},           [R_SYMLINK] = {0, 2, 0},
    [R_FILE] = {4, 1, 1},           [R_HIDE] = {0, 1, 0},
    [R_PROC] = {0, 1, 0},           [R_MASK] = {0, 1, 0},
    [R_SCRATCH] = {16, 1, 0},       [R_SUBDIR] = {4, 1, 0},
    [R_RLIMIT] = {20, 0, 0},        [R_INNER_ID] = {8, 0, 0},
    [R_LANDLOCK] = {24, 0, 0},      [R_LANDLOCK_PATH] = {8, 1, 0},
    [R_LANDLOCK_PORT] = {16, 0, 0}, [R_SECCOMP] = {4, 0, 1},
    [R_CHDIR] = {0, 1, 0},          [R_ENV] = {0, 1, 0},
    [R_CGROUP_JOIN] = {0, 1, 0},    [R_CGROUP_CLEAN] = {0, 2, 0},
    [R_WALL_TIME] = {8, 0, 0},      [R_TMP] = {0, 1, 0},
    [R_CARRY] = {0, 1, 0},          [R_TMPFS] = {20, 1, 0},
    [R_COPY] = {4, 2, 0},           [R_COPY_ENV] = {4, 2, 0},
    [R_ENV_PASS] = {0, 1, 0},       [R_LANDLOCK_PORTS] = {16, 0, 0},
    [R_USER] = {8, 1, 0},           [R_LOG] = {4, 2, 0},
    [R_CGROUP_BASE] = {4, 2, 0},    [R_CGROUP_LIMIT] = {0, 2, 1},
    [R_PROGRAM] = {0, 2, 0},        [R_PRELUDE] = {0, 1, 0},
    [R_LOG_LIMIT] = {16, 0, 0},
};

static uint32_t
load_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 |
           (uint32_t)at[3] << 24;
}

static int
fits(const struct record *record)
{
    const struct shape *shape = &SHAPES[record->type];
    size_t offset = shape->fixed;

    if (record->length < offset)
        return 0;
    for (int i = 0; i < shape->strings; i++) {
        const uint8_t *end = memchr(record->payload + offset, 0,
                                    record->length - offset);
        if (end == NULL)
            return 0;
        offset = (size_t)(end - record->payload) + 1;
    }
    return shape->rest || offset == record->length;
}

int
plan_parse(struct plan *plan, const uint8_t *bytes, size_t length)
{
    memset(plan, 0, sizeof *plan);
    errno = EINVAL;
    if (length < HEADER || memcmp(bytes, MAGIC, sizeof MAGIC) != 0 ||
        load_u32(bytes + 8) != length)
        return -1;

    size_t count = load_u32(bytes + 12);
    if (count > MAX_RECORDS)
        return -1;
    plan->bytes = bytes;
    plan->records = calloc(count ? count : 1, sizeof *plan->records);
    if (plan->records == NULL)
        return -1;

    size_t offset = HEADER;
    for (size_t i = 0; i < count; i++) {
        struct record *record = &plan->records[i];
        if (length - offset < RECORD_HEADER)
            goto refuse;
        record->type = (uint16_t)(bytes[offset] | bytes[offset + 1] << 8);
        record->length = load_u32(bytes + offset + 4);
        record->payload = bytes + offset + RECORD_HEADER;
        if (bytes[offset + 2] || bytes[offset + 3] || record->type == 0 ||
            record->type > R_MAX ||
            record->length > length - offset - RECORD_HEADER || !fits(record))
            goto refuse;
        offset += RECORD_HEADER + record->length;
    }
    if (offset != length)
        goto refuse;
    plan->count = count;
    return 0;

refuse:
    free(plan->records);
    plan->records = NULL;
    errno = EINVAL;
    return -1;
}

void
plan_read(struct plan *plan, int fd)
{
    struct stat file;

    if (fstat(fd, &file) != 0)
        rs_die("plan_stat", NULL);
    if (file.st_size <= 0 || file.st_size > 16 << 20) {
        errno = EFBIG;
        rs_die("plan_size", NULL);
    }
    uint8_t *bytes = malloc((size_t)file.st_size);
    if (bytes == NULL)
        rs_die("plan_alloc", NULL);
    for (off_t have = 0; have < file.st_size;) {
        ssize_t got = pread(fd, bytes + have, (size_t)(file.st_size - have),
                            have);
        if (got <= 0)
            rs_die("plan_read", NULL);
        have += got;
    }
    if (plan_parse(plan, bytes, (size_t)file.st_size) != 0)
        rs_die("plan_parse", "not a plan of this version");
}

const struct record *
plan_next(const struct plan *plan, enum record_type type, size_t *cursor)
{
    while (*cursor < plan->count) {
        const struct record *record = &plan->records[(*cursor)++];
        if (record->type == type)
            return record;
    }
    return NULL;
}

const struct record *
plan_one(const struct plan *plan, enum record_type type)
{
    size_t cursor = 0;
    return plan_next(plan, type, &cursor);
}

uint32_t
field_u32(const struct record *record, size_t offset)
{
    return load_u32(record->payload + offset);
}

uint64_t
field_u64(const struct record *record, size_t offset)
{
    return (uint64_t)load_u32(record->payload + offset) |
           (uint64_t)load_u32(record->payload + offset + 4) << 32;
}

const char *
field_str(const struct record *record, size_t offset)
{
    return (const char *)record->payload + offset;
}

const char *
field_str2(const struct record *record, size_t offset)
{
    const char *first = field_str(record, offset);
    return first + strlen(first) + 1;
}

const uint8_t *
field_rest(const struct record *record, size_t offset, size_t *length)
{
    *length = record->length - offset;
    return record->payload + offset;
}
