/*
 * Split rings, the device's side (virtio 2.7).
 *
 *   descriptors  struct { u64 address; u32 length; u16 flags; u16 next; } [size]
 *   driver       u16 flags; u16 idx; u16 ring[size]; u16 used_event
 *   device       u16 flags; u16 idx; struct { u32 id; u32 length; } ring[size]; u16 avail_event
 */
#include "chain.h"
#include "inflight.h"

#define NO_INTERRUPT 1u
#define NO_NOTIFY 1u

struct rings {
    const unsigned char *descriptors;
    const unsigned char *driver;
    unsigned char *device;
    uint32_t size;
};

static struct rings rings_of(const struct engine *engine)
{
    const struct vq_queue *queue = engine->queue;
    return (struct rings){
        .descriptors = pointer(queue->descriptors),
        .driver = pointer(queue->driver),
        .device = pointer(queue->device),
        .size = queue->queue_size,
    };
}

static uint64_t used_event_offset(uint32_t size) { return 4 + 2 * (uint64_t)size; }
static uint64_t avail_event_offset(uint32_t size) { return 4 + 8 * (uint64_t)size; }

static inline uint16_t order16(uint16_t value, bool swap)
{
    return swap ? __builtin_bswap16(value) : value;
}

static inline uint32_t order32(uint32_t value, bool swap)
{
    return swap ? __builtin_bswap32(value) : value;
}

static inline struct descriptor descriptor_order(struct descriptor raw, bool swap)
{
    /* In memory flags come before next, as in struct descriptor. */
    if (swap) {
        raw.address = __builtin_bswap64(raw.address);
        raw.length = __builtin_bswap32(raw.length);
        raw.flags = __builtin_bswap16(raw.flags);
        raw.link = __builtin_bswap16(raw.link);
    }
    return raw;
}

/* Copy a descriptor of the ring, which is aligned to 16, in two loads. */
static inline struct descriptor ring_descriptor(const unsigned char *at, bool swap)
{
    struct descriptor raw;
    uint64_t rest = load64(at + 8);
    raw.address = load64(at);
    memcpy((unsigned char *)&raw + 8, &rest, 8);
    return descriptor_order(raw, swap);
}

/* Copy a descriptor of an indirect table, which is aligned to nothing. */
static inline struct descriptor table_descriptor(const unsigned char *at, bool swap)
{
    struct descriptor raw;
    memcpy(&raw, at, sizeof(raw));
    /* The copy is what is checked and used; it must not be made again. */
    __asm__ volatile("" ::: "memory");
    return descriptor_order(raw, swap);
}

/* Whether the chain may go on at the link of its descriptor number `seen`. */
static inline enum outcome follow(struct engine *engine, const struct descriptor *from, uint32_t seen,
                                  uint32_t size, uint32_t head)
{
    if (unlikely(seen >= size))
        return fault(engine, VQ_REASON_CHAIN_TOO_LONG, head);
    if (unlikely(from->link >= size))
        return fault(engine, VQ_REASON_NEXT_OUT_OF_RANGE, from->link);
    return TAKEN;
}

/* Collect the buffers of an indirect table; `seen` descriptors came before it. */
static ALWAYS_INLINE enum outcome walk_table(struct engine *engine, struct building *building,
                                             const struct descriptor *indirect, uint32_t seen,
                                             bool swap)
{
    const unsigned char *table;
    enum outcome outcome = table_find(engine, indirect->address, indirect->length, &table);
    if (unlikely(outcome != TAKEN))
        return outcome;
    const uint32_t length = indirect->length / 16;
    for (uint32_t index = 0;; seen++) {
        if (unlikely(seen >= engine->chain_limit))
            return fault(engine, VQ_REASON_CHAIN_TOO_LONG, index);
        const struct descriptor found = table_descriptor(table + (size_t)index * 16, swap);
        if (unlikely(found.flags & DESCRIPTOR_INDIRECT))
            return fault(engine, VQ_REASON_INDIRECT_NESTED, index);
        building_add(engine, building, found.address, found.length, found.flags & DESCRIPTOR_WRITE);
        if (!(found.flags & DESCRIPTOR_NEXT))
            return TAKEN;
        if (unlikely(found.link >= length))
            return fault(engine, VQ_REASON_INDIRECT_NEXT_OUT_OF_RANGE, found.link);
        index = found.link;
    }
}

/*
 * Go on with a chain from its descriptor number `seen`, which was copied from `index`.  Apart from the
 * walk over plain descriptors, which has no registers to spare.
 */
static __attribute__((noinline)) enum outcome walk_on(struct engine *engine,
                                                      struct building *building,
                                                      struct descriptor found, uint32_t seen,
                                                      uint32_t index, uint32_t head)
{
    const struct vq_queue *queue = engine->queue;
    const unsigned char *descriptors = pointer(queue->descriptors);
    struct building ours = building_copy(building);
    enum outcome outcome;
    for (;; seen++) {
        if (found.flags & DESCRIPTOR_INDIRECT) {
            outcome = unlikely(found.flags & DESCRIPTOR_NEXT)
                          ? fault(engine, VQ_REASON_INDIRECT_WITH_NEXT, index)
                          : walk_table(engine, &ours, &found, seen - 1, engine->swap);
            break;
        }
        building_add(engine, &ours, found.address, found.length, found.flags & DESCRIPTOR_WRITE);
        outcome = TAKEN;
        if (!(found.flags & DESCRIPTOR_NEXT))
            break;
        outcome = follow(engine, &found, seen, queue->queue_size, head);
        if (unlikely(outcome != TAKEN))
            break;
        index = found.link;
        found = ring_descriptor(descriptors + (size_t)index * 16, engine->swap);
    }
    *building = building_copy(&ours);
    return outcome;
}

/* Walk the chain that begins at `head`, which is in range, and collect its buffers. */
static ALWAYS_INLINE enum outcome walk(struct engine *engine, struct building *building,
                                       const unsigned char *descriptors, uint32_t size,
                                       uint32_t head, bool swap)
{
    for (uint32_t index = head;;) {
        const struct descriptor found = ring_descriptor(descriptors + (size_t)index * 16, swap);
        if (unlikely((found.flags & DESCRIPTOR_INDIRECT) ||
                     !building_plain(engine, building, found.address, found.length,
                                     found.flags & DESCRIPTOR_WRITE))) {
            /* Each descriptor until now was plain, and one piece. */
            struct building copy = building_copy(building);
            enum outcome outcome = walk_on(engine, &copy, found, copy.count + 1, index, head);
            *building = building_copy(&copy);
            return outcome;
        }
        if (!(found.flags & DESCRIPTOR_NEXT))
            return TAKEN;
        enum outcome outcome = follow(engine, &found, building->count, size, head);
        if (unlikely(outcome != TAKEN))
            return outcome;
        index = found.link;
    }
}

static ALWAYS_INLINE enum outcome take_one(struct engine *engine, struct taking *taking,
                                           const unsigned char *descriptors, uint16_t head,
                                           bool resubmitted, bool swap)
{
    if (unlikely(head >= taking->queue_size))
        return fault(engine, VQ_REASON_HEAD_OUT_OF_RANGE, head);
    if (unlikely(taking->chains[head].state != CHAIN_FREE))
        return fault(engine, VQ_REASON_HEAD_IN_FLIGHT, head);
    struct building building = building_start(taking);
    const enum outcome outcome =
        walk(engine, &building, descriptors, taking->queue_size, head, swap);
    if (unlikely(outcome != TAKEN))
        return outcome;
    return building_finish(engine, taking, &building, head, 1, resubmitted);
}

/* How many chains are available; FAULT through *outcome when the index jumped. */
static inline uint16_t load_available(struct engine *engine, const struct rings *rings,
                                      uint16_t next, bool swap, enum outcome *outcome)
{
    if (engine->avail_index == next) {
        /* Acquire.  Partner: the driver's barrier between writing descriptors and ring entries
         * and moving idx (virtio 2.7.13.3).  All loads of those come after this one. */
        uint16_t index = order16(load16_acquire(rings->driver + 2), swap);
        if (unlikely((uint16_t)(index - next) > rings->size)) {
            *outcome = fault(engine, VQ_REASON_AVAIL_JUMP, index);
            return 0;
        }
        engine->avail_index = index;
    }
    return (uint16_t)(engine->avail_index - next);
}

/* What a process before us had taken comes first. */
static enum outcome take_again(struct engine *engine, struct taking *taking,
                               const struct rings *rings)
{
    struct vq_queue *queue = engine->queue;
    while (queue->resubmit && taking->count < taking->limit) {
        const uint16_t head = engine->resubmit[engine->resubmit_next];
        enum outcome outcome =
            take_one(engine, taking, rings->descriptors, head, true, engine->swap);
        if (outcome != TAKEN)
            return outcome;
        engine->resubmit_next++;
        queue->resubmit--;
    }
    return TAKEN;
}

static ALWAYS_INLINE int take(struct engine *engine, bool swap)
{
    struct vq_queue *queue = engine->queue;
    const struct rings rings = rings_of(engine);
    const uint32_t mask = rings.size - 1;
    const bool inflight = engine->inflight != NULL;
    struct taking taking = taking_start(engine);
    enum outcome outcome = TAKEN;

    if (unlikely(queue->resubmit))
        outcome = take_again(engine, &taking, &rings);
    uint16_t next = queue->next_avail;
    while (outcome == TAKEN && taking.count < taking.limit) {
        uint32_t available = load_available(engine, &rings, next, swap, &outcome);
        if (!available) {
            if (outcome == TAKEN)
                outcome = NOTHING;
            break;
        }
        if (available > taking.limit - taking.count)
            available = taking.limit - taking.count;
        for (; available; available--, next++) {
            const uint16_t head = order16(load16(rings.driver + 4 + 2 * (next & mask)), swap);
            outcome = take_one(engine, &taking, rings.descriptors, head, false, swap);
            if (unlikely(outcome != TAKEN))
                break;
            if (unlikely(inflight))
                split_inflight_take(engine, head);
        }
    }
    queue->next_avail = next;
    bool more = false;
    if (outcome == TAKEN)
        more = queue->resubmit || load_available(engine, &rings, next, swap, &outcome);
    return taking_end(engine, &taking, outcome, more);
}

static int split_take(struct engine *engine)
{
    /* Two copies, so that the usual byte order costs nothing. */
    return engine->swap ? take(engine, true) : take(engine, false);
}

static int split_use(struct engine *engine, const struct vq_done *done, uint32_t count)
{
    struct vq_queue *queue = engine->queue;
    const struct rings rings = rings_of(engine);
    const uint32_t mask = rings.size - 1;
    const bool swap = engine->swap;
    const bool inflight = engine->inflight != NULL, logged = engine->log != NULL;
    const uint16_t old = queue->next_used;

    for (uint32_t i = 0; i < count; i++) {
        const uint32_t slot = (uint16_t)(old + i) & mask;
        unsigned char *element = rings.device + 4 + 8 * (size_t)slot;
        if (unlikely(inflight))
            split_inflight_using(engine, done[i].head);
        store32(element, order32(done[i].head, swap));
        test_stop();
        store32(element + 4, order32(done[i].written, swap));
        test_stop();
        if (unlikely(logged))
            log_ring(engine, 4 + 8 * (uint64_t)slot, 8);
    }
    const uint16_t new = (uint16_t)(old + count);
    /* Release.  Partner: the driver's barrier between loading used idx and loading the elements
     * and the buffers (virtio 2.7.14). */
    store16_release(rings.device + 2, order16(new, swap));
    test_stop();
    if (unlikely(engine->inflight != NULL))
        split_inflight_used(engine, done, count, new);
    queue->next_used = new;
    log_ring(engine, 2, 2);

    /* Partner: the driver stores used_event (or clears NO_INTERRUPT), passes a full barrier and
     * loads used idx again.  Either it sees our index or we see its event. */
    full_barrier();
    if (!(queue->features & VQ_EVENT_IDX))
        return !(order16(load16(rings.driver), swap) & NO_INTERRUPT);
    const uint16_t event = order16(load16(rings.driver + used_event_offset(rings.size)), swap);
    /* Nothing is known of what was signalled before a restart: tell the driver once. */
    const bool wanted =
        !queue->signalled_valid || needs_event(event, new, queue->signalled_used);
    queue->signalled_used = new;
    queue->signalled_valid = 1;
    return wanted;
}

static void split_retreat(struct engine *engine, uint16_t head)
{
    struct vq_queue *queue = engine->queue;
    if (engine->chains[head].resubmitted) {
        engine->resubmit_next--;
        queue->resubmit++;
        return;
    }
    if (engine->inflight)
        split_inflight_give_back(engine, head);
    queue->next_avail--;
}

static int split_ready(struct engine *engine)
{
    const struct rings rings = rings_of(engine);
    return order16(load16(rings.driver + 2), engine->swap) != engine->queue->next_avail;
}

static int split_arm(struct engine *engine)
{
    struct vq_queue *queue = engine->queue;
    const struct rings rings = rings_of(engine);
    if (queue->features & VQ_EVENT_IDX) {
        const uint64_t offset = avail_event_offset(rings.size);
        store16(rings.device + offset, order16(queue->next_avail, engine->swap));
        log_ring(engine, offset, 2);
    } else {
        store16(rings.device, 0);
        log_ring(engine, 0, 2);
    }
    /* Partner: the driver's barrier between moving avail idx and loading avail_event (or flags).
     * Either it sees that we want a kick or we see its chain. */
    full_barrier();
    return split_ready(engine);
}

static int split_disarm(struct engine *engine)
{
    /* With event indices the driver kicks only when it passes avail_event, which stays put. */
    if (engine->queue->features & VQ_EVENT_IDX)
        return 0;
    store16(rings_of(engine).device, order16(NO_NOTIFY, engine->swap));
    log_ring(engine, 0, 2);
    return 0;
}

static void split_quiet(struct engine *engine)
{
    const struct rings rings = rings_of(engine);
    if (!(engine->queue->features & VQ_EVENT_IDX)) {
        split_disarm(engine);
        return;
    }
    /* An event that the driver has just passed comes again after a whole round of the index. */
    const uint64_t offset = avail_event_offset(rings.size);
    const uint16_t passed = (uint16_t)(engine->queue->next_avail - 1);
    store16(rings.device + offset, order16(passed, engine->swap));
    log_ring(engine, offset, 2);
}

static int split_recover(struct engine *engine)
{
    struct vq_queue *queue = engine->queue;
    const uint16_t used = order16(load16(rings_of(engine).device + 2), engine->swap);
    int count = split_inflight_recover(engine, used);
    if (count < 0)
        return count;
    if (engine->resubmit) {
        queue->next_used = used;
        queue->next_avail = engine->avail_index = (uint16_t)(used + (uint32_t)count);
        queue->resubmit = (uint32_t)count;
    }
    return count;
}

const struct format split_format = {
    .take = split_take,
    .use = split_use,
    .retreat = split_retreat,
    .arm = split_arm,
    .disarm = split_disarm,
    .quiet = split_quiet,
    .ready = split_ready,
    .recover = split_recover,
};
