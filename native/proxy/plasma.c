/* The object store's protocol, as Ray 2.60 speaks it.
 *
 * The store trusts its clients: it aborts, and the node with it, when a client
 * seals, aborts or releases what it does not hold, sends an unknown type or an
 * id of another length, or says of memory outside the store's own that it need
 * not be unmapped.  So the proxy keeps for each connection what the store
 * keeps, the objects it holds, and lets only those messages through that an
 * honest client could send in that state.
 *
 * An object of a connection is:
 *
 *   ASKED    creation was requested and not answered (size counted)
 *   WAITING  the store has no room yet; the client may ask again
 *   MADE     created, not sealed
 *   SEALING  seal was requested and not answered
 *   HELD     sealed, or got from the store, and not released
 *   NONE     only being waited for (gets > 0)
 *
 * A request to get an object that is under way forbids its release: the store
 * may be about to hand it out again, and then proxy and store would disagree.
 */
#include "flat.h"
#include "session.h"

#include <string.h>

enum message {
    DISCONNECT_CLIENT,
    CREATE_REQUEST,
    CREATE_RETRY_REQUEST,
    CREATE_REPLY,
    ABORT_REQUEST,
    ABORT_REPLY,
    SEAL_REQUEST,
    SEAL_REPLY,
    GET_REQUEST,
    GET_REPLY,
    RELEASE_REQUEST,
    RELEASE_REPLY,
    DELETE_REQUEST,
    DELETE_REPLY,
    CONTAINS_REQUEST,
    CONTAINS_REPLY,
    CONNECT_REQUEST,
    CONNECT_REPLY,
    DEBUG_STRING_REQUEST,
    DEBUG_STRING_REPLY,
};

enum { NONE, ASKED, WAITING, MADE, SEALING, HELD };

enum { PLASMA_OK = 0, PLASMA_OUT_OF_MEMORY = 3 };

/* Of the struct that describes an object's place in the store. */
enum { SPEC_SIZE = 80, SPEC_DATA_SIZE = 32, SPEC_FALLBACK = 64 };

static enum verdict
end(struct client *client, const char *reason)
{
    client->reason = reason;
    return END;
}

static int
read_id(const struct flat *table, unsigned slot, const uint8_t **id)
{
    struct flat_bytes text;

    if (flat_string(table, slot, &text) != 0 || text.size != ID_SIZE)
        return -1;
    *id = text.data;
    return 0;
}

/* Node, worker and address fields of who owns an object. */
static int
read_owner_id(const struct flat *table, unsigned slot)
{
    struct flat_bytes text;

    if (flat_string(table, slot, &text) != 0)
        return -1;
    return text.size == ID_SIZE || text.size == 0 ? 0 : -1;
}

/* CreateReply with OutOfMemory: what Ray raises ObjectStoreFullError for.
 *
 * Layout: root offset, vtable of four slots (id, retry, object, error), table,
 * string; offsets are from the start of the body. */
static void
answer_full(struct client *client, const uint8_t *id)
{
    enum {
        VTABLE = 4, TABLE = 20, ID_FIELD = 24, ERROR_FIELD = 28,
        SPEC_FIELD = 32, STRING = SPEC_FIELD + SPEC_SIZE,
        BODY = STRING + 4 + ID_SIZE + 4,
    };
    const uint16_t vtable[] = {
        12, STRING - TABLE, ID_FIELD - TABLE, 0, SPEC_FIELD - TABLE,
        ERROR_FIELD - TABLE,
    };
    const uint32_t root = TABLE, to_vtable = TABLE - VTABLE,
                   to_string = STRING - ID_FIELD,
                   error = PLASMA_OUT_OF_MEMORY, id_size = ID_SIZE;
    const uint64_t header[3] = {RAY_COOKIE, CREATE_REPLY, BODY};
    uint8_t *body = client->answer + HEADER_SIZE;

    _Static_assert(HEADER_SIZE + BODY <= MOST_ANSWER, "answer too small");
    memset(client->answer, 0, sizeof client->answer);
    memcpy(client->answer, header, sizeof header);
    memcpy(body, &root, 4);
    memcpy(body + VTABLE, vtable, sizeof vtable);
    memcpy(body + TABLE, &to_vtable, 4);
    memcpy(body + ID_FIELD, &to_string, 4);
    memcpy(body + ERROR_FIELD, &error, 4);
    memcpy(body + STRING, &id_size, 4);
    memcpy(body + STRING + 4, id, ID_SIZE);
    client->answer_size = HEADER_SIZE + BODY;
}

static enum verdict
create(struct client *client, const struct flat *table)
{
    struct worker *worker = client->worker;
    struct flat_bytes address;
    const uint8_t *id;
    uint64_t data, metadata, source, device, port, is_mutable, immediately;

    if (read_id(table, 0, &id) != 0 || read_owner_id(table, 1) != 0 ||
        flat_string(table, 2, &address) != 0 ||
        flat_scalar(table, 3, 4, 0, &port) != 0 ||
        read_owner_id(table, 4) != 0 ||
        flat_scalar(table, 5, 1, 0, &is_mutable) != 0 ||
        flat_scalar(table, 6, 8, 0, &data) != 0 ||
        flat_scalar(table, 7, 8, 0, &metadata) != 0 ||
        flat_scalar(table, 8, 4, 0, &source) != 0 ||
        flat_scalar(table, 9, 4, 0, &device) != 0 ||
        flat_scalar(table, 10, 1, 0, &immediately) != 0)
        return end(client, "create: malformed");
    if (data > INT64_MAX / 4 || metadata > INT64_MAX / 4)
        return end(client, "create: a size that no store has");
    if (device != 0)
        return end(client, "create: on a device");
    if (source > 3 || (source != 0 && worker->kind != KIND_IO))
        return end(client, "create: as another source than a worker");
    struct object *object = objects_find(&client->held, id);
    if (object != NULL && object->state != NONE)
        return end(client, "create: an object that it holds already");
    if (client->held.count >= MOST_HELD)
        return end(client, "create: too many objects in hand");

    uint64_t size = data + metadata;
    int counted = worker->kind != KIND_IO;
    if (!worker->warmed_up && size <= WARM_UP_SIZE) {
        counted = 0; /* each worker makes one of a random id as it starts */
        memcpy(worker->warm_up, id, ID_SIZE);
    }
    worker->warmed_up = 1;
    if (counted) {
        if (worker->job == NULL && session.bind_first_use) {
            const struct limits none = {UINT64_MAX, UINT64_MAX};
            if (worker_bind(worker, id + JOB_AT, &none, &none) != 0)
                return end(client, "create: out of memory");
        }
        if (worker->job == NULL)
            return end(client, "create: before the worker is bound to a job");
        if (memcmp(id + JOB_AT, worker->job->id, JOB_SIZE) != 0)
            return end(client, "create: an object of another job");
        if (!quota_fits(worker, size)) {
            uint64_t grace =
                worker->job->has_spilled ? GRACE_SPILLED_MS : GRACE_MS;
            if (size <= worker->job_limits.bytes &&
                size <= worker->limits.bytes && client->waited_ms < grace)
                return PARK;
            worker->job->refused++;
            worker->refused++;
            client->reason = "create: over quota";
            answer_full(client, id);
            return ANSWER;
        }
    }
    object = objects_add(&client->held, id);
    if (object == NULL)
        return end(client, "create: out of memory");
    object->state = ASKED;
    object->size = size;
    if (counted) {
        object->worker = worker->serial; /* 0: not counted */
        quota_take(worker, size);
    }
    return PASS;
}

static void
uncount(struct client *client, const struct object *object)
{
    if (object->worker != 0)
        quota_give_back(client->worker->job, object->worker, object->size);
}

/* What a worker got counts until it lets go of it.  -1: more than it may have. */
static int
fetch(struct client *client, struct object *object, uint64_t size)
{
    struct worker *worker = client->worker;
    const struct fetch_limits *limits = &worker->fetch_limits;
    struct count *counts[] = {&worker->fetched,
                              worker->job != NULL ? &worker->job->fetched : NULL};
    const struct limits *most[] = {&limits->worker, &limits->job};
    int over = size > limits->each;

    object->size = size;
    for (int i = 0; i < 2 && counts[i] != NULL; i++) {
        counts[i]->bytes += size;
        counts[i]->objects++;
        object->fetched++;
        over |= counts[i]->bytes > most[i]->bytes ||
                counts[i]->objects > most[i]->objects;
    }
    worker->fetched_bytes += size;
    worker->fetched_objects++;
    return over ? -1 : 0;
}

static void
unfetch(struct client *client, struct object *object)
{
    struct worker *worker = client->worker;
    struct count *counts[] = {&worker->fetched,
                              worker->job != NULL ? &worker->job->fetched : NULL};

    for (int i = 0; i < object->fetched; i++) {
        counts[i]->bytes -= object->size;
        counts[i]->objects--;
    }
    object->fetched = 0;
}

/* What is neither held nor waited for need not be remembered. */
static void
drop(struct client *client, struct object *object)
{
    object->state = NONE;
    object->size = 0;
    object->worker = 0;
    if (object->gets == 0)
        objects_remove(&client->held, object);
}

static enum verdict
create_retry(struct client *client, const struct flat *table)
{
    const uint8_t *id;
    uint64_t request;

    if (read_id(table, 0, &id) != 0 ||
        flat_scalar(table, 1, 8, 0, &request) != 0)
        return end(client, "create again: malformed");
    struct object *object = objects_find(&client->held, id);
    if (object == NULL || object->state != WAITING ||
        object->request != request)
        return end(client, "create again: what it did not ask for");
    object->state = ASKED;
    return PASS;
}

static enum verdict
get(struct client *client, const struct flat *table)
{
    struct flat_vector ids;
    struct flat_bytes id;
    uint64_t timeout;

    if (flat_vector(table, 0, 4, &ids) != 0 ||
        flat_scalar(table, 1, 8, 0, &timeout) != 0)
        return end(client, "get: malformed");
    if (ids.count == 0 || ids.count > MOST_IDS ||
        client->held.count + ids.count > 2 * (size_t)MOST_HELD)
        return end(client, "get: none or too many objects");
    if ((int64_t)timeout < -1)
        return end(client, "get: a negative timeout");
    for (uint32_t i = 0; i < ids.count; i++)
        if (flat_string_at(table, &ids, i, &id) != 0 || id.size != ID_SIZE)
            return end(client, "get: malformed id");
    for (uint32_t i = 0; i < ids.count; i++) {
        flat_string_at(table, &ids, i, &id);
        struct object *object = objects_add(&client->held, id.data);
        if (object == NULL || object->gets == UINT32_MAX)
            return end(client, "get: out of memory");
        object->gets++;
    }
    return PASS;
}

static enum verdict
release(struct client *client, const struct flat *table)
{
    const uint8_t *id;
    uint64_t may_unmap;

    if (read_id(table, 0, &id) != 0 ||
        flat_scalar(table, 1, 1, 0, &may_unmap) != 0)
        return end(client, "release: malformed");
    struct object *object = objects_find(&client->held, id);
    if (object == NULL || object->state != HELD)
        return end(client, "release: an object that it does not hold");
    if (object->gets != 0)
        return end(client, "release: an object that it asks for");
    if (object->fallback && !may_unmap)
        return end(client, "release: memory that must be unmapped");
    unfetch(client, object);
    objects_remove(&client->held, object);
    return PASS;
}

static enum verdict
seal_or_abort(struct client *client, const struct flat *table, int seal)
{
    const uint8_t *id;

    if (read_id(table, 0, &id) != 0)
        return end(client, "seal or abort: malformed");
    struct object *object = objects_find(&client->held, id);
    if (object == NULL || object->state != MADE)
        return end(client, "seal or abort: what it did not create");
    if (seal) {
        object->state = SEALING;
        return PASS;
    }
    uncount(client, object);
    drop(client, object);
    return PASS;
}

enum verdict
plasma_request(struct client *client, int64_t type, const uint8_t *body,
               size_t size)
{
    struct flat table;
    const uint8_t *id;

    if (type == DISCONNECT_CLIENT)
        return end(client, NULL);
    if (client->only_asks && type != CONTAINS_REQUEST &&
        type != CONNECT_REQUEST)
        return end(client, "more than a question on a second connection");
    if (flat_root(&table, body, size) != 0)
        return end(client, "malformed message");
    switch (type) {
    case CREATE_REQUEST:
        return create(client, &table);
    case CREATE_RETRY_REQUEST:
        return create_retry(client, &table);
    case ABORT_REQUEST:
        return seal_or_abort(client, &table, 0);
    case SEAL_REQUEST:
        return seal_or_abort(client, &table, 1);
    case GET_REQUEST:
        return get(client, &table);
    case RELEASE_REQUEST:
        return release(client, &table);
    case CONTAINS_REQUEST:
        if (read_id(&table, 0, &id) != 0)
            return end(client, "contains: malformed");
        return PASS;
    case CONNECT_REQUEST:
    case DEBUG_STRING_REQUEST:
        return PASS;
    default:
        /* Deletion too: Ray's workers have raylet delete. */
        return end(client, "a message that no worker sends");
    }
}

static int
created(struct client *client, const struct flat *table)
{
    const uint8_t *id, *spec;
    uint64_t retry, error;

    if (read_id(table, 0, &id) != 0 ||
        flat_scalar(table, 1, 8, 0, &retry) != 0 ||
        flat_struct(table, 2, SPEC_SIZE, &spec) != 0 ||
        flat_scalar(table, 3, 4, 0, &error) != 0)
        return -1;
    struct object *object = objects_find(&client->held, id);
    if (object == NULL || object->state != ASKED)
        return -1;
    if (retry != 0) {
        object->state = WAITING;
        object->request = retry;
    } else if (error != PLASMA_OK) {
        uncount(client, object);
        drop(client, object);
    } else {
        object->state = MADE;
        object->fallback = spec != NULL && spec[SPEC_FALLBACK] != 0;
    }
    return 0;
}

/* A sealed object is its job's until a sweep finds that it is gone. */
static int
sealed(struct client *client, const struct flat *table)
{
    const uint8_t *id;

    if (read_id(table, 0, &id) != 0)
        return -1;
    struct object *object = objects_find(&client->held, id);
    if (object == NULL || object->state != SEALING)
        return -1;
    object->state = HELD;
    if (object->worker == 0)
        return 0;
    struct job *job = client->worker->job;
    struct object *known = objects_find(&job->stored, id);
    if (known != NULL) /* it was lost or freed, and made again */
        quota_give_back(job, known->worker, known->size);
    else if ((known = objects_add(&job->stored, id)) == NULL)
        return -1;
    known->worker = object->worker;
    known->size = object->size;
    object->worker = 0;
    return 0;
}

static int
got(struct client *client, const struct flat *table)
{
    struct flat_vector ids, specs;
    struct flat_bytes id;

    if (flat_vector(table, 0, 4, &ids) != 0 ||
        flat_vector(table, 1, SPEC_SIZE, &specs) != 0 ||
        ids.count != specs.count)
        return -1;
    for (uint32_t i = 0; i < ids.count; i++) {
        const uint8_t *spec = table->bytes + specs.at + SPEC_SIZE * (size_t)i;
        if (flat_string_at(table, &ids, i, &id) != 0 || id.size != ID_SIZE)
            return -1;
        struct object *object = objects_find(&client->held, id.data);
        if (object == NULL || object->gets == 0)
            return -1;
        object->gets--;
        uint64_t size = flat_load(spec + SPEC_DATA_SIZE, 8);
        if (size != UINT64_MAX) {
            if (object->state == NONE) {
                object->state = HELD;
                if (fetch(client, object, size) != 0) {
                    client->reason = "got more at once than max_argument, "
                                     "max_arguments or max_job_arguments of its "
                                     "profile's object_store allow";
                    return -1;
                }
            }
            object->fallback = spec[SPEC_FALLBACK] != 0;
        } else if (object->gets == 0 && object->state == NONE)
            objects_remove(&client->held, object);
    }
    return 0;
}

int
plasma_reply(struct client *client, int64_t type, const uint8_t *body,
             size_t size)
{
    struct flat table;

    switch (type) {
    case CREATE_REPLY:
    case SEAL_REPLY:
    case GET_REPLY:
        if (flat_root(&table, body, size) != 0)
            return -1;
        return type == CREATE_REPLY ? created(client, &table)
               : type == SEAL_REPLY ? sealed(client, &table)
                                    : got(client, &table);
    case ABORT_REPLY:
    case RELEASE_REPLY:
    case CONTAINS_REPLY:
    case CONNECT_REPLY:
    case DEBUG_STRING_REPLY:
        return 0;
    default:
        return -1;
    }
}

void
plasma_gone(struct client *client)
{
    size_t cursor = 0;
    struct object *object;

    /* The store aborts what was not sealed.  A seal that was not answered may
     * have come first: it stays counted until a sweep. */
    while ((object = objects_next(&client->held, &cursor)) != NULL) {
        unfetch(client, object);
        if (object->state == SEALING) {
            uint8_t id[ID_SIZE];
            struct job *job = client->worker->job;
            struct object *known;
            memcpy(id, object->id, ID_SIZE);
            if (object->worker == 0)
                continue;
            known = objects_find(&job->stored, id);
            if (known == NULL && (known = objects_add(&job->stored, id))) {
                known->worker = object->worker;
                known->size = object->size;
                continue;
            }
        }
        uncount(client, object);
    }
    objects_free(&client->held);
}

/* ContainsRequest and Seal have the same form: one id in one table. */
void
plasma_contains(uint8_t *message, const uint8_t *id)
{
    enum { BODY = CONTAINS_SIZE - HEADER_SIZE };
    const uint64_t header[3] = {RAY_COOKIE, CONTAINS_REQUEST, BODY};
    uint8_t *body = message + HEADER_SIZE;

    memset(message, 0, CONTAINS_SIZE);
    memcpy(message, header, sizeof header);
    const uint32_t root = 12, to_vtable = 6, to_string = 4, size = ID_SIZE;
    const uint16_t vtable[] = {6, 8, 4};
    memcpy(body, &root, 4);
    memcpy(body + 6, vtable, sizeof vtable);
    memcpy(body + 12, &to_vtable, 4);
    memcpy(body + 16, &to_string, 4);
    memcpy(body + 20, &size, 4);
    memcpy(body + 24, id, ID_SIZE);
}

int
plasma_has(int64_t type, const uint8_t *body, size_t size, const uint8_t *id)
{
    struct flat table;
    const uint8_t *shown;
    uint64_t has;

    if (type != CONTAINS_REPLY || flat_root(&table, body, size) != 0 ||
        read_id(&table, 0, &shown) != 0 || memcmp(shown, id, ID_SIZE) != 0 ||
        flat_scalar(&table, 1, 4, 0, &has) != 0)
        return -1;
    return has != 0;
}
