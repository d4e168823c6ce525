"""Vrings that threads share: a `VringState` behind a lock.

Two flavours, `VringMutex` and `VringRwLock`, hand the state out through `get_ref()` and `get_mut()`
and carry its operations for single calls. The lock guards configuration and engine calls, never a
handler: a request that a device works on holds no lock, and stopping a ring waits for requests
separately (`VringState.begin_drain`).

A thread that holds the state may come again, so the vring's own operations work inside of
`get_mut()`, too. What cannot be had that way (changing a `VringRwLock` that the thread only reads)
raises at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

from guest_memory import GuestMemory
from virtqueue import Chain, Server

from ..errors import BackendUsageError
from ..fds import eventfd
from .state import VringState

#: Seconds between two looks at a worker that was called back. It comes at once, unless a handler in
#: C has just begun: then the queue can be borrowed at the next look.
CALL_BACK_INTERVAL: Final = 0.0005
#: Seconds after which the worker is taken to be held up by its call descriptor.
CALL_BACK_PATIENCE: Final = 1.0


class Vring(Protocol):
    """A vring that threads share: the state behind a lock of its own, and single operations on it.

    Both flavours derive from it; a flavour of your own needs `get_ref` and `get_mut` only.
    """

    def get_ref(self) -> AbstractContextManager[VringState]:
        """The state for reading; held until the context ends."""
        raise NotImplementedError

    def get_mut(self) -> AbstractContextManager[VringState]:
        """The state for reading and changing; held until the context ends."""
        raise NotImplementedError

    def add_used(self, chain: Chain | int, written: int) -> None:
        """See `VringState.add_used`."""
        with self.get_mut() as state:
            state.add_used(chain, written)

    def signal_used_queue(self) -> None:
        """See `VringState.signal_used_queue`."""
        with self.get_mut() as state:
            state.signal_used_queue()

    def needs_notification(self) -> bool:
        """See `VringState.needs_notification`."""
        with self.get_mut() as state:
            return state.needs_notification()

    def enable_notification(self) -> bool:
        """See `VringState.enable_notification`."""
        with self.get_mut() as state:
            return state.enable_notification()

    def disable_notification(self) -> None:
        """See `VringState.disable_notification`."""
        with self.get_mut() as state:
            state.disable_notification()

    def set_enabled(self, enabled: bool) -> None:
        """See `VringState.set_enabled`."""
        with self.get_mut() as state:
            state.set_enabled(enabled)

    def set_queue_info(self, descriptor: int, driver: int, device: int) -> None:
        """See `VringState.set_queue_info`."""
        with self.get_mut() as state:
            state.set_queue_info(descriptor, driver, device)

    def queue_next_avail(self) -> int:
        """See `VringState.queue_next_avail`."""
        with self.get_ref() as state:
            return state.queue_next_avail()

    def set_queue_next_avail(self, base: int) -> None:
        """See `VringState.set_queue_next_avail`."""
        with self.get_mut() as state:
            state.set_queue_next_avail(base)

    def set_queue_size(self, size: int) -> None:
        """See `VringState.set_queue_size`."""
        with self.get_mut() as state:
            state.set_queue_size(size)

    def set_queue_event_idx(self, enabled: bool) -> None:
        """See `VringState.set_queue_event_idx`."""
        with self.get_mut() as state:
            state.set_queue_event_idx(enabled)

    def set_queue_ready(self, memory: GuestMemory) -> None:
        """See `VringState.set_queue_ready`."""
        with self.get_mut() as state:
            state.set_queue_ready(memory)

    def set_kick(self, fd: int) -> None:
        """See `VringState.set_kick`."""
        with self.get_mut() as state:
            state.set_kick(fd)

    def read_kick(self) -> bool:
        """See `VringState.read_kick`."""
        with self.get_mut() as state:
            return state.read_kick()

    def set_call(self, fd: int) -> None:
        """See `VringState.set_call`."""
        with self.get_mut() as state:
            state.set_call(fd)

    def set_err(self, fd: int) -> None:
        """See `VringState.set_err`."""
        with self.get_mut() as state:
            state.set_err(fd)


class VringMutex(Vring):
    """A vring behind one lock: the flavour for a ring that one worker serves (the default).

    A worker may `claim` it and hold it while it serves the queue from C, asleep or not, as long as
    nobody else wants it: whoever comes through `get_ref` or `get_mut` calls it back. What a device
    works on holds no lock (`release`, `reclaim`).
    """

    def __init__(self, state: VringState) -> None:
        self._state = state
        self._lock = threading.Lock()
        # Held by a visitor from its coming to its going: the worker waits here for its turn, so it
        # cannot take the lock back before a visitor that it has let in.
        self._gate = threading.Lock()
        self._visit = _Visit(self)
        # The visitor: its thread, and how often it came without going.
        self._visitor = 0
        self._depth = 0
        #: Let others have what was claimed.
        self.release: Callable[[], None] = self._lock.release
        #: After `release`: have it again, also before those who wait. See `visits`.
        self.reclaim: Callable[[], object] = self._lock.acquire
        #: How many visitors came: a worker that finds it changed since it `claimed` looks at the
        #: state anew.
        self.visits: int = 0
        self.claimed: int = 0
        #: What serves the queue from C while it is claimed, and what wakes that from its sleep.
        self.server: Server | None = None
        self.wake: Callable[[], None] | None = None

    def get_ref(self) -> AbstractContextManager[VringState]:
        """The state; the same lock as `get_mut`."""
        return self._visit

    def get_mut(self) -> AbstractContextManager[VringState]:
        """The state, exclusively."""
        return self._visit

    # -- for the ring's worker ------------------------------------------------------------------

    def claim(self) -> VringState:
        """Have the state until `release`, after those who wait for it."""
        with self._gate:
            self._lock.acquire()
            # In here nobody can come: who does from here on is noticed, and nobody borrows what
            # was borrowed before.
            self.claimed = self.visits
            if self.server is not None:
                self.server.own()
        return self._state

    # -- for visitors ---------------------------------------------------------------------------

    def _enter(self) -> VringState:
        thread = threading.get_ident()
        # Only this thread sets its own number there.
        if self._visitor == thread:
            self._depth += 1
            return self._state
        self._gate.acquire()
        self.visits += 1
        if not self._lock.acquire(False):
            self._call_back()
        self._visitor = thread
        return self._state

    def _call_back(self) -> None:
        """The worker has it: in C, asleep or at work, or for a moment in Python."""
        patience = time.monotonic() + CALL_BACK_PATIENCE
        drained = False
        while True:
            server, wake = self.server, self.wake
            if server is not None and wake is not None:
                server.interrupt()
                wake()
                if server.borrow():
                    self._visit.borrowed = server
                    break
            if self._lock.acquire(timeout=CALL_BACK_INTERVAL):
                break
            if server is not None and time.monotonic() > patience:
                # A hostile front-end may have filled the call eventfd and made it blocking, so that
                # the worker waits to signal: reading it lets the worker go.
                eventfd.drain(self._state.call_fd)
                drained = True
        if drained:
            # It may have been somebody's signal after all, and the ring goes the long way next.
            self._state.signal_call()

    def _leave(self) -> None:
        if self._depth:
            self._depth -= 1
            return
        self._visitor = 0
        server, self._visit.borrowed = self._visit.borrowed, None
        if server is not None:
            server.give_back()
        else:
            self._lock.release()
        self._gate.release()


class _Visit:
    """`with` over a `VringMutex`; one object for all uses, so that it costs no call more."""

    __slots__ = ("_vring", "borrowed")

    def __init__(self, vring: VringMutex) -> None:
        self._vring = vring
        #: The server whose handler in C was at work when this visitor came.
        self.borrowed: Server | None = None

    def __enter__(self) -> VringState:
        return self._vring._enter()

    def __exit__(self, *exc: object) -> None:
        self._vring._leave()


class VringRwLock(Vring):
    """A vring that many may read at once and one may change.

    Writers go first: once one waits, new readers wait behind it.
    """

    def __init__(self, state: VringState) -> None:
        self._state = state
        self._condition = threading.Condition(threading.Lock())
        #: Reading threads, and how often each came without going.
        self._readers: dict[int, int] = {}
        self._writers_waiting = 0
        #: The writing thread, or 0.
        self._writer = 0

    @contextlib.contextmanager
    def get_ref(self) -> Iterator[VringState]:
        """The state, shared with other readers."""
        thread = threading.get_ident()
        if self._writer == thread:
            yield self._state
            return
        readers = self._readers
        with self._condition:
            # Who reads already must not wait for a writer that waits for it.
            while thread not in readers and (self._writer or self._writers_waiting):
                self._condition.wait()
            readers[thread] = readers.get(thread, 0) + 1
        try:
            yield self._state
        finally:
            with self._condition:
                readers[thread] -= 1
                if not readers[thread]:
                    del readers[thread]
                if not readers:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def get_mut(self) -> Iterator[VringState]:
        """The state, exclusively.

        Raises `BackendUsageError` inside of the same thread's `get_ref`, which would never end.
        """
        thread = threading.get_ident()
        if self._writer == thread:
            yield self._state
            return
        with self._condition:
            if thread in self._readers:
                raise BackendUsageError(
                    f"this thread reads vring {self._state.index}: leave get_ref() before get_mut()"
                )
            self._writers_waiting += 1
            try:
                while self._writer or self._readers:
                    self._condition.wait()
            finally:
                self._writers_waiting -= 1
            self._writer = thread
        try:
            yield self._state
        finally:
            with self._condition:
                self._writer = 0
                self._condition.notify_all()
