#include "blocks.h"

#include <string.h>

#include "wire.h"

#define IN_FLIGHT 0x80000000u

uint64_t blocks_random(struct blocks *blocks)
{
    uint64_t x = blocks->random;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return blocks->random = x;
}

uint64_t blocks_choose(struct blocks *blocks)
{
    for (;;) {
        uint64_t choice =
            (blocks->sequential ? blocks->cursor++ : blocks_random(blocks)) % blocks->count;
        if (!blocks->generations || !(blocks->generations[choice] & IN_FLIGHT))
            return choice;
    }
}

uint64_t blocks_number(const struct blocks *blocks, uint64_t block)
{
    return blocks->first + block * blocks->stride;
}

/* Return the word at `index` of a block after its write number `generation`. */
static uint64_t word_at(uint64_t number, uint32_t generation, uint64_t index)
{
    uint64_t x = (number * 0x9e3779b97f4a7c15ull) ^ ((uint64_t)generation << 32) ^ index;

    x *= 0xd6e8feb86659fd93ull;
    return x ^ x >> 32;
}

uint32_t blocks_begin(struct blocks *blocks, uint64_t block, bool write, void *data)
{
    uint64_t number = blocks_number(blocks, block), *words = data;

    if (!blocks->generations)
        return 0;
    uint32_t generation = blocks->generations[block];
    blocks->generations[block] |= IN_FLIGHT;
    if (!write) {
        memset(data, 0xa5, blocks->bytes);
        return generation;
    }
    generation = (generation + 1) & ~IN_FLIGHT;
    for (uint32_t i = 0; i < blocks->bytes / 8; i++)
        words[i] = word_at(number, generation, i);
    return generation;
}

void blocks_end(struct blocks *blocks, uint64_t block, uint32_t generation, bool write,
                const void *data)
{
    uint64_t number = blocks_number(blocks, block);
    const uint64_t *words = data;

    if (!blocks->generations)
        return;
    blocks->generations[block] = generation;
    if (write || !generation)
        return; /* no write of ours came before this read: the content is unknown */
    for (uint32_t i = 0; i < blocks->bytes / 8; i++)
        if (words[i] != word_at(number, generation, i))
            die(EXIT_DATA, "block %llu, word %u: %#llx instead of %#llx (write %u)",
                (unsigned long long)number, i, (unsigned long long)words[i],
                (unsigned long long)word_at(number, generation, i), generation);
    blocks->checked++;
}
