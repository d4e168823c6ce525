/*
 * A world for pace.c in which requests take a known time.
 *
 *   cc -I $CSRC pace_world.c -o pace_world
 *   ./pace_world SECONDS:ONE:THREE:EIGHT:ALL[:BYTES] ...
 *
 * In each of the periods a request takes so many nanoseconds when it was taken with up to that many
 * others, or with 32, and has that many bytes (4096).  For each it prints, in percent, how many of the
 * requests of its second half were taken in each of these ways, and how many at a time at most where it
 * was not all.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <time.h>

static uint64_t world_ns;

static int world_clock(clockid_t id, struct timespec *time)
{
    (void)id;
    time->tv_sec = (time_t)(world_ns / 1000000000u);
    time->tv_nsec = (long)(world_ns % 1000000000u);
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
        unsigned cost[4], bytes = 4096, most = 0;
        if (sscanf(arguments[i], "%lf:%u:%u:%u:%u:%u", &seconds, &cost[0], &cost[1], &cost[2],
                   &cost[3], &bytes) < 5)
            return 2;
        const uint64_t start = world_ns, length = (uint64_t)(seconds * 1e9);
        uint64_t taken[4] = {0};
        while (world_ns - start < length) {
            const uint32_t batch = wish ? wish : 32;
            const unsigned way = batch <= 1 ? 0 : batch <= 3 ? 1 : batch <= 8 ? 2 : 3;
            world_ns += batch * cost[way];
            if (world_ns - start > length / 2) {
                taken[way] += batch;
                most = wish > most ? wish : most;
            }
            wish = pace_next(&pace, batch, (uint64_t)batch * bytes);
        }
        const double all = (double)(taken[0] + taken[1] + taken[2] + taken[3]);
        for (int way = 0; way < 4; way++)
            printf("%.0f ", 100 * (double)taken[way] / all);
        printf("%u\n", most);
    }
    return 0;
}
