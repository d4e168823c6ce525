/*
 * io_uring as an executor of transfers, for the other files of the engine; virtqueue.h has the same
 * for callers outside, and says what the calls promise.
 */
#ifndef VQ_URING_H
#define VQ_URING_H

#include "virtqueue.h"

#define URING_ENTRIES_MAX 4096u

int uring_create(uint32_t entries, struct uring **out);
int uring_transfer(struct uring *ring, int fd, struct vq_io *items, uint32_t count);
void uring_destroy(struct uring *ring);

#endif
