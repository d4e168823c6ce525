/*
 * A driver thread and the C engine's thread over one ring, for ThreadSanitizer.
 *
 *   clang -g -O1 -fsanitize=thread -I $CSRC tsan_ring.c $CSRC/?*.c -o tsan_ring
 *   ./tsan_ring split|packed flags|event CHAINS
 *
 * Requests, answers and indirect tables are touched by plain loads and stores, so each is a race to
 * the sanitizer unless the ring's own loads and stores order it: an index or a flag that the engine
 * would load without acquire, or store without release, is reported.
 *
 * What it cannot show: it pairs a release with an acquire of the same address and size only, so the
 * driver here stores the second half of a packed descriptor as one word (the engine loads it so),
 * where others store two bytes of it; it knows nothing of store-load order, so the full barriers of
 * arming and notifying are not looked at (both sides only yield here); and it does not follow
 * memory into another process.  Little-endian machines only.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtqueue.h"

#define SIZE 64u
#define BATCH 16u
#define SEGMENTS 2048u
#define MEMORY 65536u
#define DRIVER 2048u
#define DEVICE 4096u
#define ROOM 8192u
#define GUEST UINT64_C(0x10000)

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            _Exit(2);                                                                              \
        }                                                                                          \
    } while (0)

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t third, fourth; /* split: flags, next; packed: id, flags */
};

static _Alignas(4096) unsigned char memory[MEMORY];
static int packed, event;
static uint64_t chains;

#define LOAD16(offset) __atomic_load_n((uint16_t *)(memory + (offset)), __ATOMIC_ACQUIRE)
#define STORE16(offset, value)                                                                     \
    __atomic_store_n((uint16_t *)(memory + (offset)), (uint16_t)(value), __ATOMIC_RELEASE)

/* A chain's place: table (32 bytes), request (8), answer (8). */
static uint32_t place(uint32_t slot) { return ROOM + slot * 64; }

static void expose(uint32_t slot, uint64_t number, uint16_t *wrap)
{
    unsigned char *room = memory + place(slot);
    const struct descriptor table[2] = {
        {GUEST + place(slot) + 32, 8, packed ? 0 : 1, packed ? 0 : 1},
        {GUEST + place(slot) + 40, 8, packed ? 0 : 2, packed ? 2 : 0},
    };
    memcpy(room, table, sizeof(table));
    memcpy(room + 32, &number, 8);
    memset(room + 40, 0, 8);
    /* Ring memory by atomic accesses of a word each: both sides touch it at any time. */
    uint64_t *ring = (uint64_t *)(void *)memory + 2 * slot;
    __atomic_store_n(ring, GUEST + place(slot), __ATOMIC_RELAXED);
    if (packed) {
        /* As one word, since the engine loads it so: see above. */
        const uint64_t flags = 4u | (*wrap ? 1u << 7 : 1u << 15);
        __atomic_store_n(ring + 1, 32 | (uint64_t)slot << 32 | flags << 48, __ATOMIC_RELEASE);
        *wrap ^= slot == SIZE - 1;
        return;
    }
    __atomic_store_n((uint32_t *)(ring + 1), 32, __ATOMIC_RELAXED);
    __atomic_store_n((uint16_t *)(ring + 1) + 2, 4, __ATOMIC_RELAXED);
    __atomic_store_n((uint16_t *)(memory + DRIVER + 4) + number % SIZE, (uint16_t)slot,
                     __ATOMIC_RELAXED);
    STORE16(DRIVER + 2, number + 1);
}

static void *drive(void *unused)
{
    uint64_t offered = 0, returned = 0;
    uint16_t wrap = 1, used_wrap = 1;
    while (returned < chains) {
        while (offered < chains && offered - returned < SIZE) {
            expose((uint32_t)(offered % SIZE), offered, &wrap);
            offered++;
        }
        const uint32_t slot = (uint32_t)(returned % SIZE);
        if (event && !packed) /* used_event */
            STORE16(DRIVER + 4 + 2 * SIZE, returned);
        uint32_t head, length;
        if (packed) {
            const uint16_t flags = LOAD16(16 * slot + 14), both = flags & 0x8080;
            if (both != (used_wrap ? 0x8080 : 0)) {
                sched_yield();
                continue;
            }
            head = LOAD16(16 * slot + 12);
            length = __atomic_load_n((uint32_t *)(memory + 16 * slot + 8), __ATOMIC_RELAXED);
            used_wrap ^= slot == SIZE - 1;
        } else {
            if (LOAD16(DEVICE + 2) == (uint16_t)returned) {
                sched_yield();
                continue;
            }
            uint32_t *element = (uint32_t *)(memory + DEVICE + 4) + 2 * slot;
            head = __atomic_load_n(element, __ATOMIC_RELAXED);
            length = __atomic_load_n(element + 1, __ATOMIC_RELAXED);
        }
        uint64_t answer;
        memcpy(&answer, memory + place(slot) + 40, 8);
        REQUIRE(head == slot && length == 8 && answer == ~returned);
        returned++;
    }
    return unused;
}

int main(int count, char **arguments)
{
    static struct vq_record records[BATCH];
    static struct vq_segment segments[SEGMENTS];
    static struct vq_done done[BATCH], staged[SIZE];
    static struct vq_provision provisions[1];
    static uint32_t by_user, poison;
    REQUIRE(count == 4);
    packed = !strcmp(arguments[1], "packed");
    event = !strcmp(arguments[2], "event");
    chains = strtoull(arguments[3], NULL, 10);
    struct gm_region region = {
        .guest_address = GUEST,
        .size = MEMORY,
        .user_address = GUEST,
        .host_address = (uintptr_t)memory,
        .poison = (uintptr_t)&poison,
        .page_size = 4096,
    };
    struct gm_table table = {
        .magic = GM_TABLE_MAGIC,
        .abi = GM_ABI,
        .size = sizeof(table),
        .region_count = 1,
        .regions = (uintptr_t)&region,
        .by_user = (uintptr_t)&by_user,
        .window_base = (uintptr_t)memory,
        .window_size = MEMORY,
    };
    struct vq_queue queue = {
        .magic = VQ_MAGIC,
        .abi = VQ_ABI,
        .size = sizeof(queue),
        .queue_size = SIZE,
        .features = VQ_INDIRECT | (packed ? VQ_PACKED : 0u) | (event ? VQ_EVENT_IDX : 0u),
        .records = (uintptr_t)records,
        .segments = (uintptr_t)segments,
        .done = (uintptr_t)done,
        .staged = (uintptr_t)staged,
        .provisions = (uintptr_t)provisions,
        .record_capacity = BATCH,
        .segment_capacity = SEGMENTS,
        .staged_capacity = SIZE,
        .provision_capacity = 1,
        .limit = BATCH,
        .descriptors = (uintptr_t)memory,
        .driver = (uintptr_t)memory + DRIVER,
        .device = (uintptr_t)memory + DEVICE,
        .table = (uintptr_t)&table,
        .avail_wrap = 1,
        .used_wrap = 1,
    };
    REQUIRE(vq_create(&queue) == 0 && vq_attach(&queue) == 0);
    pthread_t driver;
    REQUIRE(!pthread_create(&driver, NULL, drive, NULL));
    uint64_t expected = 0;
    while (queue.completed < chains) {
        const int taken = vq_cycle(&queue);
        REQUIRE(taken >= 0);
        for (int i = 0; i < taken; i++) {
            uint64_t number;
            memcpy(&number, records[i].header, 8);
            REQUIRE(number == expected++ && records[i].writable_length == 8);
            number = ~number;
            memcpy(memory + records[i].writable, &number, 8);
        }
        if (!taken && queue.completed < chains && !vq_arm(&queue))
            sched_yield();
    }
    pthread_join(driver, NULL);
    vq_close(&queue);
    printf("%llu chains\n", (unsigned long long)chains);
    return 0;
}
