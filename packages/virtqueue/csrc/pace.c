/*
 * Choosing how many requests to take at once: measure each number for a window of time, keep the
 * one with which a request takes least, and try another one now and then.  pace.h says why.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "pace.h"

#define WINDOW_NS 2000000u /* one measurement */
#define PAUSE_NS 1000000u  /* longer between two batches: the driver was in no hurry */
#define TRY_EVERY 32u      /* windows */
#define LARGE (UINT64_C(256) << 10) /* bytes that are enough for one batch */

/* The ways, 0 for all; the first unless another is clearly faster. */
static const uint32_t at_once[VQ_PACES] = {8, 0, 3, 1};

void pace_forget(struct vq_pace *pace) { *pace = (struct vq_pace){0}; }

/* The window is over: remember what a request took, and choose for the next one. */
static void choose(struct vq_pace *pace, uint64_t elapsed)
{
    uint32_t *cost = pace->cost;
    const uint64_t found = elapsed / pace->count + 1;
    const uint32_t limited = found < UINT32_MAX / 2 ? (uint32_t)found : UINT32_MAX / 2;
    cost[pace->way] = cost[pace->way] ? (cost[pace->way] + limited) / 2 : limited;

    uint32_t best = 0;
    for (uint32_t way = 0; way < VQ_PACES; way++) {
        if (!cost[way]) { /* not tried yet */
            pace->way = way;
            return;
        }
        if (cost[way] < cost[best] / 16 * 15)
            best = way;
    }
    pace->way = best;
    if (++pace->windows % TRY_EVERY == 0)
        pace->way = (best + 1 + pace->windows / TRY_EVERY % (VQ_PACES - 1)) % VQ_PACES;
}

uint32_t pace_next(struct vq_pace *pace, uint32_t count, uint64_t bytes)
{
    const uint64_t time = clock_ns();
    if (time - pace->last > PAUSE_NS) {
        pace->begun = time;
        pace->count = 0;
    } else {
        pace->count += count;
        if (time - pace->begun > WINDOW_NS) {
            choose(pace, time - pace->begun);
            pace->begun = time;
            pace->count = 0;
        }
    }
    pace->last = time;
    const uint32_t wanted = at_once[pace->way];
    const uint64_t fitting = LARGE * count / (bytes ? bytes : 1);
    return fitting >= wanted ? wanted : fitting ? (uint32_t)fitting : 1;
}
