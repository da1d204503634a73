/* raysandbox-store-proxy: stands between workers and Ray's local sockets.
 *
 * Theory of operation.  Raylet has two unix sockets, its own and the object
 * store's, and trusts whoever reaches them.  Workers that run code of users
 * see this process's sockets in place of those:
 *
 *   DIRECTORY/plasma_store   messages are checked, creations counted
 *   DIRECTORY/raylet         messages are checked
 *   DIRECTORY/bind           a worker says once which job it belongs to, and may
 *                            ask what that job has in the store
 *   DIRECTORY/control        statistics, for the user that runs this
 *
 * A connection is a link of two sockets.  Whole messages are read, looked at
 * (plasma.c, raylet.c) and passed on, with the descriptors that the store
 * sends; none is taken from a client.  A message that breaks a rule ends its
 * worker and nothing else.  One thread, no blocking call but epoll_wait; what
 * can't be sent on waits in its link, which is not read from meanwhile.
 *
 * Objects leave the store without a message here.  When a job is at its quota
 * a sweep asks the store, over a connection of its own, which of the job's
 * objects it still has, and looks for the others among those that were spilled
 * (spilling.py), which count as well; the creation waits for that, or is refused
 * after a grace time with the store's own "full" answer.
 *
 *   raysandbox-store-proxy --plasma=SOCKET --raylet=SOCKET --directory=DIR
 *       [--spilled=DIR] [--job-bytes=N] [--job-objects=N] [--worker-bytes=N]
 *       [--worker-objects=N] [--parent=PID] [--bind-first-use] [--profilers]
 *       [--ready-fd=N]
 *
 * Writes one line of JSON to stdout for each link that is ended and each creation
 * that is refused.  Ends when raylet does; the links end with it: there is never
 * another way to the real sockets.
 */
#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

enum {
    CHUNK = 64 << 10,       /* bytes to read at once */
    MOST_UNREAD = 1 << 20,  /* bytes of replies that a client may leave */
    MOST_FDS = 64,          /* descriptors on their way to one client */
    SWEEP_EVERY_MS = 100,
    RAYLET_MS = 120 * 1000, /* until raylet must be there */
    SWEEP_AHEAD = 64,       /* questions to the store without an answer */
    MOST_EVENTS = 64,
    MOST_COUNTS = 512,      /* bytes of a line about a worker */
    MOST_ASKING = 4,        /* further connections of a worker to the store */
    MOST_DRIVERS = 8,       /* of one worker that hosts them, at once */
    MOST_ANCESTORS = 16,    /* between such a worker and a driver */
    LINES_PER_S = 50,       /* events that are written */
    MOST_LOG = 16 << 20,    /* bytes of the log of these */
    NICE = -10,
    SLICE_NS = 100 * 1000,
};

struct buffer {
    uint8_t *data;
    size_t start, end, capacity;
};

enum kind {
    LISTEN_PLASMA, LISTEN_RAYLET, LISTEN_BIND, LISTEN_CONTROL,
    BINDER, CONTROLLER, SWEEP, LINK_CLIENT, LINK_SERVER,
};

/* What epoll points at. */
struct source {
    enum kind kind;
    int fd;
    uint32_t interest;
    struct link *link;
};

struct link {
    struct link *next;
    struct source client, server;
    struct client state;
    int is_plasma, parked, dead;
    uint64_t parked_ms;
    struct buffer from_client, to_server, from_server, to_client;
    /* Descriptors among the bytes: each goes with the byte at its place. */
    uint64_t received, queued, sent; /* bytes from server, to client */
    struct { uint64_t at; int fd; } in[MOST_FDS], out[MOST_FDS];
    int in_count, out_count;
};

static struct {
    const char *plasma, *raylet, *directory;
    int spilled; /* directory with a link for each object in a file; -1: none */
    pid_t parent;
    int ready_fd;
    int profilers; /* what raylet starts may start one worker instead */
} options = {.spilled = -1, .ready_fd = -1};

static int epoll_fd;
static struct link *links;
static struct source listeners[4];
static struct {
    struct source source;
    struct job *job;
    uint8_t *ids;
    size_t count, sent, answered;
    uint64_t began_ms;
    int found_spilled;
    struct buffer to, from;
} sweep;

static _Noreturn void
die(const char *step)
{
    dprintf(STDERR_FILENO, "raysandbox-store-proxy: %s: %s\n", step,
            strerror(errno));
    _exit(125);
}

/* Cut the older half off a log that has grown: it is appended to by us alone,
 * and read by who expects that. */
static void
bound_log(void)
{
    struct stat there;

    if (fstat(STDOUT_FILENO, &there) != 0 || !S_ISREG(there.st_mode) ||
        there.st_size < MOST_LOG)
        return;
    uint8_t *kept = malloc(MOST_LOG / 2);
    ssize_t got = kept == NULL ? -1
                               : pread(STDOUT_FILENO, kept, MOST_LOG / 2,
                                       there.st_size - MOST_LOG / 2);
    const uint8_t *line = got > 0 ? memchr(kept, '\n', (size_t)got) : NULL;
    if (ftruncate(STDOUT_FILENO, 0) == 0 && line++ != NULL) {
        ssize_t written =
            write(STDOUT_FILENO, line, (size_t)(kept + got - line));
        (void)written;
    }
    free(kept);
}

/* One line of JSON, whose first field is the time.  A reader that does not read
 * loses lines, and so does a flood; nobody waits. */
static void
event(const char *format, ...)
{
    static uint64_t second, lines;
    char line[768];
    struct timespec now;
    va_list args;

    clock_gettime(CLOCK_REALTIME, &now);
    if ((uint64_t)now.tv_sec != second) {
        second = (uint64_t)now.tv_sec;
        lines = 0;
    }
    if (lines++ >= LINES_PER_S) {
        session.unwritten++;
        return;
    }
    int start = snprintf(line, sizeof line, "{\"time\": %lld.%03ld, ",
                         (long long)now.tv_sec, now.tv_nsec / 1000000);
    va_start(args, format);
    int length = vsnprintf(line + start, sizeof line - (size_t)start, format,
                           args);
    va_end(args);
    if (length > 0 && (size_t)(start + length) < sizeof line) {
        bound_log();
        ssize_t written =
            write(STDOUT_FILENO, line, (size_t)(start + length));
        (void)written;
    }
}

/* -1 where there is no limit: JSON readers lose precision at 2^64 - 1. */
static long long
shown(uint64_t limit)
{
    return limit > INT64_MAX ? -1 : (long long)limit;
}

static const char *
job_hex(const struct job *job)
{
    static char text[2 * JOB_SIZE + 1];

    if (job == NULL)
        return "";
    for (int i = 0; i < JOB_SIZE; i++)
        snprintf(text + 2 * i, 3, "%02x", job->id[i]);
    return text;
}

/* -- buffers -------------------------------------------------------------- */

static size_t
filled(const struct buffer *buffer)
{
    return buffer->end - buffer->start;
}

static int
reserve(struct buffer *buffer, size_t room)
{
    if (buffer->capacity - buffer->end >= room)
        return 0;
    if (buffer->start > 0) {
        memmove(buffer->data, buffer->data + buffer->start, filled(buffer));
        buffer->end -= buffer->start;
        buffer->start = 0;
        if (buffer->capacity - buffer->end >= room)
            return 0;
    }
    size_t capacity = buffer->capacity * 2;
    if (capacity < buffer->end + room)
        capacity = buffer->end + room;
    uint8_t *data = realloc(buffer->data, capacity);
    if (data == NULL)
        return -1;
    buffer->data = data;
    buffer->capacity = capacity;
    return 0;
}

static int
append(struct buffer *buffer, const uint8_t *data, size_t size)
{
    if (reserve(buffer, size) != 0)
        return -1;
    memcpy(buffer->data + buffer->end, data, size);
    buffer->end += size;
    return 0;
}

static void
consume(struct buffer *buffer, size_t size)
{
    buffer->start += size;
    if (buffer->start == buffer->end) {
        buffer->start = buffer->end = 0;
        if (buffer->capacity > 4 * CHUNK) { /* was large once: let go */
            free(buffer->data);
            *buffer = (struct buffer){0};
        }
    }
}

/* Send what can be sent; -1: the other end is gone. */
static int
flush(struct buffer *buffer, int fd)
{
    while (filled(buffer) > 0) {
        ssize_t sent = send(fd, buffer->data + buffer->start, filled(buffer),
                            MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EAGAIN ? 0 : -1;
        consume(buffer, (size_t)sent);
    }
    return 0;
}

/* Read once; -1: ended. */
static int
receive(struct buffer *buffer, int fd)
{
    if (reserve(buffer, CHUNK) != 0)
        return -1;
    ssize_t got = recv(fd, buffer->data + buffer->end,
                       buffer->capacity - buffer->end, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return -1;
    buffer->end += (size_t)got;
    return 0;
}

/* The message at the start of a buffer.  1: whole, 0: not yet, -1: none. */
static int
message_in(const struct buffer *buffer, size_t most, int64_t *type,
           const uint8_t **body, size_t *size)
{
    uint64_t header[3];

    if (filled(buffer) < HEADER_SIZE) {
        /* A wrong cookie need not be waited for. */
        size_t have = filled(buffer) < 8 ? filled(buffer) : 8;
        return memcmp(buffer->data + buffer->start, &RAY_COOKIE, have) == 0
                   ? 0
                   : have == 0 ? 0 : -1;
    }
    memcpy(header, buffer->data + buffer->start, sizeof header);
    if (header[0] != RAY_COOKIE || header[2] > most)
        return -1;
    if (filled(buffer) - HEADER_SIZE < header[2])
        return 0;
    *type = (int64_t)header[1];
    *body = buffer->data + buffer->start + HEADER_SIZE;
    *size = (size_t)header[2];
    return 1;
}

/* -- epoll ---------------------------------------------------------------- */

static int
watch(struct source *source, uint32_t interest)
{
    struct epoll_event change = {.events = interest, .data.ptr = source};

    source->interest = interest;
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, source->fd, &change);
}

static void
change_interest(struct source *source, uint32_t interest)
{
    struct epoll_event change = {.events = interest, .data.ptr = source};

    if (source->interest == interest)
        return;
    source->interest = interest;
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, source->fd, &change);
}

/* -- links ---------------------------------------------------------------- */

static void
end_link(struct link *link, const char *reason);

/* Who breaks a rule once is not served any further: without its connections a
 * worker is of no use to Ray, but its code would go on. */
static void
end_worker(struct worker *worker)
{
    if (worker->pidfd >= 0)
        syscall(SYS_pidfd_send_signal, worker->pidfd, SIGKILL, NULL, 0);
    for (struct link *link = links; link != NULL; link = link->next)
        if (link->state.worker == worker && !link->dead)
            end_link(link, NULL);
}

/* With a reason, which is the client's fault, its worker ends as well. */
static void
end_link(struct link *link, const char *reason)
{
    struct worker *worker = link->state.worker;

    if (link->dead)
        return;
    link->dead = 1;
    if (reason != NULL) {
        session.ended++;
        event("\"event\": \"link_ended\", \"socket\": \"%s\", \"pid\": %d, "
              "\"job\": \"%s\", \"reason\": \"%s\"}\n",
              link->is_plasma ? "plasma_store" : "raylet", worker->pid,
              job_hex(worker->job), reason);
        end_worker(worker);
    }
    if (link->parked)
        worker->job->parked--;
    if (link->is_plasma)
        plasma_gone(&link->state);
    close(link->client.fd);
    close(link->server.fd);
    for (int i = 0; i < link->in_count; i++)
        close(link->in[i].fd);
    for (int i = 0; i < link->out_count; i++)
        close(link->out[i].fd);
    worker->connections--;
    worker->only_asking -= link->state.only_asks;
    worker_release(worker);
}

/* Free what ended during the last batch of events. */
static void
bury(void)
{
    for (struct link **at = &links; *at != NULL;) {
        struct link *link = *at;
        if (!link->dead) {
            at = &link->next;
            continue;
        }
        *at = link->next;
        free(link->from_client.data);
        free(link->to_server.data);
        free(link->from_server.data);
        free(link->to_client.data);
        free(link);
    }
}

/* The byte at the front goes with a descriptor. */
static int
send_descriptor(struct link *link)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec byte = {link->to_client.data + link->to_client.start, 1};
    struct msghdr message = {
        .msg_iov = &byte, .msg_iovlen = 1,
        .msg_control = control, .msg_controllen = sizeof control,
    };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &link->out[0].fd, sizeof(int));
    if (sendmsg(link->client.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    close(link->out[0].fd);
    link->out_count--;
    memmove(link->out, link->out + 1,
            (size_t)link->out_count * sizeof link->out[0]);
    return 1;
}

static int
flush_client(struct link *link)
{
    while (filled(&link->to_client) > 0) {
        size_t size = filled(&link->to_client);
        if (link->out_count > 0) {
            uint64_t before = link->out[0].at - link->sent;
            if (before == 0) {
                int done = send_descriptor(link);
                if (done <= 0)
                    return done;
                link->sent++;
                consume(&link->to_client, 1);
                continue;
            }
            if (size > before)
                size = (size_t)before;
        }
        ssize_t sent =
            send(link->client.fd, link->to_client.data + link->to_client.start,
                 size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EAGAIN ? 0 : -1;
        link->sent += (uint64_t)sent;
        consume(&link->to_client, (size_t)sent);
    }
    return 0;
}

static int
to_client(struct link *link, const uint8_t *data, size_t size)
{
    link->queued += size;
    return append(&link->to_client, data, size);
}

/* Whether requests may be taken from the client now. */
static int
takes_requests(const struct link *link)
{
    return !link->parked && filled(&link->to_server) == 0 &&
           filled(&link->to_client) < MOST_UNREAD;
}

static void
set_interest(struct link *link)
{
    uint32_t client = takes_requests(link) ? EPOLLIN : 0;
    uint32_t server = EPOLLIN;

    if (link->dead)
        return;
    if (filled(&link->to_client) > 0)
        client |= EPOLLOUT;
    if (filled(&link->to_server) > 0)
        server |= EPOLLOUT;
    change_interest(&link->client, client);
    change_interest(&link->server, server);
}

/* What a worker and its job have, and may have, as members of a JSON object. */
static void
describe_counts(char *out, size_t size, const struct worker *worker)
{
    const struct job *job = worker->job;

    snprintf(out, size,
             "\"pid\": %d, \"job\": \"%s\", "
             "\"job_bytes\": [%lld, %lld], \"job_objects\": [%lld, %lld], "
             "\"worker_bytes\": [%lld, %lld], \"worker_objects\": [%lld, %lld]",
             worker->pid, job_hex(job), job == NULL ? 0 : (long long)job->count.bytes,
             shown(worker->job_limits.bytes),
             job == NULL ? 0 : (long long)job->count.objects,
             shown(worker->job_limits.objects), (long long)worker->count.bytes,
             shown(worker->limits.bytes), (long long)worker->count.objects,
             shown(worker->limits.objects));
}

static void
refused(const struct link *link)
{
    char counts[MOST_COUNTS];

    describe_counts(counts, sizeof counts, link->state.worker);
    event("\"event\": \"quota_refused\", %s}\n", counts);
}

static void
pump_requests(struct link *link)
{
    struct client *state = &link->state;
    const uint8_t *body;
    int64_t type;
    size_t size;

    while (!link->dead && takes_requests(link)) {
        int whole = message_in(&link->from_client, MOST_REQUEST, &type, &body,
                               &size);
        if (whole < 0)
            end_link(link, "not a message of Ray");
        if (whole <= 0)
            break;
        state->reason = NULL;
        enum verdict verdict = link->is_plasma
                                   ? plasma_request(state, type, body, size)
                                   : raylet_request(state, type, body, size);
        switch (verdict) {
        case PASS:
            if (append(&link->to_server, body - HEADER_SIZE,
                       HEADER_SIZE + size) != 0 ||
                flush(&link->to_server, link->server.fd) != 0)
                end_link(link, NULL);
            break;
        case ANSWER:
            refused(link);
            if (to_client(link, state->answer, state->answer_size) != 0 ||
                flush_client(link) != 0)
                end_link(link, NULL);
            break;
        case PARK:
            link->parked = 1;
            link->parked_ms = now_ms();
            state->worker->job->parked++;
            break;
        case END:
            end_link(link, state->reason);
            break;
        }
        if (!link->dead && !link->parked) {
            state->waited_ms = 0;
            consume(&link->from_client, HEADER_SIZE + size);
        }
    }
    set_interest(link);
}

static void
pump_replies(struct link *link)
{
    struct buffer *from = &link->from_server;
    const uint8_t *body;
    int64_t type;
    size_t size;

    while (filled(from) > 0) {
        uint64_t position = link->received - filled(from);
        if (link->in_count > 0 && link->in[0].at == position) {
            if (link->out_count == MOST_FDS) {
                end_link(link, "too many descriptors for it");
                return;
            }
            link->out[link->out_count].at = link->queued;
            link->out[link->out_count++].fd = link->in[0].fd;
            link->in_count--;
            memmove(link->in, link->in + 1,
                    (size_t)link->in_count * sizeof link->in[0]);
            size = 1;
        } else {
            int whole = message_in(from, MOST_REPLY, &type, &body, &size);
            if (whole == 0)
                break;
            link->state.reason = NULL;
            if (whole < 0 ||
                (link->in_count > 0 &&
                 link->in[0].at < position + HEADER_SIZE + size) ||
                (link->is_plasma
                     ? plasma_reply(&link->state, type, body, size)
                     : raylet_reply(&link->state, type, body, size)) != 0) {
                end_link(link, link->state.reason != NULL
                                   ? link->state.reason
                                   : "a reply of Ray that the proxy does not know");
                return;
            }
            size += HEADER_SIZE;
        }
        if (to_client(link, from->data + from->start, size) != 0) {
            end_link(link, NULL);
            return;
        }
        consume(from, size);
    }
    if (flush_client(link) != 0)
        end_link(link, NULL);
    else
        set_interest(link);
}

static void
read_server(struct link *link)
{
    struct buffer *from = &link->from_server;
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control;

    if (reserve(from, CHUNK) != 0) {
        end_link(link, NULL);
        return;
    }
    struct iovec room = {from->data + from->end, from->capacity - from->end};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1,
        .msg_control = control.bytes, .msg_controllen = sizeof control.bytes,
    };
    ssize_t got = recvmsg(link->server.fd, &message,
                          MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        /* Whatever Ray said last reaches its reader, as far as it fits. */
        end_link(link, NULL);
        return;
    }
    from->end += (size_t)got;
    link->received += (uint64_t)got;
    /* The store sends one descriptor with one byte; the kernel ends a read
     * there, so that byte is the last one. */
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int known = header == NULL || (header->cmsg_level == SOL_SOCKET &&
                                   header->cmsg_type == SCM_RIGHTS);
    size_t count = 0;
    if (header != NULL && known)
        count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
        int fd;
        memcpy(&fd, control.bytes + CMSG_LEN(0) + i * sizeof fd, sizeof fd);
        if (count != 1 || link->in_count == MOST_FDS) {
            close(fd);
            known = 0;
            continue;
        }
        link->in[link->in_count].at = link->received - 1;
        link->in[link->in_count++].fd = fd;
    }
    if (message.msg_flags & MSG_CTRUNC || !known)
        end_link(link, "descriptors of an unknown form");
    else
        pump_replies(link);
}

static void
on_link(struct link *link, struct source *source, uint32_t events)
{
    if (link->dead)
        return;
    if (source->kind == LINK_SERVER) {
        if (events & EPOLLOUT && flush(&link->to_server, source->fd) != 0)
            end_link(link, NULL);
        else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
            read_server(link);
    } else {
        if (events & EPOLLOUT && flush_client(link) != 0)
            end_link(link, NULL);
        else if (events & (EPOLLHUP | EPOLLERR) && !(events & EPOLLIN))
            end_link(link, NULL);
        else if (events & EPOLLIN &&
                 receive(&link->from_client, source->fd) != 0)
            end_link(link, NULL);
    }
    if (!link->dead)
        pump_requests(link);
}

/* -- who connects --------------------------------------------------------- */

static int
connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 &&
        connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static pid_t
parent_of(pid_t pid)
{
    char path[64], text[512];

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got <= 0)
        return -1;
    text[got] = '\0';
    /* The name may hold spaces and brackets; what follows its end does not. */
    const char *rest = strrchr(text, ')');
    int parent;
    if (rest == NULL || sscanf(rest, ") %*c %d", &parent) != 1)
        return -1;
    return parent;
}

/* The worker that hosts drivers and that started this process, whose parent is
 * given; NULL if none did. */
static struct worker *
host_of(pid_t parent)
{
    for (int steps = 0; steps < MOST_ANCESTORS && parent > 1; steps++) {
        for (struct worker *w = session.workers; w != NULL; w = w->next)
            if (w->pid == parent && w->hosts_drivers && w->connections > 0)
                return w;
        parent = parent_of(parent);
    }
    return NULL;
}

/* Whether PARENT is a profiler of the operator's that raylet started in a
 * worker's place, and the peer the one worker that it has. */
static int
is_profiled(pid_t peer, pid_t parent)
{
    if (!options.profilers || options.parent == 0 ||
        parent_of(parent) != options.parent)
        return 0;
    for (struct worker *w = session.workers; w != NULL; w = w->next)
        if (w->pid == parent || (w->parent == parent && w->pid != peer))
            return 0;
    return 1;
}

/* The pid at the other end, if raylet started it, or a worker that hosts
 * drivers did: then HOST is that one.  Else -1.
 *
 * What another worker starts is no worker: it would have quotas of its own.
 * Raylet execs what it starts, so a worker's parent is raylet.  The pidfd,
 * where the kernel has it, makes sure that the pid is still the peer's. */
static pid_t
peer_of(int fd, struct worker **host)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    int pidfd = -1;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
        return -1;
    size = sizeof pidfd;
    getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size);
    pid_t parent = parent_of(peer.pid);
    int allowed = (options.parent != 0 && parent == options.parent) ||
                  is_profiled(peer.pid, parent);
    *host = allowed ? NULL : host_of(parent);
    allowed |= *host != NULL;
    if (pidfd >= 0) {
        struct pollfd ended = {.fd = pidfd, .events = POLLIN};
        if (poll(&ended, 1, 0) != 0)
            allowed = 0;
        close(pidfd);
    }
    return allowed ? peer.pid : -1;
}

static int
drivers_of(const struct worker *host)
{
    int count = 0;

    for (struct worker *w = session.workers; w != NULL; w = w->next)
        count += w->host == host->serial;
    return count;
}

static void
refuse(int fd, const char *socket_name, const char *reason)
{
    struct ucred peer = {0};
    socklen_t size = sizeof peer;

    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size);
    session.ended++;
    event("\"event\": \"link_refused\", \"socket\": \"%s\", \"pid\": %d, "
          "\"reason\": \"%s\"}\n",
          socket_name, peer.pid, reason);
    close(fd);
}

/* The first connection to raylet says which process that is. */
static int
know_raylet(void)
{
    if (sweep.source.fd > 0)
        return 0;
    int fd = connect_to(options.plasma);
    struct ucred raylet;
    socklen_t size = sizeof raylet;
    if (fd < 0)
        return -1;
    sweep.source = (struct source){.kind = SWEEP, .fd = fd};
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &raylet, &size) != 0 ||
        watch(&sweep.source, EPOLLIN) != 0)
        return -1;
    if (options.parent == 0)
        options.parent = raylet.pid;
    return 0;
}

static void
accept_link(int listener, int is_plasma)
{
    const char *name = is_plasma ? "plasma_store" : "raylet";
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0)
        return;
    if (know_raylet() != 0) {
        refuse(fd, name, "raylet is not there");
        return;
    }
    struct worker *host;
    pid_t pid = peer_of(fd, &host);
    if (pid < 0) {
        refuse(fd, name, "not a process that raylet started");
        return;
    }
    if (host != NULL && drivers_of(host) >= MOST_DRIVERS &&
        worker_by_pid(pid) == NULL) {
        refuse(fd, name, "too many drivers of one worker");
        return;
    }
    struct worker *worker = worker_of(pid);
    struct link *link = calloc(1, sizeof *link);
    if (worker == NULL || link == NULL) {
        refuse(fd, name, "out of memory");
        free(link);
        return;
    }
    int *had = is_plasma ? &worker->had_plasma : &worker->had_raylet;
    /* One for the worker's life, so that it can't begin anew; more to the
     * store may ask what it has, as the worker's own count of quotas does. */
    int only_asks = is_plasma && *had;
    const char *reason =
        is_plasma && !worker->registered ? "not registered with raylet"
        : only_asks ? (worker->only_asking >= MOST_ASKING
                           ? "too many connections"
                           : NULL)
        : *had ? "a second connection"
               : NULL;
    int server = -1;
    if (reason == NULL) {
        server = connect_to(is_plasma ? options.plasma : options.raylet);
        if (server < 0)
            reason = "raylet is not there";
    }
    if (reason != NULL) {
        refuse(fd, name, reason);
        worker_release(worker);
        free(link);
        return;
    }
    *had = 1;
    if (host != NULL && worker->host == 0) {
        worker->host = host->serial;
        tighten(&worker->job_limits, &host->job_limits);
        tighten(&worker->limits, &host->limits);
        tighten_fetch(&worker->fetch_limits, &host->fetch_limits);
    }
    worker->parent = parent_of(pid);
    worker->connections++;
    worker->only_asking += only_asks;
    link->state.only_asks = only_asks;
    link->is_plasma = is_plasma;
    link->state.worker = worker;
    link->client = (struct source){LINK_CLIENT, fd, 0, link};
    link->server = (struct source){LINK_SERVER, server, 0, link};
    link->next = links;
    links = link;
    if (watch(&link->client, EPOLLIN) != 0 ||
        watch(&link->server, EPOLLIN) != 0)
        end_link(link, "epoll");
}

/* -- binding and control -------------------------------------------------- */

/* A worker's word before it runs any code of a user; final. */
struct bind_message {
    char magic[8];
    uint8_t job[JOB_SIZE];
    uint32_t flags; /* 1: serves an actor; 2: hosts drivers */
    struct limits job_limits, worker_limits;
    struct fetch_limits fetch_limits;
};

static const char BIND_MAGIC[8] = "RSXBIND2";
/* At any time: what its job and itself have, and may have. */
static const char USED_MAGIC[8] = "RSXUSED1";

static struct worker *
worker_at(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof peer;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
        return NULL;
    for (struct worker *w = session.workers; w != NULL; w = w->next)
        if (w->pid == peer.pid && w->connections > 0)
            return w;
    return NULL;
}

static const char *
bind_worker(int fd, const struct bind_message *message, ssize_t size)
{
    struct worker *worker = worker_at(fd);

    if (size != sizeof *message ||
        memcmp(message->magic, BIND_MAGIC, sizeof BIND_MAGIC) != 0)
        return "not a bind message";
    if (worker == NULL || worker->host != 0)
        return "not a worker";
    int actor = (message->flags & 1) != 0, hosts = (message->flags & 2) != 0;
    if (worker->bound && (actor > worker->actor_bound ||
                          hosts > worker->hosts_drivers))
        return "bound already"; /* once more can take, and not give */
    if (worker_bind(worker, message->job, &message->job_limits,
                    &message->worker_limits) != 0)
        return "bound already, to another job";
    tighten_fetch(&worker->fetch_limits, &message->fetch_limits);
    worker->bound = 1;
    worker->actor_bound = actor;
    worker->hosts_drivers = hosts;
    return "ok";
}

static void
print_count(FILE *out, const struct count *count, const struct limits *limits)
{
    fprintf(out,
            "\"bytes\": %lld, \"objects\": %lld, \"most_bytes\": %lld, "
            "\"most_objects\": %lld",
            (long long)count->bytes, (long long)count->objects,
            shown(limits->bytes), shown(limits->objects));
}

static void
print_stats(FILE *out)
{
    const char *comma = "";

    fprintf(out, "{\"ended\": %llu, \"unwritten\": %llu, \"jobs\": [",
            (unsigned long long)session.ended,
            (unsigned long long)session.unwritten);
    for (struct job *job = session.jobs; job != NULL; job = job->next) {
        fprintf(out, "%s{\"job\": \"%s\", \"workers\": %d, \"refused\": %llu, ",
                comma, job_hex(job), job->workers,
                (unsigned long long)job->refused);
        print_count(out, &job->count, &session.job_limits);
        fputs("}", out);
        comma = ", ";
    }
    fputs("], \"workers\": [", out);
    comma = "";
    for (struct worker *w = session.workers; w != NULL; w = w->next) {
        fprintf(out,
                "%s{\"pid\": %d, \"job\": \"%s\", \"kind\": \"%s\", "
                "\"refused\": %llu, \"fetched_bytes\": %llu, "
                "\"fetched_objects\": %llu, ",
                comma, w->pid, job_hex(w->job),
                w->kind == KIND_IO       ? "io"
                : w->kind == KIND_WORKER ? "worker"
                : w->kind == KIND_DRIVER ? "driver"
                                         : "unknown",
                (unsigned long long)w->refused,
                (unsigned long long)w->fetched_bytes,
                (unsigned long long)w->fetched_objects);
        print_count(out, &w->count, &w->limits);
        fprintf(out, ", \"job_most_bytes\": %lld, \"job_most_objects\": %lld}",
                shown(w->job_limits.bytes), shown(w->job_limits.objects));
        comma = ", ";
    }
    fputs("]}\n", out);
}

static void
control(int fd)
{
    char command[16] = {0};
    char *text = NULL;
    size_t size = 0;

    if (recv(fd, command, sizeof command - 1, MSG_DONTWAIT) <= 0 ||
        strcmp(command, "stats") != 0)
        return;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        return;
    print_stats(out);
    fclose(out);
    for (size_t at = 0; at < size;) {
        size_t part = size - at < CHUNK ? size - at : CHUNK;
        if (send(fd, text + at, part, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            break;
        at += part;
    }
    free(text);
}

static void
accept_once(int listener, enum kind kind)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct source *source = fd < 0 ? NULL : calloc(1, sizeof *source);

    if (source == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    *source = (struct source){.kind = kind, .fd = fd};
    if (watch(source, EPOLLIN) != 0) {
        close(fd);
        free(source);
    }
}

/* One message, one answer, closed. */
static void
on_once(struct source *source)
{
    if (source->kind == BINDER) {
        struct bind_message message;
        char counts[MOST_COUNTS], used[MOST_COUNTS + 64];
        ssize_t got =
            recv(source->fd, &message, sizeof message, MSG_DONTWAIT);
        const struct worker *worker = worker_at(source->fd);
        const char *answer = used;
        if (worker != NULL && got == sizeof USED_MAGIC &&
            memcmp(message.magic, USED_MAGIC, sizeof USED_MAGIC) == 0) {
            describe_counts(counts, sizeof counts, worker);
            snprintf(used, sizeof used, "{\"refused\": %llu, %s}",
                     (unsigned long long)worker->refused, counts);
        } else
            answer = bind_worker(source->fd, &message, got);
        send(source->fd, answer, strlen(answer), MSG_NOSIGNAL | MSG_DONTWAIT);
    } else
        control(source->fd);
    close(source->fd);
    free(source);
}

/* -- sweeps --------------------------------------------------------------- */

static void
ask_store(void)
{
    uint8_t message[CONTAINS_SIZE];

    while (sweep.sent < sweep.count &&
           sweep.sent - sweep.answered < SWEEP_AHEAD) {
        plasma_contains(message, sweep.ids + ID_SIZE * sweep.sent++);
        if (append(&sweep.to, message, sizeof message) != 0)
            die("sweep");
    }
    if (flush(&sweep.to, sweep.source.fd) != 0)
        _exit(0); /* raylet is gone */
    change_interest(&sweep.source,
                    EPOLLIN | (filled(&sweep.to) > 0 ? EPOLLOUT : 0));
}

/* Whether an object that is not in the store is in a file.  It is written down
 * before it leaves the store, and the store was asked before. */
static int
is_spilled(const uint8_t *id)
{
    static const char digits[] = "0123456789abcdef";
    char name[2 * ID_SIZE + 1] = {0};
    struct stat link;

    if (options.spilled < 0)
        return 0;
    for (int i = 0; i < ID_SIZE; i++) {
        name[2 * i] = digits[id[i] >> 4];
        name[2 * i + 1] = digits[id[i] & 15];
    }
    return fstatat(options.spilled, name, &link, AT_SYMLINK_NOFOLLOW) == 0 ||
           errno != ENOENT;
}

/* Ask again for what waited, now that its job's count is fresh. */
static void
sweep_done(void)
{
    struct job *job = sweep.job;

    job->sweeping = 0;
    job->has_spilled = sweep.found_spilled;
    job->swept_ms = now_ms();
    job->sweep_took_ms = job->swept_ms - sweep.began_ms;
    free(sweep.ids);
    sweep.ids = NULL;
    sweep.job = NULL;
    for (struct link *link = links; link != NULL; link = link->next)
        if (link->parked && !link->dead && link->state.worker->job == job) {
            uint64_t since = link->parked_ms;
            link->parked = 0;
            job->parked--;
            link->state.waited_ms = now_ms() - since;
            pump_requests(link);
            if (link->parked) /* still waiting: since when it began */
                link->parked_ms = since;
        }
}

static void
sweep_begin(struct job *job)
{
    struct object *object;
    size_t cursor = 0;

    sweep.ids = malloc(ID_SIZE * (job->stored.count + 1));
    if (sweep.ids == NULL)
        die("sweep");
    sweep.count = sweep.sent = sweep.answered = 0;
    sweep.found_spilled = 0;
    while ((object = objects_next(&job->stored, &cursor)) != NULL)
        memcpy(sweep.ids + ID_SIZE * sweep.count++, object->id, ID_SIZE);
    sweep.job = job;
    sweep.began_ms = now_ms();
    job->sweeping = 1;
    if (sweep.count == 0)
        sweep_done();
    else
        ask_store();
}

static void
on_sweep(uint32_t events)
{
    const uint8_t *body;
    int64_t type;
    size_t size;
    int whole;

    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) &&
        receive(&sweep.from, sweep.source.fd) != 0)
        _exit(0); /* raylet is gone */
    while ((whole = message_in(&sweep.from, MOST_REPLY, &type, &body,
                               &size)) > 0) {
        if (sweep.job == NULL || sweep.answered == sweep.sent)
            die("an answer without a question");
        const uint8_t *id = sweep.ids + ID_SIZE * sweep.answered++;
        int has = plasma_has(type, body, size, id);
        if (has < 0)
            die("an answer of another form");
        struct object *object = objects_find(&sweep.job->stored, id);
        if (!has && object != NULL && is_spilled(id))
            sweep.found_spilled = 1;
        else if (!has && object != NULL) {
            quota_give_back(sweep.job, object->worker, object->size);
            objects_remove(&sweep.job->stored, object);
        }
        consume(&sweep.from, HEADER_SIZE + size);
    }
    if (whole < 0)
        die("a message of another form");
    if (sweep.job != NULL && sweep.answered == sweep.count)
        sweep_done();
    else if (sweep.job != NULL)
        ask_store();
}

/* How long until something is due, in milliseconds; -1: nothing is. */
static int
tick(void)
{
    uint64_t now = now_ms();
    int wait = -1;

    for (struct job *job = session.jobs; job != NULL && sweep.job == NULL;
         job = job->next) {
        /* Jobs without workers are swept as well, to be forgotten. */
        uint64_t every = job->parked > 0    ? SWEEP_EVERY_MS
                         : job->workers > 0 ? UINT64_MAX
                                            : 50 * SWEEP_EVERY_MS;
        if (every == UINT64_MAX)
            continue;
        if (every < 4 * job->sweep_took_ms)
            every = 4 * job->sweep_took_ms;
        uint64_t left = every;
        if (now - job->swept_ms >= every)
            sweep_begin(job); /* may be done at once, and others still wait */
        else
            left -= now - job->swept_ms;
        if (wait < 0 || (int)left < wait)
            wait = (int)left;
    }
    return wait;
}

/* -- start ---------------------------------------------------------------- */

static int
listen_at(const char *name, int type, mode_t mode)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    strcpy(address.sun_path, name); /* in the directory, whatever its length */
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        die("socket");
    unlink(address.sun_path);
    umask(0777 & ~mode);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        listen(fd, 1024) != 0)
        die(address.sun_path);
    umask(077);
    return fd;
}

static uint64_t
number(const char *text, const char *option)
{
    char *end;

    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *text < '0' || *text > '9' || *end != '\0') {
        errno = EINVAL;
        die(option);
    }
    return value;
}

static void
parse_arguments(char **argv)
{
    struct {
        const char *name;
        uint64_t *value;
    } limits[] = {
        {"--job-bytes=", &session.job_limits.bytes},
        {"--job-objects=", &session.job_limits.objects},
        {"--worker-bytes=", &session.worker_limits.bytes},
        {"--worker-objects=", &session.worker_limits.objects},
    };

    session.job_limits = session.worker_limits =
        (struct limits){UINT64_MAX, UINT64_MAX};
    for (char **at = argv + 1; *at != NULL; at++) {
        const char *value = strchr(*at, '=');
        size_t i;
        value = value == NULL ? "" : value + 1;
        for (i = 0; i < sizeof limits / sizeof *limits; i++)
            if (strncmp(*at, limits[i].name, strlen(limits[i].name)) == 0) {
                *limits[i].value = number(value, *at);
                break;
            }
        if (i < sizeof limits / sizeof *limits)
            continue;
        if (strncmp(*at, "--plasma=", 9) == 0)
            options.plasma = value;
        else if (strncmp(*at, "--raylet=", 9) == 0)
            options.raylet = value;
        else if (strncmp(*at, "--directory=", 12) == 0)
            options.directory = value;
        else if (strncmp(*at, "--spilled=", 10) == 0) {
            options.spilled = open(value, O_PATH | O_DIRECTORY | O_CLOEXEC);
            if (options.spilled < 0)
                die(*at);
        }
        else if (strncmp(*at, "--parent=", 9) == 0)
            options.parent = (pid_t)(number(value, *at) & INT32_MAX);
        else if (strncmp(*at, "--ready-fd=", 11) == 0)
            options.ready_fd = (int)(number(value, *at) & INT32_MAX);
        else if (strcmp(*at, "--bind-first-use") == 0)
            session.bind_first_use = 1;
        else if (strcmp(*at, "--profilers") == 0)
            options.profilers = 1;
        else {
            errno = EINVAL;
            die(*at);
        }
    }
    if (options.plasma == NULL || options.raylet == NULL ||
        options.directory == NULL) {
        errno = EINVAL;
        die("need --plasma, --raylet and --directory");
    }
}

static void
dispatch(struct source *source, uint32_t events)
{
    switch (source->kind) {
    case LISTEN_PLASMA:
    case LISTEN_RAYLET:
        accept_link(source->fd, source->kind == LISTEN_PLASMA);
        break;
    case LISTEN_BIND:
        accept_once(source->fd, BINDER);
        break;
    case LISTEN_CONTROL:
        accept_once(source->fd, CONTROLLER);
        break;
    case BINDER:
    case CONTROLLER:
        on_once(source);
        break;
    case SWEEP:
        on_sweep(events);
        break;
    case LINK_CLIENT:
    case LINK_SERVER:
        on_link(source->link, source, events);
        break;
    }
}

/* Every put and get of the node waits for this process, which never computes for
 * long: it runs as soon as it is woken, as far as its user may ask for that. */
static void
run_promptly(void)
{
    /* sched_setattr(2), first version; for SCHED_OTHER the run time is the
     * slice, and who asks for a short one is picked earlier (Linux 6.12). */
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes = {
        .size = sizeof attributes, .nice = NICE, .runtime = SLICE_NS,
    };

    if (syscall(SYS_sched_setattr, 0, &attributes, 0) != 0) {
        attributes.nice = 0; /* an ordinary user may not */
        syscall(SYS_sched_setattr, 0, &attributes, 0);
    }
}

static _Noreturn void
serve(void)
{
    struct epoll_event events[MOST_EVENTS];
    uint64_t began = now_ms();

    for (;;) {
        int wait = tick();
        /* From its first moment on, raylet's end is this one's. */
        if (sweep.source.fd <= 0 && know_raylet() != 0) {
            if (now_ms() - began > RAYLET_MS)
                die("raylet did not come");
            wait = SWEEP_EVERY_MS;
        }
        int count = epoll_wait(epoll_fd, events, MOST_EVENTS, wait);
        if (count < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < count; i++)
            dispatch(events[i].data.ptr, events[i].events);
        bury();
        jobs_forget();
    }
}

int
main(int argc, char **argv)
{
    struct rlimit files;

    (void)argc;
    parse_arguments(argv);
    signal(SIGPIPE, SIG_IGN);
    /* Nobody of the same user takes a descriptor or memory from here. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        die("prctl");
    if (objects_seed() != 0)
        die("getrandom");
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    run_promptly();
    fcntl(STDOUT_FILENO, F_SETFL,
          fcntl(STDOUT_FILENO, F_GETFL) | O_NONBLOCK);
    if (chdir(options.directory) != 0)
        die("directory");
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("epoll_create1");
    listeners[0] = (struct source){
        .kind = LISTEN_PLASMA, .fd = listen_at("plasma_store", SOCK_STREAM, 0666)};
    listeners[1] = (struct source){
        .kind = LISTEN_RAYLET, .fd = listen_at("raylet", SOCK_STREAM, 0666)};
    listeners[2] = (struct source){
        .kind = LISTEN_BIND, .fd = listen_at("bind", SOCK_SEQPACKET, 0666)};
    listeners[3] = (struct source){
        .kind = LISTEN_CONTROL, .fd = listen_at("control", SOCK_SEQPACKET, 0600)};
    for (size_t i = 0; i < 4; i++)
        if (watch(&listeners[i], EPOLLIN) != 0)
            die("epoll_ctl");
    if (options.ready_fd >= 0) {
        if (write(options.ready_fd, "ready\n", 6) != 6)
            die("ready");
        close(options.ready_fd);
    }
    serve();
}
