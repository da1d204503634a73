/* Theory of operation.
 *
 * A Ray worker has some twenty threads before it knows what it will run, and
 * credentials, no_new_privs and Landlock belong to each thread (landlock(7);
 * up to ABI 7 nothing restricts a whole process).  So each thread does it to
 * itself, in the handler of a real-time signal that nobody else uses:
 *
 *   round: list /proc/self/task, send the signal to each, wait for all answers
 *   a thread that is behind the walls already answers "held"
 *   done when two rounds in a row hold every thread that there is
 *
 * Whether a thread is behind them is not remembered but tried: it opens a
 * canary, a file that the rules deny and that could be opened before.  A thread
 * number that was used twice, or a thread that was born in between, can't pass
 * for another one.  Whatever a thread starts afterwards inherits its walls.
 *
 * The system-call filter comes last and goes to all threads in one step
 * (SECCOMP_FILTER_FLAG_TSYNC), because it forbids what the others need.
 *
 * Every failure is reported to the caller, who must not run anybody's code in
 * this process then: some threads may be restricted and others not. */
#define _GNU_SOURCE
#include "threads.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MOST_THREADS = 4096,
    MOST_ROUNDS = 64,
    HELD_ROUNDS = 2,
    PENDING = 0, /* answers: none yet, */
    HELD = 1,    /* was behind the walls already, */
    DONE = 2,    /* is now, */
    FAILED = 16, /* or step and errno: FAILED * step + 1024 * errno */
};

/* What a thread does to itself; names for reports. */
enum step { NO_NEW_PRIVS = 1, CAPABILITIES, SECUREBITS, LANDLOCK, CANARY };
static const char *const STEPS[] = {"",           "no_new_privs",
                                    "capset",     "securebits",
                                    "landlock_restrict_self", "canary"};

struct thread {
    pid_t tid;
    _Atomic int answer;
};

/* Read by the handlers; written before the first signal is sent. */
static struct thread threads[MOST_THREADS];
static int ruleset_fd;
static const char *canary;
static pid_t own_pid;

static int
fail(char *report, size_t size, const char *format, ...)
{
    int saved = errno;
    va_list args;

    va_start(args, format);
    vsnprintf(report, size, format, args);
    va_end(args);
    return saved ? saved : EPROTO;
}

/* Whether the walls hold for the calling thread: 1 yes, 0 no. */
static int
is_held(void)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, canary, O_RDONLY | O_CLOEXEC, 0);

    if (fd >= 0) {
        syscall(SYS_close, fd);
        return 0;
    }
    return errno == EACCES;
}

/* Take everything from the calling thread.  Async-signal-safe: system calls
 * alone.  0, or the answer that says which step failed. */
static int
restrict_thread(void)
{
    struct __user_cap_header_struct header = {
        .version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};
    unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED |
                         SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED |
                         SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                         SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

    if (syscall(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return FAILED * NO_NEW_PRIVS + 1024 * errno;
    /* Only where we may (root): an ordinary user has none to lose, and with
     * no_new_privs gains none by exec. */
    for (unsigned long cap = 0; cap < 64; cap++)
        if (syscall(SYS_prctl, PR_CAPBSET_DROP, cap, 0, 0, 0) != 0)
            break;
    /* An outer filter may forbid this one; what is not permitted below can't be
     * ambient either. */
    syscall(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (syscall(SYS_prctl, PR_SET_SECUREBITS, bits, 0, 0, 0) != 0 && errno != EPERM)
        return FAILED * SECUREBITS + 1024 * errno;
    if (syscall(SYS_capset, &header, none) != 0)
        return FAILED * CAPABILITIES + 1024 * errno;
    if (syscall(SYS_landlock_restrict_self, ruleset_fd, 0) != 0)
        return FAILED * LANDLOCK + 1024 * errno;
    if (!is_held())
        return FAILED * CANARY + 1024 * EPROTO;
    return DONE;
}

static void
on_signal(int number, siginfo_t *info, void *context)
{
    int saved = errno;

    (void)number;
    (void)context;
    /* Somebody else's signal of the same number is not ours to act on. */
    if (info->si_code == SI_QUEUE && info->si_pid == own_pid &&
        info->si_value.sival_int >= 0 && info->si_value.sival_int < MOST_THREADS) {
        struct thread *self = &threads[info->si_value.sival_int];
        int answer = is_held() ? HELD : restrict_thread();
        if (self->tid == (pid_t)syscall(SYS_gettid))
            atomic_store(&self->answer, answer);
    }
    errno = saved;
}

/* List this process's threads; their number, or -1 with errno. */
static int
list_threads(void)
{
    DIR *directory = opendir("/proc/self/task");
    struct dirent *entry;
    int count = 0;

    if (directory == NULL)
        return -1;
    while ((errno = 0, entry = readdir(directory)) != NULL) {
        if (entry->d_name[0] == '.')
            continue;
        if (count == MOST_THREADS) {
            closedir(directory);
            errno = E2BIG;
            return -1;
        }
        threads[count].tid = (pid_t)strtol(entry->d_name, NULL, 10);
        atomic_store(&threads[count].answer, PENDING);
        count++;
    }
    int code = errno;
    closedir(directory);
    errno = code;
    return code == 0 ? count : -1;
}

/* Say which thread does not answer, and what it does instead: its name, its state
 * (proc_pid_status(5)) and whether it blocks the signal. */
static int
fail_silent(pid_t tid, int number, char *report, size_t size)
{
    char path[64], status[4096], name[32] = "?", state = '?';
    unsigned long long blocked = 0;

    snprintf(path, sizeof path, "/proc/self/task/%d/status", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, status, sizeof status - 1);
    if (fd >= 0)
        close(fd);
    status[length > 0 ? length : 0] = '\0';
    sscanf(status, "Name:\t%31[^\n]", name);
    const char *line = strstr(status, "\nState:\t");
    if (line != NULL)
        state = line[strlen("\nState:\t")];
    line = strstr(status, "\nSigBlk:\t");
    if (line != NULL)
        blocked = strtoull(line + strlen("\nSigBlk:\t"), NULL, 16);
    errno = ETIMEDOUT;
    return fail(report, size, "thread %d, %s, does not answer signal %d (state %c%s)",
                tid, name, number, state,
                blocked >> (number - 1) & 1 ? ", and blocks it" : "");
}

static int
is_gone(pid_t tid)
{
    return syscall(SYS_tgkill, own_pid, tid, 0) != 0 && errno == ESRCH;
}

static long long
now_ms(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (long long)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* Ask the thread in a slot and wait for its answer, which is returned; HELD if
 * it has ended.  One at a time: what a thread is asked for takes a lock of the
 * kernel anyway. */
static int
ask(int slot, int number, long long deadline)
{
    struct thread *thread = &threads[slot];
    siginfo_t info;
    struct timespec pause = {.tv_nsec = 50000};
    int answer;

    memset(&info, 0, sizeof info);
    info.si_signo = number;
    info.si_code = SI_QUEUE;
    info.si_pid = own_pid;
    info.si_uid = getuid();
    info.si_value.sival_int = slot;
    while (syscall(SYS_rt_tgsigqueueinfo, own_pid, thread->tid, number, &info) != 0) {
        if (errno == ESRCH)
            return HELD;
        if (errno != EAGAIN || now_ms() > deadline)
            return PENDING;
        nanosleep(&pause, NULL);
    }
    while ((answer = atomic_load(&thread->answer)) == PENDING) {
        if (now_ms() > deadline)
            return PENDING;
        if (is_gone(thread->tid))
            return HELD;
        nanosleep(&pause, NULL);
    }
    return answer;
}

/* A real-time signal that nobody has taken, or 0. */
static int
free_signal(void)
{
    struct sigaction now;

    for (int number = SIGRTMAX; number >= SIGRTMIN; number--)
        if (sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_DFL)
            return number;
    return 0;
}

static int
restrict_all(int number, long long deadline, int *counted, char *report,
             size_t size)
{
    int held = 0;

    for (int round = 0; held < HELD_ROUNDS; round++) {
        int count = list_threads(), changed = 0;
        if (count <= 0)
            return fail(report, size, "list_threads");
        if (round == MOST_ROUNDS) {
            errno = EBUSY;
            return fail(report, size, "new threads in each of %d rounds", round);
        }
        for (int slot = 0; slot < count; slot++) {
            int answer = ask(slot, number, deadline);
            if (answer == PENDING)
                return fail_silent(threads[slot].tid, number, report, size);
            if (answer >= FAILED) {
                errno = answer / 1024;
                return fail(report, size, "%s in thread %d",
                            STEPS[(answer % 1024) / FAILED], threads[slot].tid);
            }
            changed |= answer == DONE;
        }
        held = changed ? 0 : held + 1;
        *counted = count;
    }
    return 0;
}

int
rs_restrict_threads(int ruleset, const char *canary_path, const uint8_t *filter,
                    size_t filter_bytes, int timeout_ms, int *counted,
                    char *report, size_t size)
{
    struct sigaction action, before;
    struct sock_fprog program;
    int number = free_signal();

    *counted = 0;
    own_pid = getpid();
    ruleset_fd = ruleset;
    canary = canary_path;
    int canary_fd = open(canary, O_RDONLY | O_CLOEXEC);
    if (canary_fd < 0)
        return fail(report, size, "the canary can't be opened before either");
    close(canary_fd);
    if (number == 0) {
        errno = EBUSY;
        return fail(report, size, "every real-time signal is taken");
    }
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigfillset(&action.sa_mask);
    if (sigaction(number, &action, &before) != 0)
        return fail(report, size, "sigaction");
    int code = restrict_all(number, now_ms() + timeout_ms, counted, report, size);
    sigaction(number, &before, NULL);
    if (code != 0)
        return code;
    /* Changing credentials may have made us dumpable again, so it is last. */
    if (prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != 0 &&
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        return fail(report, size, "undumpable");
    if (filter_bytes == 0)
        return 0; /* the caller's protections say OFF, and why */
    if (filter_bytes % sizeof(struct sock_filter) != 0 ||
        filter_bytes / sizeof(struct sock_filter) > 4096) {
        errno = EINVAL;
        return fail(report, size, "seccomp_program");
    }
    program.len = (unsigned short)(filter_bytes / sizeof(struct sock_filter));
    program.filter = malloc(filter_bytes);
    if (program.filter == NULL)
        return fail(report, size, "seccomp_program");
    memcpy(program.filter, filter, filter_bytes);
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                          SECCOMP_FILTER_FLAG_TSYNC, &program);
    code = errno;
    free(program.filter);
    if (result > 0) {
        /* A thread with another filter tree can't be brought into line. */
        errno = EBUSY;
        return fail(report, size, "seccomp: thread %ld can't be synchronised",
                    result);
    }
    errno = code;
    return result == 0 ? 0 : fail(report, size, "seccomp");
}
