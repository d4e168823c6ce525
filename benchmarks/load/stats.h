/* What is measured: latencies in a histogram, and another process's CPU time and memory. */
#ifndef LOAD_STATS_H
#define LOAD_STATS_H

#include <stdint.h>

/* 64 steps for each power of two: no value is off by more than 1.6 %. */
#define HISTOGRAM_BITS 6
#define HISTOGRAM_STEPS (1u << HISTOGRAM_BITS)
#define HISTOGRAM_SIZE (36u * HISTOGRAM_STEPS)

struct histogram {
    uint64_t count, sum, max;
    uint64_t steps[HISTOGRAM_SIZE];
};

void histogram_add(struct histogram *histogram, uint64_t nanoseconds);
void histogram_merge(struct histogram *into, const struct histogram *from);

/* The value that `fraction` of all values do not exceed. */
uint64_t histogram_quantile(const struct histogram *histogram, double fraction);

/* The rate of the best window: what a pair does when nobody else has the processors. A window is
 * shorter than a scheduler's turn. */
#define WINDOW_NS 2000000

struct peak {
    uint64_t begun, count;
    double rate; /* per nanosecond */
};

void peak_start(struct peak *peak, uint64_t now);
void peak_add(struct peak *peak, uint64_t now, unsigned count);

/* Monotonic nanoseconds. */
uint64_t now_ns(void);

/* CPU time of all threads of a process, nanoseconds; 0 when it cannot be had. */
uint64_t process_cpu_ns(int pid);

/* Kibibytes that /proc/PID/status gives for a key such as "RssAnon"; 0 when it has none. */
uint64_t process_memory_kib(int pid, const char *key);

#endif
