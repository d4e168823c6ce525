/*
 * A hostile driver for the C engine, for libFuzzer with ASan and UBSan.
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DVQ_ROOM=16 \
 *       -I $CSRC fuzz_ring.c $CSRC/?*.c
 *
 * The input chooses a ring, lays out guest memory, and then plays both sides: it writes rings,
 * descriptors and tables, right and wrong ones, and makes the device's calls.  Every region is a
 * heap block of its own, so a read or write outside of it is seen.  After each call the results are
 * checked against what no driver may bring about.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtqueue.h"

#define REGIONS 4u
#define REGION_SIZE 8192u
#define STRIDE UINT64_C(0x10000)
#define BATCH 16u
#define SEGMENTS 64u
#define PROVISIONS 4u
#define RING_SIZE_MAX 64u
#define DRIVER_OFFSET 2048u
#define DEVICE_OFFSET 4096u
#define FREE_OFFSET 6144u

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

struct input {
    const uint8_t *data;
    size_t left;
};

static uint32_t take_bytes(struct input *input, uint32_t count)
{
    uint32_t value = 0;
    while (count-- && input->left) {
        value = value << 8 | *input->data++;
        input->left--;
    }
    return value;
}

struct world {
    unsigned char *memory[REGIONS];
    struct gm_region regions[REGIONS];
    struct gm_iotlb_entry iotlb[REGIONS];
    uint32_t by_user[REGIONS], poison[REGIONS];
    struct gm_table table, other;
    struct gm_log log;
    uint8_t bitmap[64];
    struct vq_queue queue;
    struct vq_record records[BATCH];
    struct vq_segment segments[SEGMENTS];
    struct vq_done done[BATCH], staged[RING_SIZE_MAX];
    struct vq_provision provisions[PROVISIONS];
    uint64_t inflight[(32 + 32 * RING_SIZE_MAX) / 8];
    uint16_t held[RING_SIZE_MAX]; /* heads taken and kept */
    uint32_t held_count;
};

static void lay_out(struct world *world, struct input *input)
{
    const uint32_t kinds = take_bytes(input, 1);
    unsigned char *base = NULL;
    for (uint32_t i = 0; i < REGIONS; i++) {
        world->memory[i] = calloc(1, REGION_SIZE);
        if (i == 1)
            base = world->memory[i];
        world->by_user[i] = REGIONS - 1 - i;
        world->regions[i] = (struct gm_region){
            /* Regions 1 and 2 touch in guest addresses; there is a hole before 3. */
            .guest_address = STRIDE + (i < 3 ? i * REGION_SIZE : 4 * REGION_SIZE),
            .size = REGION_SIZE,
            .user_address = STRIDE * 16 + (REGIONS - i) * STRIDE,
            .host_address = (uintptr_t)world->memory[i],
            .poison = (uintptr_t)&world->poison[i],
            .page_size = 4096,
        };
        world->iotlb[i] = (struct gm_iotlb_entry){
            .iova = world->regions[i].guest_address,
            .size = REGION_SIZE / 2 + (i & 1) * REGION_SIZE / 2,
            .user_address = world->regions[i].user_address,
            .access = i == 2 ? 1 : 3,
        };
    }
    if (kinds & 1)
        world->regions[2].flags |= GM_REGION_READ_ONLY;
    if (kinds & 2) {
        world->regions[3].flags |= GM_REGION_ON_DEMAND;
        world->regions[3].host_address = 0;
    }
    const struct gm_table table = {
        .magic = GM_TABLE_MAGIC,
        .abi = GM_ABI,
        .size = sizeof(table),
        .region_count = REGIONS,
        .regions = (uintptr_t)world->regions,
        .by_user = (uintptr_t)world->by_user,
        .window_base = (uintptr_t)base,
        .window_size = kinds & 4 ? REGION_SIZE : 0,
    };
    world->table = world->other = table;
    world->log = (struct gm_log){
        .magic = GM_LOG_MAGIC,
        .abi = GM_ABI,
        .size = sizeof(world->log),
        .page_shift = 12,
        .bitmap = (uintptr_t)world->bitmap,
        .bitmap_size = kinds & 8 ? sizeof(world->bitmap) : 3,
        .enabled = 1,
    };
}

static bool set_up(struct world *world, struct input *input)
{
    const uint32_t features = take_bytes(input, 1) & 0xff, sizes = take_bytes(input, 1);
    const bool packed = features & VQ_PACKED;
    uint32_t size = 1u << (sizes & 3) << ((sizes >> 2) % 4);
    if (packed)
        size = 1 + sizes % RING_SIZE_MAX;
    if (size > RING_SIZE_MAX)
        size = RING_SIZE_MAX;
    struct vq_queue *queue = &world->queue;
    *queue = (struct vq_queue){
        .magic = VQ_MAGIC,
        .abi = VQ_ABI,
        .size = sizeof(*queue),
        .queue_size = size,
        .features = packed ? features & ~VQ_BIG_ENDIAN : features,
        .records = (uintptr_t)world->records,
        .segments = (uintptr_t)world->segments,
        .done = (uintptr_t)world->done,
        .staged = (uintptr_t)world->staged,
        .provisions = (uintptr_t)world->provisions,
        .record_capacity = BATCH,
        .segment_capacity = SEGMENTS,
        .staged_capacity = RING_SIZE_MAX,
        .provision_capacity = PROVISIONS,
        .descriptors = (uintptr_t)world->memory[0],
        .driver = (uintptr_t)world->memory[0] + DRIVER_OFFSET,
        .device = (uintptr_t)world->memory[0] + DEVICE_OFFSET,
        .table = (uintptr_t)&world->table,
        .log = sizes & 64 ? (uintptr_t)&world->log : 0,
        .log_used = STRIDE + DEVICE_OFFSET,
        .avail_wrap = 1,
        .used_wrap = 1,
    };
    if (features & VQ_IOMMU) {
        world->table.flags = world->other.flags = GM_TABLE_IOMMU;
        world->table.iotlb = world->other.iotlb = (uintptr_t)world->iotlb;
        world->table.iotlb_count = world->other.iotlb_count = REGIONS;
    }
    REQUIRE(vq_create(queue) == 0);
    REQUIRE(vq_attach(queue) == 0);
    if (sizes & 128) {
        queue->inflight = (uintptr_t)world->inflight;
        queue->inflight_size = sizeof(world->inflight);
        if (take_bytes(input, 1) & 1)
            for (size_t i = 0; i < sizeof(world->inflight) / 8; i++)
                world->inflight[i] = (uint64_t)take_bytes(input, 2);
        vq_recover(queue);
    }
    return true;
}

static void check_batch(const struct world *world, int result)
{
    const struct vq_queue *queue = &world->queue;
    if (result < 0) {
        REQUIRE(result == VQ_BROKEN || result == VQ_NEED);
        REQUIRE(result != VQ_BROKEN || queue->reason);
        REQUIRE(result != VQ_NEED || (queue->need_length && queue->need_access));
        REQUIRE(queue->count == 0);
        return;
    }
    REQUIRE((uint32_t)result == queue->count && queue->count <= queue->limit);
    REQUIRE(queue->in_flight <= queue->queue_size);
    uint32_t segments = 0;
    for (uint32_t i = 0; i < queue->count; i++) {
        const struct vq_record *record = &world->records[i];
        REQUIRE(record->head < queue->queue_size);
        REQUIRE(record->first_segment == segments);
        segments += record->segment_count;
        REQUIRE(segments <= SEGMENTS);
        uint64_t readable = 0, writable = 0;
        for (uint32_t j = record->first_segment; j < segments; j++) {
            const struct vq_segment *segment = &world->segments[j];
            REQUIRE(segment->length);
            if (segment->flags & VQ_SEGMENT_WRITABLE) {
                writable += segment->length;
            } else {
                REQUIRE(!writable);
                readable += segment->length;
            }
            bool inside = false;
            for (uint32_t k = 0; k < REGIONS; k++) {
                const uint64_t start = (uintptr_t)world->memory[k];
                inside |= segment->host >= start &&
                          segment->host + segment->length <= start + REGION_SIZE;
            }
            REQUIRE(inside);
            REQUIRE(!segment->provision || world->provisions[segment->provision - 1].uses);
        }
        REQUIRE(writable == record->writable_length);
        REQUIRE(readable == record->readable_length + (readable < 16 ? readable : 16));
        REQUIRE(world->done[i].head == record->head && world->done[i].written == writable);
        if (queue->features & VQ_STATUS_BYTE)
            REQUIRE(writable);
    }
    REQUIRE(segments == queue->segment_count);
}

/* A descriptor that may be right: mostly inside the regions, mostly short. */
static void write_descriptor(struct world *world, struct input *input, unsigned char *at)
{
    const uint32_t choice = take_bytes(input, 1), where = take_bytes(input, 2);
    uint64_t address = STRIDE + where;
    uint32_t length = take_bytes(input, 1);
    uint16_t flags = (uint16_t)(choice & 7), link = (uint16_t)(take_bytes(input, 1) % 72);
    if ((choice >> 3) % 8 == 0)
        length = take_bytes(input, 4);
    if ((choice >> 3) % 8 == 1)
        address = UINT64_MAX - take_bytes(input, 2);
    if ((choice >> 3) % 8 == 2)
        length = 16 * (length % 70);
    if (world->queue.features & VQ_PACKED) {
        flags |= (uint16_t)(choice & 64 ? 1u << 7 : 1u << 15);
        memcpy(at + 12, &link, 2);
        memcpy(at + 14, &flags, 2);
    } else {
        if (world->queue.features & VQ_BIG_ENDIAN) {
            address = __builtin_bswap64(address);
            length = __builtin_bswap32(length);
            flags = __builtin_bswap16(flags);
            link = __builtin_bswap16(link);
        }
        memcpy(at + 12, &flags, 2);
        memcpy(at + 14, &link, 2);
    }
    memcpy(at, &address, 8);
    memcpy(at + 8, &length, 4);
}

static void drive(struct world *world, struct input *input, uint32_t choice)
{
    struct vq_queue *queue = &world->queue;
    unsigned char *ring = world->memory[0];
    const uint32_t size = queue->queue_size;
    switch (choice % 5) {
    case 0:
        write_descriptor(world, input, ring + 16 * (take_bytes(input, 1) % size));
        break;
    case 1: /* an indirect table, in any region */
        write_descriptor(world, input,
                         world->memory[choice / 5 % REGIONS] + FREE_OFFSET +
                             16 * (take_bytes(input, 1) % 64));
        break;
    case 2: { /* offer a head the right way */
        uint16_t index, head = (uint16_t)(take_bytes(input, 1) % (size + 1));
        memcpy(&index, ring + DRIVER_OFFSET + 2, 2);
        const bool swap = queue->features & VQ_BIG_ENDIAN;
        index = swap ? __builtin_bswap16(index) : index;
        head = swap ? __builtin_bswap16(head) : head;
        if (!(queue->features & VQ_PACKED))
            memcpy(ring + DRIVER_OFFSET + 4 + 2 * (index % size), &head, 2);
        index++;
        index = swap ? __builtin_bswap16(index) : index;
        memcpy(ring + DRIVER_OFFSET + 2, &index, 2);
        break;
    }
    case 3: /* anything anywhere */
        ring[take_bytes(input, 2) % REGION_SIZE] = (unsigned char)take_bytes(input, 1);
        break;
    case 4: /* provide what is needed */
        for (uint32_t i = 0; i < PROVISIONS; i++) {
            struct vq_provision *provision = &world->provisions[i];
            if (provision->uses)
                continue;
            const uint32_t offset = take_bytes(input, 1) % 2 * 4096;
            *provision = (struct vq_provision){
                .guest_address = world->regions[3].guest_address + offset,
                .length = 4096,
                .host_address = (uintptr_t)world->memory[3] + offset,
                .access = 1 + take_bytes(input, 1) % 3,
            };
            break;
        }
        break;
    }
}

static void hold_batch(struct world *world)
{
    for (uint32_t i = 0; i < world->queue.count; i++)
        if (world->held_count < RING_SIZE_MAX)
            world->held[world->held_count++] = world->done[i].head;
}

static void serve(struct world *world, struct input *input, uint32_t choice)
{
    struct vq_queue *queue = &world->queue;
    queue->limit = take_bytes(input, 1) % (BATCH + 1);
    const uint32_t before = queue->in_flight;
    switch (choice % 8) {
    case 0:
    case 1:
        hold_batch(world);
        check_batch(world, vq_take(queue));
        break;
    case 2: {
        for (uint32_t i = 0; i < queue->count; i++)
            if (take_bytes(input, 1) & 1)
                world->done[i].flags |= (uint8_t)(take_bytes(input, 1) & 7);
        for (uint32_t i = 0; i < queue->count; i++)
            if (world->done[i].flags & VQ_DONE_KEEP && world->held_count < RING_SIZE_MAX)
                world->held[world->held_count++] = world->done[i].head;
        const int result = vq_cycle(queue);
        if (result != VQ_USAGE)
            check_batch(world, result);
        break;
    }
    case 3: { /* complete what was held, in another order, sometimes what is not in flight */
        uint32_t count = 0;
        while (world->held_count && count < queue->limit && count < RING_SIZE_MAX) {
            const uint32_t which = take_bytes(input, 1) % world->held_count;
            world->staged[count++] = (struct vq_done){
                .head = world->held[which],
                .status = (uint8_t)take_bytes(input, 1),
                .flags = (uint8_t)(take_bytes(input, 1) & 5),
            };
            world->held[which] = world->held[--world->held_count];
        }
        if (choice & 64 && count < RING_SIZE_MAX)
            world->staged[count++].head = (uint16_t)take_bytes(input, 2);
        queue->staged_count = count;
        const int result = vq_publish(queue);
        REQUIRE(result == VQ_USAGE || (uint32_t)result <= count);
        REQUIRE(result != VQ_USAGE || queue->in_flight == before);
        queue->staged_count = 0;
        break;
    }
    case 4: {
        if (choice & 8) { /* undo the takes of what is held or in the batch, or of anything */
            uint16_t heads[2 * RING_SIZE_MAX];
            uint32_t count = 0;
            while (count < world->held_count && count < queue->limit) {
                heads[count] = world->held[count];
                count++;
            }
            for (uint32_t i = 0; i < queue->count && count < RING_SIZE_MAX; i++)
                if (take_bytes(input, 1) & 1)
                    heads[count++] = world->done[i].head;
            if (choice & 16)
                heads[count++] = (uint16_t)take_bytes(input, 1);
            const uint64_t taken = queue->taken;
            const int result = vq_untake(queue, heads, count);
            REQUIRE(result == VQ_USAGE || queue->in_flight + (uint32_t)result == before);
            REQUIRE(result == VQ_USAGE || queue->taken + (uint32_t)result == taken);
            REQUIRE(result != VQ_USAGE || queue->in_flight == before);
            break;
        }
        const int result = vq_rewind(queue);
        REQUIRE(result == VQ_USAGE || queue->in_flight + (uint32_t)result == before);
        break;
    }
    case 5:
        vq_arm(queue);
        vq_ready(queue);
        break;
    case 6:
        vq_disarm(queue);
        break;
    case 7: /* another snapshot of the same regions, or a survived bus error */
        if ((choice & 0xf8) == 0xf8)
            world->poison[choice >> 3 & 3] = 1;
        else
            queue->table ^= (uintptr_t)&world->table ^ (uintptr_t)&world->other;
        vq_attach(queue);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct world *world = calloc(1, sizeof(*world));
    lay_out(world, &input);
    if (set_up(world, &input)) {
        while (input.left) {
            const uint32_t choice = take_bytes(&input, 1);
            if (choice & 1)
                drive(world, &input, choice >> 1);
            else
                serve(world, &input, choice >> 1);
        }
        vq_close(&world->queue);
        REQUIRE(world->table.pins == 0 && world->other.pins == 0);
        for (uint32_t i = 0; i < PROVISIONS; i++)
            REQUIRE(world->provisions[i].uses == 0);
    }
    for (uint32_t i = 0; i < REGIONS; i++)
        free(world->memory[i]);
    free(world);
    return 0;
}
