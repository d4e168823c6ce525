/*
 * Only in builds for tests (VQ_TEST_STOP): the process dies at a chosen store of the protocol, as
 * if SIGKILL had come right after it.
 */
#ifdef VQ_TEST_STOP

#include <signal.h>

#include "chain.h"

VQ_API uint32_t vq_test_stores;
VQ_API uint32_t vq_test_stop_at;

void test_stop(void)
{
    if (++vq_test_stores == vq_test_stop_at)
        raise(SIGKILL);
}

#endif
