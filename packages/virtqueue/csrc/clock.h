/* Monotonic nanoseconds.  A file that includes this defines _GNU_SOURCE first. */
#ifndef VQ_CLOCK_H
#define VQ_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

#endif
