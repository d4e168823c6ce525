#include "virtqueue.h"

uint32_t guard_events;
