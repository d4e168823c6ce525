/*
 * Moving the bytes of many chains: between their pieces and a file, a socket or a buffer.
 *
 * Works on segments as a take has written them, so on host addresses that were checked there and
 * stay mapped until the chain is completed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bulk.h"

/* Newer than glibc 2.17, which the release build is for; so are their names. */
#if defined(SYS_preadv2) && defined(SYS_pwritev2)
#define CALL_PREADV2 SYS_preadv2
#define CALL_PWRITEV2 SYS_pwritev2
#elif defined(__x86_64__)
#define CALL_PREADV2 327
#define CALL_PWRITEV2 328
#else /* what architectures since aarch64 share */
#define CALL_PREADV2 286
#define CALL_PWRITEV2 287
#endif

struct cursor {
    const struct vq_segment *segment, *end;
    uint64_t offset; /* into *segment */
    uint64_t left;
    uint32_t flags; /* of the segments that count */
};

static struct cursor cursor_start(const struct vq_io *io)
{
    const struct vq_segment *segments = pointer(io->segments);
    const bool into_guest = io->operation == VQ_IO_READ || io->operation == VQ_IO_COPY_IN;
    struct cursor cursor = {
        .segment = segments,
        .end = segments + io->segment_count,
        .left = io->length,
        .flags = into_guest ? VQ_SEGMENT_WRITABLE : 0,
    };
    uint64_t skip = io->skip;
    for (; cursor.segment < cursor.end; cursor.segment++) {
        if ((cursor.segment->flags & VQ_SEGMENT_WRITABLE) != cursor.flags)
            continue;
        if (skip < cursor.segment->length)
            break;
        skip -= cursor.segment->length;
    }
    cursor.offset = skip;
    return cursor;
}

/* The next piece, at most `left` bytes; false at the end. */
static bool cursor_next(struct cursor *cursor, struct iovec *vector)
{
    while (cursor->segment < cursor->end &&
           (cursor->segment->flags & VQ_SEGMENT_WRITABLE) != cursor->flags)
        cursor->segment++;
    if (cursor->segment >= cursor->end || !cursor->left)
        return false;
    uint64_t length = cursor->segment->length - cursor->offset;
    if (length > cursor->left)
        length = cursor->left;
    vector->iov_base = pointer(cursor->segment->host + cursor->offset);
    vector->iov_len = length;
    cursor->left -= length;
    cursor->offset = 0;
    cursor->segment++;
    return true;
}

static int64_t copy(const struct vq_io *io)
{
    struct cursor cursor = cursor_start(io);
    unsigned char *buffer = pointer(io->offset);
    struct iovec piece;
    int64_t done = 0;
    while (cursor_next(&cursor, &piece)) {
        if (io->operation == VQ_IO_COPY_IN)
            memcpy(piece.iov_base, buffer + done, piece.iov_len);
        else
            memcpy(buffer + done, piece.iov_base, piece.iov_len);
        done += (int64_t)piece.iov_len;
    }
    return done;
}

int bulk_pieces(const struct vq_io *io, uint64_t moved, struct iovec *vectors, int room)
{
    struct vq_io rest = *io;
    rest.skip += moved;
    rest.length -= moved;
    struct cursor cursor = cursor_start(&rest);
    int count = 0;
    while (count < room && cursor_next(&cursor, &vectors[count]))
        count++;
    return count;
}

static int64_t with_flags(long call, int fd, const struct iovec *vectors, int count, off_t offset,
                          int flags)
{
    /* The upper half counts where a long has 32 bits; elsewhere the kernel shifts it out. */
    return syscall(call, fd, vectors, count, (unsigned long)offset,
                   (unsigned long)((uint64_t)offset >> 32), flags);
}

/* One piece is cheaper to move without a vector: 60 ns of 840 for 4 KiB in the page cache. */
static int64_t read_at(int fd, const struct iovec *vectors, int count, off_t offset)
{
    if (count == 1)
        return pread(fd, vectors->iov_base, vectors->iov_len, offset);
    return preadv(fd, vectors, count, offset);
}

static int64_t write_at(int fd, const struct iovec *vectors, int count, off_t offset)
{
    if (count == 1)
        return pwrite(fd, vectors->iov_base, vectors->iov_len, offset);
    return pwritev(fd, vectors, count, offset);
}

static int64_t sync_file(int fd)
{
    int done;
    do
        done = fdatasync(fd);
    while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : 0;
}

/* A write that is on the medium when it returns. */
static int64_t write_durably(int fd, const struct iovec *vectors, int count, off_t offset)
{
    int64_t done = with_flags(CALL_PWRITEV2, fd, vectors, count, offset, BULK_DSYNC);
    if (done >= 0 ||
        (errno != ENOSYS && errno != EOPNOTSUPP && errno != EPERM && errno != EACCES))
        return done;
    done = offset == -1 ? writev(fd, vectors, count) : write_at(fd, vectors, count, offset);
    const int64_t failed = done > 0 ? sync_file(fd) : 0;
    if (failed)
        errno = (int)-failed;
    return failed ? -1 : done;
}

int64_t bulk_step(int fd, const struct vq_io *io, uint64_t moved, bool nowait)
{
    struct iovec vectors[BULK_VECTORS];
    const int count = bulk_pieces(io, moved, vectors, BULK_VECTORS);
    if (!count)
        return 0;
    const bool stream = io->offset == VQ_IO_STREAM;
    const off_t offset = stream ? -1 : (off_t)(io->offset + moved);
    int64_t done;
    do {
        if (io->operation == VQ_IO_READ && nowait)
            done = with_flags(CALL_PREADV2, fd, vectors, count, offset, BULK_NOWAIT);
        else if (io->operation == VQ_IO_READ)
            done = stream ? readv(fd, vectors, count) : read_at(fd, vectors, count, offset);
        else if (io->flags & VQ_IO_DSYNC)
            done = write_durably(fd, vectors, count, offset);
        else
            done = stream ? writev(fd, vectors, count) : write_at(fd, vectors, count, offset);
    } while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : done;
}

bool bulk_try(int fd, struct vq_io *io, uint64_t *moved, bool *tries)
{
    int64_t step = 0;
    *moved = 0;
    while (*tries && *moved < io->length && (step = bulk_step(fd, io, *moved, true)) > 0)
        *moved += (uint64_t)step;
    /* Another error may be the file's, or mean that it cannot do this: a plain call finds out. */
    if (step < 0 && step != -EAGAIN)
        *tries = false;
    if (step < 0 || !*tries)
        return false;
    io->result = (int64_t)*moved;
    return true;
}

void bulk_finish(int fd, struct vq_io *io, uint64_t moved)
{
    int64_t step = 0;
    while (moved < io->length && (step = bulk_step(fd, io, moved, false)) > 0) {
        moved += (uint64_t)step;
        if (io->offset == VQ_IO_STREAM)
            break; /* a stream's boundaries are its own */
    }
    /* What was moved before an error counts; the error comes back at the next try. */
    io->result = step < 0 && !moved ? step : (int64_t)moved;
}

void bulk_do(int fd, struct vq_io *io)
{
    if (io->flags & ~VQ_IO_DSYNC) {
        io->result = -EINVAL;
        return;
    }
    switch (io->operation) {
    case VQ_IO_COPY_IN:
    case VQ_IO_COPY_OUT:
        io->result = copy(io);
        break;
    case VQ_IO_READ:
    case VQ_IO_WRITE:
        bulk_finish(fd, io, 0);
        break;
    case VQ_IO_SYNC:
        io->result = sync_file(fd);
        break;
    default:
        io->result = -EINVAL;
    }
}

/*
 * A batch of reads goes in two rounds: the first takes what is in the page cache and has the rest
 * read ahead, all of it at the same time, and the second waits for that.  An item that is left for
 * the second has LEFT plus the bytes that were moved as its result meanwhile.
 */
#define LEFT INT64_MIN

static void second_round(int fd, struct vq_io *items, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (items[i].result < LEFT / 2)
            bulk_finish(fd, &items[i], (uint64_t)(items[i].result - LEFT));
}

static bool reads_at(const struct vq_io *io)
{
    return io->operation == VQ_IO_READ && io->offset != VQ_IO_STREAM && !(io->flags & ~VQ_IO_DSYNC);
}

bool bulk_transfer(int fd, struct vq_io *items, uint32_t count, bool tries)
{
    bool waited = false;
    uint32_t first = 0; /* nothing before it is left for a second round */
    for (uint32_t i = 0; i < count; i++) {
        struct vq_io *io = &items[i];
        uint64_t moved;
        if (tries && reads_at(io)) {
            if (!bulk_try(fd, io, &moved, &tries)) {
                io->result = LEFT + (int64_t)moved;
                waited = waited || tries; /* else the file cannot tell */
            }
            continue;
        }
        if (io->operation != VQ_IO_COPY_IN && io->operation != VQ_IO_COPY_OUT) {
            second_round(fd, items + first, i - first);
            first = i + 1;
        }
        bulk_do(fd, io);
    }
    second_round(fd, items + first, count - first);
    return waited;
}

int vq_transfer(int fd, struct vq_io *items, uint32_t count)
{
    bulk_transfer(fd, items, count, BULK_CHOOSES && count > 1);
    int finished = 0;
    for (uint32_t i = 0; i < count; i++)
        finished += bulk_complete(&items[i]);
    return finished;
}
