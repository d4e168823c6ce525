/*
 * The process dies at a chosen store of the protocol, as if SIGKILL had come right after it.
 * Compiled with the engine's sources and -DVQ_TEST_STOP by test_c_stops.py.
 */
#include <signal.h>

#include "chain.h"

VQ_API uint32_t vq_test_stores;
VQ_API uint32_t vq_test_stop_at;

void test_stop(void)
{
    if (++vq_test_stores == vq_test_stop_at)
        raise(SIGKILL);
}
