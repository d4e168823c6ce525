/* A load generator for vhost-user block back-ends: the front-end and the guest's driver in one.
 *
 * It hands memfd memory over, starts one thread with one ring for each queue, keeps `depth`
 * requests of each queue in flight for some seconds, and prints one JSON object. See README.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "memory.h"
#include "ring.h"
#include "stats.h"
#include "wire.h"

#define SECTOR 512u
#define MAX_QUEUES 64
#define CONTROL 64        /* bytes of a request's header and status */
#define STATUS_AT 32
#define UNTOUCHED 0xff /* a status the device has not written */
#define STALL_SECONDS 5

enum kind { READ = 0, WRITE = 1, FLUSH = 4 };
enum phase { WARM_UP, MEASURE, DRAIN };

struct options {
    const char *socket;
    unsigned depth, queues, queue_size, regions, block, segments, write_percent, flush_every;
    uint64_t span, seed;
    double seconds, warm_up, connect_timeout;
    bool packed, event_idx, indirect, sequential, poll, verify, seal;
};

/* Where a request's header, status, data and indirect table live. */
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
    uint64_t blocks, first_block, stride, cursor; /* the blocks this queue may touch */
    uint32_t *generations; /* verification: what a block holds; its top bit: in flight */
    uint64_t random, submitted, checked, short_used, collections;
    struct peak peak;
    uint64_t first_done, begun, ended, kicks_before, sleeps_before, collections_before;
    struct histogram histogram;
    _Atomic uint64_t completed;
    pthread_t thread;
};

static _Atomic int phase;

/* --- guest memory --- */

/* Region 0 holds the rings; buffers take turns through the others, a request's data in another
 * region than its header. */
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

/* --- what is asked and what comes back --- */

static uint64_t next_random(struct worker *worker)
{
    uint64_t x = worker->random;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return worker->random = x;
}

/* The word that block `block` holds at `index` after its write number `generation`. */
static uint64_t word_at(uint64_t block, uint32_t generation, uint64_t index)
{
    uint64_t x = (block * 0x9e3779b97f4a7c15ull) ^ ((uint64_t)generation << 32) ^ index;

    x *= 0xd6e8feb86659fd93ull;
    return x ^ x >> 32;
}

#define IN_FLIGHT 0x80000000u

static uint64_t choose_block(struct worker *worker)
{
    for (;;) {
        uint64_t choice = worker->options->sequential ? worker->cursor++ % worker->blocks
                                                      : next_random(worker) % worker->blocks;
        if (!worker->generations || !(worker->generations[choice] & IN_FLIGHT))
            return choice;
    }
}

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
             (options->write_percent && next_random(worker) % 100 < options->write_percent))
        slot->kind = WRITE;
    slot->started = now;
    uint64_t sector = 0;
    if (slot->kind != FLUSH) {
        slot->block = choose_block(worker);
        sector = (worker->first_block + slot->block * worker->stride) * (options->block / SECTOR);
    }
    if (worker->generations && slot->kind != FLUSH) {
        uint32_t *generation = &worker->generations[slot->block];
        slot->generation = *generation;
        *generation |= IN_FLIGHT;
        if (slot->kind == WRITE) {
            uint64_t *words = (uint64_t *)buffer->data.host;
            slot->generation = (slot->generation + 1) & ~IN_FLIGHT;
            for (unsigned i = 0; i < options->block / 8; i++)
                words[i] = word_at(worker->first_block + slot->block * worker->stride,
                                   slot->generation, i);
        } else {
            memset(buffer->data.host, 0xa5, options->block);
        }
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

static void check_data(struct worker *worker, const struct slot *slot, const struct buffer *buffer)
{
    uint64_t block = worker->first_block + slot->block * worker->stride;
    const uint64_t *words = (const uint64_t *)buffer->data.host;

    worker->generations[slot->block] = slot->generation;
    if (slot->kind == WRITE || !slot->generation)
        return; /* never written by us: what it holds is not known */
    for (unsigned i = 0; i < worker->options->block / 8; i++)
        if (words[i] != word_at(block, slot->generation, i))
            die(EXIT_DATA, "block %llu, word %u: %#llx instead of %#llx (write %u)",
                (unsigned long long)block, i, (unsigned long long)words[i],
                (unsigned long long)word_at(block, slot->generation, i), slot->generation);
    worker->checked++;
}

static void complete(struct worker *worker, unsigned number, uint32_t written, uint64_t now)
{
    const struct options *options = worker->options;
    struct slot *slot = &worker->slots[number];

    if (number >= options->depth || slot->started == 0)
        die(EXIT_DATA, "slot %u came back and was not in flight", number);
    struct buffer *buffer = &worker->buffers[slot->buffer];
    uint8_t status = buffer->control.host[STATUS_AT];
    if (status != 0)
        die(EXIT_DATA, "a request of kind %d ended with status %#x", (int)slot->kind, status);
    if (written != (slot->kind == READ ? options->block + 1 : 1))
        worker->short_used++;
    if (worker->generations && slot->kind != FLUSH)
        check_data(worker, slot, buffer);
    histogram_add(&worker->histogram, now - slot->started);
    slot->started = 0;

    unsigned tail = worker->slot_head + worker->slot_count++;
    worker->free_slots[tail >= options->depth ? tail - options->depth : tail] = number;
    worker->free_buffers[worker->buffer_tail] = slot->buffer;
    if (++worker->buffer_tail == worker->buffer_count)
        worker->buffer_tail = 0;
}

static void begin_measuring(struct worker *worker, uint64_t now)
{
    memset(&worker->histogram, 0, sizeof worker->histogram);
    worker->begun = now;
    peak_start(&worker->peak, now);
    worker->kicks_before = worker->ring.kicks;
    worker->sleeps_before = worker->ring.sleeps;
    worker->collections_before = worker->collections;
}

static void end_measuring(struct worker *worker, uint64_t now)
{
    worker->ended = now;
    worker->ring.kicks -= worker->kicks_before;
    worker->ring.sleeps -= worker->sleeps_before;
    worker->collections -= worker->collections_before;
}

/* Collect what is there, sleeping or spinning for the first; how many. */
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
    worker->collections++;
    return count;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    const struct options *options = worker->options;
    uint64_t now = now_ns(), completed = 0;
    int seen = WARM_UP;

    if (options->poll)
        ring_quiet(&worker->ring);
    for (;;) {
        int current = atomic_load_explicit(&phase, memory_order_relaxed);
        if (current != seen) {
            if (seen == WARM_UP)
                begin_measuring(worker, now);
            if (current == DRAIN)
                break;
            seen = current;
        }
        while (worker->slot_count)
            submit(worker, now);
        ring_publish(&worker->ring);
        unsigned count = collect(worker, &now);
        completed += count;
        peak_add(&worker->peak, now, count);
        if (!worker->first_done)
            worker->first_done = now;
        atomic_store_explicit(&worker->completed, completed, memory_order_relaxed);
    }
    end_measuring(worker, now);
    struct histogram measured = worker->histogram;
    while (worker->slot_count < options->depth)
        collect(worker, &now);
    worker->histogram = measured;
    return NULL;
}

static void prepare(struct worker *worker, const struct options *options, unsigned index)
{
    worker->options = options;
    worker->random = options->seed * 0x9e3779b97f4a7c15ull + index + 1;
    ring_init(&worker->ring, worker->memory.host, options->queue_size, options->segments + 2,
              options->depth, options->packed, options->event_idx, options->indirect);
    worker->ring.kick = eventfd(0, EFD_CLOEXEC);
    worker->ring.call = eventfd(0, EFD_CLOEXEC);
    worker->slots = calloc(options->depth, sizeof *worker->slots);
    worker->free_slots = calloc(options->depth, sizeof *worker->free_slots);
    worker->free_buffers = calloc(worker->buffer_count, sizeof *worker->free_buffers);
    worker->slot_count = options->depth;
    for (unsigned i = 0; i < options->depth; i++)
        worker->free_slots[i] = i;
    for (unsigned i = 0; i < worker->buffer_count; i++)
        worker->free_buffers[i] = i;
    /* Queues share the blocks by turns, so that no two write to one. */
    worker->blocks = options->span / options->block / options->queues;
    worker->first_block = index;
    worker->stride = options->queues;
    if (worker->blocks < 2 * options->depth)
        die(EXIT_USAGE, "the device has too few blocks of %u bytes", options->block);
    if (options->verify)
        worker->generations = calloc(worker->blocks, sizeof *worker->generations);
}

/* --- the run --- */

static uint64_t total_completed(struct worker *workers, unsigned count)
{
    uint64_t total = 0;

    for (unsigned i = 0; i < count; i++)
        total += atomic_load_explicit(&workers[i].completed, memory_order_relaxed);
    return total;
}

/* Sleep, and end the program when a queue makes no progress: a lost notification, or worse. */
static void watch(struct worker *workers, unsigned count, double seconds)
{
    static uint64_t last[MAX_QUEUES], since[MAX_QUEUES];
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);

    for (;;) {
        uint64_t now = now_ns();
        for (unsigned i = 0; i < count; i++) {
            uint64_t done = atomic_load_explicit(&workers[i].completed, memory_order_relaxed);
            if (done != last[i] || !since[i]) {
                last[i] = done;
                since[i] = now;
            } else if (now - since[i] > STALL_SECONDS * 1000000000ull) {
                struct ring *ring = &workers[i].ring;
                die(EXIT_STALLED,
                    "queue %u stands still: %llu requests completed, available %u, used %u, "
                    "device's used index %u, its wish %#x", i, (unsigned long long)done,
                    ring->next_avail, ring->next_used, *(uint16_t *)(ring->device + 2),
                    *(uint16_t *)(ring->packed ? ring->device
                                               : ring->device + 4 + 8 * ring->size));
            }
        }
        if (now >= end)
            return;
        usleep(end - now > 50000000 ? 50000 : (useconds_t)((end - now) / 1000 + 1));
    }
}

static void report(const struct options *options, struct worker *workers, const struct wire *wire,
                   uint64_t cpu, uint64_t own_cpu, uint64_t elapsed, uint64_t setup,
                   unsigned wrong_bases)
{
    static struct histogram all;
    double rate = 0, peak = 0;
    uint64_t kicks = 0, sleeps = 0, checked = 0, short_used = 0, collections = 0;

    for (unsigned i = 0; i < options->queues; i++) {
        struct worker *worker = &workers[i];
        histogram_merge(&all, &worker->histogram);
        rate += (double)worker->histogram.count * 1e9 / (double)(worker->ended - worker->begun);
        peak += worker->peak.rate * 1e9;
        kicks += worker->ring.kicks;
        sleeps += worker->ring.sleeps;
        checked += worker->checked;
        short_used += worker->short_used;
        collections += worker->collections;
    }
    double count = all.count ? (double)all.count : 1;
    printf("{\"requests\": %llu, \"rate\": %.0f, \"peak_rate\": %.0f, \"mib_per_s\": %.1f, \"mean_ns\": %.0f, "
           "\"p50_ns\": %llu, \"p99_ns\": %llu, \"p999_ns\": %llu, \"max_ns\": %llu, ",
           (unsigned long long)all.count, rate, peak, rate * options->block / 1048576,
           (double)all.sum / count, (unsigned long long)histogram_quantile(&all, 0.5),
           (unsigned long long)histogram_quantile(&all, 0.99),
           (unsigned long long)histogram_quantile(&all, 0.999), (unsigned long long)all.max);
    printf("\"cpu_ns_per_request\": %.1f, \"cpus\": %.3f, \"driver_cpus\": %.3f, "
           "\"kicks_per_request\": %.4f, \"sleeps_per_request\": %.4f, \"per_collection\": %.2f, ",
           (double)cpu / count, (double)cpu / (double)elapsed, (double)own_cpu / (double)elapsed,
           (double)kicks / count, (double)sleeps / count,
           collections ? count / (double)collections : 0);
    printf("\"rss_anon_kib\": %llu, \"rss_file_kib\": %llu, \"rss_shmem_kib\": %llu, "
           "\"threads\": %llu, ",
           (unsigned long long)process_memory_kib(wire->peer, "RssAnon"),
           (unsigned long long)process_memory_kib(wire->peer, "RssFile"),
           (unsigned long long)process_memory_kib(wire->peer, "RssShmem"),
           (unsigned long long)process_memory_kib(wire->peer, "Threads"));
    printf("\"setup_us\": %.1f, \"event_idx\": %s, \"packed\": %s, \"checked\": %llu, "
           "\"odd_used_lengths\": %llu, \"wrong_bases\": %u}\n",
           (double)setup / 1e3, options->event_idx ? "true" : "false",
           options->packed ? "true" : "false", (unsigned long long)checked,
           (unsigned long long)short_used, wrong_bases);
}

static void run(struct options *options)
{
    struct worker *workers = calloc(options->queues, sizeof *workers);
    struct wire wire = {0};
    struct {
        uint64_t capacity;
    } config;
    struct rlimit files;

    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    lay_out(workers, options);
    wire_connect(&wire, options->socket, options->connect_timeout);
    uint64_t connected = now_ns();
    uint64_t needed = (options->packed ? F_PACKED : 0) | (options->indirect ? F_INDIRECT : 0) |
                      (options->event_idx ? F_EVENT_IDX : 0) | (options->queues > 1 ? F_BLK_MQ : 0);
    wire_features(&wire, F_BLK_FLUSH, needed, P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS);
    unsigned offered = wire_queues(&wire);
    if (offered < options->queues)
        die(EXIT_UNSUPPORTED, "the back-end has %u queues", offered);
    if (wire_config(&wire, &config, sizeof config) &&
        (!options->span || options->span > config.capacity * SECTOR))
        options->span = config.capacity * SECTOR;
    if (!options->span)
        die(EXIT_USAGE, "the back-end does not tell its capacity: --span is needed");
    wire_memory(&wire, regions, options->regions);
    for (unsigned i = 0; i < options->queues; i++) {
        struct ring *ring = &workers[i].ring;
        prepare(&workers[i], options, i);
        wire_ring(&wire, i, options->queue_size, ring_base(ring), (uintptr_t)ring->descriptor,
                  (uintptr_t)ring->driver, (uintptr_t)ring->device, ring->kick, ring->call);
    }
    for (unsigned i = 0; i < options->queues; i++) {
        /* Some back-ends make the fd they share with us non-blocking; a driver's sleep should
         * cost one system call whoever is at the other end. */
        int call = workers[i].ring.call;
        fcntl(call, F_SETFL, fcntl(call, F_GETFL) & ~O_NONBLOCK);
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die(EXIT_FAULT, "no thread");
    }

    watch(workers, options->queues, options->warm_up);
    uint64_t cpu = process_cpu_ns(wire.peer), own = process_cpu_ns(getpid()), begun = now_ns();
    uint64_t before = total_completed(workers, options->queues);
    atomic_store(&phase, MEASURE);
    watch(workers, options->queues, options->seconds);
    cpu = process_cpu_ns(wire.peer) - cpu;
    own = process_cpu_ns(getpid()) - own;
    uint64_t elapsed = now_ns() - begun;
    if (total_completed(workers, options->queues) == before)
        die(EXIT_STALLED, "no request was completed");
    atomic_store(&phase, DRAIN);
    for (unsigned i = 0; i < options->queues; i++)
        pthread_join(workers[i].thread, NULL);

    unsigned wrong_bases = 0;
    for (unsigned i = 0; i < options->queues; i++) {
        uint32_t mask = options->packed ? 0xffffffff : 0xffff;
        wrong_bases += (wire_stop(&wire, i) & mask) != ring_base(&workers[i].ring);
    }
    report(options, workers, &wire, cpu, own, elapsed, workers[0].first_done - connected,
           wrong_bases);
    close(wire.fd);
}

/* --- options --- */

static const char usage[] =
    "usage: load --socket=PATH [options]\n"
    "  --depth=N            requests in flight for each queue, 1 to 256 (1)\n"
    "  --queues=N           rings, each with its own driver thread (1)\n"
    "  --queue-size=N       entries of a ring, a power of two (what the depth needs, 128 or more)\n"
    "  --packed             packed rings instead of split ones\n"
    "  --no-event-idx       notification flags instead of event indices\n"
    "  --indirect           indirect descriptors\n"
    "  --block=BYTES        data of a request, 512 to 1048576 (4096)\n"
    "  --segments=N         descriptors for that data, 1 to 64 (1)\n"
    "  --write-percent=N    writes among the requests (0)\n"
    "  --flush-every=N      every Nth request is a flush (never)\n"
    "  --sequential         blocks one after another instead of at random\n"
    "  --span=BYTES         use only this much of the device\n"
    "  --regions=N          memory regions, 1 to 509 (2)\n"
    "  --no-seal            memory that its owner could still shrink\n"
    "  --poll               spin for completions instead of sleeping on the call fd\n"
    "  --verify             write known data and check what is read\n"
    "  --seconds=S          measured time (2)\n"
    "  --warm-up=S          time before that (0.5)\n"
    "  --connect-timeout=S  wait so long for somebody to listen (10)\n"
    "  --seed=N             of the random numbers (1)\n";

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
        die(EXIT_USAGE, "the data is no whole number of sectors and segments");
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
