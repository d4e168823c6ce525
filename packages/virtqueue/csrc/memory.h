/*
 * Guest addresses to host addresses, dirty pages, poisoned regions.
 *
 * A queue keeps its own compact copy of the region table of the snapshot it takes from: 32 bytes a
 * region, and an index over the address space that leads to a region in one step however many there
 * are.  Guest memory reads and writes that another party sees go through the accessors here, so
 * that the compiler can neither repeat nor split them.
 */
#ifndef VQ_MEMORY_H
#define VQ_MEMORY_H

#include <stdbool.h>
#include <string.h>

#include "virtqueue.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define ALWAYS_INLINE inline __attribute__((always_inline))

struct region {
    uint64_t start; /* guest address */
    uint64_t size;
    uint64_t host;  /* 0: mapped on demand */
    uint32_t flags; /* GM_REGION_*, REGION_OUTSIDE */
    uint32_t bit;   /* in sets of regions: its number % 64 */
};

#define REGION_OUTSIDE (1u << 31) /* not, or not wholly, inside the window */

struct memory {
    const struct gm_table *table;
    struct region *regions;
    uint32_t count;
    uint32_t capacity;
    /* slots[i] is the first region that ends after base + (i << shift); slots[slot_count] ends it. */
    uint16_t *slots;
    uint64_t base;
    uint32_t shift;
    uint32_t slot_count;
    uint32_t slot_capacity;
    uint64_t window_base; /* the snapshot's flat window; records count from here */
    uint64_t window_size;
    const struct vq_provision *provisions;
    uint32_t provision_capacity;
    bool iommu;
};

/* One contiguous piece that an address was resolved to. */
struct piece {
    uint64_t host;
    uint64_t guest;
    uint64_t length;
    uint64_t provision; /* 0, or 1 + index */
    uint64_t mask;      /* its region's */
    bool outside;       /* not inside the window */
};

enum resolution {
    RESOLVED,
    UNRESOLVED_NEED,    /* has to be provided: an IOTLB miss, or memory mapped on demand */
    UNRESOLVED_ADDRESS, /* in no region */
    UNRESOLVED_ACCESS,  /* there, but not for this access */
};

/* Adopt a snapshot whose magic, version and size were checked.  0, or VQ_NO_MEMORY. */
int memory_adopt(struct memory *memory, const struct gm_table *table);
void memory_release(struct memory *memory);

/* A region that holds no address: what a hint is while there is nothing better. */
static inline const struct region *memory_nowhere(const struct memory *memory)
{
    return &memory->regions[memory->count];
}

/*
 * Resolve the start of [address, address + length): an IOVA when the queue is behind an IOMMU, a
 * guest address otherwise.  The piece ends where the region, the IOTLB entry or the provision ends.
 * length is not 0 and address + length does not wrap.  When it cannot be resolved, piece->guest is
 * the address that is wrong or needed (an IOVA for an IOTLB miss, a guest address for memory that
 * is mapped on demand) and piece->length the bytes needed there.
 */
enum resolution memory_resolve(const struct memory *memory, uint64_t address, uint64_t length,
                               uint32_t access, struct piece *piece);

/* The regions of a snapshot in which a bus error was survived. */
uint64_t memory_poisoned(const struct gm_table *table);

/* The regions that hold [host, host + length). */
uint64_t memory_mask(const struct memory *memory, uint64_t host, uint64_t length);

/* Bytes that a bit of the dirty log stands for. */
#define LOG_PAGE UINT64_C(4096)

/* Mark the pages of [guest, guest + length) dirty.  Pages that the bitmap does not cover have no
 * bit. */
void log_write(const struct gm_log *log, uint64_t guest, uint64_t length);

static inline uint64_t region_mask(const struct region *region)
{
    return UINT64_C(1) << region->bit;
}

/* The region that holds `guest`, or NULL. */
static inline const struct region *memory_find(const struct memory *memory, uint64_t guest)
{
    uint64_t slot = (guest - memory->base) >> memory->shift;
    /* An address below the base wraps to a slot far behind the last. */
    if (unlikely(slot >= memory->slot_count))
        return NULL;
    uint32_t low = memory->slots[slot];
    uint32_t high = memory->slots[slot + 1];
    /* Regions low..high may hold it; most layouts leave one or two. */
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        const struct region *region = &memory->regions[middle];
        if (guest - region->start >= region->size && guest >= region->start)
            low = middle + 1;
        else
            high = middle;
    }
    if (unlikely(low >= memory->count))
        return NULL;
    const struct region *region = &memory->regions[low];
    return guest - region->start < region->size ? region : NULL;
}

/*
 * The region that holds `guest`, or NULL when there is none or an IOMMU has the say.  hints[place] is
 * the region that held the descriptor at this place of the chain before; hints[0] that of this chain's
 * header, which often holds its status too.
 */
static ALWAYS_INLINE const struct region *memory_hinted(const struct memory *memory,
                                                        const struct region **hints,
                                                        uint32_t place, uint64_t guest)
{
    const struct region *region = hints[place];
    if (likely(guest - region->start < region->size))
        return region;
    region = hints[0];
    if (guest - region->start >= region->size) {
        if (memory->iommu)
            return NULL;
        region = memory_find(memory, guest);
        if (unlikely(!region))
            return NULL;
    }
    return hints[place] = region;
}

/* The common case of memory_resolve for reading: no IOMMU, and everything inside one mapped region.
 * Returns the region, or NULL when the long way has to be taken. */
static ALWAYS_INLINE const struct region *memory_direct(const struct memory *memory,
                                                        const struct region **hints,
                                                        uint32_t place, uint64_t guest,
                                                        uint64_t length)
{
    const struct region *region = memory_hinted(memory, hints, place, guest);
    if (unlikely(!region || length > region->size - (guest - region->start) ||
                 (region->flags & GM_REGION_ON_DEMAND)))
        return NULL;
    return region;
}

/* ---- accesses that another party sees ---- */

static inline uint16_t load16(const void *address)
{
    return __atomic_load_n((const uint16_t *)address, __ATOMIC_RELAXED);
}

static inline uint32_t load32(const void *address)
{
    return __atomic_load_n((const uint32_t *)address, __ATOMIC_RELAXED);
}

static inline uint64_t load64(const void *address)
{
    return __atomic_load_n((const uint64_t *)address, __ATOMIC_RELAXED);
}

static inline uint16_t load16_acquire(const void *address)
{
    return __atomic_load_n((const uint16_t *)address, __ATOMIC_ACQUIRE);
}

static inline void store8(void *address, uint8_t value)
{
    __atomic_store_n((uint8_t *)address, value, __ATOMIC_RELAXED);
}

static inline void store16(void *address, uint16_t value)
{
    __atomic_store_n((uint16_t *)address, value, __ATOMIC_RELAXED);
}

static inline void store16_release(void *address, uint16_t value)
{
    __atomic_store_n((uint16_t *)address, value, __ATOMIC_RELEASE);
}

static inline void store32(void *address, uint32_t value)
{
    __atomic_store_n((uint32_t *)address, value, __ATOMIC_RELAXED);
}

static inline void store64(void *address, uint64_t value)
{
    __atomic_store_n((uint64_t *)address, value, __ATOMIC_RELAXED);
}

static inline void full_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* A host address as the integer it travels as, made a pointer again. */
static inline void *pointer(uint64_t address) { return (void *)(uintptr_t)address; }

#endif
