/* The driver's side of one virtqueue, split or packed (virtio 1.x, "Virtqueues").
 *
 * A request has a slot number below `slots` and up to `RING_SEGMENTS` buffers; the device completes
 * it by that number. In a split ring a slot owns fixed descriptors, so there is no free list. In a
 * packed ring the slot number is the buffer id.
 */
#ifndef LOAD_RING_H
#define LOAD_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RING_SEGMENTS 66 /* header, status and 64 of data */

struct segment {
    uint64_t guest;
    uint32_t length;
    bool writable; /* by the device */
};

struct ring {
    bool packed, event_idx, indirect;
    uint16_t size;      /* entries */
    uint16_t per_slot;  /* descriptors of a slot in the ring */
    int kick, call;     /* eventfds */
    uint8_t *descriptor, *driver, *device;
    uint16_t next_avail, next_used; /* packed: positions in the ring; split: running indices */
    uint16_t published;             /* split: the available index that was published last */
    bool avail_wrap, used_wrap;     /* packed only */
    uint16_t first_head;            /* packed: head of the batch, whose flags are written last */
    uint16_t first_flags;
    uint16_t staged; /* packed: descriptors since the last publication */
    uint16_t *counts; /* packed: descriptors of each slot's chain */
    uint64_t kicks, sleeps;
};

/* Return the bytes of a ring's three parts, and where the second and the third begin. */
size_t ring_layout(unsigned size, bool packed, size_t *driver, size_t *device);

void ring_init(struct ring *ring, uint8_t *memory, unsigned size, unsigned per_slot, unsigned slots,
               bool packed, bool event_idx, bool indirect);

/* Return the value of SET_VRING_BASE for a ring in this state. */
uint32_t ring_base(const struct ring *ring);

/* Stage a request. `table` (guest address `table_guest`) holds its indirect descriptors. */
void ring_add(struct ring *ring, unsigned slot, const struct segment *segments, unsigned count,
              void *table, uint64_t table_guest);

/* Make the staged requests available, and kick the device if it asks for it. */
void ring_publish(struct ring *ring);

/* Return the next completed slot with the bytes written, or -1. */
int ring_collect(struct ring *ring, uint32_t *written);

/* Ask for a call at the next completion; return true when there is one already. */
bool ring_arm(struct ring *ring);

/* Ask for no calls: while completions are handled, or for good when polling. */
void ring_quiet(struct ring *ring);

/* Spin once. */
static inline void ring_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleep until the device calls. */
void ring_sleep(struct ring *ring);

#endif
