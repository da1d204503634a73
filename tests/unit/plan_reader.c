/* Reads plans from stdin, each behind its length (u32, native order), with the
 * launcher's own parser, and touches every field that the parser vouches for.
 * One line for each: "refused", or "taken <records>".  Built with ASan: each plan
 * lies in memory that ends where it ends. */
#include "../../native/plan.c"

#include <stdio.h>
#include <stdint.h>

static volatile uint64_t sink;

static void
touch(const struct record *record)
{
    const struct shape *shape = &SHAPES[record->type];
    size_t offset = 0, rest;

    for (; offset + 8 <= shape->fixed; offset += 8)
        sink += field_u64(record, offset);
    for (; offset + 4 <= shape->fixed; offset += 4)
        sink += field_u32(record, offset);
    if (shape->strings > 0)
        sink += strlen(field_str(record, shape->fixed));
    if (shape->strings > 1)
        sink += strlen(field_str2(record, shape->fixed));
    if (shape->rest) {
        offset = shape->fixed;
        if (shape->strings > 0)
            offset += strlen(field_str(record, offset)) + 1;
        const uint8_t *bytes = field_rest(record, offset, &rest);
        for (size_t i = 0; i < rest; i++)
            sink += bytes[i];
    }
}

int
main(void)
{
    uint32_t length;

    while (fread(&length, sizeof length, 1, stdin) == 1) {
        uint8_t *bytes = malloc(length ? length : 1);
        struct plan plan;
        if (bytes == NULL || fread(bytes, 1, length, stdin) != length)
            return 1;
        if (plan_parse(&plan, bytes, length) != 0) {
            puts("refused");
        } else {
            printf("taken %zu\n", plan.count);
            for (int type = 1; type <= R_MAX; type++) {
                const struct record *record;
                size_t cursor = 0;
                while ((record = plan_next(&plan, (enum record_type)type, &cursor)))
                    touch(record);
            }
            free(plan.records);
        }
        free(bytes);
    }
    return 0;
}
