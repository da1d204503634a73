/* What workers may write into their log files: nothing else bounds it. */
#ifndef RAYSANDBOX_LOGS_H
#define RAYSANDBOX_LOGS_H

#include "plan.h"

/* Look at the files of the plan's R_LOG records once, and at those in old/ beside
 * them, where Ray moves them.  By R_LOG_LIMIT,
 *
 *     one with a pid in its name that is larger than half the limit starts anew,
 *         and its newest half a limit is left beside it, as NAME.1;
 *     where all of them are larger than their limit, the oldest of workers that
 *         have ended are removed, and if that is not enough, the limit of each is
 *         a smaller one;
 *     any other one, which an honest worker keeps small itself, is emptied.
 *
 * Returns how many milliseconds the look took, without the cuts. */
long logs_bound(const struct plan *plan);

#endif
