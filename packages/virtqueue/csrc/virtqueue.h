/*
 * The C engine of virtqueue: the device's side of split and packed rings, a batch at a time.
 *
 * A plain shared library for ctypes; it knows nothing of Python.  The structures mirror layout.py,
 * which also documents the meaning of every field and flag; vq_layout() reports what was compiled
 * and a test compares both.  A queue and its engine share one struct vq_queue and the arrays that
 * it points to; all else is private to the engine.
 *
 * The guest and its driver are not trusted.  Whatever they can write (rings, descriptors, tables of
 * indirect descriptors) is copied once and checked in the copy.  The structures in this header and
 * in guest_memory_abi.h belong to our own process and are trusted, after their magic, ABI version
 * and size were checked.
 *
 * Calls return a count, 0 or 1, or one of the negative VQ_* results.  A queue is not thread-safe:
 * its owner makes one call at a time.  Different queues share nothing.
 */
#ifndef VIRTQUEUE_H
#define VIRTQUEUE_H

#include <stddef.h>
#include <stdint.h>

#include "guest_memory_abi.h"

#define VQ_MAGIC 0x45555156u /* "VQUE" */
#define VQ_ABI 2u
#define VQ_MAX_QUEUE_SIZE 32768u
#define VQ_CHAIN_LIMIT 1024u /* descriptors of a chain with a table, or the queue size if that is more */
#define VQ_HEADER_SIZE 16u

/* vq_record.flags */
#define VQ_READABLE_CONTIGUOUS 1u
#define VQ_WRITABLE_CONTIGUOUS 2u
#define VQ_EXTERNAL 4u
#define VQ_RESUBMITTED 8u
#define VQ_SHORT_HEADER 16u

/* vq_segment.flags */
#define VQ_SEGMENT_WRITABLE 1u

/* vq_done.flags */
#define VQ_DONE_STATUS 1u
#define VQ_DONE_KEEP 2u
#define VQ_DONE_WROTE_ALL 4u
#define VQ_DONE_LEFT 8u

/* vq_queue.features */
#define VQ_PACKED 1u
#define VQ_EVENT_IDX 2u
#define VQ_INDIRECT 4u
#define VQ_IN_ORDER 8u
#define VQ_BIG_ENDIAN 16u
#define VQ_IOMMU 32u
#define VQ_STATUS_BYTE 64u
#define VQ_LOG_USED 128u

/* vq_queue.flags */
#define VQ_INFLIGHT_UNGUARDED 1u

/* vq_queue.more */
#define VQ_MORE_AVAILABLE 1u
#define VQ_MORE_STALLED 2u

/* What a call returns when it is negative. */
enum vq_result {
    VQ_BROKEN = -1,    /* the ring is wrong; reason and detail say how */
    VQ_NEED = -2,      /* need_address, need_length, need_access must be provided first */
    VQ_USAGE = -3,     /* the caller is wrong */
    VQ_ABI_ERROR = -4, /* a shared structure has another magic, version or size */
    VQ_NO_MEMORY = -5,
};

/* Why a queue is broken; the numbers and names are layout.py's Reason. */
enum vq_reason {
    VQ_REASON_NONE = 0,
    VQ_REASON_AVAIL_JUMP = 1,
    VQ_REASON_HEAD_OUT_OF_RANGE = 2,
    VQ_REASON_NEXT_OUT_OF_RANGE = 3,
    VQ_REASON_CHAIN_TOO_LONG = 4,
    VQ_REASON_INDIRECT_NOT_NEGOTIATED = 5,
    VQ_REASON_INDIRECT_NESTED = 6,
    VQ_REASON_INDIRECT_WITH_NEXT = 7,
    VQ_REASON_INDIRECT_LENGTH = 8,
    VQ_REASON_INDIRECT_NEXT_OUT_OF_RANGE = 9,
    VQ_REASON_READABLE_AFTER_WRITABLE = 10,
    VQ_REASON_TOTAL_LENGTH = 11,
    VQ_REASON_ADDRESS = 12,
    VQ_REASON_ACCESS = 13,
    VQ_REASON_HEAD_IN_FLIGHT = 14,
    VQ_REASON_ZERO_LENGTH = 15,
    VQ_REASON_STATUS_BYTE = 16,
    VQ_REASON_RING_MEMORY = 17,
    VQ_REASON_TRUNCATED = 18,
    VQ_REASON_USED_RING = 20,
    VQ_REASON_INFLIGHT = 21,
    VQ_REASON_UNFINISHED_CHAIN = 22,
};

/* One taken chain, 64 bytes.  Offsets count from the window's base. */
struct vq_record {
    uint8_t header[VQ_HEADER_SIZE]; /* the first readable bytes, zero padded */
    uint64_t readable;              /* offset of the first readable byte after the header */
    uint64_t writable;              /* offset of the first writable byte */
    uint64_t status;                /* offset of the last writable byte */
    uint32_t readable_length;       /* readable bytes after the header */
    uint32_t writable_length;       /* all writable bytes */
    uint16_t head;                  /* split: head descriptor; packed: buffer id */
    uint16_t flags;
    uint16_t segment_count;
    uint16_t reserved;
    uint32_t first_segment;
    uint32_t reserved2;
};

/* One piece of a chain, 32 bytes. */
struct vq_segment {
    uint64_t host;
    uint64_t guest; /* guest physical address */
    uint32_t length;
    uint32_t flags;
    uint64_t provision; /* 0, or 1 + index into the provisions */
};

/* One completion, 8 bytes. */
struct vq_done {
    uint16_t head;
    uint8_t status;
    uint8_t flags;
    uint32_t written;
};

/* A piece of guest memory that the queue mapped on demand, 32 bytes; free when length is 0. */
struct vq_provision {
    uint64_t guest_address;
    uint64_t length;
    uint64_t host_address;
    uint32_t access;
    uint32_t uses; /* pieces of taken chains that rest on it; the engine counts */
};

/* What a queue has done, 48 bytes; plain numbers that only the queue's owner adds to. */
struct vq_counters {
    uint64_t requests; /* chains taken */
    uint64_t batches;  /* takes that returned any */
    uint64_t bytes;    /* readable ones of chains taken, and those reported as written */
    uint64_t kicks;
    uint64_t notifications_sent;
    uint64_t notifications_suppressed;
};

/* Everything a queue and its engine share. */
struct vq_queue {
    uint32_t magic;
    uint32_t abi;
    uint32_t size;
    uint32_t queue_size;
    uint32_t features;
    uint32_t flags;
    uint64_t descriptors;
    uint64_t driver;
    uint64_t device;
    uint64_t table;
    uint64_t log;
    uint64_t log_used;  /* guest address of device (packed: descriptors), or with log_pages ... */
    uint64_t log_pages; /* ... its offset in the first of these: uint64_t guest addresses of pages */
    uint64_t inflight;
    uint64_t inflight_size;
    uint64_t inflight_poison;
    uint64_t records;
    uint64_t segments;
    uint64_t done;
    uint64_t staged;
    uint64_t provisions;
    uint64_t private;
    uint32_t record_capacity;
    uint32_t segment_capacity;
    uint32_t staged_capacity;
    uint32_t provision_capacity;
    uint32_t limit;
    uint32_t count;
    uint32_t segment_count;
    uint32_t staged_count;
    uint32_t notify;
    uint32_t more;
    uint32_t reason;
    uint32_t need_access;
    uint64_t need_address;
    uint64_t need_length;
    uint64_t detail;
    uint64_t taken;
    uint64_t completed;
    uint64_t counters; /* host address of struct vq_counters, or 0 */
    uint32_t in_flight;
    uint32_t resubmit;
    uint16_t next_avail;
    uint16_t next_used;
    uint16_t signalled_used;
    uint8_t avail_wrap;
    uint8_t used_wrap;
    uint8_t signalled_valid;
    uint8_t stopped;
    uint8_t reserved[6];
};

#if defined(__GNUC__)
#define VQ_API __attribute__((visibility("default")))
#else
#define VQ_API
#endif

/* ---- the library ---- */

/* The ABI version of this library: VQ_ABI. */
VQ_API uint32_t vq_abi(void);

/* The hash of the sources this library was built from, as hatch_build.py computes it. */
VQ_API const char *vq_source_hash(void);

/*
 * The layout that was compiled: an entry for each structure (name "vq_record", offset 0) and for
 * each of its fields (name "vq_record.header"), ended by an entry without a name.
 */
struct vq_layout_entry {
    const char *name;
    uint32_t offset;
    uint32_t size;
};
VQ_API const struct vq_layout_entry *vq_layout(void);

/* ---- one queue ---- */

/*
 * Check the block's magic, ABI, size, features and arrays, and allocate the engine's private state,
 * which block->private then points to.  0, VQ_ABI_ERROR, VQ_USAGE or VQ_NO_MEMORY.
 */
VQ_API int vq_create(struct vq_queue *queue);

/*
 * Adopt descriptors, driver, device, table, log and log_used from the block: before the first take
 * and after each change.  Chains in flight keep the snapshot they were taken with.  0,
 * VQ_ABI_ERROR, VQ_NO_MEMORY, or VQ_BROKEN when the ring is misaligned.
 */
VQ_API int vq_attach(struct vq_queue *queue);

/*
 * Set the ring's position from the in-flight region, once, after vq_attach.  Returns how many
 * chains will be taken again, or VQ_BROKEN.
 */
VQ_API int vq_recover(struct vq_queue *queue);

/*
 * Take up to `limit` available chains into records, segments and done; sets count, segment_count
 * and more.  Returns count.  What stops it short is returned only when nothing was taken: VQ_NEED
 * leaves the ring where it was, VQ_BROKEN is for good (reason is set at once all the same).
 */
VQ_API int vq_take(struct vq_queue *queue);

/*
 * Complete staged[0:staged_count], but for entries marked KEEP; sets notify and resets
 * staged_count.  Returns how many were completed, or VQ_USAGE, with the head in detail, when an
 * entry is wrong: then none was.
 */
VQ_API int vq_publish(struct vq_queue *queue);

/* Complete done[0:count] as vq_publish does, then take as vq_take does. */
VQ_API int vq_cycle(struct vq_queue *queue);

/* Give the last `limit` chains of the batch back to the ring.  Returns how many, or VQ_USAGE. */
VQ_API int vq_rewind(struct vq_queue *queue);

/*
 * Undo takes: of the chains in flight named by heads[0:count], each once, give back the latest taken
 * ones, as far as nothing that was taken after them has been completed or is not named.  The position
 * goes back before them and their marks leave the in-flight region; chains that came from there go
 * back to the head of those to be taken again, and stay marked.  Returns how many; heads[0:result] are
 * they, the oldest first.  0 on a queue that is stopped, or broken so that it completes nothing more.
 * VQ_USAGE, with the head in detail, for one that is not in flight: then none is given back.
 */
VQ_API int vq_untake(struct vq_queue *queue, uint16_t *heads, uint32_t count);

/* Ask the driver for kicks, pass a full barrier, look again: 1 when chains are available. */
VQ_API int vq_arm(struct vq_queue *queue);

/* Tell the driver that kicks are not needed.  0. */
VQ_API int vq_disarm(struct vq_queue *queue);

/* 1 when a chain is available; changes nothing. */
VQ_API int vq_ready(struct vq_queue *queue);

/* Release all chains in flight and the private state.  The block can be created anew. */
VQ_API void vq_close(struct vq_queue *queue);

/* ---- truncated guest memory ---- */

/*
 * Install the SIGBUS handler of this process: a bus error in a watched region maps a zero page
 * over the faulting page and sets the region's poison word; any other is passed to the handler that
 * was there before.  1 when it was installed now, 0 when it was there, or -errno.
 */
VQ_API int vq_guard_install(void);

/*
 * Watch the regions of the snapshot whose gm_table is at `table`, or stop.  A mapping that several
 * watched snapshots share is watched until the last of them is not.  Unwatch before a mapping goes
 * away.  0, VQ_ABI_ERROR or VQ_NO_MEMORY.
 */
VQ_API int vq_guard_watch(uint64_t table);
VQ_API int vq_guard_unwatch(uint64_t table);

/*
 * The same for one mapping that is no region of a snapshot, as of a dirty log or of in-flight
 * records: `size` bytes at `start`, with pages of `page_size` and the poison word at `poison`.
 * 0, VQ_USAGE for an address or a page size that is none, or VQ_NO_MEMORY.
 */
VQ_API int vq_guard_watch_range(uint64_t start, uint64_t size, uint64_t page_size, uint64_t poison);
VQ_API int vq_guard_unwatch_range(uint64_t start, uint64_t size);

/* How many bus errors were survived in this process, ever. */
VQ_API uint32_t vq_guard_events(void);

/* ---- serving a queue ---- */

/*
 * A handler in C: works on the batch that was just taken (records, segments and done of the queue)
 * and returns how many requests it leaves to the caller; it marks those VQ_DONE_LEFT.  It touches
 * nothing of the queue but its arrays, and nothing at all after it returned.
 */
typedef int (*vq_handler)(void *context, const struct vq_queue *queue);

/* vq_server.owner: who may touch the queue. */
#define VQ_OWNER_NOBODY 0u  /* a handler in C works: any thread may borrow the queue */
#define VQ_OWNER_ENGINE 1u  /* the worker that called vq_serve or vq_turn */
#define VQ_OWNER_BORROWER 2u
#define VQ_OWNER_VISITED 3u /* it was borrowed: look at it anew before going on */

/*
 * One worker that serves one queue, 80 bytes.  A hostile front-end can hold up a write to call_fd by
 * filling it and making it blocking; reading it lets the write through.
 */
struct vq_server {
    uint32_t size;      /* of this structure */
    uint32_t owner;     /* VQ_OWNER_*; atomic */
    uint32_t interrupt; /* come back as soon as possible; atomic, set by others */
    uint32_t signal;    /* signal the driver at the next turn, asked for or not; atomic */
    uint64_t queue;     /* host address of struct vq_queue */
    uint64_t handler;   /* vq_handler, or 0: batches are the caller's */
    uint64_t context;   /* for the handler */
    int32_t epoll_fd;   /* what is slept on */
    int32_t kick_fd;    /* in epoll_fd, edge-triggered, as data.fd; -1: none */
    int32_t call_fd;    /* an eventfd; -1: none */
    uint32_t left;      /* out: requests of the batch that the handler left */
    uint32_t spin_ns;   /* how long to look before sleeping; adapted */
    uint32_t spin_max_ns; /* 0: never look, only sleep */
    uint64_t batch;     /* host address of a uint32_t of the handler's: how many chains vq_serve is to
                         * take at most, 0 for as many as the queue's limit; or 0 */
};

/*
 * Complete done[0:count], signal the driver if it wants that, take the next batch.  Returns its
 * count, or a negative result; 0 also when `interrupt` is set, with nothing taken.  Kicks have not
 * been asked for: that is vq_serve's part.
 */
VQ_API int vq_turn(struct vq_server *server);

/*
 * vq_turn for a caller that must not wait, because it holds the interpreter's lock.  When the driver
 * wants a signal this takes nothing and returns 0; the caller follows with vq_turn or vq_serve, which
 * signals.
 */
VQ_API int vq_turn_held(struct vq_server *server);

/*
 * Repeat vq_turn, asleep when there is nothing to do, until the caller is wanted.  Returns the count
 * of a batch (of which the handler, if there is one, has left `left` requests); 0 after an
 * interruption, a signal or an event of another descriptor in epoll_fd; or a negative result.  Call it
 * without the interpreter's lock.
 */
VQ_API int vq_serve(struct vq_server *server);

/* Borrow the queue while a handler in C works: 1, or 0 when none does.  Give it back afterwards. */
VQ_API int vq_borrow(struct vq_server *server);
VQ_API void vq_give_back(struct vq_server *server);

/* A request's header begins with u32 type, u32 unused, u64 position, little-endian. */
#define VQ_FILE_TYPES 16u

/* vq_file.actions, besides VQ_IO_READ, VQ_IO_WRITE and VQ_IO_SYNC. */
#define VQ_FILE_LEAVE 255u   /* for the caller */
#define VQ_FILE_SUCCEED 254u /* nothing to do */

/* vq_file.flags */
#define VQ_FILE_DURABLE 1u /* a write completes when it is on the disk */

/* The handler's own: what was measured of taking so many requests at once; 48 bytes. */
#define VQ_PACES 4u
struct vq_pace {
    uint64_t begun; /* nanoseconds: the window, and the last batch */
    uint64_t last;
    uint32_t count; /* requests in the window */
    uint32_t windows;
    uint32_t cost[VQ_PACES]; /* nanoseconds a request; 0 before it was tried */
    uint32_t way;
    uint32_t reserved;
};

/* A handler's context: requests that read and write a file; 128 bytes. */
struct vq_file {
    uint32_t size;  /* of this structure */
    int32_t fd;
    uint64_t length; /* of what may be read and written, in bytes */
    uint32_t shift;  /* a header's position counts units of 1 << shift bytes */
    uint32_t flags;
    uint64_t uring;  /* vq_uring_open's, or 0 for system calls on the calling thread */
    uint64_t items;  /* host address of struct vq_io[capacity] */
    uint32_t capacity;
    uint32_t warm; /* the handler's own: how long no read had to wait */
    uint8_t actions[VQ_FILE_TYPES]; /* by type; the types above are left */
    uint64_t moved;  /* bytes, ever */
    uint32_t batch;  /* for vq_server.batch */
    uint32_t reserved;
    struct vq_pace pace;
};

/*
 * The handler.  What is not plain (another type, a length that is no whole number of units, the end
 * of the file, an error) is left; a request that was left may have been executed in part.  The entry of
 * one that the file failed has the errno (255 for a larger one) as its status.  A SYNC must not be tried
 * again then: the kernel reports a failed write-back once.
 */
VQ_API int vq_file_handle(void *file, const struct vq_queue *queue);

/* ---- moving bytes ---- */

#define VQ_IO_READ 0u     /* file to device-writable pieces */
#define VQ_IO_WRITE 1u    /* device-readable pieces to file */
#define VQ_IO_COPY_IN 2u  /* buffer to device-writable pieces */
#define VQ_IO_COPY_OUT 3u /* device-readable pieces to buffer */
#define VQ_IO_SYNC 4u     /* fdatasync: after the items before it, before those behind it */
#define VQ_IO_STREAM UINT64_MAX

/* vq_io.flags */
#define VQ_IO_DSYNC 1u /* WRITE: on the medium when it ends (RWF_DSYNC) */

/* One chain's part of a transfer, 56 bytes. */
struct vq_io {
    uint64_t segments; /* host address of the chain's struct vq_segment[] */
    uint64_t skip;     /* bytes of the readable (writable) side to pass over first */
    uint64_t length;   /* bytes to move; ends early where the chain does */
    uint64_t offset;   /* in the file; VQ_IO_STREAM: at its own position; copies: host address */
    int64_t result;    /* out: bytes moved, or -errno */
    uint32_t segment_count;
    uint32_t operation;
    uint32_t flags; /* others than those above: -EINVAL */
    uint32_t tag;   /* the caller's own */
};

/*
 * Do all items in their order.  Returns how many did all they were to do (moved `length`; SYNC: no
 * error); each has its result.  A positioned read or write that comes up short goes on until nothing
 * is moved; one on a stream is a single call.  The chains must be in flight.  May block on the file:
 * call it without the interpreter's lock unless the work is short.
 */
VQ_API int vq_transfer(int fd, struct vq_io *items, uint32_t count);

/*
 * An io_uring of the kernel, to do the same with: READ and WRITE items that would wait for the file
 * wait together, in no order between two SYNC items.  Up to `entries` (1 to 4096) are in flight at a
 * time, however many there are.  0 and *ring, or -errno of the kernel that refuses: ENOSYS (none, or
 * too old), EPERM (the sysctl kernel.io_uring_disabled, a seccomp filter), ENOMEM (RLIMIT_MEMLOCK),
 * EMFILE.  One call at a time; any thread may make it, and a child after fork gets a ring of its own.
 */
struct uring;
VQ_API int vq_uring_open(uint32_t entries, struct uring **ring);

/*
 * vq_transfer by the ring.  Returns when nothing is in flight.  Where the ring fails the items are
 * done by plain calls.
 */
VQ_API int vq_uring_transfer(struct uring *ring, int fd, struct vq_io *items, uint32_t count);

/* Give the ring back; not during a call. */
VQ_API void vq_uring_close(struct uring *ring);

#endif
