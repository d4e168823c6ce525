"""Worker threads: each waits for the kicks of its queues and has the back-end work on them.

A worker never starts a ring. It watches the kick descriptors of rings that the control plane has
started, so a late kick for a stopped ring has no effect. It sleeps in epoll on those descriptors,
on listeners that the device registered, and on a wake-up of its own. `scan` asks it to look at a
queue without a kick: after a start or enable, and whenever a kick may have been missed.

Kick eventfds are watched edge-triggered. Every kick is an edge, so the worker need not read their
count. A read costs a system call, and would block if the front-end has made the descriptor
blocking. Other kick descriptors (pipes, sockets) are watched level-triggered and read.

A back-end that raises does not end its worker. The chains that it took and did not complete are
failed; other queues and listeners go on. A worker that fails itself tells its daemon, which ends
with that failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from virtqueue import RECORD, Batch, RecordField

from .backend import STATUS_BYTE, HookGroup, VhostUserBackend, VhostUserBackendBase, provided
from .errors import BackendUsageError
from .fds import eventfd
from .fds.eventfd import WakeFd
from .rate_limited_log import RateLimited
from .vring.locks import Vring

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds between looks at an idle ring without a kick descriptor: the first interval, and the
#: longest after doubling.
POLL_INTERVAL = (0.00005, 0.002)

#: Seconds to look at rings before sleeping, when busy polling begins again after a pause.
FIRST_LOOK = 0.000004

#: Failures in a row after which a listener is not watched any more. What it has not read keeps its
#: descriptor ready, so the worker would do nothing else.
MOST_FAILURES: Final = 16

_RAISED: Final = object()


class _Listener:
    """A descriptor that a device registered: the events to wait for, and the callback for them."""

    __slots__ = ("callback", "data", "events")

    def __init__(self, events: int, data: int, callback: Callable[[int], object] | None) -> None:
        self.events = events
        self.data = data
        self.callback = callback


class VringEpollHandler:
    """One worker thread over some of a daemon's vrings.

    `vrings` are its queues in the order of the mask's bits; `thread_id` is its number. `busy_poll`
    is the longest time in seconds to look at the rings before sleeping. The worker adapts that
    time: up when a longer look would have spared a sleep, down to nothing when the queues are idle.
    `cpu` is the processor to run on.
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
        self._name = name
        self._errors = RateLimited(log)
        self.vrings: list[Vring] = list(vrings)
        self.thread_id = thread_id
        self._busy_poll = self._look = busy_poll
        self._cpu = cpu
        self._epoll = select.epoll()
        self._wake = WakeFd()
        self._exit = backend.exit_event(thread_id)
        # Guards the fields that the control thread and the worker share: watched descriptors,
        # queues to scan and queues to poll.
        self._lock = threading.Lock()
        self._watched: dict[int, int] = {}
        self._kick_of: dict[int, int] = {}
        #: The descriptors that devices registered.
        self._listeners: dict[int, _Listener] = {}
        #: How often each listener has failed in a row.
        self._failures: dict[int, int] = {}
        #: Listeners that are not watched any more, and that the device has not unregistered yet.
        self._given_up: set[int] = set()
        #: Kick descriptors that are watched edge-triggered, and so need no reading.
        self._edges: set[int] = set()
        self._scan: set[int] = set()
        self._polled: set[int] = set()
        self._stopping = False
        # Only the worker uses these: queues that had their turn and are not empty; the interval.
        self._again: set[int] = set()
        self._interval = POLL_INTERVAL[0]
        # The batches that the back-end has taken in its present call: ring, generation, records.
        # None outside of a call.
        self._taken: list[tuple[Vring, int, bytes]] | None = None
        self._taker = 0
        #: Called on the worker's thread when the thread ends by an error.
        self.on_failure: Callable[[BaseException], None] | None = None
        for vring in self.vrings:
            with vring.get_mut() as state:
                state.events.on_take = partial(self._note, vring)
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
        for vring in self.vrings:
            with vring.get_mut() as state:
                state.events.on_take = None
        self._epoll.close()
        self._wake.close()
        return True

    def send_exit_event(self) -> None:
        """From any thread: end the worker, and signal the back-end's `exit_event` for it."""
        self._stopping = True
        if self._exit is not None:
            self._exit.wake()
        self.wake()

    @property
    def inside(self) -> bool:
        """Whether the caller runs on the worker's thread."""
        return self._thread is threading.current_thread()

    def wake(self) -> None:
        """From any thread: have the worker look at everything it watches."""
        self._wake.wake()

    # -- called by the control plane ------------------------------------------------------------

    def watch(self, queue: int, kick_fd: int, *, scan: bool = True) -> None:
        """Watch the kick descriptor of this worker's queue number `queue`; with -1 poll the ring.

        With `scan` the worker first looks at the queue without a kick. Raises `OSError` for a
        descriptor that cannot be waited on.
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
        """Have the worker look at the queue without a kick."""
        with self._lock:
            self._scan.add(queue)
        self.wake()

    # -- called by devices ----------------------------------------------------------------------

    def register_listener(
        self,
        fd: int,
        events: int,
        data: int | None = None,
        *,
        callback: Callable[[int], object] | None = None,
    ) -> None:
        """Have `callback(events)` called on the worker's thread when `fd` is ready.

        `events` are epoll's bits. Without a callback the back-end's `handle_event(data, events,
        ...)` is called, or the `VirtioDevice`'s `handle_event(data, events)`. `data` must then be
        larger than the number of queues, so that it cannot be mistaken for a queue. An error that
        the callback raises is logged; after `MOST_FAILURES` errors in a row the descriptor is not
        watched any more. The descriptor stays the caller's.

        Raises `BackendUsageError` for a smaller `data` and where there is nothing to call,
        `FileExistsError` for a registered descriptor, and `OSError` where epoll refuses it.
        """
        if callback is None:
            if data is None or data <= len(self.vrings):
                raise BackendUsageError(f"listener data {data} could be a queue's index")
            check = provided(self._backend, VhostUserBackendBase.check_listener)
            if check is not None:
                check()
        elif not callable(callback):
            raise BackendUsageError(f"callback is {callback!r}, which cannot be called")
        with self._lock:
            if fd in self._watched or fd in self._listeners:
                raise FileExistsError(f"descriptor {fd} is registered already")
            # Before epoll knows it: the worker may see the event at once, and an edge comes once.
            self._listeners[fd] = _Listener(events, data or 0, callback)
            self._given_up.discard(fd)
            try:
                self._epoll.register(fd, events)
            except BaseException:
                del self._listeners[fd]
                raise
        self.wake()

    def unregister_listener(self, fd: int) -> None:
        """Undo `register_listener`; call it before the descriptor is closed."""
        with self._lock:
            if fd in self._given_up:
                self._given_up.remove(fd)
                return
            if fd not in self._listeners:
                raise BackendUsageError(f"descriptor {fd} is not a listener")
            self._drop(fd)
            self._given_up.remove(fd)

    # -- the thread -----------------------------------------------------------------------------

    def _forget(self, queue: int) -> None:
        self._polled.discard(queue)
        fd = self._kick_of.pop(queue, -1)
        if fd >= 0:
            del self._watched[fd]
            self._edges.discard(fd)
            self._epoll.unregister(fd)

    def _run(self) -> None:
        """Do the thread's work, and report when it ends by an error."""
        try:
            if self._cpu is not None:
                self._move_to(self._cpu)
            self._work()
        except BaseException as error:
            self._give_up(error)

    def _move_to(self, cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:  # it was there when the daemon was made
            log.warning("a worker cannot run on processor %d: %s", cpu, error.strerror)

    def _work(self) -> None:
        timeout: float | None = None
        while not self._stopping:
            timeout = self._round(timeout)

    def _give_up(self, error: BaseException) -> None:
        log.critical("worker %s has ended: its queues stand still", self._name, exc_info=error)
        if self.on_failure is not None:
            self.on_failure(error)

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
                self._listen(fd, events)
                continue
            with self.vrings[target].get_mut() as state:
                state.counters.kicks += 1
                alive = fd in self._edges or state.read_kick()
            if not alive:
                self._dead_kick(target, fd)
            ready.add(target)
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
        """Epoll's events; before a sleep without end the worker looks at its rings for a while.

        Queues in which it finds chains are added to `ready`.
        """
        if timeout is not None or not self._busy_poll:
            return self._epoll.poll(timeout)
        end = time.monotonic() + self._look
        while True:
            events = self._epoll.poll(0)
            ready |= self._with_chains()
            if events or ready:
                return events
            if time.monotonic() >= end:
                break
        start = time.monotonic()
        events = self._epoll.poll()
        self._slept(time.monotonic() - start)
        return events

    def _with_chains(self) -> set[int]:
        """The queues in which chains wait."""
        found = set()
        for queue, vring in enumerate(self.vrings):
            with vring.get_ref() as state:
                if state.ready:
                    found.add(queue)
        return found

    def _slept(self, seconds: float) -> None:
        """Look longer next time if that would have spared this sleep, otherwise shorter."""
        if seconds < self._busy_poll:
            self._look = min(max(2 * self._look, FIRST_LOOK), self._busy_poll)
        else:
            self._look = self._look / 2 if self._look > FIRST_LOOK else 0.0

    def _handle(self, target: int, events: int) -> bool:
        """Have the back-end work on a queue; returns whether there is more."""
        handle = self._backend.handle_event
        more = self._call("queue", target, handle, target, events, self.vrings, self.thread_id)
        return more is not _RAISED and bool(more)

    def _listen(self, fd: int, events: int) -> None:
        """Call the listener of the descriptor."""
        listener = self._listeners.get(fd)
        if listener is None:
            return
        if listener.callback is not None:
            result = self._call("descriptor", fd, listener.callback, events)
        else:
            arguments = listener.data, events, self.vrings, self.thread_id
            result = self._call("descriptor", fd, self._backend.handle_event, *arguments)
        if result is _RAISED:
            self._note_failure(fd)
        elif self._failures:
            self._failures.pop(fd, None)

    def _note_failure(self, fd: int) -> None:
        with self._lock:
            if fd not in self._listeners:
                return
            count = self._failures[fd] = self._failures.get(fd, 0) + 1
            if count == MOST_FAILURES:
                self._drop(fd)
        if count == MOST_FAILURES:
            log.error(
                "worker %s: descriptor %d is not watched any more: its listener has failed %d times"
                " in a row",
                self._name,
                fd,
                count,
            )

    def _drop(self, fd: int) -> None:
        """Stop watching a listener's descriptor. Needs the lock."""
        del self._listeners[fd]
        self._failures.pop(fd, None)
        self._given_up.add(fd)
        with contextlib.suppress(OSError):  # its owner has closed it already
            self._epoll.unregister(fd)

    def _call(
        self, what: str, number: int, function: Callable[..., object], *args: object
    ) -> object:
        """Call the back-end; an error that it raises does not end the worker.

        Returns the call's result, or `_RAISED`.
        """
        self._taken, self._taker = [], threading.get_ident()
        try:
            return function(*args)
        except BaseException as error:
            self._failed(f"{what} {number}", error)
            return _RAISED
        finally:
            self._taken = None

    def _failed(self, what: str, error: BaseException) -> None:
        """Log the back-end's error, and fail the chains that it will not complete any more."""
        self._errors.error("%s: the back-end failed on %s", self._name, what, exc_info=error)
        taken, self._taken = self._taken or [], None
        # Only a back-end with status bytes can tell the driver of the failure.
        own = STATUS_BYTE.of(self._backend)
        status = VhostUserBackendBase.error_status if own is None else own.error_status
        for vring, generation, records in taken:
            with vring.get_mut() as state:
                if state.generation == generation:
                    state.fail_taken(
                        (record[RecordField.HEAD] for record in RECORD.iter_unpack(records)), status
                    )
            # The back-end might have taken more, or asked for kicks.
            self.scan(self.vrings.index(vring))

    def _note(self, vring: Vring, generation: int, batch: Batch) -> None:
        """Remember chains that the back-end has taken, as it may still raise."""
        taken = self._taken
        # Other threads may take chains as well; their errors are raised elsewhere.
        if taken is not None and threading.get_ident() == self._taker:
            taken.append((vring, generation, bytes(batch.records)))

    def _dead_kick(self, queue: int, fd: int) -> None:
        """Stop watching a kick descriptor without a writer, as it stays readable for ever."""
        with self._lock:
            if self._kick_of.get(queue) != fd:
                return  # the control plane has replaced it meanwhile
            self._forget(queue)
        log.warning("%s: the kick descriptor of queue %d is dead", self._thread.name, queue)


class OwnWorkers(Protocol):
    """A back-end that says which kind of worker serves it."""

    worker_type: type[VringEpollHandler]


_OWN_WORKERS: Final = HookGroup[OwnWorkers](OwnWorkers)


def worker_type(backend: VhostUserBackend) -> type[VringEpollHandler]:
    """The kind of worker that the back-end names, or else `VringEpollHandler`."""
    own = _OWN_WORKERS.of(backend)
    return VringEpollHandler if own is None else own.worker_type
