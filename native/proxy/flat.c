#include "flat.h"

#include <string.h>

uint64_t
flat_load(const uint8_t *at, size_t width)
{
    uint64_t value = 0;

    memcpy(&value, at, width); /* flatbuffers are little-endian, as we are */
    return value;
}

static int
open_table(struct flat *table, const uint8_t *bytes, size_t size, size_t at)
{
    if (at % 4 != 0 || size < 4 || at > size - 4)
        return -1;
    int64_t vtable = (int64_t)at - (int32_t)flat_load(bytes + at, 4);
    if (vtable < 0 || vtable % 2 != 0 || (uint64_t)vtable + 4 > size)
        return -1;
    *table = (struct flat){
        .bytes = bytes,
        .size = size,
        .table = at,
        .vtable = (size_t)vtable,
        .vtable_size = (uint16_t)flat_load(bytes + vtable, 2),
        .table_size = (uint16_t)flat_load(bytes + vtable + 2, 2),
    };
    if (table->vtable_size < 4 || table->vtable_size % 2 != 0 ||
        table->vtable_size > size - table->vtable || table->table_size < 4 ||
        table->table_size > size - at)
        return -1;
    return 0;
}

int
flat_root(struct flat *table, const uint8_t *bytes, size_t size)
{
    if (size < 8 || size > INT32_MAX)
        return -1;
    return open_table(table, bytes, size, (size_t)flat_load(bytes, 4));
}

/* Find a field; *at is 0 where it is left out. */
static int
field(const struct flat *table, unsigned slot, size_t width, size_t align,
      size_t *at)
{
    size_t entry = 4 + 2 * (size_t)slot;

    *at = 0;
    if (entry + 2 > table->vtable_size)
        return 0;
    size_t offset =
        (size_t)flat_load(table->bytes + table->vtable + entry, 2);
    if (offset == 0)
        return 0;
    if (offset < 4 || width > table->table_size ||
        offset > table->table_size - width ||
        (table->table + offset) % align != 0)
        return -1;
    *at = table->table + offset;
    return 0;
}

int
flat_scalar(const struct flat *table, unsigned slot, size_t width,
            uint64_t absent, uint64_t *value)
{
    size_t at;

    if (field(table, slot, width, width, &at) != 0)
        return -1;
    *value = at == 0 ? absent : flat_load(table->bytes + at, width);
    return 0;
}

/* Follow the forward offset at a place; the target has at least four bytes. */
static int
follow(const struct flat *table, size_t at, size_t *target)
{
    uint64_t offset = flat_load(table->bytes + at, 4);

    if (offset == 0 || offset > table->size - at)
        return -1;
    *target = at + (size_t)offset;
    if (*target % 4 != 0 || *target > table->size - 4)
        return -1;
    return 0;
}

static int
string_behind(const struct flat *table, size_t at, struct flat_bytes *value)
{
    size_t target;

    if (follow(table, at, &target) != 0)
        return -1;
    value->size = (size_t)flat_load(table->bytes + target, 4);
    value->data = table->bytes + target + 4;
    /* The terminating NUL belongs to the encoding. */
    if (value->size >= table->size - target - 4 ||
        value->data[value->size] != 0)
        return -1;
    return 0;
}

int
flat_string(const struct flat *table, unsigned slot, struct flat_bytes *value)
{
    size_t at;

    if (field(table, slot, 4, 4, &at) != 0 || at == 0)
        return -1;
    return string_behind(table, at, value);
}

int
flat_optional_vector(const struct flat *table, unsigned slot,
                     size_t element_size, struct flat_vector *value)
{
    size_t at, target;

    *value = (struct flat_vector){0};
    if (field(table, slot, 4, 4, &at) != 0)
        return -1;
    if (at == 0)
        return 0;
    if (follow(table, at, &target) != 0)
        return -1;
    value->count = (uint32_t)flat_load(table->bytes + target, 4);
    value->at = target + 4;
    if (value->count > (table->size - value->at) / element_size)
        return -1;
    return 0;
}

int
flat_vector(const struct flat *table, unsigned slot, size_t element_size,
            struct flat_vector *value)
{
    if (flat_optional_vector(table, slot, element_size, value) != 0)
        return -1;
    return value->at == 0 ? -1 : 0;
}

int
flat_string_at(const struct flat *table, const struct flat_vector *vector,
               uint32_t index, struct flat_bytes *value)
{
    return string_behind(table, vector->at + 4 * (size_t)index, value);
}

int
flat_table_at(const struct flat *table, const struct flat_vector *vector,
              uint32_t index, struct flat *value)
{
    size_t target;

    if (follow(table, vector->at + 4 * (size_t)index, &target) != 0)
        return -1;
    return open_table(value, table->bytes, table->size, target);
}

int
flat_table(const struct flat *table, unsigned slot, struct flat *value)
{
    size_t at, target;

    if (field(table, slot, 4, 4, &at) != 0 || at == 0 ||
        follow(table, at, &target) != 0)
        return -1;
    return open_table(value, table->bytes, table->size, target);
}

int
flat_struct(const struct flat *table, unsigned slot, size_t size,
            const uint8_t **value)
{
    size_t at;

    if (field(table, slot, size, 4, &at) != 0)
        return -1;
    *value = at == 0 ? NULL : table->bytes + at;
    return 0;
}
