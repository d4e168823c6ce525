/* The front-end's side of the vhost-user socket, as far as a driver of rings needs it.
 *
 * Messages and their numbers come from the vhost-user specification. A fault of the back-end or of the
 * machine ends the program with one line (see `die`), because a faulty run has no result.
 */
#ifndef LOAD_WIRE_H
#define LOAD_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Exit codes. */
enum { EXIT_FAULT = 1, EXIT_USAGE = 2, EXIT_UNSUPPORTED = 3, EXIT_STALLED = 4, EXIT_DATA = 5 };

_Noreturn void die(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Parse a number of the command line; end the program at any other text. */
uint64_t parse_number(const char *text, uint64_t low, uint64_t high);

/* Device feature bits. */
#define F_BLK_FLUSH (1ull << 9)
#define F_BLK_MQ (1ull << 12)
#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_PROTOCOL (1ull << 30)
#define F_VERSION_1 (1ull << 32)
#define F_PACKED (1ull << 34)

/* Protocol feature bits. */
#define P_MQ (1ull << 0)
#define P_REPLY_ACK (1ull << 3)
#define P_CONFIG (1ull << 9)
#define P_MEM_SLOTS (1ull << 15)

/* A part of guest memory. The address we mapped it at is its user address. */
struct region {
    uint64_t guest;
    uint64_t size;
    uint8_t *host;
    int fd;
};

struct wire {
    int fd;
    uint64_t features; /* acknowledged */
    uint64_t protocol; /* acknowledged */
    int peer;          /* the process that listens on the socket */
};

/* Connect; wait up to `timeout` seconds until the back-end listens. */
void wire_connect(struct wire *wire, const char *path, double timeout);

/* Acknowledge `needed` and the offered part of `wanted`; end the program if one of `needed` is not
 * offered. */
void wire_features(struct wire *wire, uint64_t wanted, uint64_t needed, uint64_t protocol);

/* Return the number of the device's queues (1 without MQ). */
unsigned wire_queues(struct wire *wire);

/* Read the first `size` bytes of the configuration; return false without CONFIG. */
bool wire_config(struct wire *wire, void *config, uint32_t size);

/* Share the memory: up to 8 regions as one table, more as memory slots. */
void wire_memory(struct wire *wire, const struct region *regions, unsigned count);

/* Start one ring; its three parts are user addresses. */
void wire_ring(struct wire *wire, unsigned index, unsigned size, uint32_t base, uint64_t descriptor,
               uint64_t driver, uint64_t device, int kick, int call);

/* Stop one ring; return the base at which the back-end would go on. */
uint32_t wire_stop(struct wire *wire, unsigned index);

#endif
