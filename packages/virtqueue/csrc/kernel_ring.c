/* Making, mapping and entering an io_uring, on kernels from 5.6 on and from what each knows. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel_ring.h"

/* The same numbers on every architecture that Linux has but alpha. */
#define CALL_SETUP 425
#define CALL_ENTER 426
#define CALL_REGISTER 427

#define SETUP_DISABLED (1u << 6)       /* R_DISABLED: the thread that enables it is the single issuer */
#define SETUP_SUBMIT_ALL (1u << 7)     /* 5.18 */
#define SETUP_COOP_TASKRUN (1u << 8)   /* 5.19 */
#define SETUP_SINGLE_ISSUER (1u << 12) /* 6.0 */
#define SETUP_DEFER_TASKRUN (1u << 13) /* 6.1 */

#define FEATURE_SINGLE_MMAP (1u << 0)   /* 5.4 */
#define FEATURE_NODROP (1u << 1)        /* 5.5: completions are never lost */
#define FEATURE_SUBMIT_STABLE (1u << 2) /* 5.5: vectors are ours again after submission */
#define FEATURE_RW_CUR_POS (1u << 3)    /* 5.6: came together with READ and WRITE */
#define FEATURES (FEATURE_SINGLE_MMAP | FEATURE_NODROP | FEATURE_SUBMIT_STABLE | FEATURE_RW_CUR_POS)

#define REGISTER_ENABLE 12u
#define ENTER_GETEVENTS 1u
#define MAP_RINGS 0
#define MAP_ENTRIES 0x10000000

struct queue_offsets {
    uint32_t head, tail, mask, entries;
    uint32_t varied[4]; /* submission: flags, dropped, array; completion: overflow, entries, flags */
    uint64_t user_address;
};

struct parameters { /* struct io_uring_params */
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
    uint32_t reserved[3];
    struct queue_offsets sq, cq;
};
_Static_assert(sizeof(struct parameters) == 120, "struct io_uring_params");
#define SQ_ARRAY 2
#define CQ_ENTRIES 1

void kernel_ring_close(struct kernel_ring *ring)
{
    if (ring->submissions)
        munmap(ring->submissions, ring->submissions_size);
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    if (ring->fd >= 0)
        close(ring->fd);
    ring->submissions = NULL;
    ring->rings = NULL;
    ring->fd = -1;
}

static void *map(int fd, size_t size, off_t offset)
{
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    return mapped == MAP_FAILED ? NULL : mapped;
}

/* The kind that costs least first; older kernels answer EINVAL to flags they do not know. */
static int setup(uint32_t entries, bool shared, struct parameters *parameters)
{
    static const uint32_t kinds[] = {
        SETUP_DISABLED | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_SUBMIT_ALL,
        SETUP_COOP_TASKRUN | SETUP_SUBMIT_ALL,
        0,
    };
    long fd = -1;
    /* A single issuer is the thread that comes first, for good. */
    for (unsigned kind = shared; kind < sizeof(kinds) / sizeof(kinds[0]); kind++) {
        memset(parameters, 0, sizeof(*parameters));
        parameters->flags = kinds[kind];
        fd = syscall(CALL_SETUP, entries, parameters);
        if (fd >= 0 || errno != EINVAL)
            break;
    }
    return fd < 0 ? -errno : (int)fd; /* which the kernel has made close-on-exec */
}

int kernel_ring_open(struct kernel_ring *ring, uint32_t entries, bool shared)
{
    struct parameters parameters;
    ring->fd = setup(entries, shared, &parameters);
    if (ring->fd < 0) {
        const int error = ring->fd;
        ring->fd = -1;
        return error;
    }
    if ((parameters.features & FEATURES) != FEATURES) {
        kernel_ring_close(ring);
        return -ENOSYS;
    }
    const struct queue_offsets *sq = &parameters.sq, *cq = &parameters.cq;
    const size_t sq_end = sq->varied[SQ_ARRAY] + parameters.sq_entries * sizeof(uint32_t);
    const size_t cq_end = cq->varied[CQ_ENTRIES] + parameters.cq_entries * sizeof(struct completion);
    ring->rings_size = sq_end > cq_end ? sq_end : cq_end;
    ring->submissions_size = parameters.sq_entries * sizeof(struct submission);
    ring->rings = map(ring->fd, ring->rings_size, MAP_RINGS);
    ring->submissions = map(ring->fd, ring->submissions_size, MAP_ENTRIES);
    if (!ring->rings || !ring->submissions) {
        const int error = -errno;
        kernel_ring_close(ring);
        return error;
    }
    unsigned char *base = ring->rings;
    ring->sq_head = (uint32_t *)(void *)(base + sq->head);
    ring->sq_tail = (uint32_t *)(void *)(base + sq->tail);
    ring->cq_head = (uint32_t *)(void *)(base + cq->head);
    ring->cq_tail = (uint32_t *)(void *)(base + cq->tail);
    ring->sq_mask = *(uint32_t *)(void *)(base + sq->mask);
    ring->cq_mask = *(uint32_t *)(void *)(base + cq->mask);
    /* The completion queue is twice as long as the submission queue, so it cannot overflow. */
    ring->completions = (struct completion *)(void *)(base + cq->varied[CQ_ENTRIES]);
    uint32_t *array = (uint32_t *)(void *)(base + sq->varied[SQ_ARRAY]);
    for (uint32_t i = 0; i < parameters.sq_entries; i++)
        array[i] = i;
    ring->enabled = !(parameters.flags & SETUP_DISABLED);
    return 0;
}

void kernel_ring_enable(struct kernel_ring *ring)
{
    ring->enabled = !syscall(CALL_REGISTER, ring->fd, REGISTER_ENABLE, NULL, 0);
}

long kernel_ring_enter(const struct kernel_ring *ring, uint32_t submit, uint32_t wait)
{
    return syscall(CALL_ENTER, ring->fd, submit, wait, ENTER_GETEVENTS, NULL, 0);
}
