/*
 * Adopting a snapshot's region table into the engine's compact copy, and the look-ups that are not
 * worth inlining: the IOTLB, memory mapped on demand, the dirty log.  memory.h has the hot path.
 */
#include "memory.h"

#include <stdlib.h>

#define MAX_SLOTS 4096u
#define SLOTS_PER_REGION 4u

/* Make room for `count` entries; what was there is lost. */
static int reserve(void **array, uint32_t *capacity, uint32_t count, size_t size)
{
    if (count <= *capacity)
        return 0;
    /* Aligned to cache lines, so that no region lies in two. */
    void *fresh = aligned_alloc(64, (count * size + 63) & ~(size_t)63);
    if (!fresh)
        return VQ_NO_MEMORY;
    free(*array);
    *array = fresh;
    *capacity = count;
    return 0;
}

static bool in_window(const struct gm_table *table, uint64_t host, uint64_t length)
{
    const uint64_t offset = host - table->window_base;
    return offset < table->window_size && length <= table->window_size - offset;
}

int memory_adopt(struct memory *memory, const struct gm_table *table)
{
    uint32_t count = table->region_count;
    if (count > UINT16_MAX)
        return VQ_ABI_ERROR;
    uint32_t slot_count = 1;
    while (slot_count < count * SLOTS_PER_REGION && slot_count < MAX_SLOTS)
        slot_count *= 2;
    /* Until all is in place this is a memory of no regions. */
    memory->count = memory->slot_count = 0;
    void *regions = memory->regions, *slots = memory->slots;
    int failed = reserve(&regions, &memory->capacity, count + 1, sizeof(struct region));
    memory->regions = regions;
    if (!failed)
        failed = reserve(&slots, &memory->slot_capacity, slot_count + 1, sizeof(uint16_t));
    memory->slots = slots;
    if (failed) {
        if (memory->regions)
            memory->regions[0] = (struct region){0};
        return failed;
    }

    const struct gm_region *source = pointer(table->regions);
    for (uint32_t i = 0; i < count; i++) {
        const bool mapped = source[i].host_address && !(source[i].flags & GM_REGION_ON_DEMAND);
        const uint64_t host = mapped ? source[i].host_address : 0;
        const bool inside = mapped && in_window(table, host, source[i].size);
        memory->regions[i] = (struct region){
            .start = source[i].guest_address,
            .size = source[i].size,
            .host = host,
            .bit = i % 64,
            .flags = (source[i].flags & GM_REGION_READ_ONLY) |
                     (mapped ? 0 : GM_REGION_ON_DEMAND) | (inside ? 0 : REGION_OUTSIDE),
        };
    }
    /* Hints point here while there is nothing better: it holds no address. */
    memory->regions[count] = (struct region){0};
    memory->count = count;

    /* The slots cover from the first region's start to the last one's last byte. */
    memory->base = count ? memory->regions[0].start : 0;
    memory->shift = 0;
    memory->slot_count = count ? slot_count : 0;
    if (count) {
        const struct region *last = &memory->regions[count - 1];
        uint64_t span = last->start + (last->size - 1) - memory->base;
        while ((span >> memory->shift) >= slot_count)
            memory->shift++;
        uint32_t index = 0;
        for (uint32_t slot = 0; slot < slot_count; slot++) {
            /* The slot's first byte, as a distance from the base: it cannot wrap within the span. */
            uint64_t distance = (uint64_t)slot << memory->shift;
            while (index < count && distance > span)
                index++;
            while (index < count && memory->regions[index].start - memory->base +
                                            (memory->regions[index].size - 1) <
                                        distance)
                index++;
            memory->slots[slot] = (uint16_t)index;
        }
        memory->slots[slot_count] = (uint16_t)count;
    }
    memory->table = table;
    memory->window_base = table->window_base;
    memory->window_size = table->window_size;
    return 0;
}

void memory_release(struct memory *memory)
{
    free(memory->regions);
    free(memory->slots);
    memory->regions = NULL;
    memory->slots = NULL;
    memory->table = NULL;
    memory->count = memory->capacity = memory->slot_count = memory->slot_capacity = 0;
}

/* The region that holds a front-end's virtual address, by the snapshot's own sorted index. */
static const struct region *find_user(const struct memory *memory, uint64_t user)
{
    const struct gm_region *regions = pointer(memory->table->regions);
    const uint32_t *by_user = pointer(memory->table->by_user);
    uint32_t low = 0, high = memory->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (regions[by_user[middle]].user_address <= user)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return NULL;
    uint32_t index = by_user[low - 1];
    return user - regions[index].user_address < regions[index].size ? &memory->regions[index] : NULL;
}

static const struct gm_iotlb_entry *find_iotlb(const struct gm_table *table, uint64_t iova)
{
    const struct gm_iotlb_entry *entries = pointer(table->iotlb);
    uint32_t low = 0, high = entries ? table->iotlb_count : 0;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (entries[middle].iova <= iova)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return NULL;
    const struct gm_iotlb_entry *entry = &entries[low - 1];
    return iova - entry->iova < entry->size ? entry : NULL;
}

/* The provision that holds `guest` and allows `access`, or NULL. */
static const struct vq_provision *find_provision(const struct memory *memory, uint64_t guest,
                                                 uint32_t access)
{
    for (uint32_t i = 0; i < memory->provision_capacity; i++) {
        const struct vq_provision *provision = &memory->provisions[i];
        if (provision->length && guest - provision->guest_address < provision->length &&
            (provision->access & access) == access)
            return provision;
    }
    return NULL;
}

/* No piece, but where the trouble lies. */
static enum resolution trouble(struct piece *piece, enum resolution how, uint64_t address,
                               uint64_t length)
{
    *piece = (struct piece){.guest = address, .length = length};
    return how;
}

enum resolution memory_resolve(const struct memory *memory, uint64_t address, uint64_t length,
                               uint32_t access, struct piece *piece)
{
    const struct region *region;
    uint64_t guest = address;
    if (memory->iommu) {
        const struct gm_iotlb_entry *entry = find_iotlb(memory->table, address);
        /* A grant that does not cover the access is a miss too: the front-end decides. */
        if (!entry || (entry->access & access) != access)
            return trouble(piece, UNRESOLVED_NEED, address, length);
        uint64_t offset = address - entry->iova;
        if (length > entry->size - offset)
            length = entry->size - offset;
        uint64_t user = entry->user_address + offset;
        region = find_user(memory, user);
        if (!region)
            return trouble(piece, UNRESOLVED_ADDRESS, user, length);
        const struct gm_region *regions = pointer(memory->table->regions);
        guest = region->start + (user - regions[region - memory->regions].user_address);
    } else {
        region = memory_find(memory, address);
        if (!region)
            return trouble(piece, UNRESOLVED_ADDRESS, address, length);
    }
    if ((access & GM_WRITE) && (region->flags & GM_REGION_READ_ONLY))
        return trouble(piece, UNRESOLVED_ACCESS, guest, length);
    uint64_t offset = guest - region->start;
    if (length > region->size - offset)
        length = region->size - offset;
    *piece = (struct piece){
        .host = region->host + offset,
        .guest = guest,
        .length = length,
        .mask = region_mask(region),
        .outside = region->flags & REGION_OUTSIDE,
    };
    if (region->host)
        return RESOLVED;

    const struct vq_provision *provision = find_provision(memory, guest, access);
    if (!provision)
        return trouble(piece, UNRESOLVED_NEED, guest, length);
    offset = guest - provision->guest_address;
    if (length > provision->length - offset)
        piece->length = provision->length - offset;
    piece->host = provision->host_address + offset;
    piece->provision = (uint64_t)(provision - memory->provisions) + 1;
    piece->outside = !in_window(memory->table, piece->host, piece->length);
    return RESOLVED;
}

uint64_t memory_poisoned(const struct gm_table *table)
{
    const struct gm_region *regions = pointer(table->regions);
    uint64_t mask = 0;
    for (uint32_t i = 0; i < table->region_count; i++)
        if (regions[i].poison && load32(pointer(regions[i].poison)))
            mask |= UINT64_C(1) << (i % 64);
    return mask;
}

uint64_t memory_mask(const struct memory *memory, uint64_t host, uint64_t length)
{
    uint64_t mask = 0;
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct region *region = &memory->regions[i];
        if (region->host && region->host < host + length && host < region->host + region->size)
            mask |= region_mask(region);
    }
    return mask;
}

void log_write(const struct gm_log *log, uint64_t guest, uint64_t length)
{
    if (!length)
        return;
    uint8_t *bitmap = pointer(log->bitmap);
    uint64_t last = (guest + (length - 1)) >> log->page_shift;
    for (uint64_t page = guest >> log->page_shift; page <= last; page++) {
        if (page / 8 >= log->bitmap_size)
            return;
        /* The front-end fetches and clears bytes or words of this bitmap meanwhile.  Release: who
         * sees the bit sees what was written to the page. */
        __atomic_fetch_or(&bitmap[page / 8], (uint8_t)(1u << (page % 8)), __ATOMIC_RELEASE);
    }
}
