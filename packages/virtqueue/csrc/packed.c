/*
 * Packed rings, the device's side (virtio 2.8).  Always little-endian.
 *
 *   descriptors  struct { u64 address; u32 length; u16 id; u16 flags; } [size]
 *   driver       u16 position (bit 15: wrap); u16 mode   when the driver wants to be told
 *   device       u16 position (bit 15: wrap); u16 mode   when we do
 */
#include "chain.h"
#include "inflight.h"

#define AVAIL (1u << 7)
#define USED (1u << 15)

#define EVENT_ENABLE 0u
#define EVENT_DISABLE 1u
#define EVENT_DESCRIPTOR 2u

static inline uint16_t little16(uint16_t value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap16(value);
#else
    return value;
#endif
}

static inline uint32_t little32(uint32_t value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap32(value);
#else
    return value;
#endif
}

static inline uint64_t little64(uint64_t value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(value);
#else
    return value;
#endif
}

/* AVAIL and USED of an available descriptor, and of a used one, under a wrap counter. */
static inline uint32_t available_flags(uint8_t wrap) { return wrap ? AVAIL : USED; }
static inline uint32_t used_flags(uint8_t wrap) { return wrap ? AVAIL | USED : 0; }

struct position {
    uint16_t slot;
    uint8_t wrap;
};

static inline struct position move(struct position position, uint32_t steps, uint32_t size)
{
    uint32_t slot = position.slot + steps;
    if (slot < size)
        return (struct position){(uint16_t)slot, position.wrap};
    return (struct position){(uint16_t)(slot - size), position.wrap ^ 1};
}

static inline unsigned char *ring_slot(const struct vq_queue *queue, uint32_t slot)
{
    return (unsigned char *)pointer(queue->descriptors) + (size_t)slot * 16;
}

/*
 * Copy a descriptor of the ring, which is aligned to 16: length, id and flags in one load.
 * Acquire, for the first of a chain.  Partner: the driver's barrier between writing the descriptors
 * of a chain and storing the flags of its first (virtio 2.8.21.1).
 */
static inline struct descriptor ring_descriptor(const struct vq_queue *queue, uint32_t slot)
{
    const unsigned char *at = ring_slot(queue, slot);
    uint64_t rest = little64(__atomic_load_n((const uint64_t *)(at + 8), __ATOMIC_ACQUIRE));
    return (struct descriptor){
        .address = little64(load64(at)),
        .length = (uint32_t)rest,
        .link = (uint16_t)(rest >> 32),
        .flags = (uint16_t)(rest >> 48),
    };
}

static inline bool is_available(uint16_t flags, uint8_t wrap)
{
    return (flags & (AVAIL | USED)) == available_flags(wrap);
}

/* Collect the buffers of an indirect table; FAULT and NEEDED for one buffer come through the building. */
static ALWAYS_INLINE enum outcome walk_table(struct engine *engine, struct building *building,
                                             const struct descriptor *indirect)
{
    const unsigned char *table;
    enum outcome outcome = table_find(engine, indirect->address, indirect->length, &table);
    if (unlikely(outcome != TAKEN))
        return outcome;
    /* Only WRITE counts in a table, and its descriptors follow each other. */
    for (uint32_t i = 0; i < indirect->length / 16; i++) {
        struct {
            uint64_t address;
            uint32_t length;
            uint16_t id;
            uint16_t flags;
        } raw;
        memcpy(&raw, table + (size_t)i * 16, sizeof(raw));
        /* The copy is what is checked and used; it must not be made again. */
        __asm__ volatile("" ::: "memory");
        building_add(engine, building, little64(raw.address), little32(raw.length),
                     little16(raw.flags) & DESCRIPTOR_WRITE);
    }
    return TAKEN;
}

static inline enum outcome check_id(struct engine *engine, uint16_t id)
{
    if (unlikely(id >= engine->queue->queue_size))
        return fault(engine, VQ_REASON_HEAD_OUT_OF_RANGE, id);
    if (unlikely(engine->chains[id].state != CHAIN_FREE))
        return fault(engine, VQ_REASON_HEAD_IN_FLIGHT, id);
    return TAKEN;
}

/* Take the chain at `*at`, which moves past it. */
static ALWAYS_INLINE enum outcome take_one(struct engine *engine, struct taking *taking,
                                           const struct vq_queue *queue, struct position *at)
{
    const uint32_t size = taking->queue_size;
    const uint32_t room = size - engine->slots_out - taking->slots;
    if (unlikely(!room))
        return NOTHING; /* every slot is covered by a chain in flight */
    struct position here = *at;
    struct descriptor found = ring_descriptor(queue, here.slot);
    if (!is_available(found.flags, here.wrap))
        return NOTHING;

    struct building building = building_start(taking);
    const bool keep = engine->inflight != NULL;
    enum outcome outcome;
    uint32_t seen = 1;
    if (found.flags & DESCRIPTOR_INDIRECT) {
        if (unlikely(found.flags & DESCRIPTOR_NEXT))
            return fault(engine, VQ_REASON_INDIRECT_WITH_NEXT, here.slot);
        outcome = check_id(engine, found.link);
        if (likely(outcome == TAKEN))
            outcome = walk_table(engine, &building, &found);
        if (unlikely(outcome != TAKEN))
            return outcome;
        engine->raw[0] = found; /* the table's copy is no longer needed */
    } else {
        for (;; seen++) {
            if (unlikely(keep))
                engine->raw[seen - 1] = found;
            building_add(engine, &building, found.address, found.length,
                         found.flags & DESCRIPTOR_WRITE);
            if (!(found.flags & DESCRIPTOR_NEXT))
                break;
            if (unlikely(seen >= room))
                return fault(engine, VQ_REASON_CHAIN_TOO_LONG, here.slot);
            here = move(here, 1, size);
            found = ring_descriptor(queue, here.slot);
            if (unlikely(!is_available(found.flags, here.wrap)))
                return fault(engine, VQ_REASON_UNFINISHED_CHAIN, here.slot);
            if (unlikely(found.flags & DESCRIPTOR_INDIRECT))
                return fault(engine, VQ_REASON_INDIRECT_WITH_NEXT, here.slot);
        }
        outcome = check_id(engine, found.link);
        if (unlikely(outcome != TAKEN))
            return outcome;
    }
    outcome = building_finish(engine, taking, &building, found.link, (uint16_t)seen, false);
    if (unlikely(outcome != TAKEN))
        return outcome;
    if (unlikely(keep) &&
        packed_inflight_take(engine, engine->raw, seen, &engine->entries[found.link]) < 0) {
        chain_forget(engine, found.link);
        taking->count--;
        taking->segment_count -= building.count;
        return fault(engine, VQ_REASON_INFLIGHT, found.link);
    }
    *at = move(here, 1, size);
    return TAKEN;
}

/* Take again the oldest chain that the in-flight region lists. */
static enum outcome take_again(struct engine *engine, struct taking *taking)
{
    const uint32_t place = engine->resubmit_next;
    const struct descriptor *saved = engine->saved + engine->saved_at[place];
    const uint32_t slots = engine->saved_at[place + 1] - engine->saved_at[place];
    const uint16_t id = saved[slots - 1].link;
    enum outcome outcome = check_id(engine, id);
    if (outcome != TAKEN)
        return outcome;
    struct building building = building_start(taking);
    if (saved[0].flags & DESCRIPTOR_INDIRECT) {
        outcome = walk_table(engine, &building, &saved[0]);
        if (outcome != TAKEN)
            return outcome;
    } else {
        for (uint32_t i = 0; i < slots; i++)
            building_add(engine, &building, saved[i].address, saved[i].length,
                         saved[i].flags & DESCRIPTOR_WRITE);
    }
    outcome = building_finish(engine, taking, &building, id, (uint16_t)slots, true);
    if (outcome == TAKEN) {
        engine->entries[id] = engine->resubmit[place];
        engine->slots_out -= slots; /* they were counted when the region was read */
    }
    return outcome;
}

static int packed_take(struct engine *engine)
{
    struct vq_queue *queue = engine->queue;
    struct taking taking = taking_start(engine);
    enum outcome outcome = TAKEN;

    while (unlikely(queue->resubmit && taking.count < taking.limit)) {
        outcome = take_again(engine, &taking);
        if (outcome != TAKEN)
            break;
        engine->resubmit_next++;
        queue->resubmit--;
    }
    struct position at = {queue->next_avail, queue->avail_wrap};
    while (outcome == TAKEN && taking.count < taking.limit)
        outcome = take_one(engine, &taking, queue, &at);
    queue->next_avail = at.slot;
    queue->avail_wrap = at.wrap;
    bool more = false;
    if (outcome == TAKEN)
        more = queue->resubmit ||
               (engine->slots_out + taking.slots < queue->queue_size &&
                is_available(ring_descriptor(queue, at.slot).flags, at.wrap));
    return taking_end(engine, &taking, outcome, more);
}

static inline void store_flags(struct engine *engine, uint32_t slot, uint32_t flags)
{
    /* Release.  Partner: the driver's barrier between loading these flags and loading id, length
     * and the buffers (virtio 2.8.22). */
    store16_release(ring_slot(engine->queue, slot) + 14, little16((uint16_t)flags));
    test_stop();
    log_ring(engine, 16 * (uint64_t)slot, 16);
}

static int packed_use(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    struct vq_queue *queue = engine->queue;
    const uint32_t size = queue->queue_size;
    const struct position first = {queue->next_used, queue->used_wrap};
    struct position at = first;
    uint32_t moved = 0, first_flags = 0;

    for (uint32_t i = 0; i < count; i++) {
        const uint16_t head = done[i].head;
        const uint32_t slots = engine->chains[head].slots;
        const struct position next = move(at, slots, size);
        const uint32_t flags = used_flags(at.wrap) | (done[i].written ? DESCRIPTOR_WRITE : 0);
        unsigned char *slot = ring_slot(queue, at.slot);
        store32(slot + 8, little32(done[i].written));
        test_stop();
        store16(slot + 12, little16(head));
        test_stop();
        if (unlikely(engine->inflight != NULL)) {
            /* One at a time: a death within a batch would leave used flags in slots that the
             * position, rolled back, comes to again. */
            const uint16_t entry = engine->entries[head];
            packed_inflight_using(engine, entry, next.slot, next.wrap);
            store_flags(engine, at.slot, flags);
            packed_inflight_used(engine, entry);
        } else if (i == 0) {
            first_flags = flags;
        } else {
            store_flags(engine, at.slot, flags);
        }
        at = next;
        moved += slots;
    }
    if (!engine->inflight)
        /* The driver looks at one slot only: all of the batch appears with its first. */
        store_flags(engine, first.slot, first_flags);
    queue->next_used = at.slot;
    queue->used_wrap = at.wrap;

    /* Partner: the driver stores its event structure, passes a full barrier and loads the flags
     * of its next used descriptor again.  Either it sees our flags or we see its event. */
    full_barrier();
    const uint32_t event = little32(load32(pointer(queue->driver)));
    const uint32_t mode = (event >> 16) & 3;
    if (mode == EVENT_DISABLE)
        return 0;
    if (mode != EVENT_DESCRIPTOR || !(queue->features & VQ_EVENT_IDX))
        return 1;
    if (unlikely(!queue->signalled_valid)) {
        /* Nothing is known of what was signalled before a restart: tell the driver once. */
        queue->signalled_valid = 1;
        return 1;
    }
    uint32_t position = event & 0x7fff;
    if (((event >> 15) & 1) != at.wrap)
        position -= size; /* a lap behind; modulo 2^16 like all that follows */
    return needs_event((uint16_t)position, at.slot, (uint16_t)(at.slot - moved));
}

static void packed_retreat(struct engine *engine, uint16_t head)
{
    struct vq_queue *queue = engine->queue;
    const struct chain *chain = &engine->chains[head];
    if (chain->resubmitted) {
        engine->resubmit_next--;
        queue->resubmit++;
        engine->slots_out += chain->slots;
        return;
    }
    if (engine->inflight)
        packed_inflight_give_back(engine, engine->entries[head]);
    if (queue->next_avail < chain->slots) {
        queue->next_avail = (uint16_t)(queue->next_avail + queue->queue_size - chain->slots);
        queue->avail_wrap ^= 1;
    } else {
        queue->next_avail = (uint16_t)(queue->next_avail - chain->slots);
    }
}

static int packed_ready(struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    return engine->slots_out < queue->queue_size &&
           is_available(ring_descriptor(queue, queue->next_avail).flags, queue->avail_wrap);
}

static int packed_arm(struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    uint32_t event = EVENT_ENABLE << 16;
    if (queue->features & VQ_EVENT_IDX)
        event = EVENT_DESCRIPTOR << 16 | queue->next_avail | (uint32_t)queue->avail_wrap << 15;
    store32(pointer(queue->device), little32(event));
    /* Partner: the driver's barrier between storing the flags of a chain and loading this
     * structure.  Either it sees that we want a kick or we see its chain. */
    full_barrier();
    return packed_ready(engine);
}

static int packed_disarm(struct engine *engine)
{
    store32(pointer(engine->queue->device), little32(EVENT_DISABLE << 16));
    return 0;
}

static void packed_quiet(struct engine *engine) { packed_disarm(engine); }

static int packed_recover(struct engine *engine)
{
    struct vq_queue *queue = engine->queue;
    int count = packed_inflight_recover(engine);
    if (count > 0) {
        queue->resubmit = (uint32_t)count;
        /* They cover their slots of the ring from before the restart on. */
        engine->slots_out += engine->saved_at[count];
    }
    return count;
}

const struct format packed_format = {
    .take = packed_take,
    .use = packed_use,
    .retreat = packed_retreat,
    .arm = packed_arm,
    .disarm = packed_disarm,
    .quiet = packed_quiet,
    .ready = packed_ready,
    .recover = packed_recover,
};
