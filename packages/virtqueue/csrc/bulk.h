/*
 * The steps of a transfer that its executors share: bulk.c, which makes the calls one by one, and
 * uring.c, which leaves what would wait to the kernel.
 */
#ifndef VQ_BULK_H
#define VQ_BULK_H

#include <sys/uio.h>

#include "engine.h"

#define BULK_VECTORS 256 /* pieces of one system call */

/* Flags of preadv2 and pwritev2: the kernel's numbers, which glibc 2.17 does not know. */
#define BULK_DSYNC 2  /* RWF_DSYNC */
#define BULK_NOWAIT 8 /* RWF_NOWAIT */

/*
 * Whether the way of each item is chosen.  A build that does not makes the calls one by one, or has
 * the ring do everything: benchmarks/transfers.py measures what the choice spares, and tests get to
 * the ring with any file.
 */
#ifdef VQ_NO_CHOICE
#define BULK_CHOOSES false
#else
#define BULK_CHOOSES true
#endif

/* Fill in the pieces that are left after `moved` bytes; how many, at most `room`. */
int bulk_pieces(const struct vq_io *io, uint64_t moved, struct iovec *vectors, int room);

/*
 * One system call's worth of a READ or WRITE: what it moved, 0 at the end of the file or of the
 * chain, or -errno.  With `nowait` -EAGAIN where it would wait, -EOPNOTSUPP where that is not known.
 */
int64_t bulk_step(int fd, const struct vq_io *io, uint64_t moved, bool nowait);

/*
 * Do as much of a positioned READ as takes no waiting, and have the rest read ahead; false when
 * there is a rest, after `moved` bytes.  `tries` becomes false where the file cannot do that.
 */
bool bulk_try(int fd, struct vq_io *io, uint64_t *moved, bool *tries);

/* Do what is left of a READ or WRITE after `moved` bytes, and set its result. */
void bulk_finish(int fd, struct vq_io *io, uint64_t moved);

/* Do a whole item of any kind, and set its result. */
void bulk_do(int fd, struct vq_io *io);

/*
 * Do all items; with `tries` reads in two rounds, of which the first finds out what would wait.
 * Whether one was found to.
 */
bool bulk_transfer(int fd, struct vq_io *items, uint32_t count, bool tries);

/* Whether an item did all that it was to do. */
static inline bool bulk_complete(const struct vq_io *io)
{
    return io->result == (io->operation == VQ_IO_SYNC ? 0 : (int64_t)io->length);
}

#endif
