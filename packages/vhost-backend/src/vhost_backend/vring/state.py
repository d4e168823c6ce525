"""One ring, unsynchronised; threads share it behind a lock (see `vring.locks`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from guest_memory import GuestMemory
from virtqueue import Batch, Chain, Need, QueueBroken, Reason, UsageError

from ..fds import eventfd
from ..features import VirtioFeature
from .lifecycle import RingLifecycle
from .wanted import Wanted

log: logging.Logger = logging.getLogger("vhost_backend")


class VringState(RingLifecycle):
    """One vring, unsynchronised.

    `index` is the queue's number, and `max_size` the ring size before SET_VRING_NUM. `engine` is
    the ring engine to use ("c", "python", or None for the best there is). `status_byte` tells
    whether a completion writes a status into the last writable byte of its chain (block, SCSI,
    crypto).

    The control plane writes `settings`, `events` and the states. The queue resolves the ring's
    addresses, anew at each change of the memory table.
    """

    @property
    def ready(self) -> bool:
        """Whether a chain waits to be taken."""
        return self.running and self.queue is not None and self.queue.ready()

    @property
    def direct(self) -> bool:
        """Whether C can serve the queue alone.

        It cannot where Python has work in each round: messages or another descriptor to signal,
        pages to reclaim, a thread that waits for completions.
        """
        return (
            self.running
            and self.queue is not None
            and self.queue.engine == "c"
            and self.queue.resolved
            and self.signals.channel is None
            and self.signals.plain_call
            and self.events.on_progress is None
            and not self.on_demand.lent
            and (self.signals.log_fd < 0 or not self._logs)
        )

    def finish(self, taken: int) -> None:
        """Complete a batch of `taken` chains that the worker took without `cycle`."""
        self._working = taken
        self.cycle(0)

    def cycle(self, limit: int) -> Batch | None:
        """Complete the last batch, signal the driver if it wants that, and take the next batch.

        An empty batch means that the driver has been asked for kicks. A draining or disabled ring
        completes but takes nothing. Returns None when the guest has broken the queue. Raises
        `virtqueue.UsageError` when the last batch cannot be completed as its `done` says;
        `queue.refused_batch()` then returns that batch.
        """
        queue = self.queue
        if queue is None:
            return None
        completes = self._working
        self._working = 0
        if not self.settings.enabled or self.draining or self.leaving or self.broken:
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
            if self.events.on_take is not None:
                self.events.on_take(self.generation, batch)
        else:
            self._check_drained()
        return batch

    def take(self, limit: int) -> Batch | None:
        """Take without completing; None when the ring does not run or the queue is broken."""
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
        if batch and self.events.on_take is not None:
            self.events.on_take(self.generation, batch)
        return batch

    def available(self) -> Iterator[Chain]:
        """The available chains, one after another: the reference's `get_queue_mut().iter(mem)`.

        The iteration takes a chain when it comes to it, so a loop that is left early has taken no
        more. At its end it has asked the driver for kicks. Complete each chain with `add_used`.
        """
        while batch := self.take(1):
            yield batch[0]

    def fail_taken(self, heads: Iterable[int], status: int) -> int:
        """Complete each of these chains that is still in flight; returns how many there were.

        Nothing is written but `status`, where the device has a status byte. This is for chains that
        a failed back-end has taken and will not complete.
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
        """Publish staged completions, or drop one that the queue refuses."""
        try:
            if self._publish():
                self._owes_signal = True
        except UsageError as error:
            log.debug("vring %d: a completion is dropped: %s", self.index, error)
            return False
        return True

    def add_used(self, chain: Chain | int, written: int, status: int = 0) -> None:
        """Stage the completion of one chain (or head); `signal_used_queue` publishes it."""
        if self.queue is not None:
            self.queue.complete(chain, written, status)

    def needs_notification(self) -> bool:
        """Publish staged completions; returns whether the driver wants to be signalled.

        `signal_used_queue` sends the signal, and must follow when this returns True.
        """
        if self._publish():
            self._owes_signal = True
        elif not self._owes_signal:
            self.signals.suppressed()
        return self._owes_signal

    def signal_used_queue(self) -> None:
        """Publish staged completions and signal the driver, unless it wants no signal.

        Completions that `needs_notification` has published count as well.
        """
        if self.queue is None and not self._owes_signal:
            return
        if self._publish() or self._owes_signal:
            self.signal_call()
        else:
            self.signals.suppressed()

    def _publish(self) -> bool:
        """Publish staged completions; returns whether the driver wants to be signalled."""
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
        """Ask for kicks; True when chains came meanwhile, so that the ring must be looked at."""
        if self.queue is None or not self.running:
            return False
        try:
            return self.queue.enable_notification()
        except QueueBroken as error:
            self.break_queue(error)
            return False

    def disable_notification(self) -> None:
        """Tell the driver not to kick while the ring is being worked on."""
        if self.queue is not None:
            self.queue.disable_notification()

    def read_kick(self) -> bool:
        """Consume a pending kick; False when the descriptor has lost its writer."""
        return eventfd.drain(self.signals.kick_fd)

    def drain_call(self) -> None:
        """Read the call eventfd, so that a thread that waits to write to it goes on."""
        eventfd.drain(self.signals.call_fd)

    def _published(self, wanted: bool) -> None:
        if wanted:
            self.signal_call()
        else:
            self.signals.suppressed()
        self._after_publishing()

    def _after_publishing(self) -> None:
        if self.signals.log_fd >= 0 and self._logs:
            self.signals.logged()
        if self.events.on_progress is not None:
            self.events.on_progress()

    @property
    def _logs(self) -> bool:
        log = self.settings.log
        return log is not None and log.enabled

    def _ask(self, need: Need) -> bool:
        """Get the memory that the ring needs: at once (True), or by asking the front-end (False).

        After asking, the ring is looked at again when memory changes.
        """
        queue = self.queue
        assert queue is not None
        if not self.settings.features & VirtioFeature.ACCESS_PLATFORM:
            memory = queue.memory
            assert isinstance(memory, GuestMemory)
            if self.on_demand.provide(queue, memory, need):
                return True
            self.break_queue(QueueBroken(Reason.ADDRESS, need.address))
            return False
        self.need = Wanted(need.address, need.length, need.access)
        miss = self.events.on_miss
        if miss is None or not miss(self.index, self.need):
            self.fail_need()
        return False

    def fail_need(self, reason: Reason = Reason.ADDRESS) -> None:
        """Break the ring, because the memory that it waits for will not come.

        The driver used an unmapped address, or one without the needed access (`Reason.ACCESS`).
        """
        need, self.need = self.need, None
        if need is not None:
            self.break_queue(QueueBroken(reason, need.address))
