"""Worker threads: each waits for the kicks of its queues and has the back-end work on them.

A worker never starts a ring: it watches the kick descriptors of rings that the control plane has
started, so a late kick on a descriptor of a stopped ring finds nobody. It sleeps in epoll on those
descriptors, on listeners that the device registered, and on a wake-up of its own. `scan` asks it to
look at a queue without a kick: after a start or enable, and after anything that may have made it
look away.

Kick eventfds are watched edge-triggered: every kick is an edge, so their count need not be read,
which costs a system call and could make the worker wait if the front-end has made the descriptor
blocking. What else a kick descriptor may be is watched level-triggered and read.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Sequence

from . import eventfd
from .backend import VhostUserBackend
from .errors import BackendUsageError
from .eventfd import WakeFd
from .vring_locks import Vring

log: logging.Logger = logging.getLogger("vhost_backend")

#: A ring without a kick descriptor is looked at this often (seconds) while it is idle; twice as
#: long each time nothing was found, up to the second figure.
POLL_INTERVAL = (0.00005, 0.002)

#: The first time (seconds) to look at rings before sleeping, when busy polling begins again.
FIRST_LOOK = 0.000004


class VringEpollHandler:
    """One worker thread over some of a daemon's vrings.

    `vrings` are its queues in the order of the mask's bits; `thread_id` is its number. `busy_poll`
    is the longest time in seconds to look at the rings before sleeping: the time is adapted, up
    when a longer look would have spared a sleep, down to nothing when the queues are idle. `cpu` is
    the processor to run on.
    """

    def __init__(
        self,
        backend: VhostUserBackend,
        vrings: Sequence[Vring],
        thread_id: int,
        name: str,
        *,
        busy_poll: float = 0.0,
        cpu: int | None = None,
    ) -> None:
        self._backend = backend
        self.vrings: list[Vring] = list(vrings)
        self.thread_id = thread_id
        self._busy_poll = self._look = busy_poll
        self._cpu = cpu
        self._epoll = select.epoll()
        self._wake = WakeFd()
        self._exit = backend.exit_event(thread_id)
        # Guards what the control thread and the worker both touch: watched descriptors, queues to
        # scan, queues to poll, and the end.
        self._lock = threading.Lock()
        self._watched: dict[int, int] = {}
        self._kick_of: dict[int, int] = {}
        #: Events of the descriptors that devices registered.
        self._listening: dict[int, int] = {}
        #: Kick descriptors that need no reading.
        self._edges: set[int] = set()
        self._scan: set[int] = set()
        self._polled: set[int] = set()
        self._stopping = False
        # The worker's own: queues that had their turn and are not empty, and the polling interval.
        self._again: set[int] = set()
        self._interval = POLL_INTERVAL[0]
        self._epoll.register(self._wake.fd, select.EPOLLIN)
        if self._exit is not None:
            self._epoll.register(self._exit.fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread and wait for it; False when it did not end within `timeout` seconds."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._epoll.close()
        self._wake.close()
        return True

    def wake(self) -> None:
        """Have the thread look around, from any thread."""
        self._wake.wake()

    # -- called by the control plane ------------------------------------------------------------

    def watch(self, queue: int, kick_fd: int, *, scan: bool = True) -> None:
        """Watch the kick descriptor of queue number `queue` of this worker; -1: poll the ring.

        With `scan` the queue is looked at without a kick first.

        Raises `OSError` for a descriptor that cannot be waited on.
        """
        with self._lock:
            self._forget(queue)
            if kick_fd < 0:
                self._polled.add(queue)
            else:
                edge = eventfd.is_eventfd(kick_fd)
                events = select.EPOLLIN | (select.EPOLLET if edge else 0)
                self._watched[kick_fd] = queue
                try:
                    self._epoll.register(kick_fd, events)
                except BaseException:
                    del self._watched[kick_fd]
                    raise
                self._kick_of[queue] = kick_fd
                if edge:
                    self._edges.add(kick_fd)
            if scan:
                self._scan.add(queue)
        if scan or kick_fd < 0:
            self.wake()

    def unwatch(self, queue: int) -> None:
        """Stop watching; call it before the kick descriptor is closed."""
        with self._lock:
            self._forget(queue)
            self._scan.discard(queue)

    def scan(self, queue: int) -> None:
        """Have the worker look at the queue though nobody kicked."""
        with self._lock:
            self._scan.add(queue)
        self.wake()

    # -- called by devices ----------------------------------------------------------------------

    def register_listener(self, fd: int, events: int, data: int) -> None:
        """Have `handle_event(data, events, ...)` called when `fd` is ready.

        `events` are epoll's bits; `data` must be larger than the number of queues, so that it
        cannot be mistaken for one. The descriptor stays the caller's.
        """
        if data <= len(self.vrings):
            raise BackendUsageError(f"listener data {data} could be a queue's index")
        with self._lock:
            if fd in self._watched:
                raise FileExistsError(f"descriptor {fd} is registered already")
            # Known first: the thread may see what there is at once, and an edge comes only once.
            self._watched[fd] = data
            self._listening[fd] = events
            try:
                self._epoll.register(fd, events)
            except BaseException:
                del self._watched[fd], self._listening[fd]
                raise
        self.wake()

    def unregister_listener(self, fd: int) -> None:
        """Undo `register_listener`; call it before the descriptor is closed."""
        with self._lock:
            if self._watched.get(fd, 0) <= len(self.vrings):
                raise BackendUsageError(f"descriptor {fd} is not a listener")
            self._epoll.unregister(fd)
            del self._watched[fd], self._listening[fd]

    # -- the thread -----------------------------------------------------------------------------

    def _forget(self, queue: int) -> None:
        self._polled.discard(queue)
        fd = self._kick_of.pop(queue, -1)
        if fd >= 0:
            del self._watched[fd]
            self._edges.discard(fd)
            self._epoll.unregister(fd)

    def _run(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})
        timeout: float | None = None
        while not self._stopping:
            timeout = self._round(timeout)

    def _round(self, timeout: float | None) -> float | None:
        """Wait up to `timeout` seconds (None: until something happens) and work on what is ready.

        Returns how long the next round may wait.
        """
        ready: set[int] = self._again
        for fd, events in self._wait(timeout, ready):
            if fd == self._wake.fd:
                self._wake.clear()
                continue
            if self._exit is not None and fd == self._exit.fd:
                self._stopping = True
                return 0
            target = self._watched.get(fd)
            if target is None:
                continue
            if target < len(self.vrings):
                with self.vrings[target].get_mut() as state:
                    state.counters.kicks += 1
                    alive = fd in self._edges or state.read_kick()
                if not alive:
                    self._dead_kick(target, fd)
                ready.add(target)
            else:
                self._handle(target, events)
        if self._scan:
            with self._lock:
                ready |= self._scan
                self._scan.clear()
        polled = bool(self._polled) and not ready
        if self._polled:
            with self._lock:
                ready |= self._polled
        self._again = {queue for queue in ready if self._handle(queue, select.EPOLLIN)}
        if self._again:
            self._interval = POLL_INTERVAL[0]
            return 0
        if not self._polled:
            return None
        # The rings without a kick descriptor: less and less often while nothing comes.
        interval = self._interval
        self._interval = min(interval * 2, POLL_INTERVAL[1]) if polled else POLL_INTERVAL[0]
        return interval

    def _wait(self, timeout: float | None, ready: set[int]) -> list[tuple[int, int]]:
        """What epoll has; before a sleep without end, rings are looked at for a while.

        Those that were found to have chains are added to `ready`.
        """
        if timeout is not None or not self._busy_poll:
            return self._epoll.poll(timeout)
        end = time.monotonic() + self._look
        while True:
            events = self._epoll.poll(0)
            for queue, vring in enumerate(self.vrings):
                with vring.get_ref() as state:
                    if state.ready:
                        ready.add(queue)
            if events or ready:
                return events
            if time.monotonic() >= end:
                break
        start = time.monotonic()
        events = self._epoll.poll()
        if time.monotonic() - start < self._busy_poll:
            self._look = min(max(2 * self._look, FIRST_LOOK), self._busy_poll)
        else:
            self._look = self._look / 2 if self._look > FIRST_LOOK else 0.0
        return events

    def _handle(self, target: int, events: int) -> bool:
        try:
            return self._backend.handle_event(target, events, self.vrings, self.thread_id)
        except Exception:
            # A back-end that is wrong must not take its worker along: other queues go on.
            log.exception("%s: the back-end failed on event %d", self._thread.name, target)
            return False

    def _dead_kick(self, queue: int, fd: int) -> None:
        """A kick descriptor without a writer is readable for ever: stop watching it."""
        with self._lock:
            if self._kick_of.get(queue) != fd:
                return  # the control plane has replaced it meanwhile
            self._forget(queue)
        log.warning("%s: the kick descriptor of queue %d is dead", self._thread.name, queue)
