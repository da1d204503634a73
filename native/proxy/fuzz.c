/* Throws random and mutated messages at the proxy's checks, under sanitizers.
 *
 *   fuzz CORPUS SECONDS SEED
 *
 * The corpus is recorded traffic, one message a line: socket, direction, type,
 * body in hex.  Each message lies in memory of its exact size, so that a read
 * past its end is seen; after each, what is counted must be what is stored.
 */
#define _GNU_SOURCE
#include "session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_MESSAGES = 512, MOST_BODY = 1 << 16, CLIENTS = 4 };

static struct message {
    int plasma, reply;
    int64_t type;
    size_t size;
    uint8_t *body;
} corpus[MOST_MESSAGES];
static size_t messages;

static uint64_t state;

static uint64_t
draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void
read_corpus(const char *path)
{
    static char line[2 * MOST_BODY + 64];
    FILE *file = fopen(path, "r");

    if (file == NULL)
        abort();
    while (messages < MOST_MESSAGES && fgets(line, sizeof line, file)) {
        struct message *message = &corpus[messages];
        char name[16], direction[16];
        int type, start = 0;
        if (line[0] == '#' ||
            sscanf(line, "%15s %15s %d %n", name, direction, &type,
                   &start) < 3)
            continue;
        message->plasma = strcmp(name, "plasma") == 0;
        message->reply = strcmp(direction, "reply") == 0;
        message->type = type;
        message->size = strcspn(line + start, "\n") / 2;
        message->body = malloc(message->size + 1);
        for (size_t i = 0; i < message->size; i++) {
            unsigned value;
            if (sscanf(line + start + 2 * i, "%2x", &value) != 1)
                abort();
            message->body[i] = (uint8_t)value;
        }
        messages++;
    }
    fclose(file);
    if (messages == 0)
        abort();
}

static size_t
mutate(uint8_t *body, size_t size)
{
    static const uint32_t edges[] = {0, 1, 3, 4, 28, 0x7f, 0x80, 0xff, 0xffff,
                                     0x7fffffff, 0x80000000, 0xfffffffc,
                                     0xffffffff};

    for (uint64_t n = draw(6); n > 0 && size > 0; n--) {
        size_t at = (size_t)draw(size);
        switch (draw(5)) {
        case 0:
            body[at] = (uint8_t)draw(256);
            break;
        case 1:
            body[at] ^= (uint8_t)(1 << draw(8));
            break;
        case 2: {
            uint32_t edge = edges[draw(sizeof edges / sizeof *edges)];
            at &= ~(size_t)3;
            if (at + 4 <= size)
                memcpy(body + at, &edge, 4);
            break;
        }
        case 3: {
            uint32_t offset = (uint32_t)draw(size + 8);
            at &= ~(size_t)3;
            if (at + 4 <= size)
                memcpy(body + at, &offset, 4);
            break;
        }
        default:
            size = at;
        }
    }
    return size;
}

/* What is counted is what is sealed and stored, or made and not sealed. */
static void
check(struct client *clients)
{
    for (struct job *job = session.jobs; job != NULL; job = job->next) {
        uint64_t bytes = 0, objects = 0;
        struct object *object;
        size_t cursor = 0;
        while ((object = objects_next(&job->stored, &cursor)) != NULL) {
            bytes += object->size;
            objects++;
        }
        for (int i = 0; i < CLIENTS; i++) {
            if (clients[i].worker->job != job)
                continue;
            cursor = 0;
            while ((object = objects_next(&clients[i].held, &cursor)) != NULL)
                if (object->worker != 0) {
                    bytes += object->size;
                    objects++;
                }
        }
        if (bytes != job->count.bytes || objects != job->count.objects ||
            bytes > session.job_limits.bytes ||
            objects > session.job_limits.objects)
            abort();
    }
}

static void
renew(struct client *client, pid_t pid)
{
    if (client->worker != NULL) {
        plasma_gone(client);
        client->worker->connections--;
        worker_release(client->worker);
    }
    *client = (struct client){.worker = worker_of(pid)};
    client->worker->connections++;
    client->worker->registered = draw(4) != 0;
    client->worker->host = draw(4) == 0;
    client->worker->kind = draw(8) == 0 ? KIND_IO : KIND_WORKER;
}

int
main(int argc, char **argv)
{
    static uint8_t body[MOST_BODY];
    struct client clients[CLIENTS] = {0};
    unsigned long passed = 0, total = 0;
    pid_t pid = 100;

    if (argc != 4 || objects_seed() != 0)
        return 2;
    read_corpus(argv[1]);
    uint64_t until = now_ms() + strtoull(argv[2], NULL, 10) * 1000;
    state = strtoull(argv[3], NULL, 10) * 2 + 1;
    session.bind_first_use = 1;
    session.job_limits = (struct limits){1 << 26, 64};
    session.worker_limits = (struct limits){1 << 25, 32};
    for (int i = 0; i < CLIENTS; i++)
        renew(&clients[i], ++pid);
    while (now_ms() < until) {
        const struct message *from = &corpus[draw(messages)];
        struct client *client = &clients[draw(CLIENTS)];
        size_t size = from->size < MOST_BODY ? from->size : MOST_BODY;
        int64_t type = from->type;
        memcpy(body, from->body, size);
        if (draw(3) != 0)
            size = mutate(body, size);
        if (draw(50) == 0)
            for (size_t i = 0; i < size; i++)
                body[i] = (uint8_t)draw(256);
        if (draw(30) == 0)
            type = (int64_t)draw(24) - 2;
        uint8_t *exact = malloc(size + (size == 0));
        memcpy(exact, body, size);
        client->waited_ms = draw(2) * GRACE_SPILLED_MS;
        total++;
        int ended = 0;
        if (from->reply)
            ended = (from->plasma ? plasma_reply : raylet_reply)(
                        client, type, exact, size) != 0;
        else {
            enum verdict verdict =
                (from->plasma ? plasma_request : raylet_request)(
                    client, type, exact, size);
            passed += verdict == PASS;
            ended = verdict == END;
        }
        free(exact);
        if (ended && draw(3) == 0)
            renew(client, ++pid);
        /* A sweep that finds some objects gone. */
        if (draw(64) == 0 && session.jobs != NULL) {
            size_t cursor = 0;
            struct object *object;
            while ((object = objects_next(&session.jobs->stored, &cursor)))
                if (draw(2)) {
                    quota_give_back(session.jobs, object->worker,
                                    object->size);
                    objects_remove(&session.jobs->stored, object);
                }
        }
        jobs_forget();
        check(clients);
    }
    for (int i = 0; i < CLIENTS; i++)
        plasma_gone(&clients[i]);
    printf("%lu messages, %lu let through\n", total, passed);
    return passed == 0;
}
