/* A load generator for vhost-user net back-ends: the front-end and the guest's driver in one.
 *
 * It starts one thread for each pair of rings. `echo` sends packets and waits until the back-end sends
 * them back; `sink` only sends; `source` only receives. It prints the JSON object of `load`, in which
 * a request is a packet. See README.md.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "memory.h"
#include "ring.h"
#include "run.h"
#include "stats.h"
#include "wire.h"

#define MAX_PAIRS 8
#define HEADER 12      /* struct virtio_net_hdr of version 1 devices, and of mergeable buffers */
#define NUM_BUFFERS 10 /* le16 in it: the number of buffers of a received packet */
#define ETHERNET 14
#define ETHERTYPE 0x88b5u /* for local experiments */
#define MIN_PACKET 60
#define MAX_PACKET 9000

#define F_NET_MRG_RXBUF (1ull << 15)
#define F_NET_CTRL_VQ (1ull << 17)
#define F_NET_MQ (1ull << 22)

enum direction { ECHO, SINK, SOURCE };

struct options {
    const char *socket;
    enum direction direction;
    unsigned depth, pairs, queue_size, packet, receive_buffer, regions;
    double seconds, warm_up, connect_timeout;
    bool packed, event_idx, mergeable, poll, seal;
};

/* Every packet of ours carries this behind its Ethernet header. */
struct stamp {
    uint64_t sequence, sent;
};

/* One ring and its buffers, a slot each. */
struct side {
    struct ring ring;
    struct place memory;
    struct place *buffers;
    unsigned slots, free_count, free_head;
    unsigned *free_slots; /* a queue, so that all buffers take turns */
};

struct worker {
    const struct options *options;
    struct side receive, transmit;
    uint64_t sent, expected; /* sequence numbers: of the next packet to send, and to come back */
    unsigned in_flight, pieces; /* packets; missing buffers of a packet in several */
    uint32_t piece_bytes;
    struct stamp piece_stamp;
    uint64_t lost; /* packets that never came back */
    struct progress progress;
    pthread_t thread;
};

/* --- guest memory --- */

static void lay_out(struct worker *workers, const struct options *options)
{
    size_t driver, device, bytes = ring_layout(options->queue_size, options->packed, &driver, &device);
    uint64_t rings[MAX_PAIRS][2];
    unsigned others = options->regions > 1 ? options->regions - 1 : 1, first = options->regions > 1;

    for (int mapped = 0; mapped < 2; mapped++) {
        unsigned serial = 0;
        for (unsigned p = 0; p < options->pairs; p++) {
            struct side *sides[] = {&workers[p].receive, &workers[p].transmit};
            for (unsigned s = 0; s < 2; s++) {
                uint32_t size = s ? HEADER + options->packet : options->receive_buffer;
                if (mapped)
                    sides[s]->memory = memory_at(0, rings[p][s]);
                else
                    rings[p][s] = memory_reserve(0, bytes, 4096);
                if (!mapped) {
                    sides[s]->slots = options->queue_size;
                    sides[s]->buffers = calloc(options->queue_size, sizeof(struct place));
                }
                for (unsigned i = 0; i < options->queue_size; i++, serial++) {
                    struct place *buffer = &sides[s]->buffers[i];
                    unsigned region = first + serial % others;
                    if (mapped)
                        *buffer = memory_at(region, buffer->guest);
                    else
                        buffer->guest = memory_reserve(region, size, 64);
                }
            }
        }
        if (!mapped)
            memory_map(options->regions, options->seal);
    }
}

static void prepare_side(struct side *side, const struct options *options)
{
    ring_init(&side->ring, side->memory.host, options->queue_size, 1, side->slots, options->packed,
              options->event_idx, false);
    side->ring.kick = eventfd(0, EFD_CLOEXEC);
    side->ring.call = eventfd(0, EFD_CLOEXEC);
    side->free_slots = calloc(side->slots, sizeof *side->free_slots);
    side->free_count = side->slots;
    for (unsigned i = 0; i < side->slots; i++)
        side->free_slots[i] = i;
}

static unsigned pop_free(struct side *side)
{
    unsigned slot = side->free_slots[side->free_head];

    side->free_head = side->free_head + 1 == side->slots ? 0 : side->free_head + 1;
    side->free_count--;
    return slot;
}

static void push_free(struct side *side, unsigned slot)
{
    unsigned tail = side->free_head + side->free_count++;

    if (slot >= side->slots || side->free_count > side->slots)
        die(EXIT_DATA, "slot %u came back but was not in flight", slot);
    side->free_slots[tail >= side->slots ? tail - side->slots : tail] = slot;
}

/* --- packets --- */

static void send_one(struct worker *worker, uint64_t now)
{
    struct side *side = &worker->transmit;
    unsigned slot = pop_free(side);
    struct place *buffer = &side->buffers[slot];
    struct stamp stamp = {worker->sent++, now};

    memcpy(buffer->host + HEADER + ETHERNET, &stamp, sizeof stamp);
    struct segment segment = {buffer->guest, HEADER + worker->options->packet, false};
    ring_add(&side->ring, slot, &segment, 1, NULL, 0);
    worker->in_flight++;
}

/* Write the constant part of the packets to send. */
static void fill_packets(struct worker *worker)
{
    static const uint8_t addresses[] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2};
    struct side *side = &worker->transmit;

    for (unsigned i = 0; i < side->slots; i++) {
        uint8_t *packet = side->buffers[i].host + HEADER;
        memset(packet - HEADER, 0, HEADER);
        for (unsigned at = 0; at < worker->options->packet; at++)
            packet[at] = (uint8_t)at;
        memcpy(packet, addresses, sizeof addresses);
        packet[12] = ETHERTYPE >> 8;
        packet[13] = ETHERTYPE & 0xff;
    }
}

static void post_receives(struct worker *worker)
{
    struct side *side = &worker->receive;

    while (side->free_count) {
        unsigned slot = pop_free(side);
        struct segment segment = {side->buffers[slot].guest, worker->options->receive_buffer, true};
        ring_add(&side->ring, slot, &segment, 1, NULL, 0);
    }
    ring_publish(&side->ring);
}

/* Check that a whole packet of ours came back, and the right one. */
static void check_echo(struct worker *worker, uint32_t bytes, const struct stamp *stamp, uint64_t now)
{
    if (bytes != HEADER + worker->options->packet)
        die(EXIT_DATA, "%u bytes of a packet of %u came back", bytes,
            HEADER + worker->options->packet);
    if (stamp->sequence - worker->expected >= worker->sent - worker->expected)
        die(EXIT_DATA, "packet %llu came back instead of packet %llu",
            (unsigned long long)stamp->sequence, (unsigned long long)worker->expected);
    uint64_t lost = stamp->sequence - worker->expected;
    worker->lost += lost;
    worker->in_flight -= (unsigned)lost + 1;
    worker->expected = stamp->sequence + 1;
    histogram_add(&worker->progress.histogram, now - stamp->sent);
}

/* Handle one received buffer; return 1 when it completes a packet. */
static unsigned receive_one(struct worker *worker, unsigned slot, uint32_t written, uint64_t now)
{
    struct side *side = &worker->receive;
    const uint8_t *data = side->buffers[slot].host;

    if (written > worker->options->receive_buffer)
        die(EXIT_DATA, "the back-end wrote %u bytes to a buffer of %u", written,
            worker->options->receive_buffer);
    if (!worker->pieces) {
        uint16_t buffers;
        if (written < HEADER + ETHERNET + sizeof(struct stamp))
            die(EXIT_DATA, "the back-end sent a packet of %u bytes", written);
        memcpy(&buffers, data + NUM_BUFFERS, sizeof buffers);
        /* Without mergeable buffers it must be 1, but DPDK does not write it and Linux ignores it. */
        if (!worker->options->mergeable)
            buffers = 1;
        if (!buffers || buffers > side->slots)
            die(EXIT_DATA, "the back-end sent a packet in %u buffers", buffers);
        worker->pieces = buffers;
        worker->piece_bytes = 0;
        memcpy(&worker->piece_stamp, data + HEADER + ETHERNET, sizeof worker->piece_stamp);
    }
    worker->piece_bytes += written;
    push_free(side, slot);
    if (--worker->pieces)
        return 0;
    if (worker->options->direction == ECHO)
        check_echo(worker, worker->piece_bytes, &worker->piece_stamp, now);
    return 1;
}

/* --- the driver's thread --- */

/* Sleep until the side's ring has completions, or spin once. */
static void wait_for(struct worker *worker, struct side *side)
{
    if (worker->options->poll)
        ring_relax();
    else if (!ring_arm(&side->ring))
        ring_sleep(&side->ring);
}

/* Collect sent packets: a sink counts these. */
static unsigned collect_sent(struct worker *worker, uint64_t now)
{
    struct side *side = &worker->transmit;
    uint32_t written;
    unsigned count = 0;
    int slot;

    while ((slot = ring_collect(&side->ring, &written)) >= 0) {
        if (worker->options->direction == SINK) {
            struct stamp stamp;
            memcpy(&stamp, side->buffers[slot].host + HEADER + ETHERNET, sizeof stamp);
            histogram_add(&worker->progress.histogram, now - stamp.sent);
            worker->in_flight--;
        }
        push_free(side, (unsigned)slot);
        count++;
    }
    return count;
}

static unsigned collect_received(struct worker *worker, uint64_t now)
{
    uint32_t written;
    unsigned count = 0;
    int slot;

    while ((slot = ring_collect(&worker->receive.ring, &written)) >= 0)
        count += receive_one(worker, (unsigned)slot, written, now);
    return count;
}

/* Send as many packets as the depth allows. */
static void send_more(struct worker *worker, uint64_t now)
{
    while (worker->in_flight < worker->options->depth && worker->transmit.free_count)
        send_one(worker, now);
    ring_publish(&worker->transmit.ring);
}

/* Send, and collect until packets are complete; return their number, or 0 when the run drains. */
static unsigned turn(struct worker *worker, uint64_t *now)
{
    const enum direction direction = worker->options->direction;
    struct side *waited = direction == SINK ? &worker->transmit : &worker->receive;
    unsigned count = 0;

    if (direction != SOURCE)
        send_more(worker, *now);
    for (;;) {
        *now = now_ns();
        if (direction != SOURCE) {
            unsigned sent = collect_sent(worker, *now);
            if (direction == SINK)
                count += sent;
        }
        if (direction != SINK) {
            count += collect_received(worker, *now);
            if (worker->receive.free_count)
                post_receives(worker);
        }
        if (count)
            return count;
        wait_for(worker, waited);
        if (run_drains())
            return 0;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    const bool sink = worker->options->direction == SINK;
    uint64_t now = now_ns();

    /* The thread wants no calls for the other ring, and none at all when it polls. */
    if (worker->options->poll || !sink)
        ring_quiet(&worker->transmit.ring);
    if (worker->options->poll || sink)
        ring_quiet(&worker->receive.ring);
    while (progress_follow(&worker->progress, now)) {
        unsigned count = turn(worker, &now);
        progress_add(&worker->progress, now, count);
    }
    return NULL;
}

/* --- the run --- */

static void prepare(struct worker *worker, const struct options *options)
{
    worker->options = options;
    prepare_side(&worker->receive, options);
    prepare_side(&worker->transmit, options);
    fill_packets(worker);
    bool sink = options->direction == SINK;
    worker->progress.rings[sink] = &worker->receive.ring;
    worker->progress.rings[!sink] = &worker->transmit.ring;
}

/* Wake the thread, which may sleep for a packet that never comes, and join it. */
static void end_thread(struct worker *worker)
{
    uint64_t one = 1;

    if (write(worker->receive.ring.call, &one, sizeof one) < 0 ||
        write(worker->transmit.ring.call, &one, sizeof one) < 0)
        die(EXIT_FAULT, "cannot wake the driver");
    pthread_join(worker->thread, NULL);
}

static void run(const struct options *options)
{
    struct worker *workers = calloc(options->pairs, sizeof *workers);
    struct progress *threads[MAX_PAIRS];
    struct wire wire = {0};
    uint64_t lost = 0;

    lay_out(workers, options);
    wire_connect(&wire, options->socket, options->connect_timeout);
    uint64_t connected = now_ns();
    wire_features(&wire, options->pairs > 1 ? F_NET_MQ | F_NET_CTRL_VQ : 0,
                  (options->packed ? F_PACKED : 0) | (options->event_idx ? F_EVENT_IDX : 0) |
                      (options->mergeable ? F_NET_MRG_RXBUF : 0),
                  P_MQ | P_REPLY_ACK | P_MEM_SLOTS);
    if (wire_queues(&wire) < options->pairs)
        die(EXIT_UNSUPPORTED, "the back-end has too few queues");
    wire_memory(&wire, regions, options->regions);
    for (unsigned i = 0; i < options->pairs; i++) {
        struct worker *worker = &workers[i];
        prepare(worker, options);
        threads[i] = &worker->progress;
        run_start_ring(&wire, 2 * i, &worker->receive.ring);
        run_start_ring(&wire, 2 * i + 1, &worker->transmit.ring);
        if (options->direction != SINK)
            post_receives(worker);
    }
    for (unsigned i = 0; i < options->pairs; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die(EXIT_FAULT, "cannot start a thread");

    struct cost cost =
        run_measure(threads, options->pairs, options->warm_up, options->seconds, wire.peer);
    for (unsigned i = 0; i < options->pairs; i++) {
        end_thread(&workers[i]);
        lost += workers[i].lost;
    }
    for (unsigned i = 0; i < 2 * options->pairs; i++)
        wire_stop(&wire, i);
    run_report(threads, options->pairs, &cost, threads[0]->first_done - connected,
               options->packet);
    printf("\"lost\": %llu}\n", (unsigned long long)lost);
    close(wire.fd);
}

/* --- options --- */

static const char usage[] =
    "usage: netload --socket=PATH [options]\n"
    "  --direction=D        echo: send and wait for the echo; sink: send; source: receive (echo)\n"
    "  --depth=N            packets in flight for each pair, 1 to 256 (1)\n"
    "  --pairs=N            pairs of a receive and a transmit ring, each with its own thread (1)\n"
    "  --queue-size=N       entries of a ring, a power of two (256)\n"
    "  --packet=BYTES       Ethernet frame without its checksum, 60 to 9000 (60)\n"
    "  --receive-buffer=B   room for a packet and its header (2048)\n"
    "  --mergeable          negotiate mergeable receive buffers\n"
    "  --packed             packed rings instead of split ones\n"
    "  --no-event-idx       notification flags instead of event indices\n"
    "  --regions=N          memory regions, 1 to 509 (2)\n"
    "  --no-seal            memory that its owner could still shrink\n"
    "  --poll               spin for packets instead of sleeping on the call fd\n"
    "  --seconds=S          measured time (2)\n"
    "  --warm-up=S          unmeasured time before (0.5)\n"
    "  --connect-timeout=S  time for the back-end to listen (10)\n";

static const struct option names[] = {
    {"socket", required_argument, 0, 's'},     {"direction", required_argument, 0, 'D'},
    {"depth", required_argument, 0, 'd'},      {"pairs", required_argument, 0, 'q'},
    {"queue-size", required_argument, 0, 'z'}, {"packet", required_argument, 0, 'b'},
    {"receive-buffer", required_argument, 0, 'R'},
    {"mergeable", no_argument, 0, 'm'},        {"packed", no_argument, 0, 'p'},
    {"no-event-idx", no_argument, 0, 'e'},     {"regions", required_argument, 0, 'r'},
    {"no-seal", no_argument, 0, 'l'},          {"poll", no_argument, 0, 'o'},
    {"seconds", required_argument, 0, 't'},    {"warm-up", required_argument, 0, 'u'},
    {"connect-timeout", required_argument, 0, 'c'},
    {0, 0, 0, 0},
};

static enum direction direction_of(const char *text)
{
    static const char *const directions[] = {"echo", "sink", "source"};

    for (unsigned i = 0; i < 3; i++)
        if (!strcmp(text, directions[i]))
            return (enum direction)i;
    die(EXIT_USAGE, "%s is not a direction", text);
}

static void parse(struct options *options, int count, char **arguments)
{
    int letter;

    while ((letter = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (letter) {
        case 's': options->socket = optarg; break;
        case 'D': options->direction = direction_of(optarg); break;
        case 'd': options->depth = (unsigned)parse_number(optarg, 1, 256); break;
        case 'q': options->pairs = (unsigned)parse_number(optarg, 1, MAX_PAIRS); break;
        case 'z': options->queue_size = (unsigned)parse_number(optarg, 2, 1024); break;
        case 'b': options->packet = (unsigned)parse_number(optarg, MIN_PACKET, MAX_PACKET); break;
        case 'R': options->receive_buffer = (unsigned)parse_number(optarg, 128, 65536); break;
        case 'm': options->mergeable = true; break;
        case 'p': options->packed = true; break;
        case 'e': options->event_idx = false; break;
        case 'r': options->regions = (unsigned)parse_number(optarg, 1, MAX_REGIONS); break;
        case 'l': options->seal = false; break;
        case 'o': options->poll = true; break;
        case 't': options->seconds = strtod(optarg, NULL); break;
        case 'u': options->warm_up = strtod(optarg, NULL); break;
        case 'c': options->connect_timeout = strtod(optarg, NULL); break;
        default: fputs(usage, stderr); exit(EXIT_USAGE);
        }
    }
    if (optind != count || !options->socket) {
        fputs(usage, stderr);
        exit(EXIT_USAGE);
    }
    if (options->queue_size < options->depth || options->queue_size & (options->queue_size - 1))
        die(EXIT_USAGE, "the ring needs a power of two of at least %u entries", options->depth);
    if (!options->mergeable && options->receive_buffer < HEADER + options->packet)
        die(EXIT_USAGE, "a packet does not fit in a buffer of %u bytes", options->receive_buffer);
}

int main(int count, char **arguments)
{
    struct options options = {
        .depth = 1,
        .pairs = 1,
        .queue_size = 256,
        .packet = MIN_PACKET,
        .receive_buffer = 2048,
        .regions = 2,
        .seconds = 2,
        .warm_up = 0.5,
        .connect_timeout = 10,
        .event_idx = true,
        .seal = true,
    };

    parse(&options, count, arguments);
    run(&options);
    return 0;
}
