"""The example of the reference's README, line by line: rust-vmm's `vhost-user-backend` in Python.

    python examples/reference_readme.py             # try it with the embedded driver
    python examples/reference_readme.py SOCKET      # serve it

There `process_queue` of a back-end walks the available descriptor chains, completes each, and
signals the driver when that wants it. Here each chain is room to fill with entropy, as virtio-rng
has it (virtio 1.3, section 5.4), so that QEMU attaches the back-end, next to shared memory, with

    -chardev socket,id=rng,path=SOCKET,reconnect=1 -device vhost-user-rng-pci,chardev=rng

A device needs none of this: `VirtioDevice` (text_source.py) does it all, and faster.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from guest_memory import GuestMemory, MemoryHolder
from vhost_backend import (
    Listener,
    VhostBackendError,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioFeature,
    Vring,
    WakeFd,
)
from virtqueue import VirtqueueError

log = logging.getLogger(__name__)

QUEUE = 0
#: The most bytes for one request: a guest must not make us hold more.
MOST = 65536


class NoMemoryConfigured(VhostBackendError):
    """The front-end has kicked a queue before it has shared memory."""


class Service(VhostUserBackendBase):
    """The `VhostUserService` of that README, with entropy where it says "Process the request"."""

    def __init__(self) -> None:
        self.memory: GuestMemory | None = None
        self.event_idx = False
        self.exit = WakeFd()

    def num_queues(self) -> int:
        return 1

    def max_queue_size(self) -> int:
        return 1024

    def features(self) -> int:
        # QEMU's vhost-user-rng lets its guest accept INDIRECT_DESC, whatever a back-end offers.
        return int(
            VirtioFeature.VERSION_1
            | VirtioFeature.EVENT_IDX
            | VirtioFeature.INDIRECT_DESC
            | VirtioFeature.PROTOCOL_FEATURES
        )

    def set_event_idx(self, enabled: bool) -> None:
        self.event_idx = enabled

    def update_memory(self, memory: GuestMemory) -> None:
        self.memory = memory

    def exit_event(self, thread_index: int) -> WakeFd:
        return self.exit

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        if device_event != QUEUE:
            raise VhostBackendError(f"no descriptor has the number {device_event}")
        vring = vrings[device_event]
        if not self.event_idx:
            self.process_queue(vring)
            return False
        while True:
            vring.disable_notification()
            self.process_queue(vring)
            if not vring.enable_notification():
                return False

    def process_queue(self, vring: Vring) -> bool:
        """Work on what is available; whether there was something."""
        used_any = False
        if self.memory is None:
            raise NoMemoryConfigured
        with vring.get_mut() as state:
            for chain in state.available():
                used_any = True
                length = chain.write(os.urandom(min(chain.writable_length, MOST)))
                try:
                    state.add_used(chain.head, length)
                except VirtqueueError as error:
                    log.warning("cannot return used descriptors to the ring: %s", error)
                if not self.event_idx or state.needs_notification():
                    state.signal_used_queue()
        return used_any


def serve(path: str) -> None:
    """Serve one front-end after another, until SIGTERM."""
    with (
        VhostUserDaemon("entropy", Service(), MemoryHolder()) as daemon,
        Listener(path) as listener,
    ):
        ended = False

        def end(number: int, frame: FrameType | None) -> None:
            nonlocal ended
            ended = True
            daemon.shutdown()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        while not ended:
            daemon.start(listener)
            try:
                daemon.wait()
            except Exception as error:
                log.warning("the connection has ended: %s", error)


def try_it() -> None:
    """Ask for 32 bytes, as a guest would."""
    from vhost_backend.testing import attached

    with attached(Service()) as session:
        room, vring = session.allocate(32), session.vrings[0]
        vring.submit(readable=[], writable=[(room, 32)])
        vring.kick()
        ((_, written),) = vring.completions()
        print(session.memory.read(room, written).hex())


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    elif len(sys.argv) == 1:
        try_it()
    else:
        sys.exit("usage: python examples/reference_readme.py [SOCKET]")
