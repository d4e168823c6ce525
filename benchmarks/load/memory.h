/* Guest memory: the regions shared with the back-end, and places in them. */
#ifndef LOAD_MEMORY_H
#define LOAD_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#include "wire.h"

#define MAX_REGIONS 509

/* A piece of guest memory as both sides see it. */
struct place {
    uint8_t *host;
    uint64_t guest;
};

extern struct region regions[MAX_REGIONS];

/* Reserve bytes of a region and return their offset. Reserve everything before `memory_map`. */
uint64_t memory_reserve(unsigned region, uint64_t size, uint64_t alignment);

/* Map `count` regions, each as large as its reservations; `seal` them against resizing. */
void memory_map(unsigned count, bool seal);

struct place memory_at(unsigned region, uint64_t offset);

#endif
