/* One run: phases, the progress of each driver thread, and the figures that both programs print. */
#ifndef LOAD_RUN_H
#define LOAD_RUN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "ring.h"
#include "stats.h"
#include "wire.h"

enum phase { WARM_UP, MEASURE, DRAIN };

/* What one driver thread has done. The figures are those of the measured span. */
struct progress {
    const struct ring *rings[2]; /* the ring the thread waits for, and its other ring or NULL */
    _Atomic uint64_t completed;  /* since the start */
    enum phase phase;
    uint64_t first_done, begun, ended; /* nanoseconds */
    uint64_t requests, kicks, sleeps;
    struct peak peak;
    struct histogram histogram;
};

/* Follow the phase of the run; false when the thread must stop. */
bool progress_follow(struct progress *progress, uint64_t now);

/* Count completions. */
void progress_add(struct progress *progress, uint64_t now, unsigned count);

/* Whether the threads must stop: for a thread in the middle of a wait. */
bool run_drains(void);

/* Start a ring on the socket. */
void run_start_ring(struct wire *wire, unsigned index, const struct ring *ring);

/* The cost of the measured span in nanoseconds. */
struct cost {
    uint64_t back_end, driver, elapsed;
};

/* Warm up and measure, then have the threads drain. A thread without progress ends the program: its
 * notification was lost, or worse. `back_end` is the process on the other side. */
struct cost run_measure(struct progress *const *threads, unsigned count, double warm_up,
                        double seconds, int back_end);

/* Print the common figures as the beginning of a JSON object; `bytes` is the data of a request. */
void run_report(struct progress *const *threads, unsigned count, const struct cost *cost,
                uint64_t setup_ns, uint32_t bytes);

#endif
