#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "wire.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };
enum { EVENTS_ENABLE = 0, EVENTS_DISABLE = 1, EVENTS_AT = 2 };
#define SPLIT_NO_INTERRUPT 1
#define SPLIT_NO_NOTIFY 1

struct split_descriptor {
    uint64_t guest;
    uint32_t length;
    uint16_t flags, next;
};

struct packed_descriptor {
    uint64_t guest;
    uint32_t length;
    uint16_t id, flags;
};

struct used_element {
    uint32_t id, length;
};

struct packed_events {
    uint16_t at, flags; /* at: position in bits 0 to 14, wrap counter in bit 15 */
};

/* Ring fields are little-endian, so the program needs a little-endian machine. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a little-endian machine is needed");

static uint16_t load16(const void *place)
{
    return atomic_load_explicit((const _Atomic uint16_t *)place, memory_order_acquire);
}

static void store16(void *place, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)place, value, memory_order_release);
}

size_t ring_layout(unsigned size, bool packed, size_t *driver, size_t *device)
{
    size_t descriptors = size * sizeof(struct split_descriptor);

    /* A cache line separates the parts that different sides write. */
    *driver = descriptors + 64;
    *device = *driver + (packed ? 64 : (6 + 2 * size + 127) & ~(size_t)63);
    return *device + (packed ? 64 : 6 + 8 * size);
}

void ring_init(struct ring *ring, uint8_t *memory, unsigned size, unsigned per_slot, unsigned slots,
               bool packed, bool event_idx, bool indirect)
{
    size_t driver, device;

    ring_layout(size, packed, &driver, &device);
    *ring = (struct ring){
        .packed = packed,
        .event_idx = event_idx,
        .indirect = indirect,
        .size = (uint16_t)size,
        .per_slot = (uint16_t)(indirect ? 1 : per_slot),
        .descriptor = memory,
        .driver = memory + driver,
        .device = memory + device,
        .avail_wrap = true,
        .used_wrap = true,
        .kick = -1,
        .call = -1,
        .counts = calloc(slots, sizeof(uint16_t)),
    };
}

uint32_t ring_base(const struct ring *ring)
{
    if (!ring->packed)
        return ring->next_avail;
    uint32_t available = ring->next_avail | (uint32_t)ring->avail_wrap << 15;
    uint32_t used = ring->next_used | (uint32_t)ring->used_wrap << 15;
    return available | used << 16;
}

static void add_split(struct ring *ring, unsigned slot, const struct segment *segments,
                      unsigned count, struct split_descriptor *table, uint64_t table_guest)
{
    struct split_descriptor *ours = (struct split_descriptor *)ring->descriptor;
    uint16_t head = (uint16_t)(slot * ring->per_slot), first = head;
    uint16_t *entries = (uint16_t *)(ring->driver + 4);

    if (ring->indirect) {
        ours[head] = (struct split_descriptor){table_guest, count * sizeof *table, INDIRECT, 0};
        ours = table;
        first = 0;
    }
    for (unsigned i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((segments[i].writable ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
        ours[first + i] = (struct split_descriptor){segments[i].guest, segments[i].length, flags,
                                                    (uint16_t)(first + i + 1)};
    }
    entries[ring->next_avail++ & (ring->size - 1)] = head;
}

/* Write one descriptor; the first of a batch keeps its flags until publication. */
static void put_packed(struct ring *ring, struct packed_descriptor descriptor)
{
    struct packed_descriptor *place =
        (struct packed_descriptor *)ring->descriptor + ring->next_avail;

    descriptor.flags |= ring->avail_wrap ? AVAIL : USED;
    place->guest = descriptor.guest;
    place->length = descriptor.length;
    place->id = descriptor.id;
    if (ring->staged++ == 0) {
        ring->first_head = ring->next_avail;
        ring->first_flags = descriptor.flags;
    } else {
        place->flags = descriptor.flags;
    }
    if (++ring->next_avail == ring->size) {
        ring->next_avail = 0;
        ring->avail_wrap = !ring->avail_wrap;
    }
}

static void add_packed(struct ring *ring, unsigned slot, const struct segment *segments,
                       unsigned count, struct packed_descriptor *table, uint64_t table_guest)
{
    uint16_t id = (uint16_t)slot;

    ring->counts[slot] = (uint16_t)(ring->indirect ? 1 : count);
    if (ring->indirect) {
        for (unsigned i = 0; i < count; i++)
            table[i] = (struct packed_descriptor){segments[i].guest, segments[i].length, 0,
                                                  segments[i].writable ? WRITE : 0};
        put_packed(ring, (struct packed_descriptor){table_guest, count * (uint32_t)sizeof *table,
                                                    id, INDIRECT});
        return;
    }
    for (unsigned i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((segments[i].writable ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
        put_packed(ring,
                   (struct packed_descriptor){segments[i].guest, segments[i].length, id, flags});
    }
}

void ring_add(struct ring *ring, unsigned slot, const struct segment *segments, unsigned count,
              void *table, uint64_t table_guest)
{
    if (ring->packed)
        add_packed(ring, slot, segments, count, table, table_guest);
    else
        add_split(ring, slot, segments, count, table, table_guest);
}

static bool publish_split(struct ring *ring)
{
    uint16_t old = ring->published, now = ring->next_avail;

    store16(ring->driver + 2, now); /* release: pairs with the device's acquire of the index */
    ring->published = now;
    /* Full: the index is stored before the wish is read. The device stores its wish before it reads
     * the index once more. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!ring->event_idx)
        return !(load16(ring->device) & SPLIT_NO_NOTIFY);
    uint16_t event = load16(ring->device + 4 + 8 * ring->size);
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

static bool publish_packed(struct ring *ring)
{
    struct packed_descriptor *ring_descriptors = (struct packed_descriptor *)ring->descriptor;
    uint16_t now = ring->next_avail, old = (uint16_t)(now - ring->staged);

    /* Release: the batch is stored before the flags that make its first descriptor available. */
    store16(&ring_descriptors[ring->first_head].flags, ring->first_flags);
    ring->staged = 0;
    atomic_thread_fence(memory_order_seq_cst); /* the flags before the wish, as above */
    uint32_t wish = atomic_load_explicit((_Atomic uint32_t *)ring->device, memory_order_acquire);
    uint16_t flags = wish >> 16 & 3, event = wish & 0x7fff;
    if (flags != EVENTS_AT)
        return flags == EVENTS_ENABLE;
    if ((wish >> 15 & 1) != ring->avail_wrap)
        event = (uint16_t)(event - ring->size);
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

void ring_publish(struct ring *ring)
{
    uint64_t one = 1;
    bool wanted;

    if (ring->packed) {
        if (!ring->staged)
            return;
        wanted = publish_packed(ring);
    } else {
        if (ring->published == ring->next_avail)
            return;
        wanted = publish_split(ring);
    }
    if (wanted) {
        ring->kicks++;
        if (write(ring->kick, &one, sizeof one) != sizeof one)
            die(EXIT_FAULT, "the kick failed");
    }
}

static int collect_packed(struct ring *ring, uint32_t *written)
{
    struct packed_descriptor *place =
        (struct packed_descriptor *)ring->descriptor + ring->next_used;
    uint16_t flags = load16(&place->flags);
    bool available = flags & AVAIL, used = flags & USED;

    if (available != used || used != ring->used_wrap)
        return -1;
    *written = place->length;
    int slot = place->id;
    ring->next_used = (uint16_t)(ring->next_used + ring->counts[slot]);
    if (ring->next_used >= ring->size) {
        ring->next_used = (uint16_t)(ring->next_used - ring->size);
        ring->used_wrap = !ring->used_wrap;
    }
    return slot;
}

int ring_collect(struct ring *ring, uint32_t *written)
{
    if (ring->packed)
        return collect_packed(ring, written);
    if (load16(ring->device + 2) == ring->next_used)
        return -1;
    struct used_element *used = (struct used_element *)(ring->device + 4);
    used += ring->next_used++ & (ring->size - 1);
    *written = used->length;
    return (int)(used->id / ring->per_slot);
}

bool ring_arm(struct ring *ring)
{
    if (!ring->packed) {
        if (ring->event_idx)
            store16(ring->driver + 4 + 2 * ring->size, ring->next_used);
        else
            store16(ring->driver, 0);
        /* Full: the wish is stored before the index is read again. The device publishes before it reads
         * the wish. */
        atomic_thread_fence(memory_order_seq_cst);
        return load16(ring->device + 2) != ring->next_used;
    }
    struct packed_descriptor *next = (struct packed_descriptor *)ring->descriptor + ring->next_used;
    struct packed_events *events = (struct packed_events *)ring->driver;
    if (ring->event_idx)
        store16(&events->at, (uint16_t)(ring->next_used | ring->used_wrap << 15));
    store16(&events->flags, ring->event_idx ? EVENTS_AT : EVENTS_ENABLE);
    atomic_thread_fence(memory_order_seq_cst); /* as above */
    uint16_t flags = load16(&next->flags);
    return !!(flags & AVAIL) == !!(flags & USED) && !!(flags & USED) == ring->used_wrap;
}

void ring_quiet(struct ring *ring)
{
    if (ring->packed)
        store16(ring->driver + 2, EVENTS_DISABLE);
    else if (ring->event_idx)
        /* The device reaches a passed index only after 65535 more completions. */
        store16(ring->driver + 4 + 2 * ring->size, (uint16_t)(ring->next_used - 1));
    else
        store16(ring->driver, SPLIT_NO_INTERRUPT);
}

void ring_sleep(struct ring *ring)
{
    uint64_t calls;

    ring->sleeps++;
    while (read(ring->call, &calls, sizeof calls) != sizeof calls) {
        struct pollfd call = {ring->call, POLLIN, 0};
        if (errno != EAGAIN || poll(&call, 1, -1) < 0)
            die(EXIT_FAULT, "waiting for a call: %s", strerror(errno));
    }
}
