/* Guest memory: regions that are shared with the back-end, and where things lie in them. */
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

/* Reserve bytes of a region; the offset. All is reserved before anything is mapped. */
uint64_t memory_reserve(unsigned region, uint64_t size, uint64_t alignment);

/* Make `count` regions of what was reserved in them; `seal` them against resizing. */
void memory_map(unsigned count, bool seal);

struct place memory_at(unsigned region, uint64_t offset);

#endif
