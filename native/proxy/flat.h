/* Bounded reading of flatbuffers, the encoding of Ray's local messages.
 *
 * Nothing is copied and nothing is trusted: each offset is checked against the
 * buffer before it is followed, so that what passes here can be read by Ray's
 * own unchecked accessors.  A message is a root table; a table has a vtable
 * with the place of each field by slot number; strings, vectors and tables lie
 * behind 32-bit forward offsets.  All functions return 0, or -1 if malformed.
 */
#ifndef RAYSANDBOX_FLAT_H
#define RAYSANDBOX_FLAT_H

#include <stddef.h>
#include <stdint.h>

struct flat {
    const uint8_t *bytes;
    size_t size;
    size_t table, vtable;
    uint16_t table_size, vtable_size;
};

struct flat_bytes {
    const uint8_t *data;
    size_t size;
};

struct flat_vector {
    size_t at; /* of the first element */
    uint32_t count;
};

int flat_root(struct flat *table, const uint8_t *bytes, size_t size);

/* A field of 1, 2, 4 or 8 bytes; *value is `absent` where it is left out. */
int flat_scalar(const struct flat *table, unsigned slot, size_t width,
                uint64_t absent, uint64_t *value);

/* A string or vector that must be there: Ray reads it without looking. */
int flat_string(const struct flat *table, unsigned slot,
                struct flat_bytes *value);
int flat_vector(const struct flat *table, unsigned slot, size_t element_size,
                struct flat_vector *value);

/* The same where it may be left out; *value is then empty. */
int flat_optional_vector(const struct flat *table, unsigned slot,
                         size_t element_size, struct flat_vector *value);

/* Elements of a vector of strings, or of tables. */
int flat_string_at(const struct flat *table, const struct flat_vector *vector,
                   uint32_t index, struct flat_bytes *value);
int flat_table_at(const struct flat *table, const struct flat_vector *vector,
                  uint32_t index, struct flat *value);

/* A table that must be there. */
int flat_table(const struct flat *table, unsigned slot, struct flat *value);

/* A struct within the table; *value is NULL where it is left out. */
int flat_struct(const struct flat *table, unsigned slot, size_t size,
                const uint8_t **value);

uint64_t flat_load(const uint8_t *at, size_t width);

#endif
