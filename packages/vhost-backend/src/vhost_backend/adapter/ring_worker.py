"""A worker that serves one queue from C.

Most workers have one queue (`VirtioDevice.queues_per_thread`). Such a worker claims its ring
(`RingLease`) and calls C, which waits for chains, takes and completes them, and signals the driver.
The device works on each batch in Python, or in its handler in C.

The *long way* is `VringEpollHandler`'s round with `DeviceBackend.handle_event`. The worker takes it
when C cannot serve the ring: another engine, other descriptors to watch, notifications by messages,
or an error of the ring.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from virtqueue import Batch, CHandler, Server, UsageError

from ..backend import VhostUserBackend
from ..device.base import VirtioDevice
from ..device.request import QueueInfo
from ..epoll_handler import VringEpollHandler
from ..vring.locks import Vring, VringMutex
from ..vring.ring_lease import RingLease
from ..vring.state import VringState

log: logging.Logger = logging.getLogger("vhost_backend")


class BatchBackend(Protocol):
    """The methods of `DeviceBackend` that this worker calls."""

    device: VirtioDevice

    def view(self, state: VringState) -> QueueInfo: ...

    def batch_handler(self, index: int) -> CHandler | None: ...

    def drop_handler(self, index: int) -> None: ...

    def serve_batch(self, queue: QueueInfo, batch: Batch) -> None: ...

    def fail_batch(self, queue: QueueInfo, batch: Batch, error: BaseException) -> None: ...


class QueueWorker(VringEpollHandler):
    """One worker thread of a `DeviceBackend`."""

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
        super().__init__(backend, vrings, thread_id, name, busy_poll=busy_poll, cpu=cpu)
        self._device = cast("BatchBackend", backend)
        self._server: Server | None = None
        self._lease: RingLease | None = None
        #: Generation of the ring that could not be served from C.
        self._refused = -1
        if len(vrings) == 1 and isinstance(vrings[0], VringMutex) and self._exit is None:
            self._lease = vrings[0].lease
            self._lease.wake = self._wake.wake

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread, and drop the handlers in C with their descriptors."""
        ended = super().stop(timeout)
        if ended:
            self._server = None
            for vring in self.vrings:
                with vring.get_ref() as state:
                    self._device.drop_handler(state.index)
        return ended

    def wake(self) -> None:
        """Have the thread look at everything it watches, even while its queue is busy."""
        server = self._server
        if server is not None:
            server.interrupt()
        super().wake()

    def _round(self, timeout: float | None) -> float | None:
        if self._lease is not None and self._serve(self._lease):
            # Clear it before the round: a `wake` that comes later reaches the next round.
            if self._server is not None:
                self._server.clear_interrupt()
            # C may have consumed an edge that the long way needs: a kick, or a listener's first.
            self._again.add(0)
            if self._listeners:
                self._show_again()
            timeout = 0
        return super()._round(timeout)

    def _show_again(self) -> None:
        """Have epoll report once more each listener that is ready."""
        closed = []
        with self._lock:
            for fd, listener in list(self._listeners.items()):
                try:
                    self._epoll.modify(fd, listener.events)
                except OSError:
                    self._drop(fd)
                    closed.append(fd)
        for fd in closed:
            log.error("%s: descriptor %d was closed before it was unregistered", self._name, fd)

    def _serve(self, lease: RingLease) -> bool:
        """Serve the queue from C until other work comes; False when C cannot serve it."""
        kick_fd = self._kick_of.get(0, -1)
        if kick_fd not in self._edges or self._listeners or self._stopping:
            if self._server is not None:
                self._server = None  # this also drops the ring and its memory
                _settle()
            return False
        state = lease.claim()
        try:
            server = self._server = self._adopt(state)
            if server is None:
                return False
            # A `wake` that came before the server was made could not interrupt it: check again.
            if lease.begin(server) and not self._listeners and not self._stopping:
                self._turns(lease, state, server, kick_fd)
        except Exception:
            # The queue's state is unknown: from now on the long way serves it, and reports faults.
            log.exception("%s: queue %d cannot be served from C", state.name, state.index)
            self._refused = state.generation
        finally:
            self._device.view(state).forget()
            lease.end()
        return True

    def _adopt(self, state: VringState) -> Server | None:
        """The server for the ring's present queue, or None when the ring must go the long way."""
        queue = state.queue
        if queue is None or not state.direct or state.generation == self._refused:
            return None
        server = self._server
        if server is None or server.queue is not queue:
            handler = self._device.batch_handler(state.index)
            server = Server(queue, self._epoll.fileno(), handler=handler, spin_max=self._busy_poll)
        return server

    def _turns(self, lease: RingLease, state: VringState, server: Server, kick_fd: int) -> None:
        batch = server.resume(kick_fd, state.call_fd)
        generation = state.generation
        device = self._device
        view = device.view(state)
        view.window, view.memory = server.queue.window, server.queue.memory
        handle_batch = device.device.handle_batch
        turn, serve, begin = server.turn, server.serve, server.begin
        release, reclaim = lease.release, lease.reclaim
        if server.handled:
            # With a handler in C batches come to Python rarely: each call may as well be `serve`.
            turn = serve
        count = serve()
        while not lease.wanted:
            # Negative: the long way repeats the call and reports the error.
            if count <= 0:
                return
            begin(count)
            release()
            try:
                handle_batch(view, batch)
            except BaseException as error:
                device.fail_batch(view, batch, error)
            finally:
                reclaim()
            if lease.wanted:  # another thread may have set it
                self._finish(state, generation, count)  # type: ignore[unreachable]
                return
            if batch.built:
                server.leave()
            # A driver that waits for each request needs a signal, which only `serve` sends.
            # Otherwise the next batch may be there already, and `turn` need not release the GIL.
            count = serve() if count == 1 else turn() or serve()
        # A visitor waits, or came while a handler in C worked and may still hold the ring.
        lease.give_way()
        if count > 0 and state.generation == generation:
            begin(count)
            if not server.handled or server.left:
                release()
                try:
                    device.serve_batch(view, batch)
                finally:
                    reclaim()
            self._finish(state, generation, count)

    def _finish(self, state: VringState, generation: int, count: int) -> None:
        """Complete the batch through the vring, unless a visitor has stopped or moved the ring."""
        if state.generation == generation:
            try:
                state.finish(count)
            except UsageError:
                # The batch stays with the queue: the long way finds what is wrong with it.
                log.debug("queue %d: a batch cannot be completed as it is", state.index)


def _settle() -> None:
    """Free unreferenced objects on a free-threaded Python.

    There an object whose last reference another thread drops stays until its own thread runs again.
    Threads here sleep for long, so a collection frees the object instead.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        gc.collect()
