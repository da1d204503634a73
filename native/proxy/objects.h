/* A hash table of object ids, for ids that somebody hostile may choose. */
#ifndef RAYSANDBOX_OBJECTS_H
#define RAYSANDBOX_OBJECTS_H

#include <stddef.h>
#include <stdint.h>

enum { ID_SIZE = 28, JOB_SIZE = 4, JOB_AT = 20 };

struct object {
    uint8_t id[ID_SIZE];
    uint8_t used;     /* 0: free, 1: was in use, 2: in use */
    uint8_t state;    /* the owner's */
    uint8_t fallback; /* lies outside the store's own memory */
    uint8_t fetched;  /* counts as such: 1 of its worker, 2 of its job too */
    uint32_t gets;    /* requests to get it that were not answered yet */
    uint32_t worker;  /* serial number of who made it */
    uint64_t size;    /* bytes */
    uint64_t request; /* of a creation that waits for memory */
};

struct objects {
    struct object *slots;
    size_t capacity, filled, count;
};

/* Seed the hash; once, before anything else.  Returns -1 without randomness. */
int objects_seed(void);

struct object *objects_find(const struct objects *table, const uint8_t *id);
/* Find or add (zeroed); NULL: out of memory.  Moves the other entries. */
struct object *objects_add(struct objects *table, const uint8_t *id);
void objects_remove(struct objects *table, struct object *object);
void objects_free(struct objects *table);
/* The next entry from *cursor on, which starts at 0; NULL at the end. */
struct object *objects_next(const struct objects *table, size_t *cursor);

#endif
