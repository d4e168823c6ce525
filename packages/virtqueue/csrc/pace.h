/*
 * How many requests to take at once.
 *
 * Few: the driver has the first back and brings more while the next are served, where in large
 * batches the two take turns at being idle.  But each return may wake the driver, and where it shares
 * our processor, or there are more threads than processors, that costs more than it gains.  So some
 * numbers are tried now and then, and the one with which a request takes least time is kept.
 */
#ifndef VQ_PACE_H
#define VQ_PACE_H

#include "virtqueue.h"

/* Forget what was measured: requests are not what they were. */
void pace_forget(struct vq_pace *pace);

/*
 * `count` requests of `bytes` in all have been served; how many to take next, 0 for as many as there
 * are.
 */
uint32_t pace_next(struct vq_pace *pace, uint32_t count, uint64_t bytes);

#endif
