/* A queue from its creation to its end: checked, attached to memory and ring, recovered, closed. */
#include <stdlib.h>

#include "chain.h"

#define ALL_FEATURES                                                                               \
    (VQ_PACKED | VQ_EVENT_IDX | VQ_INDIRECT | VQ_IN_ORDER | VQ_BIG_ENDIAN | VQ_IOMMU |             \
     VQ_STATUS_BYTE | VQ_LOG_USED)

/* Pieces that chains in flight may have, beyond 16 for each descriptor of the ring. */
#ifndef VQ_ROOM
#define VQ_ROOM 65536u
#endif

static void destroy(struct engine *engine)
{
    memory_release(&engine->memory);
    free(engine->chains);
    free(engine->taken_at);
    free(engine->batch);
    free(engine->raw);
    free(engine->extras);
    free(engine->order);
    free(engine->entries);
    free(engine->resubmit);
    free(engine->saved);
    free(engine->saved_at);
    free(engine);
}

static void forget_hints(struct engine *engine)
{
    for (uint32_t i = 0; i <= HINTS; i++)
        engine->hints[i] = memory_nowhere(&engine->memory);
}

int vq_create(struct vq_queue *queue)
{
    if (queue->magic != VQ_MAGIC || queue->abi != VQ_ABI || queue->size != sizeof(*queue))
        return VQ_ABI_ERROR;
    const uint32_t size = queue->queue_size;
    const bool packed = queue->features & VQ_PACKED;
    const bool big_endian = queue->features & VQ_BIG_ENDIAN;
    if (!size || size > VQ_MAX_QUEUE_SIZE || (!packed && (size & (size - 1))) ||
        (packed && big_endian) || (queue->features & ~ALL_FEATURES))
        return VQ_USAGE;
    /* Records that may vanish, and nothing catches the fault: not for an engine that touches them. */
    if (queue->flags)
        return VQ_USAGE;
    if (!queue->records || !queue->segments || !queue->done || !queue->record_capacity ||
        !queue->segment_capacity || (queue->staged_capacity && !queue->staged) ||
        (queue->provision_capacity && !queue->provisions))
        return VQ_USAGE;

    struct engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return VQ_NO_MEMORY;
    /* A chain that would exceed the limit waits until nothing is in flight, and then fits. */
    engine->room_limit = 16 * size + VQ_ROOM;
    const size_t extras = engine->room_limit + 2 * (size_t)queue->segment_capacity;
    engine->chains = calloc(size, sizeof(*engine->chains));
    engine->taken_at = calloc(size, sizeof(*engine->taken_at));
    engine->batch = calloc(size, sizeof(*engine->batch));
    engine->chain_limit = size > VQ_CHAIN_LIMIT ? size : VQ_CHAIN_LIMIT;
    engine->raw = calloc(engine->chain_limit, sizeof(*engine->raw));
    engine->order = calloc(size, sizeof(*engine->order));
    engine->entries = calloc(size, sizeof(*engine->entries));
    engine->extras = calloc(extras, sizeof(*engine->extras)); /* untouched pages cost nothing */
    engine->extra_free = NONE;
    static const struct gm_table no_memory;
    if (!engine->chains || !engine->taken_at || !engine->batch || !engine->raw || !engine->order || !engine->entries ||
        !engine->extras || memory_adopt(&engine->memory, &no_memory)) {
        destroy(engine);
        return VQ_NO_MEMORY;
    }
    engine->queue = queue;
    forget_hints(engine);
    engine->swap = big_endian != (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
    engine->memory.iommu = queue->features & VQ_IOMMU;
    engine->memory.provisions = pointer(queue->provisions);
    engine->memory.provision_capacity = queue->provision_capacity;
    engine->avail_index = queue->next_avail;
    queue->private = (uintptr_t)engine;
    return 0;
}

/* The regions that a part of the ring lies in; all, when its pages were mapped elsewhere once more. */
static uint64_t part_regions(const struct memory *memory, uint64_t host, uint64_t length)
{
    const uint64_t mask = memory_mask(memory, host, length);
    return mask ? mask : UINT64_MAX;
}

/* The regions that the ring lies in, to look for their poison. */
static uint64_t ring_regions(const struct vq_queue *queue, const struct memory *memory)
{
    const uint64_t size = queue->queue_size;
    const bool packed = queue->features & VQ_PACKED;
    return part_regions(memory, queue->descriptors, 16 * size) |
           part_regions(memory, queue->driver, packed ? 4 : 6 + 2 * size) |
           part_regions(memory, queue->device, packed ? 4 : 6 + 8 * size);
}

int vq_attach(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    const struct gm_table *table = pointer(queue->table);
    const struct gm_log *log = pointer(queue->log);
    if (!table || table->magic != GM_TABLE_MAGIC || table->abi != GM_ABI ||
        table->size != sizeof(*table))
        return VQ_ABI_ERROR;
    if (log && (log->magic != GM_LOG_MAGIC || log->abi != GM_ABI || log->size != sizeof(*log) ||
                log->page_shift != 12))
        return VQ_ABI_ERROR;
    const bool packed = queue->features & VQ_PACKED;
    if (packed && (queue->next_avail >= queue->queue_size ||
                   queue->next_used >= queue->queue_size))
        return VQ_USAGE;
    int failed = memory_adopt(&engine->memory, table);
    forget_hints(engine);
    if (failed)
        return failed;
    /* The driver's index is loaded again; before the first take the queue may set the position. */
    if (!queue->taken && !queue->in_flight)
        engine->avail_index = queue->next_avail;
    engine->log = log;
    /* Nothing of this snapshot is poisoned, and no other is in use: events until now are settled. */
    const uint32_t events = __atomic_load_n(&guard_events, __ATOMIC_ACQUIRE);
    if (!queue->in_flight && !memory_poisoned(table) && !records_poisoned(engine))
        engine->guard_events = events;
    engine->ring_regions = ring_regions(queue, &engine->memory);
    if (queue->descriptors % 16 || queue->driver % (packed ? 4 : 2) || queue->device % 4)
        return broken(engine, VQ_REASON_RING_MEMORY, queue->descriptors);
    return 0;
}

int vq_recover(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    if (engine->inflight || engine->resubmit || queue->in_flight)
        return VQ_USAGE;
    if (!queue->inflight || queue->inflight % 8 || !queue->descriptors)
        return VQ_USAGE;
    const int result = format_of(queue)->recover(engine);
    /* Zeroes in place of the records look like a region that was never used. */
    return records_poisoned(engine) ? broken(engine, VQ_REASON_TRUNCATED, 0) : result;
}

void vq_close(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    if (!engine)
        return;
    uint32_t count = 0;
    for (uint32_t head = 0; head < queue->queue_size; head++)
        if (engine->chains[head].state != CHAIN_FREE)
            engine->batch[count++].head = (uint16_t)head;
    chains_release(engine, engine->batch, count);
    queue->private = 0;
    destroy(engine);
}
