/*
 * From descriptors to a record, and from a record to its completion: the part of taking and
 * publishing that does not depend on the ring's format.  Inline, because it is the hot path.
 */
#ifndef VQ_CHAIN_H
#define VQ_CHAIN_H

#include "engine.h"

/* ---- taking ---- */

/*
 * A take at work.  What it reads of the queue and the engine again and again, and what it has to
 * add to them at its end, kept by value: guest memory is written in between, and for all the
 * compiler knows that changes every structure that has an address.
 */
struct taking {
    struct vq_record *records;
    struct vq_done *done;
    struct vq_segment *segments;
    struct chain *chains;
    const struct gm_table *table;
    uint64_t window_base;
    uint32_t segment_capacity;
    uint32_t features;
    uint32_t queue_size;
    uint32_t limit;
    uint32_t count;         /* chains taken */
    uint32_t segment_count; /* their pieces */
    uint32_t room;          /* added to engine->room */
    uint32_t slots;         /* added to engine->slots_out */
    uint64_t readable;      /* bytes, for the counters */
    uint64_t first;         /* the queue's `taken` before this take */
    uint64_t *taken_at;
};

static inline struct taking taking_start(const struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    return (struct taking){
        .records = pointer(queue->records),
        .done = pointer(queue->done),
        .segments = pointer(queue->segments),
        .chains = engine->chains,
        .table = engine->memory.table,
        .window_base = engine->memory.window_base,
        .segment_capacity = queue->segment_capacity,
        .features = queue->features,
        .queue_size = queue->queue_size,
        .limit =
            queue->limit < queue->record_capacity ? queue->limit : queue->record_capacity,
        .first = queue->taken,
        .taken_at = engine->taken_at,
    };
}

/*
 * A chain while its descriptors are being read.  What is wrong with its shape is found by the
 * format while it walks and ends the walk; what is wrong with its buffers is only remembered here
 * until the walk is over.
 */
struct building {
    struct vq_segment *segments;
    uint32_t capacity;
    uint32_t count; /* pieces; those beyond capacity are not stored */
    uint32_t readable_count;
    uint32_t provided; /* pieces that rest on provisions */
    uint32_t flags;    /* of all regions: REGION_OUTSIDE */
    enum outcome outcome;
    uint64_t readable; /* bytes */
    uint64_t total;
    uint64_t regions;
};

static ALWAYS_INLINE struct building building_start(const struct taking *taking)
{
    return (struct building){
        .segments = taking->segments + taking->segment_count,
        .capacity = taking->segment_capacity - taking->segment_count,
        .outcome = TAKEN,
    };
}

/*
 * A copy, made member by member.  What a pointer leads to lies in memory, and an assignment moves it
 * in wider pieces than it was written in, which has to wait for the writes.  So a walk keeps the
 * building of its own where no pointer leads to it, its members in registers, and functions that are
 * not inline get a copy and give one back.
 */
static ALWAYS_INLINE struct building building_copy(const struct building *building)
{
    return (struct building){
        .segments = building->segments,
        .capacity = building->capacity,
        .count = building->count,
        .readable_count = building->readable_count,
        .provided = building->provided,
        .flags = building->flags,
        .outcome = building->outcome,
        .readable = building->readable,
        .total = building->total,
        .regions = building->regions,
    };
}

/*
 * One buffer, a descriptor that was copied out of the ring or of an indirect table, when it is what
 * nearly all are: in one mapped region that may be written.  False, and nothing is changed, when it is
 * anything else, right or wrong.
 */
static ALWAYS_INLINE bool building_plain(struct engine *engine, struct building *building,
                                         uint64_t address, uint32_t length, bool writable)
{
    const uint32_t place = building->count < HINTS ? building->count : HINTS - 1;
    const struct region *region = memory_hinted(&engine->memory, engine->hints, place, address);
    if (unlikely(!region))
        return false;
    const uint64_t offset = address - region->start;
    /* Both were below 2^32 before: the sum cannot overflow. */
    const uint64_t total = building->total + length;
    /* A length of 0 wraps to more than any region holds. */
    if (unlikely((uint64_t)length - 1 >= region->size - offset || total > UINT32_MAX ||
                 (region->flags & (GM_REGION_ON_DEMAND | GM_REGION_READ_ONLY)) ||
                 building->count >= building->capacity))
        return false;
    struct vq_segment *segment = &building->segments[building->count];
    if (writable) {
        segment->flags = VQ_SEGMENT_WRITABLE;
    } else {
        if (unlikely(building->total != building->readable))
            return false;
        building->readable = total;
        building->readable_count++;
        segment->flags = 0;
    }
    segment->host = region->host + offset;
    segment->guest = address;
    segment->length = length;
    segment->provision = 0;
    building->total = total;
    building->count++;
    building->regions |= region_mask(region);
    building->flags |= region->flags;
    return true;
}

/* One buffer that is not plain: it breaks a rule, lies across regions or behind an IOMMU, is mapped on
 * demand or may only be read; or one before it was wrong. */
void building_other(struct engine *engine, struct building *building, uint64_t address,
                    uint32_t length, bool writable);

/* One buffer, whatever it is. */
static ALWAYS_INLINE void building_add(struct engine *engine, struct building *building,
                                       uint64_t address, uint32_t length, bool writable)
{
    if (likely(building->outcome == TAKEN &&
               building_plain(engine, building, address, length, writable)))
        return;
    struct building copy = building_copy(building);
    building_other(engine, &copy, address, length, writable);
    *building = building_copy(&copy);
}

/* Copy an indirect table that does not lie in one piece into engine->raw. */
enum outcome table_gather(struct engine *engine, uint64_t address, uint32_t length);

/*
 * Find the indirect table that a descriptor names: all of it has to be in memory.  *table points
 * into guest memory or at our own copy, aligned to nothing.
 */
static inline enum outcome table_find(struct engine *engine, uint64_t address, uint32_t length,
                                      const unsigned char **table)
{
    if (unlikely(!(engine->queue->features & VQ_INDIRECT)))
        return fault(engine, VQ_REASON_INDIRECT_NOT_NEGOTIATED, address);
    if (unlikely(!length || length % 16 || length / 16 > engine->chain_limit))
        return fault(engine, VQ_REASON_INDIRECT_LENGTH, length);
    const struct region *region =
        memory_direct(&engine->memory, engine->hints, HINTS, address, length);
    if (likely(region)) {
        *table = pointer(region->host + (address - region->start));
        return TAKEN;
    }
    *table = (const unsigned char *)engine->raw;
    return table_gather(engine, address, length);
}

/* Store a record's header when it does not lie in one piece, and what follows from it. */
void building_gather(const struct vq_segment *segments, uint32_t readable_count,
                     uint32_t readable, bool external, uint64_t window_base,
                     struct vq_record *record);
void chain_keep_extras(struct engine *engine, const struct vq_segment *segments, uint32_t count,
                       uint32_t readable_count, struct chain *chain);
void chain_drop_extras(struct engine *engine, struct chain *chain);

/* The pieces that count against room_limit. */
static inline uint32_t chain_room(const struct engine *engine, const struct chain *chain)
{
    uint32_t room = (chain->length[0] ? 1u : 0u) + (chain->length[1] ? 1u : 0u);
    for (uint32_t i = chain->extra; unlikely(i != NONE); i = engine->extras[i].next)
        room += (engine->extras[i].length ? 1u : 0u) + (engine->extras[i].provision ? 1u : 0u);
    return room;
}

/*
 * The walk is over and the shape is right: check what remains, then write the chain's record, its
 * done entry, and our own record of it.  `head` is its head (packed: buffer id), `slots` the
 * descriptors of the ring that it covers.
 */
static ALWAYS_INLINE enum outcome building_finish(struct engine *engine, struct taking *taking,
                                                  const struct building *building, uint16_t head,
                                                  uint16_t slots, bool resubmitted)
{
    const struct vq_segment *segments = building->segments;
    const uint32_t count = building->count, readable_count = building->readable_count;
    const uint32_t writable_count = count - readable_count;
    const uint32_t writable = (uint32_t)(building->total - building->readable);
    const uint64_t base = taking->window_base;
    const bool status_byte = taking->features & VQ_STATUS_BYTE;
    const bool external = building->flags & REGION_OUTSIDE;

    if (unlikely(building->outcome != TAKEN))
        return building->outcome;
    if (unlikely(status_byte && !writable_count))
        return fault(engine, VQ_REASON_STATUS_BYTE, head);
    if (unlikely(count > building->capacity || count > UINT16_MAX)) {
        fault(engine, VQ_REASON_CHAIN_TOO_LONG, count);
        return NO_ROOM;
    }
    const uint32_t room = writable_count + building->provided;
    const uint32_t occupied = engine->room + taking->room;
    if (unlikely(occupied + room > engine->room_limit && occupied))
        return STALLED;

    struct chain *chain = &taking->chains[head];
    taking->readable += building->readable;
    chain->table = taking->table;
    chain->regions = building->regions;
    chain->writable_length = writable;
    chain->extra = NONE;
    chain->slots = slots;
    chain->state = CHAIN_TAKEN;
    chain->resubmitted = resubmitted;
    chain->status = 0;
    chain->length[0] = chain->length[1] = 0;
    taking->taken_at[head] = taking->first + taking->count;

    struct vq_record *record = &taking->records[taking->count];
    uint32_t flags = (resubmitted ? VQ_RESUBMITTED : 0) | (external ? VQ_EXTERNAL : 0);
    uint32_t parts = writable_count;
    uint64_t first_byte = 0, last_byte = 0;
    if (likely(writable_count)) {
        const struct vq_segment *first = &segments[readable_count], *last = &segments[count - 1];
        const uint64_t status = last->host + last->length - 1;
        chain->status = status;
        chain->guest[0] = first->guest;
        chain->length[0] = first->length;
        if (writable_count > 1) {
            chain->guest[1] = first[1].guest;
            chain->length[1] = first[1].length;
        }
        parts -= status_byte && last->length == 1;
        if (likely(!external)) {
            first_byte = first->host - base;
            last_byte = status - base;
        }
    }
    record->writable = first_byte;
    record->status = last_byte;
    if (likely(parts <= 1 && !external))
        flags |= VQ_WRITABLE_CONTIGUOUS;
    record->flags = (uint16_t)flags;
    if (likely(readable_count && readable_count <= 2 && segments[0].length == VQ_HEADER_SIZE)) {
        const bool rest = readable_count == 2;
        memcpy(record->header, pointer(segments[0].host), VQ_HEADER_SIZE);
        record->readable = rest && !external ? segments[1].host - base : 0;
        record->readable_length = rest ? segments[1].length : 0;
        if (likely(!external))
            record->flags = (uint16_t)(flags | VQ_READABLE_CONTIGUOUS);
    } else {
        building_gather(segments, readable_count, (uint32_t)building->readable, external, base,
                        record);
    }
    record->writable_length = writable;
    record->head = head;
    record->segment_count = (uint16_t)count;
    record->reserved = 0;
    record->first_segment = taking->segment_count;
    record->reserved2 = 0;

    struct vq_done *done = &taking->done[taking->count];
    done->head = head;
    done->status = 0;
    done->flags = status_byte ? VQ_DONE_STATUS : 0;
    done->written = writable;

    if (unlikely(writable_count > INLINE_PIECES || building->provided))
        chain_keep_extras(engine, segments, count, readable_count, chain);
    if (unlikely(taking->features & VQ_IN_ORDER)) {
        uint32_t place = engine->order_first + engine->order_count++;
        place = place < taking->queue_size ? place : place - taking->queue_size;
        engine->order[place] = head;
    }
    taking->room += room;
    taking->slots += slots;
    taking->segment_count += count;
    taking->count++;
    return TAKEN;
}

/*
 * Turn what stopped a take into its result.  `outcome` is TAKEN when `limit` chains were taken and
 * NOTHING when the ring was seen empty; `available` says whether there is one more.
 */
int taking_end(struct engine *engine, const struct taking *taking, enum outcome outcome,
               bool available);

/* ---- completing ---- */

static inline void pin(const struct gm_table *table, uint64_t chains)
{
    __atomic_fetch_add(&((struct gm_table *)(uintptr_t)table)->pins, chains, __ATOMIC_RELAXED);
}

/* Counts the chains released of one snapshot, so that a batch costs one atomic operation. */
struct unpinning {
    const struct gm_table *table;
    uint64_t chains;
};

static inline void unpin(struct unpinning *unpinning, const struct gm_table *next)
{
    /* Release: what a chain wrote is written before its memory may go. */
    if (unpinning->chains)
        __atomic_fetch_sub(&((struct gm_table *)(uintptr_t)unpinning->table)->pins,
                           unpinning->chains, __ATOMIC_RELEASE);
    *unpinning = (struct unpinning){.table = next};
}

/* Forget a chain, but for its pin. */
static inline void chain_forget(struct engine *engine, uint16_t head)
{
    struct chain *chain = &engine->chains[head];
    engine->room -= chain_room(engine, chain);
    engine->slots_out -= chain->slots;
    if (unlikely(chain->extra != NONE))
        chain_drop_extras(engine, chain);
    chain->state = CHAIN_FREE;
}

/* Forget a chain; its pin is given back when `unpinning` is. */
static inline void chain_release(struct engine *engine, uint16_t head,
                                 struct unpinning *unpinning)
{
    const struct gm_table *table = engine->chains[head].table;
    if (unlikely(table != unpinning->table))
        unpin(unpinning, table);
    unpinning->chains++;
    chain_forget(engine, head);
}

/* What log_ring does where there is a log. */
void log_ring_write(const struct engine *engine, uint64_t offset, uint64_t length);

/* Log a write to the device's ring, at an offset from its start; after the write, or the page could
 * be fetched and its bit cleared in between. */
static inline void log_ring(const struct engine *engine, uint64_t offset, uint64_t length)
{
    if (unlikely(engine->log && (engine->queue->features & VQ_LOG_USED)))
        log_ring_write(engine, offset, length);
}

/* Whether moving an index from `old` to `new` passed `event` (virtio 2.7.10). */
static inline bool needs_event(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

/* Log what a completion wrote, and its status byte when that was written. */
void chain_log(const struct engine *engine, const struct chain *chain, const struct vq_done *done);

/*
 * Whether it is worth looking at the poison words.  A few are looked at each time; a walk over
 * hundreds waits until the guard has survived a bus error in this process.
 */
static inline bool poison_possible(const struct engine *engine)
{
    return engine->memory.count <= 8 ||
           __atomic_load_n(&guard_events, __ATOMIC_RELAXED) != engine->guard_events;
}

/* A build for tests brings a function that ends the process at the n-th store of the protocol. */
#ifdef VQ_TEST_STOP
void test_stop(void);
#else
static inline void test_stop(void) {}
#endif

/* Forget the chains of done[0:count] and give back their pins. */
static inline void chains_release(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    struct unpinning unpinning = {.table = engine->memory.table};
    for (uint32_t i = 0; i < count; i++)
        chain_release(engine, done[i].head, &unpinning);
    unpin(&unpinning, NULL);
    engine->queue->in_flight -= count;
}

#endif
