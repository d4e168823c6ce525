"""Memory and a ring without vhost-user: guest-memory and virtqueue alone, between two processes.

    python examples/one_ring.py [WORD ...]

The parent is the driver: it puts each word into the ring and waits. The child is the device: it
has mapped the same memory at another address, writes each word in capitals, and gives it back. Two
eventfds are all they have besides: one to kick, one to call.
"""

from __future__ import annotations

import os
import subprocess
import sys

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress
from virtqueue import DeviceQueue, DriverQueue, RingConfig, ring_layout

SIZE = 1 << 20
RING = 64
WORDS = GuestAddress(0x10000)  # a slot for each descriptor, behind the ring
SLOT = 256
#: Where the driver has the memory, by its own account. Rings are addressed in these terms.
USER = UserAddress(0x7000_0000)
LAYOUT = ring_layout(RING)
CONFIG = RingConfig(
    size=RING,
    descriptor_address=USER + LAYOUT.descriptor,
    driver_address=USER + LAYOUT.driver,
    device_address=USER + LAYOUT.device,
    event_idx=True,
)


def driver(words: list[bytes]) -> int:
    """Start the device, hand it the words, print what comes back."""
    memory, fd = GuestMemory.allocate(SIZE, guest_address=0, user_address=USER)
    kick, call = os.eventfd(0), os.eventfd(0)
    command = [sys.executable, __file__, "--device", *map(str, (fd, kick, call))]
    with subprocess.Popen(command, pass_fds=(fd, kick, call)) as device:
        queue = DriverQueue(CONFIG, memory)
        for start in range(0, len(words), RING // 2):
            waiting = {}
            for number, word in enumerate(words[start : start + RING // 2]):
                place = GuestAddress(WORDS + 2 * number * SLOT)
                memory.write(place, word)
                answer = GuestAddress(place + SLOT)
                identity = queue.add(readable=[(place, len(word))], writable=[(answer, len(word))])
                waiting[identity] = answer
            if queue.publish():
                os.eventfd_write(kick, 1)
            while waiting:
                for identity, written in queue.collect():
                    print(memory.read(waiting.pop(identity), written).decode())
                # True: something has completed since we looked, and no call will come for it.
                if waiting and not queue.enable_notification():
                    os.eventfd_read(call)
        device.terminate()
    return 0


def device(fd: int, kick: int, call: int) -> None:
    """Map what the driver shares, and serve the ring until told to end."""
    region = Region(GuestAddress(0), SIZE, USER)
    memory = GuestMemory.map([(region, fd)])
    with DeviceQueue(CONFIG, memory) as queue:
        while True:
            batch = queue.take()
            for chain in batch:
                chain.write(chain.read().upper())
                queue.complete(chain)
            if batch:
                if queue.publish():
                    os.eventfd_write(call, 1)
            else:
                os.eventfd_read(kick)  # an empty take has asked for a kick, and looked again


if __name__ == "__main__":
    if sys.argv[1:2] == ["--device"]:
        device(*map(int, sys.argv[2:]))
    else:
        words = sys.argv[1:] or ["some", "words"]
        sys.exit(driver([word.encode()[:SLOT] for word in words]))
