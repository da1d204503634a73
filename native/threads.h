/* Raise walls around every thread of a process that has threads already. */
#ifndef RAYSANDBOX_THREADS_H
#define RAYSANDBOX_THREADS_H

#include <stddef.h>
#include <stdint.h>

/* Restrict every thread of the calling process, and all it ever starts.
 *
 * ruleset        Landlock ruleset, complete
 * canary_path    a file that can be opened now and that the ruleset denies
 * filter         struct sock_filter[]; filter_bytes 0 for none
 * timeout_ms     in which every thread must have answered
 * *counted       the threads of the last round
 * report         says which step failed, if one did
 *
 * 0, or errno of the step that failed: then some threads may be restricted and
 * others not, and this process must end. */
int rs_restrict_threads(int ruleset, const char *canary_path,
                        const uint8_t *filter, size_t filter_bytes,
                        int timeout_ms, int *counted, char *report, size_t size);

#endif
