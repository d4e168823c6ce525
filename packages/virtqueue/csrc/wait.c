/*
 * Waiting for the driver: look at the rings for a while, then sleep on file descriptors.
 *
 * Looking costs a processor and saves the driver's kick and our wake-up.  How long is adapted: a
 * sleep that a little more looking would have spared doubles the time, a long one halves it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

#define FIRST_SPIN_NS 4000u
#define LOOKS_PER_CLOCK 32u

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool any_ready(const struct vq_wait *wait)
{
    const uint64_t *queues = pointer(wait->queues);
    for (uint32_t i = 0; i < wait->queue_count; i++)
        if (vq_ready(pointer(queues[i])) > 0)
            return true;
    return false;
}

/* Look until a chain is there or `spin_ns` have passed. */
static bool spin(const struct vq_wait *wait)
{
    const uint64_t end = now() + wait->spin_ns;
    do {
        for (uint32_t i = 0; i < LOOKS_PER_CLOCK; i++) {
            if (any_ready(wait))
                return true;
            relax();
        }
    } while (now() < end);
    return false;
}

static void adapt(struct vq_wait *wait, uint64_t slept)
{
    if (slept < wait->spin_max_ns) {
        wait->spin_ns = wait->spin_ns ? wait->spin_ns * 2 : FIRST_SPIN_NS;
        if (wait->spin_ns > wait->spin_max_ns)
            wait->spin_ns = wait->spin_max_ns;
    } else {
        wait->spin_ns = wait->spin_ns > FIRST_SPIN_NS ? wait->spin_ns / 2 : 0;
    }
}

/* Take an eventfd's count, and never wait for one: whoever shares the file can take the count first,
 * and make it blocking. */
static void drain(int fd)
{
    uint64_t count;
    struct iovec into = {&count, sizeof(count)};
    /* The call of libraries older than this flag: position -1 is that of no file that can be sought. */
    const long position = -1, high = 0;
    if (syscall(SYS_preadv2, fd, &into, 1L, position, high, (long)RWF_NOWAIT) >= 0 ||
        errno != EOPNOTSUPP)
        return;
    /* Linux before 5.8. */
    if (read(fd, &count, sizeof(count)) < 0)
        return;
}

int vq_wait(struct vq_wait *wait)
{
    const uint64_t *queues = pointer(wait->queues);
    if (wait->size != sizeof(*wait))
        return VQ_ABI_ERROR;
    if (wait->spin_ns > wait->spin_max_ns)
        wait->spin_ns = wait->spin_max_ns;
    if (any_ready(wait))
        return VQ_WAIT_READY;
    if (wait->spin_ns) {
        for (uint32_t i = 0; i < wait->queue_count; i++)
            queue_quiet(pointer(queues[i]));
        if (spin(wait))
            return VQ_WAIT_READY;
    }
    /* Each of these asks for kicks, passes a full barrier and looks again. */
    bool ready = false;
    for (uint32_t i = 0; i < wait->queue_count; i++)
        ready |= vq_arm(pointer(queues[i])) > 0;
    if (ready)
        return VQ_WAIT_READY;

    struct pollfd polled[2] = {
        {.fd = wait->kick_fd, .events = POLLIN},
        {.fd = wait->wake_fd, .events = POLLIN},
    };
    const uint64_t start = now();
    if (poll(polled, 2, wait->timeout_ms) < 0)
        return errno == EINTR ? VQ_WAIT_INTERRUPTED : -1000 - errno;
    adapt(wait, now() - start);
    int result = 0;
    if (polled[0].revents) {
        /* An eventfd's count is taken; what else it may be (epoll, a pipe) is the caller's. */
        if (wait->drain_kick)
            drain(wait->kick_fd);
        result |= VQ_WAIT_KICK;
    }
    if (polled[1].revents)
        result |= VQ_WAIT_WAKE;
    return result;
}
