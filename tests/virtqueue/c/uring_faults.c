/*
 * A kernel that refuses, for the tests of uring.c: its system calls go through here when the engine
 * is built with -Dsyscall=faulty_syscall and this file.
 */
#undef syscall
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

extern long syscall(long number, ...);
long faulty_syscall(long number, ...);

#define SETUP 425
#define ENTER 426
#define PLANNED 256
#define SHOWN __attribute__((visibility("default")))

SHOWN uint32_t fault_setup_flags; /* io_uring_setup answers EINVAL to these */
SHOWN uint32_t fault_features;    /* and does not have these */
/* For each io_uring_enter in turn: 0 as it is, -errno, or so many are submitted at most. */
SHOWN int32_t fault_plan[PLANNED];
SHOWN uint32_t fault_planned;
SHOWN uint32_t fault_entered;   /* how often it was called */
SHOWN uint32_t fault_submitted; /* requests that reached the kernel */
SHOWN uint32_t fault_last_flags; /* of the last ring that was made */

SHOWN uint32_t fault_durable;    /* those of them with RWF_DSYNC */

static uint32_t head_offset, mask_offset, rings_size, entries_size;

static long setup(long entries, uint32_t *parameters)
{
    const uint32_t flags = parameters[2];
    if (flags & fault_setup_flags) {
        errno = EINVAL;
        return -1;
    }
    const long fd = syscall(SETUP, entries, parameters);
    parameters[5] &= ~fault_features;
    fault_last_flags = flags;
    /* struct io_uring_params: sq_off begins at word 10, with head, tail and mask. */
    head_offset = parameters[10];
    mask_offset = parameters[12];
    rings_size = parameters[16] + parameters[0] * 4; /* the array is what comes last */
    entries_size = parameters[0] * 64;
    return fd;
}

/* Look at what is about to be submitted. */
static uint32_t durable(int fd, uint32_t count)
{
    unsigned char *rings = mmap(NULL, rings_size, PROT_READ, MAP_SHARED, fd, 0);
    const unsigned char *entries = mmap(NULL, entries_size, PROT_READ, MAP_SHARED, fd, 0x10000000);
    uint32_t found = 0;
    if (rings != MAP_FAILED && entries != MAP_FAILED) {
        const uint32_t head = *(uint32_t *)(rings + head_offset);
        const uint32_t mask = *(uint32_t *)(rings + mask_offset);
        for (uint32_t i = 0; i < count; i++)
            found += (*(uint32_t *)(entries + 64 * ((head + i) & mask) + 28) & 2) != 0;
    }
    munmap(rings, rings_size);
    munmap((void *)entries, entries_size);
    return found;
}

static long enter(long fd, long submit, long wait, long flags)
{
    const uint32_t turn = fault_entered++;
    const int32_t planned = turn < fault_planned ? fault_plan[turn] : 0;
    if (planned < 0) {
        errno = -planned;
        return -1;
    }
    if (planned && planned < submit) {
        submit = planned;
        wait = 0; /* as the kernel does when it has not taken all */
    }
    const uint32_t looked_at = submit ? durable((int)fd, (uint32_t)submit) : 0;
    const long done = syscall(ENTER, fd, submit, wait, flags, NULL, 0L);
    if (done > 0) {
        fault_submitted += (uint32_t)done;
        fault_durable += looked_at;
    }
    return done;
}

long faulty_syscall(long number, ...)
{
    long argument[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        argument[i] = va_arg(list, long);
    va_end(list);
    if (number == SETUP)
        return setup(argument[0], (uint32_t *)argument[1]);
    if (number == ENTER)
        return enter(argument[0], argument[1], argument[2], argument[3]);
    return syscall(number, argument[0], argument[1], argument[2], argument[3], argument[4],
                   argument[5]);
}
