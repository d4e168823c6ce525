/* A latency histogram, the best rate of a short window, and the CPU time and status of a process. */
#ifndef LOAD_STATS_H
#define LOAD_STATS_H

#include <stdint.h>

/* 64 steps for each power of two: a value is off by at most 1.6 %. */
#define HISTOGRAM_BITS 6
#define HISTOGRAM_STEPS (1u << HISTOGRAM_BITS)
#define HISTOGRAM_SIZE (36u * HISTOGRAM_STEPS)

struct histogram {
    uint64_t count, sum, max;
    uint64_t steps[HISTOGRAM_SIZE];
};

void histogram_add(struct histogram *histogram, uint64_t nanoseconds);
void histogram_merge(struct histogram *into, const struct histogram *from);

/* Return the value that `fraction` of all values do not exceed. */
uint64_t histogram_quantile(const struct histogram *histogram, double fraction);

/* The rate of the best window, in which no other load took the processors. A window is shorter than
 * a scheduler's time slice. */
#define WINDOW_NS 2000000

struct peak {
    uint64_t begun, count;
    double rate; /* per nanosecond */
};

void peak_start(struct peak *peak, uint64_t now);
void peak_add(struct peak *peak, uint64_t now, unsigned count);

/* Return monotonic nanoseconds. */
uint64_t now_ns(void);

/* Return the CPU nanoseconds of all threads of a process, 0 on an error. */
uint64_t process_cpu_ns(int pid);

/* Return the number that /proc/PID/status gives for a key such as "RssAnon" (KiB), 0 on an error. */
uint64_t process_status(int pid, const char *key);

#endif
