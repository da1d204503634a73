/* Who speaks through the proxy, what they hold, and what they may hold.
 *
 * A worker is a process that raylet started, known by the pid that the kernel
 * gave for its connection.  It belongs to one job, named once, before any code
 * of a user runs in it (see bind_worker in proxy.c).  A job's count is of the sealed and
 * unsealed objects that its workers made and that are still in the store, or in
 * the files that raylet spills them to.
 */
#ifndef RAYSANDBOX_SESSION_H
#define RAYSANDBOX_SESSION_H

#include "objects.h"

#include <sys/types.h>

enum {
    HEADER_SIZE = 24,           /* cookie, type, length: 8 bytes each */
    MOST_REQUEST = 32 << 20,    /* bytes of a message to Ray */
    MOST_REPLY = 128 << 20,     /* bytes of a message from Ray */
    MOST_HELD = 1 << 20,        /* objects in the hands of one connection */
    MOST_IDS = 1 << 20,         /* ids in one message */
    WARM_UP_SIZE = 64,          /* bytes of a worker's own first object */
    MOST_ANSWER = 256,          /* bytes of an answer that the proxy makes */
    GRACE_MS = 2000,            /* that a creation over quota waits for room */
    GRACE_SPILLED_MS = 5000,    /* where what is freed is in files */
};

extern const uint64_t RAY_COOKIE;

/* Limits of a job or worker, in bytes and objects; UINT64_MAX is none. */
struct limits {
    uint64_t bytes, objects;
};

struct count {
    uint64_t bytes, objects;
};

/* What a worker may have got from the store, and not released, at once. */
struct fetch_limits {
    struct limits job, worker;
    uint64_t each; /* bytes of one object */
};

struct job {
    struct job *next;
    uint8_t id[JOB_SIZE];
    struct count count, fetched; /* stored; got and not released */
    struct objects stored; /* sealed: what a sweep asks the store for */
    uint64_t refused;
    uint64_t swept_ms, sweep_took_ms; /* when its last sweep ended; and took */
    int workers;
    int parked;   /* connections that wait for a sweep */
    int sweeping; /* one is under way */
    int has_spilled; /* its last sweep found objects in files */
};

enum worker_kind { KIND_UNKNOWN, KIND_WORKER, KIND_IO, KIND_DRIVER };

struct worker {
    struct worker *next;
    pid_t pid, parent;
    int pidfd; /* -1: none */
    uint32_t serial;
    enum worker_kind kind;
    struct job *job; /* NULL: not bound yet */
    struct limits job_limits, limits; /* of its job and of itself */
    struct fetch_limits fetch_limits;
    struct count count, fetched;
    uint64_t refused, fetched_bytes, fetched_objects;
    int connections, only_asking;
    int had_plasma, had_raylet; /* each is had once in a life */
    int registered, announced, warmed_up;
    uint8_t warm_up[ID_SIZE]; /* the object of that */
    int bound;                   /* through the bind socket */
    int actor_bound, actor_done; /* it serves an actor; said so to raylet */
    int hosts_drivers; /* what it starts may be drivers of jobs of their own */
    uint32_t host;     /* a driver: serial of the worker that started it */
    int asked_to_register;
    uint64_t last_get;        /* number of its last request for objects */
    int had_get;
};

/* A connection, as the checks of its protocol see it. */
struct client {
    struct worker *worker;
    struct objects held; /* see plasma.c */
    uint8_t answer[MOST_ANSWER];
    size_t answer_size;
    int only_asks; /* may ask what the store has, and nothing else */
    const char *reason; /* of a refusal or an end, in words */
    uint64_t waited_ms; /* since the message at hand was parked */
};

enum verdict {
    PASS,   /* forward it */
    ANSWER, /* send client->answer back instead */
    PARK,   /* ask again when the worker's job was swept: the store frees
             * objects up to a second after their owner let go */
    END,    /* close this connection; client->reason says why */
};

/* Settings and all that is known; one of each in a process. */
struct session {
    struct limits job_limits, worker_limits;
    int bind_first_use; /* the first object names the job */
    struct job *jobs;
    struct worker *workers;
    uint32_t last_serial;
    uint64_t ended;     /* connections that broke a rule */
    uint64_t unwritten; /* events of a flood */
};

extern struct session session;

struct worker *worker_of(pid_t pid); /* NULL: out of memory */
void worker_release(struct worker *worker);
struct worker *worker_by_serial(uint32_t serial);
struct job *job_of(const uint8_t *id);   /* the same */
/* -1 if the worker is another job's already.  Limits are those of its profile,
 * and lower what it has: jobs have several profiles. */
int worker_bind(struct worker *worker, const uint8_t *id,
                const struct limits *job, const struct limits *own);

void tighten(struct limits *limits, const struct limits *by);
void tighten_fetch(struct fetch_limits *limits, const struct fetch_limits *by);
struct worker *worker_by_pid(pid_t pid); /* these two: NULL if unknown */
struct job *job_by_id(const uint8_t *id);

/* Whether so much more fits, and take it. */
int quota_fits(const struct worker *worker, uint64_t size);
void quota_take(struct worker *worker, uint64_t size);
void quota_give_back(struct job *job, uint32_t serial, uint64_t size);
/* A job that has no worker here and holds nothing is forgotten. */
void jobs_forget(void);

uint64_t now_ms(void);

/* plasma.c and raylet.c: look at a message to Ray, and at one from it.  A
 * reply gives 0, or -1 if it can't be understood. */
enum verdict plasma_request(struct client *client, int64_t type,
                            const uint8_t *body, size_t size);
int plasma_reply(struct client *client, int64_t type, const uint8_t *body,
                 size_t size);
/* The connection is gone, and with it what it had not sealed. */
void plasma_gone(struct client *client);

enum verdict raylet_request(struct client *client, int64_t type,
                            const uint8_t *body, size_t size);
int raylet_reply(struct client *client, int64_t type, const uint8_t *body,
                 size_t size);

/* Messages that the proxy itself sends to the store, for sweeps. */
enum { CONTAINS_SIZE = HEADER_SIZE + 56 };
void plasma_contains(uint8_t *message, const uint8_t *id);
/* -1: not an answer; else whether the store has it. */
int plasma_has(int64_t type, const uint8_t *body, size_t size,
               const uint8_t *id);

#endif
