/*
 * The tables that guest_memory owns and this engine reads.
 *
 * guest_memory declares them in ctypes; this is their mirror.  The two packages are versioned
 * apart, so every structure that is handed over begins with a magic number, an ABI version and its
 * size, and the engine refuses another one.  Fields are in native byte order; addresses of host
 * memory are u64.  "Region" and "snapshot" are guest_memory's words.
 */
#ifndef GUEST_MEMORY_ABI_H
#define GUEST_MEMORY_ABI_H

#include <stdint.h>

#define GM_TABLE_MAGIC 0x4d454d47u /* "GMEM" */
#define GM_LOG_MAGIC 0x474f4c47u   /* "GLOG" */
#define GM_ABI 1u

#define GM_REGION_ON_DEMAND 1u
#define GM_REGION_READ_ONLY 2u
#define GM_TABLE_IOMMU 1u

#define GM_READ 1u
#define GM_WRITE 2u

/* One region, 64 bytes; an array is sorted by guest_address and does not overlap. */
struct gm_region {
    uint64_t guest_address;
    uint64_t size;
    uint64_t user_address; /* the front-end's virtual address */
    uint64_t host_address; /* 0: mapped on demand */
    uint64_t poison;       /* host address of a u32: not 0 after a bus error was survived here */
    uint32_t page_size;
    uint32_t flags; /* GM_REGION_* */
    uint64_t reserved[2];
};

/* One IOTLB entry, 32 bytes; an array is sorted by iova and does not overlap. */
struct gm_iotlb_entry {
    uint64_t iova;
    uint64_t size;
    uint64_t user_address;
    uint32_t access; /* GM_READ, GM_WRITE */
    uint32_t reserved;
};

/* One snapshot of guest memory, 80 bytes.  Immutable but for `pins`. */
struct gm_table {
    uint32_t magic;
    uint32_t abi;
    uint32_t size;
    uint32_t region_count;
    uint64_t regions; /* struct gm_region[region_count] */
    uint64_t by_user; /* uint32_t[region_count]: indices sorted by user_address */
    uint64_t iotlb;   /* struct gm_iotlb_entry[iotlb_count], or 0 */
    uint32_t iotlb_count;
    uint32_t flags; /* GM_TABLE_* */
    uint64_t window_base;
    uint64_t window_size;
    uint64_t pins; /* atomic: chains taken with this snapshot and not yet completed */
    uint64_t reserved;
};

/* The dirty log of one connection, 48 bytes.  Page p is bit p % 8 of byte p / 8. */
struct gm_log {
    uint32_t magic;
    uint32_t abi;
    uint32_t size;
    uint32_t page_shift;
    uint64_t bitmap;
    uint64_t bitmap_size; /* bytes */
    uint32_t enabled;     /* buffer writes are logged */
    uint32_t reserved;
    uint64_t poison; /* host address of a u32: not 0 after a page was found missing; or 0 */
};

#endif
