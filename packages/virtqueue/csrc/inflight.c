/*
 * The orders of stores, and why a death between any two of them is survived:
 *
 * Split, taking: the counter, then the mark.  Unmarked, the chain is still in the available ring.
 * Split, using: the links of the batch, the ring's used index, the marks, used_idx.  While used_idx
 * differs from the ring's index, recovery clears as many marks along the links as they differ by.
 *
 * Packed, taking: everything about the chain goes into entries of the free list; the chain counts
 * once old_free_head has moved past them, since recovery clears what is in the free list.
 * Packed, using: the entries go back to the free list, the new position is stored, then the
 * descriptor's flags, the mark, and the old_* fields.  While the old position differs from the
 * new one, the descriptor's flags at the old one tell whether the driver has been given the chain.
 * The position's four fields are one store, or an index could be paired with the wrong counter.
 */
#include "inflight.h"

#include <stdlib.h>

#include "chain.h"

#define VERSION 1u

struct split_state {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct split_region {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct split_state states[];
};

struct packed_state {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;
    uint16_t last;
    uint16_t num;
    uint64_t counter;
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};

/* used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter: stored together. */
struct packed_position {
    uint16_t used;
    uint16_t old_used;
    uint8_t wrap;
    uint8_t old_wrap;
    uint8_t padding[2];
};

struct packed_region {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t free_head;
    uint16_t old_free_head;
    struct packed_position position;
    uint8_t padding[8];
    struct packed_state states[];
};

_Static_assert(sizeof(struct split_region) == 16, "QueueRegionSplit");
_Static_assert(sizeof(struct split_state) == 16, "DescStateSplit");
_Static_assert(offsetof(struct packed_region, position) == 16, "QueueRegionPacked.used_idx");
_Static_assert(offsetof(struct packed_region, states) == 32, "QueueRegionPacked.desc");
_Static_assert(sizeof(struct packed_state) == 32, "DescStatePacked");

/* Stores in the order written.  SIGKILL lets all stores before some point of the program be seen,
 * and none after, so the order of one thread is all that counts; release is also right for a reader
 * that looks on. */
#define STORE(field, value)                                                                        \
    do {                                                                                           \
        __atomic_store_n(&(field), (value), __ATOMIC_RELEASE);                                     \
        test_stop();                                                                               \
    } while (0)
#define LOAD(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)

struct found {
    uint64_t counter;
    uint16_t index;
};

static int by_counter(const void *left, const void *right)
{
    const struct found *a = left, *b = right;
    if (a->counter != b->counter)
        return a->counter < b->counter ? -1 : 1;
    return (int)a->index - (int)b->index;
}

/* Fill engine->resubmit from a list, oldest first; the next chain's counter follows the last. */
static int list_resubmissions(struct engine *engine, struct found *found, uint32_t count)
{
    engine->resubmit = malloc(((size_t)count + 1) * sizeof(*engine->resubmit));
    if (!engine->resubmit)
        return VQ_NO_MEMORY;
    qsort(found, count, sizeof(*found), by_counter);
    for (uint32_t i = 0; i < count; i++)
        engine->resubmit[i] = found[i].index;
    engine->resubmit_next = 0;
    engine->counter = count ? found[count - 1].counter + 1 : 0;
    return 0;
}

/* The entries of a region in use; 0 when it is too small for the ring, or contradicts itself. */
static uint32_t used_entries(const struct vq_queue *queue, uint16_t version, uint32_t entries,
                             size_t header, size_t entry)
{
    if (version != VERSION || entries < queue->queue_size ||
        queue->inflight_size < header + entry * (uint64_t)entries)
        return 0;
    return entries;
}

/* ---- split ---- */

void split_inflight_take(struct engine *engine, uint16_t head)
{
    struct split_region *region = engine->inflight;
    STORE(region->states[head].counter, engine->counter);
    engine->counter++;
    STORE(region->states[head].inflight, 1);
}

void split_inflight_give_back(struct engine *engine, uint16_t head)
{
    struct split_region *region = engine->inflight;
    STORE(region->states[head].inflight, 0);
}

void split_inflight_using(struct engine *engine, uint16_t head)
{
    /* Only as many links are followed as the used index moved, so older ones may be stale; linked
     * before it is the head, or a walk would miss the rest. */
    struct split_region *region = engine->inflight;
    STORE(region->states[head].next, LOAD(region->last_batch_head));
    STORE(region->last_batch_head, head);
}

void split_inflight_used(struct engine *engine, const struct vq_done *done, uint32_t count,
                         uint16_t used)
{
    struct split_region *region = engine->inflight;
    for (uint32_t i = 0; i < count; i++)
        STORE(region->states[done[i].head].inflight, 0);
    STORE(region->used_idx, used);
}

int split_inflight_recover(struct engine *engine, uint16_t used)
{
    const struct vq_queue *queue = engine->queue;
    const uint32_t size = queue->queue_size;
    struct split_region *region = pointer(queue->inflight);
    if (queue->inflight_size < sizeof(*region) + sizeof(region->states[0]) * (uint64_t)size)
        return broken(engine, VQ_REASON_INFLIGHT, queue->inflight_size);
    const uint16_t version = LOAD(region->version);
    if (version == 0) {
        STORE(region->desc_num, (uint16_t)size);
        STORE(region->used_idx, used);
        STORE(region->version, VERSION); /* last: a death before leaves it uninitialised */
        engine->inflight = region;
        return 0;
    }
    const uint32_t entries = used_entries(queue, version, LOAD(region->desc_num), sizeof(*region),
                                          sizeof(region->states[0]));
    if (!entries)
        return broken(engine, VQ_REASON_INFLIGHT, version);
    const uint16_t before = LOAD(region->used_idx);
    const uint32_t last_batch = (uint16_t)(used - before);
    if (last_batch > size)
        return broken(engine, VQ_REASON_INFLIGHT, before);
    /* That batch had reached the driver when the process died: it is not in flight. */
    uint16_t head = LOAD(region->last_batch_head);
    for (uint32_t i = 0; i < last_batch; i++) {
        if (head >= size)
            return broken(engine, VQ_REASON_INFLIGHT, head);
        STORE(region->states[head].inflight, 0);
        head = LOAD(region->states[head].next);
    }
    STORE(region->used_idx, used);

    for (uint32_t i = size; i < entries; i++)
        if (LOAD(region->states[i].inflight))
            return broken(engine, VQ_REASON_INFLIGHT, i);
    struct found *found = malloc((size_t)size * sizeof(*found));
    if (!found)
        return VQ_NO_MEMORY;
    uint32_t count = 0;
    for (uint32_t i = 0; i < size; i++)
        if (LOAD(region->states[i].inflight))
            found[count++] = (struct found){LOAD(region->states[i].counter), (uint16_t)i};
    int failed = list_resubmissions(engine, found, count);
    free(found);
    if (failed)
        return failed;
    engine->inflight = region;
    return (int)count;
}

/* ---- packed ---- */

static void store_position(struct packed_region *region, struct packed_position position)
{
    uint64_t word;
    memcpy(&word, &position, sizeof(word));
    __atomic_store_n((uint64_t *)(void *)&region->position, word, __ATOMIC_RELEASE);
    test_stop();
}

static struct packed_position load_position(const struct packed_region *region)
{
    struct packed_position position;
    uint64_t word = __atomic_load_n((const uint64_t *)(const void *)&region->position,
                                    __ATOMIC_RELAXED);
    memcpy(&position, &word, sizeof(word));
    return position;
}

int packed_inflight_take(struct engine *engine, const struct descriptor *chain, uint32_t count,
                         uint16_t *entry)
{
    struct packed_region *region = engine->inflight;
    const uint32_t entries = engine->inflight_entries;
    const uint16_t head = LOAD(region->old_free_head);
    if (head >= entries)
        return VQ_BROKEN;
    struct packed_state *state = &region->states[head];
    STORE(state->num, 0);
    STORE(state->counter, engine->counter);
    engine->counter++;
    STORE(state->inflight, 1);
    uint16_t index = head;
    for (uint32_t i = 0; i < count; i++) {
        if (index >= entries)
            return VQ_BROKEN;
        struct packed_state *each = &region->states[index];
        if (i + 1 == count)
            STORE(state->last, index);
        STORE(state->num, (uint16_t)(i + 1));
        STORE(each->addr, chain[i].address);
        STORE(each->len, chain[i].length);
        STORE(each->flags, chain[i].flags);
        STORE(each->id, chain[i].link);
        index = LOAD(each->next);
        STORE(region->free_head, index);
    }
    STORE(region->old_free_head, index);
    *entry = head;
    return 0;
}

/* Put the entries of a chain in front of the free list. */
static void link_free(struct engine *engine, uint16_t entry, uint16_t front)
{
    struct packed_region *region = engine->inflight;
    const uint16_t last = LOAD(region->states[entry].last);
    if (last < engine->inflight_entries)
        STORE(region->states[last].next, front);
    STORE(region->free_head, entry);
}

void packed_inflight_give_back(struct engine *engine, uint16_t entry)
{
    struct packed_region *region = engine->inflight;
    link_free(engine, entry, LOAD(region->old_free_head));
    STORE(region->old_free_head, entry);
    STORE(region->states[entry].inflight, 0);
}

void packed_inflight_using(struct engine *engine, uint16_t entry, uint16_t used, uint8_t wrap)
{
    struct packed_region *region = engine->inflight;
    link_free(engine, entry, LOAD(region->free_head));
    struct packed_position position = load_position(region);
    position.used = used;
    position.wrap = wrap;
    store_position(region, position);
}

void packed_inflight_used(struct engine *engine, uint16_t entry)
{
    struct packed_region *region = engine->inflight;
    STORE(region->states[entry].inflight, 0);
    STORE(region->old_free_head, LOAD(region->free_head));
    struct packed_position position = load_position(region);
    position.old_used = position.used;
    position.old_wrap = position.wrap;
    store_position(region, position);
}

/* Whether the driver has not yet been given the chain at a position. */
static bool still_available(const struct vq_queue *queue, uint16_t slot, uint8_t wrap)
{
    const unsigned char *at = (const unsigned char *)pointer(queue->descriptors) + 16 * slot;
    const uint32_t flags = load16(at + 14), mask = 1u << 7 | 1u << 15;
    return (flags & mask) == (wrap ? 1u << 7 : 1u << 15);
}

/* Copy the descriptors of the chain at `entry` behind the `*end` that are there. */
static bool save_chain(struct engine *engine, uint16_t entry, uint8_t *seen, uint32_t *end)
{
    const struct packed_region *region = engine->inflight;
    const uint32_t size = engine->queue->queue_size;
    const uint32_t count = LOAD(region->states[entry].num);
    uint16_t index = entry, last = entry;
    for (uint32_t i = 0; i < count; i++) {
        if (index >= engine->inflight_entries || seen[index] || *end >= size)
            return false;
        seen[index] = 1;
        const struct packed_state *state = &region->states[index];
        engine->saved[(*end)++] = (struct descriptor){
            .address = LOAD(state->addr),
            .length = LOAD(state->len),
            .flags = LOAD(state->flags),
            .link = LOAD(state->id),
        };
        last = index;
        index = LOAD(state->next);
    }
    return count && last == LOAD(region->states[entry].last);
}

static int recover_chains(struct engine *engine, struct found *found, uint8_t *seen,
                          struct packed_position position)
{
    struct vq_queue *queue = engine->queue;
    struct packed_region *region = engine->inflight;
    const uint32_t size = queue->queue_size, entries = engine->inflight_entries;
    for (uint16_t index = LOAD(region->free_head); index < entries && !seen[index];) {
        seen[index] = 1;
        STORE(region->states[index].inflight, 0);
        index = LOAD(region->states[index].next);
    }
    uint32_t count = 0, end = 0;
    for (uint32_t i = 0; i < entries; i++)
        if (LOAD(region->states[i].inflight))
            found[count++] = (struct found){LOAD(region->states[i].counter), (uint16_t)i};
    int failed = list_resubmissions(engine, found, count);
    if (failed)
        return failed;
    for (uint32_t i = 0; i < count; i++) {
        engine->saved_at[i] = end;
        if (!save_chain(engine, engine->resubmit[i], seen, &end))
            return broken(engine, VQ_REASON_INFLIGHT, engine->resubmit[i]);
    }
    engine->saved_at[count] = end;
    queue->next_used = position.used;
    queue->used_wrap = position.wrap;
    const uint32_t available = position.used + end;
    queue->next_avail = (uint16_t)(available < size ? available : available - size);
    queue->avail_wrap = available < size ? position.wrap : position.wrap ^ 1;
    return (int)count;
}

int packed_inflight_recover(struct engine *engine)
{
    struct vq_queue *queue = engine->queue;
    const uint32_t size = queue->queue_size;
    struct packed_region *region = pointer(queue->inflight);
    if (queue->inflight_size < sizeof(*region) + sizeof(region->states[0]) * (uint64_t)size)
        return broken(engine, VQ_REASON_INFLIGHT, queue->inflight_size);
    const uint16_t version = LOAD(region->version);
    if (version == 0) {
        for (uint32_t i = 0; i < size; i++) {
            STORE(region->states[i].inflight, 0);
            STORE(region->states[i].next, (uint16_t)(i + 1));
        }
        STORE(region->desc_num, (uint16_t)size);
        STORE(region->free_head, 0);
        STORE(region->old_free_head, 0);
        store_position(region, (struct packed_position){
                                   .used = queue->next_used,
                                   .old_used = queue->next_used,
                                   .wrap = queue->used_wrap,
                                   .old_wrap = queue->used_wrap,
                               });
        STORE(region->version, VERSION); /* last: a death before leaves it uninitialised */
        engine->inflight = region;
        engine->inflight_entries = size;
        return 0;
    }
    struct packed_position position = load_position(region);
    const uint32_t entries = used_entries(queue, version, LOAD(region->desc_num), sizeof(*region),
                                          sizeof(region->states[0]));
    if (!entries)
        return broken(engine, VQ_REASON_INFLIGHT, version);
    engine->inflight_entries = entries;
    if (position.used >= size || position.old_used >= size)
        return broken(engine, VQ_REASON_INFLIGHT, position.used);
    position.wrap &= 1;
    position.old_wrap &= 1;
    if (position.used != position.old_used || position.wrap != position.old_wrap) {
        if (still_available(queue, position.old_used, position.old_wrap)) {
            position.used = position.old_used;
            position.wrap = position.old_wrap;
        } else {
            /* The driver has been given the chain: finish what was under way. */
            position.old_used = position.used;
            position.old_wrap = position.wrap;
            STORE(region->old_free_head, LOAD(region->free_head));
        }
    }
    STORE(region->free_head, LOAD(region->old_free_head));
    store_position(region, position);

    engine->inflight = region;
    engine->saved = malloc((size_t)size * sizeof(*engine->saved));
    engine->saved_at = malloc(((size_t)size + 1) * sizeof(*engine->saved_at));
    struct found *found = malloc((size_t)entries * sizeof(*found));
    uint8_t *seen = calloc(entries, 1);
    int result = VQ_NO_MEMORY;
    if (engine->saved && engine->saved_at && found && seen)
        result = recover_chains(engine, found, seen, position);
    free(found);
    free(seen);
    if (result < 0)
        engine->inflight = NULL;
    return result;
}
