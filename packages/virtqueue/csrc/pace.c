#define _GNU_SOURCE
#include "pace.h"

#include <stdbool.h>
#include <time.h>

#define WINDOW_NS 2000000u /* one measurement */
#define PAUSE_NS 1000000u  /* longer between two batches: nobody was in a hurry */
#define TRY_EVERY 32u      /* windows */
#define FEW_BYTES (UINT64_C(256) << 10)

enum { FEW, ALL };

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

void pace_forget(struct vq_pace *pace) { *pace = (struct vq_pace){0}; }

/* The window is over: remember what a request took, and choose for the next one. */
static void choose(struct vq_pace *pace, uint64_t elapsed)
{
    uint32_t *cost = &pace->cost[pace->way];
    const uint64_t found = elapsed / pace->count + 1;
    const uint32_t limited = found < UINT32_MAX / 4 ? (uint32_t)found : UINT32_MAX / 4;
    *cost = *cost ? (3 * *cost + limited) / 4 : limited;
    /* Few at once are better for latency: all have to be clearly faster. */
    const bool known = pace->cost[FEW] && pace->cost[ALL];
    const uint32_t better = known && pace->cost[ALL] < pace->cost[FEW] / 16 * 15 ? ALL : FEW;
    pace->way = pace->windows++ % TRY_EVERY == 0 ? !better : better;
}

uint32_t pace_next(struct vq_pace *pace, uint32_t count, uint64_t bytes)
{
    const uint64_t time = now();
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
    if (pace->way == ALL)
        return 0;
    const uint64_t fitting = FEW_BYTES * count / (bytes ? bytes : 1);
    return !fitting ? 1 : fitting < PACE_FEW ? (uint32_t)fitting : PACE_FEW;
}
