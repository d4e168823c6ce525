/*
 * Moving the bytes of many chains with io_uring: what would wait for the file waits together.
 *
 * Only what may wait is worth a ring.  A read out of the page cache, and a write into it, are one
 * copy; made by a plain call on this thread they cost less than a ring's submission, and the kernel
 * hands buffered writes to worker threads, one at a time for each file (docs/virtqueue.md has the
 * figures).  So a buffered read is tried at once with RWF_NOWAIT, which also starts the reading
 * ahead, a buffered write is made at once, and the ring gets the reads that were refused so, what
 * goes past the page cache (O_DIRECT), and the writes that are to be durable.  What is alone gains
 * nothing from it and is a plain call again.
 *
 * The kernel writes to guest memory while a request is in flight, so no call ends before all of its
 * requests have.  The ring is used by one thread at a time; which one may change between calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "bulk.h"
#include "kernel_ring.h"
#include "uring.h"

#define GROUP 8u /* the medium works on so many while we look at the next */

#define TMPFS_TYPE 0x01021994u /* TMPFS_MAGIC */

#define ADVICE_WIPE_ON_FORK 18 /* MADV_WIPEONFORK, 4.14 */

/* A request on its way.  Most touch few of the vectors, and untouched pages cost nothing. */
struct slot {
    struct vq_io *io; /* NULL: free */
    uint64_t moved;
    struct iovec vectors[BULK_VECTORS];
};

struct uring {
    struct kernel_ring kernel; /* fd -1: there is none, all is done by plain calls */
    uint32_t entries;          /* slots: so many are in flight at most */
    bool shared;               /* more than one thread has used it */
    uint32_t tail; /* of the submissions; the kernel learns of it in turn() */

    uint32_t used; /* slots: queued or inside the kernel */
    uint32_t free_count;
    struct slot *slots;
    uint32_t *free_slots;

    uint32_t *here; /* 1; a child after fork sees 0 */
    int file;       /* of the call at hand */
};

static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* ---- set-up ---- */

static int open_ring(struct uring *ring)
{
    ring->tail = 0;
    return kernel_ring_open(&ring->kernel, ring->entries, ring->shared);
}

static void free_all_slots(struct uring *ring)
{
    ring->used = 0;
    ring->free_count = ring->entries;
    for (uint32_t i = 0; i < ring->entries; i++) {
        ring->slots[i].io = NULL;
        ring->free_slots[i] = i;
    }
}

void uring_destroy(struct uring *ring)
{
    if (!ring)
        return;
    kernel_ring_close(&ring->kernel);
    if (ring->here)
        munmap(ring->here, sizeof(*ring->here));
    free(ring->slots);
    free(ring->free_slots);
    free(ring);
}

int uring_create(uint32_t entries, struct uring **out)
{
    if (!entries || entries > URING_ENTRIES_MAX)
        return -EINVAL;
    struct uring *ring = calloc(1, sizeof(*ring));
    if (!ring)
        return -ENOMEM;
    ring->entries = entries;
    int result = open_ring(ring);
    if (!result) {
        ring->slots = calloc(ring->entries, sizeof(*ring->slots));
        ring->free_slots = calloc(ring->entries, sizeof(*ring->free_slots));
        void *here = mmap(NULL, sizeof(*ring->here), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        ring->here = here == MAP_FAILED ? NULL : here;
        if (!ring->slots || !ring->free_slots || !ring->here)
            result = -ENOMEM;
        else if (madvise(here, sizeof(*ring->here), ADVICE_WIPE_ON_FORK))
            result = -errno;
    }
    if (result) {
        uring_destroy(ring);
        return result;
    }
    store(ring->here, 1);
    free_all_slots(ring);
    *out = ring;
    return 0;
}

/* ---- requests ---- */

/* Queue what is left of a slot's item; false when nothing is. */
static bool prepare(struct uring *ring, uint32_t index)
{
    struct slot *slot = &ring->slots[index];
    const struct vq_io *io = slot->io;
    const int count = bulk_pieces(io, slot->moved, slot->vectors, BULK_VECTORS);
    if (!count)
        return false;
    const bool reads = io->operation == VQ_IO_READ, one = count == 1;
    struct submission *submission = &ring->kernel.submissions[ring->tail++ & ring->kernel.sq_mask];
    *submission = (struct submission){
        .fd = ring->file,
        .offset = io->offset + slot->moved,
        .rw_flags = !reads && (io->flags & VQ_IO_DSYNC) ? BULK_DSYNC : 0,
        .user_data = index,
    };
    if (one) {
        submission->operation = reads ? OPERATION_READ : OPERATION_WRITE;
        submission->address = (uintptr_t)slot->vectors[0].iov_base;
        submission->length = (uint32_t)slot->vectors[0].iov_len;
    } else {
        submission->operation = reads ? OPERATION_READV : OPERATION_WRITEV;
        submission->address = (uintptr_t)slot->vectors;
        submission->length = (uint32_t)count;
    }
    return true;
}

static void release(struct uring *ring, uint32_t index)
{
    ring->slots[index].io = NULL;
    ring->free_slots[ring->free_count++] = index;
    ring->used--;
}

static void ended(struct uring *ring, uint32_t index, int32_t result)
{
    struct slot *slot = &ring->slots[index];
    switch (result) {
    case -EAGAIN:
    case -EINTR:
    case -ECANCELED:
        /* Says nothing of the file; a plain call does, or waits. */
        bulk_finish(ring->file, slot->io, slot->moved);
        break;
    default:
        if (result > 0) {
            slot->moved += (uint32_t)result;
            if (slot->moved < slot->io->length && prepare(ring, index))
                return;
        }
        slot->io->result = result < 0 && !slot->moved ? result : (int64_t)slot->moved;
    }
    release(ring, index);
}

static void reap(struct uring *ring)
{
    uint32_t head = *ring->kernel.cq_head;
    for (; head != load(ring->kernel.cq_tail); head++) {
        const struct completion *completion = &ring->kernel.completions[head & ring->kernel.cq_mask];
        ended(ring, (uint32_t)completion->user_data, completion->result);
    }
    store(ring->kernel.cq_head, head);
}

/* Do all that is queued by plain calls; the kernel has none of it. */
static void finish_all(struct uring *ring)
{
    for (uint32_t i = 0; i < ring->entries; i++)
        if (ring->slots[i].io) {
            bulk_finish(ring->file, ring->slots[i].io, ring->slots[i].moved);
            release(ring, i);
        }
}

/* Another thread than the ring's came: queue the same in a ring that any thread may use. */
static void share(struct uring *ring)
{
    ring->shared = true;
    kernel_ring_close(&ring->kernel);
    if (open_ring(ring))
        finish_all(ring);
    for (uint32_t i = 0; i < ring->entries; i++)
        if (ring->slots[i].io)
            prepare(ring, i); /* something was left when it was queued first */
}

static void nap(void)
{
    const struct timespec time = {.tv_nsec = 1000000};
    nanosleep(&time, NULL);
}

/* Submit what is queued, wait until about `wait` requests have ended, and take their results. */
static void turn(struct uring *ring, uint32_t wait)
{
    store(ring->kernel.sq_tail, ring->tail);
    const uint32_t queued = ring->tail - load(ring->kernel.sq_head);
    const uint32_t inside = ring->used - queued;
    long done = kernel_ring_enter(&ring->kernel, queued, wait);
    if (done < 0 && errno != EINTR) {
        if (inside && (errno == EAGAIN || errno == EBUSY))
            /* No memory for more, or completions to be taken first: not before some have ended. */
            done = kernel_ring_enter(&ring->kernel, 0, 1);
        if (done < 0 && errno != EINTR) {
            if (inside) {
                /* It has guest memory, so there is nothing to do but to wait. */
                nap();
            } else if (errno == EEXIST && !ring->shared) {
                share(ring);
                return;
            } else {
                if (errno == EAGAIN || errno == EBUSY) {
                    ring->tail = load(ring->kernel.sq_head); /* of use again, another time */
                    store(ring->kernel.sq_tail, ring->tail);
                } else {
                    kernel_ring_close(&ring->kernel);
                }
                finish_all(ring);
                return;
            }
        }
    }
    reap(ring);
}

/* Wait until nothing is in flight. */
static void settle(struct uring *ring)
{
    while (ring->used)
        turn(ring, ring->used);
}

static void queue(struct uring *ring, struct vq_io *io, uint64_t moved)
{
    while (ring->kernel.fd >= 0 && !ring->free_count)
        turn(ring, ring->used / 4 + 1);
    if (ring->kernel.fd < 0) {
        bulk_finish(ring->file, io, moved);
        return;
    }
    const uint32_t index = ring->free_slots[--ring->free_count];
    ring->slots[index].io = io;
    ring->slots[index].moved = moved;
    ring->used++;
    if (!prepare(ring, index)) {
        io->result = (int64_t)moved;
        release(ring, index);
    }
    if (ring->tail - load(ring->kernel.sq_head) >= GROUP)
        turn(ring, 0);
}

/* ---- a call ---- */

/* What the file is to the call at hand. */
struct manner {
    int fd;
    bool known;   /* flags were asked for */
    bool checked; /* and `plain` */
    bool direct;  /* past the page cache */
    bool tries;   /* reading without waiting may work */
    bool plain;   /* not for the ring */
};

static void know(struct manner *manner)
{
    const int flags = fcntl(manner->fd, F_GETFL);
    manner->known = true;
    manner->direct = flags >= 0 && flags & O_DIRECT;
    manner->tries = flags >= 0 && !manner->direct; /* that waits for the medium all the same */
    manner->plain = manner->checked = flags < 0;
}

/* A stream, which the ring would take at its position; or memory, which never waits. */
static void check(struct manner *manner)
{
    struct statfs system;
    manner->checked = true;
    manner->plain = lseek(manner->fd, 0, SEEK_CUR) < 0;
    if (BULK_CHOOSES && !manner->plain && !fstatfs(manner->fd, &system))
        manner->plain = (uint32_t)system.f_type == TMPFS_TYPE;
}

/* Do what is best done by plain calls; false when the rest after `moved` bytes is for the ring. */
static bool at_once(struct vq_io *io, struct manner *manner, uint64_t *moved)
{
    const bool reads = io->operation == VQ_IO_READ, writes = io->operation == VQ_IO_WRITE;
    *moved = 0;
    if ((!reads && !writes) || io->flags & ~VQ_IO_DSYNC || io->offset > INT64_MAX) {
        bulk_do(manner->fd, io);
        return true;
    }
    if (!manner->known)
        know(manner);
    if (BULK_CHOOSES && reads && bulk_try(manner->fd, io, moved, &manner->tries))
        return true;
    const bool cached = BULK_CHOOSES && writes && !manner->direct && !(io->flags & VQ_IO_DSYNC);
    if (!cached && !manner->checked)
        check(manner);
    if (!cached && !manner->plain)
        return false;
    bulk_finish(manner->fd, io, *moved);
    return true;
}

int uring_transfer(struct uring *ring, int fd, struct vq_io *items, uint32_t count)
{
    if (!load(ring->here)) {
        /* The ring is the parent's; closing our copies of it does not touch it. */
        kernel_ring_close(&ring->kernel);
        ring->shared = false;
        open_ring(ring); /* or do without */
        free_all_slots(ring);
        store(ring->here, 1);
    }
    if (ring->kernel.fd < 0 || (BULK_CHOOSES && count == 1))
        return vq_transfer(fd, items, count);
    if (!ring->kernel.enabled)
        kernel_ring_enable(&ring->kernel);

    struct manner manner = {.fd = fd};
    struct vq_io *alone = NULL; /* the only one for the ring so far */
    uint64_t moved, alone_moved = 0;
    ring->file = fd;
    for (uint32_t i = 0; i < count; i++) {
        struct vq_io *io = &items[i];
        if (io->operation == VQ_IO_SYNC) {
            if (alone)
                bulk_finish(fd, alone, alone_moved);
            alone = NULL;
            settle(ring);
        }
        if (at_once(io, &manner, &moved))
            continue;
        if (BULK_CHOOSES && !ring->used && !alone) {
            alone = io;
            alone_moved = moved;
            continue;
        }
        if (alone)
            queue(ring, alone, alone_moved);
        alone = NULL;
        queue(ring, io, moved);
    }
    if (alone)
        bulk_finish(fd, alone, alone_moved);
    settle(ring);
    int finished = 0;
    for (uint32_t i = 0; i < count; i++)
        finished += bulk_complete(&items[i]);
    return finished;
}

int vq_uring_open(uint32_t entries, struct uring **ring) { return uring_create(entries, ring); }

int vq_uring_transfer(struct uring *ring, int fd, struct vq_io *items, uint32_t count)
{
    return uring_transfer(ring, fd, items, count);
}

void vq_uring_close(struct uring *ring) { uring_destroy(ring); }
