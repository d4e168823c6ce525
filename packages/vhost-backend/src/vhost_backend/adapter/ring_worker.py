"""A worker that serves one queue from C.

Most workers have one queue (`VirtioDevice.queues_per_thread`). Such a worker claims its ring
(`RingLease`) and calls C, which looks, sleeps, takes, completes and signals. Python works on the
batch, and on none of it where the device has a handler in C. All that does not fit goes the long
way, `VringEpollHandler`'s round with `DeviceBackend.handle_event`: messages or descriptors beside
the ring, another engine, an error of the ring.
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
    """What this worker asks of its back-end, which is a `DeviceBackend`."""

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
        """End the thread, and with it its hold on handlers in C and their descriptors."""
        ended = super().stop(timeout)
        if ended:
            self._server = None
            for vring in self.vrings:
                with vring.get_ref() as state:
                    self._device.drop_handler(state.index)
        return ended

    def wake(self) -> None:
        """Have the thread look around, also out of a busy queue."""
        server = self._server
        if server is not None:
            server.interrupt()
        super().wake()

    def _round(self, timeout: float | None) -> float | None:
        if self._lease is not None and self._serve(self._lease):
            # Before looking: a `wake` from here on is noticed in the next round.
            if self._server is not None:
                self._server.clear_interrupt()
            # C has taken what epoll told: a kick, for which the next look may be the long way's, or
            # the first edge of a listener.
            self._again.add(0)
            if self._listeners:
                self._show_again()
            timeout = 0
        return super()._round(timeout)

    def _show_again(self) -> None:
        """Have epoll tell once more which listeners are ready."""
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
        """Serve the queue from C until there is something else to do; False when it cannot be."""
        kick_fd = self._kick_of.get(0, -1)
        if kick_fd not in self._edges or self._listeners or self._stopping:
            if self._server is not None:
                self._server = None  # and with it the ring and its memory
                _settle()
            return False
        state = lease.claim()
        try:
            server = self._server = self._adopt(state)
            if server is None:
                return False
            # A `wake` before there was a server could not interrupt it: look once more.
            if lease.begin(server) and not self._listeners and not self._stopping:
                self._turns(lease, state, server, kick_fd)
        except Exception:
            # The queue may be in any state: the long way finds out, and has it from now on.
            log.exception("%s: queue %d cannot be served from C", state.name, state.index)
            self._refused = state.generation
        finally:
            self._device.view(state).forget()
            lease.end()
        return True

    def _adopt(self, state: VringState) -> Server | None:
        """The server for the ring's present queue, or None when it has to go the long way."""
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
            # With a handler in C a batch comes to Python only now and then.
            turn = serve
        count = serve()
        while not lease.wanted:
            # Where it is negative, the same call made the long way says what that is.
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
            # A driver that waits for each request has to be signalled, which only `serve` does.
            # Otherwise the next batch may be there already: no need to let go of the GIL.
            count = serve() if count == 1 else turn() or serve()
        # A visitor waits, or came while a handler in C worked and may still be here.
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
        """Complete the batch the long way, unless a visitor has stopped or moved the ring."""
        if state.generation == generation:
            try:
                state.finish(count)
            except UsageError:
                # The batch stays the queue's: the long way sees what is wrong with it.
                log.debug("queue %d: a batch cannot be completed as it is", state.index)


def _settle() -> None:
    """Free unreferenced objects, without the GIL too.

    There an object stays when its last reference goes on another thread than the one that made it,
    until that thread runs again; and the threads here sleep. A collection does it in their stead.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        gc.collect()
