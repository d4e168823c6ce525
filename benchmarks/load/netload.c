/* A load generator for vhost-user net back-ends: the front-end and the guest's driver in one.
 *
 * One thread for each pair of rings. Three directions: `echo` sends packets and waits for the
 * back-end to send them back; `sink` only sends; `source` only receives. It prints one JSON object
 * of the same form as `load`, where a request is a packet. See README.md.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "memory.h"
#include "ring.h"
#include "stats.h"
#include "wire.h"

#define MAX_PAIRS 8
#define HEADER 12      /* struct virtio_net_hdr of version 1 devices, and of mergeable buffers */
#define NUM_BUFFERS 10 /* le16 in it: over how many buffers a received packet goes */
#define ETHERNET 14
#define ETHERTYPE 0x88b5u /* for local experiments */
#define MIN_PACKET 60
#define MAX_PACKET 9000
#define STALL_SECONDS 5

#define F_NET_MRG_RXBUF (1ull << 15)
#define F_NET_CTRL_VQ (1ull << 17)
#define F_NET_MQ (1ull << 22)

enum direction { ECHO, SINK, SOURCE };
enum phase { WARM_UP, MEASURE, DRAIN };

struct options {
    const char *socket;
    enum direction direction;
    unsigned depth, pairs, queue_size, packet, receive_buffer, regions;
    double seconds, warm_up, connect_timeout;
    bool packed, event_idx, mergeable, poll, seal;
};

/* What every packet of ours carries behind its Ethernet header. */
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
    uint64_t sent, expected; /* sequence numbers: of the next to send, and to come back */
    unsigned in_flight, pieces; /* packets; buffers still to come of a packet over several */
    uint32_t piece_bytes;
    struct stamp piece_stamp;
    uint64_t lost, done, first_done, begun, ended;
    uint64_t kicks_before, sleeps_before;
    struct peak peak;
    struct histogram histogram;
    _Atomic uint64_t progress;
    pthread_t thread;
};

static _Atomic int phase;

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
        die(EXIT_DATA, "slot %u came back and was not in flight", slot);
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

/* Headers and what does not change of the packets to send. */
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

/* A whole packet of ours has come back: the right one, and all of it. */
static void check_echo(struct worker *worker, uint32_t bytes, const struct stamp *stamp, uint64_t now)
{
    if (bytes != HEADER + worker->options->packet)
        die(EXIT_DATA, "%u bytes came back of a packet of %u", bytes,
            HEADER + worker->options->packet);
    if (stamp->sequence - worker->expected >= worker->sent - worker->expected)
        die(EXIT_DATA, "packet %llu came back, %llu was the next",
            (unsigned long long)stamp->sequence, (unsigned long long)worker->expected);
    uint64_t lost = stamp->sequence - worker->expected;
    worker->lost += lost;
    worker->in_flight -= (unsigned)lost + 1;
    worker->expected = stamp->sequence + 1;
    histogram_add(&worker->histogram, now - stamp->sent);
}

/* Handle one received buffer; 1 when a packet is complete with it. */
static unsigned receive_one(struct worker *worker, unsigned slot, uint32_t written, uint64_t now)
{
    struct side *side = &worker->receive;
    const uint8_t *data = side->buffers[slot].host;

    if (written > worker->options->receive_buffer)
        die(EXIT_DATA, "%u bytes were written to a buffer of %u", written,
            worker->options->receive_buffer);
    if (!worker->pieces) {
        uint16_t buffers;
        if (written < HEADER + ETHERNET + sizeof(struct stamp))
            die(EXIT_DATA, "a packet of %u bytes was received", written);
        memcpy(&buffers, data + NUM_BUFFERS, sizeof buffers);
        /* Without mergeable buffers it has to be 1, but DPDK leaves it alone and Linux never looks. */
        if (!worker->options->mergeable)
            buffers = 1;
        if (!buffers || buffers > side->slots)
            die(EXIT_DATA, "a packet over %u buffers was received", buffers);
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

static void begin_measuring(struct worker *worker, uint64_t now)
{
    memset(&worker->histogram, 0, sizeof worker->histogram);
    worker->begun = now;
    worker->done = worker->lost = 0;
    peak_start(&worker->peak, now);
    worker->kicks_before = worker->receive.ring.kicks + worker->transmit.ring.kicks;
    worker->sleeps_before = worker->receive.ring.sleeps + worker->transmit.ring.sleeps;
}

/* Sleep until the ring that matters has something, or spin once. */
static void wait_for(struct worker *worker, struct side *side)
{
    if (worker->options->poll)
        ring_relax();
    else if (!ring_arm(&side->ring))
        ring_sleep(&side->ring);
}

/* Collect what was sent: in a sink that is the result. */
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
            histogram_add(&worker->histogram, now - stamp.sent);
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

/* Send what the depth allows; whether all of it could be sent. */
static void send_more(struct worker *worker, uint64_t now)
{
    while (worker->in_flight < worker->options->depth && worker->transmit.free_count)
        send_one(worker, now);
    ring_publish(&worker->transmit.ring);
}

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
        if (atomic_load_explicit(&phase, memory_order_relaxed) == DRAIN)
            return 0;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    uint64_t now = now_ns(), total = 0;
    int seen = WARM_UP;

    /* No calls for the ring that is not waited for; none at all when polling. */
    if (worker->options->poll || worker->options->direction != SINK)
        ring_quiet(&worker->transmit.ring);
    if (worker->options->poll || worker->options->direction == SINK)
        ring_quiet(&worker->receive.ring);
    for (;;) {
        int current = atomic_load_explicit(&phase, memory_order_relaxed);
        if (current != seen) {
            if (seen == WARM_UP)
                begin_measuring(worker, now);
            if (current == DRAIN)
                break;
            seen = current;
        }
        unsigned count = turn(worker, &now);
        worker->done += count;
        total += count;
        peak_add(&worker->peak, now, count);
        if (!worker->first_done && count)
            worker->first_done = now;
        atomic_store_explicit(&worker->progress, total, memory_order_relaxed);
    }
    worker->ended = now;
    return NULL;
}

/* --- the run --- */

/* Sleep, and end the program when a pair makes no progress. */
static void watch(struct worker *workers, unsigned count, double seconds)
{
    static uint64_t last[MAX_PAIRS], since[MAX_PAIRS];
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);

    for (;;) {
        uint64_t now = now_ns();
        for (unsigned i = 0; i < count; i++) {
            uint64_t done = atomic_load_explicit(&workers[i].progress, memory_order_relaxed);
            if (done != last[i] || !since[i]) {
                last[i] = done;
                since[i] = now;
            } else if (now - since[i] > STALL_SECONDS * 1000000000ull) {
                die(EXIT_STALLED, "pair %u stands still: %llu packets, %u in flight", i,
                    (unsigned long long)done, workers[i].in_flight);
            }
        }
        if (now >= end)
            return;
        usleep(end - now > 50000000 ? 50000 : (useconds_t)((end - now) / 1000 + 1));
    }
}

static void report(const struct options *options, struct worker *workers, uint64_t cpu,
                   uint64_t own_cpu, uint64_t elapsed, uint64_t setup)
{
    static struct histogram all;
    double rate = 0, peak = 0;
    uint64_t done = 0, lost = 0, kicks = 0, sleeps = 0;

    for (unsigned i = 0; i < options->pairs; i++) {
        struct worker *worker = &workers[i];
        histogram_merge(&all, &worker->histogram);
        rate += (double)worker->done * 1e9 / (double)(worker->ended - worker->begun);
        peak += worker->peak.rate * 1e9;
        done += worker->done;
        lost += worker->lost;
        kicks += worker->receive.ring.kicks + worker->transmit.ring.kicks - worker->kicks_before;
        sleeps += worker->receive.ring.sleeps + worker->transmit.ring.sleeps - worker->sleeps_before;
    }
    double count = done ? (double)done : 1;
    printf("{\"requests\": %llu, \"rate\": %.0f, \"peak_rate\": %.0f, \"mib_per_s\": %.1f, "
           "\"p50_ns\": %llu, \"p99_ns\": %llu, \"p999_ns\": %llu, \"max_ns\": %llu, ",
           (unsigned long long)done, rate, peak, rate * options->packet / 1048576,
           (unsigned long long)histogram_quantile(&all, 0.5),
           (unsigned long long)histogram_quantile(&all, 0.99),
           (unsigned long long)histogram_quantile(&all, 0.999), (unsigned long long)all.max);
    printf("\"cpu_ns_per_request\": %.1f, \"cpus\": %.3f, \"driver_cpus\": %.3f, "
           "\"kicks_per_request\": %.4f, \"sleeps_per_request\": %.4f, ",
           (double)cpu / count, (double)cpu / (double)elapsed, (double)own_cpu / (double)elapsed,
           (double)kicks / count, (double)sleeps / count);
    printf("\"setup_us\": %.1f, \"event_idx\": %s, \"packed\": %s, \"lost\": %llu}\n",
           (double)setup / 1e3, options->event_idx ? "true" : "false",
           options->packed ? "true" : "false", (unsigned long long)lost);
}

static void start_ring(struct wire *wire, unsigned index, const struct options *options,
                       const struct ring *ring)
{
    wire_ring(wire, index, options->queue_size, ring_base(ring), (uintptr_t)ring->descriptor,
              (uintptr_t)ring->driver, (uintptr_t)ring->device, ring->kick, ring->call);
    /* Some back-ends make the fd they share with us non-blocking; a driver's sleep should cost one
     * system call whoever is at the other end. */
    fcntl(ring->call, F_SETFL, fcntl(ring->call, F_GETFL) & ~O_NONBLOCK);
}

static void run(const struct options *options)
{
    struct worker *workers = calloc(options->pairs, sizeof *workers);
    struct wire wire = {0};

    lay_out(workers, options);
    wire_connect(&wire, options->socket, options->connect_timeout);
    uint64_t connected = now_ns();
    wire_features(&wire, options->pairs > 1 ? F_NET_MQ | F_NET_CTRL_VQ : 0,
                  (options->packed ? F_PACKED : 0) | (options->event_idx ? F_EVENT_IDX : 0) |
                      (options->mergeable ? F_NET_MRG_RXBUF : 0),
                  P_MQ | P_REPLY_ACK | P_MEM_SLOTS);
    if (wire_queues(&wire) < options->pairs)
        die(EXIT_UNSUPPORTED, "the back-end has not so many queues");
    wire_memory(&wire, regions, options->regions);
    for (unsigned i = 0; i < options->pairs; i++) {
        struct worker *worker = &workers[i];
        worker->options = options;
        prepare_side(&worker->receive, options);
        prepare_side(&worker->transmit, options);
        fill_packets(worker);
        start_ring(&wire, 2 * i, options, &worker->receive.ring);
        start_ring(&wire, 2 * i + 1, options, &worker->transmit.ring);
        if (options->direction != SINK)
            post_receives(worker);
    }
    for (unsigned i = 0; i < options->pairs; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die(EXIT_FAULT, "no thread");

    watch(workers, options->pairs, options->warm_up);
    uint64_t cpu = process_cpu_ns(wire.peer), own = process_cpu_ns(getpid()), begun = now_ns();
    atomic_store(&phase, MEASURE);
    watch(workers, options->pairs, options->seconds);
    cpu = process_cpu_ns(wire.peer) - cpu;
    own = process_cpu_ns(getpid()) - own;
    uint64_t elapsed = now_ns() - begun;
    atomic_store(&phase, DRAIN);
    for (unsigned i = 0; i < options->pairs; i++) {
        /* A driver that sleeps for what does not come any more is woken by its own call fd. */
        uint64_t one = 1;
        struct worker *worker = &workers[i];
        if (write(worker->receive.ring.call, &one, sizeof one) < 0 ||
            write(worker->transmit.ring.call, &one, sizeof one) < 0)
            die(EXIT_FAULT, "the driver cannot be woken");
        pthread_join(worker->thread, NULL);
    }
    for (unsigned i = 0; i < 2 * options->pairs; i++)
        wire_stop(&wire, i);
    report(options, workers, cpu, own, elapsed, workers[0].first_done - connected);
    close(wire.fd);
}

/* --- options --- */

static const char usage[] =
    "usage: netload --socket=PATH [options]\n"
    "  --direction=D        echo: send, and wait for what is sent back; sink: send; source: receive (echo)\n"
    "  --depth=N            packets under way for each pair, 1 to 256 (1)\n"
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
    "  --warm-up=S          time before that (0.5)\n"
    "  --connect-timeout=S  wait so long for somebody to listen (10)\n";

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
    die(EXIT_USAGE, "%s is no direction", text);
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
        die(EXIT_USAGE, "a packet has no room in a buffer of %u bytes", options->receive_buffer);
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
