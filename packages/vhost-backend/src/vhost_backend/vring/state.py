"""What the front-end configured for one queue, and the queue made of it.

`VringState` knows no lock. The control thread and a worker share it, so a daemon holds each one in
a locked flavour (see `vring.locks`).

Ring states (vhost-user specification, "Ring states"): a ring is started or stopped and,
independently, enabled or disabled. It is *running* here when it is started, enabled, not draining,
and has a queue that the guest has not broken.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import Final

from guest_memory import DirtyLog, GuestMemory
from vhost_protocol import BackendChannel, BackendVringCall, BackendVringErr, ProtocolError
from virtqueue import (
    Batch,
    Chain,
    DeviceQueue,
    InflightRegion,
    Need,
    QueueBroken,
    Reason,
    RingConfig,
    UsageError,
)

from ..counters import QueueCounters
from ..errors import BackendUsageError
from ..fds import eventfd
from ..features import VirtioFeature
from ..rate_limited_log import RateLimited
from .on_demand import OnDemand
from .wanted import Wanted

log: logging.Logger = logging.getLogger("vhost_backend")

_RING_PACKED: Final = int(VirtioFeature.RING_PACKED)
_EVENT_IDX: Final = int(VirtioFeature.EVENT_IDX)
_INDIRECT_DESC: Final = int(VirtioFeature.INDIRECT_DESC)
_IN_ORDER: Final = int(VirtioFeature.IN_ORDER)
_ACCESS_PLATFORM: Final = int(VirtioFeature.ACCESS_PLATFORM)

_NEW_START: Final = (
    "the driver has broken the ring, which is left alone until the driver sets it up anew"
    " (reset the device or restart the guest)"
)
_ADVICE: Final = {
    Reason.RING_MEMORY: "the ring is not in the memory that the front-end shares: guest memory has"
    " to be shared, for QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on"
    " -machine memory-backend=mem, with SIZE as after -m",
    Reason.TRUNCATED: "the front-end has taken memory away that it had shared: its connection ends",
}


class VringState:
    """One vring, unsynchronised.

    `index` is the queue's number, `max_size` the ring size before SET_VRING_NUM, `engine` the ring
    engine to use ("c", "python", or None for the best there is), `status_byte` whether a
    completion writes a status into the last writable byte of its chain (block, SCSI, crypto).

    `addresses` are the descriptor, driver (available) and device (used) areas as the front-end
    sent them: user addresses, or IOVAs with ACCESS_PLATFORM. The queue resolves them, anew at each
    change of the memory table.
    """

    def __init__(
        self,
        index: int = 0,
        max_size: int = 1024,
        *,
        engine: str | None = None,
        status_byte: bool = False,
    ) -> None:
        self.index = index
        #: The device's, for log lines.
        self.name: str = ""
        self.max_size = max_size
        self.engine = engine
        self.status_byte = status_byte
        self.counters: QueueCounters = QueueCounters()
        self._guest_errors = RateLimited(log)
        self.on_demand: OnDemand = OnDemand()
        self.queue: DeviceQueue | None = None
        self.kick_fd: int = -1
        self.call_fd: int = -1
        self._call_is_eventfd = True
        self.err_fd: int = -1
        #: Borrowed: signalled when something was logged.
        self.log_fd: int = -1
        #: Called, with the lock held, when guest memory was taken away under the ring.
        self.on_truncated: Callable[[], None] | None = None
        #: Called, with the lock held, after each completion, while somebody waits for one.
        self.on_progress: Callable[[], None] | None = None
        #: Called, with the lock held, when the IOTLB lacks an entry (see `control.iommu`).
        self.on_miss: Callable[[VringState, Wanted], None] | None = None
        #: How many queues were built for this ring; a completion of an earlier one is dropped.
        self.generation: int = 0
        #: The front-end has gone, and `queue` is what its last requests are in: see `leave`.
        self.leaving: bool = False
        #: Called, with the lock held, with the generation and each batch that a back-end takes.
        self.on_take: Callable[[int, Batch], None] | None = None
        self._on_drained: Callable[[], None] | None = None
        #: Chains that the next cycle completes.
        self._working = 0
        #: Whether `needs_notification` was true and nobody has been signalled since.
        self._owes_signal = False
        self._forget()

    def _forget(self) -> None:
        self.size: int = self.max_size
        self.addresses: tuple[int, int, int] | None = None
        self.log_used: int | None = None
        #: This queue's part of the in-flight region, when the front-end keeps one.
        self.inflight: InflightRegion | None = None
        self.log: DirtyLog | None = None
        #: For notifications as messages, where they were negotiated.
        self.channel: BackendChannel | None = None
        #: Memory that the ring waits for.
        self.need: Wanted | None = None
        self.base: int = 0
        self.features: VirtioFeature = VirtioFeature(0)
        self.big_endian: bool = False
        self.enabled: bool = False
        self.started: bool = False
        self.draining: bool = False
        #: Started, and its queue is made later: the requests of the last front-end still run.
        self.deferred: bool = False
        #: Broken by the guest, with requests in flight: takes nothing, completes what there is.
        self.broken: bool = False
        self._homeless = False

    # -- configuration: the control plane's side ------------------------------------------------

    def set_queue_size(self, size: int) -> None:
        """Ring size in descriptors, for the next start."""
        self.size = size

    def set_queue_info(self, descriptor: int, driver: int, device: int) -> None:
        """Addresses of the descriptor, driver (available) and device (used) area."""
        self.addresses = (descriptor, driver, device)

    def set_queue_event_idx(self, enabled: bool) -> None:
        """Whether EVENT_IDX was negotiated, for the next start."""
        if enabled:
            self.features |= VirtioFeature.EVENT_IDX
        else:
            self.features &= ~VirtioFeature.EVENT_IDX

    def set_queue_next_avail(self, base: int) -> None:
        """Where to start, as SET_VRING_BASE gives it (packed: both indices and wrap counters)."""
        self.base = base

    def queue_next_avail(self) -> int:
        """Where the ring stands, as GET_VRING_BASE wants it."""
        return self.base if self.queue is None or self.leaving else self.queue.base

    def set_enabled(self, enabled: bool) -> None:
        """SET_VRING_ENABLE: tracked also while the ring is stopped."""
        self.enabled = enabled

    def set_kick(self, fd: int) -> None:
        """Take over a kick descriptor; -1 for none. The previous one is closed."""
        _close(self.kick_fd)
        self.kick_fd = eventfd.adopt(fd) if fd >= 0 else -1

    def set_call(self, fd: int) -> None:
        """Take over a call descriptor; -1 for none (the driver polls)."""
        _close(self.call_fd)
        self.call_fd = eventfd.adopt(fd) if fd >= 0 else -1
        self._call_is_eventfd = fd < 0 or eventfd.is_eventfd(fd)

    def set_err(self, fd: int) -> None:
        """Take over the descriptor that a broken ring is reported on; -1 for none."""
        _close(self.err_fd)
        self.err_fd = eventfd.adopt(fd) if fd >= 0 else -1

    def set_log(self, log: DirtyLog | None, log_used: int | None) -> None:
        """Log what is written from now on; `log_used` is where the used ring is logged, or None.

        Changes no index and may happen at any time.
        """
        self.log = log
        self.log_used = log_used
        if self.queue is not None and not self.leaving:
            self.queue.set_log(log, log_used)

    def set_queue_ready(self, memory: GuestMemory) -> None:
        """Build the queue from the configuration: the ring is started.

        A ring that does not lie in guest memory shows at the first take. Raises
        `BackendUsageError` without addresses, `virtqueue.UsageError` when there can be no such ring
        (see `config`).
        """
        config = self.config()
        config.check()
        self.queue = DeviceQueue(
            config,
            memory,
            base=self.base,
            engine=self.engine,
            inflight=self.inflight,
            log=self.log,
            counters=self.counters,
        )
        self.started = True
        self.draining = self.deferred = self.broken = False
        self._homeless = False
        self._working = 0
        self.generation += 1

    def config(self) -> RingConfig:
        """The ring as it would be started now."""
        if self.addresses is None:
            raise BackendUsageError(f"vring {self.index} has no addresses")
        features = int(self.features)  # numbers: flags would cost a microsecond each
        return RingConfig(
            size=self.size,
            descriptor_address=self.addresses[0],
            driver_address=self.addresses[1],
            device_address=self.addresses[2],
            packed=bool(features & _RING_PACKED),
            event_idx=bool(features & _EVENT_IDX),
            indirect=bool(features & _INDIRECT_DESC),
            in_order=bool(features & _IN_ORDER),
            iommu=bool(features & _ACCESS_PLATFORM),
            big_endian=self.big_endian,
            status_byte=self.status_byte,
            log_used=self.log_used,
        )

    def begin_drain(self, on_drained: Callable[[], None]) -> None:
        """Take no new chains; call `on_drained` (lock held) once no request is in flight."""
        self.draining = True
        if self.owes:
            self._on_drained = on_drained
        else:
            on_drained()

    def stop(self) -> int:
        """Drop the queue, whatever is still in flight, and return the base to report.

        Completions of the requests that were in flight are dropped when they come.
        """
        if self.leaving:
            self.started = self.draining = self.deferred = False
            return self.base
        self._on_drained = None
        if self._owes_signal:
            self.signal_call()  # the driver must not be signalled any more once this is answered
        if self.queue is not None:
            self.base = self.queue.base
            self._close_queue()
        self.started = self.draining = self.deferred = False
        self.generation += 1
        return self.base

    def _close_queue(self) -> None:
        assert self.queue is not None
        self.queue.close()
        self.queue = None
        self.broken = False

    def leave(self, on_drained: Callable[[], None]) -> bool:
        """The front-end has gone: the ring as new, except for what the device still works on.

        True when there is such work. Its requests keep their memory mapped until they end, and no
        queue is made before; `on_drained` is called (lock held) when they have ended, `left` drops
        them. Without an in-flight region they are not shown to the driver any more: whoever serves
        the ring next starts behind the last used entry, and serves them again.
        """
        queue = self.queue
        if queue is None or not queue.in_flight:
            self.leaving = False
            self.reset()
            return False
        if not self.leaving:
            self.leaving = True
            self._on_drained = on_drained
            queue.set_log(None, None)  # the log goes with the front-end
            if self.inflight is None:
                queue.stop()
        self.reset()
        return True

    def left(self) -> None:
        """What the last front-end's requests were in goes: the device has ended all of them."""
        if self.leaving and self.queue is not None:
            self._close_queue()
            self.generation += 1
        self.leaving = False
        self._on_drained = None

    def reset(self) -> None:
        """Back to how the ring was created; descriptors are closed."""
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)
        self._forget()

    def set_memory(self, memory: GuestMemory) -> None:
        """Go on with a new snapshot: the ring is looked up anew before the next take.

        A ring that could not be found in the old table gets its chance in the new one.
        """
        self._homeless = False
        self.need = None
        if self.queue is not None and not self.leaving:
            self.queue.set_memory(memory)

    @property
    def in_flight(self) -> int:
        """Requests taken and not completed."""
        return self.queue.in_flight if self.queue is not None else 0

    @property
    def owes(self) -> bool:
        """Whether requests of the present front-end are in flight."""
        return not self.leaving and self.in_flight > 0

    @property
    def settled(self) -> bool:
        """Whether every request in flight was taken with the present snapshot of memory."""
        return self.queue is None or self.leaving or self.queue.settled

    # -- the data path: the worker's side -------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether chains may be taken now."""
        return (
            self.enabled
            and self.started
            and self.queue is not None
            and not self.leaving
            and not self.draining
            and not self.broken
            and not self._homeless
            and self.need is None
        )

    @property
    def has_news(self) -> bool:
        """Whether something was completed that the driver may not have been told of."""
        queue = self.queue
        return queue is not None and (not queue.fresh or queue.completed > 0)

    @property
    def ready(self) -> bool:
        """Whether a chain waits to be taken."""
        return self.running and self.queue is not None and self.queue.ready()

    @property
    def direct(self) -> bool:
        """Whether the queue can be served from C, with nothing to be seen to here each time:
        no descriptor to signal beside the call's, no pages to be lent and reclaimed."""
        return (
            self.running
            and self.queue is not None
            and self.queue.engine == "c"
            and self.queue.resolved
            and self.channel is None
            and self._call_is_eventfd
            and self.on_progress is None
            and not self.on_demand.lent
            and (self.log_fd < 0 or self.log is None or not self.log.enabled)
        )

    def finish(self, taken: int) -> None:
        """Complete a batch of `taken` chains that was taken from the queue without `cycle`."""
        self._working = taken
        self.cycle(0)

    def cycle(self, limit: int) -> Batch | None:
        """Complete the batch before, signal the driver if it wants that, and take the next.

        An empty batch means that the driver has been asked for kicks. Returns None when the guest
        has broken the queue. Raises `virtqueue.UsageError` when the batch cannot be completed as
        its `done` says; then it is `queue.refused_batch()`. A draining or disabled ring completes
        and takes nothing.
        """
        queue = self.queue
        if queue is None:
            return None
        completes = self._working
        self._working = 0
        if not self.enabled or self.draining or self.leaving or self.broken:
            limit = 0
        while True:
            try:
                batch = queue.cycle(1 if limit and self.on_demand.has_stand_ins else limit)
            except UsageError:
                self._working = completes  # see `DeviceQueue.refused_batch`
                raise
            except QueueBroken as error:
                if error.notify:
                    self.signal_call()
                self.break_queue(error)
                return None
            except Need as need:
                if completes:
                    self._published(need.notify)
                    completes = 0
                if self._ask(need):
                    continue
                return None
            break
        if completes:
            self._published(batch.notify)
        self.on_demand.reclaim(queue)
        taken = len(batch)
        if taken:
            self._working = taken
            if self.on_take is not None:
                self.on_take(self.generation, batch)
        else:
            self._check_drained()
        return batch

    def take(self, limit: int) -> Batch | None:
        """Take without completing; None when nothing may be taken or the queue is broken."""
        if not self.running:
            return None
        assert self.queue is not None
        while True:
            try:
                batch = self.queue.take(1 if limit and self.on_demand.has_stand_ins else limit)
            except QueueBroken as error:
                self.break_queue(error)
                return None
            except Need as need:
                if self._ask(need):
                    continue
                return None
            break
        if batch and self.on_take is not None:
            self.on_take(self.generation, batch)
        return batch

    def fail_taken(self, heads: Iterable[int], status: int) -> int:
        """Complete those of these chains that are still in flight, with nothing written and
        `status` where the device has a status byte; returns how many there were.

        For chains that whoever has taken them will not complete any more.
        """
        self._publish_or_drop()
        failed = 0
        for head in heads:
            if self.queue is None:
                break
            self.queue.complete(head, int(self.status_byte), status)
            failed += self._publish_or_drop()
        self._working = 0
        self.signal_used_queue()
        return failed

    def _publish_or_drop(self) -> bool:
        """Publish what is staged, or forget it where the queue does not take it."""
        try:
            if self._publish():
                self._owes_signal = True
        except UsageError as error:
            log.debug("vring %d: a completion is dropped: %s", self.index, error)
            return False
        return True

    def add_used(self, chain: Chain | int, written: int, status: int = 0) -> None:
        """Stage the completion of one chain (or head); visible at `signal_used_queue`."""
        if self.queue is not None:
            self.queue.complete(chain, written, status)

    def needs_notification(self) -> bool:
        """Publish what is staged; whether the driver asked to be signalled for it.

        It is signalled by `signal_used_queue`, which has to follow when this is true.
        """
        if self._publish():
            self._owes_signal = True
        elif not self._owes_signal:
            self.counters.notifications_suppressed += 1
        return self._owes_signal

    def signal_used_queue(self) -> None:
        """Publish what is staged and signal the driver unless it said not to.

        What `needs_notification` has published counts as well.
        """
        if self.queue is None and not self._owes_signal:
            return
        if self._publish() or self._owes_signal:
            self.signal_call()
        else:
            self.counters.notifications_suppressed += 1

    def _publish(self) -> bool:
        """Publish what is staged; whether the driver wants to be signalled for that."""
        queue = self.queue
        if queue is None:
            return False
        try:
            wanted = queue.publish()
        except QueueBroken as error:
            self.break_queue(error)
            return False
        self._after_publishing()
        self.on_demand.reclaim(queue)
        self._check_drained()
        return wanted

    def enable_notification(self) -> bool:
        """Ask for kicks; True when chains came in meanwhile, so that the ring must be looked at."""
        if self.queue is None or not self.running:
            return False
        try:
            return self.queue.enable_notification()
        except QueueBroken as error:
            self.break_queue(error)
            return False

    def disable_notification(self) -> None:
        """Spare the driver its kicks while the ring is being worked on."""
        if self.queue is not None:
            self.queue.disable_notification()

    def read_kick(self) -> bool:
        """Consume a pending kick; False when the descriptor has no writer any more."""
        return eventfd.drain(self.kick_fd)

    def break_queue(self, error: QueueBroken) -> None:
        """The guest broke its ring: report it; the ring is not looked at until it is set up anew.

        One that is not in guest memory is only left alone until the memory changes. Requests that
        are in flight end as they would have.
        """
        if self.broken or self.leaving:
            self._check_drained()
            return
        if error.reason == Reason.TRUNCATED and self.on_truncated is not None:
            self.on_truncated()
        if error.reason == Reason.RING_MEMORY:
            self._homeless = True
            self.report_guest_error(error)
            self._check_drained()
            return
        self.broken = True
        self.report_guest_error(error)
        self._check_drained()

    def report_guest_error(self, error: QueueBroken) -> None:
        """Log (rate-limited) and signal the error descriptor, or send the message for it."""
        self.counters.guest_errors += 1
        self._guest_errors.warning(
            "%s: queue %d: %s; %s",
            self.name or "vring",
            self.index,
            error,
            _ADVICE.get(error.reason, _NEW_START),
        )
        self.signal_err()

    def signal_err(self) -> None:
        """Signal the error descriptor, or send the message that stands for it."""
        if self.err_fd >= 0:
            eventfd.signal(self.err_fd)
        elif self.channel is not None:
            self._send(self.channel, BackendVringErr(self.index))

    def signal_call(self) -> None:
        """Signal the driver: by the call descriptor, or by a message where that was negotiated."""
        self._owes_signal = False
        if self.call_fd >= 0:
            self.counters.notifications_sent += 1
            eventfd.signal(self.call_fd)
        elif self.channel is not None:
            self.counters.notifications_sent += 1
            self._send(self.channel, BackendVringCall(self.index))

    def drain_call(self) -> None:
        """Read the call eventfd, so that a thread that waits to write to it goes on."""
        eventfd.drain(self.call_fd)

    @staticmethod
    def _send(channel: BackendChannel, message: BackendVringCall | BackendVringErr) -> None:
        with contextlib.suppress(ProtocolError, OSError):
            # Not acknowledged: nobody may wait for the front-end with the ring's lock.
            channel.request(message, need_reply=False)

    def _published(self, wanted: bool) -> None:
        if wanted:
            self.signal_call()
        else:
            self.counters.notifications_suppressed += 1
        self._after_publishing()

    def _after_publishing(self) -> None:
        if self.log_fd >= 0 and self.log is not None and self.log.enabled:
            eventfd.signal(self.log_fd)
        if self.on_progress is not None:
            self.on_progress()

    def _ask(self, need: Need) -> bool:
        """Get what the ring needs: at once (True: go on), or by a message to the front-end.

        In the second case the ring is looked at again when memory changes.
        """
        queue = self.queue
        assert queue is not None
        if not self.features & VirtioFeature.ACCESS_PLATFORM:
            memory = queue.memory
            assert isinstance(memory, GuestMemory)
            if self.on_demand.provide(queue, memory, need):
                return True
            self.break_queue(QueueBroken(Reason.ADDRESS, need.address))
            return False
        self.need = Wanted(need.address, need.length, need.access)
        if self.on_miss is not None:
            self.on_miss(self, self.need)
        else:
            self.fail_need()
        return False

    def fail_need(self, reason: Reason = Reason.ADDRESS) -> None:
        """What the ring waits for will not come: the driver used an address that means nothing,
        or (`Reason.ACCESS`) one that it may not have used in this way."""
        need, self.need = self.need, None
        if need is not None:
            self.break_queue(QueueBroken(reason, need.address))

    def _check_drained(self) -> None:
        if self.in_flight:
            return
        if self.broken and self.queue is not None and not self.leaving:
            self.base = self.queue.base
            self._close_queue()
            self.generation += 1
        if self._on_drained:
            callback, self._on_drained = self._on_drained, None
            callback()


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
