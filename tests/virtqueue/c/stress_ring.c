/*
 * A driver and a device process at full speed over two mappings of one memory, both in C.
 *
 *   cc -std=c11 -O2 -I $CSRC stress_ring.c $CSRC/?*.c -o stress_ring
 *   ./stress_ring split|packed flags|event CHAINS [SEED]
 *
 * Each chain carries a number whose complement is the answer: none may be lost, come back twice or
 * with another's answer.  The device completes out of order.  Both sides sleep on an eventfd whenever
 * they find nothing, and now and then everything comes home so that they do; when there is something
 * and no signal comes for ten seconds, a wake-up was lost.  stress_ring.py does the same through the Python layer, whose speed
 * leaves few of the races that show here.  Little-endian machines only.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "virtqueue.h"

#define SIZE 256u
#define SLOTS (SIZE / 2)
#define BATCH 64u
#define MEMORY 65536u
#define DRIVER 8192u
#define DEVICE 12288u
#define ROOM 16384u
#define GUEST UINT64_C(0x100000)
#define PATIENCE_MS 10000

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

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };

static bool packed, event;
static int kick, call;
static pid_t device;
static unsigned char *memory;
static uint64_t random_state;

#define LOAD16(offset) __atomic_load_n((uint16_t *)(memory + (offset)), __ATOMIC_ACQUIRE)
#define STORE16(offset, value)                                                                     \
    __atomic_store_n((uint16_t *)(memory + (offset)), (uint16_t)(value), __ATOMIC_RELEASE)
#define FULL_BARRIER() __atomic_thread_fence(__ATOMIC_SEQ_CST)

static uint32_t below(uint32_t limit) /* xorshift64 */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)((random_state >> 20) % limit);
}

static void signal_side(int fd)
{
    const uint64_t one = 1;
    REQUIRE(write(fd, &one, sizeof(one)) == sizeof(one));
}

/* Sleep until the other side signals, which it must where `missed` sees what it has done. */
static void sleep_on(int fd, const char *who, bool (*missed)(void))
{
    struct pollfd polled = {.fd = fd, .events = POLLIN};
    while (poll(&polled, 1, PATIENCE_MS) != 1)
        if (missed() && poll(&polled, 1, PATIENCE_MS) != 1) {
            fprintf(stderr, "the %s slept for %d ms: a wake-up was lost\n", who, PATIENCE_MS);
            _Exit(3);
        }
    uint64_t count;
    REQUIRE(read(fd, &count, sizeof(count)) == sizeof(count));
}

/* ---- the device: the engine under test ---- */

static struct vq_record records[BATCH];
static struct vq_segment segments[1024];
static struct vq_done done[BATCH], staged[SIZE];
static struct vq_provision provisions[1];
static uint32_t by_user, poison;
static struct vq_queue queue;

static bool is_available(void) { return vq_ready(&queue) > 0; }

static void serve(void)
{
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
    queue = (struct vq_queue){
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
        .segment_capacity = 1024,
        .staged_capacity = SIZE,
        .provision_capacity = 1,
        .descriptors = (uintptr_t)memory,
        .driver = (uintptr_t)memory + DRIVER,
        .device = (uintptr_t)memory + DEVICE,
        .table = (uintptr_t)&table,
        .avail_wrap = 1,
        .used_wrap = 1,
    };
    REQUIRE(vq_create(&queue) == 0 && vq_attach(&queue) == 0);
    uint16_t held[SIZE];
    uint32_t held_count = 0;
    while (true) {
        queue.limit = 1 + below(BATCH);
        const int taken = vq_take(&queue);
        REQUIRE(taken >= 0);
        for (int i = 0; i < taken; i++) {
            uint64_t number;
            memcpy(&number, records[i].header, 8);
            number = ~number;
            memcpy(memory + records[i].writable, &number, 8);
            REQUIRE(held_count < SIZE);
            held[held_count++] = records[i].head;
        }
        if (!taken && !held_count) {
            if (vq_arm(&queue) == 0)
                sleep_on(kick, "device", is_available);
            if (below(2))
                REQUIRE(vq_disarm(&queue) == 0);
            continue;
        }
        /* Some stay for the next round, as long as there is one. */
        const uint32_t keep = taken && below(2) ? below(held_count + 1) : 0;
        while (held_count > keep) {
            const uint32_t pick = below(held_count);
            staged[queue.staged_count++] = (struct vq_done){.head = held[pick], .written = 8};
            held[pick] = held[--held_count];
        }
        REQUIRE(vq_publish(&queue) >= 0);
        if (queue.notify)
            signal_side(call);
    }
}

/* ---- the driver ---- */

static uint16_t next_avail, next_used, published; /* packed: slots; split: running indices */
static uint16_t avail_wrap = AVAIL, used_wrap = 1, first_slot, first_flags, batch_slots;
static uint16_t lengths[SLOTS]; /* packed: descriptors of each chain */

static uint32_t place(uint32_t slot) { return ROOM + slot * 64; } /* table, request, answer */

static void put(struct descriptor descriptor)
{
    struct descriptor *entry = (struct descriptor *)(void *)memory + next_avail;
    const uint16_t flags = descriptor.fourth | avail_wrap;
    entry->address = descriptor.address;
    entry->length = descriptor.length;
    entry->third = descriptor.third;
    if (!batch_slots++) { /* the first one's flags come last */
        first_slot = next_avail;
        first_flags = flags;
    } else {
        STORE16(16u * next_avail + 14, flags);
    }
    if (++next_avail == SIZE) {
        next_avail = 0;
        avail_wrap ^= AVAIL | USED;
    }
}

static void offer(uint32_t slot, uint64_t number)
{
    unsigned char *room = memory + place(slot);
    const uint64_t request = GUEST + place(slot) + 32;
    const bool indirect = below(3) == 0;
    memcpy(room + 32, &number, 8);
    memset(room + 40, 0, 8);
    if (packed) {
        const uint16_t id = (uint16_t)slot;
        lengths[slot] = indirect ? 1 : 2;
        const struct descriptor table[2] = {{request, 8, 0, 0}, {request + 8, 8, 0, WRITE}};
        memcpy(room, table, sizeof(table));
        if (indirect) {
            put((struct descriptor){GUEST + place(slot), 32, id, INDIRECT});
        } else {
            put((struct descriptor){request, 8, id, NEXT});
            put((struct descriptor){request + 8, 8, id, WRITE});
        }
        return;
    }
    struct descriptor *ring = (struct descriptor *)(void *)memory + 2 * slot;
    const uint16_t second = indirect ? 1 : (uint16_t)(2 * slot + 1);
    const struct descriptor chain[2] = {{request, 8, NEXT, second}, {request + 8, 8, WRITE, 0}};
    memcpy(indirect ? (void *)room : (void *)ring, chain, sizeof(chain));
    if (indirect)
        ring[0] = (struct descriptor){GUEST + place(slot), 32, INDIRECT, 0};
    ((uint16_t *)(void *)(memory + DRIVER + 4))[next_avail++ % SIZE] = (uint16_t)(2 * slot);
}

/* Show the device what was offered; whether it wants a kick. */
static bool publish(void)
{
    if (!packed) {
        const uint16_t old = published;
        STORE16(DRIVER + 2, published = next_avail);
        FULL_BARRIER(); /* with the one between the device's wish and its last look */
        if (!event)
            return !(LOAD16(DEVICE) & 1);
        const uint16_t wish = LOAD16(DEVICE + 4 + 8 * SIZE);
        return (uint16_t)(published - wish - 1) < (uint16_t)(published - old);
    }
    STORE16(16u * first_slot + 14, first_flags);
    const uint16_t count = batch_slots;
    batch_slots = 0;
    FULL_BARRIER();
    const uint32_t wish = __atomic_load_n((uint32_t *)(void *)(memory + DEVICE), __ATOMIC_ACQUIRE);
    const uint32_t when = wish >> 16 & 3;
    if (when != 2)
        return when == 0;
    int32_t at = wish & 0x7FFF;
    if ((wish >> 15 & 1) != (avail_wrap == AVAIL))
        at -= SIZE;
    return (uint16_t)(next_avail - at - 1) < count;
}

static bool is_used(void)
{
    if (!packed)
        return LOAD16(DEVICE + 2) != next_used;
    const uint16_t flags = LOAD16(16u * next_used + 14);
    return !!(flags & AVAIL) == !!(flags & USED) && !!(flags & USED) == used_wrap;
}

/* Ask for a call at the next completion; whether there is one already. */
static bool arm(void)
{
    if (packed) {
        STORE16(DRIVER, next_used | used_wrap << 15);
        STORE16(DRIVER + 2, event ? 2 : 0);
    } else if (event) {
        STORE16(DRIVER + 4 + 2 * SIZE, next_used);
    } else {
        STORE16(DRIVER, 0);
    }
    FULL_BARRIER(); /* with the one between the device's used entries and its look at the wish */
    return is_used();
}

static void quiet(void)
{
    if (packed)
        STORE16(DRIVER + 2, 1);
    else if (!event)
        STORE16(DRIVER, 1);
}

static uint32_t collect(uint32_t *length)
{
    uint32_t slot;
    if (packed) {
        const struct descriptor *entry = (struct descriptor *)(void *)memory + next_used;
        slot = entry->third;
        *length = entry->length;
        REQUIRE(slot < SLOTS);
        next_used = (uint16_t)(next_used + lengths[slot]);
        if (next_used >= SIZE) {
            next_used = (uint16_t)(next_used - SIZE);
            used_wrap ^= 1;
        }
        return slot;
    }
    const uint32_t *used = (uint32_t *)(void *)(memory + DEVICE + 4) + 2 * (next_used++ % SIZE);
    slot = used[0] / 2;
    *length = used[1];
    REQUIRE(slot < SLOTS && used[0] % 2 == 0);
    return slot;
}

static bool has_returned(void)
{
    REQUIRE(waitpid(device, NULL, WNOHANG) == 0);
    return is_used();
}

static void drive(uint64_t chains)
{
    uint64_t numbers[SLOTS] = {0}, offered = 0, returned = 0, sleeps = 0, kicks = 0;
    uint32_t idle[SLOTS], idle_count = SLOTS;
    bool draining = false;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        idle[slot] = slot;
    while (returned < chains) {
        /* Now and then everything comes home. */
        draining = idle_count < SLOTS && (draining || !below(50));
        uint32_t count = draining ? 0 : 1 + below(SLOTS), added = 0;
        for (; count && idle_count && offered < chains; count--, added++) {
            const uint32_t pick = below(idle_count), slot = idle[pick];
            idle[pick] = idle[--idle_count];
            numbers[slot] = ++offered;
            offer(slot, offered);
        }
        if (added && publish()) {
            kicks++;
            signal_side(kick);
        }
        if (!is_used() && (draining || !idle_count || offered == chains)) {
            if (!arm()) {
                sleeps++;
                sleep_on(call, "driver", has_returned);
            }
            quiet();
        }
        while (is_used()) {
            uint32_t length;
            const uint32_t slot = collect(&length);
            uint64_t answer;
            memcpy(&answer, memory + place(slot) + 40, 8);
            REQUIRE(numbers[slot] && answer == ~numbers[slot] && length == 8);
            numbers[slot] = 0;
            idle[idle_count++] = slot;
            returned++;
        }
    }
    REQUIRE(offered == chains && idle_count == SLOTS);
    printf("%llu chains, none lost or repeated\n", (unsigned long long)chains);
    fprintf(stderr, "%llu sleeps of the driver, %llu kicks\n", (unsigned long long)sleeps,
            (unsigned long long)kicks);
}

int main(int count, char **arguments)
{
    REQUIRE(count == 4 || count == 5);
    packed = !strcmp(arguments[1], "packed");
    event = !strcmp(arguments[2], "event");
    const uint64_t chains = strtoull(arguments[3], NULL, 10);
    const uint64_t seed = count == 5 ? strtoull(arguments[4], NULL, 10) : 1;
    random_state = seed * 2654435761u + 88172645463325252u;
    const int fd = memfd_create("guest", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, MEMORY) == 0);
    kick = eventfd(0, 0);
    call = eventfd(0, 0);
    REQUIRE(kick >= 0 && call >= 0);
    const pid_t parent = getpid();
    device = fork();
    REQUIRE(device >= 0);
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(memory != MAP_FAILED);
    if (!device) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* the driver's end ends this process, too */
        if (getppid() == parent)
            serve();
        _Exit(0);
    }
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    drive(chains);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    fprintf(stderr, "%.1f s\n", (double)(ended.tv_sec - begun.tv_sec) +
            (double)(ended.tv_nsec - begun.tv_nsec) / 1e9);
    kill(device, SIGKILL);
    waitpid(device, NULL, 0);
    return 0;
}
