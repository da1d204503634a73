#define _GNU_SOURCE
#include "objects.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { FREE, LEFT, IN_USE, FIRST_CAPACITY = 64 };

static uint64_t keys[ID_SIZE / 4];

int
objects_seed(void)
{
    if (getrandom(keys, sizeof keys, 0) != (ssize_t)sizeof keys)
        return -1;
    return 0;
}

/* Multilinear hashing with secret keys: collisions can't be looked for. */
static size_t
hash(const uint8_t *id)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < ID_SIZE / 4; i++) {
        uint32_t word;
        memcpy(&word, id + 4 * i, 4);
        sum += (keys[i] | 1) * word;
    }
    return (size_t)(sum >> 32);
}

static struct object *
slot_of(struct object *slots, size_t capacity, const uint8_t *id)
{
    struct object *left = NULL;

    for (size_t at = hash(id);; at++) {
        struct object *slot = &slots[at & (capacity - 1)];
        if (slot->used == FREE)
            return left != NULL ? left : slot;
        if (slot->used == LEFT) {
            if (left == NULL)
                left = slot;
        } else if (memcmp(slot->id, id, ID_SIZE) == 0)
            return slot;
    }
}

struct object *
objects_find(const struct objects *table, const uint8_t *id)
{
    if (table->count == 0)
        return NULL;
    struct object *slot = slot_of(table->slots, table->capacity, id);
    return slot->used == IN_USE ? slot : NULL;
}

static int
grow(struct objects *table)
{
    size_t capacity = FIRST_CAPACITY;

    while (capacity < 4 * (table->count + 1))
        capacity *= 2;
    struct object *slots = calloc(capacity, sizeof *slots);
    if (slots == NULL)
        return -1;
    for (size_t i = 0; i < table->capacity; i++)
        if (table->slots[i].used == IN_USE)
            *slot_of(slots, capacity, table->slots[i].id) = table->slots[i];
    free(table->slots);
    table->slots = slots;
    table->capacity = capacity;
    table->filled = table->count;
    return 0;
}

struct object *
objects_add(struct objects *table, const uint8_t *id)
{
    struct object *slot = objects_find(table, id);

    if (slot != NULL)
        return slot;
    if (2 * (table->filled + 1) > table->capacity && grow(table) != 0)
        return NULL;
    slot = slot_of(table->slots, table->capacity, id);
    if (slot->used == FREE)
        table->filled++;
    table->count++;
    *slot = (struct object){.used = IN_USE};
    memcpy(slot->id, id, ID_SIZE);
    return slot;
}

void
objects_remove(struct objects *table, struct object *object)
{
    object->used = LEFT;
    table->count--;
}

void
objects_free(struct objects *table)
{
    free(table->slots);
    *table = (struct objects){0};
}

struct object *
objects_next(const struct objects *table, size_t *cursor)
{
    while (*cursor < table->capacity) {
        struct object *slot = &table->slots[(*cursor)++];
        if (slot->used == IN_USE)
            return slot;
    }
    return NULL;
}
