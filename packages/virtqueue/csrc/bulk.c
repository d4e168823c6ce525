/*
 * Moving the bytes of many chains: between their pieces and a file, a socket or a buffer.
 *
 * Works on segments as a take has written them, so on host addresses that were checked there and
 * stay mapped until the chain is completed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine.h"

#define VECTORS 256

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

/* One system call's worth; what it moved, 0 at the end of the file, or -errno. */
static int64_t move(int fd, const struct vq_io *io, uint64_t moved)
{
    struct vq_io rest = *io;
    rest.skip += moved;
    rest.length -= moved;
    struct cursor cursor = cursor_start(&rest);
    struct iovec vectors[VECTORS];
    int count = 0;
    while (count < VECTORS && cursor_next(&cursor, &vectors[count]))
        count++;
    if (!count)
        return 0;
    const off_t offset = (off_t)(io->offset + moved);
    const bool stream = io->offset == VQ_IO_STREAM;
    ssize_t done;
    do {
        if (io->operation == VQ_IO_READ)
            done = stream ? readv(fd, vectors, count) : preadv(fd, vectors, count, offset);
        else
            done = stream ? writev(fd, vectors, count)
                          : pwritev2(fd, vectors, count, offset, io->flags & VQ_IO_DSYNC ? 2 : 0);
    } while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : done;
}

int vq_transfer(int fd, struct vq_io *items, uint32_t count)
{
    int finished = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct vq_io *io = &items[i];
        switch (io->operation) {
        case VQ_IO_COPY_IN:
        case VQ_IO_COPY_OUT:
            io->result = copy(io);
            break;
        case VQ_IO_SYNC:
            io->result = fdatasync(fd) < 0 ? -errno : 0;
            break;
        case VQ_IO_READ:
        case VQ_IO_WRITE: {
            int64_t step = 0;
            uint64_t moved = 0;
            while (moved < io->length && (step = move(fd, io, moved)) > 0) {
                moved += (uint64_t)step;
                if (io->offset == VQ_IO_STREAM)
                    break; /* a stream's boundaries are its own */
            }
            /* What was moved before an error counts; the error comes back at the next try. */
            io->result = step < 0 && !moved ? step : (int64_t)moved;
            break;
        }
        default:
            io->result = -EINVAL;
        }
        finished += io->result == (int64_t)io->length;
    }
    return finished;
}
