"""A worker whose thread runs an event loop, for devices with `async def handle`.

The worker's epoll descriptor is itself readable when one of its descriptors is, so the loop watches
just that and lets the worker have its round; between rounds coroutines run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from virtqueue import Chain

from .device import Queue, Request, VirtioDevice, check_use, fail_request
from .device_backend import BATCH, DeviceBackend
from .features import RING_FEATURES
from .vring_locks import Vring
from .worker import VringEpollHandler


class AsyncVringEpollHandler(VringEpollHandler):
    """One worker thread with an event loop of its own."""

    _loop: asyncio.AbstractEventLoop
    _ended: asyncio.Event
    _timer: asyncio.TimerHandle | None = None
    _failure: BaseException | None = None

    def _work(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._turn()
        await self._ended.wait()
        self._loop.remove_reader(self._epoll.fileno())
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
            # Nothing else would be told: a loop goes on when one of its callbacks has raised.
            self._lost(error)
            return
        if self._stopping:
            self._ended.set()
        elif timeout is not None:
            self._timer = self._loop.call_later(timeout, self._turn)

    def _lost(self, error: BaseException) -> None:
        """The worker cannot go on."""
        self._failure = error
        self._ended.set()


class AsyncDeviceBackend(DeviceBackend):
    """A device whose `handle` is a coroutine function, each request a task of the worker's loop."""

    worker_type: type[VringEpollHandler] = AsyncVringEpollHandler
    # Requests overtake each other: one that is done would have to wait for those before it.
    ring_features: int = RING_FEATURES

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device)
        #: Of each vring. Changed on its worker's loop only.
        self._tasks: dict[int, set[asyncio.Task[None]]] = {}
        #: Vrings with completions staged, to be published once the loop gets to it.
        self._staged: set[int] = set()

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Start a task for each request that waits; pass other events on."""
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
            generation = state.generation
            view = self.view(state)
            loop = asyncio.get_running_loop()
            tasks = self._tasks.setdefault(state.index, set())
            for position, chain in enumerate(batch):
                if state.on_demand.has_stand_ins and not state.on_demand.usable(chain):
                    flags = int(self.device.status_byte)
                    state.add_used(chain, flags, self.device.error_status)
                    state.signal_used_queue()
                    continue
                request = Request(batch, chain.record, position)
                _ = request.chain  # it outlives the batch
                # Still with the lock: who stops the ring next finds a task for all that was taken.
                task = loop.create_task(self._serve_one(vring, generation, view, request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        return True

    def suspend_queue(self, queue: int, wake: Callable[[], None]) -> Callable[[], bool]:
        """Cancel what a queue works on; nothing new is taken meanwhile.

        Returns what tells whether all of it has ended. `wake` is called when that may have changed.
        """
        tasks = self._tasks.get(queue)
        loops = {task.get_loop() for task in list(tasks or ())}

        def cancel() -> None:
            for task in list(tasks or ()):
                task.add_done_callback(lambda _: wake())
                task.cancel()

        for loop in loops:
            loop.call_soon_threadsafe(cancel)
        return lambda: not tasks and queue not in self._staged

    async def _serve_one(
        self, vring: Vring, generation: int, queue: Queue, request: Request
    ) -> None:
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
            # Whoever cancels the task wants it gone; a handler may raise the same by mistake.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise
            status, written = fail_request(self.device, queue, error), flags
        self._complete(vring, generation, request.chain, written, status)

    def _complete(
        self, vring: Vring, generation: int, chain: Chain, written: int, status: int
    ) -> None:
        with vring.get_mut() as state:
            if state.generation != generation or state.queue is None:
                return
            state.queue.complete(chain, written, status)
            index = state.index
        if index not in self._staged:
            # What completes in this turn of the loop is published, and signalled, together.
            self._staged.add(index)
            asyncio.get_running_loop().call_soon(self._publish, vring, index)

    def _publish(self, vring: Vring, index: int) -> None:
        with vring.get_mut() as state:
            state.signal_used_queue()
        self._staged.discard(index)
