"""Vrings that threads share: a `VringState` behind a lock.

There are two flavours, `VringMutex` and `VringRwLock`. Both hand out the state through `get_ref()`
and `get_mut()`, and have its operations as single calls. The lock guards configuration and engine
calls. A device works without the lock; a stop waits for requests by other means
(`VringState.begin_drain`).

A thread that holds the state may enter again, so the vring's operations also work inside
`get_mut()`. A thread that reads a `VringRwLock` must not change it: it would wait for itself, so
`get_mut()` raises at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from guest_memory import GuestMemory
from virtqueue import Chain

from ..errors import BackendUsageError
from .ring_lease import RingLease
from .state import VringState


class Vring(Protocol):
    """A vring that threads share: the state behind a lock of its own, and single operations on it.

    Both flavours derive from it. A flavour of your own needs `get_ref` and `get_mut` only.
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

    The lock is a `RingLease`, so that the worker may hold it while it sleeps.
    """

    def __init__(self, state: VringState) -> None:
        self.lease: RingLease = RingLease(state)

    def get_ref(self) -> AbstractContextManager[VringState]:
        """The state; the same lock as `get_mut`."""
        return self.lease

    def get_mut(self) -> AbstractContextManager[VringState]:
        """The state, exclusively."""
        return self.lease


class VringRwLock(Vring):
    """A vring that many may read at once and one may change.

    Writers go first: once one waits, new readers wait behind it.
    """

    def __init__(self, state: VringState) -> None:
        self._state = state
        self._condition = threading.Condition(threading.Lock())
        #: Reading threads, and how often each entered without leaving.
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
            # A thread that reads already must not wait for a writer that waits for it.
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

        Raises `BackendUsageError` inside the same thread's `get_ref`: it would wait for itself.
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
