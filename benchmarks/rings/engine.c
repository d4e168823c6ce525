/* The C engine alone: take and complete block chains in one process without Python.
 *
 * engine LIBRARY [--regions=R] [--batch=B] [--packed] [--indirect] [--seconds=S | --chains=N]
 *
 * --seconds prints nanoseconds per chain, of the best sample of 2048 chains. Layout and loop are those
 * of peers/src/bin/ring.rs (512 entries, 128 chains, event index on, the driver wants no notification).
 * --chains takes and completes that many chains and prints nothing: guard.py counts the instructions
 * of `vq_cycle` over such a run. Packed rings need --chains: the driver must write them anew for every
 * pass, and that time is not the engine's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "virtqueue.h"

#define QUEUE 512u
#define CHAINS 128u
#define MAX_REGIONS 509u
#define REGION (2ull << 20)
#define STRIDE (4ull << 20)
#define AVAIL 0x4000u
#define USED 0x8000u
#define SAMPLE 2048u /* chains between two looks at the clock */

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define DESC_AVAIL (1u << 7)
#define DESC_USED (1u << 15)

struct descriptor {
    uint64_t guest;
    uint32_t length;
    uint16_t third, fourth; /* split: flags, next; packed: id, flags */
};

static struct gm_region regions[MAX_REGIONS];
static uint32_t by_user[MAX_REGIONS];
static uint32_t not_poisoned;
static uint8_t *memory;
static unsigned region_count = 2, batch = 32;
static int packed, indirect;
static int (*cycle)(struct vq_queue *);

static uint8_t *host(uint64_t guest)
{
    return memory + guest; /* one mapping holds all regions and the holes between them */
}

static void fail(const char *what)
{
    fprintf(stderr, "engine: %s\n", what);
    exit(1);
}

static void map_memory(struct gm_table *table)
{
    memory = mmap(NULL, region_count * STRIDE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("cannot map the memory");
    for (unsigned i = 0; i < region_count; i++) {
        regions[i] = (struct gm_region){
            .guest_address = i * STRIDE,
            .size = REGION,
            .user_address = 0x7000000000ull + i * STRIDE,
            .host_address = (uintptr_t)memory + i * STRIDE,
            .poison = (uintptr_t)&not_poisoned,
            .page_size = 4096,
        };
        by_user[i] = i;
    }
    *table = (struct gm_table){
        .magic = GM_TABLE_MAGIC,
        .abi = GM_ABI,
        .size = sizeof *table,
        .region_count = region_count,
        .regions = (uintptr_t)regions,
        .by_user = (uintptr_t)by_user,
        .window_base = (uintptr_t)memory,
        .window_size = region_count * STRIDE,
    };
}

/* Describe the three buffers of a chain in `entries`, and their flags in `flags`. */
static unsigned chain_of(unsigned chain, struct descriptor *entries, uint16_t *flags)
{
    const uint64_t others = region_count > 1 ? region_count - 1 : 1, first = region_count > 1;
    const uint64_t control = (first + 2 * chain % others) * STRIDE + 0xc0000 + chain * 4096;
    const uint64_t data = (first + (2 * chain + 1) % others) * STRIDE + 0x10000 + chain * 4096;

    entries[0] = (struct descriptor){control, 16, 0, 0};
    entries[1] = (struct descriptor){data, 4096, 0, 0};
    entries[2] = (struct descriptor){control + 32, 1, 0, 0};
    flags[0] = DESC_NEXT;
    flags[1] = DESC_NEXT | DESC_WRITE;
    flags[2] = DESC_WRITE;
    return 3;
}

static uint64_t table_of(unsigned chain)
{
    return STRIDE * (region_count > 1) + 0x180000 + chain * 64;
}

static void fill_split(void)
{
    struct descriptor *ring = (struct descriptor *)host(0), entries[3];
    uint16_t *avail = (uint16_t *)host(AVAIL), flags[3];

    for (unsigned chain = 0; chain < CHAINS; chain++) {
        struct descriptor *place = &ring[3 * chain];
        unsigned count = chain_of(chain, entries, flags), base = 3 * chain;
        if (indirect) {
            *place = (struct descriptor){table_of(chain), 48, DESC_INDIRECT, 0};
            place = (struct descriptor *)host(table_of(chain));
            base = 0;
        }
        for (unsigned i = 0; i < count; i++) {
            entries[i].third = flags[i];
            entries[i].fourth = (uint16_t)(base + i + 1);
            place[i] = entries[i];
        }
    }
    for (unsigned slot = 0; slot < QUEUE; slot++)
        avail[2 + slot] = (uint16_t)(slot % CHAINS * 3);
    avail[2 + QUEUE] = 0x8000; /* used_event */
}

/* Make `batch` chains available in a packed ring; bit 15 of the position `state` is the wrap counter. */
static void offer_packed(uint16_t *state, unsigned chain)
{
    struct descriptor *ring = (struct descriptor *)host(0), entries[3];
    uint16_t flags[3];
    unsigned position = *state & 0x7fff, wrap = *state >> 15;

    for (unsigned n = 0; n < batch; n++, chain = (chain + 1) % CHAINS) {
        unsigned count = chain_of(chain, entries, flags);
        if (indirect) {
            struct descriptor *place = (struct descriptor *)host(table_of(chain));
            for (unsigned i = 0; i < count; i++) {
                entries[i].fourth = flags[i] & DESC_WRITE;
                place[i] = entries[i];
            }
            entries[0] = (struct descriptor){table_of(chain), 48, 0, 0};
            flags[0] = DESC_INDIRECT;
            count = 1;
        }
        for (unsigned i = 0; i < count; i++) {
            entries[i].third = (uint16_t)chain;
            entries[i].fourth = (uint16_t)(flags[i] | (wrap ? DESC_AVAIL : DESC_USED));
            ring[position] = entries[i];
            if (++position == QUEUE) {
                position = 0;
                wrap ^= 1;
            }
        }
    }
    *state = (uint16_t)(position | wrap << 15);
}

static void take_batch(struct vq_queue *queue, unsigned expected)
{
    if (cycle(queue) != (int)expected)
        fail("a take returned the wrong number of chains");
}

static void run(struct vq_queue *queue, uint64_t turns)
{
    static uint16_t avail, position = 0x8000;
    static unsigned chain;

    for (uint64_t i = 0; i < turns; i++) {
        if (!packed) {
            avail = (uint16_t)(avail + batch);
            __atomic_store_n((uint16_t *)host(AVAIL + 2), avail, __ATOMIC_RELEASE);
            take_batch(queue, batch);
            continue;
        }
        offer_packed(&position, chain);
        chain = (chain + batch) % CHAINS;
        take_batch(queue, batch);
        /* Complete before `offer_packed` writes the same slots again. */
        queue->limit = 0;
        take_batch(queue, 0);
        queue->limit = batch;
    }
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

int main(int count, char **arguments)
{
    static const struct option names[] = {
        {"regions", required_argument, 0, 'r'}, {"batch", required_argument, 0, 'b'},
        {"packed", no_argument, 0, 'p'},        {"indirect", no_argument, 0, 'i'},
        {"seconds", required_argument, 0, 's'}, {"chains", required_argument, 0, 'c'},
        {0, 0, 0, 0},
    };
    static struct vq_record records[CHAINS];
    static struct vq_segment segments[4096];
    static struct vq_done done[CHAINS], staged[QUEUE];
    struct gm_table table;
    double seconds = 0.5;
    uint64_t chains = 0;
    int letter;

    while ((letter = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (letter) {
        case 'r': region_count = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'b': batch = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'p': packed = 1; break;
        case 'i': indirect = 1; break;
        case 's': seconds = strtod(optarg, NULL); break;
        case 'c': chains = strtoull(optarg, NULL, 0); break;
        default: return 2;
        }
    }
    if (optind + 1 != count || !region_count || region_count > MAX_REGIONS || !batch ||
        batch > CHAINS || (packed && !chains))
        return 2;
    void *library = dlopen(arguments[optind], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail(dlerror());
    int (*create)(struct vq_queue *) = (int (*)(struct vq_queue *))dlsym(library, "vq_create");
    int (*attach)(struct vq_queue *) = (int (*)(struct vq_queue *))dlsym(library, "vq_attach");
    cycle = (int (*)(struct vq_queue *))dlsym(library, "vq_cycle");
    if (!create || !attach || !cycle)
        fail("this library has no ring functions");

    map_memory(&table);
    struct vq_queue queue = {
        .magic = VQ_MAGIC,
        .abi = VQ_ABI,
        .size = sizeof queue,
        .queue_size = QUEUE,
        .features = VQ_EVENT_IDX | VQ_INDIRECT | VQ_STATUS_BYTE | (packed ? VQ_PACKED : 0),
        .descriptors = (uintptr_t)host(0),
        .driver = (uintptr_t)host(AVAIL),
        .device = (uintptr_t)host(USED),
        .table = (uintptr_t)&table,
        .records = (uintptr_t)records,
        .segments = (uintptr_t)segments,
        .done = (uintptr_t)done,
        .staged = (uintptr_t)staged,
        .record_capacity = CHAINS,
        .segment_capacity = 4096,
        .staged_capacity = QUEUE,
        .limit = batch,
        .avail_wrap = 1,
        .used_wrap = 1,
        .signalled_valid = 1,
    };
    if (packed)
        ((uint16_t *)host(AVAIL))[1] = 1; /* the driver wants no notifications */
    else
        fill_split();
    if (create(&queue) || attach(&queue))
        fail("cannot create the queue");
    if (chains) {
        run(&queue, chains / batch);
        return 0;
    }
    const uint64_t turns = batch < SAMPLE ? SAMPLE / batch : 1;
    const double begin = now();
    double best = 1e18;
    while (now() - begin < seconds * 1e9) {
        const double start = now();
        run(&queue, turns);
        const double spent = (now() - start) / (double)(turns * batch);
        if (spent < best)
            best = spent;
    }
    printf("%.2f\n", best);
    return 0;
}
