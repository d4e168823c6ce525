/*
 * Requests that read and write a file, a batch at a time: a handler in C (vq_handler).
 *
 * The handler's owner says in a table what each request type means.  A request that is not plain is
 * left to the owner, which does the same work in another language, checks the details and says what
 * is wrong.
 */
#include "bulk.h"
#include "pace.h"

/*
 * Finding out which reads would wait costs 60 ns each.  When that many items in a row did not, most
 * batches do without; one of a few looks again.
 */
#define WARM 256u
#define LOOK_EVERY 8u

static inline uint32_t little32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
           (uint32_t)bytes[3] << 24;
}

static inline uint64_t little64(const uint8_t *bytes)
{
    return little32(bytes) | (uint64_t)little32(bytes + 4) << 32;
}

/* Fill in the item for a request; false when the request is not plain. */
static bool plan(const struct vq_file *file, const struct vq_queue *queue,
                 const struct vq_record *record, uint8_t action, struct vq_io *item)
{
    const struct vq_segment *segments = pointer(queue->segments);
    const uint32_t status = queue->features & VQ_STATUS_BYTE ? 1 : 0;
    *item = (struct vq_io){
        .segments = (uintptr_t)(segments + record->first_segment),
        .segment_count = record->segment_count,
        .operation = action,
    };
    uint32_t length;
    switch (action) {
    case VQ_IO_READ:
        /* The status byte is the last; what is before it is the data. */
        if (record->writable_length < status || record->readable_length)
            return false;
        length = record->writable_length - status;
        break;
    case VQ_IO_WRITE:
        /* The completion that is filled in beforehand claims all writable bytes. */
        if (record->writable_length != status)
            return false;
        length = record->readable_length;
        item->skip = VQ_HEADER_SIZE;
        item->flags = file->flags & VQ_FILE_DURABLE ? VQ_IO_DSYNC : 0;
        break;
    case VQ_IO_SYNC:
        return record->writable_length == status;
    default:
        return false;
    }
    const uint64_t position = little64(record->header + 8);
    const uint64_t unit = UINT64_C(1) << file->shift;
    if (!length || length % unit || length > file->length ||
        position > (file->length - length) >> file->shift)
        return false;
    item->length = length;
    item->offset = position << file->shift;
    return true;
}

static void move(struct vq_file *file, struct vq_io *items, uint32_t count)
{
    if (file->uring) {
        vq_uring_transfer(pointer(file->uring), file->fd, items, count);
        return;
    }
    const bool tries = BULK_CHOOSES && count > 1 &&
                       (file->warm < WARM || ++file->warm % LOOK_EVERY == 0);
    if (bulk_transfer(file->fd, items, count, tries))
        file->warm = 0;
    else if (tries && file->warm < WARM)
        file->warm += count;

    if (file->warm < WARM) {
        /* What waits is better off in batches as large as they come, where all of it waits together. */
        pace_forget(&file->pace);
        file->batch = 0;
        return;
    }
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += items[i].length;
    file->batch = pace_next(&file->pace, count, bytes);
}

int vq_file_handle(void *context, const struct vq_queue *queue)
{
    struct vq_file *file = context;
    const struct vq_record *records = pointer(queue->records);
    struct vq_done *done = pointer(queue->done);
    struct vq_io *items = pointer(file->items);
    int left = 0;
    if (file->size != sizeof(*file) || queue->count > file->capacity) {
        for (uint32_t i = 0; i < queue->count; i++)
            done[i].flags |= VQ_DONE_LEFT;
        return (int)queue->count;
    }

    /* Items are in the order of the requests; `tag` names an item's request. */
    uint32_t count = 0;
    for (uint32_t i = 0; i < queue->count; i++) {
        const uint32_t type = little32(records[i].header);
        const bool known = type < VQ_FILE_TYPES && !(records[i].flags & VQ_SHORT_HEADER);
        const uint8_t action = known ? file->actions[type] : VQ_FILE_LEAVE;
        if (action == VQ_FILE_SUCCEED)
            continue;
        if (plan(file, queue, &records[i], action, &items[count])) {
            items[count++].tag = i;
        } else {
            done[i].flags |= VQ_DONE_LEFT;
            left++;
        }
    }
    if (!count)
        return left;
    move(file, items, count);
    for (uint32_t i = 0; i < count; i++) {
        if (likely(items[i].result == (int64_t)items[i].length)) {
            file->moved += items[i].length;
        } else {
            struct vq_done *entry = &done[items[i].tag];
            entry->flags |= VQ_DONE_LEFT;
            /* The kernel tells of a failed write-back once: its owner must not ask again. */
            if (items[i].result < 0)
                entry->status = (uint8_t)(-items[i].result < 255 ? -items[i].result : 255);
            left++;
        }
    }
    return left;
}
