"""Addresses behind an IOMMU ("IOMMU support").

With ACCESS_PLATFORM the driver's addresses are IOVAs, and the front-end sends their translations in
IOTLB messages. A ring that lacks an entry asks for it over the back-end's own channel, and goes on
when the entry comes. An invalidation is acknowledged only when no request in flight uses the memory
that it takes away.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

import vhost_protocol as vp
from guest_memory import GuestMemory, GuestMemoryError, Iotlb, Iova, UserAddress
from virtqueue import Reason

from ..errors import Refused
from ..features import VirtioFeature
from ..rate_limited_log import RateLimited
from ..vring.wanted import Wanted
from .context import Context
from .outcome import Answer, Descriptors, Outcome, Wait

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds that a ring waits for an IOTLB entry it has asked for.
MISS_TIMEOUT = 10.0


class Iommu:
    """The device IOTLB."""

    def __init__(self, context: Context, recall: Callable[[], Callable[[], None]]) -> None:
        self._context = context
        self._recall = recall
        self._faults = RateLimited(log)
        self._timers: dict[int, threading.Timer] = {}
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.IotlbMsg: self._message,
            vp.SetBackendReqFd: self._set_channel,
        }
        for vring in context.vrings:
            with vring.get_mut() as state:
                state.events.on_miss = self._miss

    def offers(self) -> vp.ProtocolFeatures:
        """The channel on which the back-end asks for entries."""
        return vp.ProtocolFeatures.BACKEND_REQ | vp.ProtocolFeatures.BACKEND_SEND_FD

    def disconnect(self) -> None:
        """Forget all entries, and close the channel."""
        timers, self._timers = self._timers, {}
        for timer in timers.values():
            timer.cancel()
        self._watch_progress(None)
        self._context.iotlb = None
        channel, self._context.channel = self._context.channel, None
        if channel is not None:
            channel.close()

    def features_changed(self) -> None:
        """Make or drop the IOTLB where ACCESS_PLATFORM was switched."""
        context = self._context
        wanted = bool(context.features & VirtioFeature.ACCESS_PLATFORM)
        if wanted != (context.iotlb is not None):
            context.iotlb = Iotlb() if wanted else None
            context.use_memory(context.memory.current)

    def _set_channel(self, message: vp.SetBackendReqFd, fds: Descriptors) -> Outcome:
        context = self._context
        before = context.channel
        assert context.session is not None
        context.channel = vp.BackendChannel.from_fd(fds.pop(), session=context.session, timeout=5.0)
        if before is not None:
            before.close()
        for vring in context.vrings:
            with vring.get_mut() as state:
                if state.signals.channel is not None:
                    state.signals.channel = context.channel
        context.backend.set_backend_req_fd(context.channel)
        return None

    def _message(self, message: vp.IotlbMsg, fds: Descriptors) -> Outcome:
        context = self._context
        iotlb = context.iotlb
        if iotlb is None:
            raise Refused("IOTLB_MSG", "ACCESS_PLATFORM is not negotiated")
        iova = Iova(message.iova)
        try:
            if message.type is vp.IotlbType.UPDATE:
                user = UserAddress(message.user_address)
                _check_within(context.memory.current, user, message.size)
                iotlb.insert(iova, message.size, user, int(message.access))
            elif message.type is vp.IotlbType.INVALIDATE:
                iotlb.invalidate(iova, message.size)
            else:
                raise Refused("IOTLB_MSG", f"{message.type.name} is not a front-end's message")
        except GuestMemoryError as error:
            raise Refused("IOTLB_MSG", str(error)) from error
        if message.type is vp.IotlbType.UPDATE:
            self._deny(message)
            context.use_memory(context.memory.current, (message.iova, message.size))
            return Answer(vp.Ack())
        context.use_memory(context.memory.current, (0, 0))
        self._watch_progress(context.wake)
        resume = self._recall()
        every = range(len(context.vrings))
        return Wait(self._settled, lambda: self._acknowledge(resume), every)

    def _deny(self, update: vp.IotlbMsg) -> None:
        """Break rings that wait for an access which the new entry does not permit.

        They would only ask again and get the same answer.
        """
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                need = state.need
                if need is None or not update.iova <= need.address < update.iova + update.size:
                    continue
                denied = need.access & ~int(update.access)
                if not denied:
                    continue
                self._tell(need.address, vp.IotlbAccess(denied))
                state.fail_need(Reason.ACCESS)

    def _tell(self, address: int, access: vp.IotlbAccess) -> None:
        channel = self._context.channel
        if channel is not None:
            with contextlib.suppress(vp.ProtocolError, OSError):
                channel.iotlb_access_fail(address, access, need_reply=False)

    def _watch_progress(self, wake: Callable[[], None] | None) -> None:
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.events.on_progress = wake

    def _acknowledge(self, resume: Callable[[], None]) -> Answer:
        self._watch_progress(None)
        resume()
        return Answer(vp.Ack())

    def _settled(self) -> bool:
        """Whether every request in flight uses the present snapshot."""
        for vring in self._context.vrings:
            with vring.get_ref() as state:
                if not state.settled:
                    return False
        return True

    def _miss(self, index: int, need: Wanted) -> bool:
        """Ask for the entry that ring `index` waits for; False when that is impossible.

        Called on a worker, with the ring's lock.
        """
        channel = self._context.channel
        try:
            if channel is None:
                raise ConnectionError("the front-end has given no channel to ask on")
            channel.iotlb_miss(need.address, vp.IotlbAccess(need.access), need_reply=False)
        except (vp.ProtocolError, OSError) as error:
            self._faults.warning(
                "%s: an IOTLB entry cannot be asked for: %s", self._context.name, error
            )
            return False
        timer = threading.Timer(MISS_TIMEOUT, self._expire, (index, need))
        timer.daemon = True
        # One for each ring: a ring waits for one entry at a time.
        before = self._timers.get(index)
        self._timers[index] = timer
        if before is not None:
            before.cancel()
        try:
            timer.start()
        except RuntimeError as error:  # no more threads: the ring waits without a limit
            self._faults.error("the wait for an IOTLB entry has no time limit: %s", error)
        return True

    def _expire(self, index: int, need: Wanted) -> None:
        with self._context.vrings[index].get_mut() as state:
            if state.need is need:
                self._faults.warning(
                    "%s: queue %d: no IOTLB entry came for %#x in %g s",
                    self._context.name,
                    index,
                    need.address,
                    MISS_TIMEOUT,
                )
                state.fail_need()


def _check_within(memory: GuestMemory, address: int, size: int) -> None:
    """Raise `Refused` unless a range of user addresses lies "within vhost memory regions"."""
    end = address + size
    while address < end:
        for region in memory.regions:
            if region.user_address <= address < region.user_address + region.size:
                address = region.user_address + region.size
                break
        else:
            raise Refused("IOTLB_MSG", f"user address {address:#x} is in no memory region")
