/* A load generator for vhost-user block back-ends: the front-end and the guest's driver in one.
 *
 * It shares memfd memory, starts one thread with one ring for each queue, keeps `depth` requests of
 * each queue in flight for some seconds, and prints one JSON object. See README.md.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "blocks.h"
#include "memory.h"
#include "ring.h"
#include "run.h"
#include "stats.h"
#include "wire.h"

#define SECTOR 512u
#define MAX_QUEUES 64
#define CONTROL 64     /* bytes of a request's header and status */
#define STATUS_AT 32
#define UNTOUCHED 0xff /* a status before the device writes it */

enum kind { READ = 0, WRITE = 1, FLUSH = 4 };

struct options {
    const char *socket;
    unsigned depth, queues, queue_size, regions, block, segments, write_percent, flush_every;
    uint64_t span, seed;
    double seconds, warm_up, connect_timeout;
    bool packed, event_idx, indirect, sequential, poll, verify, seal;
};

/* The places of a request's header and status, its data and its indirect table. */
struct buffer {
    struct place control, data, table;
};

struct slot {
    unsigned buffer;
    enum kind kind;
    uint64_t block;
    uint64_t started;
    uint32_t generation;
};

struct worker {
    const struct options *options;
    struct ring ring;
    struct place memory; /* of the ring */
    struct buffer *buffers;
    struct slot *slots;
    unsigned *free_slots, *free_buffers; /* queues, so that all buffers and regions take turns */
    unsigned buffer_count, slot_head, slot_count, buffer_head, buffer_tail;
    struct blocks blocks;
    uint64_t submitted, odd_used;
    struct progress progress;
    pthread_t thread;
};

/* --- guest memory --- */

/* Choose a region: 0 holds the rings, buffers take turns through the others, and a request's data
 * lies in another region than its header. */
static unsigned region_of(const struct options *options, unsigned buffer, bool data)
{
    unsigned others = options->regions - 1;

    return others ? 1 + (2 * buffer + data) % others : 0;
}

static void lay_out(struct worker *workers, const struct options *options)
{
    size_t driver, device, bytes = ring_layout(options->queue_size, options->packed, &driver, &device);
    unsigned per_queue = options->depth, serial = 0;
    uint64_t table = 16ull * (options->segments + 2);
    uint64_t rings[MAX_QUEUES];

    if (options->regions > 1 && per_queue * 2 < options->regions - 1)
        per_queue = options->regions / 2;
    for (unsigned q = 0; q < options->queues; q++) {
        struct worker *worker = &workers[q];
        rings[q] = memory_reserve(0, bytes, 4096);
        worker->buffer_count = per_queue;
        worker->buffers = calloc(per_queue, sizeof *worker->buffers);
        for (unsigned i = 0; i < per_queue; i++, serial++) {
            struct buffer *buffer = &worker->buffers[i];
            unsigned control = region_of(options, serial, false);
            unsigned data = region_of(options, serial, true);
            /* Offsets now, addresses when the regions' sizes are known. */
            buffer->control.guest = memory_reserve(control, CONTROL, CONTROL);
            buffer->table.guest = memory_reserve(control, options->indirect ? table : 0, 16);
            buffer->data.guest = memory_reserve(data, options->block, options->block >= 4096 ? 4096 : SECTOR);
        }
    }
    memory_map(options->regions, options->seal);
    serial = 0;
    for (unsigned q = 0; q < options->queues; q++) {
        struct worker *worker = &workers[q];
        worker->memory = memory_at(0, rings[q]);
        for (unsigned i = 0; i < per_queue; i++, serial++) {
            struct buffer *buffer = &worker->buffers[i];
            unsigned control = region_of(options, serial, false);
            buffer->control = memory_at(control, buffer->control.guest);
            buffer->table = memory_at(control, buffer->table.guest);
            buffer->data = memory_at(region_of(options, serial, true), buffer->data.guest);
        }
    }
}

/* --- requests and completions --- */

static void submit(struct worker *worker, uint64_t now)
{
    const struct options *options = worker->options;
    unsigned number = worker->free_slots[worker->slot_head];
    struct slot *slot = &worker->slots[number];
    struct segment segments[RING_SEGMENTS];
    unsigned count = 0;

    worker->slot_head = worker->slot_head + 1 == options->depth ? 0 : worker->slot_head + 1;
    worker->slot_count--;
    slot->buffer = worker->free_buffers[worker->buffer_head];
    if (++worker->buffer_head == worker->buffer_count)
        worker->buffer_head = 0;

    struct buffer *buffer = &worker->buffers[slot->buffer];
    slot->kind = READ;
    if (options->flush_every && ++worker->submitted % options->flush_every == 0)
        slot->kind = FLUSH;
    else if (options->write_percent == 100 ||
             (options->write_percent &&
              blocks_random(&worker->blocks) % 100 < options->write_percent))
        slot->kind = WRITE;
    slot->started = now;
    uint64_t sector = 0;
    if (slot->kind != FLUSH) {
        slot->block = blocks_choose(&worker->blocks);
        sector = blocks_number(&worker->blocks, slot->block) * (options->block / SECTOR);
        slot->generation =
            blocks_begin(&worker->blocks, slot->block, slot->kind == WRITE, buffer->data.host);
    }

    uint32_t *header = (uint32_t *)buffer->control.host;
    header[0] = (uint32_t)slot->kind;
    header[1] = 0;
    memcpy(header + 2, &sector, sizeof sector);
    buffer->control.host[STATUS_AT] = UNTOUCHED;
    segments[count++] = (struct segment){buffer->control.guest, 16, false};
    if (slot->kind != FLUSH) {
        uint32_t part = options->block / options->segments;
        for (unsigned i = 0; i < options->segments; i++)
            segments[count++] =
                (struct segment){buffer->data.guest + i * part, part, slot->kind == READ};
    }
    segments[count++] = (struct segment){buffer->control.guest + STATUS_AT, 1, true};
    ring_add(&worker->ring, number, segments, count, buffer->table.host, buffer->table.guest);
}

static void complete(struct worker *worker, unsigned number, uint32_t written, uint64_t now)
{
    const struct options *options = worker->options;
    struct slot *slot = &worker->slots[number];

    if (number >= options->depth || slot->started == 0)
        die(EXIT_DATA, "slot %u came back but was not in flight", number);
    struct buffer *buffer = &worker->buffers[slot->buffer];
    uint8_t status = buffer->control.host[STATUS_AT];
    if (status != 0)
        die(EXIT_DATA, "a request of kind %d ended with status %#x", (int)slot->kind, status);
    if (written != (slot->kind == READ ? options->block + 1 : 1))
        worker->odd_used++;
    if (slot->kind != FLUSH)
        blocks_end(&worker->blocks, slot->block, slot->generation, slot->kind == WRITE,
                   buffer->data.host);
    histogram_add(&worker->progress.histogram, now - slot->started);
    slot->started = 0;

    unsigned tail = worker->slot_head + worker->slot_count++;
    worker->free_slots[tail >= options->depth ? tail - options->depth : tail] = number;
    worker->free_buffers[worker->buffer_tail] = slot->buffer;
    if (++worker->buffer_tail == worker->buffer_count)
        worker->buffer_tail = 0;
}

/* Sleep or spin until there is a completion, then collect all there are; return their number. */
static unsigned collect(struct worker *worker, uint64_t *now)
{
    struct ring *ring = &worker->ring;
    bool quieten = !worker->options->poll && !ring->event_idx;
    uint32_t written;
    int slot;

    while ((slot = ring_collect(ring, &written)) < 0) {
        if (worker->options->poll)
            ring_relax();
        else if (!ring_arm(ring))
            ring_sleep(ring);
    }
    if (quieten)
        ring_quiet(ring);
    *now = now_ns();
    unsigned count = 0;
    do {
        complete(worker, (unsigned)slot, written, *now);
        count++;
    } while ((slot = ring_collect(ring, &written)) >= 0);
    return count;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    uint64_t now = now_ns();

    if (worker->options->poll)
        ring_quiet(&worker->ring);
    while (progress_follow(&worker->progress, now)) {
        while (worker->slot_count)
            submit(worker, now);
        ring_publish(&worker->ring);
        unsigned count = collect(worker, &now);
        progress_add(&worker->progress, now, count);
    }
    /* The drain completes what is in flight, outside the measured span. */
    struct histogram measured = worker->progress.histogram;
    while (worker->slot_count < worker->options->depth)
        collect(worker, &now);
    worker->progress.histogram = measured;
    return NULL;
}

static void prepare(struct worker *worker, const struct options *options, unsigned index)
{
    worker->options = options;
    ring_init(&worker->ring, worker->memory.host, options->queue_size, options->segments + 2,
              options->depth, options->packed, options->event_idx, options->indirect);
    worker->ring.kick = eventfd(0, EFD_CLOEXEC);
    worker->ring.call = eventfd(0, EFD_CLOEXEC);
    worker->progress.rings[0] = &worker->ring;
    worker->slots = calloc(options->depth, sizeof *worker->slots);
    worker->free_slots = calloc(options->depth, sizeof *worker->free_slots);
    worker->free_buffers = calloc(worker->buffer_count, sizeof *worker->free_buffers);
    worker->slot_count = options->depth;
    for (unsigned i = 0; i < options->depth; i++)
        worker->free_slots[i] = i;
    for (unsigned i = 0; i < worker->buffer_count; i++)
        worker->free_buffers[i] = i;
    /* Queues take turns in the blocks, so that each block has one writer. */
    worker->blocks = (struct blocks){
        .count = options->span / options->block / options->queues,
        .first = index,
        .stride = options->queues,
        .bytes = options->block,
        .sequential = options->sequential,
        .random = options->seed * 0x9e3779b97f4a7c15ull + index + 1,
    };
    if (worker->blocks.count < 2 * options->depth)
        die(EXIT_USAGE, "the device has too few blocks of %u bytes", options->block);
    if (options->verify)
        worker->blocks.generations = calloc(worker->blocks.count, sizeof(uint32_t));
}

/* --- the run --- */

static void report(const struct options *options, const struct worker *workers,
                   struct progress *const *threads, const struct cost *cost, uint64_t setup_ns,
                   int back_end, unsigned wrong_bases)
{
    uint64_t checked = 0, odd_used = 0;

    for (unsigned i = 0; i < options->queues; i++) {
        checked += workers[i].blocks.checked;
        odd_used += workers[i].odd_used;
    }
    run_report(threads, options->queues, cost, setup_ns, options->block);
    printf("\"rss_anon_kib\": %llu, \"rss_file_kib\": %llu, \"rss_shmem_kib\": %llu, "
           "\"threads\": %llu, ",
           (unsigned long long)process_status(back_end, "RssAnon"),
           (unsigned long long)process_status(back_end, "RssFile"),
           (unsigned long long)process_status(back_end, "RssShmem"),
           (unsigned long long)process_status(back_end, "Threads"));
    printf("\"checked\": %llu, \"odd_used_lengths\": %llu, \"wrong_bases\": %u}\n",
           (unsigned long long)checked, (unsigned long long)odd_used, wrong_bases);
}

/* Negotiate, and find out how much of the device there is to use. */
static void negotiate(struct wire *wire, struct options *options)
{
    struct {
        uint64_t capacity;
    } config;
    uint64_t needed = (options->packed ? F_PACKED : 0) | (options->indirect ? F_INDIRECT : 0) |
                      (options->event_idx ? F_EVENT_IDX : 0) | (options->queues > 1 ? F_BLK_MQ : 0);

    wire_features(wire, F_BLK_FLUSH, needed, P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS);
    unsigned offered = wire_queues(wire);
    if (offered < options->queues)
        die(EXIT_UNSUPPORTED, "the back-end has %u queues", offered);
    if (wire_config(wire, &config, sizeof config) &&
        (!options->span || options->span > config.capacity * SECTOR))
        options->span = config.capacity * SECTOR;
    if (!options->span)
        die(EXIT_USAGE, "the back-end does not tell its capacity: --span is needed");
}

static void run(struct options *options)
{
    struct worker *workers = calloc(options->queues, sizeof *workers);
    struct progress *threads[MAX_QUEUES];
    struct wire wire = {0};
    struct rlimit files;

    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    lay_out(workers, options);
    wire_connect(&wire, options->socket, options->connect_timeout);
    uint64_t connected = now_ns();
    negotiate(&wire, options);
    wire_memory(&wire, regions, options->regions);
    for (unsigned i = 0; i < options->queues; i++) {
        prepare(&workers[i], options, i);
        threads[i] = &workers[i].progress;
        run_start_ring(&wire, i, &workers[i].ring);
    }
    for (unsigned i = 0; i < options->queues; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die(EXIT_FAULT, "cannot start a thread");

    struct cost cost =
        run_measure(threads, options->queues, options->warm_up, options->seconds, wire.peer);
    for (unsigned i = 0; i < options->queues; i++)
        pthread_join(workers[i].thread, NULL);

    unsigned wrong_bases = 0;
    for (unsigned i = 0; i < options->queues; i++) {
        uint32_t mask = options->packed ? 0xffffffff : 0xffff;
        wrong_bases += (wire_stop(&wire, i) & mask) != ring_base(&workers[i].ring);
    }
    report(options, workers, threads, &cost, threads[0]->first_done - connected, wire.peer,
           wrong_bases);
    close(wire.fd);
}

/* --- options --- */

static const char usage[] =
    "usage: load --socket=PATH [options]\n"
    "  --depth=N            requests in flight for each queue, 1 to 256 (1)\n"
    "  --queues=N           rings, each with its own driver thread (1)\n"
    "  --queue-size=N       entries of a ring, a power of two (enough for the depth, 128 or more)\n"
    "  --packed             packed rings instead of split ones\n"
    "  --no-event-idx       notification flags instead of event indices\n"
    "  --indirect           indirect descriptors\n"
    "  --block=BYTES        data of a request, 512 to 1048576 (4096)\n"
    "  --segments=N         descriptors for that data, 1 to 64 (1)\n"
    "  --write-percent=N    writes among the requests (0)\n"
    "  --flush-every=N      every Nth request is a flush (never)\n"
    "  --sequential         blocks one after another instead of at random\n"
    "  --span=BYTES         use this much of the device only\n"
    "  --regions=N          memory regions, 1 to 509 (2)\n"
    "  --no-seal            memory that its owner could still shrink\n"
    "  --poll               spin for completions instead of sleeping on the call fd\n"
    "  --verify             write known data and check each read\n"
    "  --seconds=S          measured time (2)\n"
    "  --warm-up=S          unmeasured time before (0.5)\n"
    "  --connect-timeout=S  time for the back-end to listen (10)\n"
    "  --seed=N             seed of the random numbers (1)\n";

static const struct option names[] = {
    {"socket", required_argument, 0, 's'},       {"depth", required_argument, 0, 'd'},
    {"queues", required_argument, 0, 'q'},       {"queue-size", required_argument, 0, 'z'},
    {"packed", no_argument, 0, 'p'},             {"no-event-idx", no_argument, 0, 'e'},
    {"indirect", no_argument, 0, 'i'},           {"block", required_argument, 0, 'b'},
    {"segments", required_argument, 0, 'g'},     {"write-percent", required_argument, 0, 'w'},
    {"flush-every", required_argument, 0, 'f'},  {"sequential", no_argument, 0, 'n'},
    {"span", required_argument, 0, 'a'},         {"regions", required_argument, 0, 'r'},
    {"poll", no_argument, 0, 'o'},
    {"no-seal", no_argument, 0, 'l'},               {"verify", no_argument, 0, 'v'},
    {"seconds", required_argument, 0, 't'},      {"warm-up", required_argument, 0, 'u'},
    {"connect-timeout", required_argument, 0, 'c'}, {"seed", required_argument, 0, 'x'},
    {0, 0, 0, 0},
};

static void parse(struct options *options, int count, char **arguments)
{
    int letter;

    while ((letter = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (letter) {
        case 's': options->socket = optarg; break;
        case 'd': options->depth = (unsigned)parse_number(optarg, 1, 256); break;
        case 'q': options->queues = (unsigned)parse_number(optarg, 1, MAX_QUEUES); break;
        case 'z': options->queue_size = (unsigned)parse_number(optarg, 4, 32768); break;
        case 'p': options->packed = true; break;
        case 'e': options->event_idx = false; break;
        case 'i': options->indirect = true; break;
        case 'b': options->block = (unsigned)parse_number(optarg, SECTOR, 1 << 20); break;
        case 'g': options->segments = (unsigned)parse_number(optarg, 1, RING_SEGMENTS - 2); break;
        case 'w': options->write_percent = (unsigned)parse_number(optarg, 0, 100); break;
        case 'f': options->flush_every = (unsigned)parse_number(optarg, 1, 1 << 30); break;
        case 'n': options->sequential = true; break;
        case 'a': options->span = parse_number(optarg, SECTOR, UINT64_MAX); break;
        case 'r': options->regions = (unsigned)parse_number(optarg, 1, MAX_REGIONS); break;
        case 'o': options->poll = true; break;
        case 'l': options->seal = false; break;
        case 'v': options->verify = true; break;
        case 't': options->seconds = strtod(optarg, NULL); break;
        case 'u': options->warm_up = strtod(optarg, NULL); break;
        case 'c': options->connect_timeout = strtod(optarg, NULL); break;
        case 'x': options->seed = parse_number(optarg, 0, UINT64_MAX); break;
        default: fputs(usage, stderr); exit(EXIT_USAGE);
        }
    }
    if (optind != count || !options->socket) {
        fputs(usage, stderr);
        exit(EXIT_USAGE);
    }
    if (options->block % SECTOR || options->block / options->segments * options->segments != options->block)
        die(EXIT_USAGE, "the data must be a whole number of sectors and of segments");
    unsigned entries = options->depth * (options->indirect ? 1 : options->segments + 2);
    if (!options->queue_size)
        for (options->queue_size = 128; options->queue_size < entries;)
            options->queue_size *= 2;
    if (options->queue_size < entries || options->queue_size & (options->queue_size - 1))
        die(EXIT_USAGE, "the ring needs a power of two of at least %u entries", entries);
}

int main(int count, char **arguments)
{
    struct options options = {
        .depth = 1,
        .queues = 1,
        .regions = 2,
        .block = 4096,
        .segments = 1,
        .seed = 1,
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
