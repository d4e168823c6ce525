/*
 * What an engine keeps to itself about one queue, and the steps that both ring formats share.
 *
 * A chain that was taken is a record of its own until it is completed: the guest addresses of its
 * writable pieces (for the dirty log), the host address of its status byte, the snapshot it was
 * resolved with (pinned by a count in its table) and the provisions it rests on.  Completion works
 * from that record alone: the arrays shared with the queue are overwritten by the next take, and
 * the memory table may have been replaced meanwhile.
 */
#ifndef VQ_ENGINE_H
#define VQ_ENGINE_H

#include "memory.h"

#define NONE UINT32_MAX
#define INLINE_PIECES 2u
#define HINTS 4u

/* Descriptor flags of both formats. */
#define DESCRIPTOR_NEXT 1u
#define DESCRIPTOR_WRITE 2u
#define DESCRIPTOR_INDIRECT 4u

enum chain_state {
    CHAIN_FREE,
    CHAIN_TAKEN,
    CHAIN_DONE, /* completed by the device; IN_ORDER may hold it back for an older one */
};

/* A taken chain, 64 bytes; split rings index them by head, packed rings by buffer id. */
struct chain {
    const struct gm_table *table;
    uint64_t status; /* host address of the last writable byte, or 0 */
    uint64_t guest[INLINE_PIECES];
    uint64_t regions; /* the set of regions it lies in */
    uint32_t length[INLINE_PIECES];
    uint32_t writable_length;
    uint32_t extra; /* further pieces, or NONE */
    uint16_t slots; /* descriptors of a packed ring that it covers */
    uint8_t state;
    uint8_t resubmitted;
    uint32_t written; /* once it is done and held back */
};

/* A piece that does not fit into struct chain; a list. */
struct extra_piece {
    uint64_t guest;
    uint32_t length;    /* 0: only here for its provision */
    uint32_t provision; /* 0, or 1 + index */
    uint32_t next;
};

/* A descriptor, copied and in native byte order. */
struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t link; /* split: next; packed: buffer id */
};

struct engine {
    struct vq_queue *queue;
    struct memory memory;
    const struct region *hints[HINTS + 1]; /* by position in the chain; the last for indirect tables */
    const struct gm_log *log;
    uint64_t ring_regions;  /* the set of regions that hold the ring */
    uint32_t guard_events;  /* survived bus errors that were looked at */
    bool swap;              /* the ring's byte order is not ours */
    uint32_t chain_limit;   /* descriptors of a chain, those of its indirect table included */
    uint16_t avail_index;   /* split: the driver's index when it was last loaded */
    uint32_t slots_out;     /* packed: descriptors covered by chains in flight */
    struct chain *chains;   /* [queue_size] */
    uint64_t *taken_at;     /* [queue_size] by head: the queue's `taken` when the chain was */
    struct vq_done *batch;  /* [queue_size] the completion at hand, when it is not done[0:count] as it stands */
    struct descriptor *raw; /* [chain_limit] an indirect table, or a packed chain */

    struct extra_piece *extras;
    uint32_t extra_free; /* the list of returned ones */
    uint32_t extra_used; /* those behind were never used */
    uint32_t room;       /* writable and provided pieces of all chains in flight */
    uint32_t room_limit;

    /* IN_ORDER: heads of what was taken, oldest first; a ring of queue_size. */
    uint16_t *order;
    uint32_t order_first;
    uint32_t order_count;

    /* In-flight region (inflight.c). */
    void *inflight;         /* NULL until recovered */
    uint32_t inflight_entries; /* of the region; one that was made for a larger ring has more */
    uint64_t counter;       /* of the next chain */
    uint16_t *entries;      /* [queue_size] packed: by buffer id, the chain's first entry */
    uint16_t *resubmit;     /* heads (packed: first entries) to be taken again, oldest first */
    uint32_t resubmit_next; /* the block's `resubmit` of them are left */
    struct descriptor *saved; /* packed: their descriptors, copied */
    uint32_t *saved_at;       /* packed: where in `saved` each begins */

    /* Why the take at hand stopped. */
    uint64_t fault_detail;
    uint64_t need_address;
    uint64_t need_length;
    uint32_t need_access;
    uint32_t fault;
};

/* What came of an attempt to take one chain. */
enum outcome {
    TAKEN,
    NOTHING, /* no chain is available */
    FAULT,   /* fault and fault_detail say why */
    NEEDED,  /* need_* say what */
    NO_ROOM, /* the rest of the segments array is too short */
    STALLED, /* no room for its record until others are completed */
};

static inline enum outcome fault(struct engine *engine, enum vq_reason reason, uint64_t detail)
{
    engine->fault = reason;
    engine->fault_detail = detail;
    return FAULT;
}

/* Whether the front-end has truncated what we keep records in: its dirty log or the in-flight region.
 * What is missing there cannot be made good. */
static inline bool records_poisoned(const struct engine *engine)
{
    const uint64_t log = engine->log ? engine->log->poison : 0;
    const uint64_t inflight = engine->queue->inflight_poison;
    return (log && load32(pointer(log))) || (inflight && load32(pointer(inflight)));
}

/*
 * The queue is broken for good.  Truncated memory reads as zeros, so when the ring was truncated
 * that explains whatever looks wrong in it.
 */
static inline int broken(struct engine *engine, uint32_t reason, uint64_t detail)
{
    if ((memory_poisoned(engine->memory.table) & engine->ring_regions) ||
        records_poisoned(engine))
        reason = VQ_REASON_TRUNCATED;
    engine->queue->reason = reason;
    engine->queue->detail = detail;
    return VQ_BROKEN;
}

/* The two formats: what queue.c and lifetime.c call. */
struct format {
    int (*take)(struct engine *engine);
    /* Return done[0:count] to the driver; 1 when it wants to be told. */
    int (*use)(struct engine *engine, const struct vq_done *done, uint32_t count);
    void (*retreat)(struct engine *engine, uint16_t head);
    int (*arm)(struct engine *engine);
    int (*disarm)(struct engine *engine);
    void (*quiet)(struct engine *engine); /* no kicks wanted, not even one */
    int (*ready)(struct engine *engine);
    int (*recover)(struct engine *engine);
};

extern const struct format split_format, packed_format;

static inline struct engine *engine_of(const struct vq_queue *queue)
{
    return pointer(queue->private);
}

static inline const struct format *format_of(const struct vq_queue *queue)
{
    return queue->features & VQ_PACKED ? &packed_format : &split_format;
}

/* Turn kicks off while we look at the ring; vq_arm turns them on (serve.c). */
void queue_quiet(struct vq_queue *queue);

/* The first half of vq_cycle: complete done[0:count].  How many, or VQ_USAGE. */
int queue_finish(struct vq_queue *queue);

/* Bus errors survived in this process, ever (guard.c). */
__attribute__((visibility("hidden")))
extern uint32_t guard_events;

#endif
