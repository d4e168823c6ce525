#define _GNU_SOURCE
#include "run.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define STALL_NS 5000000000ull
#define LOOK_US 50000 /* between two looks at the progress */
#define MAX_THREADS 64

static _Atomic int phase;

static void progress_begin(struct progress *progress, uint64_t now)
{
    memset(&progress->histogram, 0, sizeof progress->histogram);
    peak_start(&progress->peak, now);
    progress->begun = now;
    progress->requests = progress->kicks = progress->sleeps = 0;
    for (unsigned i = 0; i < 2 && progress->rings[i]; i++) {
        progress->kicks -= progress->rings[i]->kicks;
        progress->sleeps -= progress->rings[i]->sleeps;
    }
}

static void progress_end(struct progress *progress, uint64_t now)
{
    progress->ended = now;
    for (unsigned i = 0; i < 2 && progress->rings[i]; i++) {
        progress->kicks += progress->rings[i]->kicks;
        progress->sleeps += progress->rings[i]->sleeps;
    }
}

bool progress_follow(struct progress *progress, uint64_t now)
{
    enum phase current = (enum phase)atomic_load_explicit(&phase, memory_order_relaxed);

    if (progress->phase == WARM_UP && current != WARM_UP)
        progress_begin(progress, now);
    if (current == DRAIN)
        progress_end(progress, now);
    progress->phase = current;
    return current != DRAIN;
}

bool run_drains(void)
{
    return atomic_load_explicit(&phase, memory_order_relaxed) == DRAIN;
}

void progress_add(struct progress *progress, uint64_t now, unsigned count)
{
    uint64_t completed = atomic_load_explicit(&progress->completed, memory_order_relaxed);

    if (!count)
        return;
    if (!completed)
        progress->first_done = now;
    progress->requests += count;
    peak_add(&progress->peak, now, count);
    atomic_store_explicit(&progress->completed, completed + count, memory_order_relaxed);
}

void run_start_ring(struct wire *wire, unsigned index, const struct ring *ring)
{
    wire_ring(wire, index, ring->size, ring_base(ring), (uintptr_t)ring->descriptor,
              (uintptr_t)ring->driver, (uintptr_t)ring->device, ring->kick, ring->call);
    /* Some back-ends make the shared fd non-blocking, but every driver's sleep must cost one call. */
    fcntl(ring->call, F_SETFL, fcntl(ring->call, F_GETFL) & ~O_NONBLOCK);
}

static uint64_t completed_by(const struct progress *progress)
{
    return atomic_load_explicit(&progress->completed, memory_order_relaxed);
}

static uint64_t total(struct progress *const *threads, unsigned count)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < count; i++)
        sum += completed_by(threads[i]);
    return sum;
}

static _Noreturn void stalled(const struct progress *progress, unsigned index)
{
    const struct ring *ring = progress->rings[0];

    die(EXIT_STALLED,
        "thread %u stands still: %llu requests completed, available %u, used %u, device's used "
        "index %u, its wish %#x",
        index, (unsigned long long)completed_by(progress), ring->next_avail, ring->next_used,
        *(uint16_t *)(ring->device + 2),
        *(uint16_t *)(ring->packed ? ring->device : ring->device + 4 + 8 * ring->size));
}

static void watch(struct progress *const *threads, unsigned count, double seconds)
{
    static uint64_t last[MAX_THREADS], since[MAX_THREADS];
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);

    for (;;) {
        uint64_t now = now_ns();
        for (unsigned i = 0; i < count; i++) {
            uint64_t done = completed_by(threads[i]);
            if (done != last[i] || !since[i]) {
                last[i] = done;
                since[i] = now;
            } else if (now - since[i] > STALL_NS) {
                stalled(threads[i], i);
            }
        }
        if (now >= end)
            return;
        usleep(end - now > 1000 * LOOK_US ? LOOK_US : (useconds_t)((end - now) / 1000 + 1));
    }
}

struct cost run_measure(struct progress *const *threads, unsigned count, double warm_up,
                        double seconds, int back_end)
{
    watch(threads, count, warm_up);
    struct cost before = {process_cpu_ns(back_end), process_cpu_ns(getpid()), now_ns()};
    uint64_t completed = total(threads, count);
    atomic_store(&phase, MEASURE);
    watch(threads, count, seconds);
    struct cost cost = {process_cpu_ns(back_end) - before.back_end,
                        process_cpu_ns(getpid()) - before.driver, now_ns() - before.elapsed};
    if (total(threads, count) == completed)
        die(EXIT_STALLED, "no request was completed");
    atomic_store(&phase, DRAIN);
    return cost;
}

void run_report(struct progress *const *threads, unsigned count, const struct cost *cost,
                uint64_t setup_ns, uint32_t bytes)
{
    static struct histogram all;
    const struct ring *ring = threads[0]->rings[0];
    uint64_t requests = 0, kicks = 0, sleeps = 0;
    double rate = 0, peak = 0;

    for (unsigned i = 0; i < count; i++) {
        const struct progress *progress = threads[i];
        histogram_merge(&all, &progress->histogram);
        rate += (double)progress->requests * 1e9 / (double)(progress->ended - progress->begun);
        peak += progress->peak.rate * 1e9;
        requests += progress->requests;
        kicks += progress->kicks;
        sleeps += progress->sleeps;
    }
    double each = requests ? (double)requests : 1;
    printf("{\"requests\": %llu, \"rate\": %.0f, \"peak_rate\": %.0f, \"mib_per_s\": %.1f, ",
           (unsigned long long)requests, rate, peak, rate * bytes / 1048576);
    printf("\"mean_ns\": %.0f, \"p50_ns\": %llu, \"p99_ns\": %llu, \"p999_ns\": %llu, "
           "\"max_ns\": %llu, ",
           (double)all.sum / each, (unsigned long long)histogram_quantile(&all, 0.5),
           (unsigned long long)histogram_quantile(&all, 0.99),
           (unsigned long long)histogram_quantile(&all, 0.999), (unsigned long long)all.max);
    printf("\"cpu_ns_per_request\": %.1f, \"cpus\": %.3f, \"driver_cpus\": %.3f, "
           "\"kicks_per_request\": %.4f, \"sleeps_per_request\": %.4f, ",
           (double)cost->back_end / each, (double)cost->back_end / (double)cost->elapsed,
           (double)cost->driver / (double)cost->elapsed, (double)kicks / each,
           (double)sleeps / each);
    printf("\"setup_us\": %.1f, \"event_idx\": %s, \"packed\": %s, ", (double)setup_ns / 1e3,
           ring->event_idx ? "true" : "false", ring->packed ? "true" : "false");
}
