/*
 * From descriptors to a record, and from a record to its completion: the part of taking and
 * publishing that does not depend on the ring's format.  Inline, because it is the hot path.
 */
#ifndef VQ_CHAIN_H
#define VQ_CHAIN_H

#include "engine.h"

/* ---- taking ---- */

/*
 * A chain while its descriptors are being read.  What is wrong with its shape is found by the
 * format while it walks and ends the walk; what is wrong with its buffers is only remembered here
 * until the walk is over.
 */
struct building {
    struct vq_segment *segments;
    uint32_t capacity;
    uint32_t count;    /* pieces; those beyond capacity are not stored */
    uint32_t readable_count;
    uint32_t provided; /* pieces that rest on provisions */
    uint32_t outside;  /* pieces outside the window */
    enum outcome outcome;
    uint64_t readable; /* bytes */
    uint64_t writable;
    uint64_t regions;
};

static inline struct building building_start(const struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    struct vq_segment *segments = pointer(queue->segments);
    return (struct building){
        .segments = segments + queue->segment_count,
        .capacity = queue->segment_capacity - queue->segment_count,
        .outcome = TAKEN,
    };
}

static inline void building_piece(const struct memory *memory, struct building *building,
                                  uint64_t host, uint64_t guest, uint32_t length, bool writable,
                                  uint64_t provision)
{
    if (likely(building->count < building->capacity))
        building->segments[building->count] = (struct vq_segment){
            .host = host,
            .guest = guest,
            .length = length,
            .flags = writable ? VQ_SEGMENT_WRITABLE : 0,
            .provision = provision,
        };
    building->count++;
    building->readable_count += !writable;
    uint64_t offset = host - memory->window_base;
    building->outside +=
        offset >= memory->window_size || length > memory->window_size - offset;
}

/* The long way: across regions, behind an IOMMU, mapped on demand, or wrong. */
enum outcome building_resolve(struct engine *engine, struct building *building, uint64_t address,
                              uint32_t length, bool writable);

/* One buffer: a descriptor that was copied out of the ring or of an indirect table. */
static inline void building_add(struct engine *engine, struct building *building,
                                uint64_t address, uint32_t length, bool writable)
{
    if (unlikely(building->outcome != TAKEN))
        return;
    if (unlikely(length == 0)) {
        building->outcome = fault(engine, VQ_REASON_ZERO_LENGTH, address);
        return;
    }
    if (unlikely(!writable && building->writable)) {
        building->outcome = fault(engine, VQ_REASON_READABLE_AFTER_WRITABLE, address);
        return;
    }
    if (writable)
        building->writable += length;
    else
        building->readable += length;
    /* Both were below 2^32 before: the sums cannot overflow. */
    uint64_t total = building->readable + building->writable;
    if (unlikely(total > UINT32_MAX)) {
        building->outcome = fault(engine, VQ_REASON_TOTAL_LENGTH, total);
        return;
    }
    uint32_t hint = building->count < HINTS ? building->count : HINTS - 1;
    const struct region *region =
        memory_direct(&engine->memory, &engine->hints[hint], address, length, writable);
    if (unlikely(!region)) {
        building->outcome = building_resolve(engine, building, address, length, writable);
        return;
    }
    building->regions |= region->mask;
    building_piece(&engine->memory, building, region->host + (address - region->start), address,
                   length, writable, 0);
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
    const struct vq_queue *queue = engine->queue;
    if (unlikely(!(queue->features & VQ_INDIRECT)))
        return fault(engine, VQ_REASON_INDIRECT_NOT_NEGOTIATED, address);
    if (unlikely(!length || length % 16 || length / 16 > queue->queue_size))
        return fault(engine, VQ_REASON_INDIRECT_LENGTH, length);
    const struct region *region =
        memory_direct(&engine->memory, &engine->hints[HINTS], address, length, false);
    if (likely(region)) {
        *table = pointer(region->host + (address - region->start));
        return TAKEN;
    }
    *table = (const unsigned char *)engine->raw;
    return table_gather(engine, address, length);
}

/* Store a record's header when it does not lie in one piece, and what follows from it. */
void building_gather(const struct building *building, uint64_t window_base,
                     struct vq_record *record);
void chain_keep_extras(struct engine *engine, const struct building *building,
                       struct chain *chain);
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
 * done entry, and our own record of it.  `number` is its index in the batch, `head` its head
 * (packed: buffer id), `slots` the descriptors of the ring that it covers.
 */
static inline enum outcome building_finish(struct engine *engine, struct building *building,
                                           uint32_t number, uint16_t head, uint16_t slots,
                                           bool resubmitted)
{
    struct vq_queue *queue = engine->queue;
    const struct memory *memory = &engine->memory;
    const struct vq_segment *segments = building->segments;
    const uint32_t count = building->count, readable_count = building->readable_count;
    const uint32_t writable_count = count - readable_count;
    const bool status_byte = queue->features & VQ_STATUS_BYTE;

    if (unlikely(building->outcome != TAKEN))
        return building->outcome;
    if (unlikely(status_byte && !writable_count))
        return fault(engine, VQ_REASON_STATUS_BYTE, head);
    if (unlikely(count > building->capacity || count > UINT16_MAX)) {
        fault(engine, VQ_REASON_CHAIN_TOO_LONG, count);
        return NO_ROOM;
    }
    const uint32_t room = writable_count + building->provided;
    if (unlikely(engine->room + room > engine->room_limit && engine->room))
        return STALLED;

    struct vq_record *record = (struct vq_record *)pointer(queue->records) + number;
    const struct vq_segment *first = &segments[readable_count], *last = &segments[count - 1];
    uint32_t flags = resubmitted ? VQ_RESUBMITTED : 0;
    record->writable = record->status = record->readable = 0;
    if (likely(!building->outside)) {
        uint32_t parts = writable_count;
        if (likely(writable_count)) {
            record->writable = first->host - memory->window_base;
            record->status = last->host + last->length - 1 - memory->window_base;
            parts -= status_byte && last->length == 1;
        }
        if (parts <= 1)
            flags |= VQ_WRITABLE_CONTIGUOUS;
    } else {
        flags |= VQ_EXTERNAL;
    }
    record->flags = (uint16_t)flags;
    if (likely(readable_count == 1 && segments[0].length == VQ_HEADER_SIZE)) {
        memcpy(record->header, pointer(segments[0].host), VQ_HEADER_SIZE);
        record->readable_length = 0;
        if (likely(!building->outside))
            record->flags |= VQ_READABLE_CONTIGUOUS;
    } else if (readable_count == 2 && segments[0].length == VQ_HEADER_SIZE) {
        memcpy(record->header, pointer(segments[0].host), VQ_HEADER_SIZE);
        record->readable_length = segments[1].length;
        if (likely(!building->outside)) {
            record->readable = segments[1].host - memory->window_base;
            record->flags |= VQ_READABLE_CONTIGUOUS;
        }
    } else {
        building_gather(building, memory->window_base, record);
    }
    record->writable_length = (uint32_t)building->writable;
    record->head = head;
    record->segment_count = (uint16_t)count;
    record->reserved = 0;
    record->first_segment = queue->segment_count;
    record->reserved2 = 0;

    struct vq_done *done = (struct vq_done *)pointer(queue->done) + number;
    *done = (struct vq_done){
        .head = head,
        .flags = status_byte ? VQ_DONE_STATUS : 0,
        .written = (uint32_t)building->writable,
    };

    struct chain *chain = &engine->chains[head];
    *chain = (struct chain){
        .table = memory->table,
        .regions = building->regions,
        .writable_length = (uint32_t)building->writable,
        .extra = NONE,
        .slots = slots,
        .state = CHAIN_TAKEN,
        .resubmitted = resubmitted,
    };
    if (likely(writable_count)) {
        chain->status = last->host + last->length - 1;
        chain->guest[0] = first[0].guest;
        chain->length[0] = first[0].length;
        if (writable_count > 1) {
            chain->guest[1] = first[1].guest;
            chain->length[1] = first[1].length;
        }
    }
    if (unlikely(writable_count > INLINE_PIECES || building->provided))
        chain_keep_extras(engine, building, chain);
    engine->room += room;
    engine->slots_out += slots;
    if (unlikely(queue->features & VQ_IN_ORDER)) {
        uint32_t place = engine->order_first + engine->order_count++;
        place = place < queue->queue_size ? place : place - queue->queue_size;
        engine->order[place] = head;
    }
    queue->segment_count += count;
    return TAKEN;
}

/*
 * Turn what stopped a take into its result.  `outcome` is TAKEN when `limit` chains were taken and
 * NOTHING when the ring was seen empty; `available` says whether there is one more.
 */
int take_result(struct engine *engine, uint32_t count, enum outcome outcome, bool available);

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

/* Log a write to the device's ring, at an offset from its start. */
static inline void log_ring(const struct engine *engine, uint64_t offset, uint64_t length)
{
    if (unlikely(engine->log && (engine->queue->features & VQ_LOG_USED)))
        log_write(engine->log, engine->queue->log_used + offset, length);
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

/* In builds for tests the process ends at the n-th store of the protocol. */
#ifdef VQ_TEST_STOP
void test_stop(void);
#else
static inline void test_stop(void) {}
#endif

#endif
