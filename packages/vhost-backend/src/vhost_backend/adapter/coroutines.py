"""A worker whose thread runs an event loop, for devices with `async def handle`.

The worker's epoll descriptor is readable when one of the descriptors in it is. So the loop watches
that one descriptor and runs a round of the worker when it is readable. Coroutines run between
rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from virtqueue import Chain

from ..device.base import VirtioDevice, fail_request
from ..device.hooks import provided
from ..device.request import QueueInfo, Recall, Request, StatusRequest, check_use
from ..epoll_handler import VringEpollHandler
from ..features import RING_FEATURES
from ..vring.locks import Vring
from ..vring.state import VringState
from .device_backend import BATCH, DeviceBackend


class AsyncVringEpollHandler(VringEpollHandler):
    """One worker thread with an event loop of its own."""

    _loop: asyncio.AbstractEventLoop
    _ended: asyncio.Event
    _timer: asyncio.TimerHandle | None = None
    _failure: BaseException | None = None
    #: Busy polling: when to stop looking at the rings, and since when the loop may have slept.
    _look_end: float | None = None
    _idle_since: float | None = None

    def _work(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.run_in(asyncio.current_task())
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._turn()
        await self._ended.wait()
        self._loop.remove_reader(self._epoll.fileno())
        self.leave()
        if self._failure is not None:
            raise self._failure
        # asyncio.run cancels the requests that are still being worked on.

    def _turn(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            timeout = self._round(0)
        except BaseException as error:
            # The loop itself only logs an error of a callback and goes on.
            self._lost(error)
            return
        if self._stopping:
            self._ended.set()
        elif timeout is not None:
            self._look_end = self._idle_since = None
            self._timer = self._loop.call_later(timeout, self._turn)
        elif self._busy_poll:
            self._look_on()

    def _look_on(self) -> None:
        """Look at the rings for a while, in turns with the loop's other work."""
        now = time.monotonic()
        if self._idle_since is not None:
            self._slept(now - self._idle_since)
            self._look_end = self._idle_since = None
        if self._look_end is None:
            self._look_end = now + self._look
        found = self._with_chains()
        if found:
            self._look_end = None
            with self._lock:
                self._scan |= found
        elif now >= self._look_end:
            self._idle_since = now
            return
        self._timer = self._loop.call_later(0, self._turn)

    def run_in(self, host: asyncio.Task[object] | None) -> None:
        """Note the task that the worker lives in: a loop that ends cancels it with all others."""
        if isinstance(self._backend, AsyncDeviceBackend):
            self._backend.hosts[self._loop] = host

    def leave(self) -> None:
        """Forget the loop: what it still cancels stays in flight for a successor."""
        if isinstance(self._backend, AsyncDeviceBackend):
            self._backend.hosts.pop(self._loop, None)

    def _lost(self, error: BaseException) -> None:
        """Note the error that ends the worker."""
        self._failure = error
        self._ended.set()


class _Ending:
    """One wait for the coroutines of a queue to end."""

    def __init__(self, wake: Callable[[], None], keep: bool) -> None:
        self.wake = wake
        self.keep = keep
        self.ended = False


class _Served:
    """The coroutines of one queue. Changed on its worker's loop only."""

    def __init__(self, vring: Vring, loop: asyncio.AbstractEventLoop) -> None:
        self.vring = vring
        self.loop = loop
        self.generation = -1
        #: Whether the ring's requests in flight are recorded for a successor.
        self.recorded = False
        self.tasks: dict[asyncio.Task[None], Request] = {}
        #: Completions are staged; a callback of the loop will publish them.
        self.staged = False
        #: While the ring is being stopped: the waits for that, and the requests called back.
        self.endings: list[_Ending] = []
        self.recalled: list[Request] = []


class AsyncDeviceBackend(DeviceBackend):
    """A device whose `handle` is a coroutine function, each request a task of the worker's loop."""

    worker_type: type[VringEpollHandler] = AsyncVringEpollHandler
    # Without IN_ORDER: requests overtake each other, and a completed one would have to wait for
    # those before it.
    ring_features: int = RING_FEATURES

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device)
        self._served: dict[int, _Served] = {}
        #: For each loop the task that its worker lives in, or None.
        self.hosts: dict[asyncio.AbstractEventLoop, asyncio.Task[object] | None] = {}

    def queues_per_thread(self) -> Sequence[int]:
        """One worker for all queues, unless the device chooses.

        asyncio's objects that coroutines share (a Queue, an Event) belong to one loop.
        """
        if provided(self.device, VirtioDevice.queues_per_thread) is None:
            return [(1 << self.device.num_queues) - 1]
        return super().queues_per_thread()

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Start a task for each available request; pass other events on to the device."""
        if device_event >= len(vrings):
            self.device.handle_event(device_event, event_set)
            return False
        vring = vrings[device_event]
        with vring.get_mut() as state:
            if not state.running:
                return False
            state.disable_notification()
            batch = state.take(BATCH)
            if not batch:
                return False  # the driver has been asked for kicks
            view = self.view(state)
            loop = asyncio.get_running_loop()
            served = self._served.get(state.index)
            if served is None or served.loop is not loop:
                served = self._served[state.index] = _Served(vring, loop)
            served.generation = state.generation
            served.recorded = state.settings.inflight is not None
            waits = int(state.index in self.device.waiting_queues)
            make = StatusRequest if self.device.status_byte else Request
            for position, chain in enumerate(batch):
                if state.on_demand.has_stand_ins and not state.on_demand.usable(chain):
                    flags = int(self.device.status_byte)
                    state.add_used(chain, flags, self.device.error_status)
                    state.signal_used_queue()
                    continue
                request = make(batch, chain.record, position)
                _ = request.chain  # made now: the task needs it after the batch is gone
                request._waits, request._recalled = waits, False
                # With the lock: the thread that stops the ring finds a task for every request.
                task = loop.create_task(self._serve_one(served, view, request))
                served.tasks[task] = request
                task.add_done_callback(partial(self._task_ended, served))
        return True

    def suspend_queue(
        self, queue: int, wake: Callable[[], None], keep: bool = True
    ) -> Callable[[], bool]:
        """Call back the requests of a queue that only wait; nothing new is taken meanwhile.

        Other requests run to their end. Returns a function that tells whether all coroutines of the
        queue have ended; `wake` is called when they have. With `keep` a request that cannot be
        given back stays in the in-flight region, for the back-end that uses the region next.
        """
        served = self._served.get(queue)
        ending = _Ending(wake, keep)
        if served is None:
            ending.ended = True
        else:
            try:
                served.loop.call_soon_threadsafe(self._end, served, ending)
            except RuntimeError:  # the loop is closed, so its coroutines have ended
                ending.ended = True
        return lambda: ending.ended

    def _end(self, served: _Served, ending: _Ending) -> None:
        served.endings.append(ending)
        for task, request in served.tasks.items():
            # A request that is about to wait sees the mark when it does.
            already, request._recalled = request._recalled, True
            if request._waits and not already:
                task.cancel()
        self._settle(served)

    def _task_ended(self, served: _Served, task: asyncio.Task[None]) -> None:
        request = served.tasks.pop(task)
        if request._recalled and task.cancelled():
            served.recalled.append(request)
        self._settle(served)

    def _settle(self, served: _Served) -> None:
        """Return the requests called back, once all coroutines of a stopping ring have ended."""
        if not served.endings or served.tasks or served.staged:
            return
        endings, served.endings = served.endings, []
        requests, served.recalled = served.recalled, []
        keep = served.recorded and all(ending.keep for ending in endings)
        with served.vring.get_mut() as state:
            view = self.view(state)
            fates = self._return(state, served.generation, requests, keep)
        for request, fate in zip(requests, fates, strict=True):
            try:
                self.device.recalled(view, request, fate)
            except BaseException as error:
                fail_request(self.device, view, error)
        for ending in endings:
            ending.ended = True
            ending.wake()

    def _return(
        self, state: VringState, generation: int, requests: Sequence[Request], keep: bool
    ) -> list[Recall]:
        queue = state.queue
        if queue is None or state.generation != generation or not requests:
            return [Recall.GIVEN_BACK] * len(requests)
        if state.leaving and not keep:
            # The driver sees no completion any more: the next back-end starts before these.
            fates = [Recall.GIVEN_BACK] * len(requests)
        else:
            fresh = [request.chain for request in requests if not request.begun]
            heads = [request.chain.head for request in requests]
            given = set(queue.give_back(fresh))
            rest = Recall.KEPT if keep else Recall.EMPTY
            fates = [Recall.GIVEN_BACK if head in given else rest for head in heads]
        flags = int(self.device.status_byte)
        for request, fate in zip(requests, fates, strict=True):
            if fate is Recall.EMPTY or (state.leaving and not keep):
                state.add_used(request.chain, flags, self.device.error_status)
        state.signal_used_queue()
        return fates

    async def _serve_one(self, served: _Served, queue: QueueInfo, request: Request) -> None:
        flags = int(self.device.status_byte)
        try:
            waiting = self.device.handle(queue, request)
            if waiting is not None:
                await waiting
            check_use(request, None, flags)
            status, written = request.status, request.written + flags
        except GeneratorExit:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and (
                request._recalled or self._loop_ends(served.loop)
            ):
                raise
            # The device has raised it, or has cancelled the request's task itself.
            status, written = fail_request(self.device, queue, error), flags
        self._complete(served, request.chain, written, status)

    def _loop_ends(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether the loop is cancelling its tasks; their requests then stay for a successor."""
        host = self.hosts.get(loop)
        return host is None or host.done() or host.cancelling() > 0

    def _complete(self, served: _Served, chain: Chain, written: int, status: int) -> None:
        with served.vring.get_mut() as state:
            if state.generation != served.generation or state.queue is None:
                return
            state.queue.complete(chain, written, status)
        if not served.staged:
            # Completions of one turn of the loop are published and signalled together.
            served.staged = True
            served.loop.call_soon(self._publish, served)

    def _publish(self, served: _Served) -> None:
        with served.vring.get_mut() as state:
            state.signal_used_queue()
        served.staged = False
        self._settle(served)
