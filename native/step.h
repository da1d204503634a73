/* How a step of the set-up reports that it failed.
 *
 * Everything here runs before any line of the task.  A step that fails ends
 * the process at once (fail closed) after one line on the status descriptor:
 *
 *     error <step> <errno> <detail>\n
 *
 * Python turns that line into raysandbox.SetupError.
 */
#ifndef RAYSANDBOX_STEP_H
#define RAYSANDBOX_STEP_H

enum { EXIT_SETUP = 125 };

/* Where reports go; -1: nowhere, and a failed step to stderr. */
extern int rs_status_fd;

/* Report the failed step with errno and end this process. */
_Noreturn void rs_die(const char *step, const char *detail);

/* Write a whole line to the status descriptor; failures to are ignored on purpose: the
 * exit status still says that the set-up failed. */
void rs_report(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Write an id map, or what must be said before one, in the one write that the
 * kernel takes; die if it refuses.  Paths as in openat(2). */
void rs_write_map(int directory, const char *path, const char *text);

#endif
