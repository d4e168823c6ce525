"""The driver's side of one vring."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from virtqueue import DriverQueue, RingConfig

from ..errors import VhostBackendError
from ..fds import eventfd

#: Where our memory starts in the guest's and in the front-end's address space. They differ, and
#: neither is 0, so that an address of the wrong kind is noticed.
GUEST_BASE = 0x1_0000_0000
USER_BASE = 0x7F00_0000_0000

#: Seconds that a device may take from a completion to its signal.
_SIGNAL_DELAY = 1.0


class SessionError(VhostBackendError):
    """The back-end did not do what a back-end has to do (no answer in time, a feature missing)."""


class DriverVring:
    """The driver's side of one vring: its ring, and the descriptors to kick and be called on."""

    def __init__(
        self,
        index: int,
        queue: DriverQueue,
        config: RingConfig,
        offset: int = 0,
        ring_offset: int = USER_BASE - GUEST_BASE,
    ) -> None:
        self.index = index
        #: What the device calls guest address 0: IOVAs differ from guest addresses by this.
        self._offset = offset
        #: The same of the ring's own addresses, which may be user addresses.
        self._ring_offset = ring_offset
        self.queue = queue
        self.config = config
        self.kick_fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self.call_fd, select.POLLIN)
        self._connection = -1

    def watch(self, connection: int) -> None:
        """End the wait for completions when the back-end hangs up this socket (-1: none)."""
        if self._connection >= 0:
            self._poller.unregister(self._connection)
        self._connection = connection
        if connection >= 0:
            self._poller.register(connection, select.POLLRDHUP)

    def submit(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        *,
        indirect: bool = False,
    ) -> int:
        """Add a chain of (guest address, length) pieces; returns its id. Not visible until `kick`.

        Raises `virtqueue.VirtqueueError` when the ring is full.
        """
        offset = self._offset
        return self.queue.add(
            readable=[(address + offset, length) for address, length in readable],
            writable=[(address + offset, length) for address, length in writable],
            indirect=indirect,
        )

    def kick(self) -> None:
        """Make what was submitted visible, and signal the device unless it said not to."""
        if self.queue.publish():
            eventfd.signal(self.kick_fd)

    def completions(self, timeout: float = 10.0) -> list[tuple[int, int]]:
        """Wait for at least one completion; (id, bytes written) for each there is.

        With a `timeout` of 0 the ring is only looked at. Raises `SessionError` after `timeout`
        seconds without a completion, when the back-end has hung up, and when there is a completion
        that no signal follows.
        """
        while True:
            done = self.queue.collect()
            if done:
                return done
            if self.queue.enable_notification():
                continue
            ready = dict(self._poller.poll(timeout * 1000))
            if self.call_fd not in ready:
                done = self.queue.collect()
                if not done and ready:
                    raise SessionError(f"vring {self.index}: the back-end has hung up")
                if not done:
                    raise SessionError(f"vring {self.index}: nothing completed in {timeout:g} s")
                if timeout and not self._poller.poll(_SIGNAL_DELAY * 1000):
                    raise SessionError(
                        f"vring {self.index}: completions came without the signal asked for"
                    )
                return done
            eventfd.drain(self.call_fd)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.kick_fd)
        os.close(self.call_fd)

    # -- where the ring is, for drivers that break its rules ------------------------------------

    @property
    def descriptor_area(self) -> int:
        """Guest address of the descriptor table; of the descriptor ring when packed."""
        return self._place(self.config.descriptor_address)

    @property
    def driver_area(self) -> int:
        """Guest address of the available ring; of the driver's event structure when packed."""
        return self._place(self.config.driver_address)

    @property
    def device_area(self) -> int:
        """Guest address of the used ring; of the device's event structure when packed."""
        return self._place(self.config.device_address)

    def _place(self, address: int) -> int:
        return address - self._ring_offset
