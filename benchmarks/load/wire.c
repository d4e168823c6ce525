#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
};

#define VERSION 1u
#define REPLY 4u
#define NEED_REPLY 8u
#define TABLE_REGIONS 8
#define CONFIG_MAX 256

struct header {
    uint32_t request, flags, size;
};

struct wire_region {
    uint64_t guest, size, user, offset;
};

struct vring_state {
    uint32_t index, value;
};

void die(int code, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(code);
}

uint64_t parse_number(const char *text, uint64_t low, uint64_t high)
{
    char *end;
    unsigned long long value = strtoull(text, &end, 0);

    if (*end || end == text || value < low || value > high)
        die(EXIT_USAGE, "%s is not a number from %llu to %llu", text, (unsigned long long)low,
            (unsigned long long)high);
    return value;
}

static void transmit(struct wire *wire, enum request request, uint32_t flags, const void *payload,
                     uint32_t size, const int *fds, unsigned fd_count)
{
    struct header header = {request, VERSION | flags, size};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)payload, size}};
    char control[CMSG_SPACE(sizeof(int) * TABLE_REGIONS)];
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = size ? 2 : 1};

    if (fd_count) {
        memset(control, 0, sizeof control);
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *item = CMSG_FIRSTHDR(&message);
        item->cmsg_level = SOL_SOCKET;
        item->cmsg_type = SCM_RIGHTS;
        item->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(item), fds, sizeof(int) * fd_count);
    }
    if (sendmsg(wire->fd, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof header + size))
        die(EXIT_FAULT, "request %d: %s", request, strerror(errno));
}

static void receive_exactly(struct wire *wire, enum request request, void *data, size_t size)
{
    ssize_t got = recv(wire->fd, data, size, MSG_WAITALL);

    if (got != (ssize_t)size)
        die(EXIT_FAULT, "no answer to request %d: %s", request,
            got < 0 ? strerror(errno) : "the back-end closed the connection");
}

static void answer(struct wire *wire, enum request request, void *payload, uint32_t size)
{
    struct header header;

    receive_exactly(wire, request, &header, sizeof header);
    if (header.request != request || !(header.flags & REPLY) || header.size != size)
        die(EXIT_FAULT, "answer to request %d: request %u, flags %#x, %u bytes instead of %u",
            request, header.request, header.flags, header.size, size);
    if (size)
        receive_exactly(wire, request, payload, size);
}

static uint64_t get(struct wire *wire, enum request request)
{
    uint64_t value;

    transmit(wire, request, 0, NULL, 0, NULL, 0);
    answer(wire, request, &value, sizeof value);
    return value;
}

/* Send a request; with REPLY_ACK wait for its answer. */
static void command(struct wire *wire, enum request request, const void *payload, uint32_t size,
                    const int *fds, unsigned fd_count)
{
    uint64_t failure;

    if (!(wire->protocol & P_REPLY_ACK)) {
        transmit(wire, request, 0, payload, size, fds, fd_count);
        return;
    }
    transmit(wire, request, NEED_REPLY, payload, size, fds, fd_count);
    answer(wire, request, &failure, sizeof failure);
    if (failure)
        die(EXIT_FAULT, "the back-end refused request %d", request);
}

void wire_connect(struct wire *wire, const char *path, double timeout)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t length = sizeof peer;

    if (strlen(path) >= sizeof address.sun_path)
        die(EXIT_USAGE, "socket path is too long");
    strcpy(address.sun_path, path);
    wire->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(wire->fd, (struct sockaddr *)&address, sizeof address) < 0) {
        if (timeout <= 0 || (errno != ENOENT && errno != ECONNREFUSED))
            die(EXIT_FAULT, "%s: %s", path, strerror(errno));
        usleep(2000);
        timeout -= 0.002;
    }
    if (getsockopt(wire->fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
        die(EXIT_FAULT, "peer of the socket: %s", strerror(errno));
    wire->peer = peer.pid;
}

void wire_features(struct wire *wire, uint64_t wanted, uint64_t needed, uint64_t protocol)
{
    uint64_t offered = get(wire, GET_FEATURES);

    needed |= F_VERSION_1 | F_PROTOCOL;
    if (needed & ~offered)
        die(EXIT_UNSUPPORTED, "the back-end does not offer features %#llx",
            (unsigned long long)(needed & ~offered));
    wire->features = offered & (wanted | needed);
    wire->protocol = get(wire, GET_PROTOCOL_FEATURES) & protocol;
    transmit(wire, SET_PROTOCOL_FEATURES, 0, &wire->protocol, 8, NULL, 0);
    transmit(wire, SET_OWNER, 0, NULL, 0, NULL, 0);
        command(wire, SET_FEATURES, &wire->features, 8, NULL, 0);
}

unsigned wire_queues(struct wire *wire)
{
    return wire->protocol & P_MQ ? (unsigned)get(wire, GET_QUEUE_NUM) : 1;
}

bool wire_config(struct wire *wire, void *config, uint32_t size)
{
    struct {
        uint32_t offset, size, flags;
        uint8_t data[CONFIG_MAX];
    } payload = {0, size, 0, {0}};

    if (!(wire->protocol & P_CONFIG) || size > CONFIG_MAX)
        return false;
    transmit(wire, GET_CONFIG, 0, &payload, 12 + size, NULL, 0);
    answer(wire, GET_CONFIG, &payload, 12 + size);
    memcpy(config, payload.data, size);
    return true;
}

void wire_memory(struct wire *wire, const struct region *regions, unsigned count)
{
    struct {
        uint32_t count, padding;
        struct wire_region regions[TABLE_REGIONS];
    } table = {count, 0, {{0}}};
    struct {
        uint64_t padding;
        struct wire_region region;
    } slot = {0};
    int fds[TABLE_REGIONS];

    if (count <= TABLE_REGIONS) {
        for (unsigned i = 0; i < count; i++) {
            const struct region *region = &regions[i];
            table.regions[i] = (struct wire_region){region->guest, region->size,
                                                    (uintptr_t)region->host, 0};
            fds[i] = region->fd;
        }
        uint32_t size = 8 + count * (uint32_t)sizeof(struct wire_region);
        command(wire, SET_MEM_TABLE, &table, size, fds, count);
        return;
    }
    if (!(wire->protocol & P_MEM_SLOTS))
        die(EXIT_UNSUPPORTED, "the back-end takes %d regions at most", TABLE_REGIONS);
    uint64_t slots = get(wire, GET_MAX_MEM_SLOTS);
    if (slots < count)
        die(EXIT_UNSUPPORTED, "the back-end takes %llu regions at most", (unsigned long long)slots);
    for (unsigned i = 0; i < count; i++) {
        const struct region *region = &regions[i];
        slot.region = (struct wire_region){region->guest, region->size, (uintptr_t)region->host, 0};
        command(wire, ADD_MEM_REG, &slot, sizeof slot, &region->fd, 1);
    }
}

void wire_ring(struct wire *wire, unsigned index, unsigned size, uint32_t base, uint64_t descriptor,
               uint64_t driver, uint64_t device, int kick, int call)
{
    struct vring_state number = {index, size}, start = {index, base}, enable = {index, 1};
    struct {
        uint32_t index, flags;
        uint64_t descriptor, used, available, log;
    } address = {index, 0, descriptor, device, driver, 0};
    uint64_t vring = index;

    transmit(wire, SET_VRING_CALL, 0, &vring, 8, &call, 1);
    transmit(wire, SET_VRING_NUM, 0, &number, sizeof number, NULL, 0);
    transmit(wire, SET_VRING_BASE, 0, &start, sizeof start, NULL, 0);
    transmit(wire, SET_VRING_ADDR, 0, &address, sizeof address, NULL, 0);
    transmit(wire, SET_VRING_KICK, 0, &vring, 8, &kick, 1);
    command(wire, SET_VRING_ENABLE, &enable, sizeof enable, NULL, 0);
}

uint32_t wire_stop(struct wire *wire, unsigned index)
{
    struct vring_state state = {index, 0};

    transmit(wire, GET_VRING_BASE, 0, &state, sizeof state, NULL, 0);
    answer(wire, GET_VRING_BASE, &state, sizeof state);
    return state.value;
}
