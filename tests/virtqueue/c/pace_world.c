/*
 * A world for pace.c in which requests take a known time.
 *
 *   cc -I $CSRC pace_world.c -o pace_world
 *   ./pace_world SECONDS:FEW:ALL[:BYTES] ...
 *
 * In each of the periods a request takes FEW or ALL nanoseconds, as it was taken with few others or
 * with 32, and has that many bytes (4096).  For each the share of requests that were taken few at a
 * time in its second half is printed, in percent, and how many those were at most.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <time.h>

static uint64_t clock_ns;

static int world_clock(clockid_t id, struct timespec *time)
{
    (void)id;
    time->tv_sec = (time_t)(clock_ns / 1000000000u);
    time->tv_nsec = (long)(clock_ns % 1000000000u);
    return 0;
}

#define clock_gettime world_clock
#include "pace.c"

int main(int count, char **arguments)
{
    struct vq_pace pace = {0};
    uint32_t wish = 0;
    for (int i = 1; i < count; i++) {
        double seconds;
        unsigned few, all, bytes = 4096, most = 0;
        if (sscanf(arguments[i], "%lf:%u:%u:%u", &seconds, &few, &all, &bytes) < 3)
            return 2;
        const uint64_t start = clock_ns, length = (uint64_t)(seconds * 1e9);
        uint64_t in_few = 0, in_all = 0;
        while (clock_ns - start < length) {
            const uint32_t batch = wish ? wish : 32;
            clock_ns += batch * (wish ? few : all);
            if (clock_ns - start > length / 2) {
                *(wish ? &in_few : &in_all) += batch;
                most = wish > most ? wish : most;
            }
            wish = pace_next(&pace, batch, (uint64_t)batch * bytes);
        }
        printf("%.0f %u\n", 100.0 * (double)in_few / (double)(in_few + in_all), most);
    }
    return 0;
}
