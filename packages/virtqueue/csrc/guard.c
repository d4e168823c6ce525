/*
 * Surviving truncated guest memory, and truncated files of the front-end's that we keep records in.
 *
 * A front-end that shortens the file behind a mapping makes every touch of the lost pages a SIGBUS.
 * A handler that jumps out of the fault cannot unwind an interpreter, so this one mends instead: it
 * maps a zero page over the faulting page, sets the mapping's poison word, and returns.  Whatever
 * touched the page reads zeros; engines look at the word before they publish a completion.
 *
 * The handler only loads atomics, calls mmap as a system call, and stores two words.  It takes no
 * lock: entries are published and withdrawn by one atomic store each, and never freed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

#define ENTRIES_PER_BLOCK 512u

struct watched {
    uint64_t start; /* 0: the entry is free; published last, withdrawn first */
    uint64_t size;
    uint64_t poison;
    uint64_t page_size;
    uint64_t uses; /* under the lock */
};

struct block {
    struct watched entries[ENTRIES_PER_BLOCK];
    struct block *next;
};

uint32_t guard_events;

static struct block first_block;
static struct sigaction previous;
static bool installed;
static bool lock_word;

static void lock(void)
{
    while (__atomic_test_and_set(&lock_word, __ATOMIC_ACQUIRE))
        ;
}

static void unlock(void) { __atomic_clear(&lock_word, __ATOMIC_RELEASE); }

static void *raw_mmap(uint64_t address, uint64_t length)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return (void *)syscall(SYS_mmap, address, length, PROT_READ | PROT_WRITE, flags, -1, 0);
}

/* Mend the page at `address` if it lies in a watched mapping. */
static bool mend(uint64_t address)
{
    for (struct block *block = &first_block; block;
         block = __atomic_load_n(&block->next, __ATOMIC_ACQUIRE))
        for (uint32_t i = 0; i < ENTRIES_PER_BLOCK; i++) {
            struct watched *entry = &block->entries[i];
            const uint64_t start = __atomic_load_n(&entry->start, __ATOMIC_ACQUIRE);
            if (!start || address - start >= entry->size)
                continue;
            const uint64_t page = address & ~(entry->page_size - 1);
            if (raw_mmap(page, entry->page_size) == MAP_FAILED)
                return false;
            __atomic_store_n((uint32_t *)pointer(entry->poison), 1, __ATOMIC_RELEASE);
            /* After the word: a thread that sees the count move finds the word set. */
            __atomic_fetch_add(&guard_events, 1, __ATOMIC_RELEASE);
            return true;
        }
    return false;
}

static void pass_on(int number, siginfo_t *info, void *context)
{
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
        return;
    }
    const bool sent = info->si_code <= 0;
    if (previous.sa_handler == SIG_IGN && sent)
        return;
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
        return;
    }
    /* The faulting instruction runs again and meets the default action; a signal that was sent
     * has to be sent again. */
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(number, &standard, NULL);
    if (sent)
        raise(number);
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    if (info->si_code != BUS_ADRERR || !mend((uintptr_t)info->si_addr))
        pass_on(number, info, context);
    errno = saved;
}

int vq_guard_install(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    action.sa_sigaction = on_bus_error;
    sigemptyset(&action.sa_mask);
    lock();
    struct sigaction current;
    int result = sigaction(SIGBUS, NULL, &current);
    const bool ours = (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_bus_error;
    if (!result && !ours) {
        /* Once a handler that came after us has us as its previous, chaining to it would go in a
         * circle: the one from the first time stays. */
        if (!installed)
            previous = current;
        result = sigaction(SIGBUS, &action, NULL);
        installed = !result;
    }
    unlock();
    return result ? -errno : !ours;
}

/* Under the lock: the entry of a mapping, or NULL. */
static struct watched *find_entry(uint64_t start, uint64_t size)
{
    for (struct block *block = &first_block; block; block = block->next)
        for (uint32_t i = 0; i < ENTRIES_PER_BLOCK; i++)
            if (block->entries[i].start == start && block->entries[i].size == size)
                return &block->entries[i];
    return NULL;
}

/* Under the lock: a free entry, of a new block if need be. */
static struct watched *free_entry(void)
{
    struct block *block = &first_block;
    for (;;) {
        for (uint32_t i = 0; i < ENTRIES_PER_BLOCK; i++)
            if (!block->entries[i].start)
                return &block->entries[i];
        if (!block->next) {
            struct block *fresh = calloc(1, sizeof(*fresh));
            if (!fresh)
                return NULL;
            __atomic_store_n(&block->next, fresh, __ATOMIC_RELEASE);
        }
        block = block->next;
    }
}

static bool can_watch(uint64_t start, uint64_t size, uint64_t page, uint64_t poison)
{
    return start && poison && page && !(page & (page - 1)) && size;
}

static bool can_watch_region(const struct gm_region *region)
{
    return can_watch(region->host_address, region->size, region->page_size, region->poison);
}

/* Under the lock. */
static int watch(uint64_t start, uint64_t size, uint64_t page, uint64_t poison)
{
    struct watched *entry = find_entry(start, size);
    if (entry) {
        entry->uses++;
        return 0;
    }
    entry = free_entry();
    if (!entry)
        return VQ_NO_MEMORY;
    entry->size = size;
    entry->poison = poison;
    entry->page_size = page;
    entry->uses = 1;
    __atomic_store_n(&entry->start, start, __ATOMIC_RELEASE);
    return 0;
}

/* Under the lock. */
static void unwatch(uint64_t start, uint64_t size)
{
    struct watched *entry = find_entry(start, size);
    if (entry && --entry->uses == 0)
        __atomic_store_n(&entry->start, 0, __ATOMIC_RELEASE);
}

static const struct gm_table *checked(uint64_t address)
{
    const struct gm_table *table = pointer(address);
    return table->magic == GM_TABLE_MAGIC && table->abi == GM_ABI &&
                   table->size == sizeof(*table)
               ? table
               : NULL;
}

int vq_guard_unwatch(uint64_t table_address)
{
    const struct gm_table *table = checked(table_address);
    if (!table)
        return VQ_ABI_ERROR;
    const struct gm_region *regions = pointer(table->regions);
    lock();
    for (uint32_t i = 0; i < table->region_count; i++)
        if (can_watch_region(&regions[i]))
            unwatch(regions[i].host_address, regions[i].size);
    unlock();
    return 0;
}

int vq_guard_watch(uint64_t table_address)
{
    const struct gm_table *table = checked(table_address);
    if (!table)
        return VQ_ABI_ERROR;
    const struct gm_region *regions = pointer(table->regions);
    int result = 0;
    lock();
    for (uint32_t i = 0; i < table->region_count && !result; i++)
        if (can_watch_region(&regions[i]))
            result = watch(regions[i].host_address, regions[i].size, regions[i].page_size,
                           regions[i].poison);
    unlock();
    return result;
}

int vq_guard_watch_range(uint64_t start, uint64_t size, uint64_t page_size, uint64_t poison)
{
    if (!can_watch(start, size, page_size, poison))
        return VQ_USAGE;
    lock();
    int result = watch(start, size, page_size, poison);
    unlock();
    return result;
}

int vq_guard_unwatch_range(uint64_t start, uint64_t size)
{
    lock();
    unwatch(start, size);
    unlock();
    return 0;
}

uint32_t vq_guard_events(void) { return __atomic_load_n(&guard_events, __ATOMIC_ACQUIRE); }
