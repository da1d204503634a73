/* Raylet's local protocol, as Ray 2.60 speaks it.
 *
 * Raylet trusts its workers: it aborts, and the node with it, at a wrong
 * cookie, an unknown type, an id of another length, lists whose lengths differ,
 * or a message of somebody who is not registered.  It believes the pid that a
 * worker gives, and later signals it; and it frees whatever objects it is told
 * to free, on all nodes.
 *
 * So a worker registers once, under the pid that the kernel says it has; its
 * port is announced once; it frees objects of its own job; every other message
 * has the form that raylet reads without looking.  What a worker that hosts
 * drivers starts registers as a driver, of a job that nobody here has yet, and
 * as nothing else.
 */
#include "flat.h"
#include "session.h"

#include <string.h>

enum message {
    ACTOR_CREATION_TASK_DONE,
    REGISTER_CLIENT_REQUEST,
    REGISTER_CLIENT_REPLY,
    ANNOUNCE_WORKER_PORT,
    ANNOUNCE_WORKER_PORT_REPLY,
    DISCONNECT_CLIENT_REQUEST,
    DISCONNECT_CLIENT_REPLY,
    ASYNC_GET_OBJECTS_REQUEST,
    CANCEL_GET_REQUEST,
    NOTIFY_WORKER_BLOCKED,
    NOTIFY_WORKER_UNBLOCKED,
    WAIT_REQUEST,
    WAIT_REPLY,
    WAIT_FOR_ACTOR_CALL_ARGS_REQUEST,
    PUSH_ERROR_REQUEST,
    FREE_OBJECTS_REQUEST,
    SUBSCRIBE_PLASMA_READY,
};

/* Ray's numbers: of worker types and of languages (Python is the first). */
enum {
    TYPE_WORKER = 0, TYPE_DRIVER = 1, TYPE_SPILL = 2, TYPE_RESTORE = 3,
    LANGUAGES = 3,
};

enum { MOST_TEXT = 1 << 20, MOST_EXIT_TYPE = 16 };

static enum verdict
end(struct client *client, const char *reason)
{
    client->reason = reason;
    return END;
}

static int
read_text(const struct flat *table, unsigned slot, size_t most)
{
    struct flat_bytes text;

    if (flat_string(table, slot, &text) != 0 || text.size > most)
        return -1;
    return 0;
}

/* An id that may be nil, of the given size else. */
static int
read_nil_or(const struct flat *table, unsigned slot, size_t size)
{
    struct flat_bytes text;

    if (flat_string(table, slot, &text) != 0)
        return -1;
    return text.size == size || text.size == 0 ? 0 : -1;
}

static int
read_address(const struct flat *address)
{
    uint64_t port;

    return read_nil_or(address, 0, ID_SIZE) != 0 ||
                   read_text(address, 1, MOST_TEXT) != 0 ||
                   flat_scalar(address, 2, 4, 0, &port) != 0 ||
                   read_nil_or(address, 3, ID_SIZE) != 0
               ? -1
               : 0;
}

static int
read_ids(const struct flat *table, unsigned slot, struct flat_vector *ids)
{
    struct flat_bytes id;

    if (flat_vector(table, slot, 4, ids) != 0 || ids->count > MOST_IDS)
        return -1;
    for (uint32_t i = 0; i < ids->count; i++)
        if (flat_string_at(table, ids, i, &id) != 0 || id.size != ID_SIZE)
            return -1;
    return 0;
}

/* Slots 0 and 1: objects, and the address of the owner of each. */
static int
read_references(const struct flat *table, struct flat_vector *ids)
{
    struct flat_vector addresses;
    struct flat address;

    if (read_ids(table, 0, ids) != 0 ||
        flat_vector(table, 1, 4, &addresses) != 0 ||
        addresses.count != ids->count)
        return -1;
    for (uint32_t i = 0; i < addresses.count; i++)
        if (flat_table_at(table, &addresses, i, &address) != 0 ||
            read_address(&address) != 0)
            return -1;
    return 0;
}

static int
has_duplicates(const struct flat *table, const struct flat_vector *ids)
{
    struct objects seen = {0};
    struct flat_bytes id;
    int found = 0;

    for (uint32_t i = 0; i < ids->count && !found; i++) {
        flat_string_at(table, ids, i, &id);
        struct object *object = objects_add(&seen, id.data);
        found = object == NULL || object->state != 0;
        if (object != NULL)
            object->state = 1;
    }
    objects_free(&seen);
    return found;
}

static int
is_nil(const struct flat_bytes *job)
{
    static const uint8_t nil[JOB_SIZE] = {255, 255, 255, 255};

    return job->size != JOB_SIZE || memcmp(job->data, nil, JOB_SIZE) == 0;
}

/* A driver's job is the one that the GCS made for it, and no other's. */
static enum verdict
register_driver(struct client *client, uint64_t type,
                const struct flat_bytes *job)
{
    static const struct limits none = {UINT64_MAX, UINT64_MAX};
    struct worker *worker = client->worker;

    if (type != TYPE_DRIVER)
        return end(client, "register: as what no driver is");
    if (is_nil(job) || job_by_id(job->data) != NULL)
        return end(client, "register: a driver of somebody's job");
    if (worker_bind(worker, job->data, &none, &none) != 0)
        return end(client, "register: out of memory");
    worker->bound = 1;
    worker->kind = KIND_DRIVER;
    return PASS;
}

static enum verdict
register_client(struct client *client, const struct flat *table)
{
    struct worker *worker = client->worker;
    struct flat_bytes worker_id, job;
    uint64_t type, pid, hash, language, port;

    if (flat_scalar(table, 0, 4, TYPE_WORKER, &type) != 0 ||
        flat_string(table, 1, &worker_id) != 0 ||
        flat_scalar(table, 2, 8, 0, &pid) != 0 ||
        flat_string(table, 3, &job) != 0 ||
        (job.size != JOB_SIZE && job.size != 0) ||
        flat_scalar(table, 4, 4, 0, &hash) != 0 ||
        flat_scalar(table, 5, 4, 0, &language) != 0 ||
        read_text(table, 6, MOST_TEXT) != 0 ||
        flat_scalar(table, 7, 4, 0, &port) != 0 ||
        read_text(table, 8, MOST_TEXT) != 0 || worker_id.size != ID_SIZE)
        return end(client, "register: malformed");
    if (worker->asked_to_register)
        return end(client, "register: again");
    if (worker->host == 0 && type != TYPE_WORKER && type != TYPE_SPILL &&
        type != TYPE_RESTORE)
        return end(client, "register: as what no worker is");
    if (language >= LANGUAGES)
        return end(client, "register: an unknown language");
    if (pid != (uint64_t)worker->pid)
        return end(client, "register: another's pid");
    worker->asked_to_register = 1;
    if (worker->host != 0)
        return register_driver(client, type, &job);
    worker->kind = type == TYPE_WORKER ? KIND_WORKER : KIND_IO;
    return PASS;
}

static enum verdict
announce(struct client *client, const struct flat *table)
{
    uint64_t port;

    /* The entrypoint in slot 1 is a driver's and may be left out. */
    if (flat_scalar(table, 0, 4, 0, &port) != 0 ||
        read_text(table, 1, MOST_TEXT) != 0)
        return end(client, "announce: malformed");
    if (client->worker->announced)
        return end(client, "announce: again");
    if (port == 0 || port > UINT16_MAX)
        return end(client, "announce: not a port");
    client->worker->announced = 1;
    return PASS;
}

static enum verdict
disconnect(struct client *client, const struct flat *table)
{
    struct flat_vector error;
    uint64_t type;

    if (flat_scalar(table, 0, 4, 0, &type) != 0 || type > MOST_EXIT_TYPE ||
        read_text(table, 1, MOST_TEXT) != 0 ||
        flat_optional_vector(table, 2, 1, &error) != 0)
        return end(client, "disconnect: malformed");
    return PASS;
}

static enum verdict
async_get(struct client *client, const struct flat *table)
{
    struct worker *worker = client->worker;
    struct flat_vector ids;
    uint64_t number;

    if (read_references(table, &ids) != 0 ||
        flat_scalar(table, 2, 8, 0, &number) != 0)
        return end(client, "get: malformed");
    if (number > INT64_MAX || (worker->had_get && number <= worker->last_get))
        return end(client, "get: a number that was used");
    worker->had_get = 1;
    worker->last_get = number;
    return PASS;
}

static enum verdict
cancel_get(struct client *client, const struct flat *table)
{
    struct worker *worker = client->worker;
    uint64_t number;

    if (flat_scalar(table, 0, 8, 0, &number) != 0)
        return end(client, "cancel: malformed");
    if (!worker->had_get || number > worker->last_get)
        return end(client, "cancel: what was not asked for");
    return PASS;
}

static enum verdict
wait(struct client *client, const struct flat *table)
{
    struct flat_vector ids;
    uint64_t required, timeout;

    if (read_references(table, &ids) != 0 ||
        flat_scalar(table, 2, 4, 0, &required) != 0 ||
        flat_scalar(table, 3, 8, 0, &timeout) != 0)
        return end(client, "wait: malformed");
    if (ids.count == 0 || required > ids.count)
        return end(client, "wait: for more objects than it names");
    if ((int64_t)timeout < -1)
        return end(client, "wait: a negative timeout");
    if (has_duplicates(table, &ids))
        return end(client, "wait: for an object twice");
    return PASS;
}

static enum verdict
wait_for_arguments(struct client *client, const struct flat *table)
{
    struct flat_vector ids;
    uint64_t tag;

    if (read_references(table, &ids) != 0 || ids.count == 0 ||
        flat_scalar(table, 2, 4, 0, &tag) != 0)
        return end(client, "wait for arguments: malformed");
    return PASS;
}

static enum verdict
push_error(struct client *client, const struct flat *table)
{
    const struct job *job = client->worker->job;
    struct flat_bytes id;
    uint64_t time;

    if (flat_string(table, 0, &id) != 0 || id.size != JOB_SIZE ||
        read_text(table, 1, MOST_TEXT) != 0 ||
        read_text(table, 2, MOST_TEXT) != 0 ||
        flat_scalar(table, 3, 8, 0, &time) != 0)
        return end(client, "error: malformed");
    if (!is_nil(&id) &&
        (job == NULL || memcmp(id.data, job->id, JOB_SIZE) != 0))
        return end(client, "error: to another job");
    return PASS;
}

static enum verdict
free_objects(struct client *client, const struct flat *table)
{
    const struct worker *worker = client->worker;
    struct flat_vector ids;
    struct flat_bytes id;
    uint64_t local;

    if (flat_scalar(table, 0, 1, 0, &local) != 0 ||
        read_ids(table, 1, &ids) != 0)
        return end(client, "free: malformed");
    for (uint32_t i = 0; i < ids.count; i++) {
        flat_string_at(table, &ids, i, &id);
        int own = worker->job != NULL &&
                  memcmp(id.data + JOB_AT, worker->job->id, JOB_SIZE) == 0;
        int warm_up = worker->warmed_up &&
                      memcmp(id.data, worker->warm_up, ID_SIZE) == 0;
        if (!own && !warm_up)
            return end(client, "free: an object of another job");
    }
    return PASS;
}

static enum verdict
subscribe(struct client *client, const struct flat *table)
{
    struct flat_bytes id;
    struct flat address;

    if (flat_string(table, 0, &id) != 0 || id.size != ID_SIZE ||
        flat_table(table, 1, &address) != 0 || read_address(&address) != 0)
        return end(client, "subscribe: malformed");
    return PASS;
}

static enum verdict
actor_done(struct client *client, size_t size)
{
    struct worker *worker = client->worker;

    if (size != 0)
        return end(client, "actor created: malformed");
    if (worker->actor_done || !(worker->actor_bound || session.bind_first_use))
        return end(client, "actor created: by what serves none");
    worker->actor_done = 1;
    return PASS;
}

enum verdict
raylet_request(struct client *client, int64_t type, const uint8_t *body,
               size_t size)
{
    struct flat table;

    if (type != REGISTER_CLIENT_REQUEST && !client->worker->registered)
        return end(client, "a message before registration");
    if (type == ACTOR_CREATION_TASK_DONE)
        return actor_done(client, size);
    if (flat_root(&table, body, size) != 0)
        return end(client, "malformed message");
    switch (type) {
    case REGISTER_CLIENT_REQUEST:
        return register_client(client, &table);
    case ANNOUNCE_WORKER_PORT:
        return announce(client, &table);
    case DISCONNECT_CLIENT_REQUEST:
        return disconnect(client, &table);
    case ASYNC_GET_OBJECTS_REQUEST:
        return async_get(client, &table);
    case CANCEL_GET_REQUEST:
        return cancel_get(client, &table);
    case NOTIFY_WORKER_BLOCKED:
    case NOTIFY_WORKER_UNBLOCKED:
        return PASS;
    case WAIT_REQUEST:
        return wait(client, &table);
    case WAIT_FOR_ACTOR_CALL_ARGS_REQUEST:
        return wait_for_arguments(client, &table);
    case PUSH_ERROR_REQUEST:
        return push_error(client, &table);
    case FREE_OBJECTS_REQUEST:
        return free_objects(client, &table);
    case SUBSCRIBE_PLASMA_READY:
        return subscribe(client, &table);
    default:
        return end(client, "a message that no worker sends");
    }
}

int
raylet_reply(struct client *client, int64_t type, const uint8_t *body,
             size_t size)
{
    struct flat table;
    uint64_t success;

    switch (type) {
    case REGISTER_CLIENT_REPLY:
        if (flat_root(&table, body, size) != 0 ||
            flat_scalar(&table, 0, 1, 0, &success) != 0)
            return -1;
        client->worker->registered = success != 0;
        return 0;
    case ANNOUNCE_WORKER_PORT_REPLY:
    case DISCONNECT_CLIENT_REPLY:
    case WAIT_REPLY:
        return 0;
    default:
        return -1;
    }
}
