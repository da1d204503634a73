#define _GNU_SOURCE
#include "session.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

const uint64_t RAY_COOKIE = 0x5241590000000000; /* "RAY" */

struct session session;

uint64_t
now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

struct worker *
worker_by_pid(pid_t pid)
{
    for (struct worker *w = session.workers; w != NULL; w = w->next)
        if (w->pid == pid)
            return w;
    return NULL;
}

struct worker *
worker_of(pid_t pid)
{
    struct worker *worker = worker_by_pid(pid);

    if (worker != NULL)
        return worker;
    worker = calloc(1, sizeof *worker);
    if (worker == NULL)
        return NULL;
    worker->pid = pid;
    worker->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    worker->serial = ++session.last_serial;
    worker->job_limits = session.job_limits;
    worker->limits = session.worker_limits;
    worker->fetch_limits =
        (struct fetch_limits){{UINT64_MAX, UINT64_MAX},
                              {UINT64_MAX, UINT64_MAX}, UINT64_MAX};
    worker->next = session.workers;
    session.workers = worker;
    return worker;
}

void
worker_release(struct worker *worker)
{
    if (worker->connections > 0)
        return;
    for (struct worker **at = &session.workers; *at != NULL;
         at = &(*at)->next)
        if (*at == worker) {
            *at = worker->next;
            break;
        }
    if (worker->job != NULL)
        worker->job->workers--;
    if (worker->pidfd >= 0)
        close(worker->pidfd);
    free(worker);
}

struct worker *
worker_by_serial(uint32_t serial)
{
    for (struct worker *w = session.workers; w != NULL; w = w->next)
        if (w->serial == serial)
            return w;
    return NULL;
}

struct job *
job_by_id(const uint8_t *id)
{
    for (struct job *job = session.jobs; job != NULL; job = job->next)
        if (memcmp(job->id, id, JOB_SIZE) == 0)
            return job;
    return NULL;
}

struct job *
job_of(const uint8_t *id)
{
    struct job *job = job_by_id(id);

    if (job != NULL)
        return job;
    job = calloc(1, sizeof *job);
    if (job == NULL)
        return NULL;
    memcpy(job->id, id, JOB_SIZE);
    job->next = session.jobs;
    session.jobs = job;
    return job;
}

void
tighten(struct limits *limits, const struct limits *by)
{
    if (by->bytes < limits->bytes)
        limits->bytes = by->bytes;
    if (by->objects < limits->objects)
        limits->objects = by->objects;
}

void
tighten_fetch(struct fetch_limits *limits, const struct fetch_limits *by)
{
    tighten(&limits->job, &by->job);
    tighten(&limits->worker, &by->worker);
    if (by->each < limits->each)
        limits->each = by->each;
}

int
worker_bind(struct worker *worker, const uint8_t *id,
            const struct limits *job, const struct limits *own)
{
    if (worker->job == NULL) {
        worker->job = job_of(id);
        if (worker->job == NULL)
            return -1;
        worker->job->workers++;
    } else if (memcmp(worker->job->id, id, JOB_SIZE) != 0)
        return -1;
    tighten(&worker->job_limits, job);
    tighten(&worker->limits, own);
    return 0;
}

static int
fits(const struct count *count, const struct limits *limits, uint64_t size)
{
    return count->objects < limits->objects && count->bytes <= limits->bytes &&
           size <= limits->bytes - count->bytes;
}

int
quota_fits(const struct worker *worker, uint64_t size)
{
    return fits(&worker->job->count, &worker->job_limits, size) &&
           fits(&worker->count, &worker->limits, size);
}

void
quota_take(struct worker *worker, uint64_t size)
{
    worker->job->count.bytes += size;
    worker->job->count.objects++;
    worker->count.bytes += size;
    worker->count.objects++;
}

void
quota_give_back(struct job *job, uint32_t serial, uint64_t size)
{
    struct worker *worker = worker_by_serial(serial);

    job->count.bytes -= size;
    job->count.objects--;
    if (worker != NULL) {
        worker->count.bytes -= size;
        worker->count.objects--;
    }
}

void
jobs_forget(void)
{
    struct job **at = &session.jobs;

    while (*at != NULL) {
        struct job *job = *at;
        if (job->workers == 0 && job->count.objects == 0 &&
            !job->sweeping) {
            *at = job->next;
            objects_free(&job->stored);
            free(job);
        } else
            at = &job->next;
    }
}
