"""One ring from its set-up to its end: the settings, and the queue made of them.

Ring states (vhost-user specification, "Ring states"): a ring is started or stopped and,
independently, enabled or disabled. It is *running* here when it is started, enabled, not draining,
and has a queue that the guest has not broken.
"""

from __future__ import annotations

from collections.abc import Callable

from guest_memory import DirtyLog, GuestMemory
from virtqueue import DeviceQueue, EngineName, QueueBroken, Reason, RingConfig

from ..counters import QueueCounters
from ..features import VirtioFeature
from .events import RingEvents
from .on_demand import OnDemand
from .settings import RingSettings
from .signals import RingSignals
from .wanted import Wanted


class RingLifecycle:
    """The control plane's half of `VringState`, which adds the data path."""

    def __init__(
        self,
        index: int = 0,
        max_size: int = 1024,
        *,
        engine: EngineName | None = None,
        status_byte: bool = False,
    ) -> None:
        self.index = index
        #: The device's name, for log lines.
        self.name: str = ""
        self.max_size = max_size
        self.engine = engine
        self.status_byte = status_byte
        self.counters: QueueCounters = QueueCounters()
        self.settings: RingSettings = RingSettings(max_size)
        self.events: RingEvents = RingEvents()
        self.signals: RingSignals = RingSignals(index, self.counters)
        self.on_demand: OnDemand = OnDemand()
        self.queue: DeviceQueue | None = None
        #: Counts the queues of this ring; a completion for an earlier queue is dropped.
        self.generation: int = 0
        #: The front-end has gone, and its last requests are still in `queue`: see `leave`.
        self.leaving: bool = False
        self.started: bool = False
        self.draining: bool = False
        #: Started, but without a queue yet: requests of the last front-end still run.
        self.deferred: bool = False
        #: Broken by the guest, with requests in flight: takes nothing, but completes those.
        self.broken: bool = False
        #: The ring is not in guest memory.
        self._homeless = False
        #: Memory that the ring waits for.
        self.need: Wanted | None = None
        #: The number of chains that the next cycle completes.
        self._working = 0
        #: Whether `needs_notification` was true and the driver has not been signalled since.
        self._owes_signal = False

    # -- settings -------------------------------------------------------------------------------

    def set_queue_size(self, size: int) -> None:
        """Ring size in descriptors, for the next start."""
        self.settings.size = size

    def set_queue_info(self, descriptor: int, driver: int, device: int) -> None:
        """Addresses of the descriptor, driver (available) and device (used) area."""
        self.settings.addresses = (descriptor, driver, device)

    def set_queue_event_idx(self, enabled: bool) -> None:
        """Whether EVENT_IDX was negotiated, for the next start."""
        if enabled:
            self.settings.features |= VirtioFeature.EVENT_IDX
        else:
            self.settings.features &= ~VirtioFeature.EVENT_IDX

    def set_queue_next_avail(self, base: int) -> None:
        """Where to start, in SET_VRING_BASE's format (packed: both indices and wrap counters)."""
        self.settings.base = base

    def queue_next_avail(self) -> int:
        """Where the ring stands, in GET_VRING_BASE's format."""
        return self.settings.base if self.queue is None or self.leaving else self.queue.base

    def set_enabled(self, enabled: bool) -> None:
        """Enable or disable the ring (SET_VRING_ENABLE); kept also while the ring is stopped."""
        self.settings.enabled = enabled

    @property
    def enabled(self) -> bool:
        """Whether SET_VRING_ENABLE has enabled the ring."""
        return self.settings.enabled

    @property
    def kick_fd(self) -> int:
        """The kick descriptor, or -1."""
        return self.signals.kick_fd

    @property
    def call_fd(self) -> int:
        """The call descriptor, or -1."""
        return self.signals.call_fd

    def set_kick(self, fd: int) -> None:
        """Take over a kick descriptor; -1 for none. The previous one is closed."""
        self.signals.set_kick(fd)

    def set_call(self, fd: int) -> None:
        """Take over a call descriptor; -1 for none (the driver polls)."""
        self.signals.set_call(fd)

    def set_err(self, fd: int) -> None:
        """Take over the error descriptor, on which a broken ring is reported; -1 for none."""
        self.signals.set_err(fd)

    def set_log(self, log: DirtyLog | None, log_used: int | None) -> None:
        """Log writes from now on; `log_used` is the address to log the used ring at, or None.

        This changes no index, and may happen at any time.
        """
        self.settings.log = log
        self.settings.log_used = log_used
        if self.queue is not None and not self.leaving:
            self.queue.set_log(log, log_used)

    def config(self) -> RingConfig:
        """The ring as it would be started now."""
        return self.settings.config(self.index, self.status_byte)

    # -- from start to stop ---------------------------------------------------------------------

    def set_queue_ready(self, memory: GuestMemory) -> None:
        """Build the queue from the configuration: the ring is started.

        A ring outside guest memory is noticed only at the first take. Raises `BackendUsageError`
        without addresses, and `virtqueue.UsageError` for an impossible ring (see `config`).
        """
        config, settings = self.config(), self.settings
        config.check()
        self.queue = DeviceQueue(
            config,
            memory,
            base=settings.base,
            engine=self.engine,
            inflight=settings.inflight,
            log=settings.log,
            counters=self.counters,
        )
        self.started = True
        self.draining = self.deferred = self.broken = False
        self._homeless = False
        self._working = 0
        self.generation += 1

    def begin_drain(self, on_drained: Callable[[], None]) -> None:
        """Take no new chains; call `on_drained` (lock held) once no request is in flight."""
        self.draining = True
        if self.owes:
            self.events.on_drained = on_drained
        else:
            on_drained()

    def stop(self) -> int:
        """Drop the queue, even with requests in flight, and return the base to report.

        Later completions of those requests are dropped.
        """
        if self.leaving:
            self.started = self.draining = self.deferred = False
            return self.settings.base
        self.events.on_drained = None
        if self._owes_signal:
            self.signal_call()  # now: after the answer to the stop the driver gets no signal
        if self.queue is not None:
            self.settings.base = self.queue.base
            self._close_queue()
        self.started = self.draining = self.deferred = False
        self.generation += 1
        return self.settings.base

    def _close_queue(self) -> None:
        assert self.queue is not None
        self.queue.close()
        self.queue = None
        self.broken = False

    def leave(self, on_drained: Callable[[], None]) -> bool:
        """Reset the ring after the front-end has gone, but keep requests that the device works on.

        Returns whether there are such requests. Their memory stays mapped, and the ring gets no new
        queue, until they have ended; then `on_drained` is called (lock held), and `left` drops
        their queue. Without an in-flight region the driver sees none of their completions: the next
        back-end starts behind the last used entry, and serves them again.
        """
        queue = self.queue
        if queue is None or not queue.in_flight:
            self.leaving = False
            self.reset()
            return False
        if not self.leaving:
            self.leaving = True
            self.events.on_drained = on_drained
            queue.set_log(None, None)  # the log goes with the front-end
            if self.settings.inflight is None:
                queue.stop()
        self.reset()
        return True

    def left(self) -> None:
        """Drop the queue of the last front-end's requests, once the device has ended them."""
        if self.leaving and self.queue is not None:
            self._close_queue()
            self.generation += 1
        self.leaving = False
        self.events.on_drained = None

    def reset(self) -> None:
        """Make the ring as new, and close its descriptors."""
        self.stop()
        self.signals.close()
        self.settings = RingSettings(self.max_size)
        self.broken = self._homeless = False
        self.need = None

    def set_memory(self, memory: GuestMemory) -> None:
        """Use a new snapshot: the queue resolves the ring's addresses anew before the next take.

        A ring that was outside the old memory table may be inside the new one.
        """
        self._homeless = False
        self.need = None
        if self.queue is not None and not self.leaving:
            self.queue.set_memory(memory)

    def break_queue(self, error: QueueBroken) -> None:
        """Report a ring that the guest broke, and leave it alone until it is set up anew.

        A ring outside guest memory is left alone only until the memory changes. Requests in flight
        end as usual.
        """
        if self.broken or self.leaving:
            self._check_drained()
            return
        if error.reason == Reason.TRUNCATED:
            self.events.truncated()
        if error.reason == Reason.RING_MEMORY:
            self._homeless = True
        else:
            self.broken = True
        self.signals.guest_error(self.name, error)
        self._check_drained()

    def signal_call(self) -> None:
        """Signal the driver by the call descriptor, or by a message where that was negotiated."""
        self._owes_signal = False
        self.signals.call()

    def _check_drained(self) -> None:
        if self.in_flight:
            return
        if self.broken and self.queue is not None and not self.leaving:
            self.settings.base = self.queue.base
            self._close_queue()
            self.generation += 1
        self.events.drained()

    # -- the states -----------------------------------------------------------------------------

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

    @property
    def running(self) -> bool:
        """Whether chains may be taken now."""
        return (
            self.settings.enabled
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
        """Whether there are completions of which the driver may not know."""
        queue = self.queue
        return queue is not None and (not queue.fresh or queue.completed > 0)
