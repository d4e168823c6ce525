/* The blocks that one queue may touch: the choice of the next, and with `verify` the data of each.
 *
 * Written data derives from the block and a count of the writes to it, its generation. While a request
 * is in flight no other request gets its block.
 */
#ifndef LOAD_BLOCKS_H
#define LOAD_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>

struct blocks {
    uint64_t count, first, stride; /* block n of the queue is block first + n * stride */
    uint32_t bytes;                /* of a block */
    bool sequential;
    uint64_t random, cursor;
    uint32_t *generations; /* NULL without verify; the top bit: in flight */
    uint64_t checked;      /* blocks read and compared */
};

uint64_t blocks_random(struct blocks *blocks);

/* Choose the next block that is not in flight. */
uint64_t blocks_choose(struct blocks *blocks);

/* Return the number of a block on the device. */
uint64_t blocks_number(const struct blocks *blocks, uint64_t block);

/* Take a block into flight: fill the data of a write, spoil the buffer of a read. Return the
 * generation that the block will have. */
uint32_t blocks_begin(struct blocks *blocks, uint64_t block, bool write, void *data);

/* Release a block, and check the data of a read; wrong data ends the program. */
void blocks_end(struct blocks *blocks, uint64_t block, uint32_t generation, bool write,
                const void *data);

#endif
