/*
 * An io_uring of the kernel's, mapped: its numbers and structures, and the calls on it.
 *
 * They are the kernel's documented interface under our own names: its header may be missing, or
 * older than the kernel that this runs on.
 */
#ifndef VQ_KERNEL_RING_H
#define VQ_KERNEL_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OPERATION_READV 1
#define OPERATION_WRITEV 2
#define OPERATION_READ 22
#define OPERATION_WRITE 23

struct submission { /* struct io_uring_sqe */
    uint8_t operation, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t length, rw_flags;
    uint64_t user_data;
    uint64_t unused[3];
};
_Static_assert(sizeof(struct submission) == 64, "struct io_uring_sqe");

struct completion { /* struct io_uring_cqe */
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
};

struct kernel_ring {
    int fd; /* -1: there is none */
    bool enabled;
    void *rings;
    size_t rings_size;
    struct submission *submissions;
    size_t submissions_size;
    uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct completion *completions;
};

/* Make and map a ring; `shared` when more than one thread will use it.  0, or -errno and no ring. */
int kernel_ring_open(struct kernel_ring *ring, uint32_t entries, bool shared);

/* Make the calling thread the single issuer of a ring that waits for one. */
void kernel_ring_enable(struct kernel_ring *ring);

/* Submit so many, wait until so many have ended; as io_uring_enter, with errno. */
long kernel_ring_enter(const struct kernel_ring *ring, uint32_t submit, uint32_t wait);

/* Close it, if there is one. */
void kernel_ring_close(struct kernel_ring *ring);

#endif
