/* Taking, completing and giving back: what the calls check, and what does not depend on the ring's
 * format.  lifetime.c makes the queue and ends it. */
#include <stdlib.h>

#include "chain.h"

/* Whether the ring can be used now; breaks the queue when it cannot. */
static bool ring_usable(struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    if (unlikely(!queue->descriptors)) {
        broken(engine, VQ_REASON_RING_MEMORY, 0);
        return false;
    }
    if (unlikely(poison_possible(engine) &&
                 ((memory_poisoned(engine->memory.table) & engine->ring_regions) ||
                  records_poisoned(engine)))) {
        broken(engine, VQ_REASON_TRUNCATED, 0);
        return false;
    }
    return true;
}

/* Whether one of the claimed chains lies in memory that was truncated, or left no record. */
static bool chains_poisoned(const struct engine *engine, const struct vq_done *done,
                            uint32_t count)
{
    if (likely(!poison_possible(engine)))
        return false;
    if (unlikely(records_poisoned(engine)))
        return true;
    const struct gm_table *table = NULL;
    uint64_t poisoned = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (done[i].flags & VQ_DONE_KEEP)
            continue;
        const struct chain *chain = &engine->chains[done[i].head];
        if (chain->table != table) {
            table = chain->table;
            poisoned = memory_poisoned(table);
        }
        if (unlikely(chain->regions & poisoned))
            return true;
    }
    return false;
}

/* ---- completing ---- */

/*
 * Check a list of completions and mark their chains as done: all of them, or none and VQ_USAGE.
 * Returns how many there are.
 */
static int claim(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    const uint32_t size = engine->queue->queue_size;
    int claimed = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (unlikely(done[i].flags & VQ_DONE_KEEP))
            continue;
        struct chain *chain = &engine->chains[done[i].head < size ? done[i].head : 0];
        if (unlikely(done[i].head >= size || chain->state != CHAIN_TAKEN ||
                     done[i].written > chain->writable_length ||
                     ((done[i].flags & VQ_DONE_STATUS) && !chain->status))) {
            engine->queue->detail = done[i].head;
            while (i--)
                if (!(done[i].flags & VQ_DONE_KEEP))
                    engine->chains[done[i].head].state = CHAIN_TAKEN;
            return VQ_USAGE;
        }
        chain->state = CHAIN_DONE;
        claimed++;
    }
    return claimed;
}

/* The status byte of a completion, and the log of what was written to the chain's buffers. */
static inline void settle(struct engine *engine, const struct vq_done *done)
{
    struct chain *chain = &engine->chains[done->head];
    if (done->flags & VQ_DONE_STATUS)
        store8(pointer(chain->status), done->status);
    chain->written = done->written;
    if (unlikely(engine->log != NULL))
        chain_log(engine, chain, done);
}

/* IN_ORDER: the oldest chains that are done go to the batch.  Returns how many. */
static uint32_t pop_order(struct engine *engine)
{
    const uint32_t size = engine->queue->queue_size;
    uint32_t count = 0;
    while (engine->order_count) {
        const uint16_t head = engine->order[engine->order_first];
        if (engine->chains[head].state != CHAIN_DONE)
            break;
        engine->batch[count++] =
            (struct vq_done){.head = head, .written = engine->chains[head].written};
        engine->order_first = engine->order_first + 1 == size ? 0 : engine->order_first + 1;
        engine->order_count--;
    }
    return count;
}

/* IN_ORDER: all chains that are done go to the batch, wherever they are.  Returns how many. */
static uint32_t drain_order(struct engine *engine)
{
    const uint32_t size = engine->queue->queue_size;
    uint32_t count = 0, kept = 0;
    for (uint32_t i = 0; i < engine->order_count; i++) {
        const uint16_t head = engine->order[(engine->order_first + i) % size];
        if (engine->chains[head].state == CHAIN_DONE)
            engine->batch[count++].head = head;
        else
            engine->order[(engine->order_first + kept++) % size] = head;
    }
    engine->order_count = kept;
    return count;
}

/* The entries that are not marked KEEP go to the batch.  Returns how many. */
static uint32_t leave_out_kept(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; i++)
        if (!(done[i].flags & VQ_DONE_KEEP))
            engine->batch[left++] = done[i];
    return left;
}

/* Release claimed chains without touching the ring or their buffers. */
static void drop(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    uint32_t dropped = engine->queue->features & VQ_IN_ORDER ? drain_order(engine)
                                                              : leave_out_kept(engine, done, count);
    chains_release(engine, engine->batch, dropped);
}

static bool fatal(uint32_t reason)
{
    /* After these nothing is written to the ring any more; after a wrong chain the right ones
     * that were taken before it still are. */
    return reason == VQ_REASON_RING_MEMORY || reason == VQ_REASON_TRUNCATED ||
           reason == VQ_REASON_USED_RING || reason == VQ_REASON_INFLIGHT;
}

static int complete(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    struct vq_queue *queue = engine->queue;
    queue->notify = 0;
    const int claimed = claim(engine, done, count);
    if (claimed <= 0)
        return claimed;
    if (unlikely(queue->stopped || fatal(queue->reason) || !ring_usable(engine))) {
        drop(engine, done, count);
        return claimed;
    }
    const bool in_order = queue->features & VQ_IN_ORDER;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        if (likely(!(done[i].flags & VQ_DONE_KEEP))) {
            settle(engine, &done[i]);
            bytes += done[i].written;
        }
    /* After the device's writes and the status bytes, before the driver is shown anything. */
    if (unlikely(chains_poisoned(engine, done, count))) {
        broken(engine, VQ_REASON_TRUNCATED, done[0].head);
        drop(engine, done, count);
        return claimed;
    }
    uint32_t using = (uint32_t)claimed;
    const struct vq_done *used = done;
    if (unlikely(in_order || using != count)) {
        using = in_order ? pop_order(engine) : leave_out_kept(engine, done, count);
        used = engine->batch;
    }
    if (using) {
        queue->notify = (uint32_t)format_of(queue)->use(engine, used, using);
        chains_release(engine, used, using);
        queue->completed += using;
    }
    if (queue->counters)
        ((struct vq_counters *)pointer(queue->counters))->bytes += bytes;
    return claimed;
}

/* ---- the calls ---- */

int vq_take(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    queue->count = queue->segment_count = queue->more = 0;
    if (unlikely(queue->reason))
        return VQ_BROKEN;
    if (unlikely(queue->stopped))
        return 0;
    if (unlikely(!ring_usable(engine)))
        return VQ_BROKEN;
    return queue->features & VQ_PACKED ? packed_format.take(engine) : split_format.take(engine);
}

int vq_publish(struct vq_queue *queue)
{
    if (queue->staged_count > queue->staged_capacity)
        return VQ_USAGE;
    int result = complete(engine_of(queue), pointer(queue->staged), queue->staged_count);
    if (result >= 0)
        queue->staged_count = 0;
    return result;
}

int queue_finish(struct vq_queue *queue)
{
    if (unlikely(queue->count > queue->record_capacity))
        return VQ_USAGE;
    return complete(engine_of(queue), pointer(queue->done), queue->count);
}

int vq_cycle(struct vq_queue *queue)
{
    int result = queue_finish(queue);
    return result < 0 ? result : vq_take(queue);
}

int vq_rewind(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    const struct vq_record *records = pointer(queue->records);
    const uint32_t count = queue->limit;
    if (count > queue->count || queue->count > queue->record_capacity)
        return VQ_USAGE;
    for (uint32_t i = queue->count - count; i < queue->count; i++)
        if (records[i].head >= queue->queue_size ||
            engine->chains[records[i].head].state != CHAIN_TAKEN)
            return VQ_USAGE;
    for (uint32_t i = 0; i < count; i++) {
        const struct vq_record *record = &records[--queue->count];
        format_of(queue)->retreat(engine, record->head);
        if (queue->features & VQ_IN_ORDER)
            engine->order_count--;
        engine->batch[0].head = record->head;
        chains_release(engine, engine->batch, 1);
        queue->taken--;
        if (queue->counters)
            ((struct vq_counters *)pointer(queue->counters))->requests--;
        queue->segment_count -= record->segment_count;
    }
    if (count)
        queue->more |= VQ_MORE_AVAILABLE;
    return (int)count;
}

struct named {
    uint64_t taken_at;
    uint16_t head;
};

static int by_take(const void *left, const void *right)
{
    const struct named *a = left, *b = right;
    return (a->taken_at > b->taken_at) - (a->taken_at < b->taken_at);
}

/* Sort the named chains by when they were taken; VQ_USAGE for one that is not in flight, or twice. */
static int sort_named(struct engine *engine, struct named *named, const uint16_t *heads,
                      uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        engine->queue->detail = heads[i];
        if (heads[i] >= engine->queue->queue_size ||
            engine->chains[heads[i]].state != CHAIN_TAKEN)
            return VQ_USAGE;
        named[i] = (struct named){engine->taken_at[heads[i]], heads[i]};
    }
    qsort(named, count, sizeof(*named), by_take);
    for (uint32_t i = 1; i < count; i++)
        if (named[i].head == named[i - 1].head) {
            engine->queue->detail = named[i].head;
            return VQ_USAGE;
        }
    return 0;
}

/* Undo the takes of the latest of the named chains; how many. */
static uint32_t untake(struct engine *engine, const struct named *named, uint32_t count)
{
    struct vq_queue *queue = engine->queue;
    uint32_t given = 0;
    /* A chain that was taken later and is not named, or has completed, leaves a gap. */
    for (; given < count && named[count - given - 1].taken_at == queue->taken - 1; given++) {
        const uint16_t head = named[count - given - 1].head;
        /* The latest first: wherever a death cuts this short, the record and the ring agree. */
        format_of(queue)->retreat(engine, head);
        if (queue->features & VQ_IN_ORDER)
            engine->order_count--;
        engine->batch[given].head = head;
        queue->taken--;
    }
    chains_release(engine, engine->batch, given);
    return given;
}

int vq_untake(struct vq_queue *queue, uint16_t *heads, uint32_t count)
{
    struct engine *engine = engine_of(queue);
    if (count > queue->queue_size)
        return VQ_USAGE;
    if (!count)
        return 0;
    struct named *named = malloc(count * sizeof(*named));
    if (!named)
        return VQ_NO_MEMORY;
    uint32_t given = 0;
    const int failed = sort_named(engine, named, heads, count);
    if (!failed && !queue->stopped && !fatal(queue->reason) && ring_usable(engine))
        given = untake(engine, named, count);
    for (uint32_t i = 0; i < given; i++)
        heads[i] = named[count - given + i].head;
    free(named);
    if (given) {
        queue->more |= VQ_MORE_AVAILABLE;
        if (queue->counters)
            ((struct vq_counters *)pointer(queue->counters))->requests -= given;
    }
    return failed ? failed : (int)given;
}

int vq_arm(struct vq_queue *queue)
{
    struct engine *engine = engine_of(queue);
    if (queue->stopped || !queue->descriptors)
        return 0;
    const int ready = format_of(queue)->arm(engine);
    if (queue->resubmit || queue->reason)
        return queue->resubmit != 0;
    return ready;
}

int vq_disarm(struct vq_queue *queue)
{
    if (queue->stopped || !queue->descriptors)
        return 0;
    return format_of(queue)->disarm(engine_of(queue));
}

void queue_quiet(struct vq_queue *queue)
{
    if (!queue->stopped && !queue->reason && queue->descriptors)
        format_of(queue)->quiet(engine_of(queue));
}

int vq_ready(struct vq_queue *queue)
{
    if (queue->reason || queue->stopped || !queue->descriptors)
        return 0;
    return queue->resubmit || format_of(queue)->ready(engine_of(queue));
}
