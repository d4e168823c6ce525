/*
 * The rare cases of walking and completing a chain, out of line: a buffer that breaks a rule, lies
 * in several regions or is mapped on demand, and the dirty log.  chain.h has the hot path.
 */
#include "chain.h"

/* A buffer that breaks a rule of its own. */
static enum outcome refuse(struct engine *engine, const struct building *building, uint64_t address,
                           uint32_t length, bool writable)
{
    if (!length)
        return fault(engine, VQ_REASON_ZERO_LENGTH, address);
    if (!writable && building->total != building->readable)
        return fault(engine, VQ_REASON_READABLE_AFTER_WRITABLE, address);
    return fault(engine, VQ_REASON_TOTAL_LENGTH, building->total + length);
}

/* What an address that cannot be resolved means for the chain. */
static enum outcome unresolved(struct engine *engine, enum resolution how,
                               const struct piece *piece, uint32_t access)
{
    if (how == UNRESOLVED_ADDRESS)
        return fault(engine, VQ_REASON_ADDRESS, piece->guest);
    if (how == UNRESOLVED_ACCESS)
        return fault(engine, VQ_REASON_ACCESS, piece->guest);
    engine->need_address = piece->guest;
    engine->need_length = piece->length;
    engine->need_access = access;
    return NEEDED;
}

static void add_piece(struct building *building, const struct piece *piece, bool writable)
{
    if (building->count < building->capacity)
        building->segments[building->count] = (struct vq_segment){
            .host = piece->host,
            .guest = piece->guest,
            .length = (uint32_t)piece->length,
            .flags = writable ? VQ_SEGMENT_WRITABLE : 0,
            .provision = piece->provision,
        };
    building->count++;
    building->readable_count += !writable;
    building->provided += piece->provision != 0;
    building->regions |= piece->mask;
    building->flags |= piece->outside ? REGION_OUTSIDE : 0;
}

void building_other(struct engine *engine, struct building *building, uint64_t address,
                    uint32_t length, bool writable)
{
    const uint32_t access = writable ? GM_WRITE : GM_READ;
    const uint64_t total = building->total + length; /* both were below 2^32 before */
    if (building->outcome != TAKEN)
        return;
    if (!length || (!writable && building->total != building->readable) || total > UINT32_MAX) {
        building->outcome = refuse(engine, building, address, length, writable);
        return;
    }
    building->total = total;
    if (!writable)
        building->readable = total;
    if (address + (length - 1) < address) {
        building->outcome = fault(engine, VQ_REASON_ADDRESS, address);
        return;
    }
    for (uint64_t left = length; left;) {
        struct piece piece;
        enum resolution how = memory_resolve(&engine->memory, address, left, access, &piece);
        if (how != RESOLVED) {
            building->outcome = unresolved(engine, how, &piece, access);
            return;
        }
        add_piece(building, &piece, writable);
        address += piece.length;
        left -= piece.length;
    }
}

enum outcome table_gather(struct engine *engine, uint64_t address, uint32_t length)
{
    unsigned char *copy = (unsigned char *)engine->raw;
    if (address + (length - 1) < address)
        return fault(engine, VQ_REASON_ADDRESS, address);
    for (uint64_t left = length; left;) {
        struct piece piece;
        enum resolution how = memory_resolve(&engine->memory, address, left, GM_READ, &piece);
        if (how != RESOLVED)
            return unresolved(engine, how, &piece, GM_READ);
        memcpy(copy, pointer(piece.host), piece.length);
        copy += piece.length;
        address += piece.length;
        left -= piece.length;
    }
    return TAKEN;
}

void building_gather(const struct vq_segment *segments, uint32_t readable_count,
                     uint32_t readable, bool external, uint64_t window_base,
                     struct vq_record *record)
{
    uint32_t header = 0, number = 0, offset = 0;
    memset(record->header, 0, VQ_HEADER_SIZE);
    while (number < readable_count && header < VQ_HEADER_SIZE) {
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
    record->readable = 0;
    record->readable_length = readable - header;
    if (header < VQ_HEADER_SIZE)
        record->flags |= VQ_SHORT_HEADER;
    if (external)
        return;
    if (record->readable_length)
        record->readable = segments[number].host + offset - window_base;
    if (number + 1 >= readable_count)
        record->flags |= VQ_READABLE_CONTIGUOUS;
}

void chain_keep_extras(struct engine *engine, const struct vq_segment *segments, uint32_t count,
                       uint32_t readable_count, struct chain *chain)
{
    struct vq_provision *provisions = pointer(engine->queue->provisions);
    uint32_t previous = NONE;
    for (uint32_t i = 0; i < count; i++) {
        const struct vq_segment *segment = &segments[i];
        const bool logged = i >= readable_count + INLINE_PIECES;
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
        if (previous == NONE)
            chain->extra = index;
        else
            engine->extras[previous].next = index;
        previous = index;
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

void log_ring_write(const struct engine *engine, uint64_t offset, uint64_t length)
{
    const struct vq_queue *queue = engine->queue;
    const uint64_t *pages = pointer(queue->log_pages);
    uint64_t position = queue->log_used + offset;
    if (likely(!pages)) {
        log_write(engine->log, position, length);
        return;
    }
    while (length) {
        const uint64_t inside = position % LOG_PAGE;
        const uint64_t step = length < LOG_PAGE - inside ? length : LOG_PAGE - inside;
        log_write(engine->log, pages[position / LOG_PAGE] + inside, step);
        position += step;
        length -= step;
    }
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

int taking_end(struct engine *engine, const struct taking *taking, enum outcome outcome,
               bool available)
{
    struct vq_queue *queue = engine->queue;
    const uint32_t count = taking->count;
    queue->count = count;
    queue->segment_count = taking->segment_count;
    engine->room += taking->room;
    engine->slots_out += taking->slots;
    if (count) {
        queue->taken += count;
        queue->in_flight += count;
        pin(taking->table, count);
        struct vq_counters *counters = pointer(queue->counters);
        if (counters) {
            counters->requests += count;
            counters->batches++;
            counters->bytes += taking->readable;
        }
    }
    switch (outcome) {
    case TAKEN:
    case NOTHING:
        queue->more = available ? VQ_MORE_AVAILABLE : 0;
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
        queue->more = count ? VQ_MORE_AVAILABLE : 0;
        if (count)
            return (int)count;
        /* Not even the whole array holds it: it has more pieces than any right chain. */
        return broken(engine, engine->fault, engine->fault_detail);
    case FAULT:
        break;
    }
    /* The chains before the wrong one are right; the reason is there to be seen at once. */
    queue->more = count ? VQ_MORE_AVAILABLE : 0;
    broken(engine, engine->fault, engine->fault_detail);
    return count ? (int)count : VQ_BROKEN;
}
