/*
 * In-flight regions (vhost-user specification, "Inflight I/O tracking"): memory shared with the
 * front-end that says which chains were taken and not yet used, so that a new process can take
 * them again.  The stores come in an order in which the death of the process between any two of
 * them loses no chain and completes none twice; inflight.c says why.
 *
 * The region is the front-end's to spoil: every index read from it is checked.
 */
#ifndef VQ_INFLIGHT_H
#define VQ_INFLIGHT_H

#include "engine.h"

/* A chain was fetched from the ring. */
void split_inflight_take(struct engine *engine, uint16_t head);
/* The latest chain was rewound: the ring still offers it. */
void split_inflight_give_back(struct engine *engine, uint16_t head);
/* The chain belongs to the batch that the used index is about to cover. */
void split_inflight_using(struct engine *engine, uint16_t head);
/* The used index, now `used`, covers done[0:count]. */
void split_inflight_used(struct engine *engine, const struct vq_done *done, uint32_t count,
                         uint16_t used);
/*
 * Adopt the queue's region.  Returns how many chains have to be taken again and lists them in
 * engine->resubmit (NULL when the region was new), or breaks the queue.
 */
int split_inflight_recover(struct engine *engine, uint16_t used);

/* The same for packed rings.  A chain is its descriptors as they were in the ring. */
int packed_inflight_take(struct engine *engine, const struct descriptor *chain, uint32_t count,
                         uint16_t *entry);
void packed_inflight_give_back(struct engine *engine, uint16_t entry);
/* The chain is about to be used; the ring's position will be (used, wrap). */
void packed_inflight_using(struct engine *engine, uint16_t entry, uint16_t used, uint8_t wrap);
void packed_inflight_used(struct engine *engine, uint16_t entry);
/* Sets the queue's position as well, when the region was in use. */
int packed_inflight_recover(struct engine *engine);

#endif
