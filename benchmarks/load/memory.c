#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HOLE (2ull << 20) /* of guest addresses between regions, so that no two are neighbours */

struct region regions[MAX_REGIONS];

static uint64_t reserved[MAX_REGIONS];

uint64_t memory_reserve(unsigned region, uint64_t size, uint64_t alignment)
{
    uint64_t offset = (reserved[region] + alignment - 1) & ~(alignment - 1);

    reserved[region] = offset + size;
    return offset;
}

void memory_map(unsigned count, bool seal)
{
    uint64_t guest = 0, page = 64 << 10;

    for (unsigned i = 0; i < count; i++) {
        uint64_t size = (reserved[i] + page - 1) & ~(page - 1);
        if (!size)
            size = page;
        int fd = memfd_create("guest-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0 || ftruncate(fd, (off_t)size) < 0 ||
            (seal && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0))
            die(EXIT_FAULT, "guest memory: %s", strerror(errno));
        void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (host == MAP_FAILED)
            die(EXIT_FAULT, "guest memory: %s", strerror(errno));
        regions[i] = (struct region){guest, size, host, fd};
        guest = (guest + size + 2 * HOLE - 1) & ~(HOLE - 1);
    }
}

struct place memory_at(unsigned region, uint64_t offset)
{
    return (struct place){regions[region].host + offset, regions[region].guest + offset};
}
