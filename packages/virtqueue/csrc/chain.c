#include "chain.h"

enum outcome building_resolve(struct engine *engine, struct building *building, uint64_t address,
                              uint32_t length, bool writable)
{
    if (address + (length - 1) < address)
        return fault(engine, VQ_REASON_ADDRESS, address);
    const uint32_t access = writable ? GM_WRITE : GM_READ;
    uint64_t left = length;
    while (left) {
        struct piece piece;
        switch (memory_resolve(&engine->memory, address, left, access, &piece)) {
        case RESOLVED:
            break;
        case UNRESOLVED_NEED:
            engine->need_address = piece.guest;
            engine->need_length = piece.length;
            engine->need_access = access;
            return NEEDED;
        case UNRESOLVED_ADDRESS:
            return fault(engine, VQ_REASON_ADDRESS, piece.guest);
        case UNRESOLVED_ACCESS:
            return fault(engine, VQ_REASON_ACCESS, piece.guest);
        }
        building_piece(&engine->memory, building, piece.host, piece.guest, (uint32_t)piece.length,
                       writable, piece.provision);
        building->provided += piece.provision != 0;
        building->regions |= piece.mask;
        address += piece.length;
        left -= piece.length;
    }
    return TAKEN;
}

enum outcome table_gather(struct engine *engine, uint64_t address, uint32_t length)
{
    /* The pieces of the table are found as those of a buffer, in an array of their own. */
    unsigned char *copy = (unsigned char *)engine->raw;
    if (address + (length - 1) < address)
        return fault(engine, VQ_REASON_ADDRESS, address);
    uint64_t left = length;
    while (left) {
        struct piece piece;
        switch (memory_resolve(&engine->memory, address, left, GM_READ, &piece)) {
        case RESOLVED:
            break;
        case UNRESOLVED_NEED:
            engine->need_address = piece.guest;
            engine->need_length = piece.length;
            engine->need_access = GM_READ;
            return NEEDED;
        case UNRESOLVED_ADDRESS:
            return fault(engine, VQ_REASON_ADDRESS, piece.guest);
        case UNRESOLVED_ACCESS:
            return fault(engine, VQ_REASON_ACCESS, piece.guest);
        }
        memcpy(copy, pointer(piece.host), piece.length);
        copy += piece.length;
        address += piece.length;
        left -= piece.length;
    }
    return TAKEN;
}

void building_gather(const struct building *building, uint64_t window_base,
                     struct vq_record *record)
{
    const struct vq_segment *segments = building->segments;
    uint32_t header = 0, number = 0, offset = 0;
    memset(record->header, 0, VQ_HEADER_SIZE);
    while (number < building->readable_count && header < VQ_HEADER_SIZE) {
        const struct vq_segment *segment = &segments[number];
        offset = VQ_HEADER_SIZE - header;
        if (segment->length < offset)
            offset = segment->length;
        memcpy(record->header + header, pointer(segment->host), offset);
        header += offset;
        if (offset == segment->length) {
            number++;
            offset = 0;
        }
    }
    /* The rest begins in segment `number` at `offset`. */
    record->readable_length = (uint32_t)building->readable - header;
    if (building->outside)
        return;
    if (record->readable_length)
        record->readable = segments[number].host + offset - window_base;
    if (number + 1 >= building->readable_count)
        record->flags |= VQ_READABLE_CONTIGUOUS;
}

void chain_keep_extras(struct engine *engine, const struct building *building,
                       struct chain *chain)
{
    struct vq_provision *provisions = pointer(engine->queue->provisions);
    for (uint32_t i = 0; i < building->count; i++) {
        const struct vq_segment *segment = &building->segments[i];
        const bool logged = i >= building->readable_count + INLINE_PIECES;
        if (!logged && !segment->provision)
            continue;
        /* room_limit was checked, so there is one. */
        uint32_t index = engine->extra_free;
        if (index != NONE)
            engine->extra_free = engine->extras[index].next;
        else
            index = engine->extra_used++;
        engine->extras[index] = (struct extra_piece){
            .guest = segment->guest,
            .length = logged ? segment->length : 0,
            .provision = (uint32_t)segment->provision,
            .next = NONE,
        };
        if (segment->provision)
            provisions[segment->provision - 1].uses++;
        /* In the order of the pieces: what is logged are the first bytes. */
        if (chain->extra == NONE)
            chain->extra = index;
        else
            engine->extras[engine->extra_last].next = index;
        engine->extra_last = index;
    }
}

void chain_drop_extras(struct engine *engine, struct chain *chain)
{
    struct vq_provision *provisions = pointer(engine->queue->provisions);
    uint32_t index = chain->extra;
    while (index != NONE) {
        struct extra_piece *extra = &engine->extras[index];
        uint32_t next = extra->next;
        if (extra->provision)
            provisions[extra->provision - 1].uses--;
        extra->next = engine->extra_free;
        engine->extra_free = index;
        index = next;
    }
    chain->extra = NONE;
}

/* Log up to `left` bytes of a piece; returns how many bytes are left after it. */
static uint64_t log_piece(const struct gm_log *log, uint64_t guest, uint64_t length, uint64_t left)
{
    uint64_t step = length < left ? length : left;
    log_write(log, guest, step);
    return left - step;
}

void chain_log(const struct engine *engine, const struct chain *chain, const struct vq_done *done)
{
    const struct gm_log *log = engine->log;
    if (!log->enabled)
        return;
    const bool status = done->flags & VQ_DONE_STATUS;
    /* A request that failed may have written anywhere before it did. */
    const bool all = (done->flags & VQ_DONE_WROTE_ALL) || (status && done->status);
    uint64_t left = all ? chain->writable_length : done->written;
    uint64_t last = 0;
    for (uint32_t i = 0; i < INLINE_PIECES; i++) {
        left = log_piece(log, chain->guest[i], chain->length[i], left);
        if (chain->length[i])
            last = chain->guest[i] + chain->length[i] - 1;
    }
    for (uint32_t i = chain->extra; i != NONE; i = engine->extras[i].next) {
        const struct extra_piece *extra = &engine->extras[i];
        left = log_piece(log, extra->guest, extra->length, left);
        if (extra->length)
            last = extra->guest + extra->length - 1;
    }
    if (status)
        log_write(log, last, 1);
}

int take_result(struct engine *engine, uint32_t count, enum outcome outcome, bool available)
{
    struct vq_queue *queue = engine->queue;
    queue->count = count;
    if (count) {
        queue->taken += count;
        queue->in_flight += count;
        pin(engine->memory.table, count);
    }
    queue->more = available ? VQ_MORE_AVAILABLE : 0;
    switch (outcome) {
    case TAKEN:
    case NOTHING:
        return (int)count;
    case STALLED:
        queue->more = VQ_MORE_STALLED;
        return (int)count;
    case NEEDED:
        queue->more = count ? VQ_MORE_AVAILABLE : 0;
        if (count)
            return (int)count;
        queue->need_address = engine->need_address;
        queue->need_length = engine->need_length;
        queue->need_access = engine->need_access;
        return VQ_NEED;
    case NO_ROOM:
        queue->more = VQ_MORE_AVAILABLE;
        if (count)
            return (int)count;
        /* Not even the whole array holds it: it has more pieces than any right chain. */
        break;
    case FAULT:
        break;
    }
    queue->more = count ? VQ_MORE_AVAILABLE : 0;
    int result = broken(engine, engine->fault, engine->fault_detail);
    return count ? (int)count : result;
}
