"""Memory that keeps the records of requests in flight when a back-end dies or is replaced.

"Inflight I/O tracking" in the specification.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final

import vhost_protocol as vp
from guest_memory import GuestMemoryError, SharedMapping, allocate_memfd
from virtqueue import InflightRegion, inflight_size

from ..errors import Refused
from ..features import VirtioFeature
from .context import MAX_RING_SIZE, Context
from .outcome import Answer, Descriptors, Outcome

log: logging.Logger = logging.getLogger("vhost_backend")

#: Descriptors of QEMU's largest ring.
_USUAL_SIZE: Final = 1024


class Inflight:
    """GET_INFLIGHT_FD makes the memory, SET_INFLIGHT_FD brings it back."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.GetInflightFd: self._get_fd,
            vp.SetInflightFd: self._set_fd,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """INFLIGHT_SHMFD where memory for it can be made: the rings keep the records."""
        try:
            os.close(allocate_memfd(1, "vhost-inflight"))
        except GuestMemoryError as error:
            log.info("%s: requests in flight are not recorded: %s", self._context.name, error)
            return vp.ProtocolFeatures(0)
        return vp.ProtocolFeatures.INFLIGHT_SHMFD

    def disconnect(self) -> None:
        """The rings have dropped their parts already."""

    def _get_fd(self, message: vp.GetInflightFd, fds: Descriptors) -> Outcome:
        self._check("GET_INFLIGHT_FD", message)
        # A guest may make larger rings than the front-end announces here or the device advises:
        # SeaBIOS under QEMU 10 uses 256 descriptors where QEMU announces 128.
        advised = self._context.backend.max_queue_size()
        each = max(self._sizes(max(advised, message.queue_size, _USUAL_SIZE)))
        size = message.num_queues * each
        # The memory is zeroes, which a queue reads as "never used".
        fd = allocate_memfd(size, "vhost-inflight")
        try:
            self._use("GET_INFLIGHT_FD", SharedMapping(fd, size), each, message.num_queues)
        except BaseException:
            os.close(fd)
            raise
        reply = vp.InflightReply(size, 0, message.num_queues, message.queue_size)
        return Answer(reply, (fd,), close=True)

    def _set_fd(self, message: vp.SetInflightFd, fds: Descriptors) -> Outcome:
        self._check("SET_INFLIGHT_FD", message)
        each = min(self._sizes(message.queue_size))
        if message.mmap_size % (64 * message.num_queues) == 0:
            # Queues share a region evenly, be it ours (see `_get_fd`) or another back-end's.
            each = max(each, message.mmap_size // message.num_queues)
        if message.mmap_offset % 8:
            raise Refused("SET_INFLIGHT_FD", f"offset {message.mmap_offset} is not aligned to 8")
        needed = message.num_queues * each
        if message.mmap_size < needed:
            raise Refused(
                "SET_INFLIGHT_FD",
                f"{message.mmap_size} bytes do not hold {message.num_queues} queues of {each}",
            )
        try:
            mapping = SharedMapping(
                fds[0].fileno(),
                needed,
                message.mmap_offset,
                guarded=self._context.guard.active,
            )
        except GuestMemoryError as error:
            raise Refused("SET_INFLIGHT_FD", str(error)) from error
        self._use("SET_INFLIGHT_FD", mapping, each, message.num_queues)
        return None

    def _check(self, request: str, message: vp.GetInflightFd | vp.SetInflightFd) -> None:
        if not 0 < message.num_queues <= len(self._context.vrings):
            raise Refused(request, f"there are no {message.num_queues} queues")
        if not 0 < message.queue_size <= MAX_RING_SIZE:
            raise Refused(request, f"no queue has {message.queue_size} descriptors")

    def _sizes(self, queue_size: int) -> list[int]:
        """Bytes of a queue's part; both formats' before SET_FEATURES (QEMU before 5.1 asks so)."""
        features = self._context.features
        known = [bool(features & VirtioFeature.RING_PACKED)] if features else [False, True]
        return [inflight_size(queue_size, packed) for packed in known]

    def _use(self, request: str, mapping: SharedMapping, each: int, queues: int) -> None:
        # Watch every region: one that comes back may be another file than we made.
        self._context.guard.watch_mapping(mapping)
        vrings = self._context.vrings[:queues]
        for index, vring in enumerate(vrings):
            with vring.get_ref() as state:
                if state.started:
                    raise Refused(request, f"vring {index} is started")
        for index, vring in enumerate(vrings):
            with vring.get_mut() as state:
                state.settings.inflight = InflightRegion(
                    mapping.address + index * each,
                    each,
                    mapping,
                    poison=mapping.poison_address,
                    direct=mapping.direct,
                )
