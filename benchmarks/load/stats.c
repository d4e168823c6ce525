#define _GNU_SOURCE
#include "stats.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static unsigned step_of(uint64_t value)
{
    if (value < HISTOGRAM_STEPS)
        return (unsigned)value;
    unsigned exponent = 63u - (unsigned)__builtin_clzll(value) - HISTOGRAM_BITS;
    unsigned step = (exponent << HISTOGRAM_BITS) + (unsigned)(value >> exponent);
    return step < HISTOGRAM_SIZE ? step : HISTOGRAM_SIZE - 1;
}

static uint64_t value_of(unsigned step)
{
    if (step < HISTOGRAM_STEPS)
        return step;
    unsigned exponent = (step >> HISTOGRAM_BITS) - 1;
    return (uint64_t)(HISTOGRAM_STEPS + (step & (HISTOGRAM_STEPS - 1))) << exponent;
}

void histogram_add(struct histogram *histogram, uint64_t nanoseconds)
{
    histogram->count++;
    histogram->sum += nanoseconds;
    if (nanoseconds > histogram->max)
        histogram->max = nanoseconds;
    histogram->steps[step_of(nanoseconds)]++;
}

void histogram_merge(struct histogram *into, const struct histogram *from)
{
    into->count += from->count;
    into->sum += from->sum;
    if (from->max > into->max)
        into->max = from->max;
    for (unsigned i = 0; i < HISTOGRAM_SIZE; i++)
        into->steps[i] += from->steps[i];
}

uint64_t histogram_quantile(const struct histogram *histogram, double fraction)
{
    uint64_t wanted = (uint64_t)((double)histogram->count * fraction), seen = 0;

    for (unsigned i = 0; i < HISTOGRAM_SIZE; i++) {
        seen += histogram->steps[i];
        if (seen > wanted)
            return value_of(i);
    }
    return histogram->max;
}

void peak_start(struct peak *peak, uint64_t now)
{
    *peak = (struct peak){.begun = now};
}

void peak_add(struct peak *peak, uint64_t now, unsigned count)
{
    uint64_t elapsed = now - peak->begun;

    peak->count += count;
    if (elapsed < WINDOW_NS)
        return;
    double rate = (double)peak->count / (double)elapsed;
    if (rate > peak->rate)
        peak->rate = rate;
    peak->begun = now;
    peak->count = 0;
}

uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t process_cpu_ns(int pid)
{
    struct timespec time;
    clockid_t clock;

    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &time))
        return 0;
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t process_status(int pid, const char *key)
{
    char path[64], line[256];
    unsigned long long value = 0;
    size_t length = strlen(key);

    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, key, length) && line[length] == ':')
            sscanf(line + length + 1, "%llu", &value);
    fclose(file);
    return value;
}
