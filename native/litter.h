/* Files that workers leave: nobody else is there to remove them. */
#ifndef RAYSANDBOX_LITTER_H
#define RAYSANDBOX_LITTER_H

#include "plan.h"

/* Look at the directories of the plan's R_LOG files and remove
 *
 *     raysandbox_state-<worker>.bin      that no process has locked, and that was
 *                                        made at least so many seconds ago;
 *     raysandbox_events-<worker>.jsonl   beside it, of workers without a state
 *                                        file: the oldest beyond a number of
 *                                        files and bytes.
 *
 * In a directory of the operator's own (audit.directory) nothing is removed. */
void litter_sweep(const struct plan *plan, int age_s);

#endif
