/*
 * A worker's loop over one queue: look at the ring, sleep, take, have a handler work, complete,
 * signal.
 *
 * Ownership.  The worker holds a lock of its caller's while it runs here.  Another thread that wants
 * the queue sets `interrupt` and wakes the epoll descriptor; the worker returns soon after.  Only a
 * handler in C may take long, as it may wait for a disk.  The queue therefore belongs to no thread
 * while a handler works, and any thread may borrow it.  The handler works on the arrays of its batch
 * and on guest memory that the caller keeps mapped, never on the ring or the engine.  If the queue was
 * borrowed when the handler ends, the caller gets the batch and checks whether it still counts.
 *
 * Looking at the ring keeps a processor busy, and saves the driver's kick and our wake-up.  Its time
 * adapts: a sleep that a little more looking would have spared doubles it, a long sleep halves it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "clock.h"
#include "engine.h"

#define FIRST_SPIN_NS 4000u
#define LOOKS_PER_CLOCK 32u
#define EVENTS 4

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline bool interrupted(const struct vq_server *server)
{
    /* Partner: the thread that sets it wakes epoll_fd afterwards, which ends a sleep that missed it. */
    return __atomic_load_n(&server->interrupt, __ATOMIC_ACQUIRE);
}

static inline bool change_owner(struct vq_server *server, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(&server->owner, &from, to, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

/*
 * Add one to the call eventfd.  A full eventfd refuses that, and holds a pending signal already.
 * The front-end can fill it and make it blocking, which holds us up; a thread that wants the queue
 * back then reads the eventfd (see vq_server).
 */
static void signal_driver(struct vq_server *server)
{
    const struct vq_queue *queue = pointer(server->queue);
    struct vq_counters *counters = pointer(queue->counters);
    const uint64_t one = 1;
    __atomic_store_n(&server->signal, 0, __ATOMIC_RELAXED); /* first: a later wish is another one */
    if (server->call_fd < 0)
        return;
    if (counters)
        counters->notifications_sent++;
    /* Another error of the descriptor shows elsewhere; this loop has no caller to tell. */
    ssize_t ignored = write(server->call_fd, &one, sizeof(one));
    (void)ignored;
}

/* With `held` the signal, which can make the thread wait, is left to a turn without `held`. */
static inline int turn(struct vq_server *server, bool held)
{
    struct vq_queue *queue = pointer(server->queue);
    queue->notify = 0;
    if (queue->count) {
        const int finished = queue_finish(queue);
        if (unlikely(finished < 0))
            return finished;
        queue->count = 0;
        if (queue->notify)
            __atomic_store_n(&server->signal, 1, __ATOMIC_RELAXED);
        else if (queue->counters)
            ((struct vq_counters *)pointer(queue->counters))->notifications_suppressed++;
    }
    if (__atomic_load_n(&server->signal, __ATOMIC_RELAXED)) {
        if (held)
            return 0;
        signal_driver(server);
    }
    if (unlikely(interrupted(server)))
        return 0;
    return vq_take(queue);
}

int vq_turn(struct vq_server *server) { return turn(server, false); }

int vq_turn_held(struct vq_server *server) { return turn(server, true); }

/* Look until a chain is there, another thread interrupts, or `spin_ns` have passed. */
static bool spin(const struct vq_server *server)
{
    struct vq_queue *queue = pointer(server->queue);
    const uint64_t end = clock_ns() + server->spin_ns;
    do {
        for (uint32_t i = 0; i < LOOKS_PER_CLOCK; i++) {
            if (vq_ready(queue) > 0 || interrupted(server))
                return true;
            relax();
        }
    } while (clock_ns() < end);
    return false;
}

static void adapt(struct vq_server *server, uint64_t slept)
{
    if (slept < server->spin_max_ns) {
        server->spin_ns = server->spin_ns ? server->spin_ns * 2 : FIRST_SPIN_NS;
        if (server->spin_ns > server->spin_max_ns)
            server->spin_ns = server->spin_max_ns;
    } else {
        server->spin_ns = server->spin_ns > FIRST_SPIN_NS ? server->spin_ns / 2 : 0;
    }
}

/* Sleep until a kick comes (true), or another event that the caller has to see (false). */
static bool sleep_for_kick(struct vq_server *server)
{
    const struct vq_queue *queue = pointer(server->queue);
    struct epoll_event events[EVENTS];
    const uint64_t start = server->spin_max_ns ? clock_ns() : 0;
    const int count = epoll_wait(server->epoll_fd, events, EVENTS, -1);
    if (server->spin_max_ns)
        adapt(server, clock_ns() - start);
    bool kicked = false, other = count <= 0;
    for (int i = 0; i < count; i++) {
        if (events[i].data.fd == server->kick_fd)
            kicked = true;
        else
            other = true;
    }
    if (kicked && queue->counters)
        ((struct vq_counters *)pointer(queue->counters))->kicks++;
    return !other;
}

/* Wait until a chain is available; false when the caller has to see to another event. */
static bool wait_for_chains(struct vq_server *server)
{
    struct vq_queue *queue = pointer(server->queue);
    if (server->spin_ns > server->spin_max_ns)
        server->spin_ns = server->spin_max_ns;
    if (server->spin_ns) {
        queue_quiet(queue);
        if (spin(server))
            return true;
    }
    /* Asks for kicks, passes a full barrier and looks again. */
    if (vq_arm(queue) > 0)
        return true;
    if (!sleep_for_kick(server))
        return false;
    vq_disarm(queue);
    return true;
}

/* A turn that takes at most as many chains as the handler wants at once. */
static int turn_for_handler(struct vq_server *server)
{
    struct vq_queue *queue = pointer(server->queue);
    const uint32_t *wish = pointer(server->batch);
    const uint32_t limit = queue->limit;
    if (wish && *wish && *wish < limit)
        queue->limit = *wish;
    const int count = vq_turn(server);
    queue->limit = limit;
    return count;
}

int vq_serve(struct vq_server *server)
{
    if (server->size != sizeof(*server))
        return VQ_ABI_ERROR;
    struct vq_queue *queue = pointer(server->queue);
    const vq_handler handler = (vq_handler)(uintptr_t)server->handler;
    server->left = 0;
    for (;;) {
        const int count = turn_for_handler(server);
        if (unlikely(count < 0))
            return count;
        if (!count) {
            if (interrupted(server) || !wait_for_chains(server))
                return 0;
            continue;
        }
        if (!handler)
            return count;
        __atomic_store_n(&server->owner, VQ_OWNER_NOBODY, __ATOMIC_RELEASE);
        const int left = handler(pointer(server->context), queue);
        if (unlikely(!change_owner(server, VQ_OWNER_NOBODY, VQ_OWNER_ENGINE)) || left) {
            server->left = (uint32_t)left;
            return count;
        }
    }
}

int vq_borrow(struct vq_server *server)
{
    return change_owner(server, VQ_OWNER_NOBODY, VQ_OWNER_BORROWER) ||
           change_owner(server, VQ_OWNER_VISITED, VQ_OWNER_BORROWER);
}

void vq_give_back(struct vq_server *server)
{
    __atomic_store_n(&server->owner, VQ_OWNER_VISITED, __ATOMIC_RELEASE);
}
